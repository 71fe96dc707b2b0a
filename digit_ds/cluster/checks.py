"""What would fail hours after a submission, refused before it."""

import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from digit_ds import shipped
from digit_ds.cluster.chain import Chain, Site, absolute, load, option_problems, recipe_of, steps
from digit_ds.cluster.limits import seconds_of
from digit_ds.config import Recipe
from digit_ds.data.images import no_images, walk
from digit_ds.data.sources.folder import FolderSource
from digit_ds.data.sources.opening import open_source
from digit_ds.data.sources.remote import is_remote
from digit_ds.errors import UserError
from digit_ds.settings import Section
from digit_ds.yaml_files import read_yaml

PATHS = ("images", "encoder", "vqgan", "vqgan_config", "reference", "features", "inception_weights", "classifier")
"""Options that name files or folders which must be there before anything starts."""
TRAININGS = ("prior", "decoder")
DINOV2 = 256
"""Side in pixels of the views that DINOv2 makes unless ``image_size`` says otherwise."""


def load_checked(path: Path, site_path: Path, every: bool) -> tuple[Chain, Site]:
    """The chain and the site in these files, if they can work.

    Raises:
        UserError: the first problem; with ``every`` the last one, and those before it are printed, a line each.
    """
    _refuse(itertools.chain(_unreadable(path, Chain), _unreadable(site_path, Site)), every)
    chain, site = load(path, Chain), load(site_path, Site)
    found = itertools.chain(
        _missing_inputs(chain, path),
        _unfit_recipes(chain, site, path),
        _missing_tokens(chain, path),
        _unfit_pictures(chain, path),
        _unknown_options(chain, path),
        _unfit_site(site, site_path),
    )
    _refuse(found, every)
    return chain, site


def _refuse(problems: Iterable[str], every: bool) -> None:
    """Raise the first problem or, with ``every``, print all but the last, which is raised."""
    found = list(problems if every else itertools.islice(problems, 1))
    for problem in found[:-1]:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        raise UserError(found[-1])


def _unreadable(path: Path, kind: type[Section]) -> Iterator[str]:
    """Keys that are missing, unknown or of another type."""
    for problem in kind.problems(read_yaml(path)):
        yield f"{path}: {problem}"


def _missing_inputs(chain: Chain, path: Path) -> Iterator[str]:
    """Files and folders that are not there, or empty."""
    for name in ("features", "tokenize", "tokenize_validation", "sample", "evaluate", "probe"):
        options = getattr(chain, name)
        for option in PATHS:
            value = options.get(option)
            if value is None or is_remote(str(value)):
                continue
            found = absolute(str(value))
            if not found.exists() and not (option == "images" and "*" in found.name):
                yield f"{path}: {name}.{option} is {value}, which does not exist"
            elif found.is_file() and not found.stat().st_size:
                yield f"{path}: {name}.{option} is {value}, which is an empty file"
            elif option == "images":
                yield from _no_images(found, f"{path}: {name}.images is {value}")
            elif option == "reference" and found.is_dir() and next(walk(found, passed := Counter[str]()), None) is None:
                yield f"{path}: {name}.reference is {value}: {no_images(found, passed)}"


def _no_images(found: Path, key: str) -> Iterator[str]:
    """What cannot be a source of images, and a folder that holds none."""
    try:
        source, passed = open_source(found), Counter[str]()
        if isinstance(source, FolderSource) and next(walk(found, passed), None) is None:
            raise no_images(found, passed)
    except UserError as error:
        yield f"{key}: {error}"


def _unfit_recipes(chain: Chain, site: Site, path: Path) -> Iterator[str]:
    """Recipes that training would refuse on the ranks of their steps."""
    from digit_ds.training.deepspeed_config import read_deepspeed_config

    os.chdir(shipped.ROOT)  # as the jobs do: a DeepSpeed file may be named relative to it
    for name in TRAININGS:
        wanted = site.resources(name)
        ranks = wanted["nodes"] * wanted["tasks_per_node"]
        try:
            recipe = recipe_of(getattr(chain, name))
        except UserError as error:
            yield str(error)
            continue
        try:
            read_deepspeed_config(recipe, max(1, ranks // recipe.parallel.tensor))
        except UserError as error:
            yield f"{path}: {name} on {ranks} ranks: {error}{_ranks_that_work(recipe, **wanted)}"


def _ranks_that_work(recipe: Recipe, nodes: int, tasks_per_node: int, **_: Any) -> str:
    """Numbers of nodes or, if there are none, of ranks on each over which the global batch can be divided."""
    from digit_ds.training.plan import nearest

    batch, tensor = recipe.training.global_batch, recipe.parallel.tensor
    images = 1 if recipe.training.micro_batch == "auto" else recipe.training.micro_batch

    def works(ranks: int) -> bool:
        return ranks % tensor == 0 and batch % (ranks // tensor * images) == 0

    if works(nodes * tasks_per_node):  # it is not the number of ranks
        return ""
    if found := nearest(nodes, [n for n in range(1, batch * tensor + 1) if works(n * tasks_per_node)]):
        return f"; nodes: {found} can divide it"
    found = nearest(tasks_per_node, [n for n in range(1, batch * tensor + 1) if works(n * nodes)])
    return f"; gpus_per_node (tasks_per_node): {found or 'none'} can divide it"


def _missing_tokens(chain: Chain, path: Path) -> Iterator[str]:
    """Shards without VQ tokens for a model that reads them."""
    for name in TRAININGS:
        training = getattr(chain, name)
        try:
            kind = recipe_of(training).model.kind
        except UserError:
            continue  # _unfit_recipes says why
        for step, key in (("tokenize", "data.shards"), ("tokenize_validation", "data.validation")):
            if kind != "prior" and key not in training.overrides and getattr(chain, step).get("vqgan") is None:
                yield (
                    f"{path}: {step}.vqgan is not set, expected a VQGAN checkpoint: {name} (model.kind {kind}) needs "
                    "VQ tokens"
                )


def _unfit_pictures(chain: Chain, path: Path) -> Iterator[str]:
    """A reference that is not resized to the size of the samples."""
    preparation, size = chain.evaluate.get("preparation", "none"), chain.evaluate.get("size")
    if preparation in (None, "none"):
        return
    if size is None:
        yield f"{path}: evaluate.size is not set, expected the side of the samples with preparation {preparation}"
        return
    side = chain.tokenize.get("image_size")
    if side is None and Path(str(chain.tokenize.get("encoder"))).name.startswith("dinov2_vit"):
        side = DINOV2
    if side is not None and size != side:
        yield f"{path}: evaluate.size is {size}, expected {side}, the side of the samples in pixels"


def _unknown_options(chain: Chain, path: Path) -> Iterator[str]:
    """Options that no command has, and values that a command would refuse."""
    try:
        found = steps(chain)
    except UserError as error:
        yield f"{path}: {error}"
        return
    for step in found:
        yield from option_problems(step, str(path))


def _unfit_site(site: Site, path: Path) -> Iterator[str]:
    """An interpreter that is not there, and a time limit that leaves no time to compute."""
    program = site.interpreter()[0]
    if shutil.which(program) is None:
        yield f"{program} of the site cannot be started, expected the container's program or Python"
    limits = {"time": site.time} | {f"steps.{name}.time": own.time for name, own in site.steps.items() if own.time}
    for key, limit in limits.items():
        if site.grace_seconds >= seconds_of(limit):
            yield f"{path}: grace_seconds is {site.grace_seconds}, expected less than {key} {limit!r}"
