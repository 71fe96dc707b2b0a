"""Training checkpoints: complete or not there, readable at any layout.

```
RUN/checkpoints/step_00001000/manifest.json      counters, spec, layout, parent, size and hash of every file
RUN/checkpoints/step_00001000/tensor-0.data-1.safetensors   what that rank owned, see below
RUN/checkpoints/latest                           name of the newest complete checkpoint, moved last
RUN/checkpoints/.step_00001000.partial/          being written; ignored, and removed by the next run
```

The commit protocol:

1. Each rank copies its state to host memory; a thread writes and hashes it in the partial folder; training goes on.
2. The ranks' exchanges carry who has written and who has failed. Once all have done either, a thread of rank 0 acts, in
   3 to 7, while training goes on. The next save waits for it.
3. Any failure on any rank: the partial folder is removed, a warning says what failed, training goes on.
4. Rank 0 counts a part of every rank, each of the size written, and writes the manifest with their hashes.
5. The manifest names the parent: the checkpoint saved before this one in the same branch, or the one resumed from.
6. The folder is renamed. One of the same step, left by rolling back, is moved aside and back if that fails.
7. ``latest`` is moved. Only then checkpoints outside the new one's lineage are removed, and its older ancestors.
8. A failure in 4 to 7 is one of 3: the last good checkpoint and ``latest`` stay.
9. The last save of a run is waited for; where it fails the run ends with status 2, also after a signal.
10. Resuming, rank 0 chooses from ``latest`` back along the parents; each rank verifies a share of the hashes; a damaged
    checkpoint is passed over with a warning that names the file, and all ranks take the one before.

A rank writes the float32 master weights, Adam's moments and the moving average that it owns: flat pieces named
``kind/parameter``; the manifest says which elements of the flattened tensor-parallel slice each one holds. Together
the pieces are the whole state once, so a run can go on at another tensor-parallel size, data-parallel size or ZeRO
stage: each rank reads the pieces that overlap what it owns now. Values are copied, never recomputed, so the moments
survive a reshape bit for bit. (DeepSpeed's own checkpoints refuse another data-parallel size, and its universal ones
cover neither stage 0 nor tensor parallelism under stage 3 nor the moving average.)
"""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256, write_atomically, write_json
from digit_ds.model.spec import TransformerSpec
from digit_ds.parallel import launch
from digit_ds.training.engine import Engine
from digit_ds.training.stored import (
    LATEST,
    MANIFEST,
    Progress,
    checkpoint_name,
    checkpoint_step,
    is_complete,
    lineage,
    part_name,
)

FORMAT = 2
"""Of the manifest; 1 had no ``parent``, and the extent of the pieces in the headers of the files only."""


