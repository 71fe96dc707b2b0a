"""The codebook: the published nearest centroid, in bounded memory, and files that cannot be mixed up."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

import digit_ds
from digit_ds.errors import UserError
from digit_ds.files import sha256
from digit_ds.tokenizer import codebook as codebook_module
from digit_ds.tokenizer.codebook import beside, nearest, save_codebook, split_centroids

GOLDEN = Path(__file__).parent / "golden"
CENTROIDS = GOLDEN / "kmeans" / "centroids.npy"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [224, 256])
def test_golden_features_get_the_published_tokens(size):
    features = torch.from_numpy(np.load(GOLDEN / "dinov2" / "expected.npz")[f"features_{size}"])
    codes = digit_ds.load_codebook(CENTROIDS).assign(features)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, torch.from_numpy(np.load(GOLDEN / "kmeans" / "expected.npz")[f"ids_{size}"]))


def test_encoder_and_codebook_together_give_the_published_tokens():
    heads = json.loads((GOLDEN / "meta.json").read_text())["dinov2"]["num_heads"]
    encoder = digit_ds.load_encoder(GOLDEN / "dinov2" / "dinov2_reg4_tiny.pth", num_heads=heads)
    images = torch.from_numpy(np.load(GOLDEN / "images.npz")["images_256"]).float() / 255
    codes = digit_ds.load_codebook(CENTROIDS).assign(encoder(images))
    assert torch.equal(codes, torch.from_numpy(np.load(GOLDEN / "kmeans" / "expected.npz")["ids_256"]))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 4, 7), (0, 7)])
def test_any_leading_shape(shape, tmp_path):
    save_codebook(tmp_path / "km.npy", draw(11, 7), {})
    codes = digit_ds.load_codebook(tmp_path / "km.npy").assign(draw(*shape, seed=1))
    assert codes.shape == shape[:-1]


def test_nearest_by_direct_distances():
    features, centroids = draw(300, 24, seed=1), draw(50, 24)
    direct = (features.double()[:, None] - centroids.double()[None]).square().sum(-1).argmin(1)
    assert torch.equal(nearest(features, centroids), direct)


def test_equal_distances_give_the_lowest_index():
    centroids = torch.tensor([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0], [-0.5, -0.5], [2.0, 0.0]])
    assert nearest(features, centroids).tolist() == [1, 1, 4, 2, 0]


def test_chunks_change_nothing(monkeypatch):
    features, centroids = draw(1000, 16, seed=1), draw(64, 16)
    whole = nearest(features, centroids)
    for distances in (64, 64 * 7, 64 * 999, 1):
        monkeypatch.setattr(codebook_module, "_CPU_DISTANCES", distances)
        assert torch.equal(nearest(features, centroids), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_taken_to_float32(dtype):
    features, centroids = draw(500, 32, seed=1).to(dtype), draw(40, 32)
    assert torch.equal(nearest(features, centroids), nearest(features.float(), centroids))


def test_splitting_is_exact_for_bfloat16_features():
    features, centroids = draw(400, 40, seed=1).bfloat16(), draw(300, 40)
    right = split_centroids(centroids)
    left = beside(features, right)
    assert left.dtype == right.dtype == torch.bfloat16
    assert left.shape[1] == right.shape[1]
    assert left.shape[1] % 8 == 0
    scores = left.double() @ right.double().T
    halves = centroids.square().sum(1) / 2  # float32, as the published code has it
    expected = features.double() @ centroids.double().T - halves.double()
    torch.testing.assert_close(scores, expected, atol=1e-12, rtol=0)
    assert torch.equal(scores.argmax(1), nearest(features, centroids))


class Sizes(TorchFunctionMode):
    """Notes the bytes of every tensor that an operation gives back."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def test_memory_stays_bounded():
    """100,000 features against 1,024 codes: 410 MB of distances if they were made at once."""
    features, centroids = draw(100_000, 8, seed=1), draw(1024, 8)
    with Sizes() as sizes:
        nearest(features, centroids)
    assert 1 << 24 < sizes.largest <= 64 << 20


