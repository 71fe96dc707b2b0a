"""Images per second of the tokenizers, images already in GPU memory, networks in bfloat16 with random weights.

A DINOv2 ViT-B/14 with registers (or --width 1024 --depth 24: L/14), layer 3, 224x224 or 256x256 images, 8,192
centroids; the VQGAN in MAGE's size on 256x256 images. The last column is the share of the bfloat16 peak that the
encoder's and the codebook's matrix products reach, each counted once.

    python benchmarks/tokenizer_throughput.py [--batch 256] [--image-size 224] [--compile] [--channels-last]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from timing import rate

from digit_ds import load_encoder
from digit_ds.tokenizer.codebook import nearest
from digit_ds.tokenizer.vqgan import MAGE_CONFIG, Vqgan
from digit_ds.tokenizer.vqgan_network import VqganNetwork

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tokenizer_reference import random_vit


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="bfloat16 peak, dense (H100/H200: 989)")
    parser.add_argument("--compile", action="store_true", help="torch.compile encoder and VQGAN")
    parser.add_argument("--channels-last", action="store_true", help="memory format of the VQGAN's convolutions")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "vit.pth"
        torch.save(random_vit(width=arguments.width, depth=arguments.depth), weights)
        encoder = load_encoder(weights, device="cuda", dtype=torch.bfloat16)
    centroids = torch.randn(arguments.codes, arguments.width, device="cuda")
    images = torch.rand(arguments.batch, 3, arguments.image_size, arguments.image_size, device="cuda")
    ready = encoder.preprocess(images).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    large = torch.rand(arguments.batch, 3, 256, 256, device="cuda")
    network = VqganNetwork(MAGE_CONFIG["ddconfig"], MAGE_CONFIG["n_embed"]).to("cuda", torch.bfloat16)
    vqgan, encode = Vqgan(network, ""), encoder
    if arguments.channels_last:
        network.to(memory_format=torch.channels_last)
    if arguments.compile:
        encode = torch.compile(encoder, mode="max-autotune-no-cudagraphs")
        network.encoder.compile()
        network.decoder.compile()
    features, ids = encode(images), vqgan.encode(large)

    tokens, width = features.shape[1] + 5, arguments.width
    block = tokens * 12 * width**2 * 2 + 4 * tokens**2 * width
    encoder_flops = (arguments.depth - 2) * block + features.shape[1] * 3 * 14 * 14 * width * 2
    codebook_flops = features.shape[1] * arguments.codes * width * 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {arguments.batch}, {arguments}")
    for name, run, flops in (
        ("preprocess", lambda: encoder.preprocess(images), 0),
        ("patch embedding", lambda: encoder.vit.patch_embed.proj(ready), 0),
        ("encoder", lambda: encode(images), encoder_flops),
        ("codebook, bfloat16 features", lambda: nearest(features, centroids), codebook_flops),
        ("codebook, float32 features", lambda: nearest(features.float(), centroids), codebook_flops),
        ("VQGAN encode", lambda: vqgan.encode(large), 0),
        ("VQGAN decode", lambda: vqgan.decode(ids), 0),
        ("encoder + codebook", lambda: nearest(encode(images), centroids), encoder_flops + codebook_flops),
    ):
        speed = arguments.batch * rate(run, seconds=3)
        print(f"{name:30s} {speed:12,.0f} images/s  {speed * flops / arguments.peak_tflops / 1e10:6.1f} % of peak")


if __name__ == "__main__":
    with torch.no_grad():
        main()
