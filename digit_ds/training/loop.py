"""The training run: from a recipe to metrics, checkpoints and a trained model."""

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from digit_ds.config import Recipe
from digit_ds.data.stream import Chunks, TokenBatch, TokenStream, chained_hash, sample_hash
from digit_ds.model.megatron import seed_dropout
from digit_ds.model.sequences import Sequence, training_sequence
from digit_ds.model.weights import parameter_count
from digit_ds.parallel import launch, topology
from digit_ds.parallel.decide import agree, together
from digit_ds.parallel.frameworks import parallel_state
from digit_ds.parallel.mailbox import Mailbox
from digit_ds.parallel.workers import protect_resource_tracker, worker_errors_in_one_line
from digit_ds.training import micro_batch, resume, runs
from digit_ds.training.checkpoint import Checkpoints
from digit_ds.training.deepspeed_config import read_deepspeed_config
from digit_ds.training.engine import check_start
from digit_ds.training.flops import flops_per_image
from digit_ds.training.guard import Diverged, SkipGuard
from digit_ds.training.metric_lines import MetricLines, Samples
from digit_ds.training.metrics import Clock, Reporter, memory_gib, peak_tflops, warn
from digit_ds.training.pace import Pace
from digit_ds.training.preemption import STATUS, StopSignal
from digit_ds.training.preview import Figures, Preview, SampleGrid
from digit_ds.training.profile import Profile
from digit_ds.training.replicas import ReplicaCheck
from digit_ds.training.schedule import learning_rate, random_order_share
from digit_ds.training.watchdog import Watchdog
from digit_ds.workdir import WorkDirectory

STACKS_AFTER = 0.8
"""Share of ``training.timeout_seconds`` without a step after which ranks say where they are; the timeout ends them."""


def train(
    recipe: Recipe,
    sample_grid: SampleGrid | None = None,
    figures: Figures | None = None,
    changes: resume.Changes = resume.NO_CHANGES,
) -> None:
    """Train, from the newest complete checkpoint if the run directory has one.

    Works alone and under torchrun, the deepspeed launcher and srun; every process calls it. ``sample_grid`` and
    ``figures`` are called after each checkpoint in a process of rank 0's own, to which they are pickled; the picture
    goes to TensorBoard, the figures there and to ``metrics.jsonl``. They change nothing of the run, which does not wait
    for them, and when they fail it goes on. ``changes`` says what is to differ from before when a run goes on.

    Raises:
        UserError: the recipe, the shards or the run directory cannot be used, or the run diverged.
        SystemExit: with status 75 after SIGTERM, SIGUSR1 or Ctrl-C on any rank; the step was finished and saved.
    """
    protect_resource_tracker()
    try:
        recipe, place = _join(recipe)
    except BaseException:
        topology.abandon()
        raise
    run, watchdog = Path(recipe.run), Watchdog(STACKS_AFTER * recipe.training.timeout_seconds)
    stop = StopSignal()
    try:
        with WorkDirectory(run, partial(runs.check_run_directory, run, recipe, changes.keys)) as directory:
            check_start()
            with worker_errors_in_one_line():
                job = _Run(recipe, place, sample_grid, figures, changes.once(), directory.found)
                try:
                    stopped = job.run(watchdog, stop)
                    job.close()
                    watchdog.stop()
                    topology.finish()  # the other ranks leave
                    if not stopped:
                        job.show_last_previews(stop)
                finally:
                    job.end_report()
    except BaseException:
        topology.abandon()
        raise
    finally:
        watchdog.stop()
        stop.restore()
    if stopped:
        raise SystemExit(STATUS)


