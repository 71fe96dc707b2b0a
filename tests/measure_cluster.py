"""The digits chain at full size on a real two-node cluster, beside the demo's steps; not part of the test suite.

    python tests/measure_cluster.py DEMO OUT

0. DEMO, a new folder or that of an earlier call: the steps of the demo at the scale of the chain (digits_chain.py).
1. `slurm/digits.yaml`, with the demo's images and stand-ins, two ranks a job: its figures beside those of
   DEMO/report.json. The models differ from the demo's only by the dropout that other micro-batches draw.
2. Both trainings again in slices of one minute by Slurm's time limit, the decoder also put back into the queue at
   random moments: the model's bytes, the last metrics and the hash of all sample ids are those of the unbroken runs.

Takes about half an hour on two idle cores; on busy ones a slice may be over before the ranks have started. Ends with
status 1 when a figure is out of its tolerance or a byte differs.
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import yaml
from digits_chain import DIGITS
from slurm_cluster import Cluster, running_cluster

from digit_ds.demo.digits import read_images, read_labels
from digit_ds.demo.judge import Judge
from digit_ds.demo.report import prior_nll, read_job
from digit_ds.demo.run import steps
from digit_ds.demo.steps import run_steps
from digit_ds.files import read_json, sha256, write_json

HOME = Path(__file__).resolve().parents[1]
TOLERANCES = {"class_accuracy": 0.06, "best_probe_accuracy": 0.04, "prior_nll": 0.03, "fid": 1.0}
"""Largest difference from the demo's figure. Accuracies: three standard errors of 500 samples, two of 360 images."""
SAME = ("step", "images", "loss", "nll", "grad_norm", "lr", "sample_ids_hash")
"""What the last line of metrics must repeat."""
GRACE_SECONDS = 5
REQUEUES = 4


def main(demo: Path, out: Path) -> int:
    """Run both measurements and leave them in OUT/measured.json."""
    run_steps(steps(demo.resolve(), DIGITS))
    out.mkdir(parents=True, exist_ok=True)
    chain = _chain(demo, out)
    with running_cluster() as cluster:
        begin = time.monotonic()
        _run_chain(cluster, out)
        seconds = time.monotonic() - begin
        figures = _compare(demo, out)
        figures["chain_seconds"] = round(seconds)
        print(json.dumps(figures, indent=2), flush=True)
        figures["slices"] = {name: _slice(cluster, chain, out, name) for name in ("prior", "decoder")}
    write_json(out / "measured.json", figures)
    print(json.dumps(figures, indent=2))
    good = all(found["within"] for found in figures["chain"].values())
    return 0 if good and all(found["identical"] for found in figures["slices"].values()) else 1


def _chain(demo: Path, out: Path) -> dict:
    """The recipe of the chain over the demo's images and stand-ins, written to OUT/chain.yaml, and OUT/site.yaml."""
    text = (HOME / "slurm" / "digits.yaml").read_text(encoding="utf-8")
    for ours, theirs in (("dinov2.pth", "dinov2_digits.pth"), ("vqgan.", "vqgan_digits.")):
        text = text.replace(f"runs/digits/stand_ins/{ours}", f"runs/digits/stand_ins/{theirs}")
    for folder in ("images", "stand_ins"):
        text = text.replace(f"runs/digits/{folder}/", f"{demo.resolve()}/{folder}/")
    chain = yaml.safe_load(text) | {"out": str(out.resolve() / "chain")}
    site = yaml.safe_load((HOME / "slurm" / "site.example.yaml").read_text(encoding="utf-8"))
    site |= {"partition": "main", "gpus_per_node": 0, "cpus_per_task": 1, "time": "60", "python": sys.executable}
    site |= {"environment": {"PYTHONPATH": str(HOME)}, "steps": {"evaluate": {"nodes": 1}}}
    (out / "chain.yaml").write_text(yaml.safe_dump(chain), encoding="utf-8")
    (out / "site.yaml").write_text(yaml.safe_dump(site), encoding="utf-8")
    return chain


