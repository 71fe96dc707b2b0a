"""Random checkpoints in the published layouts, and the tokenizer written out once more in plain torch operations."""

import argparse
import math

import torch
import torch.nn.functional as F

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def random_vit(
    *, width=32, depth=3, patch=14, table=37, registers=4, hidden=None, gated=False, scaled=True, seed=0
) -> dict[str, torch.Tensor]:
    """A DINOv2 state dict (as of dinov2_vitb14_reg4_pretrain.pth) in which no tensor is at an initial value."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 4 * width if hidden is None else hidden

    def draw(*shape, scale=0.2):
        return scale * torch.randn(*shape, generator=generator)

    def draw_matrix(rows, columns):
        return draw(rows, columns, scale=columns**-0.5)

    state = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, 1 + table * table, width),
        "mask_token": draw(1, width),
        "patch_embed.proj.weight": draw(width, 3, patch, patch, scale=0.2 / patch),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": 1 + draw(width),
        "norm.bias": draw(width),
    }
    if registers:
        state["register_tokens"] = draw(1, registers, width)
    up, down = ("w12", "w3") if gated else ("fc1", "fc2")
    for index in range(depth):
        block = {
            "norm1.weight": 1 + draw(width),
            "norm1.bias": draw(width),
            "attn.qkv.weight": draw_matrix(3 * width, width),
            "attn.qkv.bias": draw(3 * width),
            "attn.proj.weight": draw_matrix(width, width),
            "attn.proj.bias": draw(width),
            "norm2.weight": 1 + draw(width),
            "norm2.bias": draw(width),
            f"mlp.{up}.weight": draw_matrix(hidden * (2 if gated else 1), width),
            f"mlp.{up}.bias": draw(hidden * (2 if gated else 1)),
            f"mlp.{down}.weight": draw_matrix(width, hidden),
            f"mlp.{down}.bias": draw(width),
        }
        if scaled:
            block |= {"ls1.gamma": 1 + draw(width), "ls2.gamma": 1 + draw(width)}
        state |= {f"blocks.{index}.{name}": value for name, value in block.items()}
    return state


def vit_features(state, images, *, layer, heads, shrink=False):
    """Features of the block ``layer`` from the end by the data card's description, in the images' dtype."""
    state = {name: value.to(images.dtype) for name, value in state.items()}
    x = (images - MEAN.to(images.dtype)) / STD.to(images.dtype)
    if shrink:
        x = resample(x, round(x.shape[-1] * 0.875), 1 / 0.875)
    patches = state["patch_embed.proj.weight"]
    width, _, size, _ = patches.shape
    grid = x.shape[-1] // size
    x = x.reshape(len(x), 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, G, 3pp]
    x = x @ patches.reshape(width, -1).T + state["patch_embed.proj.bias"]
    positions = state["pos_embed"][:, 1:]
    table = math.isqrt(positions.shape[1])
    if table != grid:
        square = positions.reshape(1, table, table, width).permute(0, 3, 1, 2)
        positions = resample(square, grid, table / (grid + 0.1)).permute(0, 2, 3, 1).reshape(1, -1, width)
    first = state["cls_token"] + state["pos_embed"][:, :1]
    registers = state.get("register_tokens", torch.zeros(1, 0, width, dtype=x.dtype))
    extra = 1 + registers.shape[1]
    x = torch.cat([torch.cat([first, registers], 1).expand(len(x), -1, -1), x + positions], 1)
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(depth - layer + 1):
        x = vit_block(x, {name: state.get(f"blocks.{index}.{name}") for name in _BLOCK}, heads)
    return F.layer_norm(x, (width,), state["norm.weight"], state["norm.bias"], 1e-6)[:, extra:]


_BLOCK = [
    *(f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2") for kind in ("weight", "bias")),
    *(f"mlp.{part}.{kind}" for part in ("fc1", "fc2", "w12", "w3") for kind in ("weight", "bias")),
    "ls1.gamma",
    "ls2.gamma",
]


def vit_block(x, weights, heads):
    """One pre-norm block, attention written out head by head."""
    width = x.shape[-1]
    gamma1, gamma2 = (1.0 if weights[name] is None else weights[name] for name in ("ls1.gamma", "ls2.gamma"))
    h = F.layer_norm(x, (width,), weights["norm1.weight"], weights["norm1.bias"], 1e-6)
    query, key, value = (h @ weights["attn.qkv.weight"].T + weights["attn.qkv.bias"]).split(width, -1)
    size = width // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = query[..., part] @ key[..., part].transpose(-2, -1) / math.sqrt(size)
        outputs.append(scores.softmax(-1) @ value[..., part])
    x = x + gamma1 * (torch.cat(outputs, -1) @ weights["attn.proj.weight"].T + weights["attn.proj.bias"])
    h = F.layer_norm(x, (width,), weights["norm2.weight"], weights["norm2.bias"], 1e-6)
    if weights["mlp.w12.weight"] is not None:
        gate, h = (h @ weights["mlp.w12.weight"].T + weights["mlp.w12.bias"]).chunk(2, -1)
        h = gate * torch.sigmoid(gate) * h @ weights["mlp.w3.weight"].T + weights["mlp.w3.bias"]
    else:
        h = h @ weights["mlp.fc1.weight"].T + weights["mlp.fc1.bias"]
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2 @ weights["mlp.fc2.weight"].T + weights["mlp.fc2.bias"]
    return x + gamma2 * h


def resample(x, size, step):
    """Bicubic (a = -0.75) resampling of [..., n, n] to [..., size, size] with the given sampling step."""
    n = x.shape[-1]
    matrix = torch.zeros(size, n, dtype=torch.float64)
    for row in range(size):
        centre = (row + 0.5) * step - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), n - 1)] += _cubic(abs(centre - tap))
    matrix = matrix.to(x.dtype)
    return matrix @ x @ matrix.T


def _cubic(distance, a=-0.75):
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4)


def as_mae(state):
    """The layout of MAE's published file, as of a training run: settings and decoder in it."""
    return {
        "model": {**state, "decoder_embed.weight": torch.ones(2, 2), "decoder_blocks.0.norm1.weight": torch.ones(2)},
        "args": argparse.Namespace(lr=1e-3),
        "epoch": 800,
    }


