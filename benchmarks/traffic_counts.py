"""Messages and bytes of a training step, counted in ``digit-ds train`` on CPUs (gloo), beside the formulas.

    python benchmarks/traffic_counts.py [--ranks 2 4 8 16]

Trains a small model in every layout of ``LAYOUTS`` that fits the ranks. Every collective that DeepSpeed, the Megatron
layers or the loop issue passes PyTorch's dispatcher, where it is counted; the third step is shown, which neither logs
nor saves. All ranks must send the same. Buckets have the DeepSpeed file's sizes by ``SCALE``, so that the small model
fills several. Prints a row of docs/scaling.md for each layout, and ends with an error where one differs from
``digit_ds/training/traffic.py``.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from ranks import free_port
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_speed import write_shards

from digit_ds.config import Recipe
from digit_ds.files import read_json
from digit_ds.model.spec import TransformerSpec
from digit_ds.shipped import find
from digit_ds.training.estimate import shards_to_come
from digit_ds.training.runs import model_spec
from digit_ds.training.traffic import data_traffic, mailbox_messages, norm_traffic, tensor_traffic
from digit_ds.training.zero_messages import ZeroOptions

SCALE = 4000
"""The DeepSpeed file's numbers of elements, by those of the small model."""
PERSISTENT = 200
"""Of ``stage3_param_persistence_threshold``: as in the large models, more than a bias and less than a matrix."""
CODES, IMAGES = 64, 256
NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}
"""Operators of the dispatcher; others keep their names and equal no formula."""
Counts = dict[str, tuple[int, int]]
"""Group and operation -> messages and bytes of a step."""


class Layout(NamedTuple):
    """One way to train."""

    tensor: int
    sequence: bool
    deepspeed: str
    micro_batches: int


LAYOUTS = (
    Layout(1, False, "zero1", 1),
    Layout(1, False, "zero2_overlap", 2),
    Layout(1, False, "zero3_overlap", 2),
    Layout(2, False, "zero1", 1),
    Layout(2, True, "zero2_overlap", 1),
    Layout(4, True, "zero1", 2),
    Layout(4, True, "zero3_overlap", 1),
)


class Counting(TorchDispatchMode):
    """Counts the collectives of this thread whose group has more than one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self._note(name, args)
        return func(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple) -> None:
        group = _group(args)
        if group.size() == 1:
            return
        key = f"{_kind(group)} {NAMES.get(name, name)}"
        size = max(tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor))
        self.messages[key] += 1
        self.bytes[key] += size * group.size() if name == "all_gather_into_tensor" else size

    def __sub__(self, before: "Counting") -> Counts:
        return {
            key: (count - before.messages[key], self.bytes[key] - before.bytes[key])
            for key, count in self.messages.items()
            if count > before.messages[key]
        }

    def copy(self) -> "Counting":
        """What was counted until now."""
        made = Counting()
        made.messages, made.bytes = self.messages.copy(), self.bytes.copy()
        return made


def _group(args: tuple) -> dist.ProcessGroup:
    """The group among an operator's arguments: an object, or its name in functional operators."""
    for value in args:
        if isinstance(value, str) and value != "sum":
            return dist.distributed_c10d._resolve_process_group(value)
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    raise AssertionError(f"no process group in {args}")


def _kind(group: dist.ProcessGroup) -> str:
    from digit_ds.parallel.frameworks import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return "all"
    ranks = dist.get_process_group_ranks(group)
    kinds = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
    }
    return next((name for name, other in kinds.items() if dist.get_process_group_ranks(other) == ranks), "all")


def count(values: Recipe, out: Path) -> None:
    """Train on this rank; write the collectives of the third step and the mailbox's messages of one."""
    from digit_ds.parallel import mailbox
    from digit_ds.training import loop

    counting, marks, mails = Counting(), [], []
    original = mailbox.total

    def total(group, numbers):
        with Counting() as own:
            sums = original(group, numbers)
        mails.append((own.messages["all send"] + own.messages["data send"] + own.messages["tensor send"], len(numbers)))
        return sums

    class Clock(loop.Clock):
        def tick(self) -> float:
            marks.append(counting.copy())
            return super().tick()

    mailbox.total, loop.Clock = total, Clock
    with counting:
        loop.train(values)
    sent, numbers = mails[1]
    found = {"step": marks[2] - marks[1], "mail": [sent, 8 * numbers]}
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


