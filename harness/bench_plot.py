"""Plots of benchmarks as SVG, written by hand: the same points give the same bytes on every machine.

Spec: SVG 1.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from harness.bench import Series

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 44, 56
_COLOURS = ("#1f5fa8", "#b3541e", "#3a7d34", "#7a3d91")
_TICKS = 5
_HEADROOM = 1.08

Scale = Callable[[float], float]


def svg(series: Series) -> str:
    """A plot of a series: lines with their names, axes with ticks; the vertical axis begins at zero.

    Raises:
        ValueError: it has no points, or one that a logarithmic axis cannot show.
    """
    points = [point for line in series.lines.values() for point in line]
    if not points:
        raise ValueError("a plot needs points")
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points) * _HEADROOM or 1.0
    across, up = _across(low, high, log=series.log_x), _up(top)
    x_ticks = _decades(low, high) if series.log_x else _even(low, high)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_WIDTH / 2, 24, series.title, size=15),
        *(_grid_x(across(x), _number(x)) for x in x_ticks if low <= x <= high),
        *(_grid_y(up(y), _number(y)) for y in _even(0.0, top)),
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, series.x),
        _text(18, (_TOP + _HEIGHT - _BOTTOM) / 2, series.y, turned=True),
        *(_line(place, line, across, up) for place, line in enumerate(series.lines.values())),
        *(_legend(place, name) for place, name in enumerate(series.lines)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _across(low: float, high: float, *, log: bool) -> Scale:
    if log and low <= 0:
        raise ValueError("a logarithmic axis begins above zero")
    change: Scale = math.log10 if log else float
    first, span = change(low), (change(high) - change(low)) or 1.0
    width = _WIDTH - _LEFT - _RIGHT
    return lambda x: _LEFT + width * (change(x) - first) / span


def _up(top: float) -> Scale:
    height = _HEIGHT - _TOP - _BOTTOM
    return lambda y: _HEIGHT - _BOTTOM - height * y / top


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _even(low: float, high: float) -> list[float]:
    """Round values from ``low`` to ``high``, about as many as fit."""
    rough = (high - low) / _TICKS or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    return [place * step for place in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:g}"


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "middle", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _grid_x(x: float, label: str) -> str:
    line = f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#dddddd"/>'
    return line + _text(x, _HEIGHT - _BOTTOM + 18, label)


def _grid_y(y: float, label: str) -> str:
    line = f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" stroke="#dddddd"/>'
    return line + _text(_LEFT - 8, y + 4, label, anchor="end")


def _line(place: int, points: Sequence[tuple[float, float]], across: Scale, up: Scale) -> str:
    colour = _COLOURS[place % len(_COLOURS)]
    at = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    dashes = ' stroke-dasharray="6 4"' if place else ""
    return f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'


def _legend(place: int, name: str) -> str:
    y = _TOP + 16 + 18 * place
    colour, x = _COLOURS[place % len(_COLOURS)], _LEFT + 12
    mark = f'<line x1="{x}" y1="{y - 4}" x2="{x + 24}" y2="{y - 4}" stroke="{colour}" stroke-width="2"/>'
    return mark + _text(x + 32, y, name, anchor="start")
