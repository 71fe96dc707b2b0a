"""What is submitted: the site, the chain's recipe, and the steps with their arguments and dependencies."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from digit_ds import shipped
from digit_ds.cluster.limits import Memory, TimeLimit
from digit_ds.clustering.settings import KMeansSettings
from digit_ds.config import Recipe, load_recipe
from digit_ds.errors import UserError
from digit_ds.evaluation.settings import EvaluateSettings, ProbeSettings
from digit_ds.generation.settings import SampleSettings
from digit_ds.preparation.settings import FeatureSettings, TokenSettings
from digit_ds.settings import PathText, Section, Settings, spellings
from digit_ds.yaml_files import read_yaml

Options = dict[str, str | int | float | bool | list[int | float | str] | None]
Name = Literal[
    "features", "kmeans", "tokenize", "tokenize_validation", "prior", "decoder", "sample", "evaluate", "probe"
]


class Resources(Section):
    """What one step needs differently from the rest."""

    partition: str | None = None
    nodes: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    tasks_per_node: int | None = Field(None, ge=1)
    cpus_per_task: int | None = Field(None, ge=1)
    memory: Memory | None = None
    time: TimeLimit | None = None


class Site(Section):
    """The cluster; ``site.example.yaml`` says what each field means."""

    partition: str
    account: str | None = None
    nodes: int = Field(..., ge=1)
    gpus_per_node: int = Field(..., ge=0)
    tasks_per_node: int | None = Field(None, ge=1)
    cpus_per_task: int = Field(..., ge=1)
    memory: Memory | None = None
    time: TimeLimit
    grace_seconds: int = Field(300, ge=1)
    python: str = ".venv/bin/python" if shipped.ROOT == shipped.HOME else sys.executable
    container: list[str] = Field([])
    modules: list[str] = Field([])
    interface: str | None = None
    environment: dict[str, str] = Field({})
    options: list[str] = Field([])
    steps: dict[Name, Resources] = Field({})

    def resources(self, step: str) -> dict[str, Any]:
        """Everything that ``step`` requests from Slurm: the site's values under the step's own."""
        own = next((own for name, own in self.steps.items() if name == step), Resources()).model_dump(exclude_none=True)
        values = {name: getattr(self, name) for name in Resources.model_fields} | own
        if values["tasks_per_node"] is None:
            values["tasks_per_node"] = max(1, values["gpus_per_node"])
        return values

    def interpreter(self) -> list[str]:
        """The command that runs Python in a job, as a list."""
        return [*self.container, str(shipped.ROOT / self.python) if "/" in self.python else self.python]


class Training(Section):
    """One training run."""

    recipe: str
    """YAML recipe; its shards and run directory come from the chain."""
    overrides: dict[str, Any] = Field({})
    """``section.key: value`` of the recipe to change."""


class Chain(Section):
    """A run from images to scores. Sections hold the options of one command each."""

    out: PathText
    """Folder of everything that the chain makes."""
    features: Options
    kmeans: Options
    tokenize: Options
    tokenize_validation: Options
    prior: Training
    decoder: Training
    sample: Options
    evaluate: Options
    probe: Options = Field({})


SETTINGS: dict[str, type[Section]] = {
    "features": FeatureSettings,
    "kmeans": KMeansSettings,
    "tokenize": TokenSettings,
    "tokenize_validation": TokenSettings,
    "sample": SampleSettings,
    "evaluate": EvaluateSettings,
    "probe": ProbeSettings,
}
"""What the options of a step's command are."""


def load(path: Path, kind: type[Settings]) -> Settings:
    """Read a site or a chain.

    Raises:
        UserError: the file cannot be read, a key is missing or unknown, or a value has the wrong type.
    """
    return kind.read(read_yaml(path), str(path))


@dataclass(frozen=True)
class Step:
    """One job of the chain."""

    name: str
    """As in the chain's recipe."""
    command: tuple[str, ...]
    """What Python is given: the tool or the verb."""
    arguments: tuple[str, ...]
    """Arguments of the sbatch script."""
    needs: tuple[str, ...]
    """Steps whose products this one reads."""
    product: Path
    """File that exists once the step is complete."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the command by name: the chain's own and the recipe's; none of a training."""

    @property
    def script(self) -> Path:
        """The sbatch script."""
        return shipped.HOME / "slurm" / f"{self.name.removesuffix('_validation')}.sbatch"


