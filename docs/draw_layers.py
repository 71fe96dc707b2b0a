"""Draws the packages of ``digit_ds`` into CONTRIBUTING.md: layers from ``pyproject.toml``, arrows from the imports.

    python docs/draw_layers.py

An arrow is left out where a longer way of arrows says the same.
"""

import ast
from pathlib import Path

import grimp

try:
    import tomllib
except ImportError:  # Python 3.10; import-linter brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- drawn by docs/draw_layers.py -->\n", "<!-- end of the drawing -->\n"


def layers() -> list[list[str]]:
    """Packages and modules of each layer, the highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return [layer.split(" | ") for layer in contracts[0]["layers"]]


def imports() -> dict[str, set[str]]:
    """What each package or module at the top of ``digit_ds`` imports of the others, directly or not."""
    graph = grimp.build_graph("digit_ds", cache_dir=None)
    names = graph.find_children("digit_ds")
    for name in names:
        graph.squash_module(name)
    found = {name: graph.find_modules_directly_imported_by(name) & names for name in names}
    return {name.split(".")[1]: {other.split(".")[1] for other in others} for name, others in found.items()}


def arrows() -> list[tuple[str, str]]:
    """The imports that no longer way implies."""
    direct = imports()

    def reached(name: str) -> set[str]:
        return direct[name] | {far for near in direct[name] for far in reached(near)}

    return [
        (name, other)
        for name in sorted(direct)
        for other in sorted(direct[name])
        if not any(other in reached(near) for near in direct[name] - {other})
    ]


def purpose(name: str) -> str:
    """First line of a package's or module's docstring."""
    path = ROOT / "digit_ds" / name
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


def drawing() -> str:
    """A mermaid graph and a table of what each package does."""
    lines = ["```mermaid", "graph TD"]
    for number, layer in enumerate(layers()):
        lines += [f"  subgraph layer{number}[ ]", "    direction LR", *(f"    {name}" for name in layer), "  end"]
    lines += [f"  {name} --> {other}" for name, other in arrows()]
    lines += ["```", "", "| layer | | |", "|---|---|---|"]
    lines += [
        f"| {number} | `{name}` | {purpose(name)} |" for number, layer in enumerate(layers(), 1) for name in layer
    ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """CONTRIBUTING.md with the drawing as it should be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + drawing() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
