"""The whole pipeline on handwritten digits, driven by the commands that a user of real data would type.

Every step is a command in a process of its own (``stages.py``). A finished one leaves OUT/steps/NAME.json and is not
repeated; an interrupted one continues as its command does. Steps that do not need each other run side by side, one for
each core, and write to OUT/logs/NAME.log.
"""

import os
import shlex
from pathlib import Path

from digit_ds.config import load_recipe
from digit_ds.demo.settings import DemoSettings
from digit_ds.demo.stages import FULL, RECIPES, SMALL, Scale, Stages
from digit_ds.demo.steps import Step, claim, run_steps


def run(settings: DemoSettings) -> None:
    """Do the steps that ``settings.out``, a new folder or that of an earlier run, lacks; print where the results are.

    Raises:
        UserError: the folder holds something else, or a step failed.
    """
    out, small = Path(settings.out).resolve(), settings.small
    with claim(out, "demo.json", {"small": small}):
        cores = len(os.sched_getaffinity(0))
        if not run_steps(steps(out, SMALL if small else FULL), jobs=cores):
            print(f"{out}: complete already, nothing to do; delete the folder to start again")
    print(
        f"\npictures   {out / 'samples.png'}\nreport     {out / 'report.html'}\nfigures    {out / 'report.json'}\n"
        f"curves     tensorboard --logdir {shlex.quote(str(out))}"
    )


def steps(out: Path, scale: Scale) -> list[Step]:
    """All steps in their order."""
    stages = Stages(out, scale)
    prior, pixel_decoder = out / "models" / "prior", out / "models" / "pixel_ar"
    pixel_sampling = ("--decoder", pixel_decoder, "--decoder-top-p", scale.decoder_top_p)
    prior_sampling = ("--prior", prior, "--temperature", scale.temperature, "--guidance", scale.guidance)
    half = load_recipe(RECIPES / "prior.yaml").model.max_positions // 2
    return [
        *stages.shared(),
        stages.train("prior", "prior", out / "prior"),
        stages.train("pixel_ar", "pixel_ar", out / "pixel_ar"),
        stages.verb("export_prior", "export", out / "prior", prior, needs=("prior",)),
        stages.verb("export_pixel_ar", "export", out / "pixel_ar", pixel_decoder, needs=("pixel_ar",)),
        stages.sample(
            *("sample", out / "samples", *prior_sampling, *pixel_sampling),
            needs=("export_prior", "export_pixel_ar"),
        ),
        stages.rebuild("reconstruct", out / "reconstructions", *pixel_sampling, needs=("export_pixel_ar",)),
        stages.rebuild(
            *("complete", out / "completions", *prior_sampling, *pixel_sampling, "--keep", half),
            needs=("export_prior", "export_pixel_ar"),
        ),
        stages.evaluate("evaluate_real", stages.held_out_images, out / "fidelity_real.json", needs=("judge",)),
        stages.evaluate("evaluate", out / "samples" / "images", out / "fidelity.json", needs=("sample",)),
        stages.probe("probe", prior, out / "probe", needs=("export_prior",)),
        stages.module(
            *("report", "report", out, "--set", scale.pictures),
            needs=("reconstruct", "complete", "evaluate", "evaluate_real", "probe"),
        ),
    ]
