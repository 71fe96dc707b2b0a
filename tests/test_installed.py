"""The wheel, installed into an environment without a checkout and used from another directory."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from preparation_parts import make_encoder, make_images, make_vqgan

import digit_ds
from digit_ds.cluster.checks import PATHS
from digit_ds.files import read_json

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[1]
TINY = ("model.layers=1", "model.width=32", "model.heads=2", "training.steps=2", "training.global_batch=8")
TINY += ("training.micro_batch=8", "training.precision=fp32", "training.compile=false", "data.workers=0")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with nothing but the wheel; its dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    for name in ("digit_ds", "ds_configs", "slurm", "tools"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    subprocess.run([*pip, *build], check=True)
    venv.create(environment, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    python = ("--python", environment / "bin" / "python")
    subprocess.run([*pip, *python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel], check=True)
    return environment


def run(environment: Path, folder: Path, program: str, *words: object) -> str:
    """A program of the environment in ``folder``; returns what it prints."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [environment / "bin" / program, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_is_installed(environment, tmp_path):
    script = (
        "import digit_ds; from digit_ds import shipped; from importlib import metadata, resources;"
        "print(digit_ds.__file__, digit_ds.__version__, metadata.version('digit_ds'));"
        "print((resources.files('digit_ds') / 'py.typed').is_file());"
        "print(*sorted(path.name for path in shipped.FOLDER.iterdir()))"
    )
    facts, typed, files = run(environment, tmp_path, "python", "-c", script).splitlines()
    where, *versions = facts.split()
    assert Path(where).is_relative_to(environment)
    assert versions == [digit_ds.__version__] * 2
    assert typed == "True"
    assert files.split() == sorted(path.name for path in (REPOSITORY / "ds_configs").iterdir())


def test_the_pipeline_runs_from_another_directory(environment, tmp_path):
    """From images to pictures and a probe, by the commands of the wheel and a shipped recipe's name."""
    make_images(tmp_path / "images")
    make_encoder(tmp_path / "encoder.pth")
    make_vqgan(tmp_path / "vqgan.ckpt")

    def command(verb: str, *words: object) -> str:
        return run(environment, tmp_path, "digit-ds", verb, *words)

    encoder, vqgan = ("--encoder", "encoder.pth", "--num-heads", 2), ("--vqgan", "vqgan.ckpt")
    vqgan += ("--vqgan-config", "vqgan.yaml")
    command("features", "--images", "images", *encoder, "--workers", 0, "--out", "features")
    command("kmeans", "--features", "features", "--clusters", 24, "--iterations", 2, "--out", "km.npy")
    tokens = ("--images", "images", *encoder, "--codebook", "km.npy", *vqgan, "--workers", 0, "--out", "shards")
    command("tokenize", *tokens)
    command("verify", "shards")
    command("train", "vq_baseline.yaml", "run=run", "data.shards=shards", "data.validation=shards", *TINY)
    command("export", "run", "model")
    command("sample", "--prior", "model", *vqgan, "--count", 3, "--out", "samples")
    assert len(list((tmp_path / "samples" / "images").rglob("*.png"))) == 3
    command("probe", "--model", "model", "--train", "shards", "--val", "shards", "--passes", 1, "--out", "probe")
    assert 0 <= read_json(tmp_path / "probe" / "probe.json")["best_accuracy"] <= 1


def test_a_name_that_is_not_shipped_is_refused_with_those_that_are(environment, tmp_path):
    done = subprocess.run([environment / "bin" / "digit-ds", "train", "nope.yaml"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 2
    (line,) = done.stderr.decode().strip().splitlines()
    assert "nope.yaml" in line and "base_prior.yaml" in line and "vq_baseline.yaml" in line


def test_a_chain_is_submitted_and_a_job_runs_without_a_checkout(environment, tmp_path, monkeypatch):
    """``digit-ds submit`` finds chain, recipes and job scripts in the package; a script runs its step from there."""
    chain = yaml.safe_load((REPOSITORY / "slurm" / "digits.yaml").read_text())
    for section in chain.values():
        for name in PATHS if isinstance(section, dict) else ():
            if name == "images" and name in section:
                make_images(tmp_path / section[name], 3)
            elif name in section and not (tmp_path / section[name]).exists():
                (tmp_path / section[name]).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / section[name]).write_text("there")
    site = {"partition": "main", "nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "time": "10"}
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.yaml").write_text(yaml.safe_dump(site))
    (tmp_path / "bin").mkdir()
    srun = 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'
    for name, body in (("srun", srun), ("scontrol", "echo localhost"), ("squeue", "")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    printed = run(environment, tmp_path, "digit-ds", "submit", "slurm/digits.yaml", "--dry-run")
    costs, *steps = re.split(r"^# ", printed, flags=re.MULTILINE)
    assert [text.split()[0] for text in steps[:2]] == ["features", "kmeans"] and len(steps) == 9
    assert [line.split()[0] for line in costs.splitlines()[1:3]] == ["features", "kmeans"]
    words = shlex.split(steps[0])
    variables = dict(word.split("=", 1) for word in words if word.startswith("DIGIT_"))
    (script,) = (word for word in words if word.endswith(".sbatch"))
    assert Path(script).is_relative_to(environment) and variables["DIGIT_ROOT"] == str(tmp_path)
    assert variables["DIGIT_PYTHON"] == str(environment / "bin" / "python")

    slurm = {"SLURM_JOB_NAME": "f", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "1"}
    variables |= slurm | {"SLURM_NNODES": "1", "DIGIT_STATE": str(tmp_path / "state.json")}
    job = subprocess.run(
        ["bash", script, "--help"], cwd=tmp_path, env=os.environ | variables, capture_output=True, text=True
    )
    assert job.returncode == 0 and "--encoder" in job.stdout, job.stderr
    assert read_json(tmp_path / "state.json")["status"] == "complete"
