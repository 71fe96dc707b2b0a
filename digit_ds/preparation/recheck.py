"""Tokenising a sample of images again, against what the shards hold, and an image sheet for visual inspection."""

import colorsys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from digit_ds.data.images import Crops, UnreadableImageError, decode, uniforms
from digit_ds.data.shards import read_index, read_manifest, read_shard
from digit_ds.data.sources.opening import open_source
from digit_ds.data.sources.protocol import ImageSource
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_atomically
from digit_ds.parallel.launch import device
from digit_ds.preparation.settings import VerifySettings
from digit_ds.tokenizer.tokenizer import Tokenizer
from digit_ds.tokenizer.vqgan import to_uint8

CELL = 160
"""Pixels of one picture on a sheet, at least."""
ROWS = 8
"""Images on a sheet."""
TOGETHER = 16
"""Views tokenised at a time."""


@dataclass
class Recheck:
    """What tokenising again gave."""

    samples: list[dict[str, Any]]
    """The samples looked at, as the shards hold them."""
    views: np.ndarray
    """Their pixels, uint8 [samples, size, size, 3]."""
    agreement: dict[str, float]
    """Share of equal tokens per kind."""


def tokenize_again(settings: VerifySettings) -> None:
    """Tokenise a sample of images again, print how much agrees, and write the sheet if one is asked for.

    Raises:
        UserError: less than the share ``agreement`` of the tokens is that of the shards.
    """
    assert settings.images and settings.encoder and settings.codebook  # the settings' own check
    tokenizer = Tokenizer(
        settings.encoder,
        settings.codebook,
        settings.vqgan,
        vqgan_config=settings.vqgan_config,
        layer=settings.layer,
        num_heads=settings.num_heads,
        image_size=read_manifest(settings.shards).image_size,
        precision=settings.precision,
        device=device(),
    )
    found = recheck(settings.shards, settings.images, tokenizer, settings.sample, labels=settings.labels)
    for kind, share in found.agreement.items():
        print(f"{kind} tokens of {len(found.samples)} samples tokenised again: {share:.2%} equal")
    if settings.sheet:
        write_sheet(settings.sheet, found, tokenizer)
        print(f"{settings.sheet}: image, map of discriminative tokens{', reconstruction' if settings.vqgan else ''}")
    for kind, share in found.agreement.items():
        if share < settings.agreement:
            raise UserError(
                f"{settings.shards}: {share:.2%} of the {kind} tokens are those of its images, "
                f"expected at least {settings.agreement:.2%}"
            )


def recheck(
    directory: Path | str,
    images: Path | str,
    tokenizer: Tokenizer,
    count: int,
    seed: int = 0,
    labels: Path | str | None = None,
) -> Recheck:
    """Tokenise ``count`` samples again, drawn over all shards, and compare.

    Raises:
        UserError: the parts are not those of the shards' provenance, or an image is missing.
    """
    directory = Path(directory)
    manifest, settings = read_manifest(directory), read_json(directory / "settings.json")
    ours = tokenizer.provenance()
    for key, value in manifest.provenance.items():
        if ours.get(key) != value:
            raise UserError(
                f"{directory}: was made with {key} {value}, but the given parts have {ours.get(key)}; "
                f"expected those that made it"
            )
    crops = Crops(
        settings["crops"],
        manifest.image_size,
        settings["resize"],
        manifest.views,
        settings["seed"],
        settings["flips"],
    )
    samples = _draw(directory, count, seed)
    source = open_source(images, labels=labels)
    for _ in source.names(Counter()):
        break  # it is indexed
    views = np.stack([_view(source, crops, sample) for sample in samples])
    kinds = ["discriminative", "vq"][: 2 if manifest.vq_codes else 1]
    equal = dict.fromkeys(kinds, 0)
    with torch.inference_mode():
        for first in range(0, len(samples), TOGETHER):
            pixels = torch.from_numpy(views[first : first + TOGETHER]).to(device())
            codes = tokenizer.encode(pixels.permute(0, 3, 1, 2).float() / 255)
            for kind, again in zip(kinds, codes):
                stored = np.stack([sample[kind] for sample in samples[first : first + TOGETHER]])
                equal[kind] += int((again.cpu().numpy() == stored).sum())
    tokens = len(samples) * manifest.tokens
    return Recheck(samples, views, {kind: number / tokens for kind, number in equal.items()})


def _draw(directory: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` samples (fewer if there are fewer), drawn evenly, reading only the shards in which they lie."""
    shards = read_index(directory)
    ends = np.cumsum([shard["samples"] for shard in shards])
    chosen = np.unique((uniforms(count, seed, "recheck") * ends[-1]).astype(np.int64))
    per_shard = defaultdict(list)
    for position in chosen.tolist():
        shard = int(np.searchsorted(ends, position, side="right"))
        per_shard[shard].append(position - (int(ends[shard - 1]) if shard else 0))
    return [
        samples[position]
        for shard, positions in per_shard.items()
        for samples in [read_shard(directory, shards[shard])]
        for position in positions
    ]


def _view(source: ImageSource, crops: Crops, sample: dict[str, Any]) -> np.ndarray:
    """The pixels from which a sample was made: uint8 [size, size, 3]."""
    name = sample["image_id"]
    try:
        return crops.cut(decode(source.read(name)), name)[sample["view"]]
    except UnreadableImageError as error:
        raise UserError(f"{source.root}/{name}: cannot be read ({error}), but the shards hold its tokens") from error


def write_sheet(path: Path | str, found: Recheck, tokenizer: Tokenizer) -> None:
    """A picture with a row for each of some samples: image, map of its discriminative tokens, VQGAN's reconstruction.

    The rows are spread over all samples, so over classes too.

    In the map each code has a colour of its own, the same in all rows.
    """
    chosen = np.unique(np.linspace(0, len(found.samples) - 1, ROWS).round().astype(int)).tolist()
    samples, size = [found.samples[number] for number in chosen], found.views.shape[1]
    cell = size * max(1, -(-CELL // size))
    columns = [found.views[chosen]]
    maps = np.stack([sample["discriminative"].reshape(tokenizer.grid) for sample in samples])  # [B, rows, columns]
    columns.append(_palette(tokenizer.codebook.codes)[maps])
    if tokenizer.vqgan is not None:
        codes = torch.from_numpy(np.stack([sample["vq"] for sample in samples]).astype(np.int64)).to(device())
        pixels = to_uint8(tokenizer.vqgan.decode(codes.unflatten(1, tokenizer.grid)))
        columns.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
    gap = cell // 20
    sheet = Image.new("RGB", (len(columns) * (cell + gap) + gap, len(samples) * (cell + gap) + gap), "white")
    for x, pictures in enumerate(columns):
        for y, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(scaled, (gap + x * (cell + gap), gap + y * (cell + gap)))
    write_atomically(path, sheet.save)


def _palette(codes: int) -> np.ndarray:
    """A colour for each code, neighbours far apart: uint8 [codes, 3]."""
    golden = 0.61803398875
    hues = [(code * golden) % 1 for code in range(codes)]
    colours = [
        colorsys.hsv_to_rgb(hue, 0.45 + 0.5 * ((code * 7) % 11) / 10, 0.55 + 0.4 * ((code * 5) % 13) / 12)
        for code, hue in enumerate(hues)
    ]
    return (np.array(colours) * 255).astype(np.uint8)
