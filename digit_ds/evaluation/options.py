"""The command-line options that whatever scores pictures against a reference shares."""

import argparse


def add_reference_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``evaluate`` and ``save_statistics`` alike: the network, and how the reference is prepared."""
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--inception-weights", help="local file of torch-fidelity's Inception weights")
    network.add_argument("--features", help="feature network (safetensors) in place of Inception")
    parser.add_argument(
        "--preparation", choices=["none", "published", "adm"], default="none", help="of the reference folder"
    )
    parser.add_argument("--size", type=int, help="side of the prepared reference images")
    parser.add_argument("--batch", type=int, default=64, help="pictures of one forward pass")
