"""Listing, decoding and cutting images, the nasty ones too."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from digit_ds.data.images import Crops, UnreadableImageError, decode, uniforms, walk
from digit_ds.errors import UserError

RED, GREY, WHITE = (200, 30, 40), (77, 77, 77), (255, 255, 255)


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture without sharp edges."""
    blobs = np.random.default_rng(seed).integers(40, 210, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def bomb(path: Path) -> None:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def nasty(folder: Path) -> dict[str, object]:
    """Fill a folder; what each file gives: a colour, a size, or a part of the reason why it is skipped."""
    red, folder = Image.new("RGB", (40, 30), RED), folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    gives: dict[str, object] = {}

    def save(name: str, image: Image.Image, gives_what: object, **options) -> None:
        image.save(folder / name, **options)
        gives[name] = gives_what

    def write(name: str, data: bytes, reason: str) -> None:
        (folder / name).write_bytes(data)
        gives[name] = reason

    save("plain.png", red, RED)
    save("UPPER.JPG", Image.new("RGB", (40, 30), GREY), GREY)
    save("two words, grüne Äpfel 苹果.png", red, RED)
    save("line\nbreak.png", red, RED)
    save("a png.jpg", red, RED, format="PNG")
    save("grey.png", Image.new("L", (40, 30), 77), GREY)
    save("bilevel.png", Image.new("1", (40, 30), 1), WHITE)
    save("grey 16 bit.png", Image.fromarray(np.full((30, 40), 77 * 256 + 200, np.uint16)), GREY)
    save("palette.png", red.convert("P", palette=Image.Palette.ADAPTIVE), RED)
    save("alpha opaque.png", Image.new("RGBA", (40, 30), (*RED, 255)), RED)
    save("alpha clear.png", Image.new("RGBA", (40, 30), (*RED, 0)), WHITE)
    save("grey clear.png", Image.new("LA", (40, 30), (77, 0)), WHITE)
    save("cmyk.jpg", Image.new("CMYK", (40, 30), (255, 255, 255, 0)), (0, 0, 0))
    save("cmyk.tif", Image.new("CMYK", (40, 30), (0, 0, 0, 178)), GREY)
    save("animated.gif", red, RED, save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")])
    save("one pixel.png", Image.new("RGB", (1, 1), RED), RED)
    save("stretched.png", Image.new("RGB", (10_000, 20), RED), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save("turned.jpg", red, (30, 40), exif=exif)
    save("float.tif", Image.new("F", (40, 30), 0.5), "floating-point")
    save("truncated.png", smooth(90, 90), "truncated")
    save("truncated.jpg", smooth(90, 90), "truncated")
    for name in ("truncated.png", "truncated.jpg"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-150])
    write("empty.jpg", b"", "empty file")
    write("page.jpg", b"<!DOCTYPE html><html>404</html>", "not an image (begins with b'<!DOCTYPE ht')")
    write("noise.png", b"\x89PNG\r\n\x1a\n" + bytes(100), "")
    bomb(folder / "bomb.png")
    gives["bomb.png"] = "decompression bomb"
    (folder / "nowhere.jpg").symlink_to("gone.jpg")
    gives["nowhere.jpg"] = "No such file"
    (folder / "itself.jpg").symlink_to("itself.jpg")
    gives["itself.jpg"] = "symbolic links"
    (folder / "loop").symlink_to(folder)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes((folder / "plain.png").read_bytes())
    os.mkfifo(folder / "pipe.jpg")
    return gives


def test_nasty_folder(tmp_path):
    gives = nasty(tmp_path)
    assert list(walk(tmp_path)) == sorted(gives)
    crops = Crops("training", 32, 32, 2, 0)
    for name, expected in gives.items():
        if isinstance(expected, str):
            with pytest.raises(UnreadableImageError) as error:
                decode(tmp_path / name)
            assert expected in str(error.value), name
            assert str(tmp_path) not in str(error.value), name
            continue
        image = decode(tmp_path / name)
        views = crops.cut(image, name)
        assert image.mode == "RGB" and views.shape == (2, 32, 32, 3), name
        if len(expected) == 2:
            assert image.size == expected, name
        else:
            assert np.abs(views.astype(int) - expected).max() <= 3, name


def test_name_that_is_not_utf8_is_skipped(tmp_path):
    from digit_ds.preparation.jobs import Job
    from digit_ds.preparation.loading import Loading

    smooth(40, 40).save(tmp_path / "good.png")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes((tmp_path / "good.png").read_bytes())
    job = Job(tmp_path / "out", tmp_path, {}, 8)
    (batch,) = Loading(Crops("training", 32, 32, 1, 0), 8, 0).batches(job, [0])
    assert batch.names == ["good.png"]
    assert batch.skipped == [{"image": os.fsdecode(b"caf\xe9.png"), "reason": "name is not valid UTF-8"}]


def test_names_are_sorted_as_strings_and_links_are_followed_once(tmp_path):
    names = ["a-b/x.png", "a.png", "a/x.png", "a/b/x.png", "b/1.png", "b/10.png", "b/2.PNG", "ä.jpg"]
    for name in names:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "y.png").touch()
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "c").symlink_to(tmp_path / "elsewhere")
    assert list(walk(tmp_path / "root")) == sorted([*names, "c/y.png"])


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match="is not a folder"):
            list(walk(path))


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (300, 400), (32, 32), (33, 500)])
def test_views_are_torchvisions(size):
    image = smooth(*size)
    resize = v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC)
    resized = resize(image)
    crops = Crops("training", 32, 32, 4, 5)
    views = crops.cut(image, "name")
    assert np.array_equal(views[0], np.asarray(v2.CenterCrop(32)(resized)))
    for view in (1, 2, 3):
        (left, top, right, bottom), mirrored = crops.plan(size, "name", view)
        assert (right - left, bottom - top) == (32, 32)
        expected = resized.crop((left, top, right, bottom))
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else expected
        assert np.array_equal(views[view], np.asarray(expected))
    ten = Crops("ten-crop", 32, 40, 10, 0).cut(image, "name")
    resized = v2.Resize(40, interpolation=v2.InterpolationMode.BICUBIC)(image)
    theirs = [np.asarray(part) for part in v2.TenCrop(32)(resized)]
    for ours, number in enumerate((0, 1, 2, 3, 4, 6, 5, 8, 7, 9)):  # theirs mirrors the image, then cuts
        assert np.array_equal(ten[ours], theirs[number])


