"""Replaces option names of version 0.1 with today's, wherever they are written."""

import locale
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from facecls.errors import UserError
from facecls.files import NOT_REGULAR, open_regular

RENAMED: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "model.schedule.norms": ("model.schedule.batchnorm", {"unfrozen": "train", "none": "frozen"}),
    "model.schedule.drops": ("model.schedule.lr_milestones", {}),
}
"""Old name -> new name, and the values that have new names as well."""
_CONFIG = ("config", "c")
_IS_UTF8 = locale.getpreferredencoding(do_setlocale=False).lower().replace("-", "") == "utf8"


def rename_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replaces old names of options: in dotted options, inside ``{...}``, and in files.

    A file with old names, after ``--config``, ``--model`` or ``--model.schedule``, is replaced by its contents, which
    these options take as well; so is one with other characters than ASCII where the locale is not UTF-8. Files that
    such a file names in turn are not read.

    Args:
        words: Words of a command line.

    Returns:
        The words with the present names, and a line for each name that was replaced.

    Raises:
        UserError: If such an option names a device, pipe or socket.

    Examples:
        >>> rename_options(["--model.schedule.norms=none", "--model.schedule", "{drops: {10: 0.1}, warmup: 0}"])[0]
        ['--model.schedule.batchnorm=frozen', '--model.schedule', '{lr_milestones: {10: 0.1}, warmup: 0}']
    """
    renamed, notes = list[str](), dict[str, None]()
    key = None  # of an option whose value is the next word
    for word in words:
        if word.startswith("-") and len(word) > 1:
            option, equals, value = word.partition("=")
            dashes = option[: len(option) - len(option.lstrip("-"))]
            key = option.lstrip("-")
            new = _rename_key(key, notes)
            renamed.append(f"{dashes}{new}{equals}{_rename_value(key, value, notes) if equals else ''}")
        else:
            renamed.append(word if key is None else _rename_value(key, word, notes))
    return renamed, list(notes)


def _rename_key(key: str, notes: dict[str, None]) -> str:
    for old, (new, _) in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            notes[f"{old} is now called {new}"] = None
            return new + key.removeprefix(old)
    return key


def _rename_value(key: str, value: str, notes: dict[str, None]) -> str:
    if key in RENAMED:
        return RENAMED[key][1].get(value, value)
    prefix = "" if key in _CONFIG else f"{key}."
    if not any(old.startswith(prefix) for old in RENAMED):
        return value
    try:
        text = _read(value)
        content = get_loader("yaml")(text)
    except (ValueError, yaml.YAMLError):
        return value  # the parser says what is wrong with it
    found = [old for old in RENAMED if old.startswith(prefix) and _rename_in(content, prefix, old)]
    notes |= {f"{old} is now called {RENAMED[old][0]}": None for old in found}
    # jsonargparse 4.49 reads files as the locale has it, which need not be UTF-8
    is_kept = not found and (text == value or text.isascii() or _IS_UTF8)
    return value if is_kept else yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10**9).strip()


def _read(value: str) -> str:
    """The contents of a file, or the value itself if it names none; what can be read only once is refused."""
    try:
        with open_regular(Path(value)) as stream:
            return stream.read().decode()
    except OSError as error:  # a long value is no file name
        if error.strerror == NOT_REGULAR:
            raise UserError(f"Expected a file of options, but {value} is {NOT_REGULAR}; copy it into a file.") from None
        return value
    except ValueError:
        return value


def _rename_in(content: Any, prefix: str, old: str) -> bool:
    """Renames an option in a nested mapping in place, and returns whether it was there."""
    new, values = RENAMED[old]
    *path, name = old.removeprefix(prefix).split(".")
    for part in path:
        content = content.get(part) if isinstance(content, dict) else None
    if not isinstance(content, dict) or name not in content:
        return False
    value, present = content[name], new.rpartition(".")[2]
    renamed = {present if key == name else key: entry for key, entry in content.items()}
    renamed[present] = values.get(value, value) if isinstance(value, str) else value
    content.clear()
    content.update(renamed)
    return True
