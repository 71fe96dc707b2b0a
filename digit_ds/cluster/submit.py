"""``digit-ds submit``: submit what a chain lacks, or report its status.

Submitting again is always safe: what is complete is skipped, what is queued or running is left alone and waited for,
what failed is started again and continues from what it had done.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from digit_ds import shipped
from digit_ds.cluster.chain import (
    Chain,
    Site,
    Step,
    absolute,
    load,
    sbatch,
    steps,
)
from digit_ds.cluster.settings import SubmitSettings
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json

WIDTH = 100
"""Characters of a printed line."""
QUEUED = (
    *("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING"),
    *("SIGNALING", "STAGE_OUT", "STOPPED"),
)
"""States of a job that has not ended."""


def submit(settings: SubmitSettings) -> None:
    """Submit the chain's steps that are not complete, print their status, or run the doctor on the cluster.

    Raises:
        UserError: the chain or the site cannot work, or Slurm refuses.
        SystemExit: with status 1 where ``--status`` reports a failed step, with the doctor's where it finds a problem.
    """
    path = shipped.find(settings.chain) or Path(settings.chain)
    if settings.status:
        chain = load(path, Chain)
        raise SystemExit(_status(steps(chain), absolute(chain.out)))
    if settings.doctor:
        raise SystemExit(_doctor(load(_site(settings), Site), absolute(load(path, Chain).out)))
    from digit_ds.cluster.checks import load_checked  # here, because --status need not wait for recipes

    chain, site = load_checked(path, _site(settings), every=settings.dry_run)
    if settings.dry_run:
        from digit_ds.cluster.costs import table  # here, because --status need not wait for the model

        print("\n".join(table(chain, site, steps(chain), settings.images)))
    _submit(steps(chain), site, absolute(chain.out), settings)


def _site(settings: SubmitSettings) -> Path:
    """The site file that is meant.

    Raises:
        UserError: none was named, and there is none at the default place yet.
    """
    if settings.site:
        return Path(settings.site)
    path = shipped.ROOT / "slurm" / "site.yaml"
    if not path.exists():
        example = shipped.HOME / "slurm" / "site.example.yaml"
        raise UserError(f"{path}: does not exist, expected your cluster's site file: copy {example} there and edit it")
    return path


def _submit(chain_steps: list[Step], site: Site, folder: Path, settings: SubmitSettings) -> None:
    """Submit what is not complete, each job after the ones that it needs."""
    queue = _queue(settings.dry_run)
    wanted = _wanted(chain_steps, folder)
    if not settings.dry_run:
        _make_folders(folder)
    jobs: dict[str, int] = {}  # of the steps that are not complete
    submitted: list[int] = []
    for step in chain_steps:
        if step.name not in wanted:
            print(f"{step.name:20} complete")
            continue
        record = _record(folder, step.name, "submitted")
        if record and queue.get(record["job"], ("",))[0] in QUEUED:
            if record["arguments"] != list(step.arguments):
                raise UserError(
                    f"{step.name} is in the queue as job {record['job']} with other arguments, "
                    f"expected the same ones: scancel {record['job']} first"
                )
            jobs[step.name] = record["job"]
            print(f"{step.name:20} job {record['job']}, in the queue already")
            continue
        after = [jobs[name] for name in step.needs if name in jobs]
        command, variables = sbatch(step, site, folder, after)
        if settings.dry_run:
            print(f"\n# {step.name}\n{_shell(command, variables)}")
            jobs[step.name] = 0
            continue
        result = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        if result.returncode:
            if submitted:
                subprocess.run(["scancel", *map(str, submitted)], check=False)
            raise UserError(f"sbatch refused step {step.name}, nothing was submitted: {_said(result.stderr)}")
        job = int(result.stdout.split(";")[0])
        submitted.append(job)
        jobs[step.name] = job
        write_json(folder / "steps" / f"{step.name}.submitted.json", {"job": job, "arguments": list(step.arguments)})
        print(f"{step.name:20} job {job}" + (f", after {', '.join(map(str, after))}" if after else ""))
    if submitted:
        numbers = ",".join(map(str, submitted))
        print(
            f"\nwatch the queue:   squeue --jobs={numbers}\n"
            f"read the logs:     tail -F {folder}/logs/*\n"
            f"status:            {_command()} {settings.chain} --status\n"
            f"curves:            tensorboard --logdir {folder}/runs\n"
            f"stop everything:   scancel {numbers.replace(',', ' ')}"
        )


def _command() -> str:
    """How this command was called."""
    return sys.argv[0] if sys.argv[0].endswith("submit.py") else f"{sys.argv[0]} submit"


def _doctor(site: Site, folder: Path) -> int:
    """Run the preflight on the nodes of the site, wait for it and print its log; its exit status."""
    step = Step("doctor", ("-m", "digit_ds", "doctor"), ("--folder", str(folder)), (), folder)
    command, variables = sbatch(step, site, folder, [])
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]} is not installed here, expected a login node of a Slurm cluster")
    _queue()  # refuses where no controller answers, before anything is written
    _make_folders(folder)
    result = subprocess.run(
        [*command[:1], "--wait", *command[1:]], env=os.environ | variables, capture_output=True, text=True
    )
    if not result.stdout.strip():
        raise UserError(f"sbatch refused the doctor: {_said(result.stderr)}")
    log = folder / "logs" / f"digit-doctor-{result.stdout.split(';')[0].strip()}.out"
    print(log.read_text(encoding="utf-8", errors="replace") if log.exists() else f"it left no log in {log.parent}")
    return result.returncode


def _make_folders(folder: Path) -> None:
    """Slurm does not create the folder of a log: the job would fail without output."""
    for name in ("logs", "steps"):
        (folder / name).mkdir(parents=True, exist_ok=True)


def _said(stderr: str) -> str:
    """Why sbatch refused: the first line of its output."""
    lines = [line.removeprefix("sbatch: error: ") for line in stderr.strip().splitlines()]
    return lines[0] if lines else "it gave no reason"


def _wanted(chain_steps: list[Step], folder: Path) -> set[str]:
    """Names of the steps to run: those not complete, and those whose product they miss.

    A product that was deleted after use (features take much room) is made again only if a later step needs it.
    """
    wanted: set[str] = set()
    for step in reversed(chain_steps):
        state, record = _record(folder, step.name), _record(folder, step.name, "submitted")
        done = bool(state and record) and state["status"] == "complete" and state["job"] == record["job"]
        if done and record["arguments"] != list(step.arguments):
            raise UserError(
                f"{step.name} is complete with other arguments than the chain's recipe has now: "
                f"give the recipe another out, or remove {folder / 'steps' / step.name}.json to run it again"
            )
        readers = [other for other in chain_steps if step.name in other.needs]
        if not done or (not step.product.exists() and (not readers or any(r.name in wanted for r in readers))):
            wanted.add(step.name)
    return wanted


def _record(folder: Path, name: str, kind: str = "") -> dict[str, Any]:
    """What submit.py (``submitted``) or the job itself wrote down about a step; empty if nothing."""
    path = folder / "steps" / (f"{name}.{kind}.json" if kind else f"{name}.json")
    return read_json(path) if path.exists() else {}


def _queue(optional: bool = False) -> dict[int, tuple[str, str, str]]:
    """State, reason and nodes of this user's jobs that Slurm still lists; ``optional``: none without Slurm."""
    command = ["squeue", "--me", "--states=all", "--noheader", "--format=%i|%T|%r|%N"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        if optional:
            return {}
        raise UserError("squeue is not installed here, expected a login node of a Slurm cluster") from error
    if result.returncode and optional:
        return {}
    if result.returncode:
        said = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
        raise UserError(f"squeue failed: {said}; expected a running Slurm controller: check SLURM_CONF")
    rows = [line.split("|") for line in result.stdout.splitlines()]
    return {int(job): (state, reason, nodes) for job, state, reason, nodes in rows if job.isdigit()}


def _shell(command: list[str], variables: dict[str, str]) -> str:
    """A command that can be pasted into a shell, in lines of up to 100 characters where its words allow it."""
    lines = [""]
    for word in ["env", *(f"{name}={value}" for name, value in variables.items()), *command]:
        quoted = shlex.quote(word)
        if word == command[0] or len(lines[-1]) + len(quoted) > WIDTH:
            lines.append("   ")
        lines[-1] += f" {quoted}" if lines[-1] else quoted
    return " \\\n".join(lines)


def _status(chain_steps: list[Step], folder: Path) -> int:
    """Print a line for each step; 1 if one failed."""
    queue = _queue()
    failed: list[str] = []
    for step in chain_steps:
        line, bad = _standing(step, folder, queue, failed)
        if bad:
            failed.append(step.name)
        print(f"{step.name:20} {line}")
    for node in _nodes_out_of_order():
        print(f"takes no jobs:       {node}")
    return 1 if failed else 0


def _nodes_out_of_order() -> list[str]:
    """Nodes of the cluster that are down or drained, with Slurm's reason."""
    command = ["sinfo", "--noheader", "--Node", "--states=down,drain,fail,no_respond", "--format=%N (%T: %E)"]
    return sorted(set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()))


def _standing(step: Step, folder: Path, queue: dict, failed: list[str]) -> tuple[str, bool]:
    """A step's status in one line, and whether it is a failure."""
    record = _record(folder, step.name, "submitted")
    if not record:
        return "not submitted", False
    job = record["job"]
    state = _record(folder, step.name)
    said = state["status"] if state and state["job"] == job else ""
    slurm, reason, nodes = queue.get(job, ("", "", ""))
    log = folder / "logs" / f"digit-{step.name}-{job}.out"
    if said == "complete":
        return f"complete (job {job})", False
    if slurm == "PENDING":
        again = f", to continue as attempt {state['restarts'] + 2}" if said else ""  # also after a node failed
        return f"waiting (job {job}): {_waiting(reason)}{again}", False
    if slurm in QUEUED:
        return f"running (job {job}) on {nodes}, attempt {state['restarts'] + 1 if said else 1}: {log}", False
    if blocked := [name for name in step.needs if name in failed]:
        return f"cancelled (job {job}): {' and '.join(blocked)} did not complete", True
    how = "" if said == "failed" else f" as {slurm or 'a job that Slurm no longer lists'}"
    return f"failed (job {job}){how}: {_why(log)}; see {log}", True


def _waiting(reason: str) -> str:
    """A squeue reason as text."""
    known = {
        "Dependency": "for the steps before it",
        "Resources": "for free nodes",
        "Priority": "for jobs before it in the queue",
        "BeginTime": "Slurm starts requeued jobs after a pause",
        "PartitionTimeLimit": "forever, its time limit exceeds the partition's",
    }
    return known.get(reason, reason)


def _why(log: Path) -> str:
    """The line of the last attempt's log that most likely states why it ended."""
    if shutil.disk_usage(log.parent).free < 1 << 16:
        return f"the file system of {log.parent} is full"
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "it left no log"
    lines = re.split(r"^== .* attempt \d+ on .*$", text, flags=re.MULTILINE)[-1].splitlines()
    for pattern in (
        r"(?:== .*: )?error: (.*)",
        r"((?:srun|slurmstepd\S*): error: (?!.*Exited with exit code).*)",
        r"(?:\[rank\d+\]: +)?(\w+Error: .*)",
    ):
        if found := [match[1] for line in lines if (match := re.fullmatch(pattern, line.strip()))]:
            return found[0]
    return next((line for line in reversed(lines) if line.strip()), "its log is empty")
