"""The GPU cache's kernels, in Triton's interpreter where there is no GPU."""

from triton_interpreter import interpret

PROGRAM = """
import torch
from digit_ds.model.attention import KeyValueCache
from digit_ds.model.transformer import Transformer
from digit_ds.model.fused_cache import FusedCache
from digit_ds.model.spec import TransformerSpec

torch.manual_seed(0)
for width, heads, prompt in ((64, 2, 60), (48, 2, 95), (48, 2, 0)):  # head widths 32 and 24, which is no power of two
    spec = TransformerSpec("prior", 1, width, heads, 4 * width, "post", 256, 9, 0, 0)
    batch, length = 2, 110
    caches = [kind(spec, batch, length, torch.device("cpu"), torch.float32) for kind in (KeyValueCache, FusedCache)]
    parts = [*torch.randn(7, batch, 1, 3 * width)]  # crosses a block's end, or starts from nothing
    if prompt:
        parts.insert(0, torch.randn(batch, prompt, 3 * width))
    place = 0
    for part in parts:
        positions = place + torch.arange(part.shape[1])
        visible = torch.arange(length) <= positions[:, None]
        plain, fused = (cache.attend(0, part, positions, visible) for cache in caches)
        torch.testing.assert_close(fused, plain, atol=2e-6, rtol=1e-5)
        place += part.shape[1]
    assert torch.equal(caches[0].keys[0], caches[1].keys[0]) and torch.equal(caches[0].values[0], caches[1].values[0])

for width, options in ((48, {"positions": "rotary2d", "qk_norm": True}), (16, {"positions": "rotary2d"}),
                       (12, {"qk_norm": True}), (10, {"qk_norm": True})):  # the last head width is odd
    spec = TransformerSpec("ar", 1, width, 2, 16, "pre", 12, 9, 7, 0, grid=(2, 3), **options)
    model = Transformer(spec).eval()
    tokens = torch.cat([torch.randint(17, 26, (2, 6)), torch.full((2, 1), 2), torch.randint(12, (2, 3))], dim=1)
    for name, parameter in model.named_parameters():
        if "qk_norm" in name:
            torch.nn.init.normal_(parameter)
    with torch.inference_mode():
        cache = FusedCache(spec, 2, 10, torch.device("cpu"), torch.float32)
        steps = [model.step(part, cache) for part in tokens.split((6, 1, 1, 1, 1), dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), atol=1e-5, rtol=1e-5)
print("equal")
"""


def test_kernels_equal_pytorch():
    interpret(PROGRAM)
