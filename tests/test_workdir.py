"""Directories that a job writes: one protocol and one decision for all processes, even if their file systems differ."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import export, probe, sample, train_kmeans
from preparation_parts import call, make_codebook, make_encoder, make_images, start_ranks
from slurm_cluster import may_unshare
from small_models import write_models
from test_lock import holder
from training_parts import recipe, start, write_shards

from digit_ds import workdir
from digit_ds.errors import UserError, run_command
from digit_ds.files import write_atomically, write_json
from digit_ds.generation.job import SamplingJob
from digit_ds.generation.pictures import write_adm_array, write_png
from digit_ds.model.released import read_model, save_model
from digit_ds.model.weights import initial_state
from digit_ds.parallel.decide import agree, together
from digit_ds.parallel.launch import initialize
from digit_ds.training.loop import train
from digit_ds.workdir import WorkDirectory, is_begun


def ranks(folders: list[Path], work: Callable[[], object]) -> list[int]:
    """Exit statuses of a job whose rank r stands in ``folders[r]``: relative paths mean other files to each."""

    def stand() -> None:
        os.chdir(folders[int(os.environ["RANK"])])
        workdir.SEEN_SECONDS = 1.0
        initialize()
        run_command(lambda _: work() and None, [])

    processes = start_ranks(len(folders), stand)
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.fixture
def views(tmp_path) -> list[Path]:
    """Two folders, in which the same names may mean different files."""
    folders = [tmp_path / "zero", tmp_path / "one"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.fault(
    "rank 0 refuses (directory in use, other settings, not writable)",
    stage="every stage",
    outcome="all ranks leave; one line, printed once",
    status="2",
    lost="nothing",
)
def test_a_refusal_is_printed_once_and_ends_all(views, capfd):
    (views[0] / "out").mkdir()
    (views[0] / "out" / "letter.txt").touch()
    assert ranks(views, lambda: WorkDirectory("out", lambda: is_begun(Path("out"), None, {}))) == [2, 2]
    err = capfd.readouterr().err
    assert lines(err) == ["error: out: already holds other files, expected an empty or a new directory"]
    assert "Traceback" not in err
    assert not (views[1] / "out").exists()  # only rank 0 decides and makes directories


@pytest.mark.fault(
    "a rank does not see the output directory",
    stage="every stage",
    outcome="all ranks leave; one line names the rank and host",
    status="2",
    lost="nothing",
)
def test_a_rank_on_another_file_system_ends_all(views, capfd):
    assert ranks(views, lambda: WorkDirectory("out", lambda: None)) == [2, 2]
    (line,) = lines(capfd.readouterr().err)
    assert line.startswith("error: out: rank 1 of 2 on ") and "expected a file system that all processes share" in line
    assert not (views[0] / "out").exists()  # nothing was written


def test_a_file_that_one_rank_cannot_read_ends_all(views, capfd):
    (views[0] / "weights").touch()

    def read() -> None:
        with together():
            Path("weights").read_bytes()

    assert ranks(views, read) == [2, 2]
    (line,) = lines(capfd.readouterr().err)
    assert line == "error: weights: cannot be used (No such file or directory)"


@pytest.mark.fault(
    "ranks read different recipes, weights or settings",
    stage="every stage",
    outcome="all ranks leave; one line names the first difference",
    status="2",
    lost="nothing",
)
def test_ranks_that_read_different_files_end(views, capfd):
    for number, folder in enumerate(views):
        (folder / "seed").write_text(str(number))
    assert ranks(views, lambda: agree({"seed": Path("seed").read_text()}, "recipe")) == [2, 2]
    (line,) = lines(capfd.readouterr().err)
    assert line.startswith("error: recipe: rank 1 reads something other than rank 0 (seed: 1 and 0)")


@pytest.mark.parametrize("tool", ["extract_features", "tokenize_images"])
def test_offline_jobs_whose_ranks_see_different_files(tool, views, capfd):
    """Another encoder, and an output directory that on rank 1 is another job's."""
    encoder = make_encoder(views[0] / "encoder.pth")
    make_images(views[0] / "images", 4)
    make_codebook(views[0] / "km.npy", encoder)
    for name in ("images", "km.npy"):
        (views[1] / name).symlink_to(views[0] / name)
    make_encoder(views[1] / "encoder.pth", seed=1)
    make_codebook(views[1] / "own.npy", views[1] / "encoder.pth")
    arguments = ["--images", "images", "--encoder", "encoder.pth", "--out", "out", "--num-heads", "2"]
    arguments += ["--workers", "0"]
    arguments += ["--codebook", "km.npy"] if tool == "tokenize_images" else []

    def work() -> None:
        raise SystemExit(call(tool, *arguments))

    assert ranks(views, work) == [2, 2]
    captured = capfd.readouterr().err
    (line,) = lines(captured)
    assert "encoder" in line and "Traceback" not in captured
    assert not (views[0] / "out").exists()

    shutil.copy(encoder, views[1] / "encoder.pth")
    assert ranks(views, work) == [2, 2]
    (line,) = lines(capfd.readouterr().err)
    assert "out: rank 1 of 2" in line and not (views[0] / "out").exists()

    (views[0] / "real").mkdir()
    for folder in views:
        (folder / "out").symlink_to(views[0] / "real")
    assert ranks(views, work) == [0, 0]
    assert (views[0] / "real" / "manifest.json").is_file()


