"""Damaged and hostile files: every reader gives a result or a :class:`UserError`, in bounded time and memory.

Each test draws 1,000 cases (``DIGIT_FUZZ_CASES`` for longer runs): valid files with bytes changed, removed and put in.
"""

import io
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from preparation_parts import make_encoder, make_vqgan
from small_models import small_spec
from training_parts import launch, recipe, train, whole_state, write_shards

from digit_ds.config import load_recipe
from digit_ds.data.images import Crops, UnreadableImageError, decode
from digit_ds.data.shards import iterate
from digit_ds.errors import UserError
from digit_ds.generation.sources import TokenFile
from digit_ds.model.released import CONFIG, WEIGHTS, read_config, read_model, save_model
from digit_ds.model.weights import initial_state
from digit_ds.tokenizer.codebook import load_codebook
from digit_ds.tokenizer.encoder import load_encoder
from digit_ds.tokenizer.vqgan import load_vqgan
from digit_ds.training.stored import MANIFEST, StoredState, part_name, walk_lineage

SHIPPED = Path(__file__).parents[1] / "ds_configs"
SECONDS = 60
"""Longest time of one case; a hang is a failure."""
GIB = 2
"""Most memory that the cases of one test may add to this process."""
fuzz = settings(
    max_examples=int(os.environ.get("DIGIT_FUZZ_CASES", "1000")),
    deadline=None,
    database=None,
    derandomize="DIGIT_FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def bounded():
    """Fail when memory grows by more than :data:`GIB`."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GIB << 20


@contextmanager
def one_line(*others: type[Exception]):
    """Accept errors that a user may cause if their message is one line; time is bounded."""

    def late(*_):
        raise AssertionError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    except (UserError, *others) as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 5000, error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def damaged(draw, contents: list[bytes], first: int = 512) -> bytes:
    """One of ``contents``, cut short or with a few changes, most of them in its ``first`` bytes."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([len(data), min(len(data), first)]))
        place = draw(st.integers(0, max(0, end - 1)))
        kind = draw(st.sampled_from(["change", "number", "insert", "remove", "cut"]))
        if kind == "change":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "number":
            data[place : place + 4] = draw(
                st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"9999"])
            )
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "remove":
            del data[place : place + draw(st.integers(1, 64))]
        else:
            del data[place:]
    return bytes(data)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 40)
    | st.floats()
    | st.text(max_size=8)
    | st.just("9" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
"""Any JSON or YAML value."""


@st.composite
def altered(draw, tree: dict) -> dict:
    """A nested mapping with values replaced, removed or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        inner = tree
        while (nested := [value for value in inner.values() if isinstance(value, dict) and value]) and draw(
            st.booleans()
        ):
            inner = draw(st.sampled_from(nested))
        keys = sorted(inner)
        key = draw(st.sampled_from(keys) if keys else st.text(max_size=4))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if kind == "replace":
            inner[key] = draw(values)
        elif kind == "remove":
            inner.pop(key, None)
        else:
            inner[draw(st.text(max_size=6))] = draw(values)
    return tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


RECIPES = [path.read_bytes() for path in sorted(SHIPPED.glob("*.yaml"))]


@fuzz
@given(
    damaged(RECIPES, 4096) | st.builds(lambda tree: yaml.safe_dump(tree).encode(), altered(yaml.safe_load(RECIPES[0])))
)
def test_recipes(folder, content):
    (folder / "recipe.yaml").write_bytes(content)
    with one_line():
        load_recipe(folder / "recipe.yaml")


@fuzz
@given(
    st.lists(
        st.text(max_size=30)
        | st.builds(
            "{}={}".format,
            st.sampled_from(["training.steps", "model.kind", "optimizer.betas", "data", "run.x", "preview.rows"]),
            st.text(max_size=20) | st.builds(repr, values),
        ),
        max_size=3,
    )
)
def test_overrides_of_a_recipe(overrides):
    with one_line():
        load_recipe(SHIPPED / "base_prior.yaml", overrides)


def _pictures() -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (12, 15, 4), dtype=np.uint8)
    found = []
    for mode, name, options in (
        *(("RGB", name, {}) for name in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")),
        ("RGBA", "PNG", {}), ("P", "PNG", {}), ("I;16", "PNG", {}), ("1", "TIFF", {"compression": "group4"}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}), ("F", "TIFF", {}), ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}), ("RGBA", "WEBP", {"lossless": True}), ("L", "PPM", {}),
    ):  # fmt: skip
        image = Image.fromarray(noise.view(np.uint32)[..., 0].astype(np.uint16)) if mode == "I;16" else None
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        extra = {"exif": exif} if name in ("JPEG", "PNG", "WEBP") else {}
        (
            image or Image.fromarray(noise, "RGBA").convert("RGB").convert(mode)
            if mode != "RGBA"
            else Image.fromarray(noise, "RGBA")
        ).save(stream, name, **options, **extra)
        found.append(stream.getvalue())
    return found


@fuzz
@given(damaged(_pictures(), 128))
def test_images(folder, content):
    (folder / "image.jpg").write_bytes(content)
    with one_line(UnreadableImageError):
        image = decode(folder / "image.jpg")
        assert image.mode == "RGB"
        assert Crops("training", 8, 8, 2, 0).cut(image, "name").shape == (2, 8, 8, 3)


@pytest.fixture(scope="module")
def model(folder) -> Path:
    spec = replace(small_spec("prior", 3), width=16, ffn_width=32)  # hypothesis keeps what it draws
    save_model(folder / "model", spec, initial_state(spec, 0), {"codebook_sha256": "c" * 64})
    return folder / "model"


@fuzz
@given(data=st.data())
def test_configurations_of_released_models(model, folder, data):
    original = (model / CONFIG).read_bytes()
    tree = json.loads(original)
    content = data.draw(damaged([original], 4096) | st.builds(lambda tree: json.dumps(tree).encode(), altered(tree)))
    other = folder / "configuration"
    other.mkdir(exist_ok=True)
    if not (other / WEIGHTS).exists():
        shutil.copy(model / WEIGHTS, other)
    (other / CONFIG).write_bytes(content)
    with one_line():
        read_model(other)


@fuzz
@given(data=st.data())
def test_safetensors_of_released_models(model, folder, data):
    other = folder / "weights"
    other.mkdir(exist_ok=True)
    shutil.copy(model / CONFIG, other)
    (other / WEIGHTS).write_bytes(data.draw(damaged([(model / WEIGHTS).read_bytes()], 4096)))
    with one_line():
        read_model(other)


@pytest.fixture(scope="module")
def checkpoints(folder) -> dict[str, bytes]:
    """Published-format files of the tokenizers' parts."""
    make_encoder(folder / "encoder.pth")
    make_vqgan(folder / "vqgan.ckpt", 2)
    state = torch.load(folder / "encoder.pth", weights_only=True)
    torch.save(
        {name: value.bfloat16() for name, value in state.items()},
        folder / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    return {name: (folder / name).read_bytes() for name in ("encoder.pth", "old.pth", "vqgan.ckpt")}


@fuzz
@given(data=st.data())
def test_checkpoints_of_encoders_and_vqgans(checkpoints, folder, data):
    name = data.draw(st.sampled_from(sorted(checkpoints)))
    (folder / "damaged.pth").write_bytes(data.draw(damaged([checkpoints[name]], 2048)))
    with one_line():
        if name == "vqgan.ckpt":
            load_vqgan(folder / "damaged.pth", folder / "vqgan.yaml")
        else:
            load_encoder(folder / "damaged.pth", layer=2, num_heads=2)


@pytest.fixture(scope="module")
def arrays(folder) -> dict[str, bytes]:
    codes = np.random.default_rng(0).integers(0, 20, (5, 16))
    np.savez(folder / "plain.npz", discriminative=codes)
    np.savez_compressed(folder / "packed.npz", discriminative=codes)
    np.save(folder / "codebook.npy", np.zeros((4, 3), np.float32))
    return {name: (folder / name).read_bytes() for name in ("plain.npz", "packed.npz", "codebook.npy")}


@fuzz
@given(data=st.data())
def test_token_archives_and_codebooks(arrays, folder, data):
    (folder / "damaged.npz").write_bytes(data.draw(damaged(list(arrays.values()), 256)))
    with one_line():
        TokenFile(folder / "damaged.npz", "discriminative", 16, 20)
    with one_line():
        load_codebook(folder / "damaged.npz")


@pytest.fixture(scope="module")
def shards(folder) -> Path:
    return write_shards(folder / "shards", images=4, views=1)


@fuzz
@given(data=st.data())
def test_token_shards(shards, folder, data):
    file = data.draw(st.sampled_from(["manifest.json", "index.json", "shard"]))
    path = next(shards.rglob("*.mds.zstd")) if file == "shard" else shards / file
    original = path.read_bytes()
    content = damaged([original], 4096)
    if file != "shard":
        content |= st.builds(lambda tree: json.dumps(tree).encode(), altered(json.loads(original)))
    path.write_bytes(data.draw(content))
    try:
        with one_line():
            list(iterate(shards))
    finally:
        path.write_bytes(original)


@pytest.fixture(scope="module")
def training_checkpoint(shards, folder) -> Path:
    values = recipe(folder / "run", shards, training__steps=1)
    launch(train, (values,), 1, folder / "log")
    return next((folder / "run" / "checkpoints").glob("step_*"))


@fuzz
@given(data=st.data())
def test_training_checkpoints(training_checkpoint, data):
    """As a run that goes on, an export and a listing read them; what the manifest's hashes catch is not read on."""
    file = data.draw(st.sampled_from([MANIFEST, MANIFEST, part_name(0, 0)]))
    path = training_checkpoint / file
    original = path.read_bytes()
    content = damaged([original], 4096)
    if file == MANIFEST:
        content |= st.builds(lambda tree: json.dumps(tree).encode(), altered(json.loads(original)))
    path.write_bytes(data.draw(content))
    try:
        list(walk_lineage(training_checkpoint.parent))
        with one_line():
            stored = StoredState(training_checkpoint)
            if file == MANIFEST and data.draw(st.booleans()):
                stored.verify()
            assert all(type(value) in (int, float) for value in vars(stored.progress).values())
            for kind in stored.kinds():
                whole_state(stored, kind)
    finally:
        path.write_bytes(original)


def test_nesting_without_end(folder):
    for name, content in (("a.json", "[" * 100_000), ("b.json", '{"spec":' * 100_000)):
        (folder / name).write_text(content)
    (folder / "deep").mkdir(exist_ok=True)
    for content in ("[" * 100_000, '{"spec":' * 50_000):
        (folder / "deep" / CONFIG).write_text(content)
        with pytest.raises(UserError, match="is not valid JSON"):
            read_config(folder / "deep")
    (folder / "deep.yaml").write_text("model: " + "[" * 20_000)
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(folder / "deep.yaml")


def test_aliases_that_grow_without_end(folder):
    """Ten levels of nine aliases each: a value of 9^10 texts in 300 bytes."""
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" if n else "a0: &a0 [x, x, x]" for n in range(11)]
    (folder / "grows.yaml").write_text("\n".join([*levels, "run: *a10", "data: {shards: x}", "training: {steps: 1}"]))
    with one_line():
        load_recipe(folder / "grows.yaml")
    (folder / "grows.yaml").write_text("? [a, b]\n: 1\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_recipe(folder / "grows.yaml")
