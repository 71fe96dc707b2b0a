"""Training checkpoints: complete or not there, readable at any layout.

```
RUN/checkpoints/step_00001000/manifest.json      counters, spec, layout, size and hash of every file
RUN/checkpoints/step_00001000/tensor-0.data-1.safetensors   what that rank owned, see below
RUN/checkpoints/latest                           name of the newest complete checkpoint, moved last
RUN/checkpoints/.step_00001000.partial/          being written; ignored, and removed by the next save
```

A rank writes the float32 master weights, Adam's moments and the moving average that it owns: flat pieces named
``kind/parameter`` whose first element within the flattened tensor-parallel slice stands in the file's header. Together
the pieces are the whole state once, so a run can go on at another tensor-parallel size, data-parallel size or ZeRO
stage: each rank reads the pieces that overlap what it owns now. Values are copied, never recomputed, so the moments
survive a reshape bit for bit. (DeepSpeed's own checkpoints refuse another data-parallel size, and its universal ones
cover neither stage 0 nor tensor parallelism under stage 3 nor the moving average.)

Saving copies to host memory and lets a thread write; ranks learn in the next steps' mailbox that all are done, and
rank 0 renames the folder. Nothing waits for the disk but the last save of a run.
"""

import json
import shutil
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from digit_ds.errors import UserError
from digit_ds.files import read_json, sha256, write_atomically, write_json
from digit_ds.model import weights
from digit_ds.model.spec import TransformerSpec
from digit_ds.parallel import launch
from digit_ds.training.engine import Engine

MANIFEST = "manifest.json"


