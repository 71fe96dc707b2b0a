"""A small /dev/shm, as containers have it: in a mount namespace of its own, where this machine allows one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from slurm_cluster import may_unshare
from training_parts import recipe, write_shards

from digit_ds.evaluation import fidelity
from digit_ds.evaluation.pictures import Array
from digit_ds.parallel import shared_memory
from digit_ds.preparation.slab import Slab
from digit_ds.training.runs import recipe_text

HOME = Path(__file__).parents[1]


@pytest.mark.skipif(not may_unshare(), reason="this machine allows no mount namespace")
@pytest.mark.parametrize(("size", "status"), [("8k", 2), ("1500k", 0)])
def test_training_with_loading_processes(tmp_path, size, status):
    """8 batches of 1.2 MiB are on their way: tensors among processes would be ended by a bus error, or hang."""
    values = recipe(
        tmp_path / "run", write_shards(tmp_path / "shards"), data__workers=2, training__steps=2,
        training__global_batch=4096, training__micro_batch=4096, model__layers=1,
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe_text(values))
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "digit_ds", "train"]
    done = subprocess.run(
        [*command, str(tmp_path / "recipe.yaml")],
        env=os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-3000:]
    if status:
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert line.startswith("error: /dev/shm: has 0.01 MiB free, expected 1.00; remove what is left there, or give")
        assert "Traceback" not in done.stderr


def test_what_has_no_room_in_the_slab_is_no_shared_tensor():
    slab = Slab(1, 8)
    tensors = [torch.arange(6, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8)]
    places = slab.put(0, tensors)
    assert isinstance(places[1], np.ndarray)
    assert all(torch.equal(found, given) for found, given in zip(slab.get(0, places), tensors))


def test_pictures_are_loaded_by_one_process_where_memory_is_short(monkeypatch, capsys):
    pictures = Array(np.zeros((fidelity.FEW, 8, 8, 3), np.uint8), "pictures")
    extractor = fidelity.Extractor("name", {}, "description", {})
    settings = (pictures, None, extractor, None, 64)
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 1 << 30)
    assert not fidelity._settings(*settings)["save_cpu_ram"] and not capsys.readouterr().err
    monkeypatch.setattr(shared_memory, "free_bytes", lambda: 1 << 16)
    assert fidelity._settings(*settings)["save_cpu_ram"]
    assert "/dev/shm: has 0.06 MiB free, expected 0.14" in capsys.readouterr().err
