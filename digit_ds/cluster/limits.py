"""Time limits and amounts of memory as sbatch reads them."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator

_TIMES = (
    re.compile(r"(?P<minutes>\d+)(:(?P<seconds>\d+))?"),
    re.compile(r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)"),
    re.compile(r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?"),
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_UNLIMITED = ("infinite", "unlimited")


def seconds_of(limit: str) -> float:
    """Seconds of a time limit; infinite where there is none, which 0 means too.

    Raises:
        ValueError: sbatch would refuse it; says what it accepts.
    """
    if limit.lower() in _UNLIMITED:
        return float("inf")
    if match := next(filter(None, (form.fullmatch(limit) for form in _TIMES)), None):
        found = sum(_SECONDS[unit] * int(number or 0) for unit, number in match.groupdict().items())
        return found or float("inf")
    raise ValueError(
        "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
    )


def _time_limit(value: Any) -> Any:
    if not isinstance(value, str):  # without quotes YAML reads 24:00:00 as 86400
        raise ValueError('a time in quotes, such as "24:00:00"')
    seconds_of(value)
    return value


def _memory(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"\d+[KMGT]?", value, re.IGNORECASE):
        raise ValueError('a whole number in quotes with K, M, G or T (none: M), such as "400G"')
    return value


TimeLimit = Annotated[str, BeforeValidator(_time_limit)]
"""What ``sbatch --time`` accepts."""
Memory = Annotated[str, BeforeValidator(_memory)]
"""What ``sbatch --mem`` accepts."""
