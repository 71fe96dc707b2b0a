"""The stand-in for Python on the cluster: it records its arguments and behaves as a test specifies.

The mechanics of jobs (order, signals, requeueing, failures) are tested with it in seconds; what the jobs compute is
tested with the real programs in test_slurm_chain.py. ``STUB`` names a folder: ``behaviour.json`` says what a step
does, ``calls.jsonl`` what was called.
"""

import json
import os
import signal
import time
from pathlib import Path

from digit_ds.errors import UserError, run_command


def main(arguments: list[str]) -> int:
    folder, rank = Path(os.environ["STUB"]), int(os.environ.get("SLURM_PROCID", 0))
    name = os.environ["SLURM_JOB_NAME"].removeprefix("digit-")
    behaviour = json.loads((folder / "behaviour.json").read_text()).get(name, {})
    call = {
        "step": name,
        "arguments": arguments,
        "rank": rank,
        "tasks": int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)),
        "node": os.environ["SLURMD_NODENAME"],
        "environment": {key: os.environ.get(key) for key in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")},
    }
    with (folder / "calls.jsonl").open("a") as stream:
        stream.write(json.dumps(call) + "\n")
    if "error" in behaviour:
        raise UserError(behaviour["error"])
    if behaviour.get("killed") == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    while behaviour.get("gate") and not (folder / "open").exists():
        time.sleep(0.1)
    if "train" in arguments:
        return _train(folder, name, rank, behaviour.get("steps", 1))
    if rank == 0:
        product = {"export": arguments[-1] + "/config.json", "tools/verify_shards.py": folder / "verified"}
        key = arguments[2] if arguments[0] == "-m" else arguments[0]
        path = Path(product.get(key) or arguments[arguments.index("--out") + 1])
        if name in ("features", "tokenize", "tokenize_validation", "sample"):
            path = path / "manifest.json" if key != "tools/verify_shards.py" else path
        if name == "probe":
            path = path / "probe.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return 0


def _train(folder: Path, name: str, rank: int, steps: int) -> int:
    """Count to ``steps``, ten a second; told to stop: save the count and leave with the status that asks for more."""
    told: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    saved = folder / f"{name}.{rank}"
    step = int(saved.read_text()) if saved.exists() else 0
    while step < steps:
        time.sleep(0.1)
        step += 1
        with (folder / f"{name}.{rank}.steps").open("a") as stream:
            stream.write(f"{step}\n")
        if told:
            saved.write_text(str(step))
            print(f"rank {rank} saved step {step}", flush=True)
            return 75
    return 0


if __name__ == "__main__":
    run_command(main)
