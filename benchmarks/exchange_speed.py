"""Milliseconds a step of the ranks' exchange of a few whole numbers, over gloo and forked processes of this machine.

    python benchmarks/exchange_speed.py [--ranks 2 8 16 32] [--steps 200] [--work 0.05] [--log-every 1]

Each rank "computes" for ``--work`` seconds a step (asleep, as a host whose device works), then exchanges seven numbers:

- ``all-reduce``: a blocking all-reduce of gloo, a ring;
- ``doubling``: the same sum by recursive doubling, blocking;
- ``late``: the sum begun after one step and read after the next one, as training does;
- ``logged, waiting``: the same, but every ``--log-every`` steps the sum is read at once, and loss, tokens and own times
  are reduced for a line of metrics, blocking;
- ``logged``: as ``late``, and such a line is begun every ``--log-every`` steps, as training does.

Prints what a step takes beyond the same steps without an exchange, in ms, and the ratio to ``all-reduce``.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import free_port

from digit_ds.parallel.mailbox import Mailbox, total
from digit_ds.parallel.topology import Topology
from digit_ds.training.metric_lines import MetricLines, Samples
from digit_ds.training.pace import Pace

VALUES = [0, 0, 0, 123456789, 0, 0, 0]
IDS = 16_384
"""Tokens whose use is counted."""


class NoReport:
    """Stands for the file of metrics."""

    def log(self, values: dict) -> None:
        """Write nothing."""

    def say(self, text: str) -> None:
        """Print nothing: ranks are late at random."""


def main(ranks: list[int], steps: int, work: float, log_every: int) -> None:
    """Measure every number of ranks."""
    for world in ranks:
        queue = multiprocessing.Queue()
        port = free_port()
        processes = [
            multiprocessing.Process(target=_rank, args=(r, world, port, steps, work, log_every, queue))
            for r in range(world)
        ]
        for process in processes:
            process.start()
        found = queue.get()
        for process in processes:
            process.join()
        figures = "  ".join(
            f"{name} {1000 * seconds:6.2f} ms ({seconds / found['all-reduce']:.2f})" for name, seconds in found.items()
        )
        print(f"{world:3d} ranks: {figures}", flush=True)


def _rank(
    rank: int, world: int, port: int, steps: int, work: float, log_every: int, queue: multiprocessing.Queue
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    mailbox, place = Mailbox(group), Topology(1, 0, world, rank, group)
    pace = Pace(place, torch.device("cpu"), 1)
    lines = MetricLines(place, group, pace, NoReport())
    loss, used = torch.zeros(()), torch.zeros(IDS, dtype=torch.uint8)

    def late(_step: int = 0) -> None:
        mailbox.receive()
        mailbox.send(VALUES)

    def logged_waiting(step: int) -> None:
        late()
        if step % log_every == 0:
            mailbox.receive()
            dist.all_reduce(torch.stack([loss, loss]), group=group)
            dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
            total(group, pace.own_nanoseconds(pace.take()))

    def logged(step: int) -> None:
        late()
        if step % log_every == 0:
            lines.begin({}, loss, loss, 0.0, used.clone(), Samples(0, VALUES[3]))

    ways: dict[str, Callable[[int], object]] = {
        "all-reduce": lambda _: dist.all_reduce(torch.tensor(VALUES), group=group),
        "doubling": lambda _: total(group, VALUES),
        "late": late,
        "logged, waiting": logged_waiting,
        "logged": logged,
    }
    seconds = {"none": 0.0} | dict.fromkeys(ways, 0.0)
    for _round in range(2):  # one after the other, so that a change of the machine's load meets all
        for name, exchange in {"none": lambda _: None, **ways}.items():
            dist.barrier()
            begin = time.perf_counter()
            for step in range(steps // 2):
                pace.begin()
                time.sleep(work)
                pace.end()
                exchange(step)
            seconds[name] += (time.perf_counter() - begin) / (steps // 2) / 2
            mailbox.receive()
            lines.wait()
            pace.take()
    if rank == 0:
        queue.put({name: seconds[name] - seconds["none"] for name in ways})
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=float, default=0.05)
    parser.add_argument("--log-every", type=int, default=1)
    options = parser.parse_args()
    main(options.ranks, options.steps, options.work, options.log_every)