def _join(recipe: Recipe) -> tuple[Recipe, topology.Topology]:
    """Join the other processes, once all have read the same recipe and DeepSpeed file.

    Returns:
        The recipe with what it left open, and this process's place.
    """
    launch.initialize(timedelta(seconds=recipe.training.timeout_seconds))
    with together():
        recipe = runs.settle(recipe)
    agree(recipe.model_dump(mode="json"), "the recipe")
    with together():
        deepspeed = read_deepspeed_config(recipe, max(1, launch.world_size() // recipe.parallel.tensor))
    agree(deepspeed, str(recipe.deepspeed))
    return recipe, topology.initialize(recipe.parallel.tensor, recipe.training.timeout_seconds)


class _Run:
    """The parts of one run on this process, and the loop over its steps."""

    def __init__(
        self,
        recipe: Recipe,
        place: topology.Topology,
        sample_grid: SampleGrid | None,
        figures: Figures | None,
        changes: resume.Changes = resume.NO_CHANGES,
        differences: Iterable[runs.Difference] = (),
    ) -> None:
        self.place = place
        self.folder, self.device = Path(recipe.run), launch.device()
        data = recipe.data
        assert data.order != "auto"  # settled before
        self.stream = TokenStream(
            data.shards, data.cache, data.shuffle_seed, f"{recipe.run}/train", data.order, data.cache_limit
        )
        self.validation = (
            TokenStream(data.validation, owner=f"{recipe.run}/validation", order="none") if data.validation else None
        )
        runs.check_shards(recipe, self.stream.manifest, self.validation.manifest if self.validation else None)
        self.spec = runs.model_spec(recipe, self.stream.manifest)
        self.recipe = recipe = micro_batch.settle(recipe, self.spec, place.data_size, self.device)
        settings = recipe.checkpoint
        self.checkpoints = Checkpoints(
            self.folder, settings.keep_last, settings.keep_every, place.world_size, place.sum
        )
        begin = resume.begin(recipe, self.stream.manifest, self.spec, place, self.device, changes, differences)
        self.engine, self.progress, self.provenance = begin.engine, begin.progress, begin.provenance
        self.checkpoints.parent = begin.parent
        self.replicas = ReplicaCheck(self.engine)
        self.mailbox = Mailbox(place.mailbox)
        self.sent_at = 0
        """The step whose message is or was last under way."""
        patience = recipe.training.timeout_seconds
        self.preview = Preview(self.folder, recipe.training.ema_decay > 0, sample_grid, figures, patience)
        self.checkpoints.in_use = self.preview.in_use
        training = recipe.training
        assert training.micro_batch != "auto"  # settled above
        self.chunks = Chunks(training.global_batch, training.micro_batch, place.data_rank, place.data_size)
        self.guard = SkipGuard(self.progress, recipe.training.max_skipped)
        self.pace = Pace(place, self.device, self.chunks.per_step)
        self.used_tokens = torch.zeros(self.spec.vocabulary.output_size, dtype=torch.uint8, device=self.device)
        self.peak = peak_tflops(recipe.monitor.peak_tflops)
        self.report = Reporter(self.folder, self.progress.step, training.steps, runs.recipe_text(recipe))
        self.profile = Profile(self.folder / "profile", recipe.monitor.profile_step)
        self.lines = MetricLines(place, parallel_state.get_data_parallel_group(), self.pace, self.report)

    def run(self, watchdog: Watchdog, stop: StopSignal) -> bool:
        """All steps that are left; whether a signal ended them before."""
        recipe, progress, steps = self.recipe, self.progress, self.recipe.training.steps
        if progress.step >= steps:
            self.report.say(f"{self.folder}: already at step {progress.step} of {steps}, nothing to do")
            return False
        self.report.say(self._headline())
        if (warm_up := recipe.schedule.warmup_steps or 0) >= steps:
            self.report.say(
                f"warning: schedule.warmup_steps {warm_up} is not less than training.steps {steps}: the learning rate "
                "never reaches optimizer.learning_rate"
            )
        clock = Clock()
        self.engine.train()
        stopped = self.place.sum([int(stop.requested())])[0] > 0  # while everything was made ready
        batches = self.stream.batches(self.chunks, progress.images, recipe.data.workers)
        try:
            while progress.step < steps and not stopped:
                with self.profile.step(progress.step + 1):
                    loss, nll, sample_sum = self._step(batches, clock)
                stopped, samples = self._exchange(stop, sample_sum)
                warn(*self.guard.read(keep=1))
                last = stopped or progress.step == steps
                validates, saves = self._validates_at(progress.step), last or self._saves_at(progress.step)
                if (validates or saves) and self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # what it has yet to do is time of this step
                progress.seconds += clock.tick()
                self.report.advance()
                if last or progress.step % recipe.monitor.log_every == 0:
                    self._log(loss, nll, samples, clock)
                with clock.paused():
                    if validates:
                        self._validate()
                    if saves:
                        self._save(wait=last)
                    if not stopped:  # after a signal there is no time left
                        self.preview.begin(self.checkpoints.take_new())
                        self.preview.collect(self.report)
                watchdog.reset()
        except Diverged as error:
            self.lines.wait()
            warn(*error.messages)
            raise
        finally:
            self.profile.close()
            self.checkpoints.settle()
        if stopped:
            print(f"stopped by signal at step {progress.step}", file=sys.stderr, flush=True)
        return stopped

    def close(self) -> None:
        """Give back what the run holds on this node."""
        for stream in (self.stream, self.validation):
            if stream is not None:
                stream.close()

    def show_last_previews(self, stop: StopSignal) -> None:
        """On rank 0, when the others have left: wait for what is still being drawn, unless told to stop."""
        while not stop.requested() and self.preview.collect(self.report, seconds=1.0):
            pass

    def end_report(self) -> None:
        """Nothing more is drawn or written."""
        self.preview.close("the run has ended")
        self.report.close()
        if self.preview.begun:  # what was kept for it
            self.checkpoints.remove_old()

    def _step(self, batches: Iterator[TokenBatch], clock: Clock) -> tuple[Tensor, Tensor, int]:
        """One optimizer step: mean loss and nll of this rank's micro-batches, hash of its samples."""
        training, progress = self.recipe.training, self.progress
        rate = learning_rate(self.recipe, progress.step)
        losses, samples, image_ids = [], 0, []
        for micro in range(self.chunks.per_step):
            self.pace.begin()
            start = time.perf_counter()
            batch = next(batches)
            clock.waited(time.perf_counter() - start)
            chunk = micro * self.place.data_size + self.place.data_rank
            seed_dropout(training.seed, progress.step, chunk)
            share = random_order_share(self.recipe, progress.step)
            sequence = self._sequence(self.stream, batch, training.class_dropout, share)
            self.used_tokens.index_fill_(0, sequence.target.flatten(), 1)  # an assignment would wait for the GPU
            loss, nll = self.engine.loss(sequence.input, sequence.target, sequence.loss_mask, sequence.order)
            self.pace.end()
            self.engine.backward(loss)
            self.engine.step(rate)
            losses.append(torch.stack([loss.detach(), nll]))
            samples += sample_hash(batch.samples)
            image_ids += batch.image_ids
        progress.step += 1
        progress.images += training.global_batch
        self.guard.note(progress.step, self.engine.gradient_norm, image_ids)
        loss, nll = torch.stack(losses).mean(0)
        return loss, nll, samples

    def _sequence(
        self, stream: TokenStream, batch: TokenBatch, class_dropout: float = 0.0, random_share: float = 0.0
    ) -> Sequence:
        """A batch on the device, as the model reads it. All that is random comes from the default generator."""
        codes = batch.discriminative.to(self.device, non_blocking=True) if self.spec.kind != "vq" else None
        vq = batch.vq.to(self.device, non_blocking=True) if self.spec.kind != "prior" and batch.vq is not None else None
        labels = None
        if self.spec.classes:
            batch.check_labels(self.spec.classes, stream.shards)
            labels = batch.labels.to(self.device, non_blocking=True)
        return training_sequence(self.spec, codes, vq, labels, class_dropout=class_dropout, random_share=random_share)

    def _exchange(self, stop: StopSignal, samples: int) -> tuple[bool, Samples]:
        """Once a step, between hosts: is a stop requested, whose save is done, which samples, hashes of copies.

        What was sent is read at the end of the next step, when it has long arrived. Where the step is saved, which all
        ranks wait for in any case, it is read at once: the checkpoint holds its samples. All ranks read at the same
        steps, so all come to the same decision.

        Returns:
            Whether to stop, and the samples of this step.
        """
        stopped = self._read_mail()  # of the step before
        own = samples if self.place.tensor_rank == 0 else 0
        found = Samples(self.progress.samples_hash, own)
        self.mailbox.send([int(stop.requested()), *self.checkpoints.status, own, *self.replicas.status])
        self.sent_at = self.progress.step
        self.replicas.note(self.progress.step)
        if stopped or self._saves_at(self.progress.step):
            stopped |= self._read_mail()
        return stopped, found

    def _read_mail(self) -> bool:
        """Act on the sums of the last message, if one is under way; whether a stop was requested."""
        if (sums := self.mailbox.receive()) is None:
            return False
        stopped, written, failed, samples, *hashes = sums
        self.checkpoints.poll(written, failed)
        self.replicas.poll(self.sent_at, hashes)
        self.progress.samples_hash = chained_hash(self.progress.samples_hash, samples)
        return stopped > 0

    def _saves_at(self, step: int) -> bool:
        return step == self.recipe.training.steps or step % self.recipe.checkpoint.every == 0

    def _validates_at(self, step: int) -> bool:
        every = self.recipe.monitor.validate_every
        return self.validation is not None and every > 0 and step % every == 0

    def _log(self, loss: Tensor, nll: Tensor, samples: Samples, clock: Clock) -> None:
        """Begin the line of metrics of this step; the numbers of other ranks are still to come."""
        recipe, progress = self.recipe, self.progress
        rates = clock.summary(recipe.training.global_batch, self.spec.sequence_length)
        tflops = rates["images_per_second"] * flops_per_image(self.spec) / self.place.world_size / 1e12
        to_come = dict.fromkeys(("rank_seconds_max", "rank_seconds_median", "slowest_rank"))
        values = {
            "step": progress.step,
            "images": progress.images,
            "epoch": progress.images / self.stream.manifest.images,
            "loss": None,
            "nll": None,
            "grad_norm": None,
            "lr": learning_rate(recipe, progress.step - 1),
            **rates,
            **to_come,
            "tflops": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "memory_gib": memory_gib(self.device),
            "token_usage": None,
            "skipped_updates": progress.skipped,
            "training_seconds": progress.seconds,
            "sample_ids_hash": None,
        }
        self.lines.begin(values, loss, nll, self.engine.gradient_norm, self.used_tokens, samples)
        self.used_tokens = torch.zeros_like(self.used_tokens)

    @torch.no_grad()
    def _validate(self) -> None:
        """Mean nll over all validation images."""
        assert self.validation is not None
        self.lines.wait()
        self.engine.evaluate()
        seed_dropout(self.recipe.training.seed, 0, self.place.data_rank)  # NAR masks: the same at every validation
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in self.validation.epoch(self.chunks.micro_batch, self.place.data_rank, self.place.data_size):
            sequence = self._sequence(self.validation, batch)
            mask = batch.real.to(self.device).unsqueeze(1).expand_as(sequence.target)
            if sequence.loss_mask is not None:
                mask = mask & sequence.loss_mask
            _, nll = self.engine.loss(sequence.input, sequence.target, mask)
            total += torch.stack([nll * mask.sum(), mask.sum()])
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        self.report.log({"step": self.progress.step, "validation_nll": float(total[0] / total[1])})
        self.engine.train()

    def _save(self, wait: bool) -> None:
        """Begin a checkpoint of this step; ``wait``: until it is complete."""
        warn(*self.guard.read(keep=0))
        self.lines.wait()  # no checkpoint is ahead of the metrics
        self.checkpoints.wait()  # for the one before
        self.preview.begin(self.checkpoints.take_new())  # before this save removes it
        save = self.checkpoints.save if wait else self.checkpoints.start
        save(self.engine, self.spec, self.progress, {"provenance": self.provenance})

    def _headline(self) -> str:
        """What runs and where, in five lines."""
        place, manifest, spec, training = self.place, self.stream.manifest, self.spec, self.recipe.training
        tokens = "{}x{}".format(*spec.grid)
        named = {
            "run": f"{self.folder}, from step {self.progress.step} of {training.steps}",
            "model": f"{spec.kind}, {parameter_count(spec):,} parameters: {spec.layers} layers of width {spec.width}",
            "data": f"{self.stream.shards}: {manifest.images:,} images x {manifest.views} views of {tokens} tokens",
            "batch": f"{training.global_batch} images, {self.chunks.per_step} micro-batches of "
            f"{self.chunks.micro_batch} on each of {place.data_size} data-parallel ranks",
            "layout": f"tensor {place.tensor_size} x data {place.data_size}, ZeRO {self.engine.stage}, "
            f"{training.precision} on {self._device_name()}; {self.engine.kernels}",
        }
        return "\n".join(f"{name:7} {text}" for name, text in named.items())

    def _device_name(self) -> str:
        """Human-readable names of the devices."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