def test_the_first_differing_setting_is_named(tmp_path):
    with pytest.raises(UserError) as refused:
        is_begun(tmp_path, {"seed": 1, "views": 2}, {"seed": 1, "views": 3})
    assert str(refused.value).startswith(
        f"{tmp_path}: already holds the results of another run whose views is 2, but this one's is 3"
    )
    assert is_begun(tmp_path, {"seed": 1}, {"seed": 1})


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (
            {"choice_temperature": 4.5, "guidance": {"interval": [0.0, 1.0], "scale": 2.0}, "temperature": 1.0},
            {"choice_temperature": 4.5, "guidance": {"interval": [0.0, 1.0], "scale": 1.0}, "temperature": 2.0},
            "whose decoding.guidance.scale is 2.0, but this one's is 1.0;",
        ),
        ({"steps": 8}, {"steps": 8, "top_k": 200}, "whose decoding.top_k is none, but this one's is 200;"),
        (None, {"steps": 8}, "whose decoding.steps is none, but this one's is 8;"),
        ({"classes": [1, 2]}, {"classes": [1]}, "whose decoding.classes is [1, 2], but this one's is [1];"),
        ({"steps": {}}, {"steps": None}, "whose decoding.steps is {}, but this one's is none;"),
        ({"steps": {"a": 1}}, {"steps": 8}, "whose decoding.steps is {'a': 1}, but this one's is 8;"),
    ],
)
def test_a_differing_setting_is_named_at_any_depth(tmp_path, found, wanted, message):
    with pytest.raises(UserError) as refused:
        is_begun(tmp_path, {"a": 1, "decoding": found}, {"a": 1, "decoding": wanted}, another="holds a job")
    expected = f"{tmp_path}: holds a job {message} expected the same settings or a new --out folder"
    assert str(refused.value) == expected


def test_a_new_folder_has_no_settings(tmp_path):
    assert not is_begun(tmp_path / "new", None, {"seed": 1})


def test_a_link_to_nothing_is_refused_by_name(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"out: is a link to .*gone, which does not exist"):
        WorkDirectory(tmp_path / "out", lambda: is_begun(tmp_path / "out", None, {}))
    with pytest.raises(UserError, match=r"out: is a link to .*gone, which does not exist"):
        WorkDirectory(tmp_path / "out", lambda: None)


