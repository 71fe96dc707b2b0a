"""digit-ds split: what is held out, and what is refused."""

from pathlib import Path

import pytest
from preparation_parts import make_images

from digit_ds.errors import UserError
from digit_ds.preparation.settings import SplitSettings
from digit_ds.preparation.split import split_images


def split(images: Path, out: Path, **options) -> dict[str, set[str]]:
    split_images(SplitSettings.read({"images": str(images), "out": str(out), **options}))
    return {
        part: {path.relative_to(out / part).as_posix() for path in (out / part).rglob("*.*")}
        for part in ("train", "val")
    }


def test_a_share_of_each_class_is_held_out_and_the_same_again(tmp_path, capsys):
    images = make_images(tmp_path / "images", 60)
    found = split(images, tmp_path / "a", share=0.2)
    assert {len([name for name in found["val"] if name.startswith(kind)]) for kind in ("cat", "dog", "grüne")} == {4}
    everything = {path.relative_to(images).as_posix() for path in images.rglob("*.*")}
    assert found["train"] | found["val"] == everything and not found["train"] & found["val"]
    link = tmp_path / "a" / "val" / min(found["val"])
    assert link.read_bytes() == (images / min(found["val"])).read_bytes()
    assert split(images, tmp_path / "b", share=0.2) == found != split(images, tmp_path / "c", share=0.2, seed=1)
    capsys.readouterr()
    assert split(images, tmp_path / "a", share=0.2) == found
    assert "complete already" in capsys.readouterr().out


def test_a_killed_split_leaves_no_folder_and_the_next_one_is_whole(tmp_path, monkeypatch):
    images = make_images(tmp_path / "images", 30)
    monkeypatch.setattr("digit_ds.preparation.split.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        split(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert sum(map(len, split(images, tmp_path / "out").values())) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out"]


def test_what_is_refused(tmp_path):
    images = make_images(tmp_path / "images", 30)
    split(images, tmp_path / "out")
    for name, arguments, expected in (
        (
            "another share",
            (images, tmp_path / "out", 0.5),
            "holds another split whose share is 0.[12], but this one's is 0.5",
        ),
        ("inside", (images, images / "out", 0.1), "lies inside"),
        ("split already", (tmp_path / "out", tmp_path / "again", 0.1), "has the folder train"),
        (
            "one image",
            (make_images(tmp_path / "few", 4), tmp_path / "few_out", 0.1),
            "holds 1 image, expected at least",
        ),
        ("nothing", (tmp_path / "nowhere", tmp_path / "none", 0.1), "expected a folder of images"),
    ):
        with pytest.raises(UserError, match=expected):
            split(*arguments[:2], share=arguments[2])
            pytest.fail(name)
    assert not any((tmp_path / name).exists() for name in ("again", "few_out", "none"))


def test_a_refused_split_warns_of_nothing(tmp_path, capsys):
    images = make_images(tmp_path / "images", 30)
    (images / "notes.txt").write_text("not an image")
    split(images, tmp_path / "out")
    assert "warning: " in capsys.readouterr().err
    with pytest.raises(UserError, match="holds another split"):
        split(images, tmp_path / "out", share=0.5)
    assert capsys.readouterr().err == ""
