"""Preflight: every process checks its machine; rank 0 prints one line for each check."""

import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from digit_ds.data.shards import read_index, read_manifest, read_shard
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.health.links import measure
from digit_ds.health.settings import DoctorSettings
from digit_ds.parallel import launch

PACKAGES = ("torch", "deepspeed", "megatron-core", "mosaicml-streaming", "timm", "torch-fidelity")
GIB = 2**30
SPACE_GIB = 50  # below: a warning; a checkpoint of the large prior alone has 9 GiB
SHARED_MEMORY_GIB = 1  # below: a warning; loader processes hand their batches over in it
SHARDS_PER_RANK = 3
VISIBLE_SECONDS = 10.0  # how long a file may take to show up on another node (attribute caches)


class Verdict(NamedTuple):
    """What a check found."""

    level: str
    """``ok``, ``warning`` or ``failed``."""
    message: str
    """What was found and, if it is not fine, what was expected."""


def doctor(settings: DoctorSettings) -> None:
    """Check versions, GPUs, kernels, links between ranks, the shared file system, free space and a sample of shards.

    Every process of the job calls it, under any launcher or alone; rank 0 prints a line for each check.

    Raises:
        UserError: a check failed; names them.
    """
    launch.initialize(timedelta(seconds=settings.timeout))
    folder, shards = Path(settings.folder), settings.shards
    checks: dict[str, Callable[[], Verdict]] = {
        "versions": _versions,
        "devices": _devices,
        "kernels": _kernels,
        "links": _links,
        "shared files": lambda: _shared_files(folder),
        "free space": lambda: _free_space(folder),
    }
    if shards is not None:
        checks["shards"] = lambda: _shards(Path(shards))
    failed = []
    for name, check in checks.items():
        level, message = check()
        if level == "failed":
            failed.append(name)
        if launch.is_main():
            print(f"{level:8} {name}: {message}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()  # NCCL warns of one that is left open
    if failed:
        raise UserError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _everywhere(own: Any) -> list[Any]:
    """What each rank says, in order of rank."""
    if not dist.is_initialized():
        return [own]
    said: list[Any] = [None] * launch.world_size()
    dist.all_gather_object(said, own)
    return said


def _name(rank: int, hosts: list[str]) -> str:
    """A rank and its host, for messages."""
    return f"rank {rank} ({hosts[rank]})"


def _hosts() -> list[str]:
    return _everywhere(launch.host())


def _versions() -> Verdict:
    """Whether all ranks run the same versions of everything."""
    own = {}
    for package in PACKAGES:
        try:
            own[package] = version(package)
        except PackageNotFoundError:
            own[package] = "missing"
    hosts, said = _hosts(), _everywhere(own)
    for rank, versions in enumerate(said):
        for package in PACKAGES:
            if versions[package] == "missing":
                return Verdict("failed", f"{_name(rank, hosts)} has no {package}, expected it to be installed")
            if versions[package] != said[0][package]:
                return Verdict(
                    "failed",
                    f"{_name(rank, hosts)} has {package} {versions[package]} but {_name(0, hosts)} has "
                    f"{said[0][package]}, expected the same everywhere",
                )
    listed = ", ".join(f"{package} {number}" for package, number in own.items())
    return Verdict("ok", f"{listed} on all of {len(said)} ranks")


def _devices() -> Verdict:
    """Whether each rank has a GPU of its own, all alike; or none has one."""
    try:
        device, problem = launch.device(), ""
    except UserError as error:
        device, problem = torch.device("cpu"), str(error)
    if device.type == "cpu" and not problem and (count := len(list(Path("/dev").glob("nvidia[0-9]*")))):
        problem = (
            f"{count} GPUs that torch {torch.__version__} cannot use, expected a driver for CUDA {torch.version.cuda}"
        )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        kind, memory = properties.name, f"{properties.total_memory / GIB:.0f} GiB"
    else:
        kind, memory = "CPU", f"{torch.get_num_threads()} threads"
    hosts, said = _hosts(), _everywhere((kind, memory, problem))
    for rank, (_, _, trouble) in enumerate(said):
        if trouble:
            return Verdict("failed", f"{_name(rank, hosts)}: {trouble}")
    for rank, (other, _, _) in enumerate(said):
        if other != said[0][0]:
            return Verdict(
                "warning",
                f"{_name(rank, hosts)} has {other} but {_name(0, hosts)} has {said[0][0]}: the slower sets the pace",
            )
    return Verdict("ok", f"{len(said)} x {kind} ({memory}) on {', '.join(dict.fromkeys(hosts))}")


def _kernels() -> Verdict:
    """Which optional fast implementations are there; all of them have a slower stand-in."""
    try:
        from apex.normalization import FusedLayerNorm  # noqa: F401

        norm = "apex FusedLayerNorm"
    except ImportError:
        norm = "torch LayerNorm (no apex)"
    if torch.cuda.is_available():
        flash = torch.backends.cuda.is_flash_attention_available()
        attention = "flash attention" if flash else "no flash attention in this torch build"
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    else:
        flash, attention, precision = True, "CPU attention", "fp32"
    compiler = "compiler for DeepSpeed's operators" if shutil.which("nvcc") else "no nvcc"
    said = dict.fromkeys(_everywhere(f"{norm}, {attention}, {precision}, {compiler}"))
    if len(said) > 1:
        return Verdict("warning", f"ranks differ: {' | '.join(said)}")
    return Verdict("ok" if flash else "warning", next(iter(said)))


def _links() -> Verdict:
    """Whether sums over all ranks are right, how fast they are, and which link is slow."""
    if not dist.is_initialized():
        return Verdict("ok", "one process, nothing to sum")
    hosts = _hosts()
    links = measure(launch.device())
    backend = dist.get_backend()
    if links.wrong:
        return Verdict("failed", f"a sum over {launch.world_size()} ranks by {backend} is wrong")
    slowest = min(range(len(links.neighbours)), key=links.neighbours.__getitem__)
    middle = sorted(links.neighbours)[len(links.neighbours) // 2]
    message = f"{backend} all-reduce over {launch.world_size()} ranks at {links.all_reduce:.2f} GB/s (bus bandwidth)"
    between = f"{_name(slowest, hosts)} to {_name((slowest + 1) % len(hosts), hosts)}"
    if len(hosts) > 2 and links.neighbours[slowest] < middle / 4:
        return Verdict(
            "warning",
            f"{message}, but {between} has {links.neighbours[slowest]:.2f} GB/s where {middle:.2f} is usual",
        )
    return Verdict("ok", f"{message}; slowest link {between} with {links.neighbours[slowest]:.2f} GB/s")


def _shared_files(folder: Path) -> Verdict:
    """Whether a file of each rank is seen by all others."""
    hosts = _hosts()
    run = _everywhere(uuid.uuid4().hex)[0]
    own = folder / f".doctor-{run}.{launch.rank()}"
    try:
        own.write_text(run)
        trouble = ""
    except OSError as error:
        trouble = f"cannot write to {folder} ({error.strerror})"
    said = _everywhere(trouble)
    try:
        if not any(said):
            deadline, missing = time.monotonic() + VISIBLE_SECONDS, set(range(len(said)))
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not (folder / f".doctor-{run}.{rank}").exists()}
                time.sleep(0.05 if missing else 0)
            if missing:
                trouble = f"does not see in {folder} what {_name(min(missing), hosts)} wrote there"
        said = _everywhere(trouble)
    finally:
        own.unlink(missing_ok=True)
    for rank, message in enumerate(said):
        if message:
            return Verdict("failed", f"{_name(rank, hosts)} {message}, expected a file system that all nodes share")
    return Verdict("ok", f"{folder.resolve()} is seen and written by all of {len(said)} ranks")


def _free_space(folder: Path) -> Verdict:
    """Room for runs, for temporary files and for shared memory, on every node."""
    hosts = _hosts()
    wanted = {folder: SPACE_GIB, Path(tempfile.gettempdir()): 1, Path("/dev/shm"): SHARED_MEMORY_GIB}
    own = {str(place): shutil.disk_usage(place).free / GIB for place in wanted if place.is_dir()}
    said = _everywhere(own)
    for rank, rooms in enumerate(said):
        for place, least in wanted.items():
            if (room := rooms.get(str(place), float("inf"))) < least:
                return Verdict(
                    "warning", f"{_name(rank, hosts)} has {room:.1f} GiB free in {place}, expected {least} or more"
                )
    rooms = {place: min(rooms.get(place, float("inf")) for rooms in said) for place in own}
    return Verdict("ok", "at least " + ", ".join(f"{room:.0f} GiB in {place}" for place, room in rooms.items()))


def _shards(directory: Path) -> Verdict:
    """Manifest, index and the hashes of a few shards; each rank draws its own."""
    hosts = _hosts()
    try:
        manifest = read_manifest(directory)
        if sha256(directory / "index.json") != manifest.index_sha256:
            raise UserError(f"{directory / 'index.json'}: is damaged, its sha256 is not that of manifest.json")
        shards = read_index(directory)
        for shard in random.Random(launch.rank()).sample(shards, min(SHARDS_PER_RANK, len(shards))):
            read_shard(directory, shard)
        trouble = ""
    except UserError as error:
        trouble = str(error)
    said = _everywhere(trouble)
    for rank, message in enumerate(said):
        if message:
            return Verdict("failed", f"{_name(rank, hosts)}: {message}")
    return Verdict(
        "ok",
        f"{directory}: {manifest.images} images x {manifest.views} views, "
        f"{min(SHARDS_PER_RANK, len(shards))} of {len(shards)} shards read by each rank, none damaged",
    )