@dataclass
class Progress:
    """How far a run is: everything besides weights and moments. All of it is the same on every rank."""

    step: int = 0
    images: int = 0
    """Samples seen; the position in the data's endless sequence."""
    samples_hash: int = 0
    """Chained hash of the sample ids of all steps."""
    skipped: int = 0
    """Updates skipped because the gradient was not finite."""
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Wall clock spent in training steps."""
    adam_steps: int = 0
    """Updates applied."""


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

    def __init__(self, run: Path, keep_last: int, keep_every: int, world_size: int) -> None:
        self.folder = run / "checkpoints"
        self.keep_last, self.keep_every, self.world_size = keep_last, keep_every, world_size
        self._pending: _Pending | None = None

    # --- saving --------------------------------------------------------------------------------------------------

    def start(self, engine: Engine, spec: TransformerSpec, progress: Progress, extra: dict[str, Any]) -> None:
        """Copy this rank's state to host memory and begin to write it; no other save may be under way."""
        assert self._pending is None, "finish the save that is under way first"
        topology = engine.topology
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        for fragment in engine.fragments():
            starts[fragment.name] = fragment.start
            for kind, tensor in fragment.tensors.items():
                tensors[f"{kind}/{fragment.name}"] = tensor.detach().to("cpu", copy=True)
        progress.adam_steps = engine.adam_steps
        layout = {"tensor": topology.tensor_size, "data": topology.data_size, "zero": engine.stage}
        common = {"format": 1, "progress": vars(progress).copy(), "spec": spec.to_dict(), "layout": layout, **extra}
        name = f"step_{progress.step:08d}"
        pending = _Pending(progress.step, self.folder / f".{name}.partial", common)
        pending.folder.mkdir(parents=True, exist_ok=True)
        path = pending.folder / f"tensor-{topology.tensor_rank}.data-{topology.data_rank}.safetensors"

        def write() -> None:
            try:
                header = {"starts": json.dumps(starts)}
                write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
                entry = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                write_json(path.with_suffix(".json"), entry)
            except BaseException as error:  # handed to the main thread
                pending.error = error
            finally:
                pending.done.set()

        pending.thread = threading.Thread(target=write, name="checkpoint", daemon=True)
        pending.thread.start()
        self._pending = pending

    @property
    def news(self) -> list[int]:
        """For the mailbox: whether this rank has written its part, and whether it could not."""
        if self._pending is None or not self._pending.done.is_set():
            return [0, 0]
        return [1, int(self._pending.error is not None)]

    def hear(self, written: int, failed: int) -> Path | None:
        """Act on the sum of all ranks' ``news``: when all have written, the save becomes a checkpoint.

        Returns:
            The new checkpoint, on the step at which it comes to be.
        """
        if self._pending is None or written < self.world_size:
            return None
        pending, self._pending = self._pending, None
        if failed:
            # All ranks are past their writing. The last good checkpoint stays what it was.
            if launch.is_main():
                shutil.rmtree(pending.folder, ignore_errors=True)
            own = f": {pending.error}" if pending.error is not None else ""
            print(
                f"warning: the checkpoint of step {pending.step} could not be written on {failed} ranks{own}; "
                "training goes on and the last complete checkpoint stays",
                flush=True,
            )
            return None
        final = self.folder / pending.folder.name.removeprefix(".").removesuffix(".partial")
        if launch.is_main():
            try:
                self._commit(pending, final)
            except OSError as error:
                print(f"warning: the checkpoint of step {pending.step} could not be completed ({error})", flush=True)
        return final

    def _commit(self, pending: _Pending, final: Path) -> None:
        """Rank 0: manifest, rename, ``latest``, and away with what need not be kept."""
        files = {}
        for entry in sorted(pending.folder.glob("tensor-*.json")):
            files[entry.with_suffix(".safetensors").name] = read_json(entry)
            entry.unlink()
        write_json(pending.folder / MANIFEST, {**pending.common, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        pending.folder.replace(final)
        write_atomically(self.folder / "latest", lambda path: path.write_text(final.name + "\n", encoding="utf-8"))
        steps = sorted(int(path.name.removeprefix("step_")) for path in self.folder.glob("step_*"))
        for step in steps[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(self.folder / f"step_{step:08d}", ignore_errors=True)

    def wait(self, mailbox_sum) -> Path | None:
        """Finish the save under way, if any; ``mailbox_sum`` sums whole numbers over all ranks."""
        if self._pending is None:
            return None
        self._pending.done.wait()
        final = self.hear(*mailbox_sum(self.news))
        launch.barrier()  # nobody leaves before rank 0 has moved it into place
        return final

    # --- finding and reading --------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest complete checkpoint, preferring what ``latest`` names; None: there is none."""
        return newest_checkpoint(self.folder)

    def clear_partial(self) -> None:
        """Remove what a killed save left behind (rank 0)."""
        for path in self.folder.glob(".step_*.partial"):
            shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names if it is complete, else the newest complete one."""
    candidates = sorted((path for path in folder.glob("step_*") if is_complete(path)), reverse=True)
    try:
        latest = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        latest = None
    return latest if latest in candidates else next(iter(candidates), None)


def is_complete(checkpoint: Path) -> bool:
    """Whether the manifest is there and every file it names has its size."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


class StoredState:
    """The pieces in a checkpoint's files, put together on request."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.manifest = read_json(checkpoint / MANIFEST)
        self.spec = TransformerSpec.from_dict(self.manifest["spec"], str(checkpoint / MANIFEST))
        self.tensor_size: int = self.manifest["layout"]["tensor"]
        # (tensor rank, parameter) -> [(first element, open file)]
        self._pieces: dict[tuple[int, str], list[tuple[int, Any]]] = defaultdict(list)
        for name in sorted(self.manifest["files"]):
            file = safe_open(checkpoint / name, framework="pt")
            rank = int(name.partition(".")[0].removeprefix("tensor-"))
            for parameter, start in json.loads(file.metadata()["starts"]).items():
                self._pieces[rank, parameter].append((start, file))

    def verify(self) -> None:
        """Compare every file with the hash in the manifest."""
        for name, entry in self.manifest["files"].items():
            if sha256(self.path / name) != entry["sha256"]:
                raise UserError(f"{self.path / name}: is damaged, its SHA-256 is not the one in {MANIFEST}; remove it")

    def kinds(self) -> list[str]:
        """``weight`` and the optimizer states that were saved."""
        _, file = next(iter(self._pieces.values()))[0]
        return sorted({key.partition("/")[0] for key in file.keys()})  # noqa: SIM118 - not a dict

    def full(self, kind: str) -> dict[str, Tensor]:
        """Whole tensors of one kind under the schema's names, vocabulary padding removed."""
        parts = [self._slices(kind, rank) for rank in range(self.tensor_size)]
        return weights.unshard(parts, self.spec)

    def _slices(self, kind: str, rank: int) -> dict[str, Tensor]:
        """All parameters of one stored tensor-parallel rank."""
        slices = {}
        for parameter in weights.parameters(self.spec):
            pieces = sorted(self._pieces[rank, parameter.name], key=lambda piece: piece[0])
            flat = torch.cat([file.get_tensor(f"{kind}/{parameter.name}") for _, file in pieces])
            slices[parameter.name] = flat.view(weights.shard_shape(parameter, self.tensor_size))
        return slices


def restore(engine: Engine, checkpoint: Path) -> Progress:
    """Fill the engine from a checkpoint of any layout.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    try:
        stored = StoredState(checkpoint)
        if launch.is_main():
            stored.verify()
        if stored.spec != engine.model.spec:
            raise UserError(f"{checkpoint}: belongs to another model than this recipe and these shards make")
        kinds, topology = stored.kinds(), engine.topology

        def slices(kind: str) -> dict[str, Tensor]:
            source = kind if kind in kinds else "weight"  # a moving average that begins now begins at the weights
            return weights.shard(stored.full(source), stored.spec, topology.tensor_size, topology.tensor_rank)

        progress = Progress(**stored.manifest["progress"])
        engine.restore(slices, progress.adam_steps)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: cannot be resumed from ({error}); remove it to use the one before") from error
    return progress
