"""The stages of the pipeline as steps: the parts that all models share, and what is done with a model.

Special to the demo are the pictures, the two stand-ins and the judge; everything else is a command that a user of real
data would type.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from digit_ds.demo.picture_sets import SIZE
from digit_ds.demo.steps import Step

RECIPES = Path(__file__).parent


@dataclass(frozen=True)
class Scale:
    """Which pictures are used and how much work is done."""

    pictures: str
    """A name of ``picture_sets.SETS``."""
    encoder_steps: int
    vqgan_steps: int
    codes: int
    kmeans_iterations: int
    copies: int
    """Distorted copies of each training digit, from which the models learn instead of from random crops of the digit;
    0: crops. With copies a model sees more handwritings, and samples are not enlarged as crops are."""
    resize: int
    """Pixels to which a digit is enlarged before a view of 32 is cut: 35 move it by up to 1.5 pixels either way."""
    views: int
    first_stage: tuple[str, ...]
    """Overrides of prior.yaml and vq_baseline.yaml."""
    pixels: tuple[str, ...]
    """Overrides of pixel_ar.yaml and pixel_nar.yaml."""
    temperature: float
    """Of the prior's draws."""
    guidance: float
    """Scale of classifier-free guidance of the prior."""
    decoder_top_p: float
    """Of the autoregressive pixel decoder."""
    per_class: int
    probe_passes: int


_ROTARY = ("model.positions=rotary2d", "model.qk_norm=true")
"""A pixel decoder finds the place of each token sooner with them."""
_FORGETFUL = ("optimizer.betas=[0.9,0.95]",)
"""In a run of so few steps and so high a learning rate, Adam's second moment has to follow the gradients sooner."""
_SELDOM = ("monitor.validate_every=200", "checkpoint.every=200")
FULL = Scale(
    pictures="mnist",
    encoder_steps=1300,
    vqgan_steps=400,
    codes=512,
    kmeans_iterations=20,
    copies=4,
    resize=SIZE,
    views=1,
    first_stage=(
        *("model.layers=3", "model.qk_norm=true", "model.dropout=0.05", "optimizer.learning_rate=6e-3"),
        *("training.steps=600", *_FORGETFUL, *_SELDOM),
    ),
    pixels=(
        *("model.layers=2", *_ROTARY, "model.dropout=0.0", "optimizer.learning_rate=15e-3"),
        *("training.steps=1200", *_FORGETFUL, *_SELDOM),
    ),
    temperature=0.5,
    guidance=2.0,
    decoder_top_p=0.1,
    per_class=50,
    probe_passes=20,
)
_NARROW = ("model.layers=2", "model.width=64", "model.heads=2", "checkpoint.every=100")
SMALL = Scale(
    pictures="digits",
    encoder_steps=60,
    vqgan_steps=80,
    codes=64,
    kmeans_iterations=5,
    copies=0,
    resize=35,
    views=8,
    first_stage=(*_NARROW, "optimizer.learning_rate=4e-3", "training.steps=400"),
    pixels=(*_NARROW, *_ROTARY, "optimizer.learning_rate=4e-3", "training.steps=400"),
    temperature=0.9,
    guidance=2.5,
    decoder_top_p=0.4,
    per_class=10,
    probe_passes=100,
)


