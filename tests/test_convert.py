"""Published checkpoints in and out: any size, any dtype, older configurations, wrong files."""

import argparse
import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import from_official, to_official
from safetensors.torch import save_file
from small_models import random_ids

from digit_ds.errors import UserError
from digit_ds.model.fairseq import plain, read_checkpoint
from digit_ds.model.official import CARRIED
from digit_ds.model.released import read_model, save_model
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.transformer import load_model
from digit_ds.model.weights import initial_state, parameters

GOLDEN = Path(__file__).parent / "golden"
TOOL = Path(__file__).parent.parent / "tools" / "convert_checkpoint.py"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("stage*/checkpoint_last.pt"))
NAMES = {"prior": "stlm", "ar": "st2vtlm", "nar": "st2vtlm_nar", "vq": "st2vtlm_vq"}


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def published(kind, *, layers, width, heads, ffn, pre, positions, outputs, extra_rows, dtype=torch.float32, seed=0):
    """A checkpoint in the published layout with random weights, written out by hand."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * 0.3).to(dtype)

    model = {
        "decoder.version": torch.tensor([3.0], dtype=dtype),
        "decoder.embed_tokens.weight": draw(outputs + extra_rows, width),
        "decoder.embed_positions.weight": draw(positions + 2, width),
        "decoder.output_projection.weight": draw(outputs, width),
    }
    if kind in ("ar", "nar"):
        model["decoder.embed_positions_1.weight"] = draw(positions + 2, width)
    if pre:
        model |= {"decoder.layer_norm.weight": draw(width) + 1, "decoder.layer_norm.bias": draw(width)}
    for i in range(layers):
        prefix = f"decoder.layers.{i}"
        for letter in ("k", "v", "q", "out"):
            model[f"{prefix}.self_attn.{letter}_proj.weight"] = draw(width, width)
            model[f"{prefix}.self_attn.{letter}_proj.bias"] = draw(width)
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            model |= {f"{prefix}.{norm}.weight": draw(width) + 1, f"{prefix}.{norm}.bias": draw(width)}
        model |= {f"{prefix}.fc1.weight": draw(ffn, width), f"{prefix}.fc1.bias": draw(ffn)}
        model |= {f"{prefix}.fc2.weight": draw(width, ffn), f"{prefix}.fc2.bias": draw(width)}
    options = {
        "_name": NAMES[kind],
        "activation_fn": "gelu",
        "decoder_attention_heads": heads,
        "decoder_layers": layers,
        "decoder_normalize_before": pre,
    }
    return {"args": None, "cfg": {"model": options, "task": {"_name": "any"}}, "model": model}


def reference(checkpoint, tokens, prefix):
    """The published transformer in plain functions on published tensors, float64."""
    weights = {name.removeprefix("decoder."): value.double() for name, value in checkpoint["model"].items()}
    options = checkpoint["cfg"]["model"]
    width = weights["embed_tokens.weight"].shape[1]
    heads, pre = options["decoder_attention_heads"], options["decoder_normalize_before"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x, name):
        q, k, v = (linear(x, f"{name}.{letter}_proj") for letter in "qkv")
        out = torch.zeros_like(x)
        size = width // heads
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            score = size**-0.5 * q[..., part] @ k[..., part].transpose(1, 2)
            if options["_name"] != "st2vtlm_nar":
                later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
                score = score.masked_fill(later, -torch.inf)
            out[..., part] = score.softmax(-1) @ v[..., part]
        return linear(out, f"{name}.out_proj")

    def ffn(x, name):
        h = linear(x, f"{name}.fc1")
        return linear(0.5 * h * (1 + torch.erf(h / 2**0.5)), f"{name}.fc2")

    x = width**0.5 * weights["embed_tokens.weight"][tokens]
    for t in range(tokens.shape[1]):
        table = "embed_positions_1" if t < prefix else "embed_positions"
        x[:, t] += weights[f"{table}.weight"][2 + (t if t < prefix else t - prefix)]
    for i in range(options["decoder_layers"]):
        name = f"layers.{i}"
        if pre:
            x = x + attention(norm(x, f"{name}.self_attn_layer_norm"), f"{name}.self_attn")
            x = x + ffn(norm(x, f"{name}.final_layer_norm"), name)
        else:
            x = norm(x + attention(x, f"{name}.self_attn"), f"{name}.self_attn_layer_norm")
            x = norm(x + ffn(x, name), f"{name}.final_layer_norm")
    if pre:
        x = norm(x, "layer_norm")
    return x @ weights["output_projection.weight"].T


SIZES = [
    ("prior", dict(layers=1, width=12, heads=2, ffn=20, pre=False, positions=300, outputs=38, extra_rows=0), (4, 5)),
    ("prior", dict(layers=4, width=40, heads=5, ffn=24, pre=True, positions=300, outputs=70, extra_rows=13), (16, 16)),
    ("ar", dict(layers=2, width=24, heads=6, ffn=96, pre=True, positions=300, outputs=21, extra_rows=48), (3, 4)),
    ("ar", dict(layers=3, width=16, heads=1, ffn=56, pre=False, positions=60, outputs=33, extra_rows=18), (5, 3)),
    ("nar", dict(layers=2, width=36, heads=4, ffn=28, pre=True, positions=40, outputs=52, extra_rows=24), (4, 4)),
    ("vq", dict(layers=3, width=28, heads=7, ffn=112, pre=True, positions=290, outputs=29, extra_rows=0), (16, 16)),
]


@pytest.mark.parametrize(("kind", "sizes", "grid"), SIZES)
def test_other_sizes_compute_what_a_plain_reference_does(tmp_path, kind, sizes, grid):
    checkpoint = published(kind, **sizes)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    spec = from_official(tmp_path / "checkpoint.pt", tmp_path / "model", grid=grid)
    stated = dict(
        layers=spec.layers,
        width=spec.width,
        heads=spec.heads,
        ffn=spec.ffn_width,
        pre=spec.norm_position == "pre",
        positions=spec.max_positions,
        outputs=spec.vocabulary.output_size,
        extra_rows=spec.vocabulary.embedding_rows - spec.vocabulary.output_size,
    )
    assert stated == sizes
    model = load_model(tmp_path / "model")
    length = spec.prefix_length + 1 + 2 * spec.tokens // 3
    generator = torch.Generator().manual_seed(1)
    tokens = random_ids(spec, 2, length, generator)
    difference = (model(tokens) - reference(checkpoint, tokens, spec.prefix_length)).abs().max().item()
    assert difference <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_official_round_trip_is_bit_exact(tmp_path, variant, dtype):
    original = load(GOLDEN / variant / "checkpoint_last.pt")
    original["model"] = {name: value.to(dtype) for name, value in original["model"].items()}
    original["last_optimizer_state"] = {"state": {0: {"exp_avg": torch.zeros(10)}}}
    torch.save(original, tmp_path / "checkpoint.pt")
    from_official(tmp_path / "checkpoint.pt", tmp_path / "model")
    lacking = to_official(tmp_path / "model", tmp_path / "back.pt")
    back = load(tmp_path / "back.pt")
    assert same(back["model"], original["model"])
    assert back["cfg"] == original["cfg"] and back["args"] is None
    # Without the VQGAN in the golden files of these two, there is nothing to put back.
    assert lacking == (["VQGAN"] if variant in ("stage2_nar", "stage2_vq") else [])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_model_is_byte_for_byte_that_of_tensors_in_memory(tmp_path, dtype, zipped):
    """Query, key and value are joined while the file is written; files of PyTorch before 1.6 cannot be mapped."""
    sizes = dict(layers=3, width=24, heads=4, ffn=36, pre=True, positions=300, outputs=38, extra_rows=7)
    checkpoint = published("prior", **sizes, dtype=dtype)
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    spec = from_official(path, tmp_path / "model", grid=(4, 4))
    expected = {}
    for parameter in parameters(spec):
        parts = [checkpoint["model"][f"decoder.{name}"] for name in parameter.official]
        by_head = [torch.cat(rows) for rows in zip(*(part.chunk(4) for part in parts))]
        expected[parameter.name] = torch.cat(by_head) if len(parts) == 3 else parts[0]
    save_file(expected, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_what_a_checkpoint_carries_is_written_and_put_back(tmp_path):
    source = GOLDEN / "stage2_ar" / "checkpoint_last.pt"
    parts = {"encoder": tmp_path / "vit.pth", "codebook": tmp_path / "km.npy", "vqgan": tmp_path / "vqgan.ckpt"}
    from_official(source, tmp_path / "model", carry=False, **{f"{part}_out": path for part, path in parts.items()})
    assert not (tmp_path / "model" / CARRIED).exists()
    original = load(source)["model"]
    encoder = torch.load(parts["encoder"], weights_only=True)
    assert same(
        {f"pretrained_encoder.{name}": value for name, value in encoder.items()},
        {name: value for name, value in original.items() if name.startswith("pretrained_encoder.")},
    )
    centroids = np.load(parts["codebook"], allow_pickle=False)
    assert np.array_equal(centroids, original["centroids"].numpy().T)
    vqgan = torch.load(parts["vqgan"], weights_only=True)["state_dict"]
    assert {f"vqgan.{name}" for name in vqgan} == {name for name in original if name.startswith("vqgan.")}
    assert to_official(tmp_path / "model", tmp_path / "bare.pt") == ["encoder", "codebook", "VQGAN"]
    assert to_official(tmp_path / "model", tmp_path / "whole.pt", **parts) == []
    assert same(load(tmp_path / "whole.pt")["model"], original)
    for part in parts:
        with pytest.raises(UserError, match="exists already"):
            from_official(source, tmp_path / "other", **{f"{part}_out": parts[part]})
    with pytest.raises(UserError, match="carries no VQGAN"):
        from_official(GOLDEN / "stage2_vq" / "checkpoint_last.pt", tmp_path / "other", vqgan_out=tmp_path / "new.ckpt")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_trained_here_gets_a_configuration_that_converts_back(tmp_path, variant):
    from_official(GOLDEN / variant / "checkpoint_last.pt", tmp_path / "model")
    spec, state, _ = read_model(tmp_path / "model")
    save_model(tmp_path / "ours", spec, state, {"layer": 3})  # no published configuration kept
    to_official(tmp_path / "ours", tmp_path / "ours.pt")
    theirs, ours = load(GOLDEN / variant / "checkpoint_last.pt")["cfg"], load(tmp_path / "ours.pt")["cfg"]
    assert ours.keys() == theirs.keys()
    free = ("source_vocab_size",) if spec.kind == "vq" else ()  # the baseline has no use for it
    free += ("vqgan_ckpt_path", "vqgan_config_path", "kmeans_path", "pretrained_enc_config", "character", "char_")
    for group in ("model", "task"):
        wanted = {key: value for key, value in theirs[group].items() if not key.startswith((*free, "data"))}
        found = {key: value for key, value in ours[group].items() if not key.startswith((*free, "data"))}
        assert found == wanted
    from_official(tmp_path / "ours.pt", tmp_path / "again")
    assert read_model(tmp_path / "again").spec == spec
    assert same(read_model(tmp_path / "again").state, state)


def test_older_files_with_a_namespace(tmp_path):
    original = load(GOLDEN / "stage1_cond_postnorm" / "checkpoint_last.pt")
    options = {**original["cfg"]["model"], "arch": "stlm"}
    del options["_name"]
    original |= {"cfg": None, "args": argparse.Namespace(**options)}
    torch.save(original, tmp_path / "old.pt")
    spec = from_official(tmp_path / "old.pt", tmp_path / "model")
    assert (spec.kind, spec.heads, spec.classes) == ("prior", 4, 1000)
    to_official(tmp_path / "model", tmp_path / "back.pt")
    back = load(tmp_path / "back.pt")
    assert isinstance(back["args"], argparse.Namespace) and vars(back["args"]) == options and back["cfg"] is None
    assert same(back["model"], original["model"])


def test_older_files_with_omegaconf(tmp_path):
    """A file that omegaconf 2.1 wrote, of dataclasses in a module ``fairseq.dataclass.configs``."""
    assert "omegaconf" not in sys.modules
    found = read_checkpoint(GOLDEN / "old_configurations" / "omegaconf_structured.pt")
    assert found.cfg == {
        "model": {
            "_name": "stlm",
            "activation_fn": "gelu",
            "decoder_attention_heads": 4,
            "decoder_normalize_before": False,
            "max_target_positions": 1024,
            "betas": [0.9, 0.98],
            "dropout": 0.0,
            "anything": None,
            "pretrained_enc_config": {"layer": 3},
        },
        "common": {"seed": 1, "fp16": True},
    }
    assert found.option("decoder_attention_heads") == 4
    assert plain((1, "x", None, True, Path("p"))) == [1, "x", None, True, "p"]


class Trap:
    def __reduce__(self):
        return print, ("code ran",)


def _with(**options):
    def change(checkpoint):
        checkpoint["cfg"]["model"] |= options

    return change


def _without(name):
    return lambda checkpoint: checkpoint["model"].pop(name)


def _tensor(name, *shape):
    return lambda checkpoint: checkpoint["model"].update({name: torch.zeros(shape)})


WRONG = {
    "another model": (_with(_name="transformer_lm"), r"model 'transformer_lm', expected one of stlm, st2vtlm"),
    "other heads": (_with(decoder_attention_heads=7), r"decoder_attention_heads is 7, expected a divisor of 12"),
    "no heads": (_with(decoder_attention_heads=None), r"decoder_attention_heads is None"),
    "activation": (_with(activation_fn="relu"), r"activation_fn is 'relu', expected 'gelu'"),
    "norm": (_with(decoder_normalize_before=True), r"decoder_normalize_before is True, but the checkpoint lacks"),
    "kind": (_with(_name="st2vtlm"), r"'decoder.embed_positions_1.weight' is missing"),
    "missing": (_without("decoder.layers.0.fc2.bias"), r"'decoder.layers.0.fc2.bias' is missing"),
    "no layers": (_without("decoder.layers.0.fc1.weight"), r"'decoder.layers.0.fc1.weight' is missing"),
    "extra": (_tensor("decoder.layers.0.encoder_attn.q_proj.weight", 3), r"encoder_attn.* belongs to no published"),
    "width": (_tensor("decoder.layers.0.fc2.weight", 9, 20), r"fc2.weight' has shape \[9, 20\], expected \[12, 20\]"),
    "rows": (_tensor("decoder.embed_tokens.weight", 20, 12), r"has 20 embedding rows and 38 outputs, expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_are_one_sentence(tmp_path, case):
    change, sentence = WRONG[case]
    checkpoint = published(*SIZES[0][:1], **SIZES[0][1])
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=sentence) as raised:
        from_official(tmp_path / "checkpoint.pt", tmp_path / "model")
    assert str(tmp_path / "checkpoint.pt") in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "model").exists()


def test_wrong_files_are_one_sentence(tmp_path):
    golden = GOLDEN / "stage2_vq" / "checkpoint_last.pt"
    whole = golden.read_bytes()
    (tmp_path / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save({"cfg": Trap(), "model": {}}, tmp_path / "code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"cfg": Trap()}))
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"a": torch.zeros(1)}, "cfg": None}, tmp_path / "no_cfg.pt")
    sentences = {
        "missing.pt": "cannot be read",
        "truncated.pt": "damaged or truncated",
        "text.pt": "damaged or truncated",
        "code.pt": r"could run code",
        "plain.pt": r"could run code|damaged",
        "other.pt": "holds state_dict, expected a fairseq checkpoint",
        "list.pt": "holds list, expected a fairseq checkpoint",
        "no_cfg.pt": "holds no model configuration",
    }
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence) as raised:
            from_official(tmp_path / name, tmp_path / "model")
        assert name in str(raised.value) and "\n" not in str(raised.value)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        from_official(golden, tmp_path / "file" / "model")
    np.save(tmp_path / "km.npy", np.zeros((7, 16), np.float32))
    from_official(GOLDEN / "stage1_uncond_prenorm" / "checkpoint_last.pt", tmp_path / "prior")
    with pytest.raises(UserError, match="holds 7 centroids, expected 96"):
        to_official(tmp_path / "prior", tmp_path / "out.pt", codebook=tmp_path / "km.npy")
    (tmp_path / "out.pt").touch()
    with pytest.raises(UserError, match="exists already"):
        to_official(tmp_path / "prior", tmp_path / "out.pt")


@pytest.fixture(scope="module")
def tool():
    """``main`` of the script, imported: starting Python and torch for every call takes seconds."""
    description = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_the_command(tool, tmp_path, capsys):
    golden = GOLDEN / "stage2_nar" / "checkpoint_last.pt"
    tool("from-official", golden, tmp_path / "model")
    tool("to-official", tmp_path / "model", tmp_path / "back.pt")
    assert "lacks the VQGAN" in capsys.readouterr().err
    assert same(load(tmp_path / "back.pt")["model"], load(golden)["model"])
    tool("to-megatron", tmp_path / "model", tmp_path / "parts", "--tensor-parallel", 2)
    tool("from-megatron", tmp_path / "parts", tmp_path / "joined")
    first, second = read_model(tmp_path / "model"), read_model(tmp_path / "joined")
    assert first.spec == second.spec and first.provenance == second.provenance and same(first.state, second.state)
    tool("from-official", golden, tmp_path / "bare", "--drop-carried", "--codebook-out", tmp_path / "km.npy")
    assert not (tmp_path / "bare" / CARRIED).exists() and (tmp_path / "km.npy").exists()


def test_the_command_ends_with_one_sentence(tmp_path):
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"cfg": Trap()}))
    command = [sys.executable, str(TOOL), "from-official", str(tmp_path / "code.pt"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "code.pt: is not a PyTorch checkpoint" in done.stderr


def test_an_unconditional_model_of_this_project_has_no_official_leftovers(tmp_path):
    spec = TransformerSpec("prior", 1, 8, 2, 16, "post", 20, 9, 0, 0, grid=(2, 2))
    save_model(tmp_path / "model", spec, initial_state(spec, 0), {})
    assert to_official(tmp_path / "model", tmp_path / "out.pt") == ["encoder", "codebook"]
    assert from_official(tmp_path / "out.pt", tmp_path / "back", grid=(2, 2)) == spec
