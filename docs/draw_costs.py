"""Writes what the ImageNet chain costs into docs/cluster.md, from the rates that the dry run uses.

python docs/draw_costs.py
"""

from pathlib import Path

from digit_ds.cluster.chain import Chain, Site, load, steps
from digit_ds.cluster.costs import IMAGENET, costs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cluster.md"
BEGIN, END = "<!-- drawn by docs/draw_costs.py -->\n", "<!-- end of the drawing -->\n"


def table() -> str:
    """A row for each step: hours of one GPU and of the example site's, and disk space; - where nothing is known."""
    chain = load(ROOT / "slurm" / "imagenet_base.yaml", Chain)
    site = load(ROOT / "slurm" / "site.example.yaml", Site)
    one = site.model_copy(update={"nodes": 1, "gpus_per_node": 1, "steps": {}})
    alone, shared = (costs(chain, cluster, steps(chain), IMAGENET) for cluster in (one, site))
    gpus = site.nodes * site.gpus_per_node
    rows = [f"| step | hours of one H100 | hours of {gpus} H100 | disk, GiB |\n| --- | --- | --- | --- |\n"]
    for name, cost in alone.items():
        figures = (cost.hours, shared[name].hours, cost.gibibytes)
        texts = ("-" if value is None else f"{value:.1f}" for value in figures)
        rows.append(f"| {name} | {' | '.join(texts)} |\n")
    return "".join(rows)


def page() -> str:
    """The whole page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