@pytest.mark.fault(
    "the output directory is removed meanwhile",
    stage="every stage",
    outcome="one line that names the path",
    status="2",
    lost="what was removed",
)
def test_a_directory_removed_meanwhile_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^.*out/part: cannot be used \(No such file or directory\)$"):  # noqa: SIM117
        with WorkDirectory(tmp_path / "out", lambda: None):
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out" / "part").touch()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


def sampling(models: dict[str, Path], **changed: object) -> None:
    settings = {"prior": models["prior"], "pixel_decoder": models["ar"], "count": 20} | changed
    sample("out", vqgan=models["vqgan.ckpt"], vqgan_config=models["vqgan.yaml"], **settings)


def test_sampling_whose_ranks_see_different_files(models, views, capfd):
    """A folder that another job fills, one that is no folder, one missing on rank 1, and one on rank 1 only."""
    work = partial(sampling, models)
    with holder(views[0] / "out") as (process, _):
        assert ranks(views, work) == [2, 2]
    captured = capfd.readouterr().err
    (line,) = lines(captured)
    assert line.startswith(f"error: out: process {process.pid} on ") and "Traceback" not in captured
    shutil.rmtree(views[0] / "out")

    (views[0] / "out").touch()
    assert ranks(views, work) == [2, 2]
    captured = capfd.readouterr().err
    assert len(lines(captured)) == 1 and "Traceback" not in captured
    (views[0] / "out").unlink()

    (views[0] / "real").mkdir()
    (views[0] / "out").symlink_to("real")
    (views[1] / "out").mkdir()
    (views[1] / "out" / "letter.txt").touch()  # on rank 1 it is a foreign folder, which only rank 0 may refuse
    write_models(views[0] / "own")
    (views[1] / "own").symlink_to(views[0] / "own")
    for folder in views:
        (folder / "prior").symlink_to(models["prior"] if folder is views[0] else models["unconditional"])
    assert ranks(views, partial(sampling, models, prior=Path("prior"))) == [2, 2]
    captured = capfd.readouterr().err
    (line,) = lines(captured)
    assert "rank 1 reads something other than rank 0" in line and "Traceback" not in captured

    shutil.rmtree(views[1] / "out")
    (views[1] / "out").symlink_to(views[0] / "real")
    assert ranks(views, work) == [0, 0]
    assert len(list((views[0] / "real" / "images").iterdir())) == 20
    # Complete and read-only: nothing to do, nothing to lock.
    assert ranks(views, work) == [0, 0]
    assert "complete already" in capfd.readouterr().out


def test_probing_where_nothing_can_be_written(models, views, capfd, tmp_path):
    """Refused before the passes, not after them."""
    shards = write_shards(tmp_path / "shards")
    spec = replace(read_model(models["unconditional"]).spec, discriminative_codes=27)
    save_model(tmp_path / "prior", spec, initial_state(spec, 0), {"codebook_sha256": "k"})
    work = partial(probe, tmp_path / "prior", shards, shards, "out", passes=1, batch=16)
    (views[0] / "out").touch()
    assert ranks(views, work) == [2, 2]
    captured = capfd.readouterr().err
    (line,) = lines(captured)
    assert line.startswith("error: out: cannot be written to") and "Traceback" not in captured
    assert "probes" not in captured  # no pass has begun
    (views[0] / "out").unlink()
    (views[0] / "real").mkdir()
    for folder in views:
        (folder / "out").symlink_to(views[0] / "real")
    assert ranks(views, work) == [0, 0]
    assert (views[0] / "real" / "probe.json").is_file()


