"""Steps side by side: order, failure, a folder that was moved; and the table that is made of them."""

import sys
import time
from pathlib import Path

import pytest

from digit_ds.demo.steps import Step, claim, run_steps
from digit_ds.demo.table import FIRST_STAGE, MODELS, ROWS, Study, _over_seeds, as_markdown
from digit_ds.errors import UserError

MEET = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:])
own.touch()
deadline = time.time() + 30
while not other.exists():
    time.sleep(0.02)
    assert time.time() < deadline, "the other step is not running"
"""


def step(out: Path, name: str, code: str, *words: object, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, out, (sys.executable, "-c", code, *map(str, words)), needs)


def meeting(out: Path) -> list[Step]:
    """Two steps that end only side by side, and one that needs both; it stands first."""
    both = "import pathlib, sys; [pathlib.Path(name).rename(name + '-read') for name in sys.argv[1:]]"
    a, b = out / "a", out / "b"
    return [
        step(out, "last", both, a, b, needs=("one", "two")),
        step(out, "one", MEET, a, b),
        step(out, "two", MEET, b, a),
    ]


def test_steps_run_side_by_side_in_order_and_once_even_in_a_moved_folder(tmp_path, capsys):
    out = tmp_path / "out"
    claim(out, "settings.json", {"small": False})
    assert run_steps(meeting(out), jobs=2)
    assert (out / "a-read").exists() and (out / "b-read").exists()
    assert f"[3/3] last -> {out / 'logs' / 'last.log'}" in capsys.readouterr().out
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    out.rename(moved)
    claim(moved, "settings.json", {"small": False})
    assert not run_steps(meeting(moved), jobs=2), "nothing is left to do"
    assert str(tmp_path) not in (moved / "steps" / "last.json").read_text()
    with pytest.raises(UserError, match="is of another version"):
        run_steps([step(moved, "one", "pass")])
    with pytest.raises(UserError, match="holds a demo run with"):
        claim(moved, "settings.json", {"small": True})


def test_a_failing_step_stops_the_others_and_is_named(tmp_path):
    told = "import pathlib, signal, sys, time\n"
    told += "def stop(*_): pathlib.Path(sys.argv[1]).with_name('told').touch(); sys.exit(75)\n"
    told += "signal.signal(signal.SIGTERM, stop); pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    fails = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.02)\n"
    fails += "print('no good'); sys.exit(3)"
    runs = tmp_path / "runs"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"fails: ended with status 3 \(.*fails\.log\)"):
        run_steps([step(tmp_path, "runs", told, runs), step(tmp_path, "fails", fails, runs)], jobs=2)
    assert time.monotonic() - start < 50
    assert (tmp_path / "told").exists()
    assert (tmp_path / "logs" / "fails.log").read_text() == "no good\n"
    assert not (tmp_path / "steps" / "runs.json").exists()


def test_the_tables_steps_wait_for_what_they_read(tmp_path):
    study = Study(tmp_path)
    for model in MODELS:
        for rate, nats in (("1e-3", 3.0), ("2e-3", 1.0), ("4e-3", 2.0)):
            run = tmp_path / "runs" / f"search-{model}-{rate}"
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text(f'{{"step": 9, "validation_nll": {nats}}}\n{{"step": 10}}\n')
    rates = study.rates()
    assert set(rates.values()) == {"2e-3"}
    scales = dict.fromkeys(FIRST_STAGE, 2.5)
    made = [*study.stages.shared(), *study.search(), *study.train(rates, [0, 2]), *study.score(scales, [0, 2])]
    names = [step.name for step in made]
    assert len(set(names)) == len(names)
    reads = {step.name: " ".join(step.command) for step in made}
    for step in made:
        assert set(step.needs) <= set(names[: names.index(step.name)])
    for model in FIRST_STAGE:  # chosen with the models of the search, which no row shows
        assert f"models/search-{model}-2e-3" in reads[f"guidance-{model}"]
        assert not any("search-" in words for name, words in reads.items() if name.startswith(("sample-", "probe-")))
    # Two rows differ in guidance alone, two seeds in the seed, the two orders in the order.
    guided = reads["sample-vq-guided-2"].replace("--guidance 2.5", "--guidance 1.0")
    assert reads["sample-vq-unguided-2"] == guided.replace("vq-guided", "vq-unguided")
    assert reads["pixel_nar-2"] == reads["pixel_nar-0"].replace("nar-0", "nar-2").replace("seed=0", "seed=2")
    order = " training.order=random training.order_anneal=[750,1125]"
    assert reads["random_prior-0"] == reads["prior-0"].replace("runs/prior", "runs/random_prior") + order


def test_mean_and_deviation_over_seeds_as_written():
    one = _over_seeds([5], lambda seed: {"x": float(seed)})["x"]
    assert one == {"values": [5.0], "mean": 5.0, "std": None}
    three = _over_seeds([1, 2, 6], lambda seed: {"x": seed / 100})["x"]
    assert three["mean"] == pytest.approx(0.03) and three["std"] == pytest.approx(0.0264575, rel=1e-5)
    size = {"parameters": 1234, "layers": 4, "width": 128, "steps": 800, "images_a_step": 64, "learning_rate": 2e-3}
    figures = {"class_accuracy": three, "fid": one}
    text = as_markdown(
        {
            "seeds": [1, 2, 6],
            "samples_per_seed": 500,
            "reference_samples": 4000,
            "temperature": 0.9,
            "guidance": dict.fromkeys(FIRST_STAGE, 2.5),
            "nats": {model: {"token": one} for model in MODELS} | {"prior": {"image": one}},
            "models": dict.fromkeys(MODELS, size),
            "rows": {row.name: figures for row in ROWS},
            "probe": {model: {"accuracy": three} for model in FIRST_STAGE},
            "real_held_out": {"class_accuracy": 0.98, "fid": 3.21, "samples": 360},
        }
    )
    assert "| prior over discriminative tokens + NAR decoder | none | 3.0 ± 2.6 | 5.00 |\n" in text
    assert "| VQ baseline | 2.5 | 3.0 ± 2.6 |" in text
    assert "| held-out digits, rebuilt by the NAR decoder |  | 3.0 ± 2.6 | 5.00 |\n" in text
    assert "| real held-out digits | | 98.0 | 3.21 |\n" in text
    assert "| prior over discriminative tokens | 1,234 | 4 x 128 | 800 x 64 | 0.002 | 3.0 ± 2.6 | 5.0 |\n" in text
    assert "| AR decoder | 1,234 | 4 x 128 | 800 x 64 | 0.002 |  |  |\n" in text