@dataclass
class _Pending:
    """A save whose files are being written."""

    step: int
    folder: Path
    """The partial folder."""
    common: dict[str, Any]
    thread: threading.Thread | None = None
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Checkpoints:
    """The checkpoints of one run. Every rank calls every method, in the same order."""

    def __init__(
        self, run: Path, keep_last: int, keep_every: int, world_size: int, total: Callable[[list[int]], list[int]]
    ) -> None:
        """``total`` sums whole numbers over all ranks."""
        self.folder = run / "checkpoints"
        self.keep_last, self.keep_every, self.world_size, self._total = keep_last, keep_every, world_size, total
        self.parent: int | None = None
        """Step of the checkpoint that the next one follows; kept up to date on rank 0."""
        self.in_use: Callable[[], set[str]] = set
        """Names of checkpoints that something else reads and that must stay meanwhile."""
        self._pending: _Pending | None = None
        self._unknown = False  # a save was begun, and the ranks have not agreed on how it ended
        self._commit_thread: threading.Thread | None = None  # on rank 0
        self._failure: str | None = None  # of the last commit, on rank 0
        self._new: list[Path] = []

    def save(self, engine: Engine, spec: TransformerSpec, progress: Progress, extra: dict[str, Any]) -> None:
        """Save and wait until the checkpoint is complete.

        Raises:
            UserError: on rank 0, the checkpoint could not be written; the other ranks leave with the same status.
        """
        self.start(engine, spec, progress, extra)
        if not self.wait():
            if launch.is_main():
                raise UserError(f"{self.folder}: the checkpoint of step {progress.step} could not be written")
            raise SystemExit(2)

    def start(self, engine: Engine, spec: TransformerSpec, progress: Progress, extra: dict[str, Any]) -> None:
        """Copy this rank's state to host memory and begin to write it; no other save may be under way."""
        assert not self._unknown, "finish the save that is under way first"
        self._unknown = True
        topology = engine.topology
        tensors: dict[str, Tensor] = {}
        pieces: dict[str, tuple[int, int]] = {}  # first element and length
        for fragment in engine.fragments():
            pieces[fragment.name] = fragment.start, fragment.tensors["weight"].numel()
            for kind, tensor in fragment.tensors.items():
                tensors[f"{kind}/{fragment.name}"] = tensor.detach().to("cpu", copy=True)
        progress.adam_steps = engine.adam_steps
        layout = {"tensor": topology.tensor_size, "data": topology.data_size, "zero": engine.stage}
        common = {
            "format": FORMAT,
            "progress": vars(progress).copy(),
            "spec": spec.to_dict(),
            "layout": layout,
            **extra,
        }
        folder = self.folder / f".{checkpoint_name(progress.step)}.partial"
        pending = _Pending(progress.step, folder, common)
        path = folder / part_name(topology.tensor_rank, topology.data_rank)

        def write() -> None:
            try:
                header = {"starts": json.dumps({name: start for name, (start, _) in pieces.items()})}
                write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
                entry = {"bytes": path.stat().st_size, "sha256": sha256(path), "pieces": pieces}
                write_json(path.with_suffix(".json"), entry)
            except BaseException as error:  # handed to the main thread
                pending.error = error
            finally:
                pending.done.set()

        pending.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        pending.thread.start()
        self._pending = pending

    @property
    def status(self) -> list[int]:
        """For the exchange of a step: whether this rank has written its part, and whether it could not."""
        if self._pending is None or not self._pending.done.is_set():
            return [0, 0]
        return [1, int(self._pending.error is not None)]

    def poll(self, written: int, failed: int) -> None:
        """Act on the sum of all ranks' ``status``: when all have written, the save becomes a checkpoint."""
        if self._pending is None or written < self.world_size:
            return
        pending, self._pending = self._pending, None
        if pending.error is not None:
            print(f"warning: rank {launch.rank()} could not write its part ({pending.error})", flush=True)
        if launch.is_main():
            self._commit_thread = threading.Thread(
                target=self._finish, args=(pending, failed), name="commit", daemon=True
            )
            self._commit_thread.start()

    def _finish(self, pending: _Pending, failed: int) -> None:
        """Rank 0, in a thread: make the parts a checkpoint, or say why there is none."""
        self._failure = f"could not be written on {failed} ranks" if failed else None
        if not failed:
            try:
                self._new.append(self._commit(pending))
                self.parent = pending.step
            except Exception as error:  # this thread has no caller
                self._failure = f"could not be completed ({str(error) or type(error).__name__})"
        if self._failure:  # all ranks are past their writing
            shutil.rmtree(pending.folder, ignore_errors=True)
            print(
                f"warning: the checkpoint of step {pending.step} {self._failure}; training continues and the last "
                "complete checkpoint stays",
                flush=True,
            )

    def _commit(self, pending: _Pending) -> Path:
        """Rank 0: count the parts, manifest, rename, ``latest``, then removal of what need not be kept."""
        layout, files = pending.common["layout"], {}
        for tensor, data in product(range(layout["tensor"]), range(layout["data"])):
            path = pending.folder / part_name(tensor, data)
            files[path.name] = entry = read_json(path.with_suffix(".json"))
            if (size := path.stat().st_size) != entry["bytes"]:
                raise UserError(f"{path}: has {size} bytes, expected {entry['bytes']}")
        write_json(pending.folder / MANIFEST, {**pending.common, "parent": self.parent, "files": files})
        for name in files:
            (pending.folder / name).with_suffix(".json").unlink()
        final = self.folder / checkpoint_name(pending.step)
        with _moved_aside(final):
            pending.folder.replace(final)
            write_latest(self.folder, final.name)
        self.remove_old()
        return final

    def remove_old(self) -> None:
        """Rank 0: keep what is in use, and of the newest's lineage ``keep_last`` and each ``keep_every``-th step."""
        line = list(lineage(self.folder))
        kept = {path.name for path in line[: self.keep_last]}
        kept |= self.in_use()
        kept |= {path.name for path in line if self.keep_every and checkpoint_step(path) % self.keep_every == 0}
        for path in self.folder.glob("step_*"):
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> bool:
        """Finish the save under way, if any. Whether it succeeded."""
        if not self._unknown:
            return True
        if self._pending is not None:
            self._pending.done.wait()
            self.poll(*self._total(self.status))
        self.settle()
        self._unknown = False
        # No rank leaves before rank 0 has moved it into place.
        (failures,) = self._total([int(self._failure is not None)])
        return failures == 0

    def settle(self) -> None:
        """Wait for what rank 0 makes of the parts that were written, if anything; other ranks are not asked."""
        if self._commit_thread is not None:
            self._commit_thread.join()
            self._commit_thread = None

    def take_new(self) -> list[Path]:
        """Checkpoints completed since the last call, on rank 0."""
        return [self._new.pop(0) for _ in range(len(self._new))]  # a thread appends


def write_latest(folder: Path, name: str) -> None:
    """Record which checkpoint the run resumes from."""
    write_atomically(folder / LATEST, lambda path: path.write_text(name + "\n", encoding="utf-8"))


@contextmanager
def _moved_aside(path: Path) -> Iterator[None]:
    """Make room for a folder of that name; the old one returns on failure; after a kill by :func:`clear_unfinished`."""
    aside = path.with_name(f".{path.name}.replaced")
    if path.exists():
        path.replace(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            shutil.rmtree(path, ignore_errors=True)
            aside.replace(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Rank 0, before anything is read: remove what a killed save left, put back what it had moved aside."""
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for aside in folder.glob(".step_*.replaced"):
        path = folder / aside.name.removeprefix(".").removesuffix(".replaced")
        if is_complete(path):
            shutil.rmtree(aside, ignore_errors=True)
        else:
            shutil.rmtree(path, ignore_errors=True)
            aside.replace(path)
