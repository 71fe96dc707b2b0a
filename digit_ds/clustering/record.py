"""What a K-Means run leaves behind: resumable state, TensorBoard curves, usage picture, the finished codebook."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from digit_ds.errors import UserError
from digit_ds.files import read_json, write_atomically
from digit_ds.parallel.launch import is_main
from digit_ds.safe_load import load_npz
from digit_ds.workdir import is_begun


@dataclass
class State:
    """All that the next iteration depends on."""

    iteration: int  # iterations done
    centroids: np.ndarray  # float32 [K, D]
    mean: np.ndarray  # fp64 [D], the origin of all computations
    scale: float  # units of the fixed-point sums
    spread: float | None  # sum of squared distances of all points from the mean, known after the first pass
    inertia: list[float]  # of each iteration's assignment
    split: int  # empty clusters split so far


def usage(counts: np.ndarray) -> dict[str, Any]:
    """Used codes, dead codes and perplexity (2^entropy) of points per code [K]."""
    shares = counts[counts > 0] / counts.sum()
    return {
        "used_codes": int((counts > 0).sum()),
        "dead_codes": int((counts == 0).sum()),
        "perplexity": float(2 ** -(shares * np.log2(shares)).sum()),
    }


class Record:
    """The files of one run; rank 0 alone writes them.

    The state is written in the background: an iteration never waits for the disk, and one that ends while the state
    before it is still being written is left out, so that at most the last few iterations of a fast run are repeated.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out = out
        self.folder = out.with_suffix(".run")
        self.settings = settings
        self._state_file = self.folder / "state.npz"
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self._board: Any = None

    def finished(self) -> dict[str, Any] | None:
        """The facts of this very run when its codebook is complete; ``out`` of another run is refused."""
        if self._state_file.exists() or not self.out.exists():
            return None
        beside = self.out.with_suffix(".json")
        facts = read_json(beside).get("kmeans", {}) if beside.exists() else {}
        is_begun(self.out, facts.get("settings", {}), self.settings, another="exists already and is of another run")
        return facts

    def load(self) -> State | None:
        """The state to continue from, or None at the start of a run."""
        if not self._state_file.exists():
            return None
        try:
            stored = load_npz(self._state_file, "facts", "centroids", "mean")
            facts, centroids, mean = json.loads(str(stored["facts"])), stored["centroids"], stored["mean"]
        except (UserError, ValueError) as error:
            raise UserError(
                f"{self._state_file}: cannot be read ({error}), expected the state of a K-Means run; delete "
                f"{self.folder} to start again"
            ) from error
        settings = facts.pop("settings")
        is_begun(self.folder, settings, self.settings, another="holds an unfinished run")
        return State(centroids=centroids, mean=mean, **facts)

    def save(self, state: State) -> None:
        """Write ``state`` in the background."""
        if not is_main():
            return
        if self._writing is not None:
            if not self._writing.done():
                return
            self._writing.result()  # a full disk ends the run here
        self._writing = self._writer.submit(self._write, replace(state, inertia=list(state.inertia)))

    def _write(self, state: State) -> None:
        facts = {
            "settings": self.settings,
            "iteration": state.iteration,
            "scale": state.scale,
            "spread": state.spread,
            "inertia": state.inertia,
            "split": state.split,
        }
        write_atomically(
            self._state_file,
            lambda path: np.savez(path, centroids=state.centroids, mean=state.mean, facts=json.dumps(facts)),
        )

    def log(self, state: State, counts: np.ndarray, split: int, seconds: float) -> None:
        """TensorBoard curves of the iteration just done."""
        if not is_main():
            return
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tb"), purge_step=state.iteration)
        values = usage(counts) | {
            "points": counts.sum(),
            "inertia": state.inertia[-1],
            "inertia_per_point": state.inertia[-1] / counts.sum(),
            "empty_clusters_split": split,
            "seconds": seconds,
        }
        for name, value in values.items():
            self._board.add_scalar(f"kmeans/{name}", value, state.iteration)

    def finish(self, facts: dict[str, Any], counts: np.ndarray, save: Callable[[], None]) -> None:
        """Draw the usage, write the codebook with ``save``, and only then drop the state that it is made from."""
        if self._writing is not None:
            self._writing.result()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "usage.png", lambda path: _draw_usage(path, counts, facts))
        if self._board is not None:
            self._board.add_histogram("kmeans/points_per_code", counts, facts["settings"]["iterations"])
            self._board.close()
        save()
        self._state_file.unlink(missing_ok=True)
        print(
            f"{self.out}: {len(counts)} codes from {facts['points']} points (all of them), "
            f"inertia {facts['final_inertia']:.6g}, used codes {facts['used_codes']}, "
            f"dead codes {facts['dead_codes']}, perplexity {facts['perplexity']:.1f}, "
            f"empty clusters split {facts['empty_clusters_split']}"
        )


def _draw_usage(path: Path, counts: np.ndarray, facts: dict[str, Any]) -> None:
    """Two panels: how many codes have how many points, and the codes' shares from the most to the least used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(counts, bins=min(60, max(10, len(counts) // 4)), color="tab:blue")
    left.set_xlabel("points of a code")
    left.set_ylabel("codes")
    right.plot(np.sort(counts)[::-1] / counts.sum(), color="tab:blue")
    right.axhline(1 / len(counts), color="grey", linestyle=":", label="uniform")
    right.set_yscale("symlog", linthresh=0.1 / len(counts))
    right.set_xlabel("codes, most used first")
    right.set_ylabel("share of the points")
    right.legend()
    figure.suptitle(
        f"{len(counts)} codes, {facts['used_codes']} used, {facts['dead_codes']} dead, "
        f"perplexity {facts['perplexity']:.1f}"
    )
    figure.savefig(path, dpi=120)
