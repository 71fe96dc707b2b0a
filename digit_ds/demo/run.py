"""The whole pipeline on handwritten digits, driven by the commands that a user of real data would type.

Special to the demo are the pictures, the two stand-ins and the report; every other step is a contract command in a
process of its own. A finished step leaves OUT/steps/NAME.json and is not repeated; an interrupted one continues as its
command does.
"""

import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import digit_ds
from digit_ds.errors import UserError
from digit_ds.files import read_json, write_json

VIEW_RESIZE = 35
"""Pixels to which a digit is enlarged before a view of 32 is cut: it moves by up to 1.5 pixels either way."""

_HERE = Path(__file__).parent
_TOOLS = Path(digit_ds.__file__).parents[1] / "tools"


@dataclass(frozen=True)
class Scale:
    """How much work the demo does."""

    encoder_steps: int
    vqgan_steps: int
    codes: int
    kmeans_iterations: int
    views: int
    prior: tuple[str, ...]
    """Overrides of prior.yaml."""
    pixel_ar: tuple[str, ...]
    """Overrides of pixel_ar.yaml."""
    per_class: int


FULL = Scale(
    encoder_steps=400,
    vqgan_steps=400,
    codes=256,
    kmeans_iterations=20,
    views=8,
    prior=(),
    pixel_ar=(),
    per_class=50,
)
_NARROW = ("model.layers=2", "model.width=64", "model.heads=2", "checkpoint.every=100")
SMALL = Scale(
    encoder_steps=60,
    vqgan_steps=80,
    codes=64,
    kmeans_iterations=5,
    views=8,
    prior=(*_NARROW, "optimizer.learning_rate=4e-3", "training.steps=400"),
    pixel_ar=(*_NARROW, "optimizer.learning_rate=4e-3", "training.steps=400"),
    per_class=10,
)


def run(out: Path | str, small: bool = False) -> None:
    """Do the steps that ``out`` lacks and print where the results are.

    Args:
        out: folder for everything; new, or that of an earlier run of the same size.
        small: a few steps of everything, to see that it runs; its pictures are poor.

    Raises:
        UserError: ``out`` holds something else, or a step failed.
    """
    out = Path(out).resolve()
    if not (_TOOLS / "tokenize_images.py").is_file():
        raise UserError(f"{_TOOLS}: holds no tools, expected the demo to run from a checkout of the repository")
    _claim(out, {"small": small})
    todo = [step for step in steps(out, SMALL if small else FULL) if not step.is_done()]
    if not todo:
        print(f"{out}: complete already, nothing to do; delete the folder to start again")
    # As Ctrl-C does: the running command is told, and training saves what it has.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number, step in enumerate(todo, start=1):
            print(f"\n[{number}/{len(todo)}] {step.name}\n$ {shlex.join(step.command)}", flush=True)
            step.run()
    except KeyboardInterrupt:
        print(f"\ninterrupted in step {step.name}; the same demo command continues there", file=sys.stderr, flush=True)
        sys.exit(130)
    print(
        f"\npictures   {out / 'samples.png'}\nreport     {out / 'report.html'}\nfigures    {out / 'report.json'}\n"
        f"curves     tensorboard --logdir {shlex.quote(str(out))}"
    )


def _claim(out: Path, settings: dict) -> None:
    """Refuse a folder with other results; leave the settings in ours."""
    marker = out / "demo.json"
    if marker.exists():
        found = read_json(marker)
        if found != settings:
            raise UserError(f"{out}: holds a demo run with {found}, expected {settings}; name another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and holds no demo run (no demo.json), expected a new or empty folder")
    else:
        write_json(marker, settings)


@dataclass(frozen=True)
class Step:
    """One command, and the note that says it is done."""

    name: str
    out: Path
    command: list[str]

    @property
    def note(self) -> Path:
        """JSON with ``seconds`` (of the attempt that finished) and ``peak_gib`` (of the largest process so far)."""
        return self.out / "steps" / f"{self.name}.json"

    def is_done(self) -> bool:
        """Whether an earlier run finished this step with this very command."""
        if not self.note.exists():
            return False
        if read_json(self.note).get("command") != self.command:
            raise UserError(f"{self.note}: is of another version of the demo; delete {self.out} to start again")
        return True

    def run(self) -> None:
        """Run to the end and leave the note.

        Raises:
            UserError: the command failed; it has said why.
        """
        start = time.perf_counter()
        # The networks are small: a second thread gains little, and on a busy machine waiting OpenMP threads keep the
        # cores from those that have work.
        process = subprocess.Popen(self.command, env={"OMP_NUM_THREADS": "1", **os.environ})
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        if status:
            raise UserError(f"{self.name}: ended with status {status}; the same demo command continues from here")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        seconds = round(time.perf_counter() - start, 1)
        write_json(self.note, {"command": self.command, "seconds": seconds, "peak_gib": round(peak, 2)})


