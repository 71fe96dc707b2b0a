"""What ranks send in a step: counted in real trainings, equal to the formulas that predictions are made of."""

import json
import re
from pathlib import Path

import pytest
from traffic_counts import CODES, IMAGES, LAYOUTS, Layout, count, counted, expected, row, small_recipe
from training_parts import MODERN, launch, recipe, write_shards

from digit_ds.data.shards import read_manifest
from digit_ds.training.estimate import shards_to_come
from digit_ds.training.runs import model_spec

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def test_the_counts_in_the_page_are_those_of_the_formulas(tmp_path):
    """The page's rows were counted in runs of up to 16 ranks."""
    rows = re.findall(r"^\| (\d+) \| (\d) \| (yes|no) \| (zero\w+) \| (\d) \|.*\|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == sum(ranks % layout.tensor == 0 for ranks in (2, 4, 8, 16) for layout in LAYOUTS)
    for ranks, tensor, sequence, file, micro_batches in rows:
        layout = Layout(int(tensor), sequence == "yes", file, int(micro_batches))
        values = small_recipe(layout, int(ranks), "none", tmp_path)
        spec = model_spec(values, shards_to_come(IMAGES, 16, CODES, 0, 0))
        assert row(int(ranks), layout, *expected(values, spec, int(ranks))) in PAGE.read_text().splitlines()


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


BUCKETS = {"reduce_bucket_size": 3000, "allgather_bucket_size": 1000}
ZERO3 = {
    "overlap_comm": True,
    "reduce_bucket_size": 3000,
    "stage3_prefetch_bucket_size": 2500,
    "stage3_param_persistence_threshold": 50,
    "stage3_max_live_parameters": 5000,
    "stage3_max_reuse_distance": 0,
}


@pytest.mark.parametrize(
    ("ranks", "tensor", "zero", "options"),
    [
        (4, 2, {"stage": 3} | ZERO3, {"parallel__sequence": True, "training__precision": "bf16"}),
        (3, 1, {"stage": 2, "reduce_bucket_size": 900}, {"training__global_batch": 12}),
        (2, 2, {"stage": 1}, MODERN | {"training__recompute": "layer", "model__dropout": 0.1}),
        (2, 1, {"stage": 2, "overlap_comm": True, **BUCKETS}, {"training__precision": "bf16"}),
    ],
    ids=[
        "tensor 2 x data 2, sequence, ZeRO 3",
        "data 3, ZeRO 2, parameters larger than a bucket",
        "modern, recomputed",
        "ZeRO 2, gradients rounded to bf16",
    ],
)
def test_what_a_training_sends_is_what_the_formulas_say(ranks, tensor, zero, options, token_shards, tmp_path):
    """Messages and bytes of each kind of collective in a step of two or more micro-batches, and of the exchange."""
    file = tmp_path / "zero.json"
    rounded = zero["stage"] == 2 and "training__precision" in options
    types = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "bf16" if rounded else "fp32"}
    file.write_text(json.dumps({"zero_optimization": zero} | types))
    options |= {"deepspeed": str(file), "parallel__tensor": tensor, "training__steps": 4, "monitor__log_every": 1000}
    values = recipe(tmp_path / "run", token_shards, **options)
    launch(count, (values, tmp_path), ranks, tmp_path / "log")
    assert counted(tmp_path, ranks) == expected(values, model_spec(values, read_manifest(token_shards)), ranks)
