"""Memory of a training's start and resumption: what one rank allocates, by PyTorch's own count."""

import gc
import itertools
import json
import math
import re
from pathlib import Path

import torch
from training_parts import launch, recipe, write_shards

from digit_ds.data.shards import read_manifest
from digit_ds.model.released import save_model
from digit_ds.model.weights import initial_state
from digit_ds.training.runs import model_spec


def start_and_resume(values) -> None:
    """Print, in parts of its bound, the most that this rank allocates: until DeepSpeed has the model, and in all."""
    from digit_ds.model.weights import parameters
    from digit_ds.parallel import launch, topology
    from digit_ds.parallel.frameworks import deepspeed
    from digit_ds.training import estimate, resume
    from digit_ds.training.checkpoint import Checkpoints

    original = deepspeed.initialize

    def initialize(**options):
        with torch.profiler.record_function("initialize"):
            return original(**options)

    deepspeed.initialize = initialize
    place = topology.initialize(1, 120.0)
    manifest = read_manifest(values.data.shards)
    spec = model_spec(values, manifest)
    parts = estimate.memory_by_part(values, spec, place.data_size, *estimate.zero_of(values))
    share = sum(parts[name] for name in ("weights", "gradients", "optimizer")) * 2**30
    largest = 4 * max(math.prod(parameter.shape) for parameter in parameters(spec))
    for stage in ("start", "resume"):
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            begun = resume.begin(values, manifest, spec, place, launch.device(), resume.NO_CHANGES, [])
        events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
        built = next(event.start_ns() for event in events if event.name() == "initialize")
        # PyTorch counts a file that is mapped as if it were allocated.
        mapped = {path.stat().st_size for path in Path(values.run).parent.rglob("*.safetensors")}
        changes = [event for event in events if event.name() == "[memory]" and abs(event.nbytes()) not in mapped]
        first = max(itertools.accumulate(event.nbytes() for event in changes if event.start_ns() < built))
        peak = max(itertools.accumulate(event.nbytes() for event in changes))
        # A tensor is there in float32 and as a parameter, and gloo has buffers while it is cut.
        weights = 1.3 * parts["weights"] * 2**30 + 4 * largest
        print(f"{stage} {first / weights:.3f} {peak / (1.3 * share + largest):.3f}")
        if stage == "start":
            begun.progress.step = 1
            saved = Checkpoints(Path(values.run), 1, 0, place.world_size, place.sum)
            saved.save(begun.engine, spec, begun.progress, {"provenance": begun.provenance})
        del begun
        gc.collect()
    topology.finish()


def test_no_rank_holds_more_than_its_share_and_one_tensor(tmp_path):
    token_shards = write_shards(tmp_path / "shards")
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000, "overlap_comm": False}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    values = recipe(
        tmp_path / "run",
        token_shards,
        deepspeed=str(tmp_path / "zero.json"),
        training__precision="bf16",
        training__micro_batch=1,
        training__start_from=str(tmp_path / "model"),
        model__layers=8,
        model__width=64,
    )
    spec = model_spec(values, read_manifest(token_shards))
    save_model(tmp_path / "model", spec, initial_state(spec, seed=7), dict(read_manifest(token_shards).identity))
    Path(values.run).mkdir()
    output = launch(start_and_resume, (values,), 4, tmp_path / "logs")
    found = re.findall(r"^(start|resume) ([\d.]+) ([\d.]+)$", output, re.MULTILINE)
    assert len(found) == 8
    assert max(float(share) for _, *shares in found for share in shares) < 1.0, found
