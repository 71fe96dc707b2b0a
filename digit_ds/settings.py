"""Typed settings: one class for each stage, from which its command line, its YAML section, its record and its page in
``docs/reference.md`` come.

A field's type, default and docstring are written once, where it is declared. ``Section.read`` makes settings from plain
values, ``add_options`` and ``from_options`` make them from a command line, ``read_yaml`` reads a file of them.
"""

import argparse
import ast
import difflib
import inspect
import re
import reprlib
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from digit_ds.errors import UserError


@dataclass(frozen=True)
class Option:
    """How a field looks on the command line, where its name and type do not say it: ``Annotated[int, Option(...)]``."""

    metavar: str | tuple[str, ...] | None = None
    """What stands for the value in the help."""
    name: str = ""
    """Name of the flag, and of the key in YAML, where it is not the field's: ``vqgan_config`` is ``--vqgan-config``."""
    aliases: tuple[str, ...] = ()
    """Earlier names, accepted and not shown."""
    positional: bool = False
    """Given by place, not by a flag."""
    group: str = ""
    """Heading in the help."""
    hidden: bool = False
    """Not shown: the option exists only to be refused with a line that says what to use instead."""


def _path(value: Any) -> Any:
    """A path as text, with ``~`` expanded; other types are left for the field's type to refuse."""
    if not isinstance(value, (str, Path)):
        return value
    if not str(value):
        raise ValueError("a path, not an empty text")
    try:
        return str(Path(value).expanduser()) if str(value).startswith("~") else str(value)
    except RuntimeError as error:
        raise ValueError(f"the home folder of an existing user ({error})") from error


_LONG = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ShortPrecision = BeforeValidator(lambda value: _LONG.get(value, value) if isinstance(value, str) else value)
"""For a choice of precisions: ``float32`` and the like, the names that PyTorch has, are taken for ``fp32``."""

PathText = Annotated[str, BeforeValidator(_path)]
"""A file, a folder or the URL of one, as text; ``~`` is expanded."""


Settings = TypeVar("Settings", bound="Section")


class Section(BaseModel):
    """Base of all settings: unknown keys are errors, strings are not converted to numbers, numbers are finite."""

    NOT_RECORDED: ClassVar[frozenset[str]] = frozenset()
    """Fields that ``record`` leaves out: paths, what changes no result, and what the job records by its content."""
    FIRST_RECORDED: ClassVar[frozenset[str]] = frozenset()
    """Fields that every record has; one that was added later is recorded where it is not at its default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Docstrings of fields that come from a dataclass, which pydantic does not read."""
        for base in cls.__mro__:
            if is_dataclass(base) and "__dataclass_fields__" in vars(base):
                for name, text in _docstrings(base).items():
                    cls.model_fields[name].description = text

    def record(self) -> dict[str, Any]:
        """The fields that decide a job's output, as JSON gives them back: what its directory keeps and compares.

        A new field is recorded unless ``NOT_RECORDED`` names it. A field at its default is left out, so that a job
        that was started before the field existed can continue.
        """
        return {
            name: value
            for name, value in self.model_dump(mode="json", exclude=set(self.NOT_RECORDED)).items()
            if name in self.FIRST_RECORDED or getattr(self, name) != type(self).model_fields[name].default
        }

    @classmethod
    def read(cls: type[Settings], values: Mapping[str, Any], source: str = "") -> Settings:
        """Settings from ``values`` by name; names of flags (``no_flip``) and earlier names are understood as well.

        Raises:
            UserError: the first key that is unknown, missing or of another type; ``source`` stands before it.
        """
        try:
            return cls.model_validate(_by_field(cls, values))
        except ValidationError as error:
            raise UserError(
                f"{source}: {first_problem(error, cls)}" if source else first_problem(error, cls)
            ) from error

    @classmethod
    def problems(cls, values: Mapping[str, Any]) -> list[str]:
        """Everything for which ``read`` would refuse ``values``, one phrase for each key; empty if it accepts them."""
        given = _by_field(cls, values)
        try:
            cls.model_validate(given)
        except ValidationError as error:
            found: dict[tuple[int | str, ...], str] = {}
            for problem in sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden"):
                place = _place(given, problem)
                found.setdefault(place, _phrase({**problem, "loc": place}, cls))
            return list(found.values())
        return []


