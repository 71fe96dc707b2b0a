"""The ``digit-ds`` command: each verb is one call into the package.

Rooms are imported by the verb that needs them, so that ``--help`` and a misspelt recipe answer at once.
"""

import argparse
from collections.abc import Sequence

from digit_ds.errors import run_command


def _train(options: argparse.Namespace) -> None:
    from digit_ds.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # before the imports that take seconds

    from digit_ds.training.loop import train

    train(recipe)


def _estimate(options: argparse.Namespace) -> None:
    from digit_ds.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)

    from digit_ds.training.estimate import estimate

    estimate(recipe)


def _export(options: argparse.Namespace) -> None:
    from digit_ds.training.export import export

    export(options.run, options.out, ema=options.ema)


def _demo(options: argparse.Namespace) -> None:
    from digit_ds.demo.run import run

    run(options.out, small=options.small)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields of the recipe to change")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="digit-ds", description="Train and run DiGIT, from token shards to FID.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # The deepspeed launcher puts this before the verb; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, function, text: str) -> argparse.ArgumentParser:
        child = verbs.add_parser(name, help=text, description=text)
        child.set_defaults(function=function)
        return child

    _recipe_arguments(verb("train", _train, "train a model from token shards; resumes by itself"))
    _recipe_arguments(verb("estimate", _estimate, "parameters and memory of a recipe, before anything is allocated"))

    export = verb("export", _export, "write the released model directory of a run")
    export.add_argument("run", help="run directory, or one checkpoint inside it")
    export.add_argument("out", help="model directory to write (config.json, model.safetensors)")
    export.add_argument("--ema", action="store_true", help="the moving average instead of the weights themselves")

    demo = verb("demo", _demo, "the whole pipeline on handwritten digits: pictures, figures and a report")
    demo.add_argument("--out", default="demo_out", help="folder for everything it makes (default: demo_out)")
    demo.add_argument("--small", action="store_true", help="a few steps of everything, to see that it runs")
    return parser


def _main(arguments: list[str]) -> int | None:
    options = _parser().parse_args(arguments)
    return options.function(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``digit-ds`` and ``python -m digit_ds``."""
    run_command(_main, arguments)