def test_saved_codebooks_come_back_with_their_provenance(tmp_path):
    provenance = {"encoder_sha256": "ab", "layer": 3, "transform": "t"}
    centroids = draw(6, 5)
    save_codebook(tmp_path / "new" / "km.npy", centroids, provenance)
    book = digit_ds.load_codebook(tmp_path / "new" / "km.npy")
    assert torch.equal(book.centroids, centroids)
    assert book.provenance == provenance
    assert (book.codes, book.width) == (6, 5)
    assert book.sha256 == sha256(tmp_path / "new" / "km.npy")
    array = np.load(tmp_path / "new" / "km.npy")
    assert (array.dtype, array.shape) == (np.float32, (6, 5))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["km.json", "km.npy"]


def test_codebooks_are_npy_files(tmp_path):
    with pytest.raises(UserError, match=r"km\.bin: is not a valid name for a codebook, expected a name"):
        save_codebook(tmp_path / "km.bin", draw(6, 5), {})
    assert not list(tmp_path.iterdir())


def test_published_files_have_no_provenance():
    assert digit_ds.load_codebook(CENTROIDS).provenance == {}


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_files_are_read(tmp_path, dtype):
    array = draw(6, 5).numpy().astype(dtype)
    np.save(tmp_path / "km.npy", array)
    assert torch.equal(digit_ds.load_codebook(tmp_path / "km.npy").centroids, torch.from_numpy(array).float())


def test_a_wrong_width_names_file_found_and_expected():
    with pytest.raises(UserError, match=r"centroids\.npy: its centroids have width 16, expected 768, the width of the"):
        digit_ds.load_codebook(CENTROIDS).assign(torch.zeros(2, 768))


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        digit_ds.load_codebook(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (
            np.zeros((3, 4), dtype=np.int64),
            r"km\.npy: holds int64 of shape \[3, 4\], expected floating-point centroids",
        ),
        (np.zeros(4, dtype=np.float32), r"holds float32 of shape \[4\], expected"),
        (np.zeros((2, 3, 4), dtype=np.float32), r"of shape \[2, 3, 4\]"),
        (np.zeros((0, 4), dtype=np.float32), r"of shape \[0, 4\]"),
        (np.zeros((3, 4), dtype=np.complex64), "holds complex64"),
        (np.full((3, 4), np.nan, dtype=np.float32), "infinite or not a number"),
        (np.array([[1.0], ["x"]], dtype=object), "is not a complete .npy file of numbers"),
    ],
)
def test_wrong_arrays(tmp_path, array, match):
    np.save(tmp_path / "km.npy", array, allow_pickle=True)
    refused(tmp_path / "km.npy", match)


def test_wrong_files(tmp_path):
    refused(tmp_path / "missing.npy", r"missing\.npy: cannot be read \(No such file or directory\)")
    refused(tmp_path, "cannot be read")
    (tmp_path / "empty.npy").touch()
    refused(tmp_path / "empty.npy", r"empty\.npy: is not a complete \.npy file")
    (tmp_path / "cut.npy").write_bytes(CENTROIDS.read_bytes()[:3000])
    refused(tmp_path / "cut.npy", r"cut\.npy: is not a complete \.npy file")
    (tmp_path / "text.npy").write_text("0.1 0.2\n")
    refused(tmp_path / "text.npy", r"text\.npy: is not a complete \.npy file")
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    refused(tmp_path / "many.npz", r"many\.npz: is an archive of arrays")
    refused(GOLDEN / "dinov2" / "dinov2_reg4_tiny.pth", r"dinov2_reg4_tiny\.pth: is")


def test_a_sidecar_of_another_codebook(tmp_path):
    save_codebook(tmp_path / "a.npy", draw(6, 5), {"layer": 3})
    save_codebook(tmp_path / "b.npy", draw(6, 5, seed=1), {"layer": 2})
    (tmp_path / "a.json").write_bytes((tmp_path / "b.json").read_bytes())
    refused(tmp_path / "a.npy", r"a\.json: describes a file with SHA-256 \w+, expected \w+, that of a\.npy")
    (tmp_path / "a.json").write_text("[1]")
    refused(tmp_path / "a.npy", r"a\.json: does not hold a JSON object")
    (tmp_path / "a.json").write_text("{")
    refused(tmp_path / "a.npy", r"a\.json: is not valid JSON")
