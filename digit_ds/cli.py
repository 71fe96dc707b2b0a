"""The ``digit-ds`` command: each verb is one call into the package.

Rooms are imported by the verb that needs them, so that ``--help`` and a misspelt recipe answer at once.
"""

import argparse
from collections.abc import Sequence
from functools import partial

from digit_ds.errors import run_command
from digit_ds.evaluation.options import add_reference_options


def _train(options: argparse.Namespace) -> None:
    from digit_ds.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)  # before the imports that take seconds

    from digit_ds.training.loop import train

    train(recipe, *_preview(recipe))


def _preview(recipe):
    """What training calls for a grid of samples and for figures; packages of one layer do not import each other."""
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
    return grid, lambda model: fid.figures(preview.pictures(model, wanted.fid_samples))


def _estimate(options: argparse.Namespace) -> None:
    from digit_ds.config import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)

    from digit_ds.training.estimate import estimate

    estimate(recipe, options.gpus, options.mfu)


def _export(options: argparse.Namespace) -> None:
    from digit_ds.training.export import export

    export(options.run, options.out, ema=options.ema)


def _sample(options: argparse.Namespace) -> None:
    from digit_ds.generation.sample import sample
    from digit_ds.generation.settings import Decoding, Guidance

    guidance = Guidance(options.guidance, options.guidance_schedule, tuple(options.guidance_interval))
    sample(
        options.out,
        prior=options.prior,
        pixel_decoder=options.decoder,
        vqgan=options.vqgan,
        vqgan_config=options.vqgan_config,
        count=options.count,
        per_class=options.per_class,
        classes=options.classes,
        prior_decoding=Decoding(options.temperature, options.top_k, options.top_p, guidance),
        pixel_decoding=Decoding(
            options.decoder_temperature,
            options.decoder_top_k,
            options.decoder_top_p,
            steps=options.steps,
            choice_temperature=options.choice_temperature,
        ),
        seed=options.seed,
        batch=options.batch,
        precision=options.precision,
        vqgan_precision=options.vqgan_precision,
        vqgan_compile=options.vqgan_compile,
        adm_array=options.npz,
        from_images=options.from_images,
        encoder=options.encoder,
        num_heads=options.num_heads,
        codebook=options.codebook,
        resize=options.resize,
        from_tokens=options.from_tokens,
        keep=options.keep,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from digit_ds.evaluation.fidelity import evaluate

    evaluate(
        options.generated,
        options.reference,
        options.out,
        inception_weights=options.inception_weights,
        features=options.features,
        precision_recall=options.precision_recall,
        preparation=options.preparation,
        size=options.size,
        classifier=options.classifier,
        labels=options.labels,
        cache=options.cache,
        batch=options.batch,
    )


def _probe(options: argparse.Namespace) -> None:
    from digit_ds.evaluation.linear_probe import probe

    probe(
        options.model,
        options.train,
        options.val,
        options.out,
        passes=options.passes,
        batch=options.batch,
        learning_rates=options.learning_rates,
        seed=options.seed,
    )


def _doctor(options: argparse.Namespace) -> None:
    from digit_ds.health.doctor import doctor

    doctor(options.folder, options.shards, options.timeout)


def _demo(options: argparse.Namespace) -> None:
    from digit_ds.demo.run import run

    run(options.out, small=options.small)


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields of the recipe to change")


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, help="folder to write: images/, tokens.npz, grid.png, manifest.json")
    parser.add_argument("--prior", help="model directory of a prior, or of a VQ baseline (which needs no --decoder)")
    parser.add_argument("--decoder", help="model directory of an AR or NAR pixel decoder")
    parser.add_argument("--vqgan", required=True, help="VQGAN checkpoint")
    parser.add_argument("--vqgan-config", help="taming-style YAML (default: MAGE's)")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--count", type=int, help="number of pictures, classes in turn")
    number.add_argument("--per-class", type=int, help="pictures of each class")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="labels or names to draw (default: all); of given pictures: theirs",
    )
    parser.add_argument("--seed", type=int, default=0, help="each picture derives its own from this (default: 0)")
    parser.add_argument(
        "--batch",
        type=int,
        help="pictures a process computes together (in float64, the CPU's default, it changes no picture)",
    )
    parser.add_argument("--precision", choices=["float64", "float32", "bfloat16"], help="of the transformers")
    parser.add_argument(
        "--vqgan-precision", choices=["float32", "float16", "bfloat16"], default="float32", help="of the VQGAN"
    )
    parser.add_argument(
        "--vqgan-compile",
        action="store_true",
        help="compile its decoder, for thousands of pictures on a GPU",
    )
    parser.add_argument("--npz", action="store_true", help="also write samples.npz in the layout of ADM's evaluator")

    prior = parser.add_argument_group("drawing from the prior (published: top-k 200 for base, 400 for large)")
    prior.add_argument("--temperature", type=float, default=1.0)
    prior.add_argument("--top-k", type=int)
    prior.add_argument("--top-p", type=float)
    prior.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance scale; 1: none")
    prior.add_argument("--guidance-schedule", choices=["constant", "linear", "cosine"], default="constant")
    prior.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"))

    decoder = parser.add_argument_group("drawing from the pixel decoder (published: top-p 0.8 for AR; 8 steps for NAR)")
    decoder.add_argument("--decoder-temperature", type=float, default=1.0)
    decoder.add_argument("--decoder-top-k", type=int)
    decoder.add_argument("--decoder-top-p", type=float)
    decoder.add_argument("--steps", type=int, default=8, help="iterations of a NAR decoder")
    decoder.add_argument("--choice-temperature", type=float, default=4.5, help="noise on a NAR decoder's confidence")

    given = parser.add_argument_group("starting from given pictures or tokens")
    given.add_argument("--from-images", metavar="DIR", help="reconstruct (or with --keep complete) these pictures")
    given.add_argument("--encoder", help="encoder weights for --from-images")
    given.add_argument("--num-heads", type=int, help="of that encoder (default: width // 64)")
    given.add_argument("--codebook", help="codebook for --from-images")
    given.add_argument("--resize", type=int, help="their short side before the centre is cut out (default: the cut's)")
    given.add_argument("--from-tokens", metavar="NPZ", help="first-stage tokens, such as a job's tokens.npz")
    given.add_argument("--keep", type=int, help="leading tokens to keep; the prior writes the rest")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--generated", required=True, help="folder of a sampling job or of pictures, or .npz in ADM's layout"
    )
    parser.add_argument("--reference", required=True, help="the same, or .npz of statistics (mu, sigma)")
    parser.add_argument("--out", required=True, help="JSON file to write")
    add_reference_options(parser)
    parser.add_argument("--precision-recall", action="store_true", help="also precision and recall")
    parser.add_argument("--classifier", help="feature network that judges whether samples show the class asked for")
    parser.add_argument("--labels", help="manifest.json of the sampling job, for --classifier")
    parser.add_argument("--cache", help="folder for features and statistics, named by content")


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="model directory of a prior or VQ baseline")
    parser.add_argument("--train", required=True, help="labelled token shards; their views are the augmentation")
    parser.add_argument("--val", required=True, help="labelled token shards to report accuracy on")
    parser.add_argument("--out", required=True, help="folder for probe.json and probe.png")
    parser.add_argument("--passes", type=int, default=30, help="passes over all training samples (default: 30)")
    parser.add_argument("--batch", type=int, default=256, help="samples a step over all processes (default: 256)")
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.4, 0.8], help="trained side by side"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of samples")


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
    estimate = verb("estimate", _estimate, "parameters, memory and hours of a recipe, before anything is allocated")
    _recipe_arguments(estimate)
    estimate.add_argument("--gpus", type=int, default=1, metavar="N", help="devices of the run (default: 1)")
    estimate.add_argument("--mfu", type=float, default=0.4, help="share of peak assumed for the hours (default: 0.4)")

    export = verb("export", _export, "write the released model directory of a run")
    export.add_argument("run", help="run directory, or one checkpoint inside it")
    export.add_argument("out", help="model directory to write (config.json, model.safetensors)")
    export.add_argument("--ema", action="store_true", help="the moving average instead of the weights themselves")

    _sample_arguments(
        verb("sample", _sample, "pictures: prior -> pixel decoder -> VQGAN; continues an interrupted job")
    )

    _evaluate_arguments(verb("evaluate", _evaluate, "FID, Inception Score, precision and recall, class accuracy"))
    _probe_arguments(verb("probe", _probe, "linear classifiers on the hidden states of every layer of a frozen prior"))

    doctor = verb("doctor", _doctor, "check this machine, or under srun or torchrun this cluster, before a long run")
    doctor.add_argument("--folder", default=".", help="where runs will be written (default: here)")
    doctor.add_argument("--shards", help="token shards to check a sample of")
    doctor.add_argument("--timeout", type=float, default=60, help="seconds after which a rank counts as lost")

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
