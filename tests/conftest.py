"""What holds for all tests: one thread a process, and an environment that the next test finds unchanged."""

import os

# Many tests start several processes, and waiting OpenMP threads of one starve the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """A test that is skipped."""
    _excuse((yield).get_result(), item.get_closest_marker("gpu") is not None)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """A file that is skipped whole."""
    _excuse((yield).get_result(), collector.path.parent.name == "gpu")


def _excuse(report, needs_gpu: bool) -> None:
    """On CI's machine only a missing GPU is a valid reason to skip."""
    if report.skipped and "DIGIT_DS_CI" in os.environ and not needs_gpu:
        report.outcome, report.longrepr = "failed", f"skipped on CI's machine: {report.longrepr}"


@pytest.fixture(autouse=True)
def same_environment():
    """Undo what a test sets: training leaves RANK and its like behind, which would contradict the next launcher."""
    before = os.environ.copy()
    yield
    os.environ.clear()
    os.environ.update(before)