def test_clustering_whose_ranks_see_different_files(views, capfd):
    points = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    np.save(views[0] / "points.npy", points)
    (views[1] / "points.npy").symlink_to(views[0] / "points.npy")
    (views[1] / "km.npy").touch()  # the state on rank 1 is not read
    work = partial(train_kmeans, "points.npy", 8, "km.npy", iterations=2, backend="torch")
    assert ranks(views, work) == [2, 2]
    (line,) = lines(capfd.readouterr().err)
    assert line.startswith("error: km.run: rank 1 of 2")
    (views[0] / "km.npy").touch()
    assert ranks(views, work) == [2, 2]
    captured = capfd.readouterr().err
    (line,) = lines(captured)
    assert "of another run" in line and "Traceback" not in captured


def _train(folders: list[Path], shards: Path) -> None:
    number = int(os.environ["RANK"])
    os.chdir(folders[number])
    workdir.SEEN_SECONDS = 1.0
    rate = float(Path("rate").read_text())
    run_command(lambda _: train(recipe(Path("run"), shards, optimizer__learning_rate=rate, training__steps=1)), [])


def test_training_whose_ranks_see_different_files(views, capfd, tmp_path):
    """Recipes that differ, a directory that one rank does not see, and one in which another recipe was trained."""
    shards = write_shards(tmp_path / "shards")
    for folder, rate in zip(views, ("0.02", "0.03")):
        (folder / "rate").write_text(rate)

    def statuses() -> list[int]:
        processes = start_ranks(2, lambda: _train(views, shards))
        for process in processes:
            process.join(120)
        return [process.exitcode for process in processes]

    assert statuses() == [2, 2]
    captured = capfd.readouterr().err
    (line,) = lines(captured)
    assert (
        line.startswith("error: the recipe: rank 1 reads something other than rank 0") and "Traceback" not in captured
    )
    (views[1] / "rate").write_text("0.02")
    assert statuses() == [2, 2]
    captured = capfd.readouterr().err
    (line,) = lines(captured)
    assert line.startswith("error: run: rank 1 of 2") and "Traceback" not in captured
    (views[0] / "run").mkdir()
    (views[0] / "run" / "letter.txt").touch()
    assert statuses() == [2, 2]
    captured = capfd.readouterr().err
    assert len(lines(captured)) == 1 and "Traceback" not in captured


# --- what a file system may answer ------------------------------------------------------------------------------------


def refused(work: Callable[[], object], capfd) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        run_command(lambda _: work() and None, [])
    captured = capfd.readouterr().err
    (line,) = captured.splitlines()
    assert ended.value.code == 2
    return line


def test_names_that_are_too_long(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "r" * 300
    for work in (
        lambda: train(recipe(tmp_path / name, tmp_path)),
        lambda: WorkDirectory(name, lambda: is_begun(Path(name), None, {})),
        lambda: write_json(tmp_path / name, {}),
        lambda: SamplingJob(name, {}, [0], []).begin(),
    ):
        line = refused(work, capfd)
        assert line.startswith("error: ") and "rrr" in line and "File name too long" in line, line


@pytest.mark.skipif(not may_unshare(), reason="no right to mount (unshare --mount)")
@pytest.mark.parametrize("event", ["read-only", "full", "removed"])
def test_a_file_system_that_fails_meanwhile(event, tmp_path, capfd):
    """One line that names the path, exit status 2, and the lock hides nothing."""
    disk = tmp_path / "disk"
    disk.mkdir()
    out = disk / "out"

    def mount(*arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True)

    def work() -> None:
        ctypes.CDLL(None).unshare(0x20000)  # CLONE_NEWNS: mounts of its own
        mount("--make-rprivate", "/")
        mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk))
        with WorkDirectory(out, lambda: None):
            if event == "read-only":
                mount("--bind", str(out), str(out))
                mount("-o", "remount,bind,ro", str(out))
            elif event == "removed":
                shutil.rmtree(out)
            with (out / "part").open("wb", buffering=0) as stream:
                for _ in range(100):
                    stream.write(bytes(4096))

    (process,) = start_ranks(1, lambda: run_command(lambda _: work(), []))
    process.join(60)
    (line,) = capfd.readouterr().err.splitlines()
    assert process.exitcode == 2
    reason = {"read-only": "Read-only file system", "full": "No space left", "removed": "No such file"}[event]
    assert line.startswith(f"error: {out}") and reason in line


