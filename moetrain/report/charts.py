"""Pieces of the page: curves, heat maps, bars and tables, as HTML.

Curves are SVG paths stretched to whatever width there is (strokes keep theirs), with labels that are HTML beside them: a phone shows the same
letters as a wide screen. Everything that comes from a run passes through `text` or `embedded`.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLORS = 8
MOST_SERIES = 16
_HEIGHT = 300  # of the drawing, in its own units; its width is 1000
_MARKS = 200


def text(value: Any, most: int = 120) -> str:
    """A name or message for the page: escaped, and cut where it is absurdly long."""
    value = str(value)
    return html.escape(value if len(value) <= most else value[: most - 1] + "…", quote=True)


def embedded(value: Any) -> str:
    """JSON inside <script type="application/json">, which nothing in a string can end."""
    plain = json.dumps(value)
    for character in "<>&":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json">{plain}</script>'


def short(value: float) -> str:
    """A number in few letters: 1.23k, 0.00031."""
    if not math.isfinite(value):
        return "-"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.3g}{unit}"
    return f"{value:.0f}" if value == round(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


@dataclass
class Series:
    """One curve. x, y: alike long; NaN is a gap. low, high: edges of a band. dots: a dot for each point as well."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dots: bool = False


@dataclass
class Mark:
    """Something that happened at a step: a vertical line. kind: `bad` or `note`."""

    x: float
    name: str
    kind: str


