"""What faces are labelled with: tasks, their labels, and how people write them.

A task knows the columns of its labels, how to parse labels as people write them, and how to name a value in messages
and reports. ``UTKFACE`` has the three tasks of the UTKFace dataset; a configuration adds others or gives these other
classes (``data.tasks``).
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

from facecls.data.parsing import MISSING, UNKNOWN, LabelError, key_of, parse_years, whole_number, words_of
from facecls.errors import UserError

WRONG_YEARS = 6
"""An age further off counts as a mistake in pictures, as in the original notebook's grid."""

_ALIASES = {
    "male": ("m", "man", "boy"),
    "female": ("f", "woman", "girl"),
    "asian": ("east asian", "southeast asian"),
    "others": ("other", "latino hispanic", "latino", "hispanic", "middle eastern"),
}
"""Further words for a class of that name. UTKFace says that its others are "like Hispanic, Latino, Middle Eastern"; the
words are FairFace's."""
_COLUMNS = {"path", "file", "sha1", "split", "image", "index", "features", "error", "face", "faces", "reason"}
_SECTIONS = {
    "verdict",
    "summary",
    "data",
    "curves",
    "classes",
    "groups",
    "calibration",
    "gallery",
    "suspects",
    "limits",
}
_RESERVED = frozenset({*_COLUMNS, *_SECTIONS, "training", "combination"})
"""Names that mean something else in a table, a batch or a report."""
_ANY_CLASS = "all"
"""Stands in a table of groups for those that are not split by an attribute, so no class may be called so."""
_SHORT_PROBABILITIES = frozenset({"gender", "race"})
"""Tasks whose probabilities are called ``p_<class>``, as in version 0.1; those of others are ``p_<task>_<class>``."""


class TaskOptions(TypedDict, total=False):
    """What a configuration says of a task: either its classes or its highest age in years.

    Attributes:
        classes: Names by code, two or more.
        highest: The highest age in years.
    """

    classes: list[str]  # a type that says so, or jsonargparse would turn a quoted "no" into false
    highest: int


@dataclass(frozen=True)
class _Task(ABC):
    """What all kinds of tasks share.

    Attributes:
        name: Names the column, batch key, head and log keys.
    """

    name: str

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that hold its labels."""

    @property
    @abstractmethod
    def prediction_columns(self) -> dict[str, str]:
        """The columns that its predictions can have, with their types: ``str``, ``float32`` or ``Int16``."""

    @property
    @abstractmethod
    def options(self) -> TaskOptions:
        """What ``create_tasks`` makes it from: plain values, which files can keep."""

    @property
    def reserved(self) -> frozenset[str]:
        """Names of all its columns and outputs, which no other task may have."""
        endings = ("_predicted", "_distribution", "_band", "_low_raw", "_high_raw")
        names = {f"{self.name}{ending}" for ending in endings}
        return frozenset({*self.columns, *self.prediction_columns, *names, f"temperature_{self.name}"})

    @abstractmethod
    def text(self, value: float) -> str:
        """A label or a prediction in words."""

    def range_text(self, low: float, high: float) -> str:
        """A label that allows several values, in words."""
        return f"{self.text(low)}-{self.text(high)}"

    @property
    def title(self) -> str:
        """Its name in headings, such as ``Skin tone``."""
        return self.name.replace("_", " ").capitalize()


@dataclass(frozen=True)
class Classification(_Task):
    """A task whose labels are classes.

    Attributes:
        name: Names the column, batch key, head and log keys.
        classes: Names by code, two or more.
    """

    classes: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that hold its labels: one, with codes."""
        return (self.name,)

    @property
    def prediction_columns(self) -> dict[str, str]:
        """The most probable class, and the probability of each."""
        return {self.name: "str"} | dict.fromkeys(self.probabilities, "float32")

    @property
    def options(self) -> TaskOptions:
        """Its classes."""
        return {"classes": list(self.classes)}

    @cached_property
    def probabilities(self) -> tuple[str, ...]:
        """Columns of predictions that hold the probability of each class, by code."""
        prefix = "p" if self.name in _SHORT_PROBABILITIES else f"p_{self.name}"
        return tuple(f"{prefix}_{'_'.join(words_of(name))}" for name in self.classes)

    @cached_property
    def _codes(self) -> dict[str, int]:
        codes = {key_of(name): code for code, name in enumerate(self.classes)}
        for name, others in _ALIASES.items():
            if name in codes:
                codes = dict.fromkeys(others, codes[name]) | codes
        return codes

    @cached_property
    def _takes_codes(self) -> bool:
        """Whether numbers are codes; not where names have digits, since ``3`` may then mean the class ``3-9``."""
        return not any(character.isdigit() for name in self.classes for character in name)

    @property
    def expected(self) -> str:
        """The valid labels in words, for messages."""
        if not self._takes_codes:
            return ", ".join(self.classes)
        return ", ".join(f"{code} ({name})" for code, name in enumerate(self.classes))

    def parse(self, text: str) -> tuple[int, ...]:
        """Reads a label as people write it: a code, or the name of a class in any case.

        Args:
            text: A cell of a table, or a part of a file name.

        Returns:
            The code, or ``MISSING`` where the text stands for no label; by ``columns``.

        Raises:
            LabelError: If it is something else.

        Examples:
            >>> UTKFACE["gender"].parse("F"), UTKFACE["gender"].parse("0.0"), UTKFACE["race"].parse("")
            ((1,), (0,), (-1,))
        """
        code = self._codes.get(key_of(text))
        if code is None and text.strip().lower() in UNKNOWN:  # a class may be called none
            return (MISSING,)
        if code is None and self._takes_codes and (number := whole_number(text)) in range(len(self.classes)):
            code = number
        if code is None:
            raise LabelError(f"{self.name} is not {self.expected}")
        return (code,)

    def counts_from_one(self, texts: Iterable[str]) -> bool:
        """Whether codes seem to begin at 1, so that each would be taken for its neighbour.

        Args:
            texts: All labels of a table, as people write them.

        Examples:
            >>> UTKFACE["gender"].counts_from_one(["1", "2", "1"]), UTKFACE["gender"].counts_from_one(["0", "1", "2"])
            (True, False)
        """
        numbers = {number for number in map(whole_number, texts) if number is not None and number >= 0}
        return self._takes_codes and min(numbers, default=0) == 1 and max(numbers) == len(self.classes)

    def text(self, value: float) -> str:
        """A label or a prediction in words, such as ``female``."""
        return self.classes[int(value)]

    def is_wrong(self, label: float, predicted: float) -> bool:
        """Whether a prediction counts as a mistake."""
        return label != predicted


