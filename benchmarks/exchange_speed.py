"""Milliseconds a step of the ranks' exchange of a few whole numbers, over gloo and forked processes of this machine.

    python benchmarks/exchange_speed.py [--ranks 2 8 16 32] [--steps 200] [--work 0.05]

Each rank "computes" for ``--work`` seconds a step (asleep, as a host whose device works), then exchanges seven numbers:

- ``all-reduce``: a blocking all-reduce of gloo, a ring;
- ``doubling``: the same sum by recursive doubling, blocking;
- ``late``: the sum begun after one step and read after the next one, as training does.

Prints what a step takes beyond the same steps without an exchange, in ms, and the ratio to ``all-reduce``.
"""

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from digit_ds.parallel.mailbox import Mailbox, total

VALUES = [0, 0, 0, 123456789, 0, 0, 0]


def main(ranks: list[int], steps: int, work: float) -> None:
    """Measure every number of ranks."""
    for world in ranks:
        queue = multiprocessing.Queue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        processes = [
            multiprocessing.Process(target=_rank, args=(r, world, port, steps, work, queue)) for r in range(world)
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


def _rank(rank: int, world: int, port: int, steps: int, work: float, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    mailbox = Mailbox(group)

    def all_reduce() -> None:
        dist.all_reduce(torch.tensor(VALUES), group=group)

    def late() -> None:
        mailbox.receive()
        mailbox.send(VALUES)

    ways: dict[str, Callable[[], object]] = {
        "all-reduce": all_reduce, "doubling": lambda: total(group, VALUES), "late": late,
    }  # fmt: skip
    seconds = {"none": 0.0} | dict.fromkeys(ways, 0.0)
    for _round in range(2):  # one after the other, so that a change of the machine's load meets all
        for name, exchange in {"none": lambda: None, **ways}.items():
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(steps // 2):
                time.sleep(work)
                exchange()
            seconds[name] += (time.perf_counter() - begin) / (steps // 2) / 2
            mailbox.receive()
    if rank == 0:
        queue.put({name: seconds[name] - seconds["none"] for name in ways})
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--work", type=float, default=0.05)
    options = parser.parse_args()
    main(options.ranks, options.steps, options.work)
