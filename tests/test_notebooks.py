"""The notebooks in ``examples/`` run as they stand, in a kernel, over small stand-ins."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparation_parts import make_images
from small_models import write_own

import digit_ds

nbclient = pytest.importorskip("nbclient", reason="nbclient is pinned for Python 3.11 and later")
nbformat = pytest.importorskip("nbformat")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_own(home)
    make_images(home / "images", 12)
    return home


def execute(name: str, home: Path, monkeypatch) -> tuple[str, list[Image.Image]]:
    """What a notebook prints and the pictures that it shows."""
    parameters = {
        **{"PRIOR": "prior", "DECODER": "ar", "VQGAN": "vqgan.ckpt", "VQGAN_CONFIG": "vqgan.yaml"},
        **{"ENCODER": "encoder.pth", "CODEBOOK": "km.npy", "NUM_HEADS": "2", "IMAGE_SIZE": "32"},
        **{"IMAGES": "images", "CLASSES": "bee 2", "COUNT": "4"},
    }
    environment = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for key, value in (parameters | environment).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))  # not the home folder's history and settings
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "outputs are not stripped"
    read = re.findall(r'os\.environ\.get\("(\w+)"', code[0].source)
    assert set(read) <= set(parameters)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(home)}}).execute()
    printed, shown = "", []
    for output in (output for cell in code for output in cell.outputs):
        if output.output_type == "stream" and output.name == "stdout":
            printed += output.text
        elif "image/png" in output.get("data", {}):
            shown.append(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))))
    return printed, shown


def test_tokens(home, monkeypatch):
    printed, shown = execute("tokens", home, monkeypatch)
    assert "24 codes, 8 x 8 tokens an image" in printed and "4 pictures, " in printed
    maps, nearest, neighbours = shown
    assert maps.height == 2 * 128 + 3 * 2  # two rows of 128 pixels with gaps of 2
    assert nearest.width > neighbours.height > 64
    # Every token is a square of one colour: below each picture is its map.
    cells = np.asarray(maps)[2 * 2 + 128 :, -2 - 128 : -2][:128].reshape(8, 16, 8, 16, 3)
    assert (cells == cells[:, :1, :, :1]).all() and len(np.unique(cells.reshape(-1, 3), axis=0)) > 2


def test_generation(home, monkeypatch):
    printed, shown = execute("generation", home, monkeypatch)
    assert "ant, bee, cat" in printed and "images [8, 3, 32, 32], tokens [8, 64]" in printed
    shares = [int(share) for share in re.findall(r"scale [\d.]+: (\d+)% of the tokens differ", printed)]
    assert len(shares) == 3 and 0 < shares[0] < shares[2]
    assert len(shown) == 7
    monkeypatch.chdir(home)
    pipeline = digit_ds.load_pipeline("prior", "ar", "vqgan.ckpt", vqgan_config="vqgan.yaml", device="cpu")
    drawn = pipeline.sample(classes=["bee", "cat"], per_class=4, seed=0, top_k=200, decoder_top_p=0.8)
    assert np.array_equal(np.asarray(drawn.grid()), np.asarray(shown[0].convert("RGB")))


def test_notebooks_are_small_and_all_are_executed():
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == ["generation", "tokens"]
    assert all(path.stat().st_size < 100_000 for path in EXAMPLES.glob("*.ipynb"))
