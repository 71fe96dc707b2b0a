"""The chain on a real two-node cluster: order, skipping, requeueing and failures, with a stand-in for Python."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, cluster  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slurm
HOME = Path(__file__).resolve().parents[1]
NAMES = ["features", "kmeans", "tokenize", "tokenize_validation", "prior", "decoder", "sample", "evaluate", "probe"]


class Submission:
    """A chain's recipe and a site in a folder, and submit.py called on them."""

    def __init__(self, folder: Path, running: Cluster):
        self.folder, self.cluster = folder, running
        (folder / "images").mkdir()
        for name in ("images/a.png", "encoder.pth", "vqgan.ckpt"):
            (folder / name).write_text("not read here")
        stub = folder / "python"
        stub.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HOME}/tests/slurm_stub.py "$@"\n')
        stub.chmod(0o755)
        recipe = folder / "train.yaml"
        recipe.write_text("run: r\ndata: {shards: s}\ntraining: {steps: 30}\n")
        images = {"images": str(folder / "images"), "encoder": str(folder / "encoder.pth")}
        self.chain = {
            "out": str(folder / "out"),
            "features": images,
            "kmeans": {"clusters": 16},
            "tokenize": images | {"vqgan": str(folder / "vqgan.ckpt"), "views": 2},
            "tokenize_validation": images | {"vqgan": str(folder / "vqgan.ckpt")},
            "prior": {"recipe": str(recipe)},
            "decoder": {"recipe": str(recipe), "overrides": {"optimizer.learning_rate": 5e-4, "model.kind": "ar"}},
            "sample": {"vqgan": str(folder / "vqgan.ckpt"), "count": 8},
            "evaluate": {"reference": str(folder / "images")},
        }
        self.site = {
            "partition": "main",
            "nodes": 2,
            "gpus_per_node": 0,
            "cpus_per_task": 1,
            "time": "5",
            "grace_seconds": 60,
            "python": str(stub),
            "environment": {"STUB": str(folder)},
            "steps": {"evaluate": {"nodes": 1}, "prior": {"cpus_per_task": 2}},
        }
        self.behave()

    def behave(self, **behaviour: dict) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour))

    def call(self, *options: str) -> subprocess.CompletedProcess:
        (self.folder / "chain.yaml").write_text(yaml.safe_dump(self.chain))
        (self.folder / "site.yaml").write_text(yaml.safe_dump(self.site))
        command = [sys.executable, HOME / "slurm" / "submit.py", self.folder / "chain.yaml"]
        command += ["--site", self.folder / "site.yaml", *options]
        # Elsewhere than the checkout: nothing may depend on where the user stands.
        environment = self.cluster.environment | {"PYTHONPATH": str(HOME)}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def submit(self) -> dict[str, int]:
        """Submit; the job of every step."""
        result = self.call()
        assert result.returncode == 0, result.stderr
        return self.jobs()

    def jobs(self) -> dict[str, int]:
        records = (self.folder / "out" / "steps").glob("*.submitted.json")
        return {path.name.split(".")[0]: json.loads(path.read_text())["job"] for path in records}

    def state(self, name: str) -> dict:
        return json.loads((self.folder / "out" / "steps" / f"{name}.json").read_text())

    def calls(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def log(self, name: str) -> str:
        return (self.folder / "out" / "logs" / f"digit-{name}-{self.jobs()[name]}.out").read_text()

    def status(self) -> dict[str, str]:
        return {line.split()[0]: line.split(maxsplit=1)[1] for line in self.call("--status").stdout.splitlines()}


@pytest.fixture
def submission(tmp_path, cluster) -> Submission:  # noqa: F811
    return Submission(tmp_path, cluster)


def test_the_chain_runs_in_order_on_two_nodes_and_a_second_submission_skips_it(submission):
    jobs = submission.submit()
    assert list(sorted(jobs)) == sorted(NAMES)
    for name in NAMES:
        assert submission.cluster.wait(jobs[name])["JobState"] == "COMPLETED", submission.log(name)
        assert submission.state(name)["status"] == "complete"
    calls = submission.calls()
    order = [call["step"] for call in calls]
    for name, before in [("kmeans", "features"), ("tokenize", "kmeans"), ("prior", "tokenize"), ("sample", "decoder")]:
        assert order.index(name) > max(i for i, step in enumerate(order) if step == before)
    prior = [call for call in calls if call["step"] == "prior" and "train" in call["arguments"]]
    assert sorted((call["rank"], call["tasks"], call["node"]) for call in prior) == [(0, 2, "n1"), (1, 2, "n2")]
    assert {call["environment"]["OMP_NUM_THREADS"] for call in prior} == {"2"}
    port = str(10000 + jobs["prior"] % 20000)
    assert {(call["environment"]["MASTER_ADDR"], call["environment"]["MASTER_PORT"]) for call in prior} == {
        ("127.0.0.1", port)
    }
    decoder = next(call["arguments"] for call in calls if call["step"] == "decoder")
    assert {"optimizer.learning_rate=0.0005", 'model.kind="ar"'} <= set(decoder)
    assert [call["tasks"] for call in calls if call["step"] == "evaluate"] == [1]

    again = submission.call()
    assert again.stdout.count("complete") == len(NAMES) and submission.jobs() == jobs
    assert all("complete" in line for line in submission.status().values())


def test_deleted_products_are_made_again_only_when_something_reads_them(submission):
    jobs = submission.submit()
    submission.cluster.wait(jobs["evaluate"])
    submission.cluster.wait(jobs["probe"])
    (submission.folder / "out" / "features" / "manifest.json").unlink()
    (submission.folder / "out" / "scores.json").unlink()
    repeated = submission.submit()
    assert {name for name in NAMES if repeated[name] != jobs[name]} == {"evaluate"}
    submission.cluster.wait(repeated["evaluate"])
    submission.chain["kmeans"]["clusters"] = 32
    result = submission.call()
    assert result.returncode == 2 and "kmeans is complete with other arguments" in result.stderr


def test_a_failing_step_stops_the_chain_and_says_why(submission):
    submission.behave(tokenize={"error": "/data/km.npy: 16 wide, expected 768"})
    jobs = submission.submit()
    for name in NAMES:
        submission.cluster.wait(jobs[name])
    status = submission.status()
    assert "failed" in status["tokenize"] and ": /data/km.npy: 16 wide, expected 768; see" in status["tokenize"]
    assert "cancelled" in status["prior"] and "tokenize did not complete" in status["prior"]
    assert "complete" in status["tokenize_validation"] and submission.call("--status").returncode == 1
    assert {call["step"] for call in submission.calls()} == set(NAMES[:4])

    submission.behave()
    repeated = submission.submit()
    assert {name for name in NAMES if repeated[name] == jobs[name]} == {"features", "kmeans", "tokenize_validation"}
    assert submission.cluster.wait(repeated["evaluate"])["JobState"] == "COMPLETED"


@pytest.mark.fault(
    "a rank is killed under srun",
    stage="training under Slurm",
    outcome="srun ends the step at once and the status names the rank",
    status="not 0",
    lost="steps since the last checkpoint",
)
def test_a_killed_rank_ends_the_step_with_its_name(submission):
    submission.behave(features={"killed": 1, "gate": True})
    job = submission.submit()["features"]
    started = time.monotonic()
    assert submission.cluster.wait(job)["JobState"] == "FAILED"
    assert time.monotonic() - started < 40
    assert "n2: task 1: Killed" in submission.status()["features"]


@pytest.mark.fault(
    "disk full under Slurm",
    stage="every step of a chain",
    outcome="--status names the file system",
    status="not 0",
    lost="nothing",
)
def test_a_full_disk_is_named(submission):
    disk = submission.cluster.small_disk
    if not disk.is_mount():
        pytest.skip("no right to mount a small file system")
    submission.chain["out"] = str(disk / "out")
    submission.behave(features={"gate": True})
    assert submission.call().returncode == 0
    job = json.loads((disk / "out" / "steps" / "features.submitted.json").read_text())["job"]
    submission.cluster.wait(job, states=("RUNNING",))
    with (disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    (submission.folder / "open").touch()
    assert submission.cluster.wait(job)["JobState"] == "FAILED"
    assert f"the file system of {disk}/out/logs is full" in submission.status()["features"]


def test_queued_steps_are_waited_for_and_not_submitted_twice(submission):
    submission.behave(features={"gate": True})
    jobs = submission.submit()
    again = submission.call()
    assert again.stdout.count("in the queue already") == len(NAMES) and submission.jobs() == jobs
    submission.cluster.run("scancel", *map(str, jobs.values()))
    submission.cluster.wait(jobs["features"])


@pytest.mark.fault(
    "scancel in the moment in which the ranks end",
    stage="every step of a chain",
    outcome="the job ends and does not requeue itself; --status says cancelled",
    status="-",
    lost="steps since the last checkpoint, if the ranks cannot save within KillWait",
)
def test_a_job_that_is_cancelled_as_its_ranks_fail_does_not_start_again(submission):
    """The ranks have ended, the shell has no signal yet, and a cancelled job's nodes answer as lost ones do."""
    startup = submission.folder / "startup.sh"
    startup.write_text('timeout() { scancel "$SLURM_JOB_ID"; command timeout "$@"; }\n')
    submission.site["environment"]["BASH_ENV"] = str(startup)
    submission.behave(features={"error": "not the fault of a node"})
    job = submission.submit()["features"]
    assert submission.cluster.wait(job, timeout=60)["JobState"] == "CANCELLED"
    assert len(submission.calls()) == 2 and submission.state("features")["status"] == "stopped"
    assert "cancelled" in submission.status()["features"]


@pytest.mark.parametrize("how", [pytest.param("time limit", marks=pytest.mark.slow), "scontrol requeue"])
def test_training_saves_requeues_and_continues(submission, how):
    """Steps taken by all attempts together are exactly the unbroken run's."""
    folder, running = submission.folder, submission.cluster
    steps = 30
    if how == "time limit":  # at least a minute; Slurm checks time limits every half minute
        submission.site |= {"time": "1", "grace_seconds": 59}
        steps = 450
    submission.behave(prior={"steps": steps})
    jobs = submission.submit()
    job = jobs["prior"]
    running.wait(job, states=("RUNNING",))
    _await(lambda: (folder / "prior.0.steps").exists())
    if how == "scontrol requeue":
        running.run("scontrol", "requeue", str(job))
    _await(lambda: running.job(job)["Restarts"] == "1")
    assert running.wait(job)["JobState"] == "COMPLETED", submission.log("prior")
    for rank in (0, 1):
        assert (folder / f"prior.{rank}.steps").read_text().split() == [str(n + 1) for n in range(steps)]
    log = submission.log("prior")
    assert "attempt 1 on" in log and "attempt 2 on" in log and "rank 1 saved step" in log
    running.run("scancel", *map(str, jobs.values()))


@pytest.mark.fault(
    "a node is lost",
    stage="every step of a chain",
    outcome="Slurm requeues the job, which continues; --status names the node meanwhile",
    status="-",
    lost="what was not saved on that node",
)
def test_a_lost_node_requeues_the_job_and_status_says_what_it_waits_for(submission):
    running = submission.cluster
    submission.behave(features={"gate": True})
    jobs = submission.submit()
    job = jobs["features"]
    _await((submission.folder / "calls.jsonl").exists)
    running.stop_node("n2")
    try:
        with running.lost_after(10):
            running.wait(job, states=("PENDING",))
            waiting = submission.status()["features"]
            assert waiting.startswith("waiting") and waiting.endswith("to continue as attempt 2")
            submission.behave()
            _await(lambda: "n2 (down" in submission.call("--status").stdout)
    finally:
        running.start_node("n2")
    assert running.wait(job)["JobState"] == "COMPLETED"
    running.run("scancel", *map(str, jobs.values()))


def test_dry_run_prints_commands_and_leaves_no_trace(submission):
    result = submission.call("--dry-run")
    assert result.returncode == 0 and result.stdout.count("sbatch --parsable") == len(NAMES)
    assert "--dependency=afterok:" in result.stdout and not (submission.folder / "out").exists()
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()[1 : len(NAMES) + 1]}
    assert set(rows) == set(NAMES) and rows["features"][1:3] == ["2", "0"]
    # A command runs as it was printed: a shell that has sbatch as a function receives what Slurm would get.
    printed = result.stdout[result.stdout.index("# features") : result.stdout.index("# kmeans")].replace("env ", "", 1)
    assert max(map(len, printed.splitlines())) < 140 and "\\\n" in printed
    shown = subprocess.run(
        ["bash", "-c", f"sbatch() {{ printf '%s\\n' \"$@\"; }}; {printed}"], capture_output=True, text=True
    )
    assert "--job-name=digit-features" in shown.stdout.splitlines() and "--encoder" in shown.stdout.splitlines()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.site.pop("partition"), "site.yaml: key 'partition' is missing"),
        (
            lambda s: s.site.update(partition="gpus"),
            "sbatch refused step features, nothing was submitted: invalid partition specified: gpus",
        ),
        (lambda s: s.site.update(node=2), "site.yaml: unknown key 'node', expected one of partition"),
        (lambda s: s.site.update(nodes="two"), "site.yaml: nodes is 'two', expected: a valid integer"),
        (lambda s: s.site.update(steps={"train": {}}), "site.yaml: steps.train is 'train', expected:"),
        (lambda s: s.site.update(python="/nowhere/python"), "/nowhere/python of the site cannot be started"),
        (
            lambda s: s.chain["kmeans"].update(cluster=3),
            "chain.yaml: kmeans.cluster is not an option of digit-ds kmeans",
        ),
        (
            lambda s: s.chain["features"].update(images="/no"),
            "chain.yaml: features.images is /no, which does not exist",
        ),
        (
            lambda s: s.chain["prior"].update(overrides={"training.step": 3}),
            "train.yaml with training.step=3: unknown key",
        ),
        (
            lambda s: s.site.update(tasks_per_node=3),
            "prior on 6 ranks: training.global_batch is 1024, expected a multiple of training.micro_batch 64 x 6",
        ),
        (lambda s: s.chain.pop("kmeans"), "chain.yaml: key 'kmeans' is missing"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(submission, change, message):
    change(submission)
    result = submission.call()
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not submission.jobs()


def test_status_quotes_the_error_of_a_rank_that_torch_names(tmp_path):
    from digit_ds.cluster.submit import _why

    log = tmp_path / "digit-prior-7.out"
    lines = [
        "== 2026-01-01 00:00:00 digit-prior 7: attempt 1 on n[1-2], 2 ranks",
        "[rank0]:     work.wait()",
        "[rank0]: RuntimeError: Timed out waiting 30000ms for recv operation to complete",
        "srun: error: n1: task 0: Exited with exit code 1",
        "[rank1]: RuntimeError: Connection closed by peer",
        "== 2026-01-01 00:01:00 digit-prior 7: failed: the steps that need this one will not start",
    ]
    log.write_text("\n".join(lines))
    assert _why(log) == "RuntimeError: Timed out waiting 30000ms for recv operation to complete"


def _await(condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_all_problems_are_said_at_once(tmp_path):
    submission = Submission(tmp_path, None)
    submission.chain["features"]["images"] = "/no"
    for name in ("encoder.pth", "vqgan.ckpt"):
        (tmp_path / name).write_bytes(b"")
    submission.chain["prior"]["overrides"] = {"training.step": 3}
    submission.chain["kmeans"]["cluster"] = 3
    submission.cluster = type("NoCluster", (), {"environment": os.environ | {"PATH": "/usr/bin:/bin"}})
    result = submission.call("--dry-run")
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and all(line.startswith("error: ") for line in lines), result.stderr
    for words in (
        "features.images is /no, which does not exist",
        f"features.encoder is {tmp_path / 'encoder.pth'}, which is an empty file",
        f"sample.vqgan is {tmp_path / 'vqgan.ckpt'}, which is an empty file",
        "unknown key 'training.step'",
        "kmeans.cluster is not an option of digit-ds kmeans",
    ):
        assert sum(words in line for line in lines) == 1, (words, result.stderr)


def test_the_doctor_without_slurm_is_one_line(tmp_path):
    submission = Submission(tmp_path, None)
    submission.cluster = type("NoCluster", (), {"environment": os.environ | {"PATH": str(tmp_path)}})
    result = submission.call("--doctor")
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert result.stderr == "error: sbatch is not installed here, expected a login node of a Slurm cluster\n"


@pytest.mark.parametrize("action", [[], ["--doctor"], ["--status"]])
def test_without_a_controller_the_configuration_is_named_and_nothing_is_written(tmp_path, action):
    submission = Submission(tmp_path, None)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("squeue", "sbatch"):
        said = "slurm_load_jobs error: Unable to contact slurm controller"
        (programs / name).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:/usr/bin:/bin"
    submission.cluster = type("NoCluster", (), {"environment": os.environ | {"PATH": path}})
    result = submission.call(*action)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert result.stderr == (
        "error: squeue failed: slurm_load_jobs error: Unable to contact slurm controller; expected a running Slurm "
        "controller: check SLURM_CONF\n"
    )
