"""Pictures of a report as SVG text: dots with error bars, points, lines. Text and axes have the page's colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

# Okabe and Ito's colours, told apart by colour-blind readers too, and three greys.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#8a6d00",
    "#7f3c8d",
    "#5f6a72",
    "#9aa5ad",
)
_LEFT, _RIGHT, _ROW, _FONT = 190, 30, 24, 12


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, the same in all pictures of a report."""
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}


def number(value: float) -> str:
    """
    A tick's label.

    Example:
        >>> [number(value) for value in (0.05, 0.0375, 20.0, 1500.0, 0.001)]
        ['.05', '.0375', '20', '1500', '.001']
    """
    text = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def dots(rows: Sequence[tuple[str, float, float]], colour: dict[str, str], label: str) -> str:
    """
    A row per name: value and error bar.

    Args:
        rows: name, value, half the length of the error bar.

    Example:
        >>> dots([("SASRec", 0.05, 0.002)], {"SASRec": "#000"}, "NDCG@10").count("<circle")
        1
    """
    low, high = min(0.0, *(value - error for _, value, error in rows)), max(value + error for _, value, error in rows)
    ticks = _ticks(low, high)
    at = _scale(ticks[0], ticks[-1], _LEFT, 720 - _RIGHT)
    height = _ROW * len(rows) + 50
    parts = [_vertical(at(tick), 10, height - 40, number(tick)) for tick in ticks]
    for place, (name, value, error) in enumerate(rows):
        y = 22 + _ROW * place
        parts.append(_text(_LEFT - 10, y + 4, name, "end"))
        parts.append(
            f'<line x1="{at(value - error):.1f}" x2="{at(value + error):.1f}" y1="{y}" y2="{y}" stroke="{colour[name]}" stroke-width="2"/>'
        )
        parts.append(
            f'<circle cx="{at(value):.1f}" cy="{y}" r="5" fill="{colour[name]}"><title>{escape(name)}: {value:.4f}</title></circle>'
        )
    return _svg(720, height, parts, label)


def points(rows: Sequence[tuple[str, float, float]], colour: dict[str, str], x_label: str, y_label: str) -> str:
    """
    A point per name, with a logarithmic x axis.

    Args:
        rows: name, x (above 0), y.

    Example:
        >>> "SASRec" in points([("SASRec", 12.0, 0.05)], {"SASRec": "#000"}, "seconds", "NDCG@10")
        True
    """
    width, height, left, bottom = 720, 330, 60, 45
    exponents = [math.log10(x) for _, x, _ in rows]
    decades = range(math.floor(min(exponents)), max(math.ceil(max(exponents)), math.floor(min(exponents)) + 1) + 1)
    across = _scale(decades[0], decades[-1], left, width - 190)
    ticks = _ticks(min(0.0, *(y for *_, y in rows)), max(y for *_, y in rows))
    up = _scale(ticks[0], ticks[-1], height - bottom, 15)
    parts = [_vertical(across(decade), 15, height - bottom, f"{10**decade:g}") for decade in decades]
    parts += [_horizontal(up(tick), left, width - 190, number(tick)) for tick in ticks]
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(rows, key=lambda row: -row[2]):
        px, py = across(math.log10(x)), up(y)
        text_y = py + 4
        while any(abs(text_y - other_y) < 13 and abs(px - other_x) < 120 for other_x, other_y in placed):
            text_y += 4  # below the label that stands there
        placed.append((px, text_y))
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{colour[name]}"/>')
        parts.append(_text(px + 9, text_y, name))
    parts.append(_text((left + width - 190) / 2, height - 6, x_label, "middle"))
    return _svg(width, height, parts, y_label)


