"""digit-ds doctor under a launcher, for test_doctor.py: FOLDER [SHARDS], with an optional fault on rank 1."""

import os

import calls

from digit_ds.errors import run_command
from digit_ds.health import doctor
from digit_ds.parallel import launch


def main(arguments: list[str]) -> None:
    folder, shards = arguments[0], arguments[1] if len(arguments) > 1 else None
    if launch.rank() == 1 and os.environ.get("FAULT") == "version":
        doctor.version = lambda package: "0.1"
    if launch.rank() == 1 and os.environ.get("FAULT") == "folder":
        folder += "/elsewhere"  # as a node whose mount is another
        doctor.VISIBLE_SECONDS = 1.0
    if launch.rank() == 0 and os.environ.get("FAULT") == "folder":
        doctor.VISIBLE_SECONDS = 1.0
    calls.doctor(folder, shards)


if __name__ == "__main__":
    run_command(main)
