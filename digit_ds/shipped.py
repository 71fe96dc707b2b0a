"""Recipes and DeepSpeed configurations that come with the project, found by name from any working directory."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent
FOLDER = next(
    (folder for folder in (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs") if folder.is_dir()),
    _PACKAGE / "ds_configs",
)
"""``ds_configs/``: inside the package where it was installed, beside it in a checkout."""


def find(name: Path | str) -> Path | None:
    """The file as given (relative to the working directory), else the shipped one of that name; None: neither."""
    for candidate in (Path(name), FOLDER / name):
        if os.path.isfile(candidate):  # noqa: PTH113 (False for impossible names, which Path.is_file raises)
            return candidate
    return None


def names(suffix: str) -> str:
    """The shipped files with a suffix such as ``.yaml``, for an error message."""
    return ", ".join(sorted(path.name for path in FOLDER.glob(f"*{suffix}"))) or "none"