def test_a_name_outside_ascii_in_the_c_locale(tmp_path):
    """``LC_ALL=C`` is what many batch systems leave; the name is what ``ls`` shows everywhere else."""
    images = make_images(tmp_path / "Äpfel", 2, classes=("grün",))
    script = (
        "import sys\nfrom digit_ds.errors import run_command\nfrom digit_ds.data.images import walk\n"
        "run_command(lambda a: print(*[name.encode('utf-8').decode() for name in walk(a[0])]))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", script, images], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode("utf-8").split() == ["grün/000.jpg", "grün/001.png"]


def test_files_are_as_readable_as_the_umask_says(models, tmp_path):
    """Every kind of file that is written through the shared place: safetensors and tempfile give 0600 by themselves."""
    spec, state, provenance = read_model(models["prior"])
    before = os.umask(0o027)
    try:
        save_model(tmp_path / "model", spec, state, provenance)
        write_json(tmp_path / "a.json", {})
        write_atomically(tmp_path / "a.npy", lambda path: np.save(path, np.zeros(3)))
        write_atomically(tmp_path / "a.npz", lambda path: np.savez(path, a=np.zeros(3)))
        write_atomically(tmp_path / "a.pt", lambda path: torch.save({}, path))
        write_png(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
        write_adm_array(tmp_path / "adm.npz", iter([np.zeros((8, 8, 3), np.uint8)]), (1, 8, 8, 3), None)
        os.chdir(tmp_path)
        sampling(models, count=1)
        train(recipe(tmp_path / "run", write_shards(tmp_path / "shards"), training__steps=1))
        export(tmp_path / "run", tmp_path / "released")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".npz", ".png", ".yaml", ".jsonl", ".zstd"}
    wrong = {
        str(path.relative_to(tmp_path)): oct(path.stat().st_mode)
        for path in files
        if path.stat().st_mode & 0o777 != 0o640
    }
    assert not wrong


def _train_until_a_rank_cannot_read(run: Path, shards: Path) -> None:
    from digit_ds.training.engine import Engine

    original = Engine.loss

    def loss(self, *arguments):
        if os.environ["RANK"] == "1" and len(taken) == 2:
            raise OSError(5, "Input/output error", str(shards))
        taken.append(0)
        return original(self, *arguments)

    taken: list[int] = []
    Engine.loss = loss
    run_command(lambda _: train(recipe(run, shards, training__steps=100)), [])


@pytest.mark.fault(
    "a file system fails on one rank",
    stage="training",
    outcome="that rank names the file in one line, the others remark that they leave",
    status="2 on that rank, 1 on the others",
    lost="steps since the last checkpoint",
)
def test_training_whose_file_system_fails_on_one_rank(tmp_path):
    shards = write_shards(tmp_path / "shards")
    group = start(_train_until_a_rank_cannot_read, (tmp_path / "run", shards), 2, tmp_path / "log")
    status, captured = group.wait(120), group.output()
    assert status == [1, 2], captured
    assert f"error: {shards}: cannot be used (Input/output error)\n" in captured, repr(captured)
    assert "rank 0 on" in captured and "Traceback" not in captured


def test_what_a_killed_job_left_is_swept_but_not_what_another_job_writes_below(tmp_path):
    """Samples may lie inside a run's directory, and their job may be running."""
    ours, theirs = (tmp_path / name / ".000001.4242.tmp.png" for name in ("out/images", "out/samples/images"))
    for path in (ours, theirs):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    kept = tmp_path / "out" / ".hidden.png"
    kept.touch()
    with holder(tmp_path / "out" / "samples"), WorkDirectory(tmp_path / "out", lambda: None):
        assert (ours.exists(), theirs.exists(), kept.exists()) == (False, True, True)
