"""The parallel layout changes the speed and never the mathematics."""

import json
import os
from itertools import product
from pathlib import Path

import pytest
import torch
from reference_loss import label_smoothed_cross_entropy
from training_parts import (
    MODERN,
    launch,
    metrics,
    recipe,
    small_messages,
    train,
    whole_state,
    write_shards,
)

from digit_ds.config import Recipe
from digit_ds.data.shards import read_manifest
from digit_ds.data.stream import Chunks, TokenStream
from digit_ds.model import weights
from digit_ds.model.sequences import training_sequence
from digit_ds.model.transformer import Transformer
from digit_ds.training.runs import model_spec
from digit_ds.training.schedule import learning_rate, random_order_share
from digit_ds.training.zero_messages import ZeroOptions, sizes_by_module, weight_groups

LAYOUTS = list(product((1, 2, 4), (1, 2), (0, 1, 2, 3)))
"""Tensor size, data size, ZeRO stage."""
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train_plainly(values: Recipe, out: Path) -> None:
    """The lean single-process model under torch.optim.AdamW and torch's clipping: no Megatron, no DeepSpeed."""
    from digit_ds.model.megatron import seed_dropout

    stream = TokenStream(values.data.shards, seed=values.data.shuffle_seed, owner=str(out))
    spec = model_spec(values, stream.manifest)
    model = Transformer(spec)
    model.load_state_dict(weights.initial_state(spec, values.training.seed))
    model.train()
    settings, training = values.optimizer, values.training
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    batches = stream.batches(Chunks(training.global_batch, training.micro_batch))
    chunks = training.global_batch // training.micro_batch
    lines = []
    for step in range(training.steps):
        total = torch.zeros(2)
        for chunk in range(chunks):
            batch = next(batches)
            seed_dropout(training.seed, step, chunk)
            share = random_order_share(values, step)
            sequence = training_sequence(spec, batch.discriminative, batch.vq, batch.labels, random_share=share)
            logits = model(sequence.input, sequence.order)[:, -sequence.target.shape[1] :]
            loss, nll = label_smoothed_cross_entropy(
                logits, sequence.target, training.label_smoothing, sequence.loss_mask
            )
            (loss / chunks).backward()
            total += torch.stack([loss, nll]).detach() / chunks
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(values, step)
        optimizer.step()
        optimizer.zero_grad()
        lines.append([*total.tolist(), float(norm)])
    torch.save({"lines": lines, "weights": model.state_dict()}, out)


@pytest.fixture(scope="module")
def plain(token_shards, tmp_path_factory):
    """Losses, norms and final weights of the plain training of a kind of model, computed once."""
    known = {}

    def of(kind: str, **overrides) -> dict:
        case = kind, *overrides.items()
        if case not in known:
            folder = tmp_path_factory.mktemp(f"plain-{kind}")
            values = recipe(folder / "run", token_shards, model__kind=kind, **overrides)
            launch(train_plainly, (values, folder / "plain.pt"), 1, folder / "log")
            known[case] = torch.load(folder / "plain.pt", weights_only=True)
        return known[case]

    return of


def compare(run: Path, expected: dict) -> None:
    """Losses and gradient norms of every step within 1e-5 relative, final weights within 1e-5."""
    from digit_ds.training.stored import StoredState, newest_checkpoint

    lines = metrics(run)
    assert len(lines) == len(expected["lines"])
    for line, (loss, nll, norm) in zip(lines, expected["lines"]):
        assert line["loss"] == pytest.approx(loss, rel=TOLERANCE), line["step"]
        assert line["nll"] == pytest.approx(nll, rel=TOLERANCE), line["step"]
        assert line["grad_norm"] == pytest.approx(norm, rel=TOLERANCE), line["step"]
    stored = StoredState(newest_checkpoint(run / "checkpoints"))
    state = whole_state(stored, "weight")
    for name, value in expected["weights"].items():
        found = state[name]
        if name.endswith("qkv.bias") and stored.spec.positions == "learned":
            # A key bias shifts all scores of a query alike, which softmax ignores: its gradient is rounding noise,
            # and Adam makes steps of full size out of noise.
            found, value = (weights.split_qkv(bias, stored.spec.heads)[::2] for bias in (found, value))
            found, value = torch.cat(found), torch.cat(value)
        torch.testing.assert_close(found, value, rtol=0, atol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "data", "stage"), LAYOUTS)
def test_layout_equals_plain_training(tensor, data, stage, token_shards, plain, tmp_path):
    expected = plain("prior")
    norms = [line[2] for line in expected["lines"]]
    assert max(norms) > 0.7 > min(norms)  # clipping acts on some steps and not on others
    values = recipe(
        tmp_path / "run", token_shards, deepspeed=small_messages(tmp_path, f"zero{stage}.json"), parallel__tensor=tensor
    )
    launch(train, (values,), tensor * data, tmp_path / "log")
    compare(tmp_path / "run", expected)


