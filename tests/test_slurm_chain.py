"""The real pipeline as jobs on a real two-node cluster: a whole chain, and training that is interrupted at any moment.

The parts are small and random; what is tested is that every step runs on two ranks under Slurm, that scores come out
at the end, and that interruptions change nothing.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from preparation_parts import make_encoder, make_images, make_vqgan
from slurm_cluster import Cluster, cluster  # noqa: F401 (a fixture)

from digit_ds.data.feature_network import save_feature_network

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
HOME = Path(__file__).resolve().parents[1]
STEPS = 160
MODEL = {"layers": 1, "width": 32, "heads": 2, "norm_position": "pre", "max_positions": 65}
RECIPE = {
    "run": "chosen by the job",
    "deepspeed": "zero1.json",
    "model": MODEL | {"kind": "prior", "class_conditional": True},
    "data": {"shards": "chosen by the chain", "workers": 0},
    "schedule": {"warmup_steps": 10},
    "training": {"steps": STEPS, "global_batch": 8, "micro_batch": 4, "precision": "fp32"},
    "checkpoint": {"every": 50, "keep_last": 1},
    "monitor": {"log_every": 10},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cluster) -> Path:  # noqa: F811
    """The folder of a chain that ran to its end."""
    folder = tmp_path_factory.mktemp("chain")
    images, encoder = make_images(folder / "images"), make_encoder(folder / "encoder.pth")
    vqgan, configuration = make_vqgan(folder / "vqgan.ckpt")
    judge = folder / "judge.safetensors"
    layers = [torch.randn(16, 192), torch.randn(3, 16)]
    biases = [torch.zeros(16), torch.zeros(3)]
    save_feature_network(judge, 8, 3, layers, biases, torch.zeros(192), torch.ones(192))
    (folder / "prior.yaml").write_text(yaml.safe_dump(RECIPE))
    tokens = {"images": str(images), "encoder": str(encoder), "workers": 0}
    painter = {"vqgan": str(vqgan), "vqgan_config": str(configuration)}
    chain = {
        "out": str(folder / "out"),
        "features": tokens,
        "kmeans": {"clusters": 16, "iterations": 3},
        "tokenize": tokens | painter,
        "tokenize_validation": tokens | painter,
        "prior": {"recipe": str(folder / "prior.yaml")},
        "decoder": {
            "recipe": str(folder / "prior.yaml"),
            "overrides": {"model.kind": "ar", "model.class_conditional": False, "training.steps": 10},
        },
        "sample": painter | {"per_class": 8},
        "evaluate": {"reference": str(images), "features": str(judge)},
        "probe": {"passes": 2},
    }
    site = {"partition": "main", "nodes": 2, "gpus_per_node": 0, "cpus_per_task": 1, "time": "30"}
    site |= {"python": sys.executable, "environment": {"PYTHONPATH": str(HOME)}}
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain))
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    command = [sys.executable, HOME / "slurm" / "submit.py", folder / "chain.yaml", "--site", folder / "site.yaml"]
    environment = cluster.environment | {"PYTHONPATH": str(HOME)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for record in sorted((folder / "out" / "steps").glob("*.submitted.json")):
        job = cluster.wait(json.loads(record.read_text())["job"], timeout=500)
        log = Path(job["StdOut"]).read_text() if Path(job["StdOut"]).exists() else "no log"
        assert job["JobState"] == "COMPLETED", f"{record.name}: {log}"
    return folder / "out"


def test_a_chain_of_jobs_ends_with_scores(finished):
    scores = json.loads((finished / "scores.json").read_text())
    assert scores["samples"] == 24 and scores["fid"] > 0
    probe = json.loads((finished / "probe" / "probe.json").read_text())
    assert 0 <= probe["best_accuracy"] <= 1
    log = next((finished / "logs").glob("digit-prior-*.out")).read_text()
    assert "on n[1-2], 2 ranks" in log and "data 2" in log
    assert "complete" in next((finished / "logs").glob("digit-probe-*.out")).read_text()


@pytest.mark.timeout(900)
def test_interrupted_training_ends_as_the_unbroken_run(finished, tmp_path, cluster):  # noqa: F811
    """scontrol requeue at random moments, start-up included, and the signal that a time limit sends."""
    shards = finished / "shards"
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=30", f"--output={tmp_path}/log",
        f"--export=ALL,DIGIT_HOME={HOME},DIGIT_PYTHON={sys.executable},PYTHONPATH={HOME}",
        str(HOME / "slurm" / "prior.sbatch"), str(tmp_path / "run"), str(tmp_path / "model"),
        str(finished.parent / "prior.yaml"), f"data.shards={shards}/train", f"data.validation={shards}/validation",
        cwd=HOME,
    )  # fmt: skip
    moments = random.Random(os.environ.get("SLURM_TEST_SEED"))
    _attempt(cluster, job, 1)
    time.sleep(moments.uniform(0, 4))
    cluster.run("scontrol", "requeue", str(job))  # while the ranks start
    for attempt, requeue in ((2, True), (3, False)):
        _attempt(cluster, job, attempt)
        _reach(tmp_path / "run", cluster, job, moments.randrange(STEPS // 4, STEPS // 2) * (attempt - 1))
        if requeue:
            cluster.run("scontrol", "requeue", str(job))
        else:
            cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    assert cluster.wait(job, timeout=300)["JobState"] == "COMPLETED", (tmp_path / "log").read_text()
    assert "attempt 4 on" in (tmp_path / "log").read_text()

    broken, unbroken = _last(tmp_path / "run"), _last(finished / "runs" / "prior")
    same = ("step", "images", "loss", "nll", "grad_norm", "lr", "sample_ids_hash")
    assert {key: broken[key] for key in same} == {key: unbroken[key] for key in same} and broken["step"] == STEPS
    weights = [folder / "model.safetensors" for folder in (tmp_path / "model", finished / "models" / "prior")]
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
