"""The command line: errors are one line with exit status 2, tracebacks are shown with --debug only."""

import subprocess
import sys
import time

import pytest

from digit_ds import shipped
from digit_ds.cli import run
from digit_ds.errors import UserError, run_command
from digit_ds.files import write_atomically, write_json

RECIPE = "run: {0}/run\ndata: {{shards: {0}/shards}}\ntraining: {{steps: 10}}\n"


def digit_ds(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "digit_ds", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_misspelt_key_ends_in_one_sentence_before_anything_is_written(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(tmp_path))
    result = digit_ds("train", str(recipe), "optimizer.learning_rte=1")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "optimizer.learning_rte" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["cluster.submit", "cluster.costs", "training.estimate", "training.plan"])
def test_what_computes_costs_from_a_recipe_alone_imports_no_framework(module):
    """Their import takes seconds, on a busy login node a minute, in which nothing would be printed."""
    code = f"import sys, digit_ds.{module}; print(*{{'torch', 'streaming', 'transformers'}} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not found.strip()


def test_the_compiler_is_imported_by_what_compiles_alone():
    """Two seconds of every process, and of the start of every rank."""
    code = "import sys, digit_ds.training.loop, digit_ds.generation.sample, torch; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "megatron.core.tensor_parallel" in found
    assert not {"torch._dynamo", "torch._inductor"} & {*found}


def test_an_error_is_not_lost_among_warnings_of_the_frameworks(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(tmp_path))
    result = digit_ds("train", str(recipe))
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: {tmp_path}/shards: holds no manifest.json, expected a complete directory of token shards\n"
    )


@pytest.mark.parametrize(("tasks", "pauses"), [("2", 1), ("1", 0), (None, 0)])
@pytest.mark.parametrize("ending", [UserError("x: found 1, expected 2"), SystemExit(2), None])
def test_a_rank_that_fails_under_srun_stays_until_its_words_have_left(monkeypatch, capsys, ending, tasks, pauses):
    """srun ends the other ranks, and what they were saying, as soon as one has failed."""
    name, said = "SLURM_STEP_NUM_TASKS", []
    monkeypatch.setenv(name, tasks) if tasks else monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: said.append(capsys.readouterr().err))

    def main(_arguments: list[str]) -> None:
        if ending:
            raise ending

    with pytest.raises(SystemExit) as left:
        run_command(main, [])
    assert left.value.code == (2 if ending else 0)
    expected = "error: x: found 1, expected 2\n" if isinstance(ending, UserError) else ""
    assert said == [expected] * (pauses if ending else 0)


def test_ctrl_c_ends_a_command_in_one_word(capsys):
    def main(_arguments: list[str]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run_command(main, [])
    assert (left.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    with pytest.raises(KeyboardInterrupt):
        run_command(main, ["--debug"])


def test_debug_shows_the_traceback(tmp_path):
    result = digit_ds("train", str(tmp_path / "absent.yaml"), "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_writing_is_atomic(tmp_path):
    """A writer that is killed half-way leaves the old file and no temporary one."""
    target = tmp_path / "report.json"
    write_json(target, {"a": 1})
    before = target.read_bytes()

    def dies(temporary):
        temporary.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomically(target, dies)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_misspelt_required_key_is_named_and_not_the_one_that_it_leaves_missing(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: r\ndata: {shards: s}\ntraining: {stepz: 10}\n")
    with pytest.raises(UserError, match=r"recipe\.yaml: unknown key 'training\.stepz', expected one of steps, "):
        run(["train", str(recipe)])
    recipe.write_text("")
    with pytest.raises(UserError, match=r"recipe\.yaml: is empty, expected a mapping of sections"):
        run(["train", str(recipe)])


def test_without_a_site_file_the_example_to_copy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    wanted = r"slurm/site\.yaml: does not exist, .* copy .*/slurm/site\.example\.yaml there and edit it"
    with pytest.raises(UserError, match=wanted):
        run(["submit", "slurm/digits.yaml", "--dry-run"])