def test_random_views_depend_on_seed_name_and_view_alone_and_cover_the_room():
    size = (80, 40)
    crops = Crops("random", 32, 32, 200, 1)
    plans = [crops.plan(size, "a", view) for view in range(200)]
    assert plans == [Crops("random", 32, 32, 200, 1).plan(size, "a", view) for view in range(200)]
    assert plans != [crops.plan(size, "b", view) for view in range(200)]
    assert plans != [Crops("random", 32, 32, 200, 2).plan(size, "a", view) for view in range(200)]
    assert {plan.box[0] for plan in plans} >= {0, 64 - 32} and {plan.box[1] for plan in plans} == {0}
    assert 70 < sum(plan.mirrored for plan in plans) < 130
    parts = Crops("random-resized-crop", 32, 32, 300, 1)
    boxes = [parts.plan(size, "a", view).box for view in range(300)]
    areas = [(right - left) * (bottom - top) / 3200 for left, top, right, bottom in boxes]
    assert all(0 <= left < right <= 80 and 0 <= top < bottom <= 40 for left, top, right, bottom in boxes)
    assert 0.05 < min(areas) < 0.2 and 0.6 < max(areas) <= 1 and 0.3 < np.mean(areas) < 0.6


def test_draws_are_the_same_everywhere():
    # Written down once: a change would silently change every data set that is being continued.
    assert uniforms(3, 0, "cat/1.png", 0, "random") == pytest.approx(
        [0.34184369563853667, 0.37325723482040396, 0.10549239552757783], abs=1e-15
    )
    many = uniforms(10_000, "seed")
    assert abs(many.mean() - 0.5) < 0.02 and many.min() >= 0 and many.max() < 1


def test_stretched_image_is_cut_before_it_is_resized():
    image = smooth(2000, 100).resize((2000, 100))
    crops = Crops("training", 32, 32, 3, 0)
    whole = image.resize((640, 32), Image.Resampling.BICUBIC)
    for view, pixels in enumerate(crops.cut(image, "name")):
        (left, top, right, bottom), mirrored = crops.plan(image.size, "name", view)
        expected = np.asarray(whole.crop((left, top, right, bottom)))
        expected = expected[:, ::-1] if mirrored else expected
        assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_impossible_crops_are_refused():
    for arguments, message in (
        (("middle", 32, 32, 1, 0), "expected one of training"),
        (("training", 32, 31, 1, 0), "resize is 31"),
        (("training", 32, 32, 0, 0), "views is 0"),
        (("ten-crop", 32, 32, 2, 0), "expected 10"),
    ):
        with pytest.raises(UserError, match=message):
            Crops(*arguments)


@pytest.fixture
def no_ghostscript(tmp_path, monkeypatch):
    """A program ``gs`` in front of the path that leaves a mark when it is started; the mark must not appear."""
    mark, programs = tmp_path / "started", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow searches once per process
    yield
    assert not mark.exists()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


def test_an_eps_file_starts_no_ghostscript_wherever_pictures_are_read(tmp_path, no_ghostscript, capsys):
    from calls import save_statistics

    from digit_ds.generation.pictures import read_png

    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(EPS)
    with pytest.raises(UnreadableImageError, match="not an image"):
        decode(folder / "a.jpg")
    with pytest.raises(UserError, match="is not a readable image"):
        save_statistics(folder, tmp_path / "out.npz", features="unread")
    with pytest.raises(Image.UnidentifiedImageError):
        read_png(folder / "a.jpg")


@pytest.mark.parametrize("name", ["EPS", "JPEG2000", "ICO", "PCX", "SGI", "TGA", "DDS"])
def test_formats_that_are_not_listed_are_no_images(tmp_path, name):
    if name == "EPS":
        (tmp_path / "a.png").write_bytes(EPS)
    else:
        smooth(32, 32).save(tmp_path / "a.png", format=name)
    with pytest.raises(UnreadableImageError, match="not an image"):
        decode(tmp_path / "a.png")


def test_files_of_other_formats_are_counted(tmp_path, capsys):
    from digit_ds.data.sources.opening import list_source, open_source
    from digit_ds.preparation.jobs import Job

    images = tmp_path / "images"
    (images / "b").mkdir(parents=True)
    for name in ("a.avif", "b/b.AVIF", "b/c.heic", "README", ".hidden"):
        (images / name).touch()
    said = "ignored 4 files: 2 .avif, 1 .heic, 1 without a suffix"
    with pytest.raises(UserError, match=rf"holds no images \({said}\)"):
        list_source(open_source(images))
    with pytest.raises(UserError, match=rf"holds no images \({said}\)"):
        Job(tmp_path / "none", images, {}, 8)
    smooth(40, 40).save(images / "good.png")
    assert list_source(open_source(images)) == ["good.png"]
    with Job(tmp_path / "out", images, {}, 8):
        assert capsys.readouterr().err.splitlines() == [f"warning: {images}: {said}"] * 2
