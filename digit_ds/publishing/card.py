"""The model card: what a reader of the hub's page is told of a model."""

import json
from collections.abc import Mapping
from typing import Any

from digit_ds.errors import UserError
from digit_ds.model.spec import TransformerSpec

PAPER = "https://arxiv.org/abs/2410.12490"
_KINDS = {
    "prior": "a prior over discriminative tokens (stage 1)",
    "ar": "an autoregressive pixel decoder (stage 2)",
    "nar": "a parallel (MaskGIT) pixel decoder (stage 2)",
    "vq": "a GPT over VQ tokens",
}
_PARTS = """| part | licence |
|---|---|
| these weights | {licence} |
| DiGIT, the published code and weights | MIT |
| DINOv2, whose features the codebook clusters | Apache-2.0 |
| MAGE's VQGAN, which paints the pixels | MIT |

The last three are not part of this repository; the rows of DINOv2 and MAGE apply where the tokens were made with their
weights. Pictures and annotations that a model was trained on have terms of their own (ImageNet's allow non-commercial
research).
"""
_FIGURES = {
    "fid": "FID",
    "inception_score": "Inception Score",
    "fdd": "FDD",
    "precision": "precision",
    "recall": "recall",
}


def model_card(
    repository: str,
    spec: TransformerSpec,
    provenance: Mapping[str, Any],
    licence: str,
    scores: Mapping[str, Any] | None = None,
    recipe: str | None = None,
) -> str:
    """The text of ``README.md``: metadata for the hub, then sizes, recipe, identity of the data, scores and licences.

    Args:
        repository: ``OWNER/NAME``.
        spec: of the model.
        provenance: of the model; what it holds is printed as it is.
        licence: of the weights, by the hub's name.
        scores: what ``evaluate`` wrote.
        recipe: the run's YAML.

    Raises:
        UserError: ``scores`` hold none of the figures that ``evaluate`` writes.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=licence,
        library_name="digit_ds",
        pipeline_tag="unconditional-image-generation",
        tags=["digit", "image-generation", spec.kind],
    )
    parts = [f"---\n{data.to_yaml()}\n---\n\n# {repository.split('/')[1]}\n"]
    parts.append(
        f"DiGIT ([arXiv 2410.12490]({PAPER})): {_KINDS[spec.kind]}, {spec.layers} layers of width {spec.width}, "
        f"{spec.classes or 'no'} classes.\n\n```python\nimport digit_ds\n\n"
        f'model = digit_ds.load_model("hf://{repository}")\n```\n'
    )
    if scores is not None:
        parts.append(f"## Scores\n\n{_scores(scores)}")
    steps = {name: provenance[name] for name in ("steps", "images") if name in provenance}
    trained = f"Trained for {steps['steps']} steps, {steps['images']} images.\n\n" if len(steps) == 2 else ""
    written = "The recipe is not stated.\n" if recipe is None else f"```yaml\n{recipe.strip()}\n```\n"
    parts.append(f"## Recipe\n\n{trained}{written}\nSizes:\n\n{_json(spec.to_dict())}")
    identity = {name: value for name, value in provenance.items() if name not in ("steps", "images", "classes")}
    parts.append(
        "## What it was made from\n\nHashes are SHA-256 of the files; models, codebooks and token shards belong "
        f"together only where they are equal.\n\n{_json(identity)}"
    )
    parts.append(f"## Licences\n\n{_PARTS.format(licence=licence)}")
    return "\n".join(parts)


def _scores(scores: Mapping[str, Any]) -> str:
    figures = {name: value for name in _FIGURES if isinstance(value := scores.get(name), int | float)}
    found = [(scores.get(f"{name}_label", _FIGURES[name]), value) for name, value in figures.items()]
    if not found:
        raise UserError(f"--scores: the file holds none of {', '.join(_FIGURES)}, expected a file that evaluate wrote")
    lines = "".join(f"| {title} | {value:.4g} |\n" for title, value in found)
    reference = scores.get("reference_name", scores.get("reference", "an unstated reference"))
    networks = [str(scores[name]) for name in ("features", "fdd_features") if name in scores] or ["unstated"]
    count = scores.get("samples", "an unstated number of")
    about = f"{count} pictures against {reference}, features: {'; '.join(networks)}."
    return f"| figure | |\n|---|---|\n{lines}\n{about}\n"


def _json(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2, sort_keys=True)}\n```\n"