GATED = MODERN | {"model__ffn_width": 48}  # by default 8/3 of the width, to a multiple of 128: eight times as much


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "data", "stage", "recompute"), [(2, 2, 3, True), (2, 1, 1, False)])
def test_modern_model_equals_plain_training(tensor, data, stage, recompute, token_shards, plain, tmp_path):
    expected = plain("prior", **GATED)
    norms = [line[2] for line in expected["lines"]]
    assert max(norms) > 0.7 > min(norms)  # clipping acts on some steps and not on others
    values = recipe(
        tmp_path / "run",
        token_shards,
        deepspeed=small_messages(tmp_path, f"zero{stage}.json"),
        parallel__tensor=tensor,
        training__recompute=recompute,
        training__ema_decay=0.9,
        **GATED,
    )
    launch(train, (values,), tensor * data, tmp_path / "log")
    compare(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ar", "nar"])
def test_pixel_decoders_equal_plain_training(kind, token_shards, plain, tmp_path):
    options = {"model__norm_position": "pre", "model__class_conditional": False, "training__steps": 6}
    expected = plain(kind, **options)
    values = recipe(
        tmp_path / "run", token_shards, model__kind=kind, deepspeed="zero2.json", parallel__tensor=2, **options
    )
    launch(train, (values,), 4, tmp_path / "log")
    compare(tmp_path / "run", expected)


RANDOM_ORDER = {"training__order": "random", "training__order_anneal": (5, 15)}


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "data", "stage"), product((1, 2), (1, 2), (1, 3)))
def test_random_order_equals_plain_training(tensor, data, stage, token_shards, plain, tmp_path):
    expected, raster = plain("prior", **RANDOM_ORDER), plain("prior")
    assert expected["lines"][0] != raster["lines"][0]  # the order shows from the first step on
    values = recipe(
        tmp_path / "run",
        token_shards,
        deepspeed=small_messages(tmp_path, f"zero{stage}.json"),
        parallel__tensor=tensor,
        **RANDOM_ORDER,
    )
    launch(train, (values,), tensor * data, tmp_path / "log")
    compare(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "data", "stage", "sequence", "compiled", "recompute"),
    [
        (2, 1, 1, True, False, "attention"),
        (2, 2, 1, True, True, "none"),
        (2, 1, 1, False, True, "feed_forward"),
        (2, 2, 3, True, True, "layer"),
        (1, 2, 3, False, True, "none"),
    ],
)
def test_fast_layouts_equal_plain_training(
    tensor, data, stage, sequence, compiled, recompute, token_shards, plain, tmp_path
):
    values = recipe(
        tmp_path / "run",
        token_shards,
        deepspeed=small_messages(tmp_path, f"zero{stage}.json"),
        parallel__tensor=tensor,
        parallel__sequence=sequence,
        training__compile=compiled,
        training__recompute=recompute,
    )
    launch(train, (values,), tensor * data, tmp_path / "log", timeout=600)
    compare(tmp_path / "run", plain("prior"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensor", "data", "sequence", "compiled"),
    [(1, 2, False, False), (1, 4, False, False), (2, 2, True, True)],
)
def test_weights_sent_during_the_forward_pass(tensor, data, sequence, compiled, token_shards, plain, tmp_path):
    """ZeRO 2 with overlapped communication: weights travel by group, each module waits for its own."""
    values = recipe(
        tmp_path / "run",
        token_shards,
        deepspeed=small_messages(tmp_path, "zero2_overlap.json"),
        parallel__tensor=tensor,
        parallel__sequence=sequence,
        training__compile=compiled,
        training__ema_decay=0.9,
    )
    modules = sizes_by_module(model_spec(values, read_manifest(token_shards)), tensor)
    options = ZeroOptions.read(json.loads(Path(values.deepspeed).read_text()))
    assert len(weight_groups(modules, options, data)) > 3
    launch(train, (values,), tensor * data, tmp_path / "log", timeout=600)
    compare(tmp_path / "run", plain("prior"))


def train_in_pieces(values: Recipe, out: Path) -> None:
    """Train as on GPUs that share memory: the operators that send rows in pieces have PyTorch's fallback here."""
    from torch._inductor import config
    from torch.distributed import _symmetric_memory as symmetric_memory

    from digit_ds.model import tensor_parallel

    graphs = []

    def look(graph: torch.fx.Graph) -> None:
        calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        graphs.append({name: sum(name in call for call in calls) for name in IN_PIECES})

    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symmetric_memory._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symmetric_memory._fused_matmul_reduce_scatter_fallback, "CPU")
    config.post_grad_custom_post_pass, config.force_disable_caches = look, True
    tensor_parallel.travels_in_pieces = lambda device: True
    with symmetric_memory._test_mode():
        train(values)
    out.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(graphs))


IN_PIECES = ("fused_all_gather_matmul", "fused_matmul_reduce_scatter", "all_gather_into", "reduce_scatter_tensor")


@pytest.mark.slow
def test_rows_in_pieces_equal_plain_training(token_shards, plain, tmp_path):
    """Of a layer's four gathers and four reduce-scatters none is left whole."""
    values = recipe(tmp_path / "run", token_shards, parallel__tensor=2, parallel__sequence=True, training__compile=True)
    launch(train_in_pieces, (values, tmp_path / "graphs"), 2, tmp_path / "log", timeout=600)
    compare(tmp_path / "run", plain("prior"))
    for rank in range(2):
        graphs = json.loads((tmp_path / f"graphs.{rank}").read_text())
        layers = [list(graph.values()) for graph in graphs if any(graph.values())]
        assert layers == [[2, 2, 0, 0], [2, 2, 0, 0]], graphs  # forward and backward