def steps(chain: Chain) -> list[Step]:
    """The steps in an order in which each follows what it needs."""
    out = absolute(chain.out)
    # Everything that has curves is in runs/: TensorBoard walks all of the folder that it is given.
    features, codebook, pictures = out / "features", out / "runs" / "kmeans" / "km.npy", out / "samples"
    shards, validation = out / "shards" / "train", out / "shards" / "validation"
    prior, decoder = out / "models" / "prior", out / "models" / "decoder"
    tokenizer, tokens = ("tools/tokenize_images.py",), ("tokenize", "tokenize_validation")

    def train(settings: Training, name: str, model: Path) -> Step:
        overrides = {"data.shards": str(shards), "data.validation": str(validation)} | settings.overrides
        values = [f"{key}={in_one_line(value)}" for key, value in overrides.items()]
        arguments = map(str, [out / "runs" / name, model, training_recipe(settings.recipe), *values])
        return Step(name, ("-m", "digit_ds", "train"), tuple(arguments), tokens, model / "config.json")

    def step(name: str, command: tuple[str, ...], made: dict, needs: tuple[str, ...], product: Path, *first) -> Step:
        """``made``: the options that connect this step with the others; the chain's recipe has the rest."""
        given = getattr(chain, name)
        if taken := made.keys() & given.keys():
            raise UserError(f"{name}.{min(taken)} is chosen by the chain itself, expected the recipe to leave it out")
        options = made | given
        return Step(name, command, (*map(str, first), *_flags(options)), needs, product, options)

    def verb(name: str) -> tuple[str, ...]:
        return ("-m", "digit_ds", name)

    models = {"prior": prior, "decoder": decoder}
    probed = {"model": prior, "train": shards, "val": validation}
    return [
        step("features", ("tools/extract_features.py",), {"out": features}, (), features / "manifest.json"),
        step("kmeans", ("tools/train_kmeans.py",), {"features": features, "out": codebook}, ("features",), codebook),
        step("tokenize", tokenizer, {"codebook": codebook}, ("kmeans",), shards / "manifest.json", shards),
        step(
            "tokenize_validation",
            *(tokenizer, {"codebook": codebook}, ("kmeans",), validation / "manifest.json", validation),
        ),
        train(chain.prior, "prior", prior),
        train(chain.decoder, "decoder", decoder),
        step("sample", verb("sample"), models | {"out": pictures}, ("prior", "decoder"), pictures / "manifest.json"),
        step(
            "evaluate",
            *(verb("evaluate"), {"generated": pictures / "images", "out": out / "scores.json"}),
            *(("sample",), out / "scores.json"),
        ),
        step("probe", verb("probe"), probed | {"out": out / "probe"}, ("prior",), out / "probe" / "probe.json"),
    ]


def absolute(path: str) -> Path:
    """A path of the chain's recipe; relative ones start at ``shipped.ROOT``, where the jobs run too."""
    return shipped.ROOT / Path(path).expanduser()


def training_recipe(path: str) -> Path:
    """The recipe of a training step: a file, or a shipped one."""
    found = absolute(path)
    return found if found.is_file() else (shipped.find(path) or found).resolve()


def recipe_of(training: Training) -> Recipe:
    """The recipe of a training step with its overrides.

    Raises:
        UserError: training would refuse it.
    """
    overrides = [f"{key}={in_one_line(value)}" for key, value in training.overrides.items()]
    return load_recipe(training_recipe(training.recipe), ["run=x", "data.shards=x", *overrides])


def option_problems(step: Step, source: str) -> Iterator[str]:
    """Options of a step that its command does not have, and values that it would refuse; ``source`` is the chain."""
    if (section := SETTINGS.get(step.name)) is None:
        return
    known, verb = spellings(section), step.name.removesuffix("_validation")
    for name in step.options:
        if name not in known:
            yield (
                f"{source}: {step.name}.{name} is not an option of digit-ds {verb}, expected one of "
                f"{', '.join(dict.fromkeys(known.values()))}"
            )
    made = {"out": str(step.product)} | step.options  # tokenize.sbatch takes its output folder by place
    given = {name: value for name, value in made.items() if name in known and value is not None}
    for problem in section.problems(given):
        yield f"{source}: {step.name}: {problem}"


def _flags(options: dict[str, Any]) -> list[str]:
    """``{"top_k": 200, "npz": true, "classes": [1, 2]}`` as ``--top-k 200 --npz --classes 1 2``; null is left out."""
    words: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def in_one_line(value: Any) -> str:
    """A value as ``section.key=value`` takes it (JSON is YAML in one line)."""
    return json.dumps(value)


def sbatch(step: Step, site: Site, folder: Path, after: list[int]) -> tuple[list[str], dict]:
    """The sbatch command of a step whose logs and state go into ``folder``, and the environment variables to set."""
    wanted = site.resources(step.name)
    command = [
        "sbatch", "--parsable", f"--job-name=digit-{step.name}", f"--output={folder}/logs/%x-%j.out",
        f"--partition={wanted['partition']}", f"--nodes={wanted['nodes']}",
        f"--ntasks-per-node={wanted['tasks_per_node']}", f"--cpus-per-task={wanted['cpus_per_task']}",
        f"--time={wanted['time']}", f"--signal=B:USR1@{site.grace_seconds}",
    ]  # fmt: skip
    if site.account:
        command.append(f"--account={site.account}")
    if wanted["gpus_per_node"]:
        command.append(f"--gpus-per-node={wanted['gpus_per_node']}")
    if wanted["memory"]:
        command.append(f"--mem={wanted['memory']}")
    if after:
        command.append("--dependency=afterok:" + ":".join(map(str, after)))
    variables = site.environment | {
        "DIGIT_HOME": str(shipped.HOME),
        "DIGIT_ROOT": str(shipped.ROOT),
        "DIGIT_PYTHON": "\n".join(site.interpreter()),
        "DIGIT_MODULES": "\n".join(site.modules),
        "DIGIT_INTERFACE": site.interface or "",
        "DIGIT_STATE": str(folder / "steps" / f"{step.name}.json"),
    }
    return [*command, *site.options, str(step.script), *step.arguments], {k: v for k, v in variables.items() if v}