@dataclass(frozen=True)
class Age(_Task):
    """A task whose labels are years, or ranges of years.

    Attributes:
        name: Names the column, batch key, head and log keys.
        highest: The highest age in years; ages run from 0 to this, both included.
    """

    highest: int = 116

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table that hold its labels: the age; first and last year of a range, if any face has one."""
        return (self.name, *self.range)

    @property
    def prediction_columns(self) -> dict[str, str]:
        """The age, and its interval, which only comes from a head that knows a distribution."""
        return {self.name: "float32", f"{self.name}_low": "Int16", f"{self.name}_high": "Int16"}

    @property
    def options(self) -> TaskOptions:
        """Its highest age."""
        return {"highest": self.highest}

    @property
    def range(self) -> tuple[str, str]:
        """Columns of the first and the last year of a range."""
        return f"{self.name}_from", f"{self.name}_to"

    @property
    def expected(self) -> str:
        """The valid labels in words, for messages."""
        return f"a whole number of years from 0 to {self.highest} or a range of them"

    def parse(self, text: str) -> tuple[int, ...]:
        """Reads an age as people write it: ``26``, ``26.5``, or a range such as ``20-29``, ``more than 70``, ``60+``.

        Args:
            text: A cell of a table, or a part of a file name.

        Returns:
            Age, first and last year of a range, ``MISSING`` where there is none; by ``columns``. A range of one year
            is an age.

        Raises:
            LabelError: If it is something else.

        Examples:
            >>> age = UTKFACE["age"]
            >>> age.parse("26.5"), age.parse("20-29"), age.parse("more than 70")
            ((26, -1, -1), (-1, 20, 29), (-1, 70, 116))
        """
        years = parse_years(text, self.highest)
        if years is None:
            raise LabelError(f"{self.name} is not {self.expected}")
        return years

    def text(self, value: float) -> str:
        """A label or a prediction in words, such as ``34``."""
        return f"{value:.0f}"

    def range_text(self, low: float, high: float) -> str:
        """A range in words, such as ``20-29``, or ``70+`` where it ends at the highest age."""
        return f"{self.text(low)}+" if high == self.highest else super().range_text(low, high)

    def is_wrong(self, label: float, predicted: float) -> bool:
        """Whether a prediction counts as a mistake: more than ``WRONG_YEARS`` off."""
        return abs(label - predicted) > WRONG_YEARS


Task = Classification | Age
Tasks = Mapping[str, Task]
"""Tasks by name, in the order in which they are learned and shown."""

UTKFACE: Tasks = {
    "gender": Classification("gender", ("male", "female")),
    "race": Classification("race", ("white", "black", "asian", "indian", "others")),
    "age": Age("age"),  # its oldest face is 116
}
"""The tasks of UTKFace; names and codes are its own (https://susanqq.github.io/UTKFace)."""


def create_tasks(options: Mapping[str, TaskOptions | None]) -> dict[str, Task]:
    """The tasks of UTKFace with those of a configuration.

    Args:
        options: By name; ``None`` for a task of UTKFace as it is. A task of UTKFace is replaced in its place; others
            follow.

    Returns:
        The tasks by name.

    Raises:
        UserError: If a name or an option is not what it should be, or two tasks would have columns of the same name.

    Examples:
        >>> list(create_tasks({"glasses": {"classes": ["without", "with"]}}))
        ['gender', 'race', 'age', 'glasses']
    """
    tasks = dict(UTKFACE)
    for name, about in options.items():
        if about is not None:
            tasks[name] = _create_task(name, about)
        elif name not in tasks:
            raise UserError(f"Expected classes or a highest age for data.tasks.{name}, but got nothing; add classes.")
    owners: dict[str, str] = {}
    for task in tasks.values():
        for column in sorted(task.reserved):
            if column in owners:
                raise UserError(
                    f"Expected data.tasks whose columns differ, but {owners[column]} and {task.name} would both have "
                    f"{column}; name one differently."
                )
            owners[column] = task.name
    return tasks


def choose_tasks(known: Tasks, names: Sequence[str] | None) -> list[Task]:
    """Picks tasks by name.

    Args:
        known: All tasks.
        names: Which of them; ``None`` for all.

    Returns:
        The tasks, in the order of ``known``.

    Raises:
        UserError: If a name is unknown or there twice, or there is none.
    """
    if names is None:
        return list(known.values())
    if not names or len(set(names)) < len(names) or not set(names) <= set(known):
        raise UserError(
            f"Expected model.tasks with some of {', '.join(known)}, each once, but got {', '.join(names) or 'none'}; "
            "declare others in data.tasks."
        )
    return [task for task in known.values() if task.name in names]


def classifications(tasks: Iterable[Task]) -> list[Classification]:
    """The tasks whose labels are classes."""
    return [task for task in tasks if isinstance(task, Classification)]


def ages(tasks: Iterable[Task]) -> list[Age]:
    """The tasks whose labels are years."""
    return [task for task in tasks if isinstance(task, Age)]


def _create_task(name: str, about: Mapping[str, Any]) -> Task:
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _RESERVED:
        raise UserError(
            f"Expected a task's name in lower case, such as glasses, and not one of {', '.join(sorted(_RESERVED))}, "
            f"but got {name!r} in data.tasks; rename it."
        )
    if not isinstance(about, Mapping):
        raise UserError(
            f"Expected options for data.tasks.{name}, but got {about!r}; write {{classes: [first, second]}}."
        )
    if set(about) == {"highest"}:
        highest = about["highest"]
        if isinstance(highest, bool) or not isinstance(highest, int) or not 1 <= highest <= 999:
            raise UserError(f"Expected data.tasks.{name}.highest from 1 to 999 years, but got {highest!r}.")
        return Age(name, highest)
    if set(about) != {"classes"}:
        raise UserError(
            f"Expected either classes or highest for data.tasks.{name}, but got {', '.join(about) or 'nothing'}; "
            f"write {{{name}: {{classes: [first, second]}}}}."
        )
    return Classification(name, _checked_classes(name, about["classes"]))


def _checked_classes(name: str, classes: Any) -> tuple[str, ...]:
    if isinstance(classes, str) or not isinstance(classes, Sequence) or len(classes) < 2:
        raise UserError(f"Expected two classes or more for data.tasks.{name}, but got {classes!r}.")
    for each in classes:
        if not isinstance(each, str) or not words_of(each):
            raise UserError(
                f"Expected words as classes of data.tasks.{name}, but got {each!r}; YAML takes some words for other "
                'things, so put it in quotes, such as "no".'
            )
    keys = [key_of(each) for each in classes]
    if len(set(keys)) < len(keys):
        raise UserError(f"Expected different classes for data.tasks.{name}, but got {', '.join(classes)}.")
    if _ANY_CLASS in keys:
        raise UserError(
            f"Expected no class called {_ANY_CLASS!r} in data.tasks.{name}, which stands for all groups; rename it."
        )
    return tuple(classes)
