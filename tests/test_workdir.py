"""Directories that a job writes: one protocol, decided once for all processes, whatever each of them sees."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from preparation_parts import call, make_codebook, make_encoder, make_images, start_ranks

from digit_ds import workdir
from digit_ds.errors import UserError, run_command
from digit_ds.parallel.decide import agree, together
from digit_ds.parallel.launch import initialize
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


def test_a_refusal_is_printed_once_and_ends_all(views, capfd):
    (views[0] / "out").mkdir()
    (views[0] / "out" / "letter.txt").touch()
    assert ranks(views, lambda: WorkDirectory("out", lambda: is_begun(Path("out"), None, {}))) == [2, 2]
    err = capfd.readouterr().err
    assert lines(err) == ["error: out: already holds other files, expected an empty or a new directory"]
    assert "Traceback" not in err
    assert not (views[1] / "out").exists()  # only rank 0 decides and makes directories


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


def test_ranks_that_read_different_files_end(views, capfd):
    for number, folder in enumerate(views):
        (folder / "seed").write_text(str(number))
    assert ranks(views, lambda: agree({"seed": Path("seed").read_text()}, "recipe")) == [2, 2]
    (line,) = lines(capfd.readouterr().err)
    assert line.startswith("error: recipe: rank 1 reads something else than rank 0 (seed: 1 and 0)")


@pytest.mark.parametrize("tool", ["extract_features", "tokenize_images"])
def test_offline_jobs_whose_ranks_see_different_files(tool, views, capfd):
    """Another encoder, and an output directory that rank 1 sees as another job's."""
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
    assert not is_begun(tmp_path / "new", None, {"seed": 1})


def test_a_link_to_nothing_is_refused_by_name(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"out: is a link to .*gone, which does not exist"):
        WorkDirectory(tmp_path / "out", lambda: is_begun(tmp_path / "out", None, {}))
    with pytest.raises(UserError, match=r"out: is a link to .*gone, which does not exist"):
        WorkDirectory(tmp_path / "out", lambda: None)


def test_a_directory_removed_meanwhile_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^.*out/part: cannot be used \(No such file or directory\)$"):  # noqa: SIM117
        with WorkDirectory(tmp_path / "out", lambda: None):
            shutil.rmtree(tmp_path / "out")
            (tmp_path / "out" / "part").touch()