def lines(
    series: Mapping[str, Sequence[float | None]], labels: Sequence[str], colour: dict[str, str], y_label: str
) -> str:
    """
    A line per name over the same places.

    Args:
        series: per name a value for each label, `None` for none.

    Example:
        >>> lines({"SASRec": [0.1, 0.2]}, ["1", "2"], {"SASRec": "#000"}, "NDCG@10").count("<polyline")
        1
    """
    width, left, bottom = 720, 60, 45
    known = [value for values in series.values() for value in values if value is not None]
    ticks = _ticks(min(0.0, *known), max(known))
    height = max(260, 16 * len(series) + bottom + 20)
    up = _scale(ticks[0], ticks[-1], height - bottom, 15)
    across = _scale(0, max(1, len(labels) - 1), left + 40, width - 230)
    parts = [_horizontal(up(tick), left, width - 190, number(tick)) for tick in ticks]
    parts += [_text(across(place), height - bottom + 18, label, "middle") for place, label in enumerate(labels)]
    for row, (name, values) in enumerate(series.items()):
        at = [(across(place), up(value)) for place, value in enumerate(values) if value is not None]
        parts.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" fill="none" stroke="{colour[name]}" stroke-width="2"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour[name]}"/>' for x, y in at]
        y = 20 + 16 * row
        parts.append(
            f'<circle cx="{width - 175}" cy="{y}" r="4" fill="{colour[name]}"/>' + _text(width - 165, y + 4, name)
        )
    return _svg(width, height, parts, y_label)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    colour: dict[str, str],
    x_label: str,
    y_label: str,
    diagonal: bool = False,
) -> str:
    """
    A curve per name over numbers.

    Args:
        series: per name its points, x and y.
        diagonal: both axes begin at 0, with the line where y is x.

    Example:
        >>> curves({"training": [(0, 3.0), (50, 2.5)]}, {"training": "#000"}, "step", "loss").count("<polyline")
        1
    """
    width, height, left, bottom = 720, max(300, 16 * len(series) + 65), 60, 55
    xs, ys = ([point[axis] for points in series.values() for point in points] for axis in (0, 1))
    across_ticks = _ticks(min(0.0, *xs), max(xs))
    up_ticks = _ticks(min(ys) if min(ys) < max(ys) else min(0.0, *ys), max(ys))
    if diagonal:
        across_ticks = up_ticks = _ticks(0.0, max(*xs, *ys))
    up = _scale(up_ticks[0], up_ticks[-1], height - bottom, 15)
    across = _scale(across_ticks[0], across_ticks[-1], left, width - 190)
    parts = [_vertical(across(tick), 15, height - bottom, number(tick)) for tick in across_ticks]
    parts += [_horizontal(up(tick), left, width - 190, number(tick)) for tick in up_ticks]
    if diagonal:
        low, high = up_ticks[0], up_ticks[-1]
        parts.append(
            f'<line x1="{across(low):.1f}" y1="{up(low):.1f}" x2="{across(high):.1f}" y2="{up(high):.1f}" class="grid" stroke-dasharray="4 4"/>'
        )
    for row, (name, points) in enumerate(series.items()):
        at = [(across(x), up(y)) for x, y in points]
        parts.append(
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" fill="none" stroke="{colour[name]}" stroke-width="2"/>'
        )
        if len(at) < 60:  # more would hide the curve
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour[name]}"/>' for x, y in at]
        y = 20 + 16 * row
        parts.append(
            f'<circle cx="{width - 175}" cy="{y}" r="4" fill="{colour[name]}"/>' + _text(width - 165, y + 4, name)
        )
    parts.append(_text((left + width - 190) / 2, height - 8, x_label, "middle"))
    return _svg(width, height, parts, y_label)


def grid(rows: Mapping[str, Sequence[float]], label: str) -> str:
    """
    A row of cells per name, darker for larger values; values are shown on hovering, the range of each row beside it.

    Example:
        >>> grid({"layer 1": [1.2, 0.8], "layer 2": [1.0, 1.0]}, "load").count("<rect")
        4
    """
    width, left, high = 720, 70, 26
    most = max(max(values) for values in rows.values()) or 1
    parts = []
    for row, (name, values) in enumerate(rows.items()):
        y, wide = 8 + row * (high + 6), (width - left - 130) / len(values)
        parts.append(_text(left - 8, y + 17, name, "end"))
        for place, value in enumerate(values):
            parts.append(
                f'<rect x="{left + place * wide:.1f}" y="{y}" width="{max(wide - 1, 0.5):.1f}" height="{high}" fill="{COLOURS[0]}" '
                f'fill-opacity="{0.05 + 0.95 * value / most:.3f}"><title>{place + 1}: {value:.3g}</title></rect>'
            )
        parts.append(_text(width - 122, y + 17, f"{number(min(values))} to {number(max(values))}"))
    return _svg(width, 16 + len(rows) * (high + 6), parts, label)


def _ticks(low: float, high: float) -> list[float]:
    """
    Round numbers that enclose a range.

    Example:
        >>> _ticks(0.0, 0.083)
        [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    """
    spread = max(high - low, 1e-9)
    unit = 10 ** math.floor(math.log10(spread))
    step = next(unit * part for part in (0.1, 0.2, 0.5, 1, 2) if spread / (unit * part) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * place, 12) for place in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1) * (stop - start)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _vertical(x: float, top: float, bottom: float, label: str) -> str:
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" class="grid"/>'
    return line + _text(x, bottom + 16, label, "middle")


def _horizontal(y: float, left: float, right: float, label: str) -> str:
    return f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>' + _text(
        left - 8, y + 4, label, "end"
    )


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escape(label)}" font-size="{_FONT}">{inside}</svg>'
