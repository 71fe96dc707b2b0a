"""Pieces of training that need one process at most."""

import contextlib
import fcntl
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import estimate
from training_parts import launch, recipe, write_shards

from digit_ds.data import stream, streaming_memory
from digit_ds.data.stream import Chunks, TokenStream
from digit_ds.errors import UserError, is_lost_peer
from digit_ds.model import weights
from digit_ds.parallel import launch as ranks
from digit_ds.training import runs
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.estimate import device_parameters, memory_by_part
from digit_ds.training.flops import flops_per_image
from digit_ds.training.guard import Diverged, SkipGuard
from digit_ds.training.optimizer import GuardedAdamW
from digit_ds.training.schedule import learning_rate
from digit_ds.training.stored import Progress, is_complete, newest_checkpoint


@pytest.fixture(scope="module")
def token_shards(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


# --- signals -----------------------------------------------------------------------------------------------------


def test_ctrl_c_is_a_signal_and_pressed_again_the_end():
    script = """
import os, signal, time
from digit_ds.training import preemption
signal.signal(signal.SIGINT, signal.{handler})
stop = preemption.StopSignal()
for _ in range(2):  # a launcher sends the terminal's once more
    os.kill(os.getpid(), signal.SIGINT)
print(stop.requested())
time.sleep(1.1 * preemption.PATIENCE)
try:
    os.kill(os.getpid(), signal.SIGINT)
    print("stays")
except KeyboardInterrupt:
    print("leaves")
stop.restore()
print(signal.getsignal(signal.SIGINT) == signal.{handler})
"""
    found = {}
    for handler in ("default_int_handler", "SIG_IGN"):
        command = [sys.executable, "-c", script.replace("{handler}", handler)]
        finished = subprocess.run(command, capture_output=True, text=True)
        found[handler] = finished.stdout.split(), finished.stderr.strip()
    told = "Ctrl-C: saving before exit; press it again to exit at once"
    assert found == {
        "default_int_handler": (["True", "leaves", "True"], told),
        "SIG_IGN": (["False", "stays", "True"], ""),
    }


def test_a_signal_is_heard_after_triton_compiled_a_kernel(tmp_path):
    """The compiler's LLVM takes the signals; no GPU is needed for that."""
    script = tmp_path / "script.py"
    script.write_text("""
import os, re, signal
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from digit_ds.training.preemption import StopSignal

@triton.jit
def add_one(numbers, N: tl.constexpr):
    places = numbers + tl.arange(0, N)
    tl.store(places, tl.load(places) + 1)

def caught():
    return re.search("SigCgt:.*", open("/proc/self/status").read())[0]

stop = StopSignal()
assert not stop.requested()
before = caught()
source = ASTSource(add_one, signature={"numbers": "*fp32", "N": "constexpr"}, constexprs={"N": 64})
triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(caught() != before)
assert not stop.requested()
os.kill(os.getpid(), signal.SIGUSR1)
print(stop.requested())
""")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert finished.stdout == "True\nTrue\n", finished.stderr


# --- schedules ---------------------------------------------------------------------------------------------------


def rates(name: str, **settings) -> list[float]:
    values = recipe(
        Path("run"), Path("shards"), schedule={"name": name, "warmup_steps": 10, "warmup_start": 1e-3, **settings},
        training__steps=100, optimizer__learning_rate=1.0,
    )  # fmt: skip
    return [learning_rate(values, step) for step in range(101)]


def test_warmup_is_a_line_from_its_start_to_the_peak():
    for name in ("inverse_sqrt", "cosine", "warmup_stable_decay", "constant"):
        found = rates(name)
        assert found[0] == 1e-3
        assert found[5] == pytest.approx(1e-3 + (1 - 1e-3) * 5 / 10)
        assert found[10] == 1.0


def test_schedules_follow_their_formulas():
    assert rates("inverse_sqrt")[40] == pytest.approx(math.sqrt(10 / 40))
    assert rates("inverse_sqrt")[100] == pytest.approx(math.sqrt(10 / 100))
    cosine = rates("cosine", minimum=0.1)
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine[32] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert cosine[100] == pytest.approx(0.1)
    stable = rates("warmup_stable_decay", minimum=0.2, decay_steps=20)
    assert stable[11] == stable[79] == stable[80] == 1.0
    assert stable[90] == pytest.approx(0.2 + 0.8 * 0.5)
    assert stable[100] == pytest.approx(0.2)
    assert set(rates("constant")[10:]) == {1.0}


# --- optimizer ---------------------------------------------------------------------------------------------------


def pair(clipping: float, average: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator)
    ours, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    settings = {"betas": (0.9, 0.98), "weight_decay": 0.01}
    guarded = GuardedAdamW([ours], 0.01, settings["betas"], 1e-8, 0.01, clipping, average)
    return ours, plain, guarded, torch.optim.AdamW([plain], 0.01, **settings), generator


def test_optimizer_clips_as_torch_does():
    ours, plain, guarded, adamw, generator = pair(clipping=10.0)
    for scale in (0.01, 1.0, 5.0):
        gradient = torch.randn(1000, generator=generator) * scale
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([plain], 10.0)
        guarded.step()
        adamw.step()
        assert float(guarded.last_norm) == pytest.approx(float(norm), rel=1e-6)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_optimizer_skips_whole_update_when_the_norm_is_not_finite(bad):
    ours, _, guarded, _, generator = pair(clipping=1.0)
    ours.grad = torch.randn(1000, generator=generator)
    guarded.step()
    before = [ours.detach().clone(), *(value.clone() for value in guarded.state[ours].values())]
    guarded.global_norm = lambda: torch.tensor(bad)
    ours.grad = torch.randn(1000, generator=generator)  # finite on this rank: another rank's is not
    guarded.step()
    for old, new in zip(before, [ours, *guarded.state[ours].values()]):
        assert torch.equal(old, new)


def test_moving_average_follows_its_formula():
    ours, _, guarded, _, generator = pair(clipping=0.0, average=0.9)
    expected = ours.detach().clone()
    for _ in range(3):
        ours.grad = torch.randn(1000, generator=generator)
        guarded.step()
        expected = 0.9 * expected + 0.1 * ours.detach()
    torch.testing.assert_close(guarded.state[ours]["average"], expected, rtol=0, atol=1e-6)


def test_guard_counts_skips_and_stops_after_some_in_a_row():
    progress = Progress()
    guard = SkipGuard(progress, limit=2)
    for step, norm in enumerate([1.0, float("inf"), 1.0, float("nan"), -1.0]):
        guard.note(step, norm, [f"image{step}"])
    assert "image1" in guard.read(keep=2)[0]
    assert (progress.skipped, progress.skipped_in_a_row) == (1, 0)
    with pytest.raises(Diverged, match="learning_rate") as caught:
        guard.read(keep=0)
    assert ["image3" in caught.value.messages[0], "image4" in caught.value.messages[1]] == [True, True]


# --- data --------------------------------------------------------------------------------------------------------


def ids(stream: TokenStream, chunks: Chunks, steps: int, position: int = 0) -> list[int]:
    batches = stream.batches(chunks, position)
    return [int(i) for _ in range(steps * chunks.per_step) for i in next(batches).samples]


def read_epochs(shards: Path, out: Path) -> None:
    stream = TokenStream(str(shards), seed=3, owner=str(out))
    found = {
        "straight": ids(stream, Chunks(8, 2), 15),
        "ranks": [ids(stream, Chunks(8, 2, rank, 2), 15) for rank in range(2)],
        "resumed": ids(stream, Chunks(8, 4), 8, position=56),
        "other seed": ids(TokenStream(str(shards), seed=4, owner=f"{out}2"), Chunks(8, 2), 15),
        "validation": [
            [batch.samples[batch.real].tolist() for batch in stream_.epoch(6, rank, 2)]
            for stream_ in [TokenStream(str(shards), owner=f"{out}3", order="none")]
            for rank in range(2)
        ],
        "dtype": str(next(stream.batches(Chunks(8, 2))).discriminative.dtype),
    }
    out.write_text(json.dumps(found))


def test_every_epoch_sees_every_image_once_and_views_rotate(token_shards, tmp_path):
    launch(read_epochs, (token_shards, tmp_path / "ids.json"), 1, tmp_path)
    found = json.loads((tmp_path / "ids.json").read_text())
    images, views = 40, 2
    epochs = [found["straight"][start : start + images] for start in (0, 40, 80)]
    for epoch in epochs:
        assert sorted(sample // views for sample in epoch) == list(range(images))
    assert epochs[0] != epochs[1]
    assert found["straight"] != found["other seed"]
    first, second = (dict(divmod(sample, views) for sample in epoch) for epoch in epochs[:2])
    assert all(first[image] != second[image] for image in range(images))  # two views: each epoch shows the other one
    assert set(first.values()) == {0, 1}
    # Resumed in the middle of an epoch: the same samples; two ranks: the same global batches.
    assert found["resumed"] == found["straight"][56:120]
    ours, theirs = found["ranks"]
    joined = [
        sample for pair in zip(zip(*[iter(ours)] * 2), zip(*[iter(theirs)] * 2)) for half in pair for sample in half
    ]
    assert joined == found["straight"]
    assert sorted(sample for batches in found["validation"] for batch in batches for sample in batch) == [
        image * views for image in range(images)
    ]
    assert found["dtype"] == "torch.int64"


def read_damaged(shards: Path, out: Path) -> None:
    stream = TokenStream(str(shards), owner=str(out))
    try:
        ids(stream, Chunks(8, 2), 5)
    except UserError as error:
        out.write_text(str(error))


def test_flipped_byte_is_refused(tmp_path):
    shards = write_shards(tmp_path / "shards")
    victim = next((shards / "block-00001").glob("*.zstd"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    launch(read_damaged, (shards, tmp_path / "error"), 1, tmp_path)
    assert (tmp_path / "error").read_text().startswith(f"{victim}: is damaged, its sha256 is not the ")


def test_jobs_of_one_node_open_their_shards_one_after_the_other(monkeypatch):
    """Streaming searches a free number in shared memory and claims it later; 3 of 12 simultaneous jobs failed."""

    def is_locked() -> bool:
        with streaming_memory._lock_file().open("a") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    monkeypatch.setattr(stream, "CachedShards", lambda *_: is_locked())
    assert stream._open("shards", "cache") is True
    assert not is_locked()


def open_while_others_open(shards: Path, out: Path) -> None:
    """As a job on several nodes, which takes no lock: all have found their numbers when the first takes one."""
    rank, found = ranks.rank(), streaming_memory.shared_prefix._check_and_find_retrying

    def find(streams_local: list, streams_remote: list, shm_name: str, retry: int) -> int:
        number = found(streams_local, streams_remote, shm_name, retry)
        (out / f"{rank}-{shm_name}").touch()
        while len(list(out.glob(f"*-{shm_name}"))) < 4:
            time.sleep(0.01)
        return number

    streaming_memory.shared_prefix._check_and_find_retrying = find
    stream.one_job_at_a_time = contextlib.nullcontext
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    try:
        number = TokenStream(str(shards), owner=f"{out}-{rank}").dataset.dataset._shm_prefix_int
    except UserError as error:
        number = error
    (out / f"opened-{rank}").write_text(str(number))
    while len(list(out.glob("opened-*"))) < 4:
        time.sleep(0.01)


def test_jobs_that_open_their_shards_together_take_different_numbers(tmp_path):
    """Two jobs on the same two nodes cannot wait for each other; one of them failed."""
    (tmp_path / "out").mkdir()
    launch(open_while_others_open, (write_shards(tmp_path / "shards"), tmp_path / "out"), 4, tmp_path)
    numbers = {path.read_text() for path in (tmp_path / "out").glob("opened-*")}
    assert len(numbers) == 4 and all(map(str.isdigit, numbers)), numbers


def read_slowly_made(shards: Path, out: Path) -> None:
    """As on a loaded machine: a block of shared memory gets its size half a second after its name."""
    made = os.ftruncate

    def late(*arguments: int) -> None:
        time.sleep(0.5)
        made(*arguments)

    os.ftruncate = late
    ranks.initialize()
    found = ids(TokenStream(str(shards), owner=str(out)), Chunks(8, 2), 2)
    Path(f"{out}-{ranks.rank()}").write_text(json.dumps(found))


def test_a_block_of_shared_memory_is_opened_when_it_has_its_size(tmp_path):
    shards = write_shards(tmp_path / "shards")
    launch(read_slowly_made, (shards, tmp_path / "ids"), 2, tmp_path)
    first, second = ((tmp_path / f"ids-{rank}").read_text() for rank in range(2))
    assert first == second


def test_a_block_whose_maker_was_killed_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(streaming_memory, "_BLOCKS", tmp_path)
    old, young, used, other = (tmp_path / name for name in ("000003_barrier", "000004_locals", "000005_cache", "a_b"))
    for path in (old, young, used, other):
        path.write_bytes(b"1" if path == used else b"")
    for path in (old, used, other):
        os.utime(path, (0, 0))
    streaming_memory.forget_killed(str(tmp_path / "cache"))
    assert sorted(tmp_path.iterdir()) == [young, used, other]


def locks_after_opening(shards: Path, out: Path) -> None:
    left = Path(tempfile.gettempdir(), "999990_cache_filelock")
    left.touch()
    stream = TokenStream(str(shards), owner=str(out))
    ids(stream, Chunks(8, 2), 2)
    second = TokenStream(str(shards), owner=f"{out}2")  # the lock of a dataset in use stays
    number = f"{stream.dataset.dataset._shm_prefix_int:06}"
    held = Path(tempfile.gettempdir(), f"{number}_cache_filelock").exists()
    out.write_text(json.dumps([left.exists(), held, second.dataset.dataset._shm_prefix_int != int(number)]))


def test_the_file_of_a_lock_is_removed_when_its_dataset_is_gone(tmp_path):
    """Streaming leaves one for each dataset, and looks at all of them when it opens the next."""
    launch(locks_after_opening, (write_shards(tmp_path / "shards"), tmp_path / "locks"), 1, tmp_path)
    assert json.loads((tmp_path / "locks").read_text()) == [False, True, True]


def open_with_a_rank_that_ends(shards: Path, out: Path) -> None:
    """Rank 1 ends while StreamingDataset is made; what rank 0 raises."""
    ranks.initialize()
    if ranks.rank() == 1:
        streaming_memory.SharedMemory.__init__ = lambda *_, **__: os._exit(0)
    try:
        TokenStream(str(shards), owner=str(out))
    except Exception as error:
        out.write_text(f"{type(error).__name__}: {error}")


def test_a_rank_that_ended_is_not_taken_for_bad_shards(tmp_path):
    launch(open_with_a_rank_that_ends, (write_shards(tmp_path / "shards"), tmp_path / "raised"), 2, tmp_path)
    raised = (tmp_path / "raised").read_text()
    assert raised.startswith("RuntimeError: ") and is_lost_peer(RuntimeError(raised)), raised


# --- the DeepSpeed file ------------------------------------------------------------------------------------------


def write_config(tmp_path: Path, **values) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    return str(path)


def test_deepspeed_file_is_passed_on_with_the_recipes_own(tmp_path):
    zero = {"stage": 2, "reduce_bucket_size": 12345}
    values = recipe(
        tmp_path, tmp_path, deepspeed=write_config(tmp_path, zero_optimization=zero, wall_clock_breakdown=True),
        training__precision="bf16",
    )  # fmt: skip
    config = read_deepspeed_config(values, data_size=2)
    assert config["zero_optimization"] == zero and config["wall_clock_breakdown"]
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (8, 2)
    assert config["bf16"]["enabled"]
    assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"


def test_gradients_are_rounded_on_their_way_only_where_the_file_says_so(tmp_path):
    for file, sent in (("zero2_overlap", "fp32"), ("zero2_overlap_bf16", "bf16")):
        config = read_deepspeed_config(
            recipe(tmp_path, tmp_path, deepspeed=f"{file}.json", training__precision="bf16"), data_size=2
        )
        assert config["communication_data_type"] == sent and config["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize(
    ("file", "overrides", "words"),
    [
        ({"train_batch_size": 9}, {}, "train_batch_size is 9, expected 8 as in the recipe"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": False}}, {"training__precision": "bf16"}, "bf16.ena"),
        ({"scheduler": {}}, {}, "holds 'scheduler'"),
        ({"timers": {"throughput": {"enabled": True}}}, {}, "timers.throughput.enabled is True, expected False"),
        ({"gradient_clipping": 0.7}, {}, "gradient_clipping"),
        ({"zero_optimization": {"stage": 4}}, {}, "stage is 4"),
        ({"zero_optimization": {"stage": 0}}, {"training__precision": "bf16"}, "stage is 0, expected 1 or more"),
        ({}, {"parallel__tensor": 4, "parallel__sequence": True}, "multiple of parallel.tensor 4"),
        ({"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": {"stage": 2}}, {}, "grad_accum_dtype"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, {}, "expected 2 or 3"),
        ({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"}, {}, "is 'bf16', expected 'fp32'"),
        (
            {"zero_optimization": {"stage": 1}, "communication_data_type": "bf16"}, {"training__precision": "bf16"},
            "is 'bf16', expected 'fp32'",
        ),
    ],
)  # fmt: skip
def test_contradicting_deepspeed_file_is_refused(file, overrides, words, tmp_path):
    values = recipe(tmp_path, tmp_path, deepspeed=write_config(tmp_path, **file), **overrides)
    with pytest.raises(UserError, match=r"ds\.json|parallel\.tensor") as caught:
        read_deepspeed_config(values, data_size=1)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_missing_deepspeed_file_and_uneven_batches_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"nosuch\.json"):
        read_deepspeed_config(recipe(tmp_path, tmp_path, deepspeed="nosuch.json"), 1)
    with pytest.raises(UserError, match="expected a multiple"):
        read_deepspeed_config(recipe(tmp_path, tmp_path), data_size=3)


# --- the run directory -------------------------------------------------------------------------------------------


def test_another_recipes_results_are_refused(tmp_path):
    run = tmp_path / "run"
    runs.write_recipe(run, recipe(run, tmp_path))
    runs.check_run_directory(run, recipe(run, tmp_path, training__steps=30, parallel__tensor=2, deepspeed="zero3.json"))
    stored = run / "recipe.yaml"
    stored.write_text("".join(line for line in stored.open() if "qk_norm" not in line))  # from before it was a choice
    runs.check_run_directory(run, recipe(run, tmp_path))
    with pytest.raises(UserError, match=r"model\.qk_norm is False there and True here"):
        runs.check_run_directory(run, recipe(run, tmp_path, model__qk_norm=True))
    with pytest.raises(UserError, match=r"training\.seed is 1 there and 2 here"):
        runs.check_run_directory(run, recipe(run, tmp_path, training__seed=2))
    other = {"model__kind": "nar", "model__class_conditional": False, "schedule__name": "cosine"}
    with pytest.raises(UserError, match=r"model\.kind is prior there and nar here"):  # what matters most
        runs.check_run_directory(run, recipe(run, tmp_path, training__seed=2, **other))
    cosine = tmp_path / "cosine"
    runs.write_recipe(cosine, recipe(cosine, tmp_path, schedule__name="cosine"))
    with pytest.raises(UserError, match=r"training\.steps was 20, and a cosine schedule cannot change its end"):
        runs.check_run_directory(cosine, recipe(cosine, tmp_path, schedule__name="cosine", training__steps=30))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        runs.check_run_directory(tmp_path / "other", recipe(run, tmp_path))


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    for step, size in ((1, 3), (2, 3), (3, 2)):
        folder = tmp_path / f"step_{step:08d}"
        folder.mkdir()
        (folder / "part").write_bytes(b"x" * size)
        (folder / "manifest.json").write_text(json.dumps({"files": {"part": {"bytes": 3}}}))
    (tmp_path / ".step_00000004.partial").mkdir()
    (tmp_path / "latest").write_text("step_00000003\n")
    assert not is_complete(tmp_path / "step_00000003")
    assert newest_checkpoint(tmp_path).name == "step_00000002"
    (tmp_path / "latest").write_text("step_00000001\n")
    assert newest_checkpoint(tmp_path).name == "step_00000001"


# --- figures -----------------------------------------------------------------------------------------------------


def test_estimate_counts(token_shards, tmp_path, capsys):
    values = recipe(tmp_path, token_shards, monitor__peak_tflops=100.0)
    estimate(values, gpus=4)
    printed = capsys.readouterr().out
    spec = runs.model_spec(values, TokenStreamManifest.of(token_shards))
    assert f"{weights.parameter_count(spec):,} parameters" in printed and "hours" in printed
    shapes = [value.shape for value in weights.shard(weights.initial_state(spec, 0), spec, 2, 0).values()]
    assert device_parameters(spec, 2) == sum(math.prod(shape) for shape in shapes)
    whole, parted = (memory_by_part(values, spec, 4, stage, False) for stage in (1, 3))
    assert parted["weights"] == whole["weights"] / 4
    with pytest.raises(UserError, match="--gpus"):
        estimate(recipe(tmp_path, token_shards, parallel__tensor=2), gpus=3)


class TokenStreamManifest:
    @staticmethod
    def of(path: Path):
        from digit_ds.data.shards import read_manifest

        return read_manifest(path)


def test_flops_of_the_base_prior():
    from digit_ds.model.spec import TransformerSpec

    spec = TransformerSpec("prior", 16, 1024, 16, 4096, "post", 1024, 8192, 0, 0)
    matrices = 16 * (4 * 1024**2 + 2 * 1024 * 4096) + 8197 * 1024
    assert flops_per_image(spec) == 257 * (6 * matrices + 12 * 16 * 1024 * 257)
    gated = replace(spec, ffn_width=2688, activation="swiglu", qk_norm=True, positions="rotary2d", normalization="rms")
    matrices = 16 * (4 * 1024**2 + 3 * 1024 * 2688) + 8197 * 1024
    assert flops_per_image(gated) == 257 * (6 * matrices + 12 * 16 * 1024 * 257)


def test_activations_of_the_options(tmp_path):
    """SwiGLU keeps three times its width, QK-norm or rotary positions keep queries and keys once more."""
    from digit_ds.model.spec import TransformerSpec

    values = recipe(tmp_path, tmp_path, parallel__tensor=2)
    rows = values.training.micro_batch * 17
    spec = TransformerSpec("prior", 3, 16, 4, 48, "pre", 40, 27, 0, 0, grid=(4, 4))

    def activations(**options) -> float:
        return memory_by_part(values, replace(spec, **options), 1, 1, False)["activations"] * 2**30

    plain = activations()
    assert activations(normalization="rms") == plain
    assert activations(activation="swiglu") - plain == pytest.approx(3 * rows * 48 * 4 / 2)
    for options in ({"qk_norm": True}, {"positions": "rotary2d"}, {"qk_norm": True, "positions": "rotary2d"}):
        assert activations(**options) - plain == pytest.approx(3 * rows * 2 * 16 * 4 / 2)
    again = recipe(tmp_path, tmp_path, parallel__tensor=2, training__recompute="feed_forward")
    kept = memory_by_part(again, spec, 1, 1, False)["activations"] * 2**30
    assert plain - kept == pytest.approx(2 * rows * 2 * 48 * 4 / 2)  # two of three layers
    again = recipe(tmp_path, tmp_path, parallel__tensor=2, training__recompute="attention")
    kept = memory_by_part(again, spec, 1, 1, False)["activations"] * 2**30
    assert plain - kept == pytest.approx(2 * rows * 4 * 16 * 4 / 2)
    spread = recipe(tmp_path, tmp_path, parallel={"tensor": 2, "sequence": True})
    kept = memory_by_part(spread, spec, 1, 1, False)["activations"] * 2**30
    assert plain - kept == pytest.approx(3 * rows * 16 * (6 * 4 + 2) / 2)
