"""Private fields of DeepSpeed: one file uses them, and names the one that an upgrade has moved."""

import ast
from importlib.metadata import version
from pathlib import Path

import pytest
from training_parts import recipe, start, write_shards

import digit_ds.training


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train_without(owner: str, field: str, values) -> None:
    """Train under a DeepSpeed in which ``field`` of the class ``owner`` is gone, as after an upgrade."""
    from importlib import import_module

    from digit_ds.training import loop

    module, _, name = owner.rpartition(".")
    delattr(getattr(import_module(f"deepspeed.{module}"), name), field)
    loop.train(values)


@pytest.mark.parametrize(
    ("file", "precision", "owner", "field"),
    [
        ("zero1.json", "bf16", "runtime.bf16_optimizer.BF16_Optimizer", "update_lp_params"),
        (
            "zero2.json",
            "fp32",
            "runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer",
            "_lazy_init_hp_params_optimizer_state",
        ),
        ("zero2.json", "fp32", "utils.tensor_fragment.tensor_fragment", "get_hp_fragment"),
        ("zero3.json", "fp32", "runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3", "_get_fp32_opt_state_partition"),
    ],
)
def test_a_private_field_that_deepspeed_lacks_is_named_at_the_start(
    file, precision, owner, field, token_shards, tmp_path
):
    values = recipe(tmp_path / "run", token_shards, deepspeed=file, training__precision=precision, training__steps=2)
    group = start(train_without, (owner, field, values), 1, tmp_path / "logs")
    assert group.wait() != [0]
    name = owner.rpartition(".")[2]
    assert f"DeepSpeed {version('deepspeed')} has no field {field} in {name}" in group.output()
    assert not list((tmp_path / "run").glob("checkpoints/step_*")) and "step 1" not in group.output()


def test_two_files_know_private_fields_of_deepspeed():
    files = [Path(digit_ds.training.__file__).with_name(name) for name in ("zero.py", "zero_methods.py")]
    fields = {
        text
        for file in files
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "check"
        for argument in call.args[1:]
        if isinstance(argument, ast.Constant)
        for text in [argument.value]
    }
    assert {"_hp_mapping", "_global_grad_norm", "ds_numel"} <= fields
    for path in files[0].parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path not in files else ():
            assert not isinstance(node, ast.Attribute) or node.attr not in fields - {"start", "partition"}, path
