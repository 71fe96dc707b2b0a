"""Sums of whole numbers over processes, at once and while the caller works."""

import os

import pytest
import torch.distributed as dist
from training_parts import launch


def sum_often(world: int) -> None:
    from digit_ds.parallel.mailbox import Mailbox, total

    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    mailbox = Mailbox(group)
    assert mailbox.receive() is None
    for step in range(20):
        mailbox.send([rank, step, 2**63 - 1 if rank == 0 else 2])
        wrapped = (2**63 - 1 + 2 * (world - 1) + 2**63) % 2**64 - 2**63
        assert mailbox.receive() == [world * (world - 1) // 2, world * step, wrapped]
    assert total(group, [rank + 1]) == [world * (world + 1) // 2]
    if rank == world - 1:
        os._exit(0)
    mailbox.send([1])
    with pytest.raises(RuntimeError, match=r"(?i)closed|reset|refused"):
        mailbox.receive()


@pytest.mark.parametrize("world", [2, 5])
def test_all_ranks_receive_the_sums_and_hear_of_a_lost_peer(world, tmp_path):
    launch(sum_often, (world,), world, tmp_path / "log", 60)


def test_a_process_alone_receives_its_own_values():
    from digit_ds.parallel.mailbox import Mailbox

    mailbox = Mailbox(None)
    mailbox.send([3, 4])
    assert mailbox.receive() == [3, 4] and mailbox.receive() is None
