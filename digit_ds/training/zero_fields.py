"""Private fields of DeepSpeed that ``zero.py`` and ``zero_methods.py`` use: checked before the first step.

A version of DeepSpeed that renamed one is refused by its name when the engine is built, not at the first checkpoint.
"""

from importlib.metadata import version

from digit_ds.errors import UserError


class MissingField(UserError):
    """The installed DeepSpeed lacks a private field that this file reads."""

    def __init__(self, owner: object, name: str) -> None:
        super().__init__(
            f"DeepSpeed {version('deepspeed')} has no field {name} in {type(owner).__name__}, which "
            "digit_ds/training uses; install the version in constraints.txt or change the files zero*.py there"
        )


def check(owner: object, *names: str) -> None:
    """Refuse a DeepSpeed whose object lacks one of these private fields.

    Raises:
        MissingField: names the field and the version.
    """
    for name in names:
        if not hasattr(owner, name):
            raise MissingField(owner, name)
