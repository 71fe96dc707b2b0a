"""Sampling on a GPU: the captured step against the CPU, and the promise about batches."""

import numpy as np
import pytest
import torch

from digit_ds.generation.draws import PRIOR, philox_uniforms
from digit_ds.generation.pipeline import make_sampler
from digit_ds.generation.settings import Decoding, Guidance
from digit_ds.model.attention import KeyValueCache
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import Transformer
from digit_ds.model.weights import initial_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DECODING = Decoding(top_k=50, guidance=Guidance(1.5, "power-cosine", exponent=0.5))


def model(kind: str, dtype: torch.dtype, device: str, width: int = 192, heads: int = 2) -> Transformer:
    """Head width 96 by default, as in the large model: no power of two."""
    vq_codes, classes = (0, 10) if kind == "prior" else (300, 0)
    spec = TransformerSpec(kind, 3, width, heads, 4 * width, "pre", 256, 500, vq_codes, classes, (12, 12))
    built = Transformer(spec)
    built.load_state_dict(initial_state(spec, 1))
    return built.to(device, dtype).eval().requires_grad_(False)


def arguments(kind: str, count: int) -> dict:
    if kind == "prior":
        return {"labels": torch.arange(count) % 10}
    generator = torch.Generator().manual_seed(0)
    return {"prefix": torch.randint(0, 500, (count, 144), generator=generator)}


def decoding(kind: str) -> Decoding:
    return DECODING if kind == "prior" else Decoding(top_p=0.9)


def test_random_numbers_are_those_of_the_cpu():
    images = torch.arange(1000) + 2**34
    assert torch.equal(philox_uniforms(7, images, PRIOR, 256), philox_uniforms(7, images.cuda(), PRIOR, 256).cpu())


@pytest.mark.parametrize(("width", "heads"), [(192, 2), (256, 4), (64, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_fused_attention_equals_pytorchs(width, heads, dtype):
    torch.manual_seed(0)
    lean = model("prior", dtype, "cuda", width, heads)
    fused, plain = lean.new_cache(5, 140), KeyValueCache(lean.spec, 5, 140, torch.device("cuda"), dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for part in [torch.randn(5, 62, 3 * width), *torch.randn(70, 5, 1, 3 * width)]:
        part = part.to("cuda", dtype)
        positions = fused.position + torch.arange(part.shape[1], device="cuda")
        visible = torch.arange(140, device="cuda") <= positions[:, None]
        ours, theirs = fused.attend(0, part, positions, visible), plain.attend(0, part, positions, visible)
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
        fused.position += part.shape[1]
    assert torch.equal(fused.keys[0], plain.keys[0]) and torch.equal(fused.values[0], plain.values[0])


@pytest.mark.parametrize("kind", ["prior", "ar", "nar"])
def test_float64_gives_the_cpus_tokens_in_any_batch(kind):
    given = arguments(kind, 40)
    expected = make_sampler(model(kind, torch.float64, "cpu"), decoding(kind), 5, rows=40)(torch.arange(40), **given)
    lean = model(kind, torch.float64, "cuda")
    for rows in (40, 16, 7):
        assert torch.equal(make_sampler(lean, decoding(kind), 5, rows)(torch.arange(40), **given), expected)


@pytest.mark.parametrize("kind", ["prior", "ar"])
def test_float32_graph_gives_nearly_the_cpus_tokens(kind):
    """In single precision a draw at a boundary may fall to the other side, after which an image goes its own way."""
    given = arguments(kind, 64)
    expected = make_sampler(model(kind, torch.float64, "cpu"), decoding(kind), 5, rows=64)(torch.arange(64), **given)
    found = make_sampler(model(kind, torch.float32, "cuda"), decoding(kind), 5, rows=64)(torch.arange(64), **given)
    assert (found == expected).all(1).float().mean() >= 0.9


@pytest.mark.parametrize("kind", ["prior", "ar", "nar"])
def test_bfloat16_repeats_exactly_at_one_batch_size(kind, record_property):
    given, images = arguments(kind, 96), torch.arange(96)
    lean = model(kind, torch.bfloat16, "cuda")
    sampler = make_sampler(lean, decoding(kind), 5, rows=32)
    first = sampler(images, **given)
    assert torch.equal(sampler(images, **given), first)
    # Another place in the batch, as another number of processes would give it.
    order = torch.from_numpy(np.random.default_rng(0).permutation(96))
    shuffled = sampler(images[order], **{name: part[order] for name, part in given.items()})
    assert torch.equal(shuffled, first[order])
    other = make_sampler(lean, decoding(kind), 5, rows=96)(images, **given)
    record_property("tokens_equal_at_another_batch_size", float((other == first).float().mean()))
