"""Ports for servers of tests, which are still free when the server asks for them.

The kernel gives every connection a port of its own range (on Linux from 32768 on): one of those that is free can be
taken by any process in the moment before its server starts. The ports here lie below that range. Each process of the
test run has a part of them, and uses them one after the other, so that none is soon used again.
"""

import os
import random
import socket
from collections.abc import Iterator

PARTS = 4
"""Processes of a test run that can have ports of their own."""
JOBS = (30000, 32768)
"""Above those that srun's jobs meet at (:func:`digit_ds.parallel.launch.place`)."""
DAEMONS = (6000, 10000)
"""Below them: Slurm's own."""


def _endless(first: int, end: int) -> Iterator[int]:
    """Ports of this process's part that nothing listens on, from a random one on."""
    size = (end - first) // PARTS
    first += size * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % PARTS)
    number = random.SystemRandom().randrange(size)  # another test run on this machine begins elsewhere
    while True:
        number = (number + 1) % size
        if _is_free(first + number):
            yield first + number


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


_SOURCES = {which: _endless(*which) for which in (JOBS, DAEMONS)}


def free_ports(count: int, which: tuple[int, int] = JOBS) -> list[int]:
    """Different ports that nothing listens on."""
    return [next(_SOURCES[which]) for _ in range(count)]


def free_port() -> int:
    """A port that nothing listens on."""
    return free_ports(1)[0]
