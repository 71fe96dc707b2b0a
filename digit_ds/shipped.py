"""Recipes, DeepSpeed configurations and job scripts that come with the project, found from any working directory.

They lie beside the package in a checkout and inside it where it was installed: ``ds_configs/``, ``slurm/``, ``tools/``.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).parent
HOME = _PACKAGE if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent
"""What holds the shipped folders: the package or the checkout."""
FOLDER = HOME / "ds_configs"
"""Recipes and DeepSpeed configurations."""
ROOT = Path.cwd() if HOME == _PACKAGE else HOME
"""Where the relative paths of a chain start: the checkout, or the working directory of an installed package."""


def find(name: Path | str) -> Path | None:
    """The file as given (relative to the working directory), else the shipped one of that name; None: neither.

    A shipped file may also be named with its folder, as in a checkout: ``slurm/digits.yaml``.
    """
    for candidate in (Path(name), FOLDER / name, HOME / name, _PACKAGE.parent / name):
        if os.path.isfile(candidate):  # noqa: PTH113 (False for impossible names, which Path.is_file raises)
            return candidate
    return None


def names(suffix: str) -> str:
    """The shipped files with a suffix such as ``.yaml``, for an error message."""
    return ", ".join(sorted(path.name for path in FOLDER.glob(f"*{suffix}"))) or "none"
