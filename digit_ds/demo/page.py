"""report.html: one page with every figure, curve and picture inside it."""

import base64
import io
import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from digit_ds.data.images import open_image
from digit_ds.demo.charts import bar_chart, line_chart
from digit_ds.demo.digits import read_images, read_labels
from digit_ds.demo.pictures import labelled_grid
from digit_ds.files import write_atomically

COLUMNS = 10

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 1160px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .9em .2em 0; text-align: left; vertical-align: top }
th, .number { white-space: nowrap } .number { text-align: right }
.beside { display: flex; flex-wrap: wrap; gap: 1.5em } .beside > * { flex: 1 1 0; min-width: 300px }
figure { margin: 0 } img, svg { max-width: 100% } figcaption, .note { color: #555 } .note { margin: .3em 0 }
code { font-size: 12px; overflow-wrap: anywhere }
"""


def write_page(out: Path, figures: dict[str, Any]) -> None:
    """Write ``out/report.html`` from the measured ``figures`` and the files in ``out``."""
    sections = [
        "<h1>DiGIT on handwritten digits</h1>",
        f"<p>Every stage of the pipeline ran on {escape(figures['pictures'])}: a codebook of discriminative tokens, a "
        "class-conditional prior over them, an autoregressive pixel decoder, a VQGAN. Encoder and VQGAN are small "
        "networks that stand in for DINOv2 and for MAGE's VQGAN; they saw no labels.</p>",
        _figure_table(figures),
        "<h2>Generated and real</h2>",
        _generated_and_real(out),
        _drawn(figures, "samples"),
        "<h2>Reconstructions and completions</h2>",
        _originals_and_results(out, figures),
        "<h2>Training</h2>",
        _curves(out, figures),
        "<h2>Codebook and probe</h2>",
        _codebook_and_probe(figures),
        "<h2>Stages</h2>",
        _stages(figures),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>DiGIT demo</title>'
        f"<style>{_STYLE}</style>{''.join(sections)}</html>\n"
    )
    write_atomically(out / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def _figure_table(figures: dict[str, Any]) -> str:
    rows = [
        (
            "Generated digits recognised as the asked class",
            f"{figures['class_accuracy']:.1%} of {figures['samples']}",
            f"the same classifier on real held-out digits: {figures['real_accuracy']:.1%}; by chance 10%",
        ),
        (
            "Reconstructions recognised",
            f"{figures['reconstruction_accuracy']:.1%} of {figures['reconstructions']}",
            "held-out image → discriminative tokens → pixel decoder → VQGAN",
        ),
        (
            "Best linear probe",
            f"{figures['best_probe_accuracy']:.1%}",
            f"layer {figures['best_probe_layer']} of the prior, held-out digits",
        ),
        (
            "Prior, nats per held-out token",
            f"{figures['prior_nll']:.3f}",
            f"entropy of single tokens: {figures['unigram_entropy']:.3f}",
        ),
        (
            "Codebook perplexity",
            f"{figures['codebook_perplexity']:.1f}",
            f"of {figures['codes']} codes",
        ),
        (
            "FID of generated digits",
            f"{figures['fid']:.2f}",
            f"real held-out digits: {figures['real_fid']:.2f}, both against the training digits; "
            f"{figures['feature_extractor']}; not comparable with Inception's",
        ),
        (
            "Inception Score",
            f"{figures['inception_score']:.2f}",
            f"{figures['feature_extractor']}; at most 10",
        ),
    ]
    cells = "".join(f"<tr><td>{escape(a)}</td><th>{escape(b)}</th><td>{escape(c)}</td></tr>" for a, b, c in rows)
    return f"<table>{cells}</table>"


def _generated_and_real(out: Path) -> str:
    samples = open_image(out / "samples.png")
    held_out = out / "images" / "val"
    real = labelled_grid(read_images(held_out), read_labels(held_out), COLUMNS)
    return f'<div class="beside">{_image(samples, "generated")}{_image(real, "real, held out")}</div>'


def _originals_and_results(out: Path, figures: dict[str, Any]) -> str:
    """The grids of the sampling jobs, which show the given pictures above the results."""
    captions = {
        "reconstructions": "held-out digits, and what their discriminative tokens become",
        "completions": f"held-out digits, their first {figures['kept_tokens']} tokens, and what the prior adds to them",
    }
    shown = "".join(
        f"<div>{_image(open_image(out / folder / 'grid.png'), caption)}{_drawn(figures, folder)}</div>"
        for folder, caption in captions.items()
    )
    return f'<div class="beside">{shown}</div>'


def _drawn(figures: dict[str, Any], folder: str) -> str:
    """How the tokens of a sampling job were drawn, in one line."""
    settings = figures["settings"][folder]
    parts = [f"seed {settings['seed']}, {settings['precision']}"]
    for stage, name in (("prior", "prior_decoding"), ("pixel decoder", "pixel_decoding")):
        if (found := settings[name]) is not None:
            said = [f"{key.replace('_', ' ')} {found[key]}" for key in ("temperature", "top_k", "top_p") if found[key]]
            scale = found["guidance"]["scale"]
            parts.append(f"{stage}: {', '.join([*said, f'guidance {scale}'] if scale != 1 else said)}")
    return f'<p class="note">{escape("; ".join(parts))}</p>'


def _curves(out: Path, figures: dict[str, Any]) -> str:
    charts = []
    for run, caption, rule in (
        ("prior", "prior: nats per token", ("entropy of single tokens", figures["unigram_entropy"])),
        ("pixel_ar", "pixel decoder: nats per VQ token", None),
    ):
        lines = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        series = {
            name: [(line["step"], line[key]) for line in lines if key in line]
            for name, key in (("training", "nll"), ("held out", "validation_nll"))
        }
        drawn: dict[str, Sequence[tuple[float, float]]] = {name: points for name, points in series.items() if points}
        charts.append(_figure(line_chart(drawn, "steps", rule), caption))
    return f'<div class="beside">{"".join(charts)}</div>'


def _codebook_and_probe(figures: dict[str, Any]) -> str:
    usage = bar_chart(figures["codebook_usage"], "codes")
    probe = bar_chart(figures["probe_accuracy"], "layers")
    return (
        f'<div class="beside">{_figure(usage, "share of the training tokens, by rank")}'
        f"{_figure(probe, 'linear probe accuracy by layer (0 is the embedding)')}</div>"
    )


def _stages(figures: dict[str, Any]) -> str:
    """All steps in their order, with time and command."""
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="number">{figures["seconds"][name]:.0f} s</td>'
        f"<td><code>{escape(shlex.join(command))}</code></td></tr>"
        for name, command in figures["commands"].items()
    )
    total = (
        f"{figures['total_seconds'] / 60:.1f} minutes of steps, some of which ran side by side; at most "
        f"{figures['peak_memory_gib']:.1f} GiB in a process. OUT is the folder of this page, REPOSITORY that of the "
        "sources. Seeds that a command does not name are its defaults."
    )
    return f"<table>{rows}</table><p>{total}</p>"


def _image(picture: Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return _figure(f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">', caption)


def _figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"
