"""Real parts for the tests of training: token shards, a small recipe, and process groups that start in an instant.

A forkserver imports PyTorch, DeepSpeed and Megatron once; every rank of every scenario is a fork of it.
"""

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ports import free_port
from small_models import MODERN_LAYERS

from digit_ds import shipped
from digit_ds.config import Recipe
from digit_ds.data import shards
from digit_ds.training.stored import StoredState

CODES, VQ_CODES, GRID, CLASSES = 27, 11, (4, 4), 3
MODERN = {"model__norm_position": "pre", **{f"model__{name}": value for name, value in MODERN_LAYERS.items()}}
"""Overrides of :func:`recipe` for the layers of ds_configs/modern_base_prior.yaml."""
# A fork of a process that has touched CUDA cannot use it: there every rank starts from nothing.
_CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if not torch.cuda.is_available():
    _COMPILER = "torch._inductor.compile_fx"  # imported once, not by every rank that compiles
    _CONTEXT.set_forkserver_preload(["digit_ds.training.loop", "digit_ds.model.transformer", _COMPILER])


def write_shards(directory: Path, images: int = 40, views: int = 2, blocks: int = 2) -> Path:
    """Token shards that a model can learn something from, a file a block."""
    generator = np.random.default_rng(0)
    tokens = GRID[0] * GRID[1]

    def samples(first: int, last: int):
        for image in range(first, last):
            for view in range(views):
                discriminative = np.arange(tokens) * (image % CLASSES + 1) + generator.integers(0, 3, tokens)
                yield {
                    "discriminative": (discriminative % CODES).astype(np.uint16),
                    "vq": ((np.arange(tokens) + image) % VQ_CODES).astype(np.uint16),
                    "label": image % CLASSES,
                    "image_id": f"class{image % CLASSES}/{image:04d}.png",
                    "index": image,
                    "view": view,
                }

    names = [f"block-{number:05d}" for number in range(blocks)]
    for number, name in enumerate(names):
        first, last = (images * at // blocks for at in (number, number + 1))
        shards.write_block(directory / name, samples(first, last), shards.COLUMNS)
    shards.ShardManifest(
        images=images,
        views=views,
        classes=[f"class{number}" for number in range(CLASSES)],
        grid=list(GRID),
        image_size=32,
        discriminative_codes=CODES,
        vq_codes=VQ_CODES,
        crops="random",
        provenance={"encoder_sha256": "e", "layer": 3, "transform": "t", "image_size": 32, "codebook_sha256": "k"},
        skipped=0,
        index_sha256=shards.merge_blocks(directory, names),
    ).write(directory)
    return directory


def recipe(run: Path, token_shards: Path, **overrides: Any) -> Recipe:
    """A small recipe; ``overrides`` are ``section__key=value`` or top-level keys."""
    values: dict[str, Any] = {
        "run": str(run),
        "deepspeed": "zero1.json",
        "model": {"layers": 2, "width": 16, "heads": 4, "max_positions": 40, "dropout": 0.0, "class_conditional": True},
        "data": {"shards": str(token_shards), "workers": 0},
        "optimizer": {"learning_rate": 0.02, "gradient_clipping": 0.7},
        "schedule": {"warmup_steps": 4},
        "training": {"steps": 20, "global_batch": 8, "micro_batch": 2, "precision": "fp32", "timeout_seconds": 120.0},
        "parallel": {"tensor": 1},
        "checkpoint": {"every": 1000},
        "monitor": {"log_every": 1},
    }
    for name, value in overrides.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return Recipe.model_validate(values)


MESSAGES = {
    2: {"reduce_bucket_size": 1000, "allgather_bucket_size": 400},
    3: {
        "reduce_bucket_size": 3000,
        "stage3_prefetch_bucket_size": 4000,
        "stage3_param_persistence_threshold": 100,
    },
}
"""By ZeRO stage: sizes with which models of width 16 have several messages of each kind, matrices that are gathered,
and under ZeRO 2 gradients that are larger than a bucket."""


def small_messages(folder: Path, name: str, width: int = 16) -> str:
    """A shipped DeepSpeed file, or under ZeRO 2 and 3 a copy of it with :data:`MESSAGES` for models of this width.

    With the shipped sizes all that these models send goes in one message, and ZeRO 3 keeps all of it on every rank.
    With sizes that are too small for the width, each matrix goes by itself: DeepSpeed sends it from where it is, and
    does not copy it first.
    """
    path = shipped.find(name)
    config = json.loads(path.read_text())
    if (sizes := MESSAGES.get(config["zero_optimization"]["stage"])) is None:
        return name
    scale = width // 16
    config["zero_optimization"] |= {
        key: value * (scale if key == "stage3_param_persistence_threshold" else scale**2)
        for key, value in sizes.items()
    }
    copy = folder / f"small_{width}_{path.name}"
    copy.write_text(json.dumps(config))
    return str(copy)


class Group:
    """Processes of one job that has been started."""

    def __init__(self, processes: list, folder: Path):
        self.processes, self.folder = processes, folder

    def wait(self, timeout: float = 300.0) -> list[int]:
        """Exit statuses; negative: the signal that ended the process."""
        for process in self.processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                raise AssertionError(f"a process still runs after {timeout} s:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """End what still runs: ranks that wait for each other would train on long after their test."""
        for process in self.processes:
            process.kill()

    def output(self) -> str:
        """What all ranks wrote."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank*.log")))


def start(function: Callable, arguments: tuple, world: int, folder: Path) -> Group:
    """Call ``function(*arguments)`` on ``world`` ranks, as a launcher would."""
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        _CONTEXT.Process(target=_rank, args=(function, arguments, rank, world, port, str(folder), dict(os.environ)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return Group(processes, folder)


def launch(function: Callable, arguments: tuple, world: int, folder: Path, timeout: float = 300.0) -> str:
    """Like :func:`start`, to the end, which must be a good one."""
    group = start(function, arguments, world, folder)
    statuses = group.wait(timeout)
    assert statuses == [0] * world, f"exit statuses {statuses}:\n{group.output()[-6000:]}"
    return group.output()


def _rank(
    function: Callable, arguments: tuple, rank: int, world: int, port: int, folder: str, environment: dict[str, str]
) -> None:
    os.environ.update(environment)  # the fork server has that of its start
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    with Path(folder, f"rank{rank}.log").open("a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        from digit_ds.errors import run_command

        status = 1
        try:
            run_command(lambda _: function(*arguments), ["--debug"])
        except SystemExit as exit:
            status = int(exit.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        # Without this the interpreter would wait for threads of a job whose other ranks were killed on purpose.
        os._exit(status)


def train(values: Recipe) -> None:
    """``digit-ds train`` on this rank."""
    from digit_ds.training import loop

    loop.train(values)


def train_all(recipes: list[Recipe], ports: list[int]) -> None:
    """Several runs in the same processes (starting PyTorch on a GPU takes seconds), each with a store of its own."""
    for values, port in zip(recipes, ports):
        os.environ["MASTER_PORT"] = str(port)
        train(values)


def steps_logged(run: Path) -> int:
    """Lines of metrics so far."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, validations left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def whole_state(stored: StoredState, kind: str) -> dict[str, torch.Tensor]:
    """Whole parameters of one kind in a checkpoint."""
    contents = stored.contents(kind).items()
    return {name: torch.cat(list(content.pieces())).view(content.shape) for name, content in contents}
