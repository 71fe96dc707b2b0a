"""Cluster features into a codebook: tools/train_kmeans.py --features FEATURES_DIR|ARRAY.npy --clusters K --out km.npy.

Works alone and under torchrun or srun; run the same command again after an interruption and it continues.
"""

import argparse

from digit_ds.clustering.assignment import BACKENDS
from digit_ds.clustering.kmeans import train_kmeans
from digit_ds.errors import run_command


def main(arguments: list[str]) -> None:
    """Parse the command line and cluster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--features", required=True, help="folder made by extract_features.py, or an array .npy [points, width]"
    )
    parser.add_argument("--clusters", type=int, required=True, help="number of codes K")
    parser.add_argument(
        "--out", required=True, help="codebook to write, .npy [K, width]; its provenance goes beside it"
    )
    parser.add_argument("--iterations", type=int, default=20, help="Lloyd iterations (20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial centroids (0)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="what computes the nearest centroids (auto)"
    )
    parser.add_argument(
        "--init",
        default="random",
        help="random (points drawn), k-means++ (in its parallel form, k-means||) or a .npy file [K, width] (random)",
    )
    train_kmeans(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    run_command(main)