class Stages:
    """Makes the steps of one folder of results.

    Args:
        out: the folder, absolute.
        scale: how much work they do.
    """

    def __init__(self, out: Path, scale: Scale):
        self.out, self.scale = out, scale
        self.train_images, self.held_out_images = out / "images" / "train", out / "images" / "val"
        self.train_shards, self.held_out_shards = out / "shards" / "train", out / "shards" / "val"
        self.encoder, self.codebook = out / "stand_ins" / "dinov2_digits.pth", out / "km.npy"
        self.judge = out / "stand_ins" / "judge.safetensors"
        vqgan, config = out / "stand_ins" / "vqgan_digits.ckpt", out / "stand_ins" / "vqgan_digits.yaml"
        self.vqgan, self.painter = (vqgan, config), ("--vqgan", vqgan, "--vqgan-config", config)

    def shared(self) -> list[Step]:
        """From the pictures to checked token shards: what every model is made from."""
        scale, features = self.scale, self.out / "features"
        tokenise = (
            *("tokenize", "--encoder", self.encoder, "--codebook", self.codebook, *self.painter),
            *("--resize", scale.resize, "--no-flip"),
        )
        tokenised = self.out / "images" / "copies" if scale.copies else self.train_images
        copies = ("--copies", scale.copies) if scale.copies else ()
        extract = ("features", "--images", self.train_images, "--encoder", self.encoder)
        return [
            self.module("digits", "digits", self.out / "images", "--set", scale.pictures, *copies),
            self.module(
                *("encoder", "stand_in_encoder", self.train_images, self.encoder, "--steps", scale.encoder_steps),
                needs=("digits",),
            ),
            self.module(
                *("vqgan", "stand_in_vqgan", self.train_images, *self.vqgan, "--steps", scale.vqgan_steps),
                needs=("digits",),
            ),
            self.verb("features", *extract, "--out", features, "--no-flip", needs=("encoder",)),
            self.verb(
                *("kmeans", "kmeans", "--features", features, "--clusters", scale.codes),
                *("--iterations", scale.kmeans_iterations, "--out", self.codebook),
                needs=("features",),
            ),
            self.verb(
                *("tokens_train", *tokenise, "--images", tokenised, "--views", scale.views),
                *("--out", self.train_shards),
                needs=("kmeans", "vqgan"),
            ),
            self.verb(
                *("tokens_val", *tokenise, "--images", self.held_out_images, "--out", self.held_out_shards),
                needs=("kmeans", "vqgan"),
            ),
            self.verb("verify_train", "verify", self.train_shards, needs=("tokens_train",)),
            self.verb("verify_val", "verify", self.held_out_shards, needs=("tokens_val",)),
            # Nothing above waits for it.
            self.module("judge", "judge", self.train_images, self.judge, needs=("digits",)),
        ]

    def train(self, name: str, recipe: str, run: Path, *overrides: str) -> Step:
        """Train RECIPE.yaml of this folder."""
        scaled = self.scale.pixels if recipe.startswith("pixel") else self.scale.first_stage
        shards = (f"data.shards={self.train_shards}", f"data.validation={self.held_out_shards}")
        words = (RECIPES / f"{recipe}.yaml", f"run={run}", *shards, *scaled, *overrides)
        return self.verb(name, "train", *words, needs=("verify_train", "verify_val"))

    def sample(self, name: str, out: Path, *words: object, needs: Sequence[str]) -> Step:
        """Draw pictures, the same number of each class; ``words`` name the models and how they are drawn from."""
        return self.verb(
            name, "sample", *words, *self.painter, "--out", out, "--per-class", self.scale.per_class, needs=needs
        )

    def rebuild(self, name: str, out: Path, *words: object, needs: Sequence[str]) -> Step:
        """Held-out pictures -> discriminative tokens -> a pixel decoder, which ``words`` name."""
        given = ("--from-images", self.held_out_images, "--resize", self.scale.resize)
        made = ("--encoder", self.encoder, "--codebook", self.codebook)
        return self.verb(name, "sample", *words, *self.painter, "--out", out, *given, *made, needs=needs)

    def evaluate(self, name: str, pictures: Path, scores: Path, *, needs: Sequence[str]) -> Step:
        """FID and Inception Score against the training images, with the features of the judge's network."""
        words = ("--generated", pictures, "--reference", self.train_images, "--features", self.judge, "--out", scores)
        return self.verb(name, "evaluate", *words, needs=needs)

    def probe(self, name: str, model: Path, out: Path, *words: object, needs: Sequence[str]) -> Step:
        """Linear probes of a first-stage model."""
        shards = ("--train", self.train_shards, "--val", self.held_out_shards)
        passes = ("--passes", self.scale.probe_passes)
        return self.verb(name, "probe", "--model", model, *shards, *passes, "--out", out, *words, needs=needs)

    def module(self, name: str, module: str, *words: object, needs: Sequence[str] = ()) -> Step:
        """``python -m digit_ds.demo.MODULE WORDS``."""
        return self._step(name, "-m", f"digit_ds.demo.{module}", *words, needs=needs)

    def verb(self, name: str, verb: str, *words: object, needs: Sequence[str] = ()) -> Step:
        """``digit-ds VERB WORDS``."""
        return self._step(name, "-m", "digit_ds", verb, *words, needs=needs)

    def _step(self, name: str, *words: object, needs: Sequence[str]) -> Step:
        return Step(name, self.out, (sys.executable, *map(str, words)), tuple(needs))
