"""docs/cluster.md typed in on a real two-node cluster, and training there that is interrupted at any moment.

Every command of the page is run, in a copy of the checkout in which only numbers are smaller: the stand-ins' and the
models' steps, the views, the samples.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, cluster, may_unshare  # noqa: F401 (a fixture)

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1500)]
HOME = Path(__file__).resolve().parents[1]
STEPS = 160
SMALL = {
    **{"model.layers": 1, "model.width": 32, "model.heads": 2, "training.steps": STEPS, "training.micro_batch": 8},
    **{"training.global_batch": 16, "monitor.validate_every": 0, "monitor.log_every": 10, "checkpoint.every": 50},
}


class Reader:
    """Who follows docs/cluster.md, command by command."""

    def __init__(self, home: Path, running: Cluster):
        self.home, self.cluster, self.done = home, running, []
        self.environment = running.environment | {"PYTHONPATH": str(home)}

    def type(self, command: str) -> None:
        """Run one command as the page has it, smaller."""
        smaller = re.sub(r"--steps \d+", "--steps 4", command)
        if command.startswith("make "):  # the environment is there: what would make do?
            smaller += " --dry-run"
        if "tensorboard" in command:
            self._look_at_curves(smaller)
        else:
            result = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", smaller],
                cwd=self.home, env=self.environment, capture_output=True, text=True, timeout=600,
            )  # fmt: skip
            self.done.append((command, result.returncode, result.stdout + result.stderr))
            assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        if command.startswith("cp slurm/site.example.yaml"):
            self._edit_site()
        if command.endswith("slurm/digits.yaml"):
            self._wait()

    def said(self, command: str) -> str:
        """What the first command that contains these words said."""
        return next(output for typed, _, output in self.done if command in typed)

    def _edit_site(self) -> None:
        path = self.home / "slurm" / "site.yaml"
        site = yaml.safe_load(path.read_text()) | {"partition": "main", "gpus_per_node": 0, "cpus_per_task": 1}
        site["steps"]["evaluate"]["gpus_per_node"] = 0
        path.write_text(yaml.safe_dump(site | {"environment": {"PYTHONPATH": str(self.home)}}))

    def _wait(self) -> None:
        records = (self.home / "runs" / "digits" / "steps").glob("*.submitted.json")
        for job in sorted(json.loads(record.read_text())["job"] for record in records):
            ended = self.cluster.wait(job, timeout=600)
            log = Path(ended["StdOut"])
            said = log.read_text(errors="replace") if log.exists() else "no log"
            assert ended["JobState"] == "COMPLETED", f"{ended['JobName']}: {said}"

    def _look_at_curves(self, command: str) -> None:
        """TensorBoard serves the scalars of both models' runs."""
        port = 10000 + os.getpid() % 20000
        words = [*command.split(), "--port", str(port)]
        with subprocess.Popen(
            words, cwd=self.home, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as server:
            try:
                tags = _until(lambda: len(found := self._tags(port)) == 3 and found)  # it reads them one by one
            finally:
                server.terminate()
        self.done.append((command, 0, json.dumps(tags)))

    @staticmethod
    def _tags(port: int) -> dict:
        try:
            url = f"http://127.0.0.1:{port}/data/plugin/scalars/tags"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            return {}


def commands(page: Path) -> list[str]:
    """Lines of all bash blocks of a page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def reader(tmp_path_factory, cluster) -> Reader:  # noqa: F811
    """After the last line of the page."""
    if not may_unshare():
        pytest.skip("no right to give each node of the cluster shared memory of its own (unshare --mount)")
    home = tmp_path_factory.mktemp("page") / "checkout"
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(files, cwd=HOME, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]:
        if (HOME / name).is_file() and not name.startswith("tests/"):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / name, home / name)
    (home / ".venv").symlink_to(sys.prefix)
    path = home / "slurm" / "digits.yaml"
    chain = yaml.safe_load(path.read_text())
    for model in ("prior", "decoder"):
        chain[model]["overrides"] |= SMALL
    chain["decoder"]["overrides"]["training.steps"] = 10
    chain["tokenize"]["views"], chain["sample"]["per_class"], chain["probe"] = 1, 2, {"passes": 1}
    path.write_text(yaml.safe_dump(chain))
    follower = Reader(home, cluster)
    for command in commands(home / "docs" / "cluster.md"):
        follower.type(command)
    return follower


def test_the_page_ends_with_a_fid(reader):
    scores = json.loads((reader.home / "runs" / "digits" / "scores.json").read_text())
    assert scores["samples"] == 20 and scores["fid"] > 0 and '"fid"' in reader.said("cat runs/digits/scores.json")
    assert reader.said("--status").count("complete (job") == 9
    assert reader.said("--dry-run").count("sbatch --parsable") == 9
    again = [output for typed, _, output in reader.done if typed.endswith("slurm/digits.yaml")][-1]
    assert again.count("complete") == 9 and "job" not in again


def test_the_doctor_saw_both_nodes(reader):
    said = reader.said("--doctor")
    assert "2 x CPU" in said and "on n1, n2" in said and "seen and written by all of 2 ranks" in said
    assert "gloo all-reduce over 2 ranks" in said and "failed" not in said


def test_curves_of_all_that_is_trained_are_served(reader):
    tags = json.loads(reader.said("tensorboard"))
    assert set(tags) == {"kmeans/km.run/tb", "prior/tb", "decoder/tb"}
    assert "kmeans/inertia_per_point" in tags["kmeans/km.run/tb"]
    assert {"loss/loss", "ranks/slowest_rank", "speed/images_per_second"} <= set(tags["prior/tb"])


def test_ranks_of_training_ran_on_both_nodes(reader):
    log = next((reader.home / "runs" / "digits" / "logs").glob("digit-prior-*.out")).read_text(errors="replace")
    assert "on n[1-2], 2 ranks" in log and "data 2" in log


@pytest.mark.fault(
    "preemption or time limit under Slurm",
    stage="training",
    outcome="the job is requeued and continues; the end is that of an unbroken run",
    status="75, requeued",
    lost="nothing",
)
def test_interrupted_training_ends_as_the_unbroken_run(reader, tmp_path):
    """scontrol requeue at random moments, start-up included, and the signal that a time limit sends.

    Slurm signals the processes that load data too; the unbroken run has none.
    """
    cluster, home = reader.cluster, reader.home  # noqa: F811
    unbroken = home / "runs" / "digits"
    overrides = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    shards = [f"data.shards={unbroken}/shards/train", f"data.validation={unbroken}/shards/validation"]
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=30", f"--output={tmp_path}/log",
        f"--export=ALL,DIGIT_HOME={home},DIGIT_PYTHON={sys.executable},PYTHONPATH={home}",
        str(home / "slurm" / "prior.sbatch"), str(tmp_path / "run"), str(tmp_path / "model"),
        str(home / "digit_ds" / "demo" / "prior.yaml"), *shards, *overrides, "data.workers=1",
        cwd=home,
    )  # fmt: skip
    moments = random.Random(os.environ.get("SLURM_TEST_SEED"))
    _attempt(cluster, job, 1)
    time.sleep(moments.uniform(0, 4))
    cluster.run("scontrol", "requeue", str(job))  # while the ranks start
    for attempt, requeue in ((2, True), (3, False)):
        _attempt(cluster, job, attempt)
        # Not so late that the run ends before the signal arrives.
        _reach(tmp_path / "run", cluster, job, moments.randrange(STEPS // 4, 3 * STEPS // 8) * (attempt - 1))
        if requeue:
            cluster.run("scontrol", "requeue", str(job))
        else:
            cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    ended = cluster.wait(job, timeout=300)
    log = (tmp_path / "log").read_text(errors="replace")  # ranks write at once: a progress bar's signs may be torn
    assert ended["JobState"] == "COMPLETED", log
    assert "attempt 4 on" in log and "relaunching" not in log, "helper processes survive the signal too"
    assert log.count("stopped by signal at step") >= 3, "two ranks, twice; a sentence may be torn"

    sliced, whole = _last(tmp_path / "run"), _last(unbroken / "runs" / "prior")
    same = ("step", "images", "loss", "nll", "grad_norm", "lr", "sample_ids_hash")
    assert {key: sliced[key] for key in same} == {key: whole[key] for key in same} and sliced["step"] == STEPS
    weights = [folder / "model.safetensors" for folder in (tmp_path / "model", unbroken / "models" / "prior")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def _attempt(cluster: Cluster, job: int, number: int) -> None:  # noqa: F811
    """Wait until an attempt of a job runs."""
    deadline = time.monotonic() + 120
    while (state := cluster.job(job))["Restarts"] != str(number - 1) or state["JobState"] != "RUNNING":
        assert time.monotonic() < deadline and state["JobState"] not in ("FAILED", "COMPLETED"), state
        time.sleep(0.2)


def _reach(run: Path, cluster: Cluster, job: int, step: int) -> None:  # noqa: F811
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or _last(run).get("step", 0) < step:
        assert time.monotonic() < deadline and cluster.job(job)["JobState"] == "RUNNING"
        time.sleep(0.05)


def _last(run: Path) -> dict:
    """The last line of metrics with a loss."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return next((values for line in reversed(lines) if "loss" in (values := json.loads(line))), {})


def _until(condition, timeout: float = 120):
    """The first true value of ``condition()``."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    return value
