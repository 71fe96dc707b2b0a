"""Pages that are drawn from the code are as the code is."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_layers_in_contributing_are_those_of_the_code():
    drawer = runpy.run_path(str(ROOT / "docs" / "draw_layers.py"))
    drawn = drawer["page"]()
    assert "  training --> config\n" in drawn and "  training --> errors\n" not in drawn
    assert (ROOT / "CONTRIBUTING.md").read_text() == drawn, "run python docs/draw_layers.py"


def test_files_that_contributing_names_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    names = {word.strip("`,;:()") for word in page.split() if word.startswith("`")}
    files = {name for name in names if name.endswith(".py")}
    assert len(files) > 15
    places = (ROOT, ROOT / "digit_ds")
    assert [name for name in sorted(files) if not any((place / name).is_file() for place in places)] == []


def test_the_faults_are_those_that_tests_show():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_faults.py"))["page"]()
    assert drawn.count("\n| ") > 30 and "test_training_faults.py::test_killed_at_twenty_moments" in drawn
    assert (ROOT / "docs" / "faults.md").read_text() == drawn, "run python docs/draw_faults.py"


def test_the_reference_is_of_the_settings():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_reference.py"))["page"]()
    assert "| `--guidance` |" in drawn and "| `training.micro_batch` |" in drawn and "## digit-ds convert" in drawn
    assert (ROOT / "docs" / "reference.md").read_text() == drawn, "run python docs/draw_reference.py"


def test_the_costs_in_the_cluster_page_are_those_of_the_dry_run():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_costs.py"))["page"]()
    assert drawn.count("\n| tokenize") == 2 and "| evaluate | - | - |" in drawn
    assert (ROOT / "docs" / "cluster.md").read_text() == drawn, "run python docs/draw_costs.py"


def test_the_scaling_page_is_what_the_code_predicts():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_scaling.py"))
    page, plot = drawn["page"](), drawn["plot"]()
    assert page.count("\n| 3.7B, `zero3_overlap` |") == 5 and plot.count("<polyline") == 18
    assert (ROOT / "docs" / "scaling.md").read_text() == page, "run python docs/draw_scaling.py"
    assert (ROOT / "docs" / "scaling.svg").read_text() == plot, "run python docs/draw_scaling.py"


def test_messages_that_the_troubleshooting_page_quotes_are_those_of_the_code():
    code = "".join(path.read_text() for path in sorted((ROOT / "digit_ds").rglob("*.py")))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [text for text in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) if len(text.split()) > 3]
    assert len(quoted) >= 6
    parts = [part.strip() for text in quoted for part in text.split("...") if part.strip()]
    assert [part for part in parts if part not in code] == []
