"""YAML files of settings, read safely: a malformed one is one line."""

import re
from pathlib import Path
from typing import Any

import yaml

from digit_ds.errors import UserError


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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2020-13-45 is not a valid date
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
