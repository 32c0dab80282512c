"""The parser of options that are written on the command line and in YAML files, with errors that say what to write."""

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, get_loader, set_loader
from pytorch_lightning.cli import LightningArgumentParser

from facecls import plain_yaml
from facecls.errors import UserError, near, options_in

_UNKNOWN = (
    re.compile(r"unrecognized arguments: --(?P<option>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<option>[^']+)'"),
    re.compile(r"Parser key \"(?P<group>[^\"]+)\":.*Option '(?P<option>[^']+)' is not accepted", re.DOTALL),
    re.compile(r"Option '(?P<option>[^']+)' is not accepted"),
)
"""How jsonargparse 4.49 speaks of an unknown option: on the command line, in a file, of a class, at the top."""
_CLASS = re.compile(r"class_path[= ]'([\w.]+)'")
_VALUE = re.compile(r'Parser key "([\w.]+)":\s+Expected an? (.+)\. Got value: (.*)', re.DOTALL)
_VALUE_OF_SOME = re.compile(r'Parser key "([\w.]+)":.* Subtypes: \[(.+?)\]\n.*Given value: (.*)', re.DOTALL)
"""How jsonargparse 4.49 speaks of a value of another kind than an option's, or than the several that it takes."""
_KINDS = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'list'>": "a list such as [1, 2]",
    "list[str]": "a list such as [a, b]",
    "<class 'dict'>": "names and values such as {name: value}",
    "dict[str, float]": "names and numbers such as {name: 1}",
    "<class 'NoneType'>": "null",
}
_KIND = re.compile(r"typing\.Literal\[([^\]]*)\]|" + "|".join(map(re.escape, _KINDS)))
set_loader("yaml", partial(plain_yaml.load, parse=get_loader("yaml")), exceptions=(yaml.YAMLError,))


class OptionParser(LightningArgumentParser):
    """Lightning's parser, which suggests near names for an option that it does not know."""

    def parse_args(self, args: Sequence[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """As jsonargparse's.

        Raises:
            UserError: For an option that is not known, with those that are and where it is written; for a value of
                another kind than its option takes.
            ArgumentError: For other mistakes.
        """
        try:
            return super().parse_args(args, **kwargs)
        except ArgumentError as error:
            if (message := _explain(str(error), self, args or ()) or _explain_value(str(error), args or ())) is None:
                raise
            raise UserError(message) from None


def _explain(text: str, parser: LightningArgumentParser, words: Sequence[str]) -> str | None:
    """Says which option is not known and what may be meant; ``None`` for another error."""
    match = next((found for pattern in _UNKNOWN if (found := pattern.search(text))), None)
    if match is None:
        return None
    group, option = match.groupdict().get("group"), match["option"]
    class_name = _CLASS.search(text) if group is not None else None
    if class_name is None:
        name = option if group is None else f"{group}.{option}"
        known = [each.removeprefix("--") for each in options_in(parser.format_help())]
    else:
        name = f"{group}.init_args.{option}"
        module, _, own_name = class_name[1].rpartition(".")
        of_class = getattr(sys.modules[module], own_name)  # jsonargparse has imported it
        known = [f"{group}.init_args.{parameter}" for parameter in inspect.signature(of_class).parameters]
    place = _place(name.split("."), words)
    dashes = "" if place else "--"
    suggestion = near(f"{dashes}{name}", [f"{dashes}{each}" for each in known])
    return f"Expected an option that is known, but got {dashes}{name}{place}{suggestion}"


def _explain_value(text: str, words: Sequence[str]) -> str | None:
    """Says which values an option takes, without the names of Python's types; ``None`` for another error."""
    match = _VALUE.fullmatch(text.strip()) or _VALUE_OF_SOME.fullmatch(text.strip())
    if match is None or _KIND.sub("", match[2]).strip(" ,"):  # a kind that has no name here
        return None
    kinds = [_KINDS.get(kind[0]) or _choices(kind[1]) for kind in _KIND.finditer(match[2])]
    given = {"None": "null", "True": "true", "False": "false"}.get(match[3], match[3])
    written = [f"{word} {after}" for word, after in pairwise([*words, ""]) if word.startswith(f"--{match[1]}")]
    place = "" if any(given in text for text in written) else _place(match[1].split("."), words)
    return f"Expected {' or '.join(kinds)} for {'' if place else '--'}{match[1]}{place}, but got {given}; correct it."


def _choices(literal: str) -> str:
    """The values of a ``Literal``, each once, though it may be listed as a text and as a number."""
    values = dict.fromkeys(literal.replace("'", "").split(", "))
    return f"one of {', '.join(values)}"


def _place(keys: list[str], words: Sequence[str]) -> str:
    """The file and line of a YAML file, named on the command line, in which an option is written; else nothing."""
    places = [word.partition("=")[2] for word in words if word.startswith(("--config=", "-c="))]
    places += [after for word, after in pairwise(words) if word in ("--config", "-c")]
    for file in reversed(places):
        try:
            node = yaml.compose(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue
        if (line := _line(node, keys)) is not None:
            return f" in {file}, line {line}"
    return ""


def _line(node: Any, keys: list[str]) -> int | None:
    """The line of the key that a path of keys leads to."""
    line = None
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return None
        entries: Mapping[str, Any] = {each[0].value: each for each in node.value}
        if key not in entries:
            return None
        line, node = entries[key][0].start_mark.line + 1, entries[key][1]
    return line
