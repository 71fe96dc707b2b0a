"""``RUN/history.jsonl``: what was done to a run, one JSON object a line: starts, changes, rollbacks, fallbacks."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from digit_ds.files import make_directory

HISTORY = "history.jsonl"


def record(run: Path, event: str, step: int, **details: Any) -> None:
    """Append an event (rank 0): its time (UTC), name, the step it concerns and details."""
    line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, "step": step, **details}
    make_directory(run)
    with (run / HISTORY).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
