"""What is submitted: the site, the chain's recipe, and the steps with their arguments and dependencies."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from digit_ds.errors import UserError

HOME = Path(__file__).resolve().parents[1]
Options = dict[str, str | int | float | bool | None]
Name = Literal[
    "features", "kmeans", "tokenize", "tokenize_validation", "prior", "decoder", "sample", "evaluate", "probe"
]


class _Section(BaseModel):
    """Unknown keys are errors, values are not coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Resources(_Section):
    """What one step needs differently from the rest."""

    partition: str | None = None
    nodes: int | None = Field(None, ge=1)
    gpus_per_node: int | None = Field(None, ge=0)
    tasks_per_node: int | None = Field(None, ge=1)
    cpus_per_task: int | None = Field(None, ge=1)
    memory: str | None = None
    time: str | None = None


class Site(_Section):
    """The cluster; ``site.example.yaml`` says what each field means."""

    partition: str
    account: str | None = None
    nodes: int = Field(..., ge=1)
    gpus_per_node: int = Field(..., ge=0)
    tasks_per_node: int | None = Field(None, ge=1)
    cpus_per_task: int = Field(..., ge=1)
    memory: str | None = None
    time: str
    grace_seconds: int = Field(300, ge=1)
    python: str = ".venv/bin/python"
    container: list[str] = []
    modules: list[str] = []
    interface: str | None = None
    environment: dict[str, str] = {}
    options: list[str] = []
    steps: dict[Name, Resources] = {}

    def resources(self, step: str) -> dict[str, Any]:
        """Everything that ``step`` asks Slurm for: the site's values under the step's own."""
        own = self.steps.get(step, Resources()).model_dump(exclude_none=True)
        values = {name: getattr(self, name) for name in Resources.model_fields} | own
        if values["tasks_per_node"] is None:
            values["tasks_per_node"] = max(1, values["gpus_per_node"])
        return values


class Training(_Section):
    """One training run."""

    recipe: str
    """YAML recipe; its shards and run directory come from the chain."""
    overrides: dict[str, Any] = {}
    """``section.key: value`` of the recipe to change."""


class Chain(_Section):
    """A run from images to scores. Sections hold the options of one command each."""

    out: str
    """Folder of everything that the chain makes."""
    features: Options
    kmeans: Options
    tokenize: Options
    tokenize_validation: Options
    prior: Training
    decoder: Training
    sample: Options
    evaluate: Options
    probe: Options = {}


_Model = TypeVar("_Model", bound=_Section)


def load(path: Path, kind: type[_Model]) -> _Model:
    """Read a site or a chain.

    Raises:
        UserError: the file cannot be read, a key is missing or unknown, or a value has the wrong type.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from error
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        if problem["type"] == "missing":
            raise UserError(f"{path}: key {key!r} is missing") from error
        if problem["type"] == "extra_forbidden":
            raise UserError(f"{path}: unknown key {key!r}, expected one of {', '.join(kind.model_fields)}") from error
        found = problem["input"]
        raise UserError(f"{path}: {key or 'the file'} is {found!r}, expected: {problem['msg'].lower()}") from error


@dataclass(frozen=True)
class Step:
    """One job of the chain."""

    name: str
    """As in the chain's recipe."""
    script: str
    """Name of the sbatch script."""
    command: tuple[str, ...]
    """What Python is given: the tool or the verb."""
    arguments: tuple[str, ...]
    """Arguments of the sbatch script."""
    options: Options
    """Those of the arguments that the user chose, checked against the command's --help."""
    needs: tuple[str, ...]
    """Steps whose products this one reads."""
    product: Path
    """File or folder that exists once the step is complete."""


def steps(chain: Chain, home: Path = HOME) -> list[Step]:
    """The steps in an order in which each follows what it needs."""
    out = absolute(chain.out, home)
    shards, validation, codebook = out / "shards" / "train", out / "shards" / "validation", out / "codebook" / "km.npy"
    prior, decoder, pictures = out / "models" / "prior", out / "models" / "decoder", out / "samples"

    def step(name, script, command, made, options, needs, product):
        chosen = _flags(options)
        return Step(name, script, tuple(command), (*map(str, made), *chosen), options, tuple(needs), product)

    def training(name, settings, model):
        overrides = {"data.shards": str(shards), "data.validation": str(validation)} | settings.overrides
        made = [out / "runs" / name, model, absolute(settings.recipe, home)]
        made += [f"{key}={_yaml(value)}" for key, value in overrides.items()]
        needs = ["tokenize", "tokenize_validation"]
        return step(name, name, ["-m", "digit_ds", "train"], made, {}, needs, model / "config.json")

    def tokens(name, options, folder):
        made = [folder, "--codebook", codebook]
        return step(name, "tokenize", ["tools/tokenize_images.py"], made, options, ["kmeans"], folder / "manifest.json")

    features, scores, probes = out / "features", out / "scores.json", out / "probe"
    return [
        step("features", "features", ["tools/extract_features.py"], ["--out", features], chain.features, [],
             features / "manifest.json"),
        step("kmeans", "kmeans", ["tools/train_kmeans.py"], ["--features", features, "--out", codebook],
             chain.kmeans, ["features"], codebook),
        tokens("tokenize", chain.tokenize, shards),
        tokens("tokenize_validation", chain.tokenize_validation, validation),
        training("prior", chain.prior, prior),
        training("decoder", chain.decoder, decoder),
        step("sample", "sample", ["-m", "digit_ds", "sample"],
             ["--prior", prior, "--decoder", decoder, "--out", pictures],
             chain.sample, ["prior", "decoder"], pictures / "manifest.json"),
        step("evaluate", "evaluate", ["-m", "digit_ds", "evaluate"], ["--generated", pictures, "--out", scores],
             chain.evaluate, ["sample"], scores),
        step("probe", "probe", ["-m", "digit_ds", "probe"],
             ["--model", prior, "--train", shards, "--validation", validation, "--out", probes],
             chain.probe, ["prior"], probes),
    ]  # fmt: skip


def absolute(path: str, home: Path) -> Path:
    """A path of the chain's recipe; relative ones start at the checkout, where the jobs run too."""
    return home / Path(path).expanduser()


def _flags(options: Options) -> list[str]:
    """``{"top_k": 200, "ema": true, "layer": null}`` as ``--top-k 200 --ema``; a null option is left out."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def _yaml(value: Any) -> str:
    """A value in YAML's one-line syntax, as ``section.key=value`` takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def sbatch(step: Step, site: Site, folder: Path, after: list[int], home: Path = HOME) -> tuple[list[str], dict]:
    """The sbatch command of a step whose logs and state go into ``folder``, and the variables that it wants set."""
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
    python = str(home / site.python) if "/" in site.python else site.python
    variables = site.environment | {
        "DIGIT_HOME": str(home),
        "DIGIT_PYTHON": "\n".join([*site.container, python]),
        "DIGIT_MODULES": "\n".join(site.modules),
        "DIGIT_INTERFACE": site.interface or "",
        "DIGIT_STATE": str(folder / "steps" / f"{step.name}.json"),
    }
    script = str(home / "slurm" / f"{step.script}.sbatch")
    return [*command, *site.options, script, *step.arguments], {k: v for k, v in variables.items() if v}
