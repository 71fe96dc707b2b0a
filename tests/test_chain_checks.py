"""What a dry run refuses, because the chain would fail at it hours later."""

from collections.abc import Callable

import pytest
import yaml
from test_slurm_submit import Submission

from digit_ds.cli import main
from digit_ds.cluster.chain import Chain, Site, load, steps
from digit_ds.cluster.checks import load_checked
from digit_ds.cluster.costs import costs
from digit_ds.cluster.limits import seconds_of
from digit_ds.errors import UserError

HOUR, DAY = 3600, 86400


@pytest.fixture
def files(tmp_path, monkeypatch) -> Submission:
    monkeypatch.chdir(tmp_path)  # the checks change the working directory
    return Submission(tmp_path, None)


def refused(files: Submission, capsys) -> list[str]:
    """The problems that a dry run prints; empty if it accepts the files."""
    chain, site = files.folder / "chain.yaml", files.folder / "site.yaml"
    chain.write_text(yaml.safe_dump(files.chain))
    site.write_text(yaml.safe_dump(files.site))
    try:
        load_checked(chain, site, every=True)
    except UserError as error:
        return [*capsys.readouterr().err.removesuffix("\n").replace("error: ", "").splitlines(), str(error)]
    return []


def test_what_works_is_accepted(files, capsys):
    files.site |= {"time": "1-12:30", "memory": "400G", "grace_seconds": DAY}
    files.chain["tokenize"]["image_size"] = 224
    files.chain["evaluate"] |= {"preparation": "adm", "size": 224}
    assert refused(files, capsys) == []


def without_pictures(files: Submission) -> None:
    (files.folder / "images" / "a.png").unlink()


def evaluated(**options) -> Callable[[Submission], None]:
    return lambda files: files.chain["evaluate"].update(options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_pictures, "chain.yaml: features.images is {}/images: {}/images: holds no images"),
        (without_pictures, "chain.yaml: evaluate.reference is {}/images: {}/images: holds no"),
        (lambda f: f.chain["tokenize"].pop("vqgan"), "chain.yaml: tokenize.vqgan is not set, expected a VQGAN check"),
        (
            lambda f: f.chain["tokenize_validation"].pop("vqgan"),
            "chain.yaml: tokenize_validation.vqgan is not set, expected a VQGAN checkpoint: decoder (model.kind ar)",
        ),
        (lambda f: f.site.update(time="24h"), "site.yaml: time is '24h', expected: minutes, minutes:seconds, hours:"),
        (lambda f: f.site.update(time=86400), "site.yaml: time is 86400, expected: a time in quotes"),
        (lambda f: f.site.update(steps={"probe": {"time": "1d"}}), "site.yaml: steps.probe.time is '1d', expected: "),
        (lambda f: f.site.update(memory="lots"), "site.yaml: memory is 'lots', expected: a whole number in quotes"),
        (
            lambda f: f.site.update(time="24:00:00", grace_seconds=90000),
            "site.yaml: grace_seconds is 90000, expected less than time '24:00:00'",
        ),
        (
            lambda f: f.site.update(steps={"probe": {"time": "5"}}, time="6", grace_seconds=300),
            "site.yaml: grace_seconds is 300, expected less than steps.probe.time '5'",
        ),
        (
            lambda f: f.chain.update(
                tokenize=f.chain["tokenize"] | {"image_size": 256},
                evaluate=f.chain["evaluate"] | {"preparation": "adm", "size": 224},
            ),
            "chain.yaml: evaluate.size is 224, expected 256, the side of the samples in pixels",
        ),
        (evaluated(preparation="adm"), "chain.yaml: evaluate.size is not set, expected the side"),
        (lambda f: f.chain["kmeans"].update(clusters=-5), "chain.yaml: kmeans: clusters is -5, expected: greater than"),
    ],
)  # fmt: skip
def test_each_is_one_line_with_file_and_key(files, capsys, change, words):
    change(files)
    expected = words.replace("{}", str(files.folder))
    assert [line.partition(expected)[1] for line in refused(files, capsys)].count(expected) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nodes": 7, "tasks_per_node": 8}, "training.micro_batch 16 x 56 data-parallel ranks; nodes: 4 or 8 can"),
        (
            {"nodes": 8, "tasks_per_node": 800},
            "x 6400 data-parallel ranks; gpus_per_node (tasks_per_node): 8 can",
        ),
    ],
)
def test_numbers_of_nodes_that_work_are_named(files, capsys, change, expected):
    files.chain["prior"]["overrides"] = {"training.micro_batch": 16}
    files.site |= change
    (line,) = [line for line in refused(files, capsys) if "prior on" in line]
    assert expected in line


def test_hours_of_training_are_those_of_plan(files, capsys):
    """base_prior.yaml on 64 GPUs: the dry run's hours and plan's first layout, which is the recipe's."""
    overrides = {"training.micro_batch": 16, "deepspeed": "zero2_overlap.json"}
    files.chain["prior"] = {"recipe": "base_prior.yaml", "overrides": overrides}
    files.chain["kmeans"]["clusters"] = 16384
    files.site |= {"nodes": 8, "gpus_per_node": 8}
    assert not [line for line in refused(files, capsys) if "prior" in line]
    chain, site = load(files.folder / "chain.yaml", Chain), load(files.folder / "site.yaml", Site)
    hours = costs(chain, site, steps(chain), 1_281_167)["prior"].hours
    with pytest.raises(SystemExit):
        main(["plan", "base_prior.yaml", *["--gpus", "64", "--images", "1281167", "--grid", "16", "--codes", "16384"]])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = next(row for row in rows if row[:5] == ["1", "no", "zero2_overlap.json", "16", "none"])
    assert f"{hours:.1f}" == row[-1]


def test_published_dinov2_makes_pictures_of_256_pixels(files, capsys):
    (files.folder / "dinov2_vitb14_reg4_pretrain.pth").write_text("not read here")
    files.chain["tokenize"]["encoder"] = str(files.folder / "dinov2_vitb14_reg4_pretrain.pth")
    files.chain["evaluate"] |= {"preparation": "adm", "size": 224}
    (line,) = refused(files, capsys)
    assert line.endswith("evaluate.size is 224, expected 256, the side of the samples in pixels")


def test_missing_sections_and_wrong_keys_of_both_files_are_all_named(files, capsys):
    del files.chain["decoder"], files.chain["sample"]
    files.site |= {"time": "24h", "memory": "lots", "node": 3}
    lines = refused(files, capsys)
    for words in (
        "chain.yaml: key 'decoder' is missing",
        "chain.yaml: key 'sample' is missing",
        "site.yaml: unknown key 'node'",
        "site.yaml: time is '24h'",
        "site.yaml: memory is 'lots'",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert len(lines) == 5


def test_a_value_of_no_accepted_type_is_one_problem(files, capsys):
    files.chain["features"]["images"] = {"a": 1}
    files.chain["kmeans"]["clusters"] = [[1]]
    lines = refused(files, capsys)
    assert ["features.images is {'a': 1}, expected" in lines[0], "kmeans.clusters is [[1]]" in lines[1]] == [True, True]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        *(("90", 5400), ("1:30", 90), ("24:00:00", DAY), ("2-12", 2 * DAY + 12 * HOUR)),
        *(("1-00:30", DAY + 1800), ("1-01:02:03", DAY + HOUR + 123), ("0", float("inf")), ("UNLIMITED", float("inf"))),
    ],
)
def test_time_limits_are_those_of_sbatch(limit, seconds):
    assert seconds_of(limit) == seconds
