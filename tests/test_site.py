"""The documentation site builds without a warning, is whole, and fetches nothing when it is viewed."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(find_spec("material") is None, reason="the site is built with Python 3.11 or newer")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "-d", out]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[-3000:]  # --strict: warnings are errors
    return out


def test_every_page_is_there_and_fetches_nothing(site):
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} | {"changelog.html"} <= pages.keys()
    loaded = r'<(?:script|img|iframe)[^>]*src="?([^" >]+)|<link[^>]*rel="?(?:style|preco)[^>]*href="?([^" >]+)'
    for name, text in pages.items():
        found = [script or link for script, link in re.findall(loaded, text)]
        assert found and [address for address in found if address.startswith(("http", "//"))] == [], name


def test_pages_named_in_the_text_are_links_and_the_api_has_its_docstrings(site):
    assert '<a href="faults.html">What happens when something fails</a>' in (site / "reference.html").read_text()
    api = (site / "api.html").read_text()
    assert all(
        f'id="digit_ds.{name}"' in api for name in ("tokenizer.encoder.load_encoder", "model.transformer.load_model")
    )
    assert api.count("UserError") > 3, "docstrings say what is raised"


def test_the_drawing_has_the_steps_of_the_chain(site):
    texts = [element.text for element in ET.parse(site / "pipeline.svg").iter() if element.tag.endswith("text")]
    steps = ["features", "kmeans", "tokenize", "tokenize_validation", "prior", "decoder", "sample", "evaluate", "probe"]
    assert texts[::2] == steps and "shards/train/" in texts
