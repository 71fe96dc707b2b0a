"""The command line of a stage, made from its settings: options, help, errors of one line."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from digit_ds.errors import UserError
from digit_ds.settings import Section, Settings, first_problem, key_of, option_of, plain


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, as all others of this project, and that takes overrides of a
    recipe (``section.key=value``) before, after and between options.
    """

    _intermixes = False
    _given: Sequence[str] = ()

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse's, which would give all positional arguments to the first place that takes one."""
        self._given = sys.argv[1:] if args is None else args
        if self._intermixes:
            return super().parse_known_args(args, namespace)
        several = any(action.nargs == "*" for action in self._get_positional_actions())
        if several:
            self._intermixes = True  # what follows calls this
            try:
                found, unknown = self.parse_known_intermixed_args(args, namespace)
            finally:
                self._intermixes = False
        else:
            found, unknown = super().parse_known_args(args, namespace)
        if unknown and self._subparsers is None:  # a verb names its own help and options, which those above lack
            self.error(self._unrecognized(unknown))
        return found, unknown

    def _unrecognized(self, unknown: Sequence[str]) -> str:
        """What is wrong with words that this parser does not know, and the options that they resemble."""
        shown = [
            name
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for name in action.option_strings
            if name.startswith("--")
        ]
        given = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = dict.fromkeys(name for word in given for name in difflib.get_close_matches(word, shown, n=1))
        return f"unrecognized arguments: {' '.join(unknown)}" + (f"; similar: {', '.join(near)}" if near else "")

    def _get_option_tuples(self, option_string: str) -> Any:
        """argparse's options that ``option_string`` abbreviates, with a warning: another option can make it ambiguous.

        A parser above verbs is also given the options of its verbs, which these parse themselves.
        """
        found = super()._get_option_tuples(option_string)
        if len(found) == 1 and option_string.startswith("--") and self._subparsers is None:
            given, full = option_string.partition("=")[0], found[0][1]
            print(f"warning: {given} is an abbreviation of {full}, expected the full name", file=sys.stderr)
        return found

    def error(self, message: str) -> Any:
        """Refuse the command line. An option may be missing because it is misspelt, which argparse looks for later."""
        if "required" in message and self._subparsers is None:
            known = " ".join(self._option_string_actions)
            unknown = [word for word in self._given if word.startswith("--") and word.partition("=")[0] not in known]
            message = self._unrecognized(unknown) if unknown else message
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, section: type[Section]) -> None:
    """An option for each field of ``section``: flag, type, choices, default and help from its declaration."""
    groups: dict[str, Any] = {"": parser}
    for name, field in section.model_fields.items():
        option = option_of(field)
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        words = {
            "help": argparse.SUPPRESS if option.hidden else _help(field),
            "default": argparse.SUPPRESS,
            **_value(field),
        }
        if "type" in words:
            words.setdefault("metavar", key_of(section, name).upper())
        if option.positional:
            if not field.is_required():
                words["nargs"] = words.get("nargs", "?").replace("+", "*")
            groups[option.group].add_argument(name, **words)
            continue
        if words.get("nargs") == "+":
            words["action"] = "extend"  # a flag that is given twice adds
        flag = _flag(key_of(section, name))
        groups[option.group].add_argument(flag, dest=name, required=field.is_required(), **words)
        for alias in option.aliases:
            parser.add_argument(_flag(alias), dest=name, **{**words, "help": argparse.SUPPRESS})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(field: FieldInfo) -> dict[str, Any]:
    """How argparse is to read a field's value. Choices and ranges are the settings' own to check."""
    kind, metavar = plain(field.annotation), option_of(field).metavar
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    words: dict[str, Any] = {}
    if get_origin(kind) in (list, tuple):
        inner = [plain(part) for part in get_args(kind)]
        several = get_origin(kind) is list or Ellipsis in inner
        words, kind = {"nargs": "+" if several else len(inner)}, inner[0]
    if get_origin(kind) is Literal:
        words["metavar"] = "{" + ",".join(map(str, get_args(kind))) + "}"
        kind = type(get_args(kind)[0])
    words["type"] = kind
    return words if metavar is None else words | {"metavar": metavar}


def _help(field: FieldInfo) -> str:
    """A field's docstring in one line, with its default where that says something."""
    text = " ".join((field.description or "").replace("``", "").split()).removesuffix(".")
    return (text + default_text(field)).replace("%", "%%")


def default_text(field: FieldInfo) -> str:
    """`` (default: 3)``; nothing where there is none or the docstring says what happens."""
    default = field.get_default(call_default_factory=True)
    if field.is_required() or default is None or default is False or default == []:
        return ""
    if default is True:
        return " (default: yes)"
    return f" (default: {' '.join(map(str, default)) if isinstance(default, (list, tuple)) else default})"


def from_options(section: type[Settings], options: argparse.Namespace) -> Settings:
    """The settings that a parsed command line gives.

    Raises:
        UserError: names the first option that is outside its range or does not fit another one.
    """
    given = {name: value for name, value in vars(options).items() if name in section.model_fields}
    try:
        return section.model_validate(given)
    except ValidationError as error:
        raise UserError(first_problem(error, section, flags=True)) from error