def steps(out: Path, scale: Scale) -> list[Step]:
    """All steps in their order."""
    train_images, held_out_images = out / "images" / "train", out / "images" / "val"
    train_shards, held_out_shards = out / "shards" / "train", out / "shards" / "val"
    encoder, codebook = out / "stand_ins" / "dinov2_digits.pth", out / "km.npy"
    vqgan, vqgan_config = out / "stand_ins" / "vqgan_digits.ckpt", out / "stand_ins" / "vqgan_digits.yaml"
    features, judge = out / "features", out / "stand_ins" / "judge.safetensors"
    prior, pixel_decoder = out / "models" / "prior", out / "models" / "pixel_ar"
    painter = ["--vqgan", vqgan, "--vqgan-config", vqgan_config]
    tokenise = ["--encoder", encoder, "--codebook", codebook, *painter, "--resize", VIEW_RESIZE, "--no-flip"]
    shards = [f"data.shards={train_shards}", f"data.validation={held_out_shards}"]
    pixel_sampling = ["--decoder", pixel_decoder, *painter, "--decoder-top-p", 0.8]

    def demo(module: str, *arguments: object) -> list[str]:
        return _command("-m", f"digit_ds.demo.{module}", *arguments)

    def tool(script: str, *arguments: object) -> list[str]:
        return _command(_TOOLS / script, *arguments)

    def verb(*arguments: object) -> list[str]:
        return _command("-m", "digit_ds", *arguments)

    commands = {
        "digits": demo("digits", out / "images"),
        "judge": demo("judge", train_images, judge),
        "encoder": demo("stand_in_encoder", train_images, encoder, "--steps", scale.encoder_steps),
        "vqgan": demo("stand_in_vqgan", train_images, vqgan, vqgan_config, "--steps", scale.vqgan_steps),
        "features": tool(
            "extract_features.py", "--images", train_images, "--encoder", encoder, "--out", features, "--no-flip"
        ),
        "kmeans": tool(
            "train_kmeans.py",
            *("--features", features, "--clusters", scale.codes, "--iterations", scale.kmeans_iterations),
            *("--out", codebook),
        ),
        "tokens_train": tool(
            "tokenize_images.py",
            *("--images", train_images, *tokenise, "--views", scale.views, "--out", train_shards),
        ),
        "tokens_val": tool("tokenize_images.py", "--images", held_out_images, *tokenise, "--out", held_out_shards),
        "verify_train": tool("verify_shards.py", train_shards),
        "verify_val": tool("verify_shards.py", held_out_shards),
        "prior": verb("train", _HERE / "prior.yaml", f"run={out / 'prior'}", *shards, *scale.prior),
        "pixel_ar": verb("train", _HERE / "pixel_ar.yaml", f"run={out / 'pixel_ar'}", *shards, *scale.pixel_ar),
        "export_prior": verb("export", out / "prior", prior),
        "export_pixel_ar": verb("export", out / "pixel_ar", pixel_decoder),
        "sample": verb(
            *("sample", "--prior", prior, *pixel_sampling, "--out", out / "samples"),
            *("--per-class", scale.per_class, "--temperature", 0.9, "--guidance", 2.5),
        ),
        "reconstruct": verb(
            *("sample", *pixel_sampling, "--out", out / "reconstructions"),
            *("--from-images", held_out_images, "--resize", VIEW_RESIZE, "--encoder", encoder, "--codebook", codebook),
        ),
        "evaluate": verb(
            *("evaluate", "--generated", out / "samples" / "images", "--reference", train_images),
            *("--features", judge, "--out", out / "fidelity.json"),
        ),
        "probe": verb(
            *("probe", "--model", prior, "--train", train_shards, "--val", held_out_shards),
            *("--passes", 100, "--out", out / "probe"),
        ),
        "report": demo("report", out),
    }
    return [Step(name, out, command) for name, command in commands.items()]


def _command(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]