def curves(series: Sequence[Series], *, x: str, y: str, marks: Sequence[Mark] = (), log: bool = False, ticks: Sequence[str] | None = None) -> str:
    """A chart. x, y: what the axes are. log: logarithmic where values span a factor of 50. ticks: names of x = 0, 1, ... instead of numbers."""
    series = [s for s in series if len(s.x) and np.isfinite(np.asarray(s.y, dtype=float)).any()]
    if not series:
        return '<p class="none">No finite value to draw.</p>'
    left_out = len(series) - MOST_SERIES
    series = series[:MOST_SERIES]
    values = np.concatenate([_finite(v) for s in series for v in (s.y, s.low, s.high) if v is not None])
    log = log and values.min() > 0 and values.max() > 50 * values.min()
    xs = np.concatenate([_finite(s.x) for s in series])
    x0, x1 = (float(xs.min()), float(xs.max())) if xs.min() < xs.max() else (float(xs.min()) - 0.5, float(xs.max()) + 0.5)
    steps = _log_ticks(values.min(), values.max()) if log else _ticks(float(values.min()), float(values.max()))
    y0, y1 = min(float(values.min()), steps[0]), max(float(values.max()), steps[-1])
    scale = (lambda v: np.log(v)) if log else (lambda v: v)

    def to_y(v: Any) -> Any:
        return _HEIGHT * (1 - (scale(np.asarray(v, dtype=float)) - scale(y0)) / (scale(y1) - scale(y0)))

    def to_x(v: Any) -> Any:
        return 1000 * (np.asarray(v, dtype=float) - x0) / (x1 - x0)

    drawn = [f'<path class="grid" d="{"".join(f"M0 {to_y(v):.1f}H1000" for v in steps)}"/>']
    for mark in [m for m in marks if x0 <= m.x <= x1][:_MARKS]:
        drawn.append(f'<path class="mark {mark.kind}" d="M{to_x(mark.x):.1f} 0V{_HEIGHT}"><title>{text(mark.name)}</title></path>')
    for i, s in enumerate(series):
        color = f"c{i % COLORS}" + (" dashed" if i >= COLORS else "")
        if s.low is not None and s.high is not None:
            drawn.append(f'<path class="band {color}" d="{_band(to_x(s.x), to_y(s.low), to_y(s.high))}"/>')
        xy = list(zip(to_x(s.x), to_y(s.y)))
        alone = sum(math.isfinite(b) for _, b in xy) == 1
        drawn.append(f'<path class="curve {color}" data-name="{text(s.name)}" d="{_path(xy)}"/>')
        if s.dots or alone:
            dots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in xy if math.isfinite(b))
            drawn.append(f'<path class="dots {color}" d="{dots}"/>')
    labels = [f'<span class="ty" style="top:{to_y(v) / _HEIGHT:.2%}">{short(v)}</span>' for v in steps]
    if ticks is None:
        at = [(v, short(v)) for v in _ticks(x0, x1, 5) if x0 <= v <= x1 and v == round(v)]
    else:
        every = -(-len(ticks) // 9)
        at = [(i, text(name, 20)) for i, name in enumerate(ticks) if i % every == 0]
    labels += [f'<span class="tx" style="left:{to_x(v) / 1000:.2%}">{name}</span>' for v, name in at]
    legend = "".join(f'<li class="c{i % COLORS}{" dashed" if i >= COLORS else ""}">{text(s.name)}</li>' for i, s in enumerate(series))
    rest = f'<li class="more">and {left_out} more</li>' if left_out > 0 else ""
    names = "" if ticks is None else f' data-names="{text(json.dumps(list(ticks)), 10_000)}"'
    return (
        f'<figure class="chart"><div class="ylabel">{text(y)}{" (logarithmic)" if log else ""}</div>'
        f'<div class="plot" data-x="{x0},{x1}" data-y="{y0},{y1}" data-log="{int(log)}"{names}>'
        f'<svg viewBox="0 0 1000 {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{text(y)} by {text(x)}">{"".join(drawn)}</svg>'
        f'{"".join(labels)}</div><div class="xlabel">{text(x)}</div><ul class="legend">{legend}{rest}</ul></figure>'
    )


def heat(
    frames: Sequence[np.ndarray], names: Sequence[str], *, rows: Sequence[str], columns: Sequence[str], row: str, column: str, choose: str,
    top: float | None = None, over_time: bool = False,
) -> str:  # fmt: skip
    """A heat map, drawn by page.js from bytes. frames: (rows, columns) uint8 each, of `read.encode_load`, or with `top` of `encode_value`.

    names: of the frames. row, column: what rows and columns are. choose: how a frame is chosen: `slider` or `list`. over_time: rows can be
    looked at one by one, with the frames as columns.
    """
    data = {
        "frames": [base64.b64encode(np.ascontiguousarray(f).tobytes()).decode() for f in frames], "names": list(names), "rows": list(rows),
        "columns": list(columns), "row": row, "column": column, "top": top,
    }  # fmt: skip
    controls = ""
    if len(frames) > 1 and choose == "slider":
        newest = len(frames) - 1
        controls = f'<label>step <input type="range" class="frame" min="0" max="{newest}" value="{newest}"> <output></output></label>'
    elif len(frames) > 1:
        options = "".join(f'<option value="{i}">{text(name)}</option>' for i, name in enumerate(names))
        controls = f'<label>of <select class="frame">{options}</select></label>'
    if over_time and len(frames) > 1:
        options = "".join(f'<option value="{i}">{text(row)} {text(name)} over time</option>' for i, name in enumerate(rows))
        controls += f'<label>show <select class="view"><option value="">all {text(row)}s at one step</option>{options}</select></label>'
    if top is None:
        key = '<span>1/8</span><span class="key load"></span><span>8 × the even share</span> <span class="key dead"></span><span>no route</span>'
    else:
        key = f'<span>0</span><span class="key value"></span><span>{short(top)}</span>'
    return (
        f'<figure class="heat"><div class="controls">{controls}</div><div class="ylabel rowlabel"></div><canvas role="img" '
        f'aria-label="{text(row)} by {text(column)}"></canvas><div class="xlabel"></div>'
        f'<div class="scale">{key}</div><output class="value">point at a cell for its value</output>{embedded(data)}</figure>'
    )


def encode_value(values: np.ndarray, top: float) -> np.ndarray:
    """Values 0..top -> uint8 for `heat` with `top`: 0..254, and 255 where there is none."""
    scaled = np.clip(np.round(np.nan_to_num(values) / (top or 1.0) * 254), 0, 254)
    return np.where(np.isfinite(values), scaled, 255).astype(np.uint8)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], shade: float | None = None) -> str:
    """A table that scrolls by itself. Cells: text, or numbers (to the right). shade: numbers are coloured in proportion to it, but in the first two
    columns."""
    lines = []
    for cells in rows:
        line = ""
        for i, cell in enumerate(cells):
            if isinstance(cell, (int, float)) and not isinstance(cell, bool):
                strength = 0.0 if shade is None or i < 2 or not math.isfinite(cell) else min(1.0, max(0.0, cell / (shade or 1.0)))
                style = f' style="--v:{strength:.0%}"' if strength else ""
                line += f'<td class="n{" shaded" if strength else ""}"{style}>{f"{cell:,}" if isinstance(cell, int) else short(cell)}</td>'
            else:
                line += f"<td>{text(cell, 400)}</td>"
        lines.append(f"<tr>{line}</tr>")
    titles = "".join(f"<th>{text(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def shares(parts: Sequence[tuple[str, float]], unit: str) -> str:
    """One bar cut in proportion, with a legend. parts: (name, amount)."""
    total = sum(amount for _, amount in parts) or 1.0
    bar = "".join(
        f'<span class="c{i % COLORS}" style="width:{amount / total:.3%}" title="{text(name)}"></span>' for i, (name, amount) in enumerate(parts)
    )
    legend = "".join(
        f'<li class="c{i % COLORS}">{text(name)}: {amount / total:.1%} ({short(amount)} {text(unit)})</li>' for i, (name, amount) in enumerate(parts)
    )
    return f'<figure class="shares"><div class="bar">{bar}</div><ul class="legend">{legend}</ul></figure>'


def _finite(values: Sequence[float]) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    return found[np.isfinite(found)]


def _path(points: list[tuple[float, float]]) -> str:
    d, pen = [], False
    for a, b in points:
        if math.isfinite(b):
            d.append(f"{'L' if pen else 'M'}{a:.1f} {b:.1f}")
            pen = True
        else:
            pen = False
    return "".join(d)


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    good = np.isfinite(low) & np.isfinite(high)
    d = []
    for part in np.split(np.arange(len(x)), np.flatnonzero(np.diff(good)) + 1):
        if good[part[0]] and len(part) > 1:
            edge = [f"{x[i]:.1f} {high[i]:.1f}" for i in part] + [f"{x[i]:.1f} {low[i]:.1f}" for i in part[::-1]]
            d.append("M" + "L".join(edge) + "Z")
    return "".join(d)


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from below `low` to above `high`, about `most` of them."""
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    size *= next(f for f in (1, 2, 5, 10) if f * size >= raw * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, 12) if size > 1e-9 else i * size for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 6)
    return [10.0**i for i in range(first, last + every, every)]
