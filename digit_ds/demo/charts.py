"""Small charts as SVG, for a page that needs no other file."""

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 220, 48, 26, 10
COLOURS = ("#2b6cb0", "#c05621", "#2f855a")


def line_chart(series: dict[str, Sequence[tuple[float, float]]], x_name: str, rule: tuple[str, float] | None) -> str:
    """One line of (x, y) points per name; ``rule`` is a named horizontal line."""
    points = [point for line in series.values() for point in line]
    right = max(x for x, _ in points) or 1
    heights = [y for _, y in points] + ([rule[1]] if rule else [])
    low, high = min(0.0, *heights), max(heights)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / right * (WIDTH - LEFT - 8)
        return across, HEIGHT - BOTTOM - (y - low) / ((high - low) or 1) * (HEIGHT - BOTTOM - TOP)

    parts = [_axes(low, high, right, x_name)]
    if rule:
        _, y = place(0, rule[1])
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999" stroke-dasharray="4"/>'
        )
        parts.append(f'<text x="{WIDTH - 10}" y="{y + 13:.1f}" text-anchor="end">{escape(rule[0])}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<text x="{LEFT + 12 + 110 * index}" y="{TOP + 8}" fill="{colour}">{escape(name)}</text>')
    return _picture(parts)


def bar_chart(values: Sequence[float], x_name: str) -> str:
    """One bar per value, from zero."""
    high = max(values) or 1
    step = (WIDTH - LEFT - 8) / len(values)
    parts = [_axes(0, high, len(values), x_name)]
    for index, value in enumerate(values):
        tall = value / high * (HEIGHT - BOTTOM - TOP)
        parts.append(
            f'<rect x="{LEFT + index * step:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{step * 0.85:.1f}" '
            f'height="{tall:.1f}" fill="{COLOURS[0]}"/>'
        )
    return _picture(parts)


def _axes(low: float, high: float, right: float, x_name: str) -> str:
    base = HEIGHT - BOTTOM
    return (
        f'<path d="M{LEFT} {TOP}V{base}H{WIDTH - 8}" fill="none" stroke="#666"/>'
        f'<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 5}" y="{base}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">{right:g} {escape(x_name)}</text>'
    )


def _picture(parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-family="sans-serif" font-size="11">'
        f"{''.join(parts)}</svg>"
    )
