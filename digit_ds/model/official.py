"""Published DiGIT checkpoints (fairseq's) <-> released model directories, tensor for tensor.

A published checkpoint is the state dict of a whole fairseq model: the transformer under ``decoder.``, and beside it,
frozen, the image encoder (``pretrained_encoder.``), the K-Means centroids (transposed, with their squared norms) and,
for pixel decoders, the VQGAN (``vqgan.``). The transformer becomes ``model.safetensors``; the rest is kept as it is in
``carried.safetensors``, so that the way back gives a file that fairseq loads strictly, and is written out in the usual
formats on request.
"""

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import write_atomically
from digit_ds.model.fairseq import FairseqCheckpoint, read_checkpoint, write_checkpoint
from digit_ds.model.published import KINDS, PUBLISHED_OPTIONS, kind_of, published_cfg
from digit_ds.model.released import read_model, refuse_existing, write_model
from digit_ds.model.settings import FromOfficial, ToOfficial
from digit_ds.model.spec import TransformerSpec
from digit_ds.model.tensor_file import Content, whole, write_tensors
from digit_ds.model.weights import POSITION_OFFSET, State, from_official_names, fuse_qkv, to_official_names
from digit_ds.safe_load import load_torch, read_tensors
from digit_ds.tokenizer.codebook import load_codebook, save_codebook
from digit_ds.vocabulary import SPECIALS

CARRIED = "carried.safetensors"
"""What a published checkpoint holds besides the transformer, under its published names."""
DECODER, ENCODER, VQGAN = "decoder.", "pretrained_encoder.", "vqgan."
CENTROIDS, CENTROID_NORM, VERSION = "centroids", "centroid_norm", "decoder.version"


def from_official(settings: FromOfficial) -> TransformerSpec:
    """Convert a published checkpoint of any of the four models to a released model directory.

    Every size is read from the tensors but for the number of heads, which only the configuration states, and the token
    grid, which no checkpoint states. Weights keep their dtype; what it carries is written in float32. Optimizer state
    is not read.

    Raises:
        UserError: the file is not such a checkpoint, or does not hold what is asked for.
    """
    checkpoint, out_dir = Path(settings.checkpoint), Path(settings.out)
    refuse_existing(out_dir)
    found = read_checkpoint(checkpoint)
    decoder = {name.removeprefix(DECODER): value for name, value in found.model.items() if name.startswith(DECODER)}
    decoder.pop("version", None)  # always 3, made again on the way back
    carried = {name: value for name, value in found.model.items() if not name.startswith(DECODER)}
    spec = _read_spec(found, decoder, settings.grid, str(checkpoint))
    contents = {
        name: _content(parts, spec.heads) for name, parts in from_official_names(decoder, spec, str(checkpoint)).items()
    }
    _write_carried(carried, settings, _encoder_layer(found))
    if carried and not settings.drop_carried:
        write_tensors(out_dir / CARRIED, {name: whole(value) for name, value in carried.items()})
    provenance: dict[str, Any] = {"official": {"file": checkpoint.name, "cfg": found.cfg, "args": found.args}}
    if (layer := _encoder_layer(found)) is not None:
        provenance["layer"] = layer
    write_model(out_dir, spec, contents, provenance)
    return spec


