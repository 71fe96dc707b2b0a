"""Typed settings: one class for each stage, from which its command line, its YAML section, its record and its page in
``docs/reference.md`` come.

A field's type, default and docstring are written once, where it is declared. ``Section.read`` makes settings from plain
values; :mod:`digit_ds.command_line` makes them from a command line, :mod:`digit_ds.yaml_files` reads files of them.
"""

import ast
import inspect
import reprlib
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

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


def option_of(field: FieldInfo) -> Option:
    """A field's ``Option``, or an empty one."""
    return next((part for part in field.metadata if isinstance(part, Option)), Option())


def _names(section: type[Section]) -> Iterator[tuple[str, str, bool]]:
    """All that a field of a section can be called: name, field, and whether that name negates it (``no_flip``)."""
    for name, field in section.model_fields.items():
        option = option_of(field)
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
    return option_of(section.model_fields[name]).name or name


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
        option = option_of(field) if field is not None else Option()
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
    if field is not None and problem["type"] == "list_type" and get_origin(kind := plain(field.annotation)) is list:
        (inner,) = get_args(kind)
        kinds = get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (inner,)
        elements = [_ELEMENTS.get(plain(one)) for one in kinds]
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


def plain(annotation: Any) -> Any:
    """A type without ``None`` and without what ``Annotated`` adds."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            parts = [part for part in get_args(annotation) if part is not type(None)]
            annotation = parts[0] if len(parts) == 1 else str  # several types: as it is written
        else:
            return annotation
