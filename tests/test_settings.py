"""The bridge from settings to a command line and to YAML, held by a small class that has every kind of field."""

import argparse
from typing import Annotated, Literal

import pytest
from pydantic import Field

from digit_ds.command_line import Parser, add_options, from_options
from digit_ds.errors import UserError
from digit_ds.preparation.settings import FeatureSettings, TokenSettings
from digit_ds.settings import Option, PathText, Section, ShortPrecision
from digit_ds.training.settings import EstimateSettings


class Drawing(Section):
    """What is drawn."""

    source: Annotated[PathText, Option(positional=True, metavar="DIR")]
    """Folder of pictures."""
    out: PathText
    """Folder to write."""
    count: int | None = Field(None, ge=1)
    """Pictures; default: all."""
    scale: float = Field(1.5, gt=0)
    """Share of 100 % that is kept."""
    classes: list[int] | None = None
    """Labels to draw."""
    interval: Annotated[tuple[float, float], Option(metavar=("FROM", "TO"))] = Field((0.0, 1.0), strict=False)
    """Where it acts."""
    flips: Annotated[bool, Option(name="flip")] = True
    """Whether pictures may be mirrored."""
    precision: Annotated[Literal["fp32", "bf16"], ShortPrecision, Option(group="arithmetic", aliases=("dtype",))] = (
        "fp32"
    )
    """Arithmetic."""


def parse(*words: str) -> Drawing:
    parser = Parser(prog="draw")
    add_options(parser, Drawing)
    return from_options(Drawing, parser.parse_args(["pictures", "--out", "o", *words]))


def test_every_kind_of_field_comes_from_the_command_line_and_from_yaml():
    words = ("--count", "3", "--scale", "2e-1", "--classes", "4", "2", "--interval", "0.25", "1", "--no-flip")
    settings = parse(*words, "--dtype", "bfloat16")
    expected = {"source": "pictures", "out": "o", "count": 3, "scale": 0.2, "classes": [4, 2], "flips": False}
    expected |= {"interval": (0.25, 1.0), "precision": "bf16"}
    assert settings.model_dump() == expected
    yaml = {**expected, "no_flip": True, "dtype": "bf16", "interval": [0.25, 1.0]}
    assert Drawing.read({key: value for key, value in yaml.items() if key not in ("flips", "precision")}) == settings
    assert parse().model_dump() == Drawing(source="pictures", out="o").model_dump()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "--count is 0, expected: greater than or equal to 1"),
        (["--count", "many"], "draw: argument --count: invalid int value: 'many'; see draw --help"),
        (["--scale", "nan"], "--scale is nan, expected: a finite number"),
        (["--scale=-inf"], "--scale is -inf, expected: a finite number"),
        (["--precision", "fp8"], "--precision is 'fp8', expected: 'fp32' or 'bf16'"),
        (["--flop"], "draw: unrecognized arguments: --flop; similar: --flip; see draw --help"),
        (["--xyz=1", "7"], "draw: unrecognized arguments: --xyz=1 7; see draw --help"),
        (["--clases", "1"], "draw: unrecognized arguments: --clases 1; similar: --classes; see draw --help"),
        (["--interval", "1"], "draw: argument --interval: expected 2 arguments; see draw --help"),
        (["--out", ""], "--out is '', expected: a path, not an empty text"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_option(words, message):
    with pytest.raises(UserError) as caught:
        parse(*words)
    assert str(caught.value) == message


@pytest.mark.parametrize(("word", "full"), [("--cou=3", "--count"), ("--co=3", "--count"), ("--count=3", None)])
def test_an_abbreviated_option_is_read_with_a_warning(word, full, capsys):
    assert parse(word).count == 3
    given = word.partition("=")[0]
    warned = f"warning: {given} is an abbreviation of {full}, expected the full name\n" if full else ""
    assert capsys.readouterr().err == warned


def test_an_option_of_a_verb_is_no_abbreviation_of_one_above_it(capsys):
    parser = Parser(prog="draws")
    parser.add_argument("--outermost")
    add_options(parser.add_subparsers(parser_class=Parser).add_parser("draw"), Drawing)
    assert parser.parse_args(["draw", "pictures", "--out", "o"]).out == "o"
    assert parser.parse_args(["draw", "pictures", "--ou", "o"]).out == "o"
    assert capsys.readouterr().err == "warning: --ou is an abbreviation of --out, expected the full name\n"


def test_a_misspelt_option_of_a_verb_names_the_help_of_the_verb():
    parser = Parser(prog="draws")
    add_options(parser.add_subparsers(parser_class=Parser).add_parser("draw"), Drawing)
    with pytest.raises(UserError) as caught:
        parser.parse_args(["draw", "pictures", "--out", "o", "--clases", "1"])
    assert (
        str(caught.value) == "draws draw: unrecognized arguments: --clases 1; similar: --classes; see draws draw --help"
    )


def test_a_misspelt_option_is_named_before_what_is_missing():
    parser = Parser(prog="draw")
    add_options(parser, Drawing)
    for words, message in (
        (["pictures", "--outt", "o"], "unrecognized arguments: --outt; similar: --out"),
        (["pictures"], "the following arguments are required: --out"),
        (["pictures", "--cou", "3"], "the following arguments are required: --out"),
    ):
        with pytest.raises(UserError) as caught:
            parser.parse_args(words)
        assert str(caught.value) == f"draw: {message}; see draw --help"


def test_a_wrong_positional_argument_has_the_name_of_the_help():
    parser = Parser(prog="draw")
    add_options(parser, Drawing)
    with pytest.raises(UserError, match=r"^DIR is '', expected: a path, not an empty text$"):
        from_options(Drawing, parser.parse_args(["", "--out", "o"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"out": "o"}, "chain.yaml: draw: key 'source' is missing"),
        (
            {"source": "s", "out": "o", "flop": 1},
            "chain.yaml: draw: unknown key 'flop', expected one of source, out, count, scale, classes, interval, flip, "
            "precision",
        ),
        (
            {"source": "s", "out": "o", "count": "3"},
            "chain.yaml: draw: count is '3', expected: a valid integer",
        ),
        (
            {"source": "s", "out": "o", "no_flip": 1},
            "chain.yaml: draw: flip is 1, expected: a valid boolean",
        ),
    ],
)
def test_what_is_wrong_in_yaml_is_one_line_with_the_key(values, message):
    with pytest.raises(UserError) as caught:
        Drawing.read(values, "chain.yaml: draw")
    assert str(caught.value) == message