def _run_chain(cluster: Cluster, out: Path) -> None:
    """Submit the chain and wait for its end; submitted again it is complete and nothing runs."""
    command = [sys.executable, HOME / "slurm" / "submit.py", out / "chain.yaml", "--site", out / "site.yaml"]
    subprocess.run(command, env=cluster.environment | {"PYTHONPATH": str(HOME)}, check=True)
    for record in (out / "chain" / "steps").glob("*.submitted.json"):
        job = read_json(record)["job"]
        if cluster.run("scontrol", "show", "job", str(job), check=False):  # else it is an earlier call's
            ended = cluster.wait(job, timeout=3600)
            assert ended["JobState"] == "COMPLETED", Path(ended["StdOut"]).read_text()


def _compare(demo: Path, out: Path) -> dict:
    """Figures of the chain beside the demo's."""
    made, expected = out / "chain", read_json(demo / "report.json")
    judge = Judge(*(read(demo / "images" / "train") for read in (read_images, read_labels)))
    pictures, labels = read_job(made / "samples")
    found = {
        "class_accuracy": float((judge.predict(pictures) == labels).mean()),
        "best_probe_accuracy": read_json(made / "probe" / "probe.json")["best_accuracy"],
        "prior_nll": prior_nll(made / "models" / "prior", made / "shards" / "validation"),
        "fid": read_json(made / "scores.json")["fid"],
    }
    same = sha256(made / "runs" / "kmeans" / "km.npy") == sha256(demo / "km.npy")
    return {
        "codebook_identical_to_the_demos": same,
        "chain": {
            name: {
                "chain": value,
                "demo": expected[name],
                "tolerance": TOLERANCES[name],
                "within": abs(value - expected[name]) <= TOLERANCES[name],
            }
            for name, value in found.items()
        },
    }


def _slice(cluster: Cluster, chain: dict, out: Path, name: str) -> dict:
    """Train again under a time limit of a minute and compare with the chain's own run."""
    whole, run, model = out / "chain" / "runs" / name, out / "sliced" / name, out / "sliced" / f"{name}_model"
    log = out / f"sliced_{name}.log"
    shards = {"data.shards": "train", "data.validation": "validation"}
    overrides = {key: str(out.resolve() / "chain" / "shards" / part) for key, part in shards.items()}
    overrides |= chain[name]["overrides"]
    job = cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=1", f"--signal=B:USR1@{GRACE_SECONDS}",
        f"--output={log}", f"--export=ALL,DIGIT_HOME={HOME},DIGIT_PYTHON={sys.executable},PYTHONPATH={HOME}",
        str(HOME / "slurm" / f"{name}.sbatch"), str(run), str(model), chain[name]["recipe"],
        *(f"{key}={json.dumps(value)}" for key, value in overrides.items()),
        cwd=HOME,
    )  # fmt: skip
    begin, requeued = time.monotonic(), 0
    moments = sorted(random.uniform(5, 240) for _ in range(REQUEUES)) if name == "decoder" else []
    ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    while (state := cluster.job(job)["JobState"]) not in ended:
        time.sleep(1)
        if moments and state == "RUNNING" and time.monotonic() - begin > moments[0]:
            cluster.run("scontrol", "requeue", str(job), check=False)  # it may have ended by now
            moments.pop(0)
            requeued += 1
    text = log.read_text(encoding="utf-8", errors="replace")
    assert state == "COMPLETED", text[-4000:]
    lines = [_last(folder / "metrics.jsonl") for folder in (run, whole)]
    hashes = [sha256(folder / "model.safetensors") for folder in (model, out / "chain" / "models" / name)]
    return {
        "attempts": text.count(": attempt "),
        "signals_of_the_time_limit": text.count("the time limit is near"),
        "requeued_at_random": requeued,
        "seconds": round(time.monotonic() - begin),
        "steps": lines[0]["step"],
        "model_sha256": hashes,
        "sample_ids_hash": [line["sample_ids_hash"] for line in lines],
        "loss": [line["loss"] for line in lines],
        "identical": hashes[0] == hashes[1] and all(lines[0][key] == lines[1][key] for key in SAME),
    }


def _last(metrics: Path) -> dict:
    """The last line with a loss."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return next(line for line in reversed(lines) if "loss" in line)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
