"""The interface of all samplers, and the autoregressive one; the parallel one is in ``maskgit.py``.

Shapes: ``B`` images, ``R`` rows of one model call, ``G`` tokens of an image, ``K`` codes, ``V`` vocabulary.

The random numbers of an image depend only on the seed and on the number of the image (``draws.py``), not on batch or
world size. Batch and world size can change the rounding of the logits, since a matrix product of another shape may sum
in another order; a sampled token whose random number falls within that error of a boundary then differs. Two things
keep pictures equal. Every model call has the same number of rows, since the last batch is padded, so neither the end of
a job nor the number of processes changes a shape. In float64, the CPU's default, the error is so small (1e-14 per
token) that other batch sizes give equal pictures as well. In bfloat16 another *batch size* may change single tokens.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from digit_ds.errors import UserError
from digit_ds.generation.draws import philox_uniforms
from digit_ds.generation.filtering import candidates, draw, wide
from digit_ds.generation.settings import Decoding
from digit_ds.model.sequences import prompt_tokens
from digit_ds.model.transformer import Transformer
from digit_ds.vocabulary import EOS


class Sampler(ABC):
    """Samples the codes of images with one model.

    Args:
        model: the transformer, on its device and in its precision.
        decoding: how tokens are drawn.
        seed: the job's seed.
        purpose: which random stream of an image this model uses (``draws.PRIOR``, ``draws.PIXELS``).
        rows: images of one model call; smaller batches are padded to it.
    """

    def __init__(self, model: Transformer, decoding: Decoding, seed: int, purpose: int, rows: int):
        self.model, self.decoding, self.seed, self.purpose, self.rows = model, decoding, seed, purpose, rows
        self.spec = model.spec
        self.device = next(model.parameters()).device
        if decoding.guidance.active and not self.spec.classes:
            raise UserError(
                f"guidance scale is {decoding.guidance.scale}, but this {self.spec.kind} model is not class-conditional"
            )

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, labels: Tensor | None = None, prefix: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        """Write the codes of ``images``.

        Args:
            images: int64 [B], global image numbers; they choose the random numbers.
            labels: int64 [B] for a class-conditional model; None: unconditional.
            prefix: int64 [B, G] discriminative codes that a pixel decoder is given.
            known: int64 [B, G] codes to keep as they are, -1 where one is to be written; None: all are.

        Returns:
            int64 [B, G] on the CPU, codes without the special-token offset.
        """
        if known is None:
            known = torch.full((len(images), self.spec.tokens), -1)
        written = []
        for start in range(0, len(images), self.rows):
            # Missing rows are filled with copies of the last one, whose output is dropped.
            index = torch.arange(start, start + self.rows).clamp(max=len(images) - 1)
            own_labels, own_prefix = (None if part is None else part[index] for part in (labels, prefix))
            codes = self._sample(images[index], own_labels, own_prefix, known[index])
            written.append(codes[: len(images) - start].cpu())
        return torch.cat(written)

    @abstractmethod
    def _sample(self, images: Tensor, labels: Tensor | None, prefix: Tensor | None, known: Tensor) -> Tensor:
        """:meth:`__call__` for exactly R images."""

    def _prompts(self, labels: Tensor | None, prefix: Tensor | None) -> Tensor:
        """What every sequence begins with, int64 [R, P + 1]; with guidance [2R, P + 1], the unconditional half last."""
        prompts = prompt_tokens(self.spec, prefix, labels, self.rows)
        if self.decoding.guidance.active:
            prompts = torch.cat([prompts, prompt_tokens(self.spec, prefix, None, self.rows)])
        return prompts.to(self.device)


def guide(logits: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance: logits [2R, ..., V] of the conditional and the unconditional half -> [R, ..., V]."""
    conditional, unconditional = wide(logits).chunk(2)
    return unconditional + scale * (conditional - unconditional)


class AutoregressiveSampler(Sampler):
    """One token after the other in row-major order, with a key/value cache.

    All tensors that a step reads and writes keep their addresses, positions included, so that on a GPU the step, with
    the sampling of the token, is captured once in a CUDA graph and replayed for every token of every batch without
    synchronising with the host.
    """

    def __init__(self, model: Transformer, decoding: Decoding, seed: int, purpose: int, rows: int):
        super().__init__(model, decoding, seed, purpose, rows)
        tokens, sequences = self.spec.tokens, rows * (2 if decoding.guidance.active else 1)
        # The last token is never read back, so it needs no place in the cache.
        self._cache = model.new_cache(sequences, self.spec.sequence_length - 1)
        self._token = torch.full((sequences, 1), EOS, device=self.device)
        self._codes = torch.zeros(rows, tokens, dtype=torch.int64, device=self.device)
        self._known = torch.zeros_like(self._codes)
        self._numbers = torch.zeros(rows, tokens, dtype=torch.float64, device=self.device)
        self._scales = torch.tensor(decoding.guidance.scales(tokens), device=self.device)
        # Matrix products whose width is no multiple of 8 are several times as slow on a GPU.
        output = model.output.weight
        self._output = functional.pad(output, (0, 0, 0, -len(output) % 8))
        self._graph: torch.cuda.CUDAGraph | None = None

    def _sample(self, images: Tensor, labels: Tensor | None, prefix: Tensor | None, known: Tensor) -> Tensor:
        if self.device.type == "cuda" and self._graph is None:
            self._graph = self._capture()
        prompts = self._prompts(labels, prefix)
        self._numbers.copy_(philox_uniforms(self.seed, images.to(self.device), self.purpose, self.spec.tokens))
        self._known.copy_(known)
        self._token.copy_(prompts[:, -1:])
        self._cache.reset()
        if self.spec.prefix_length:
            self.model.append(prompts[:, :-1], self._cache)
        for _ in range(self.spec.tokens):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        return self._codes.clone()

    def _step(self) -> None:
        """Read the last token, write the next one."""
        position = self._cache.position - self.spec.prefix_length  # [1], of the code to write
        hidden = self.model.append(self._token, self._cache)[:, 0]
        logits = functional.linear(hidden, self._output)[:, : self.spec.vocabulary.output_size]
        known, numbers = (part.index_select(1, position)[:, 0] for part in (self._known, self._numbers))
        codes = self._next(logits, numbers, known, self._scales[position])[:, None]
        self._codes.index_copy_(1, position, codes)
        self._token.copy_(self.spec.vocabulary.token(codes).repeat(len(self._token) // self.rows, 1))

    def _next(self, logits: Tensor, numbers: Tensor, known: Tensor, scale: Tensor | float) -> Tensor:
        """Logits [R or 2R, V] -> codes [R]."""
        if self.decoding.guidance.active:
            logits = guide(logits, scale)
        decoding = self.decoding
        drawn = draw(*candidates(logits, decoding.temperature, decoding.top_k, decoding.top_p), numbers)
        return torch.where(known < 0, drawn, known)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record one step; the steps that warm it up write nonsense that the caller resets."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._cache.reset()
            self._cache.position.add_(self.spec.prefix_length)
            for _ in range(3):
                self._step()
            self._cache.reset()
            self._cache.position.add_(self.spec.prefix_length)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph
