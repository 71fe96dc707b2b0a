"""What a release consists of agrees: one version, and files that exist under the names that others use."""

import re
from datetime import date
from pathlib import Path

import yaml

import digit_ds

ROOT = Path(__file__).parents[1]


def test_the_newest_version_is_the_same_everywhere():
    """Ready for a tag ``vVERSION``: package, changelog and citation."""
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == (digit_ds.__version__, str(citation["date-released"]))
    assert citation["version"] == digit_ds.__version__
    assert [day for _, day in released] == sorted((day for _, day in released), reverse=True)
    assert all(date.fromisoformat(day) for _, day in released)


def test_workflow_and_containers_use_the_makefile_as_it_is():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12"]
    commands = "\n".join(step.get("run", "") for step in job["steps"])
    containers = [(ROOT / name).read_text() for name in ("Dockerfile", "apptainer.def")]
    for text in (commands, *containers):
        assert (used := set(re.findall(r"\bmake (\w+)\b", text))) and used <= targets
    assert set(re.findall(r"\bmake (\w+)\b", commands)) == {"environment", "lint", "test"}
    for text in containers:  # small images: what make calls must be there first
        assert 0 < text.index("build-essential git make") < text.index("make environment")
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(form.read_text()).keys()
