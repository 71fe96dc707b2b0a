"""slurm/digits.yaml and docs/cluster.md against the steps of digit_ds/demo: the chain has the demo's pipeline,
at the scale of digits_chain.py.

That the same commands give the same figures on two nodes was measured with tests/measure_cluster.py.
"""

import re
from pathlib import Path

import pytest
import yaml
from digits_chain import DIGITS

from digit_ds.cluster.chain import Chain, load
from digit_ds.cluster.chain import steps as chain_steps
from digit_ds.config import load_recipe
from digit_ds.demo.run import steps as demo_steps

HOME = Path(__file__).resolve().parents[1]

DEMO = {step.name: list(step.command[1:]) for step in demo_steps(Path("/demo"), DIGITS)}
CHAIN = {step.name: step for step in chain_steps(load(HOME / "slurm" / "digits.yaml", Chain))}


def options(words: list[str]) -> dict[str, str]:
    """``--name value`` pairs; files and folders, which lie elsewhere, by their being there."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, word = word, "given"
        found[name] = "a path" if "/" in word else word
    return found


@pytest.mark.parametrize(
    ("step", "of_demo"),
    [
        ("features", "features"),
        ("kmeans", "kmeans"),
        ("tokenize", "tokens_train"),
        ("tokenize_validation", "tokens_val"),
        ("sample", "sample"),
        ("evaluate", "evaluate"),
        ("probe", "probe"),
    ],
)
def test_a_step_has_the_demos_options(step, of_demo):
    arguments = list(CHAIN[step].arguments)
    if not arguments[0].startswith("--"):  # tokenize.sbatch names its shards first
        arguments = ["--out", *arguments]
    command = DEMO[of_demo][3 if DEMO[of_demo][0] == "-m" else 1 :]
    assert options(arguments) == options(command)


@pytest.mark.parametrize(("step", "of_demo"), [("prior", "prior"), ("decoder", "pixel_ar")])
def test_a_training_is_the_demos_but_for_its_micro_batch(step, of_demo):
    recipes = []
    for words in (CHAIN[step].arguments[2:], DEMO[of_demo][3:]):
        path, *overrides = words
        recipe = load_recipe(path, overrides).model_dump()
        recipe["training"].pop("micro_batch")
        recipes.append({key: value for key, value in recipe.items() if key not in ("run", "data")})
    assert recipes[0] == recipes[1]


def test_the_page_makes_the_demos_stand_ins():
    page = (HOME / "docs" / "cluster.md").read_text()
    typed = [line.split()[1:] for line in re.findall(r".*-m digit_ds\.demo\..*", page)]
    for words, name in zip(typed, ("digits", "judge", "encoder", "vqgan"), strict=True):
        assert words[:2] == DEMO[name][:2] and options(words[2:]) == options(DEMO[name][2:])


def test_what_the_chain_reads_is_what_the_page_makes():
    page = (HOME / "docs" / "cluster.md").read_text()
    values = yaml.safe_load((HOME / "slurm" / "digits.yaml").read_text())
    read = {value for section in values.values() if isinstance(section, dict) for value in section.values()
            if isinstance(value, str) and "stand_ins" in value}  # fmt: skip
    assert read == set(re.findall(r"runs/digits/stand_ins/\S+", page))
