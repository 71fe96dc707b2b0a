"""A sampling job on disk: shared between processes, continued after a kill, complete or plainly unfinished.

```
OUT/manifest.json      settings, the label of every picture, what the tokens mean, and whether the job is complete
OUT/images/000000.png  one file per image number
OUT/tokens.npz         label int64 [N], discriminative and vq uint16 [N, G]
OUT/samples.npz        on request: ADM's layout, arr_0 uint8 [N, H, W, 3] (and arr_1 labels)
OUT/grid.png           pictures to look at; rows are classes, below their originals where pictures were given
OUT/parts/             tokens of finished blocks; gone when the job is complete
```
"""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from digit_ds.errors import UserError
from digit_ds.files import make_directory, read_json, write_atomically, write_json
from digit_ds.generation.drawing import block_images
from digit_ds.generation.pictures import Originals, draw_samples, read_png, write_adm_array, write_png
from digit_ds.generation.pipeline import BLOCK
from digit_ds.parallel.decide import from_main
from digit_ds.safe_load import load_npz
from digit_ds.workdir import WorkDirectory, is_begun

FORMAT = 1


class SamplingJob:
    """What is to be written to ``out`` and what is already there.

    Args:
        out: the job's directory.
        settings: JSON-able; everything that decides what the pictures are. A directory with other settings is refused.
        labels: label of every picture, -1 for none.
        class_names: what the labels are called, by label; labels without a name go by their number.
        provenance: identity of the vocabularies (``identity.TOKENS``), for who reads ``tokens.npz``.
    """

    def __init__(
        self,
        out: Path | str,
        settings: dict[str, Any],
        labels: list[int],
        class_names: list[str],
        provenance: dict[str, Any] | None = None,
    ):
        self.out, self.settings, self.labels, self.class_names = Path(out), settings, labels, class_names
        self.count, self.provenance = len(labels), provenance or {}

    @property
    def blocks(self) -> int:
        """Number of blocks of images."""
        return -(-self.count // BLOCK)

    def images(self, block: int) -> range:
        """Image numbers of a block."""
        return block_images(block, self.count)

    def picture(self, image: int) -> Path:
        """File of an image."""
        return self.out / "images" / f"{image:06d}.png"

    def part(self, block: int) -> Path:
        """File of a block's tokens; it exists once the block's pictures do."""
        return self.out / "parts" / f"{block:06d}.npz"

    def is_complete(self) -> bool:
        """Whether nothing is left to do.

        Raises:
            UserError: the directory holds something else: other files, another job, or a complete job that lost
            pictures.
        """
        path = self.out / "manifest.json"
        manifest = read_json(path) if path.exists() else {}
        if path.exists() and (not isinstance(manifest, dict) or manifest.get("format") != FORMAT):
            raise UserError(f"{path}: is another file, expected a sampling manifest of format {FORMAT}")
        is_begun(
            self.out,
            manifest.get("settings", {}) if manifest else None,
            self.settings,
            another="holds a job",
            foreign="exists but is not a sampling job (no manifest.json)",
        )
        if not manifest.get("complete"):
            return False
        missing = [image for image in range(self.count) if not self.picture(image).exists()]
        if missing:
            raise UserError(
                f"{self.picture(missing[0])}: is missing, expected all {self.count} pictures of {path}; delete the "
                "folder to sample again"
            )
        return True

    def begin(self) -> WorkDirectory[bool]:
        """Lock the directory until the end; all processes together. Nothing is written before :meth:`start`.

        Returns:
            The directory; ``found`` says whether the job is complete, in which case nothing was made or locked. One
            that was made is removed at its release unless the job has started.

        Raises:
            UserError: another process is writing there, or came first with another job.
        """
        self._directory = WorkDirectory(self.out, self.is_complete, bool)
        return self._directory

    def start(self) -> None:
        """Write the manifest, which claims the directory, once nothing is left that could be refused; all processes
        together.
        """
        from_main(self._make)

    def _make(self) -> None:
        make_directory(self.out / "images")
        make_directory(self.out / "parts")
        if not (self.out / "manifest.json").exists():
            self._write_manifest(complete=False)

    def missing_blocks(self) -> list[int]:
        """Blocks that are not finished."""
        done = {path.name for path in (self.out / "parts").glob("[0-9]*.npz")}
        return [block for block in range(self.blocks) if self.part(block).name not in done]

    def write_block(self, block: int, pictures: np.ndarray, tokens: dict[str, np.ndarray]) -> None:
        """Write a block's pictures, then its tokens, which mark the block as finished."""
        for image, picture in zip(self.images(block), pictures):
            write_png(self.picture(image), picture)
        write_atomically(self.part(block), lambda temporary: np.savez(temporary, **tokens))

    def finish(self, adm_array: bool, originals: Originals | None = None) -> None:
        """Join the parts, mark the job complete and release its lock."""
        parts = defaultdict(list)
        for block in range(self.blocks):
            for name, values in load_npz(self.part(block)).items():
                parts[name].append(values)
        tokens = {name: np.concatenate(values) for name, values in parts.items()}
        labels = np.asarray(self.labels, np.int64)
        write_atomically(self.out / "tokens.npz", lambda temporary: np.savez(temporary, label=labels, **tokens))
        if adm_array:
            self.write_adm_array()
        write_atomically(self.out / "grid.png", self._grid(originals).save)
        self._write_manifest(complete=True)
        shutil.rmtree(self.out / "parts")
        self._directory.release()

    def write_adm_array(self) -> None:
        """Write all pictures to ``samples.npz`` unless it is there."""
        if (self.out / "samples.npz").exists():
            return
        labels = np.asarray(self.labels, np.int64)
        height, width, _ = read_png(self.picture(0)).shape
        pictures = (read_png(self.picture(image)) for image in range(self.count))
        shape = (self.count, height, width, 3)
        write_adm_array(self.out / "samples.npz", pictures, shape, labels if labels.max() >= 0 else None)

    def _write_manifest(self, complete: bool) -> None:
        manifest = {
            "format": FORMAT,
            "complete": complete,
            "count": self.count,
            "labels": self.labels,
            "classes": self.class_names,
            "settings": self.settings,
            "provenance": self.provenance,
        }
        write_json(self.out / "manifest.json", manifest)

    def _grid(self, originals: Originals | None) -> Any:
        return draw_samples(self.labels, self.class_names, lambda image: read_png(self.picture(image)), originals)
