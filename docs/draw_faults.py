"""Writes docs/faults.md from the tests that show each row: the arguments of their ``pytest.mark.fault``.

python docs/draw_faults.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"
HEAD = """# What happens when something fails

Event by event and stage by stage: what happens, with which exit status, and what is lost. Each row is shown by the
test that its last column names; `python docs/draw_faults.py` writes this page from them. Launchers have statuses of
their own: `torchrun` exits with 1 whatever its ranks exit with, `srun` passes 75 on. A status of - means that the job
goes on, or that the killed process has none.

`tests/measure_kills.py OUT` kills features, K-Means, tokens and sampling twenty times each, at two processes; the test
suite does the same with fewer kills, and with twenty for training. On 2026-11-26, on two CPU cores, all 80 kills met
work under way, and every file was equal byte for byte to that of an unbroken job. `DIGIT_FUZZ_CASES=12000 pytest
tests/test_fuzzing.py` draws more damaged files than the test suite: 12,000 for each of nine readers the same day, 20
minutes, without a traceback or a hang.

| event | stage | what happens | exit status | what is lost | test |
| --- | --- | --- | --- | --- | --- |
"""


def rows() -> Iterator[tuple[str, ...]]:
    """Event, stage, outcome, status, loss and test of each mark, in the order of files and lines."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    values = {word.arg: ast.literal_eval(word.value) for word in mark.keywords}
                    event = ast.literal_eval(mark.args[0])
                    told = (event, *(values[name] for name in ("stage", "outcome", "status", "lost")))
                    yield (*told, f"`{path.name}::{node.name}`")


def page() -> str:
    """The whole page; rows of one event stand together."""
    found = sorted(rows(), key=lambda row: (row[1] == "every stage", row[1], row[0]))
    return HEAD + "".join("| " + " | ".join(row) + " |\n" for row in found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