def _place(values: Any, problem: Mapping[str, Any]) -> tuple[int | str, ...]:
    """The key of a problem: pydantic adds the members of a union, of which each refuses the value."""
    place: list[int | str] = []
    for part in problem["loc"]:
        if not isinstance(values, Mapping) or (part not in values and problem["type"] != "missing"):
            break
        place.append(part)
        values = values.get(part)
    return tuple(place)


def _docstrings(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a class."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _option(field: FieldInfo) -> Option:
    """A field's ``Option``, or an empty one."""
    return next((part for part in field.metadata if isinstance(part, Option)), Option())


def _names(section: type[Section]) -> Iterator[tuple[str, str, bool]]:
    """All that a field of a section can be called: name, field, and whether that name negates it (``no_flip``)."""
    for name, field in section.model_fields.items():
        option = _option(field)
        for other in (name, option.name, *option.aliases):
            if other:
                yield other, name, False
                if field.annotation is bool:
                    yield f"no_{other}", name, True


def _by_field(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` under the names of the fields."""
    known = {name: (field, contrary) for name, field, contrary in _names(section)}
    found: dict[str, Any] = {}
    for key, value in values.items():
        field, contrary = known.get(key, (key, False))
        found[field] = not value if contrary and isinstance(value, bool) else value
    return found


def spellings(section: type[Section]) -> dict[str, str]:
    """All keys that ``Section.read`` understands, each with the one that is shown."""
    return {
        name: f"no_{key_of(section, field)}" if contrary else key_of(section, field)
        for name, field, contrary in _names(section)
    }


def key_of(section: type[Section], name: str) -> str:
    """What a field is called in YAML and, with dashes, on the command line."""
    return _option(section.model_fields[name]).name or name


def first_problem(error: ValidationError, section: type[Section], flags: bool = False) -> str:
    """The first thing that is wrong as a phrase: key (with ``flags`` the option), what was found, what was expected."""
    problems = error.errors()
    # A misspelt required key is unknown and missing at once: its spelling is what the user can look for.
    return _phrase(
        next((found for found in problems if found["type"] == "extra_forbidden"), problems[0]), section, flags
    )


def _phrase(problem: Mapping[str, Any], section: type[Section], flags: bool = False) -> str:
    """One of pydantic's problems as ``first_problem`` gives it."""
    where = [part for part in problem["loc"] if part != "[key]"]
    fields: Any = section
    named: FieldInfo | None = None  # the innermost field
    for number, part in enumerate(where):  # list positions and union members are not sections
        if not (isinstance(fields, type) and issubclass(fields, Section)) or part not in fields.model_fields:
            break
        named = fields.model_fields[part]
        where[number], fields = key_of(fields, part), named.annotation
    key = ".".join(map(str, where))
    if flags and key:
        field = section.model_fields.get(str(problem["loc"][0]))
        option = _option(field) if field is not None else Option()
        key = str(option.metavar or key).upper() if option.positional else f"--{key.replace('_', '-')}"
    if problem["type"] == "extra_forbidden":
        names = ", ".join(key_of(fields, name) for name in fields.model_fields)
        return f"unknown key {key!r}, expected one of {names}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    said = _expected(problem, named)
    if not key:  # a check of several fields together
        return said if problem["type"] == "value_error" else f"is {brief(problem['input'])}, expected: {_small(said)}"
    return f"{key} is {brief(problem['input'])}, expected: {_small(said)}"


_BOUNDS = {"gt": "greater than", "ge": "greater than or equal to", "lt": "less than", "le": "less than or equal to"}
_ELEMENTS = {int: "integers", float: "numbers", str: "strings"}


def _expected(problem: Mapping[str, Any], field: FieldInfo | None) -> str:
    """What pydantic expected; all bounds of a number, and what a list holds."""
    if field is not None and problem["type"].startswith(("greater_than", "less_than")):
        bounds = [
            f"{words} {getattr(part, name):g}"
            for part in field.metadata
            for name, words in _BOUNDS.items()
            if hasattr(part, name)
        ]
        if len(bounds) > 1:
            return " and ".join(bounds)
    if field is not None and problem["type"] == "list_type" and get_origin(kind := _plain(field.annotation)) is list:
        (inner,) = get_args(kind)
        kinds = get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (inner,)
        elements = [_ELEMENTS.get(_plain(one)) for one in kinds]
        if all(elements):
            return f"a list of {' or '.join(map(str, elements))}"
    return str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")


def brief(value: Any) -> str:
    """A value in one line of bounded length: YAML aliases can expand a short file to a value of any size."""
    shortened = reprlib.Repr()
    shortened.maxlevel, shortened.maxstring, shortened.maxother, shortened.maxlong = 2, 80, 80, 80
    return shortened.repr(value)


def _small(text: str) -> str:
    return text[:1].lower() + text[1:]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``3e-4`` is a number, as in YAML 1.2 (PyYAML: a string), and duplicate keys are errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a second key of one name, of which PyYAML would silently keep the last."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):  # a list or a mapping, which makes no key of a recipe
                raise yaml.constructor.ConstructorError(None, None, "a key is not a string", key_node.start_mark)
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Any:
    """The value that a YAML text stands for.

    Raises:
        UserError: it is not valid YAML, or a key is given twice.
    """
    try:
        return yaml.load(text, _Loader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # 2020-13-45 is not a valid date
        raise UserError(f"{source}: is not valid YAML ({' '.join(str(error).split())})") from error


def read_yaml(path: Path, expected: str = "expected a YAML file") -> dict[str, Any]:
    """The mapping in a YAML file, UTF-8.

    Raises:
        UserError: it cannot be read, is not UTF-8, not valid YAML, has a key twice, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), {expected}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}), {expected} in UTF-8") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        held = "is empty" if values is None else f"holds {type(values).__name__}"
        raise UserError(f"{path}: {held}, expected a mapping of sections")
    return values


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, as all others of this project, and that takes overrides of a
    recipe (``section.key=value``) before, after and between options.
    """

    _intermixes = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        """As argparse's, which would give all positional arguments to the first place that takes one."""
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
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._similar(unknown)}")
        return found, unknown

    def _similar(self, unknown: Sequence[str]) -> str:
        """The options that the unknown ones resemble."""
        shown = [
            name
            for action in self._actions
            if action.help != argparse.SUPPRESS
            for name in action.option_strings
            if name.startswith("--")
        ]
        given = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        near = dict.fromkeys(name for word in given for name in difflib.get_close_matches(word, shown, n=1))
        return f"; similar: {', '.join(near)}" if near else ""

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
        """Refuse the command line."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, section: type[Section]) -> None:
    """An option for each field of ``section``: flag, type, choices, default and help from its declaration."""
    groups: dict[str, Any] = {"": parser}
    for name, field in section.model_fields.items():
        option = _option(field)
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


def _plain(annotation: Any) -> Any:
    """A type without ``None`` and without what ``Annotated`` adds."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            parts = [part for part in get_args(annotation) if part is not type(None)]
            annotation = parts[0] if len(parts) == 1 else str  # several types: as it is written
        else:
            return annotation


def _value(field: FieldInfo) -> dict[str, Any]:
    """How argparse is to read a field's value. Choices and ranges are the settings' own to check."""
    kind, metavar = _plain(field.annotation), _option(field).metavar
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    words: dict[str, Any] = {}
    if get_origin(kind) in (list, tuple):
        inner = [_plain(part) for part in get_args(kind)]
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
