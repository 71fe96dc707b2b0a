"""Writes docs/reference.md: every command's options and every field of a recipe, from the settings classes.

python docs/draw_reference.py
"""

import argparse
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from digit_ds.cli import VERBS, Verb
from digit_ds.command_line import Parser, add_options
from digit_ds.config import Recipe
from digit_ds.settings import Section
from digit_ds.training.metric_names import MEANINGS

PAGE = Path(__file__).parent / "reference.md"
HEAD = """# Reference

Written by `python docs/draw_reference.py` from the settings classes: all options of `digit-ds` and all fields of a
recipe. In a Slurm chain the sections have the options under the same names with `_` for `-`. The scripts in `tools/`
take the options of their verbs. Every command also takes `--debug`, which shows the traceback of an error, and
`--help`.

| exit status | meaning |
| --- | --- |
| 0 | done, or complete already |
| 2 | refused: one line on stderr says what was found and what was expected |
| 75 | a training was stopped by a signal and saved; the same command continues |
| 130 | interrupted by Ctrl-C |
| other | an error of the program or of the machine; `docs/faults.md` says what happens when |

"""
METRICS = """
## Metrics

A training appends a line of JSON to `RUN/metrics.jsonl` every `monitor.log_every` steps and writes the same numbers to
TensorBoard (`RUN/tb`). Lines of steps that are done again after a resume replace the earlier ones.

| metric | meaning |
| --- | --- |
"""


def commands(verbs: Mapping[str, Verb | Mapping[str, Verb]], prefix: str = "digit-ds") -> Iterator[str]:
    """A chapter for each command."""
    for name, verb in verbs.items():
        if isinstance(verb, Mapping):
            yield from commands(verb, f"{prefix} {name}")
            continue
        section = verb[0]
        parser = Parser(prog=f"{prefix} {name}", add_help=False)
        add_options(parser, section)
        yield f"## {prefix} {name}\n\n{inspect.cleandoc(section.__doc__ or '').replace('``', '`')}\n"
        yield "\n| option | value | meaning |\n| --- | --- | --- |\n"
        for action in parser._actions:
            if action.help != argparse.SUPPRESS:
                yield _row(action)
        yield "\n"


def _row(action: argparse.Action) -> str:
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest}`"
    metavar = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar or ())
    value = "" if action.nargs == 0 else f"`{metavar}`".replace("|", "\\|")
    meaning = (action.help or "").replace("%%", "%").replace("|", "\\|")
    return f"| {flags} | {value} | {meaning}{' **Required.**' if action.required and action.option_strings else ''} |\n"


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A table of the section's fields, then one for each section below it."""
    below: list[tuple[str, type[Section]]] = []
    yield "| field | default | meaning |\n| --- | --- | --- |\n"
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            below.append((name, kind))
            continue
        text = _meaning(field)
        yield f"| `{prefix}{name}` | {_default(field)} | {text} |\n"
    for name, kind in below:
        about = " ".join((kind.__doc__ or "").replace("``", "`").split())
        yield f"\n### {prefix}{name}\n\n{about}\n\n"
        yield from fields(kind, f"{prefix}{name}.")


def _meaning(field: FieldInfo) -> str:
    """The description, and the choices of a ``Literal`` that it does not name."""
    text = " ".join((field.description or "").replace("``", "`").split()).replace("|", "\\|")
    choices = [f"`{choice}`" for choice in _choices(field.annotation) if isinstance(choice, str)]
    if all(choice in text for choice in choices):
        return text
    return f"{text} One of {', '.join(choices)}."


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a ``Literal``, which may be optional or annotated."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple):
        value = list(value)
    return "unset" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def page() -> str:
    """The whole page."""
    recipe = "## Recipe\n\nFields of the YAML file that `digit-ds train` reads; `section.key=value` overrides one.\n\n"
    metrics = "".join(f"| `{name}` | {meaning} |\n" for name, meaning in MEANINGS.items())
    return HEAD + "".join(commands(VERBS)) + recipe + "".join(fields(Recipe)) + METRICS + metrics


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
