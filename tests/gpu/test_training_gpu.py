"""Training on a real GPU: bf16, compiled layers, ZeRO with offload, memory against the estimate."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_parts import MODERN, launch, metrics, recipe, start, train, write_shards

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def losses(run: Path, token_shards: Path, **overrides) -> list[float]:
    """Losses of a run of 20 steps."""
    launch(train, (recipe(run, token_shards, **overrides),), 1, run.with_suffix(".log"), timeout=400)
    return [line["loss"] for line in metrics(run)]


SIZES = {"model__width": 128, "optimizer__learning_rate": 2e-3}
LAYERS = {"published": SIZES, "modern": SIZES | MODERN}


@pytest.fixture(scope="module")
def exact(token_shards, tmp_path_factory) -> Callable[[str], list[float]]:
    """Losses in float32 without ZeRO, computed once."""
    known = {}

    def of(layers: str) -> list[float]:
        if layers not in known:
            run = tmp_path_factory.mktemp("exact") / "fp32"
            known[layers] = losses(run, token_shards, deepspeed="zero0.json", **LAYERS[layers])
            assert known[layers][-1] < known[layers][0] - 0.3
        return known[layers]

    return of


@pytest.mark.parametrize(
    ("layers", "file", "compiled"),
    [
        ("published", "zero1", False),
        ("published", "zero1", True),
        ("published", "zero2", True),
        ("published", "zero3", False),
        ("published", "zero2_offload", False),
        ("modern", "zero1", True),
        ("modern", "zero3", False),
    ],
)
def test_bf16_follows_fp32(layers, file, compiled, token_shards, tmp_path, exact):
    ours = losses(
        tmp_path / "bf16",
        token_shards,
        deepspeed=f"{file}.json",
        training__precision="bf16",
        training__compile=compiled,
        **LAYERS[layers],
    )
    assert ours == pytest.approx(exact(layers), rel=0.02)


def compare_loss(out: Path) -> None:
    """The compiled vocabulary-parallel loss and its gradient beside the plain ones, in float32 and bf16."""
    from reference_loss import label_smoothed_cross_entropy

    from digit_ds.model.vocabulary_loss import vocabulary_parallel_loss
    from digit_ds.parallel import topology

    topology.initialize(1, 60)
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-3)):
        logits = torch.randn(7, 33, 1152, device="cuda", dtype=dtype)
        target = torch.randint(0, 1029, (7, 33), device="cuda")
        mask = torch.rand(7, 33, device="cuda") < 0.6
        plain = logits.clone().requires_grad_()
        expected = label_smoothed_cross_entropy(plain[..., :1029], target, 0.1, mask)
        expected[0].backward()
        ours = logits.clone().requires_grad_()
        found = vocabulary_parallel_loss(ours * 1, target, 1029, 0.1, mask)
        found[0].backward()
        torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.grad, plain.grad, rtol=0, atol=tolerance * float(plain.grad.abs().max()) * 4)
    topology.finish()
    out.write_text("done")


def test_compiled_loss_equals_plain_loss(tmp_path):
    launch(compare_loss, (tmp_path / "out",), 1, tmp_path / "log", timeout=300)
    assert (tmp_path / "out").read_text() == "done"


@pytest.mark.parametrize("options", [{}, MODERN], ids=["published", "modern"])
def test_memory_is_what_the_estimate_says(options, token_shards, tmp_path):
    from digit_ds.data.shards import read_manifest
    from digit_ds.training.estimate import memory_by_part
    from digit_ds.training.runs import model_spec

    values = recipe(
        tmp_path / "run", token_shards, model__width=1024, model__layers=8, model__heads=16, model__dropout=0.1,
        training__precision="bf16", training__compile=True, training__steps=3, training__micro_batch=256,
        training__global_batch=256, **options,
    )  # fmt: skip
    launch(train, (values,), 1, tmp_path / "log", timeout=400)
    expected = sum(memory_by_part(values, model_spec(values, read_manifest(token_shards)), 1, 1, False).values())
    assert metrics(tmp_path / "run")[-1]["memory_gib"] == pytest.approx(expected, rel=0.3)


def train_within(values, gib: float) -> None:
    """Training on a GPU that has no more memory than this."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
    train(values)


def test_offload_trains_a_model_that_does_not_fit_otherwise(token_shards, tmp_path):
    """The large prior's layers need 13 GiB for weights, gradients and moments; the GPU is cut to 8."""
    sizes = {"model__layers": 24, "model__width": 1536, "model__heads": 16, "training__precision": "bf16"}
    outcomes = {}
    for file in ("zero1", "zero3_offload"):
        values = recipe(
            tmp_path / file,
            token_shards,
            deepspeed=f"{file}.json",
            training__steps=3,
            training__global_batch=2,
            **sizes,
        )
        group = start(train_within, (values, 8.0), 1, tmp_path / f"{file}.log")
        outcomes[file] = group.wait(timeout=240)[0], "out of memory" in group.output().lower()
    assert outcomes["zero1"] == (1, True)
    assert outcomes["zero3_offload"] == (0, False)
    assert metrics(tmp_path / "zero3_offload")[-1]["memory_gib"] < 8
