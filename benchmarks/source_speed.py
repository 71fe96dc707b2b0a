"""Images per second that a process reads, decodes and cuts from each source of images, relative to the folder.

The same photograph-sized JPEG files as folder, parquet, WebDataset tars, tar of tars, zip, Kaggle's flat folder and
ImageNet's validation tar, packed as the tests pack them. Sources take turns piece by piece, and of each piece the best
of the rounds counts, so that a busy machine slows all of them alike. Warm: everything is in the page cache. Cold: all
files are dropped from it (``posix_fadvise``) before each round.

    python benchmarks/source_speed.py [--images 3000] [--rounds 5]
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from digit_ds.data.images import Crops, decode
from digit_ds.data.sources.opening import open_source
from digit_ds.data.sources.protocol import ImageSource

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_sources import CLASSES, pack

SIDES = (500, 375)
"""Width and height of a usual photograph of ImageNet."""
PIECE = 30


def write_photographs(root: Path, count: int) -> Path:
    """Smooth colours with fine noise: about 100 KB each, as ImageNet's are."""
    generator = np.random.default_rng(0)
    for number in range(count):
        folder = root / CLASSES[number % len(CLASSES)]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIDES)
        noise = generator.normal(0, 12, (SIDES[1], SIDES[0], 3))
        picture = Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:06d}.jpg", quality=90)
    return root


def drop(path: Path) -> None:
    """Forget a file, or the files of a folder, in the page cache."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def seconds(source: ImageSource, names: list[str], crops: Crops) -> float:
    """How long it takes to read, decode and cut some images."""
    start = time.perf_counter()
    for name in names:
        crops.cut(decode(source.read(name)), name)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    crops = Crops("training", 256, 256, views=1, seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = write_photographs(root / "folder", arguments.images)
        paths = {"folder": (folder, None), **pack(root / "packed", folder, ("none", "none"))}
        sources, names = {}, {}
        for kind, (path, labels) in paths.items():
            sources[kind] = open_source(path, root / f"{kind}.index", labels)
            names[kind] = list(sources[kind].names(Counter()))
        best: dict[tuple[str, str, int], float] = {}
        for state in ("warm", "cold"):
            for turn in range(arguments.rounds):
                if state == "cold":
                    drop(root)
                for first in range(0, arguments.images, PIECE):
                    for kind in sorted(sources, key=lambda kind: hash((kind, turn, first))):
                        found = seconds(sources[kind], names[kind][first : first + PIECE], crops)
                        key = kind, state, first
                        best[key] = min(found, best.get(key, found))
    print("| source | warm: images/s | of the folder | cold: images/s | of the folder |\n|---|---|---|---|---|")
    for kind in sources:
        cells = []
        for state in ("warm", "cold"):
            mine, plain = (
                sum(best[k, state, at] for at in range(0, arguments.images, PIECE)) for k in (kind, "folder")
            )
            cells.append(f"{arguments.images / mine:.0f} | {plain / mine:.2f}")
        print(f"| {kind} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
