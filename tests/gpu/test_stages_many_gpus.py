"""K-Means, tokenising and sampling on all GPUs of a machine: every byte that one GPU writes.

Over gloo without a GPU: see tests/devices.py.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from devices import DEVICES, needs
from stages_speed import SMALL, STAGES, command, content, make_parts, run

pytestmark = [pytest.mark.gpu, needs(2)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"), SMALL)


@pytest.mark.parametrize("stage", STAGES)
def test_every_byte_is_that_of_one_process(stage, parts, tmp_path):
    files = []
    for world in (1, DEVICES):
        out = tmp_path / str(world)
        out.mkdir()
        arguments, _ = command(stage, out, True, parts, SMALL)
        run(arguments, world, tmp_path / f"log-{world}")
        files.append(content(out))
    assert files[0] == files[1]
    assert files[0]