def to_official(settings: ToOfficial) -> list[str]:
    """Convert a released model directory to a checkpoint of the published layout.

    The encoder, codebook and VQGAN inside it come from the given files, or else from ``carried.safetensors``.

    Returns:
        Names of the parts that the checkpoint lacks, without which fairseq will not load it strictly; empty when whole.

    Raises:
        UserError: ``out`` exists, a file cannot be read, or the model has choices that no published model has.
    """
    model_dir, out = Path(settings.model), Path(settings.out)
    encoder, codebook, vqgan = settings.encoder, settings.codebook, settings.vqgan
    if out.exists():
        raise UserError(f"{out}: exists already, expected a new file")
    spec, state, provenance = read_model(model_dir)
    if spec.unpublished:
        raise UserError(
            f"{model_dir}: has {', '.join(spec.unpublished)}, expected the options of the published architecture, to "
            "which its checkpoints are limited"
        )
    decoder = to_official_names(state, spec)
    dtype = state["embedding.weight"].dtype  # fairseq's fp16 keeps everything in half precision
    model: State = {VERSION: torch.tensor([3.0], dtype=dtype)}
    model |= {DECODER + name: value for name, value in decoder.items()}
    if (model_dir / CARRIED).exists():
        model |= read_tensors(model_dir / CARRIED)
    given: State = {}
    if encoder is not None:
        given |= {ENCODER + name: value for name, value in _flat_state(Path(encoder)).items()}
    if vqgan is not None:
        # A training checkpoint holds its losses too, which the published model has no place for.
        inference = {name: value for name, value in _flat_state(Path(vqgan)).items() if not name.startswith("loss.")}
        given |= {VQGAN + name: value for name, value in inference.items()}
    if codebook is not None:
        given |= _codebook_tensors(Path(codebook), spec)
    for prefix in (prefix for prefix in (ENCODER, VQGAN) if any(name.startswith(prefix) for name in given)):
        model = {name: value for name, value in model.items() if not name.startswith(prefix)}
    model |= {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    official = provenance.get("official")
    if official:
        cfg, args = official.get("cfg"), official.get("args")
    else:
        files = {"encoder": str(encoder or "encoder.pth"), "codebook": str(codebook or "km.npy")}
        files["vqgan"] = str(vqgan or "vqgan.ckpt")
        width = model[ENCODER + "cls_token"].shape[-1] if ENCODER + "cls_token" in model else None
        cfg, args = published_cfg(spec, provenance, files, width), None
    write_checkpoint(out, model, cfg, args)
    return _lacking(spec, model)


def write_carried_vqgan(model_dir: Path | str, out: Path | str) -> bool:
    """Write the VQGAN that a converted pixel decoder carries, as ``from_official`` does; False: it carries none."""
    carried = Path(model_dir) / CARRIED
    vqgan = _under(read_tensors(carried), VQGAN) if carried.exists() else {}
    if vqgan:
        write_atomically(out, lambda temporary: torch.save({"state_dict": vqgan}, temporary))
    return bool(vqgan)


def _content(parts: list[Tensor], heads: int) -> Content:
    """A parameter of ours; query, key and value are joined when it is written."""
    if len(parts) == 1:
        return whole(parts[0])
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
    return Content(dtype, shape, lambda: [fuse_qkv(parts, heads)])


def _read_spec(
    found: FairseqCheckpoint, decoder: Mapping[str, Tensor], grid: tuple[int, int], source: str
) -> TransformerSpec:
    """Sizes from the tensors, choices from the configuration, and both refused where they contradict each other."""
    name = found.option("_name") or found.option("arch")
    kind = kind_of(name)
    if kind is None:
        raise UserError(f"{source}: is a checkpoint of model {name!r}, expected one of {', '.join(KINDS)}")
    needed = ["embed_tokens.weight", "embed_positions.weight", "output_projection.weight", "layers.0.fc1.weight"]
    needed += ["embed_positions_1.weight"] if kind in ("ar", "nar") else []
    for tensor in needed:
        if tensor not in decoder or decoder[tensor].ndim != 2:
            raise UserError(f"{source}: tensor '{DECODER}{tensor}' is missing, expected a DiGIT {name} checkpoint")
    for option, value in PUBLISHED_OPTIONS.items():
        if (stated := found.option(option, value)) != value:
            raise UserError(f"{source}: model option {option} is {stated!r}, expected {value!r} as in published models")
    rows, width = decoder["embed_tokens.weight"].shape
    heads = found.option("decoder_attention_heads")
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(f"{source}: model option decoder_attention_heads is {heads!r}, expected a divisor of {width}")
    pre_norm = "layer_norm.weight" in decoder
    if (stated := found.option("decoder_normalize_before", pre_norm)) != pre_norm:
        raise UserError(
            f"{source}: model option decoder_normalize_before is {stated!r}, but the checkpoint "
            f"{'has' if pre_norm else 'lacks'} tensor '{DECODER}layer_norm.weight'"
        )
    output = len(decoder["output_projection.weight"])
    codes, rest = output - SPECIALS, rows - output
    if kind in ("ar", "nar"):
        discriminative, vq, classes = rest - SPECIALS, codes, 0
    else:
        discriminative, vq, classes = (codes, 0, rest) if kind == "prior" else (0, codes, rest)
    if codes < 1 or rest < 0 or (kind in ("ar", "nar") and discriminative < 1):
        raise UserError(f"{source}: has {rows} embedding rows and {output} outputs, expected those of a DiGIT {name}")
    layers = {int(name.split(".")[1]) for name in decoder if name.startswith("layers.")}
    return TransformerSpec(
        kind=kind,
        layers=len(layers),
        width=width,
        heads=heads,
        ffn_width=len(decoder["layers.0.fc1.weight"]),
        norm_position="pre" if pre_norm else "post",
        max_positions=len(decoder["embed_positions.weight"]) - POSITION_OFFSET,
        discriminative_codes=discriminative,
        vq_codes=vq,
        classes=classes,
        grid=grid,
    )


def _encoder_layer(found: FairseqCheckpoint) -> int | None:
    """Which block from the encoder's end the tokens were made from, if the configuration states it."""
    encoder = found.option("pretrained_enc_config")
    return encoder.get("layer") if isinstance(encoder, dict) else None


def _write_carried(carried: Mapping[str, Tensor], settings: FromOfficial, layer: int | None) -> None:
    """Write the parts that were asked for; what the checkpoint lacks is refused before anything is written."""
    encoder_out, codebook_out, vqgan_out = settings.encoder_out, settings.codebook_out, settings.vqgan_out
    requests = (("encoder", ENCODER, encoder_out), ("codebook", CENTROIDS, codebook_out), ("VQGAN", VQGAN, vqgan_out))
    for part, prefix, path in requests:
        if path is not None and not any(name.startswith(prefix) for name in carried):
            raise UserError(f"{settings.checkpoint}: carries no {part}, expected one to write to {path}")
        if path is not None and Path(path).exists():
            raise UserError(f"{path}: exists already, expected a new file")
    if encoder_out is not None:  # no part stays in memory while the next is written
        write_atomically(encoder_out, lambda temporary: torch.save(_under(carried, ENCODER), temporary))
    if codebook_out is not None:
        provenance = {} if layer is None else {"layer": layer}
        save_codebook(codebook_out, carried[CENTROIDS].T.float().contiguous(), provenance)
    if vqgan_out is not None:
        write_atomically(vqgan_out, lambda temporary: torch.save({"state_dict": _under(carried, VQGAN)}, temporary))


def _under(tensors: Mapping[str, Tensor], prefix: str) -> State:
    """Tensors below a prefix, without it, as float32 (from float16 exactly)."""
    return {
        name.removeprefix(prefix): value.float() if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _flat_state(path: Path) -> State:
    """The tensors of a ``.pth`` or ``.ckpt`` file, with or without ``state_dict`` around them."""
    found = load_torch(path)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{path}: is not a state dict, expected named tensors")
    return found


def _codebook_tensors(path: Path, spec: TransformerSpec) -> State:
    """The centroids as fairseq keeps them: transposed, with the sums of squares of the columns."""
    centroids = load_codebook(path).centroids
    if len(centroids) != spec.discriminative_codes:
        raise UserError(
            f"{path}: holds {len(centroids)} centroids, expected {spec.discriminative_codes} as the model's codes"
        )
    columns = centroids.T.contiguous()  # [E, K]
    return {CENTROIDS: columns, CENTROID_NORM: columns.square().sum(0, keepdim=True)}


def _lacking(spec: TransformerSpec, model: Mapping[str, Tensor]) -> list[str]:
    """Parts of the published model that are not in a checkpoint."""
    parts = {"encoder": ENCODER, "codebook": CENTROIDS} if spec.kind != "vq" else {}
    parts |= {"VQGAN": VQGAN} if spec.kind != "prior" else {}
    return [part for part, prefix in parts.items() if not any(name.startswith(prefix) for name in model)]