class Expected(Section):
    """Values that are described when one of another kind is given."""

    share: float | None = Field(None, gt=0, le=1)
    labels: list[int] | None = None
    names: list[int | str] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.5}, "share is 1.5, expected: greater than 0 and less than or equal to 1"),
        ({"share": 0.0}, "share is 0.0, expected: greater than 0 and less than or equal to 1"),
        ({"labels": 1}, "labels is 1, expected: a list of integers"),
        ({"names": "ant"}, "names is 'ant', expected: a list of integers or strings"),
    ],
)
def test_what_is_expected_is_said_in_full(values, message):
    with pytest.raises(UserError) as caught:
        Expected.read(values)
    assert str(caught.value) == message


def test_help_comes_from_the_docstrings():
    parser = Parser(prog="draw", formatter_class=lambda prog: argparse.HelpFormatter(prog, width=120))
    add_options(parser, Drawing)
    text = parser.format_help()
    lines = [line.strip() for line in text.splitlines()]
    assert "--scale SCALE         Share of 100 % that is kept (default: 1.5)" in lines
    assert "--flip, --no-flip     Whether pictures may be mirrored (default: yes)" in lines
    assert "--interval FROM TO    Where it acts (default: 0.0 1.0)" in lines
    assert lines[lines.index("arithmetic:") + 1] == "--precision {fp32,bf16}"
    assert "--dtype" not in text


def test_records_of_jobs_begun_before_settings_had_classes_are_the_same():
    """What settings.json held for the defaults; another option at its default must not stop such a job."""
    common = {"flips": True, "seed": 0, "batch": 256, "precision": "fp32", "compile": False, "decoder": "cpu"}
    parts = {"images": "i", "encoder": "e", "out": "o"}
    features = {"points": None, "fraction": None, "dtype": "fp16"}
    assert FeatureSettings.read(parts).record() == common | features
    tokens = {"views": None, "crops": "training", "resize": None}
    assert TokenSettings.read(parts | {"codebook": "k"}).record() == common | tokens
    moved = {**parts, "out": "p", "workers": 3, "max_skipped": 0.5, "precision": "bfloat16"}
    assert FeatureSettings.read(moved).record() == common | features | {"precision": "bf16"}


@pytest.mark.parametrize(
    "words",
    [
        "r.yaml a.b=1 c=2 --gpus 2 --codes 3",
        "r.yaml --gpus 2 a.b=1 --codes 3 c=2",
        "--codes 3 --gpus 2 r.yaml a.b=1 c=2",
    ],
)
def test_overrides_may_stand_anywhere(words):
    parser = Parser(prog="digit-ds")
    verb = parser.add_subparsers(parser_class=Parser).add_parser("estimate")
    add_options(verb, EstimateSettings)
    settings = from_options(EstimateSettings, parser.parse_args(["estimate", *words.split()]))
    assert (settings.recipe, settings.overrides) == ("r.yaml", ["a.b=1", "c=2"])
    assert (settings.gpus, settings.codes) == (2, 3)
