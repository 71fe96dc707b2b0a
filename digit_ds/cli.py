"""The ``digit-ds`` command: each verb is one settings class and one call into the package.

Packages are imported by the verb that needs them, so that ``--help`` and a misspelt option answer at once.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from digit_ds import __version__
from digit_ds.cluster.settings import SubmitSettings
from digit_ds.clustering.settings import KMeansSettings
from digit_ds.command_line import Parser, add_options, from_options
from digit_ds.demo.settings import DemoSettings
from digit_ds.errors import run_command
from digit_ds.evaluation.settings import EvaluateSettings, ProbeSettings, StatisticsSettings
from digit_ds.generation.settings import SampleSettings
from digit_ds.health.settings import DoctorSettings
from digit_ds.model.settings import FromMegatron, FromOfficial, ToMegatron, ToOfficial
from digit_ds.preparation.settings import FeatureSettings, SplitSettings, TokenSettings, VerifySettings
from digit_ds.publishing.settings import FetchSettings, PublishSettings
from digit_ds.settings import Section
from digit_ds.training.settings import EstimateSettings, ExportSettings, PlanSettings, TrainSettings
from digit_ds.tuning.settings import GuidanceSettings


def _train(settings: TrainSettings) -> None:
    from digit_ds.config import load_recipe

    # before the imports that take seconds
    recipe = load_recipe(settings.recipe, [*settings.overrides, *settings.change])

    from digit_ds.training.loop import train
    from digit_ds.training.resume import Changes

    keys = tuple(change.partition("=")[0] for change in settings.change)
    grid, figures = _preview(recipe)
    train(recipe, grid, figures, Changes(keys, settings.rollback, settings.skip_batches))


def _preview(recipe):
    """The functions that training calls for previews; packages of one layer do not import each other."""
    wanted = recipe.preview
    if wanted.vqgan is None:
        return None, None
    from digit_ds.generation.preview import Preview
    from digit_ds.generation.settings import Decoding

    decodings = Decoding(top_k=wanted.top_k), Decoding(top_p=wanted.decoder_top_p)
    preview = Preview(wanted.vqgan, wanted.vqgan_config, wanted.partner, *decodings)
    grid = partial(preview.grid, rows=wanted.rows, columns=wanted.columns)
    if not wanted.fid_samples:
        return grid, None
    from digit_ds.evaluation.fidelity import OnlineFid

    fid = OnlineFid(wanted.fid_reference, inception_weights=wanted.fid_inception_weights, features=wanted.fid_features)
    return grid, partial(_online_fid, preview, fid, wanted.fid_samples)


def _online_fid(preview, fid, count, model):
    """Pickled to the process that draws, as is all that it needs."""
    return fid.figures(preview.pictures(model, count))


def _estimate(settings: EstimateSettings) -> None:
    from digit_ds.config import load_recipe

    recipe = load_recipe(settings.recipe, settings.overrides)

    from digit_ds.training.estimate import estimate

    estimate(settings, recipe)


def _plan(settings: PlanSettings) -> None:
    from digit_ds.config import load_recipe

    recipe = load_recipe(settings.recipe, settings.overrides)

    from digit_ds.training.plan import plan

    plan(settings, recipe)


def _export(settings: ExportSettings) -> None:
    from digit_ds.training.export import export

    export(settings)


def _from_checkpoint(settings: ExportSettings) -> None:
    _export(settings)
    print(settings.out)


def _split(settings: SplitSettings) -> None:
    from digit_ds.preparation.split import split_images

    split_images(settings)


def _features(settings: FeatureSettings) -> None:
    from digit_ds.preparation.features import extract_features

    extract_features(settings)


def _kmeans(settings: KMeansSettings) -> None:
    from digit_ds.clustering.kmeans import train_kmeans

    train_kmeans(settings)


def _tokenize(settings: TokenSettings) -> None:
    from digit_ds.preparation.tokens import tokenize_images

    tokenize_images(settings)


def _verify(settings: VerifySettings) -> None:
    from digit_ds.preparation.verify import describe, verify_shards

    print(f"{settings.shards}: complete and undamaged\n{describe(verify_shards(settings.shards))}")
    if settings.again:
        from digit_ds.preparation.recheck import tokenize_again

        tokenize_again(settings)


def _sample(settings: SampleSettings) -> None:
    from digit_ds.generation.sample import sample

    sample(settings)


def _evaluate(settings: EvaluateSettings) -> None:
    from digit_ds.evaluation.fidelity import evaluate

    evaluate(settings)


def _statistics(settings: StatisticsSettings) -> None:
    from digit_ds.evaluation.fidelity import save_statistics

    save_statistics(settings)


def _guidance(settings: GuidanceSettings) -> None:
    from digit_ds.tuning.guidance import search_guidance

    search_guidance(settings)


def _probe(settings: ProbeSettings) -> None:
    from digit_ds.evaluation.linear_probe import probe

    probe(settings)


def _from_official(settings: FromOfficial) -> None:
    from digit_ds.model.official import from_official

    spec = from_official(settings)
    print(f"{settings.out}: {spec.kind}, {spec.layers} layers of width {spec.width}, {spec.classes} classes")


def _to_official(settings: ToOfficial) -> None:
    from digit_ds.model.official import to_official

    lacking = to_official(settings)
    if lacking:
        print(
            f"note: {settings.out} lacks the {', '.join(lacking)} that fairseq expects inside; "
            "give the files with the options of this command",
            file=sys.stderr,
        )
    print(settings.out)


def _to_megatron(settings: ToMegatron) -> None:
    from digit_ds.model.partition import to_megatron

    to_megatron(settings)
    print(f"{settings.out}: {settings.tensor_parallel} tensor-parallel parts")


def _from_megatron(settings: FromMegatron) -> None:
    from digit_ds.model.partition import from_megatron

    from_megatron(settings)
    print(settings.out)


def _fetch(settings: FetchSettings) -> None:
    from digit_ds.publishing.fetch import fetch

    fetch(settings)


def _publish(settings: PublishSettings) -> None:
    from digit_ds.publishing.publish import publish

    publish(settings)


def _doctor(settings: DoctorSettings) -> None:
    from digit_ds.health.doctor import doctor

    doctor(settings)


def _submit(settings: SubmitSettings) -> None:
    from digit_ds.cluster.submit import submit

    submit(settings)


def _demo(settings: DemoSettings) -> None:
    from digit_ds.demo.run import run as run_demo

    run_demo(settings)


Verb = tuple[type[Section], Callable[[Any], None]]
CONVERSIONS: dict[str, Verb] = {
    "from-official": (FromOfficial, _from_official),
    "to-official": (ToOfficial, _to_official),
    "to-megatron": (ToMegatron, _to_megatron),
    "from-megatron": (FromMegatron, _from_megatron),
    "from-checkpoint": (ExportSettings, _from_checkpoint),
}
VERBS: dict[str, Verb | dict[str, Verb]] = {
    "split": (SplitSettings, _split),
    "features": (FeatureSettings, _features),
    "kmeans": (KMeansSettings, _kmeans),
    "tokenize": (TokenSettings, _tokenize),
    "verify": (VerifySettings, _verify),
    "train": (TrainSettings, _train),
    "estimate": (EstimateSettings, _estimate),
    "plan": (PlanSettings, _plan),
    "export": (ExportSettings, _export),
    "sample": (SampleSettings, _sample),
    "evaluate": (EvaluateSettings, _evaluate),
    "statistics": (StatisticsSettings, _statistics),
    "guidance": (GuidanceSettings, _guidance),
    "probe": (ProbeSettings, _probe),
    "convert": CONVERSIONS,
    "fetch": (FetchSettings, _fetch),
    "publish": (PublishSettings, _publish),
    "doctor": (DoctorSettings, _doctor),
    "submit": (SubmitSettings, _submit),
    "demo": (DemoSettings, _demo),
}
"""Settings and function of each verb, in the order of the pipeline."""
_CONVERT = "Convert models between the published format, released model directories and tensor-parallel parts."


def _text(section: type[Section]) -> str:
    """What a verb does: the docstring of its settings in one line."""
    return " ".join((section.__doc__ or "").replace("``", "").split())


def _add(parser: argparse.ArgumentParser, verb: Verb | Mapping[str, Any]) -> None:
    """The options of a verb, or the verbs below it."""
    if isinstance(verb, Mapping):
        children = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)
        for name, child in verb.items():
            text = _CONVERT if isinstance(child, dict) else _text(child[0])
            shown = text.split(". ")[0].removesuffix(".").replace("%", "%%")
            _add(children.add_parser(name, help=shown, description=text), child)
    else:
        add_options(parser, verb[0])
        parser.set_defaults(chosen=verb)


def run(arguments: list[str], verb: str | None = None) -> None:
    """Run a command line; with ``verb`` only the arguments after it, as the scripts in ``tools/`` take them.

    Raises:
        UserError: the command line is wrong, or the verb refuses.
    """
    if verb is None:
        parser = Parser(prog="digit-ds", description="Train and run DiGIT, from images to FID.")
        parser.add_argument("--version", action="version", version=f"digit-ds {__version__}")
        _add(parser, VERBS)
    else:
        chosen = VERBS[verb]
        text = _CONVERT if isinstance(chosen, dict) else _text(chosen[0])
        parser = Parser(description=text)
        _add(parser, chosen)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # The deepspeed launcher puts this before the verb; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    section, function = options.chosen
    function(from_options(section, options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``digit-ds`` and ``python -m digit_ds``."""
    run_command(run, arguments)
