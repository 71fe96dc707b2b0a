"""What the documentation site gets beside ``docs/*.md``: MkDocs calls these hooks while it builds (``mkdocs.yml``).

The drawing of the pipeline comes from the chain of Slurm jobs, the changelog from the top of the repository. Names of
pages in the text become links.
"""

import re
from html import escape
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from digit_ds.cluster.chain import Chain, Step, absolute, load, steps

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`docs/(\w+\.md)`|(?<![`\w/])docs/(\w+\.md)")
WIDTH, HEIGHT, GAP_X, GAP_Y = 128, 46, 44, 22
"""Boxes of the drawing and the room between them, in pixels."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the files that are made while the site is built."""
    chain = load(ROOT / "slurm" / "imagenet_base.yaml", Chain)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "pipeline.svg", content=drawing(steps(chain), absolute(chain.out))))
    files.append(File.generated(config, "changelog.md", content=changes))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of names of pages such as ``docs/training.md``; fenced blocks stay as they are."""
    here = {file.src_uri for file in files.documentation_pages()}

    def link(name: re.Match[str]) -> str:
        target = name[1] or name[2]
        known = target in here and target != page.file.src_uri
        return f"[{title(target)}]({target})" if known else name[0]

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(NAMED, link, part) for part in parts)


def title(name: str) -> str:
    """The first heading of a page of ``docs/``."""
    page = ROOT / ("CHANGELOG.md" if name == "changelog.md" else f"docs/{name}")
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")


def drawing(chain: list[Step], out: Path) -> str:
    """An SVG of the chain: a box for each step with what it writes, an arrow for each product that a step reads."""
    column: dict[str, int] = {}
    for step in chain:
        column[step.name] = max((column[name] + 1 for name in step.needs), default=0)
    rows: dict[int, list[str]] = {}
    for name, place in column.items():
        rows.setdefault(place, []).append(name)
    tallest = max(map(len, rows.values()))
    left = {name: place * (WIDTH + GAP_X) + 4 for name, place in column.items()}
    top = {
        name: 4 + (row + (tallest - len(names)) / 2) * (HEIGHT + GAP_Y)
        for names in rows.values()
        for row, name in enumerate(names)
    }
    width, height = max(left.values()) + WIDTH + 4, tallest * (HEIGHT + GAP_Y) - GAP_Y + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
        '<path d="M0 0 L8 4 L0 8 z" fill="#7986cb"/></marker></defs>',
    ]
    for step in chain:
        for name in step.needs:
            x, y = left[name] + WIDTH, top[name] + HEIGHT / 2
            end_x, end_y = left[step.name], top[step.name] + HEIGHT / 2
            bend = (x + end_x) / 2
            curve = f"M{x} {y:g} C{bend:g} {y:g} {bend:g} {end_y:g} {end_x} {end_y:g}"
            parts.append(f'<path d="{curve}" fill="none" stroke="#7986cb" stroke-width="1.5" marker-end="url(#tip)"/>')
    for step in chain:
        product = step.product.relative_to(out)
        written = (
            f"{product.parent}/" if product.name in ("manifest.json", "config.json", "probe.json") else product.name
        )
        middle = left[step.name] + WIDTH / 2
        box = f'x="{left[step.name]}" y="{top[step.name]:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"'
        parts.append(f'<rect {box} fill="#e8eaf6" stroke="#3949ab"/>')
        for text, below, size, colour in ((step.name, 19, 12, "#1a237e"), (written, 36, 10, "#424242")):
            place = f'x="{middle:g}" y="{top[step.name] + below:g}" font-size="{size}" fill="{colour}"'
            parts.append(f'<text {place} text-anchor="middle">{escape(str(text))}</text>')
    return "\n".join([*parts, "</svg>", ""])
