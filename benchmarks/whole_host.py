"""Everything that needs a host of several GPUs, in one command: tests, weak scaling, losses, checkpoints, stages.

    python benchmarks/whole_host.py --out results                      # all GPUs; on 8 H100 about two hours
    python benchmarks/whole_host.py --out results --minutes 10         # what fits; the same call goes on
    python benchmarks/whole_host.py --out results --only weak_scaling stability
    python benchmarks/whole_host.py --list

Each part writes OUT/PART.log and, where it has figures, OUT/PART.json. A part that ended is not run again (remove its
line from OUT/done.json for that). One that is cut off by ``--minutes`` goes on where it was if it can: weak scaling
after its last measurement, the comparisons of losses from the last checkpoint. Runs and checkpoints are kept in
``--scratch`` until the comparison that they belong to is done: 90 GB for 3.7B.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from ranks import ROOT

SEQUENCE = "zero1,parallel.tensor=2,parallel.sequence=true"


@dataclass(frozen=True)
class Part:
    """A command, relative to the repository, and the minutes that it may take on 8 H100."""

    minutes: int
    command: list[str]


def parts(gpus: int, small: bool, out: Path, scratch: Path) -> dict[str, Part]:
    """All parts by name, the short ones first; ``small``: what two cores can do."""
    counts = [str(count) for count in (1, 2, 4, 8) if count <= gpus]
    ends = [counts[0], str(gpus)]
    tail = ",compile=false" if small else ""
    half = gpus // 2

    def tests(name: str) -> list[str]:
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/gpu/{name}.py"]

    def bench(name: str, *arguments: object) -> list[str]:
        return [f"benchmarks/{name}.py", *map(str, arguments)]

    def losses(size: str, variants: list[str], part: str, *arguments: object) -> list[str]:
        given = ("--json", out / f"{part}.json", "--folder", scratch / part, "--gpus", gpus, *arguments)
        return bench("loss_parity", "--size", size, *given, "--variants", *(each + tail for each in variants))

    sizes = ("--layers", 2, "--width", 64, "--heads", 4) if small else ("--layers", 32, "--width", 3072, "--heads", 24)
    before, after = (f"zero1-tp2-dp{half}", f"zero3-dp{gpus}")
    memory = bench("start_memory", *sizes, "--layouts", before, after, "--starts", "new", "resume")
    reshape = bench("start_memory", *sizes, "--layouts", before, "--starts", "resume", "--resume-at", after)
    scaling = ("--sizes", "tiny", "--batch", 2, "--steps", 20, "--variants", f"zero1{tail}") if small else ()
    stages = {
        f"{stage}_speed": Part(
            5,
            bench("stages_speed", "--stages", stage, "--gpus", *ends, "--json", out / f"{stage}_speed.json")
            + ["--small"] * small,
        )
        for stage in ("kmeans", "tokenize", "sample")
    }
    parity = ("--steps", 40, "--batch", 2) if small else ()
    steady = ("--steps", 200, "--batch", 2, "--slice", 5) if small else ("--steps", 600, "--batch", 32, "--slice", 120)
    layouts = ["zero1", "zero3_overlap", SEQUENCE, f"zero2_overlap{SEQUENCE.removeprefix('zero1')}"]
    return {
        "loss_parity": Part(8, losses("tiny" if small else "base", layouts, "loss_parity", *parity)),
        "many_gpus": Part(15, tests("test_training_many_gpus")),
        "stages": Part(5, tests("test_stages_many_gpus")),
        "weak_scaling": Part(
            25, bench("weak_scaling", "--gpus", *counts, "--json", out / "weak_scaling.json", *scaling)
        ),
        "checkpoints": Part(10, memory),
        "reshape": Part(5, reshape),
        **stages,
        "stability": Part(20, losses("tiny" if small else "3.7b", ["zero3_overlap", SEQUENCE], "stability", *steady)),
        "two_gpus": Part(12, tests("test_training_two_gpus")),
    }


def run(name: str, part: Part, out: Path, gpus: int, seconds: float) -> int | None:
    """Exit status of a part; None: it was cut off after ``seconds``."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    if not torch.cuda.is_available():
        environment["DIGIT_DS_CPU_RANKS"] = str(gpus)
    with (out / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """As by Ctrl-C, so that it ends the ranks that have sessions of their own; then whatever is left of its own."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("whole_host"), help="logs and figures")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "digit_ds_whole_host")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 8, help="default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of the whole call")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--small", action="store_true", help="tiny models, for CPUs")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # parts are ended too
    out, scratch = options.out.resolve(), options.scratch.resolve()
    known = parts(options.gpus, options.small, out, scratch)
    if unknown := set(options.only or ()) - known.keys():
        parser.error(f"--only: no part {', '.join(sorted(unknown))}, expected {', '.join(known)}")
    chosen = {name: part for name, part in known.items() if name in (options.only or known)}
    if options.list:
        for name, part in chosen.items():
            print(f"{name}, {part.minutes} minutes: python {' '.join(part.command)}")
        return
    out.mkdir(parents=True, exist_ok=True)
    record = out / "done.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for name, part in chosen.items():
        if name in done:
            continue
        began = time.monotonic()
        status = run(name, part, out, options.gpus, max(1.0, deadline - began))
        if status is None:
            print(f"{name}: out of time, the same call goes on", flush=True)
            break
        done[name] = {"status": status, "minutes": round((time.monotonic() - began) / 60, 2)}
        record.write_text(json.dumps(done, indent=1))
        print(f"{name}: status {status} after {done[name]['minutes']} minutes, see {out / name}.log", flush=True)
    sys.exit(0 if all(done.get(name, {"status": 1})["status"] == 0 for name in chosen) else 1)


if __name__ == "__main__":
    main()
