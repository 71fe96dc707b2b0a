"""Small charts as SVG, for a page that needs no other file."""

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 500, 240, 48, 16, 38, 24
COLOURS = ("#2b6cb0", "#c05621", "#2f855a")


def line_chart(series: dict[str, Sequence[tuple[float, float]]], x_name: str, rule: tuple[str, float] | None) -> str:
    """One line of (x, y) points per name; ``rule`` is a named horizontal line."""
    points = [point for line in series.values() for point in line]
    right = max(x for x, _ in points) or 1
    heights = [y for _, y in points] + ([rule[1]] if rule else [])
    low, high = min(0.0, *heights), max(heights)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + x / right * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - low) / ((high - low) or 1) * (HEIGHT - BOTTOM - TOP)

    parts = [_axes(low, high, right, x_name)]
    if rule:
        _, y = place(0, rule[1])
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#999" stroke-dasharray="4"/>'
        )
        parts.append(f'<text x="{WIDTH - RIGHT - 2}" y="{y + 13:.1f}" text-anchor="end">{escape(rule[0])}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(f'<text x="{LEFT + 12 + 110 * index}" y="14" fill="{colour}">{escape(name)}</text>')
    return _picture(parts)


def bar_chart(values: Sequence[float], x_name: str) -> str:
    """One bar per value, from zero."""
    high = max(values) or 1
    step = (WIDTH - LEFT - RIGHT) / len(values)
    parts = [_axes(0, high, len(values), x_name, bars=True)]
    for index, value in enumerate(values):
        tall = value / high * (HEIGHT - BOTTOM - TOP)
        parts.append(
            f'<rect x="{LEFT + index * step:.1f}" y="{HEIGHT - BOTTOM - tall:.1f}" width="{step * 0.85:.1f}" '
            f'height="{tall:.1f}" fill="{COLOURS[0]}"/>'
        )
    return _picture(parts)


def _axes(low: float, high: float, right: float, x_name: str, bars: bool = False) -> str:
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path d="M{LEFT} {TOP}V{base}H{end}" fill="none" stroke="#666"/>']
    for value in ticks(low, high):
        y = base - (value - low) / ((high - low) or 1) * (base - TOP)
        parts.append(f'<path d="M{LEFT - 4} {y:.1f}H{LEFT}" stroke="#666"/>')
        parts.append(f'<path d="M{LEFT} {y:.1f}H{end}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(0, right - 1 if bars else right):
        if bars and value != int(value):
            continue
        x = LEFT + (value + 0.425 * bars) / right * (end - LEFT)  # the middle of a bar
        parts.append(f'<path d="M{x:.1f} {base}V{base + 4}" stroke="#666"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{end}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``, about five."""
    if high <= low:
        return [low]
    least = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _picture(parts: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" font-family="sans-serif" font-size="11">'
        f"{''.join(parts)}</svg>"
    )
