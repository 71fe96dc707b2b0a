"""``digit-ds guidance``: pictures and scores for every scale and exponent, and which combination is best."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from digit_ds.evaluation.extractors import open_extractor
from digit_ds.evaluation.fidelity import evaluate
from digit_ds.evaluation.pictures import open_pictures
from digit_ds.evaluation.settings import EvaluateSettings
from digit_ds.files import make_directory, write_json
from digit_ds.generation.models import check_guidance, first_stage, needed_stages, read_stages
from digit_ds.generation.sample import sample
from digit_ds.generation.settings import SampleSettings
from digit_ds.parallel import launch
from digit_ds.parallel.decide import from_main
from digit_ds.tuning.settings import GuidanceSettings


def search_guidance(settings: GuidanceSettings) -> dict[str, Any]:
    """Sample and score every combination, alone or together with the other processes of the job; rank 0 scores.

    The same call again continues: complete pictures are left as they are, and features of pictures and reference,
    which ``OUT/cache`` names by content, are read back. More scales or exponents may be asked for later.

    Returns:
        What ``OUT/guidance.json`` holds, which is written after each combination: ``tried``, one entry with ``scale``,
        ``exponent`` and the figures of ``evaluate`` for each; ``best``, the entry of the lowest FID; and ``left``, how
        many combinations are still to come.

    Raises:
        UserError: a part is missing or does not fit, or ``out`` holds pictures of other settings.
    """
    launch.initialize()
    jobs = settings.jobs()
    from_main(partial(_check, settings, list(jobs.values())))  # before hours of sampling
    result: dict[str, Any] = {}
    tried: list[dict[str, Any]] = []
    for number, (name, job) in enumerate(jobs.items(), 1):
        sample(job)
        tried.append(from_main(partial(_score, settings, name, job)))
        best = min(tried, key=lambda entry: entry["fid"])
        result = {"best": best, "left": len(jobs) - number, "tried": tried}
        from_main(partial(write_json, Path(settings.out) / "guidance.json", result))
    if launch.is_main():
        for entry in sorted(tried, key=lambda entry: entry["fid"]):
            figure = f"{entry['fid_label']} {entry['fid']:.4f} against {entry['reference_name']}"
            print(f"{figure}: {entry['schedule']}, scale {entry['scale']}, exponent {entry['exponent']}")
    return result


def _check(settings: GuidanceSettings, jobs: Sequence[SampleSettings]) -> None:
    """Refuse what cannot be scored, and guidance that a later combination would be refused for."""
    open_extractor(settings.inception_weights, settings.features)
    open_pictures(settings.reference)
    given = settings.from_images is not None or settings.from_tokens is not None
    first = first_stage(needed_stages(read_stages(settings), given, settings.keep))
    if guided := [job for job in jobs if job.guidance != 1]:
        check_guidance(first, guided[0].prior_decoding)


def _score(settings: GuidanceSettings, name: str, job: SampleSettings) -> dict[str, Any]:
    """An entry of ``tried``."""
    out = Path(settings.out)
    make_directory(out / "scores")
    scores = evaluate(
        EvaluateSettings(
            generated=job.out,
            reference=settings.reference,
            out=str(out / "scores" / f"{name}.json"),
            inception_weights=settings.inception_weights,
            features=settings.features,
            reference_name=settings.reference_name,
            cache=str(out / "cache"),
        )
    )
    chosen = {"scale": job.guidance, "exponent": job.guidance_exponent, "schedule": job.guidance_schedule}
    return {**chosen, "interval": list(job.guidance_interval), **scores}
