"""Decoding, resizing and cropping on a GPU against Pillow, and whole jobs on it."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from calls import extract_features, tokenize_images
from preparation_parts import make_codebook, make_encoder, make_images, make_vqgan

from digit_ds.clustering.points import open_points
from digit_ds.data.images import Crops
from digit_ds.data.shards import iterate, read_manifest
from digit_ds.preparation.gpu_views import decode_views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def smooth(width: int, height: int, seed: int) -> Image.Image:
    blobs = np.random.default_rng(seed).integers(60, 200, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind, resize, views", [("training", 64, 3), ("random-resized-crop", 64, 2)])
def test_views_are_pillows_within_few_levels(kind, resize, views):
    crops = Crops(kind, 64, resize, views, 0)
    files, expected = [], []
    for number, size in enumerate([(300, 200), (120, 400), (65, 64), (700, 500), (90, 90)] * 8):
        stream = io.BytesIO()
        smooth(*size, number).save(stream, "JPEG", quality=95, subsampling=0)
        files.append(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8))
        expected.append(crops.cut(Image.open(stream).convert("RGB"), str(number)))
    sizes = [Image.open(io.BytesIO(bytes(file))).size for file in files]
    windows = torch.from_numpy(np.stack([crops.windows(size, str(n)) for n, size in enumerate(sizes)]))
    views = decode_views(files, windows, 64, torch.device("cuda")).permute(0, 1, 3, 4, 2).cpu().numpy()
    difference = np.abs(views.astype(int) - np.stack(expected))
    assert difference.mean() < 0.6 and difference.max() <= 6


def test_the_next_batch_does_not_overwrite_the_one_that_is_being_cut():
    """nvJPEG writes in a stream of its own, into memory that the batch before has just given back."""
    crops, cuda = Crops("training", 256, 256, 1, 0), torch.device("cuda")
    batches = []
    for batch in range(4):
        files = []
        for number in range(64):
            stream = io.BytesIO()
            smooth(500, 375, 64 * batch + number).save(stream, "JPEG")
            files.append(torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8))
        windows = torch.from_numpy(np.stack([crops.windows((500, 375), str(number)) for number in range(64)]))
        batches.append((files, windows))
    alone = []
    for files, windows in batches:
        alone.append(decode_views(files, windows, 256, cuda))
        torch.cuda.synchronize()
    busy, again = torch.randn(8192, 8192, device=cuda), []
    with torch.cuda.stream(torch.cuda.Stream()):
        for round_ in range(24):
            with torch.cuda.stream(torch.cuda.default_stream()):
                for _ in range(3):
                    busy @ busy  # an encoder that leaves the cutting kernels little room
            again.append(decode_views(*batches[round_ % 4], 256, cuda))
    torch.cuda.synchronize()
    for round_, views in enumerate(again):
        assert torch.equal(views, alone[round_ % 4]), round_


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_job_on_a_gpu(decoder, tmp_path):
    images = make_images(tmp_path / "images", 40)
    (images / "cat" / "broken.jpg").write_bytes((images / "cat" / "000.jpg").read_bytes()[:300] + b"\xff\xd9")
    vqgan, config = make_vqgan(tmp_path / "vqgan.ckpt")
    encoder = make_encoder(tmp_path / "encoder.pth")
    outs = [tmp_path / name for name in ("first", "second")]
    for out in outs:
        tokenize_images(
            images,
            encoder,
            make_codebook(tmp_path / "km.npy", encoder),
            vqgan,
            out,
            vqgan_config=config,
            num_heads=2,
            views=2,
            batch=8,
            block_images=16,
            workers=2,
            decoder=decoder,
        )
    first, second = (list(iterate(out)) for out in outs)
    assert len(first) == 80 and read_manifest(outs[0]).skipped == 1
    for one, other in zip(first, second, strict=True):
        assert one["image_id"] == other["image_id"] and one["view"] == other["view"]
        assert np.array_equal(one["discriminative"], other["discriminative"])
        assert np.array_equal(one["vq"], other["vq"])


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_features_stored_in_bf16_are_the_rounded_ones(decoder, tmp_path):
    images, encoder, points = make_images(tmp_path / "images", 40), make_encoder(tmp_path / "encoder.pth"), {}
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        extract_features(images, encoder, out, num_heads=2, batch=8, workers=2, dtype=dtype, decoder=decoder)
        points[dtype] = torch.from_numpy(open_points(out).read(0, 40 * 64))
    assert points["fp32"].abs().min() > 0, "rows that nothing was written to"
    assert not torch.equal(points["bf16"], points["fp32"])
    assert torch.equal(points["bf16"], points["fp32"].bfloat16().float())