def counted(out: Path, ranks: int) -> tuple[Counts, tuple[int, int]]:
    """What :func:`count` wrote: collectives of each rank, messages and bytes of each of the exchange of all."""
    found = [read_json(out / f"rank{rank}.json") for rank in range(ranks)]
    if any(other["step"] != found[0]["step"] for other in found):
        raise SystemExit(f"ranks differ: {found}")
    (size,) = {other["mail"][1] for other in found}
    step = {key: (messages, number) for key, (messages, number) in found[0]["step"].items()}
    return step, (sum(other["mail"][0] for other in found), size)


def expected(values: Recipe, spec: TransformerSpec, ranks: int) -> tuple[Counts, tuple[int, int]]:
    """The same by the formulas."""
    data_size = ranks // values.parallel.tensor
    assert values.training.micro_batch != "auto"
    micro_batches = values.training.global_batch // data_size // values.training.micro_batch
    step: dict[str, tuple[int, int]] = {}
    once = [*data_traffic(values, spec, data_size, micro_batches), *norm_traffic(values)]
    for times, parts in ((1, once), (micro_batches, tensor_traffic(values, spec))):
        for part in parts:
            key = f"{part.group} {part.operation}"
            messages, size = step.get(key, (0, 0))
            step[key] = messages + times * part.count, size + times * part.count * part.bytes
    return step, mailbox_messages(ranks, values.parallel.tensor)


def small_file(name: str, folder: Path) -> Path:
    """The shipped DeepSpeed file with numbers of elements for the small model."""
    path = find(f"{name}.json")
    assert path is not None
    config = read_json(path)
    for option, value in asdict(ZeroOptions.read(config)).items():
        if type(value) is int and option != "stage":
            config["zero_optimization"][option] = value // SCALE
    config["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT
    out = folder / f"{name}.json"
    out.write_text(json.dumps(config))
    return out


def small_recipe(layout: Layout, ranks: int, shards: str, folder: Path) -> Recipe:
    """Eight layers of width 32, four images a micro-batch."""
    model = {"layers": 8, "width": 32, "heads": 4, "max_positions": 300, "dropout": 0.1}
    training = {
        "steps": 4,
        "global_batch": 4 * layout.micro_batches * ranks // layout.tensor,
        "micro_batch": 4,
        "timeout_seconds": 600.0,
        "precision": "bf16",
        "compile": False,
    }
    return Recipe.model_validate(
        {
            "run": str(folder / "run"),
            "deepspeed": str(small_file(layout.deepspeed, folder)),
            "model": model,
            "data": {"shards": shards, "workers": 0},
            "schedule": {"warmup_steps": 1},
            "training": training,
            "parallel": {"tensor": layout.tensor, "sequence": layout.sequence},
            "checkpoint": {"every": 1000},
            "monitor": {"log_every": 1000},
        }
    )


def _rank(rank: int, world: int, port: int, values: Recipe, out: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    with (out / f"rank{rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    count(values, out)


def measure(values: Recipe, ranks: int, out: Path) -> None:
    """Run :func:`count` on ``ranks`` processes."""
    port = free_port()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["digit_ds.training.loop"])
    processes = [context.Process(target=_rank, args=(rank, ranks, port, values, out)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a rank failed:\n" + "\n".join(log.read_text()[-2000:] for log in sorted(out.glob("*.log"))))


def row(ranks: int, layout: Layout, step: Counts, mail: tuple[int, int]) -> str:
    """Of the table in docs/scaling.md."""
    cells = [str(ranks), str(layout.tensor), "yes" if layout.sequence else "no", layout.deepspeed]
    cells.append(str(layout.micro_batches))
    for group in ("tensor", "data"):
        for operation in ("all_reduce", "reduce_scatter", "all_gather"):
            messages, size = step.get(f"{group} {operation}", (0, 0))
            cells.append(f"{messages} / {size:,}" if messages else "-")
    return f"| {' | '.join(cells)} | {mail[0]} x {mail[1]} |"


def main() -> None:
    """Count every layout and print its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16])
    options = parser.parse_args()
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        shards = Path(temporary) / "shards"
        write_shards(shards, CODES, np.random.default_rng(0).integers(0, CODES, (IMAGES, 16 * 16)))
        for ranks in options.ranks:
            for number, layout in enumerate(LAYOUTS):
                if ranks % layout.tensor:
                    continue
                folder = Path(temporary) / f"{ranks}-{number}"
                folder.mkdir()
                values = small_recipe(layout, ranks, str(shards), folder)
                measure(values, ranks, folder)
                found = counted(folder, ranks)
                print(row(ranks, layout, *found), flush=True)
                formula = expected(values, model_spec(values, shards_to_come(IMAGES, 16, CODES, 0, 0)), ranks)
                if found != formula:
                    wrong.append(f"{ranks} ranks, {layout}: counted {found}, by the formulas {formula}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
