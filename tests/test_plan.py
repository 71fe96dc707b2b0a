"""``digit-ds plan``: its predictions against measured steps, what it leaves out, and the recipes that follow it."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from test_recipes import RECIPES, spec_of

from digit_ds.cli import main
from digit_ds.config import load_recipe
from digit_ds.errors import UserError
from digit_ds.model.weights import check_tensor_size, parameter_count
from digit_ds.training import plan
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.estimate import host_memory, largest, memory_by_part, with_micro_batch, zero_of
from digit_ds.training.plan import GPUS, Layout, layouts
from digit_ds.training.settings import PlanSettings

PLANNED = ("--images", "1281167", "--grid", "16", "--codes", "16384")


def settings(name: str, **options) -> PlanSettings:
    return PlanSettings.read({"recipe": f"{name}.yaml", **options})


DRAWN = runpy.run_path(str(RECIPES.parent / "docs" / "draw_scaling.py"))


@pytest.mark.parametrize("row", DRAWN["MEASURED"], ids=lambda row: f"{row.gpus} GPUs, {row.layout.title}, {row.link}")
def test_predictions_are_within_a_tenth_of_what_was_measured(row):
    """On H100 over NVLink, and without it at 26 GB/s; the figures stand in docs/training.md and docs/scaling.md."""
    assert DRAWN["predicted"](row) == pytest.approx(row.images_per_second, rel=0.1)


@pytest.mark.parametrize(("name", "gpus", "kind"), [("base_prior", 8, "a100-40"), ("prior_7b", 32, "h100")])
def test_what_training_refuses_or_what_does_not_fit_is_left_out(name, gpus, kind):
    spec = spec_of(name)
    found = layouts(settings(name, gpus=gpus, gpu=kind), load_recipe(RECIPES / f"{name}.yaml"), spec)
    assert {layout.recipe.parallel.tensor for layout in found} == {1, 2, 4, 8}
    assert len({tuple(layout.overrides) for layout in found}) == len(found) > 20
    for layout in found:
        tensor = layout.recipe.parallel.tensor
        check_tensor_size(spec, tensor)
        read_deepspeed_config(layout.recipe, gpus // tensor)
        parts = memory_by_part(layout.recipe, spec, gpus // tensor, *zero_of(layout.recipe))
        assert sum(parts.values()) == pytest.approx(layout.memory) and layout.memory < 0.9 * GPUS[kind].memory
    speeds = [layout.images_per_second for layout in found]
    assert all(speed >= 0.995 * max(speeds[place:]) for place, speed in enumerate(speeds)), "ties apart, fastest first"


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"no layout of prior_7b\.yaml fits 1 x a100-40 with 39\.4 GiB .* host memory"):
        spec = spec_of("prior_7b")
        layouts(settings("prior_7b", gpus=1, gpu="a100-40"), load_recipe(RECIPES / "prior_7b.yaml"), spec)


def test_the_optimizer_goes_to_host_memory_where_nothing_else_fits(capsys):
    spec, recipe = spec_of("prior_7b"), load_recipe(RECIPES / "prior_7b.yaml")
    found = layouts(settings("prior_7b", gpus=2, gpu="a100-40"), recipe, spec)
    assert {layout.recipe.deepspeed for layout in found} == {"zero2_offload.json", "zero3_offload.json"}
    for layout in found:
        data_size = 2 // layout.recipe.parallel.tensor
        read_deepspeed_config(layout.recipe, data_size)
        parts = memory_by_part(layout.recipe, spec, data_size, *zero_of(layout.recipe))
        assert sum(parts.values()) == pytest.approx(layout.memory) and layout.memory < 0.9 * GPUS["a100-40"].memory
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(RECIPES / "prior_7b.yaml"), *PLANNED, "--gpus", "2", "--gpu", "a100-40"])
    assert not ended.value.code
    output = capsys.readouterr().out
    assert output.count("slower, not measured") == 8 and "images/s   MFU   hours" not in output
    command = output[output.index("-m digit_ds train") :].replace("\\\n", " ").split()[1:]
    assert command[3:] == found[0].overrides
    shipped = {"deepspeed": str(RECIPES / found[0].recipe.deepspeed)}
    assert load_recipe(Path(command[2]), command[3:]) == found[0].recipe.model_copy(update=shipped)


def test_host_memory_holds_page_locked_buffers_in_powers_of_two():
    """6.58e9 parameters: 32 GiB each for masters and gradients, 16 for bf16 weights, 24.5 each for both moments."""
    spec, recipe = spec_of("prior_7b"), load_recipe(RECIPES / "prior_7b.yaml")
    found = layouts(settings("prior_7b", gpus=1), recipe, spec)
    (second,) = {layout.host_memory for layout in found if layout.recipe.deepspeed == "zero2_offload.json"}
    assert second == pytest.approx(32 + 32 + 16 + 2 * 24.52, abs=0.1)


def count_large_tensors(values, out: Path) -> None:
    """At the end of a training on CPUs, where host and device are one: parameters, bytes of tensors of their size."""
    import gc

    import torch

    from digit_ds.training import loop

    save = loop._Run._save

    def counting(self, wait):
        parameters = sum(parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()
                         for parameter in self.engine.model.parameters())  # fmt: skip
        tensors = [held for held in gc.get_objects() if type(held) in (torch.Tensor, torch.nn.Parameter)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        large = [size for size in storages.values() if 1.5 * parameters < size < 5 * parameters]
        out.write_text(json.dumps([parameters, sum(large)]))
        save(self, wait)

    loop._Run._save = counting
    loop.train(values)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [2, 3])
def test_host_memory_is_what_deepspeed_holds(stage, precision, tmp_path):
    from training_parts import launch, recipe, write_shards

    from digit_ds.data.shards import read_manifest
    from digit_ds.training.runs import model_spec

    config = json.loads((RECIPES / f"zero{stage}_offload.json").read_text())
    for part in ("offload_optimizer", "offload_param"):
        if part in config["zero_optimization"]:
            config["zero_optimization"][part]["pin_memory"] = False  # nothing is on CPUs
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # what every rank keeps is on the device
    (tmp_path / "offload.json").write_text(json.dumps(config))
    shards = write_shards(tmp_path / "shards")
    values = recipe(
        tmp_path / "run", shards, deepspeed=str(tmp_path / "offload.json"), training__precision=precision,
        training__steps=2, model__width=64, training__micro_batch=8, training__ema_decay=0.9,
    )  # fmt: skip
    launch(count_large_tensors, (values, tmp_path / "counted"), 1, tmp_path / "log")
    parameters, held = json.loads((tmp_path / "counted").read_text())
    if stage == 2:  # the weights of the device
        held -= parameters * (2 if precision == "bf16" else 4)
    spec = model_spec(values, read_manifest(shards))
    assert host_memory(values, spec, 1) * 2**30 == pytest.approx(held, rel=0.01)


def test_of_equally_fast_layouts_the_simplest_is_first():
    """Less recomputation, then less tensor parallelism; a layout that is clearly faster stays before them."""
    recipe = load_recipe(RECIPES / "base_prior.yaml")

    def layout(speed: float, recompute: str, tensor: int) -> Layout:
        training = recipe.training.model_copy(update={"recompute": recompute})
        parallel = recipe.parallel.model_copy(update={"tensor": tensor})
        return Layout(recipe.model_copy(update={"training": training, "parallel": parallel}), 1.0, 0.0, speed, 0.4)

    given = [
        *(layout(1000, "layer", 1), layout(998, "none", 2), layout(997, "none", 1), layout(980, "none", 1)),
        layout(1010, "layer", 8),
    ]
    assert [found.images_per_second for found in plan._ranked(given)] == [1010, 997, 998, 1000, 980]


def said(capsys, *words: str) -> tuple[str, str]:
    with pytest.raises(SystemExit):
        main(list(words))
    return tuple(capsys.readouterr())


def test_gpus_that_cannot_divide_the_batch_are_refused_with_the_nearest_that_can(capsys):
    _, error = said(capsys, "plan", "base_prior.yaml", *PLANNED, "--gpus", "56")
    assert error == (
        "error: --gpus is 56, expected a number that divides training.global_batch 1024, such as 32 or 64, or another "
        "batch\n"
    )


@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_without_shards_the_sizes_that_stand_for_them_are_named(verb, capsys, tmp_path):
    _, error = said(capsys, verb, "base_prior.yaml", f"data.shards={tmp_path}/none", "--gpus", "8")
    assert error == (
        f"error: {tmp_path}/none: does not exist, expected token shards or, where they do not exist yet, --images, "
        "--grid and --codes\n"
    )


@pytest.mark.parametrize(
    ("gpus", "launcher"),
    [
        ("1", "digit-ds train base_prior.yaml"),
        ("8", "torchrun --standalone --nproc-per-node 8 -m digit_ds train base_prior.yaml"),
        ("64", "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-endpoint HOST:PORT -m digit_ds train base_prior.yaml"),
    ],
)
def test_the_printed_command_starts_all_ranks(gpus, launcher, capsys):
    output, _ = said(capsys, "plan", "base_prior.yaml", *PLANNED, "--gpus", gpus)
    assert f"\n{launcher} \\\n" in output
    block = output.partition("overrides:\n")[2].partition("or on each host")[0]
    if gpus == "64":  # what a chain's section takes is what the command has
        overrides = [f"{key}={json.dumps(value).strip(chr(34))}" for key, value in yaml.safe_load(block).items()]
        assert overrides == output.partition(launcher)[2].replace("\\\n", " ").split()
    else:
        assert not block


@pytest.mark.parametrize("verb", ["plan", "estimate"])
def test_disk_space_of_a_run_is_printed(verb, capsys):
    """236,154,880 float32 parameters; a checkpoint has the weights and two moments, and two are kept."""
    output, _ = said(capsys, verb, "base_prior.yaml", *PLANNED, "--gpus", "8", "checkpoint.keep_every=0")
    assert "disk             5.3 GiB of checkpoints, 0.9 GiB of the exported model\n" in output


def test_the_peaks_that_give_hours_are_named(capsys):
    output, _ = said(capsys, "estimate", "base_prior.yaml", *PLANNED)
    assert "for hours add monitor.peak_tflops=N, dense bf16: 989 (H200), 989 (H100), 312 (A100)" in output


@pytest.mark.parametrize("name", ["prior_1.7b", "prior_3.7b", "prior_7b"])
def test_large_recipes_have_the_layout_that_is_planned(name, capsys):
    """The printed command's overrides are what the recipe says, where auto is the number that fits."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(RECIPES / f"{name}.yaml"), *PLANNED, "--gpus", "64"])
    assert not ended.value.code
    output = capsys.readouterr().out
    command = output[output.index("-m digit_ds train") :].replace("\\\n", " ").split()[1:]
    recipe, spec = load_recipe(RECIPES / f"{name}.yaml"), spec_of(name)
    settled = with_micro_batch(recipe, largest(recipe, spec, 64, GPUS["h100"].memory))
    assert load_recipe(Path(command[2]), command[3:]) == settled
    assert f"{parameter_count(spec):,} parameters" in output
    assert f"{parameter_count(spec):,}." in (RECIPES / f"{name}.yaml").read_text()