def as_moco(state):
    """The layout of MoCo v3's published files: two encoders and a predictor, each with BatchNorm counters."""
    heads = {"head.0.weight": torch.ones(2, 2), "head.1.num_batches_tracked": torch.tensor(5)}
    named = {f"module.base_encoder.{name}": value for name, value in {**state, **heads}.items()}
    named |= {f"module.momentum_encoder.{name}": value + 1 for name, value in {**state, **heads}.items()}
    return {"epoch": 300, "arch": "vit_base", "state_dict": {**named, "module.predictor.0.weight": torch.ones(2, 2)}}


def as_ibot(state):
    """The layout of iBOT's published ``checkpoint_teacher.pth``."""
    state = dict(state)
    state["masked_embed"] = state.pop("mask_token")
    return {"state_dict": state}


def as_ibot_run(state):
    """The layout of an iBOT training run: the teacher's backbone is the one to take."""
    teacher = {f"backbone.{name}": value for name, value in as_ibot(state)["state_dict"].items()}
    teacher |= {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer2.weight_g": torch.ones(2, 1)}
    student = {f"module.backbone.{name}": value + 1 for name, value in state.items()}
    return {"student": student, "teacher": teacher, "args": argparse.Namespace(lr=1e-3), "epoch": 400}


def random_vqgan(ddconfig, codes, seed=0):
    """A published-layout VQGAN state dict for a configuration, written out key by key."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def draw(name, *shape, bias=False, norm=False):
        scale = 0.2 if norm else math.prod(shape[1:]) ** -0.5
        state[f"{name}.weight"] = float(norm) + scale * torch.randn(*shape, generator=generator)
        if bias or norm:
            state[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)

    def draw_block(name, before, after):
        draw(f"{name}.norm1", before, norm=True)
        draw(f"{name}.conv1", after, before, 3, 3)
        draw(f"{name}.norm2", after, norm=True)
        draw(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            draw(f"{name}.nin_shortcut", after, after, 1, 1)

    channels = [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]]
    draw("encoder.conv_in", ddconfig["ch"], ddconfig["in_channels"], 3, 3)
    draw("decoder.conv_in", channels[-1], ddconfig["z_channels"], 3, 3, bias=True)
    for half, level_name in (("encoder", "down"), ("decoder", "up")):
        for level, width in enumerate(channels):
            if half == "encoder":
                before = channels[level - 1] if level else ddconfig["ch"]
            else:
                before = channels[min(level + 1, len(channels) - 1)]
            for index in range(ddconfig["num_res_blocks"]):
                draw_block(f"{half}.{level_name}.{level}.block.{index}", before if index == 0 else width, width)
            if half == "decoder" and level > 0:
                draw(f"{half}.up.{level}.upsample.conv", width, width, 3, 3, bias=True)
        for name in ("block_1", "block_2"):
            draw_block(f"{half}.mid.{name}", channels[-1], channels[-1])
        draw(f"{half}.norm_out", channels[-1] if half == "encoder" else channels[0], norm=True)
    draw("encoder.conv_out", ddconfig["z_channels"], channels[-1], 1, 1, bias=True)
    draw("decoder.conv_out", ddconfig["out_ch"], channels[0], 3, 3, bias=True)
    draw("quantize.embedding", codes, ddconfig["z_channels"])
    return state


def vqgan_latents(state, ddconfig, images):
    """Latents before quantisation, by the data card's description."""
    x = F.conv2d(images, state["encoder.conv_in.weight"], padding=1)
    for level in range(len(ddconfig["ch_mult"])):
        for index in range(ddconfig["num_res_blocks"]):
            x = _vqgan_block(state, f"encoder.down.{level}.block.{index}", x)
        if level < len(ddconfig["ch_mult"]) - 1:
            x = F.avg_pool2d(x, 2, 2)
    x = _vqgan_block(state, "encoder.mid.block_2", _vqgan_block(state, "encoder.mid.block_1", x))
    x = _norm_swish(state, "encoder.norm_out", x)
    return F.conv2d(x, state["encoder.conv_out.weight"], state["encoder.conv_out.bias"])


def vqgan_pixels(state, ddconfig, ids):
    """Images of codes [B, rows, columns], by the data card's description."""
    x = state["quantize.embedding.weight"][ids].permute(0, 3, 1, 2)
    x = F.conv2d(x, state["decoder.conv_in.weight"], state["decoder.conv_in.bias"], padding=1)
    x = _vqgan_block(state, "decoder.mid.block_2", _vqgan_block(state, "decoder.mid.block_1", x))
    for level in reversed(range(len(ddconfig["ch_mult"]))):
        for index in range(ddconfig["num_res_blocks"]):
            x = _vqgan_block(state, f"decoder.up.{level}.block.{index}", x)
        if level > 0:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            name = f"decoder.up.{level}.upsample.conv"
            x = F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
    x = _norm_swish(state, "decoder.norm_out", x)
    return F.conv2d(x, state["decoder.conv_out.weight"], state["decoder.conv_out.bias"], padding=1)


def _vqgan_block(state, name, x):
    h = F.conv2d(_norm_swish(state, f"{name}.norm1", x), state[f"{name}.conv1.weight"], padding=1)
    h = F.conv2d(_norm_swish(state, f"{name}.norm2", h), state[f"{name}.conv2.weight"], padding=1)
    shortcut = state.get(f"{name}.nin_shortcut.weight")
    return h + (x if shortcut is None else F.conv2d(h, shortcut))


def _norm_swish(state, name, x):
    x = F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)
    return x * torch.sigmoid(x)
