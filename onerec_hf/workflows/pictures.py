"""Panels of a report, drawn twice from the same numbers: as SVG in a page of HTML, and as PNG if matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from onerec_hf.modeling.files import replacing
from onerec_hf.workflows.compare import plots

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; } svg .grid { stroke: #8885; }
summary { cursor: pointer; } details { margin: .2rem 0; } details details, details ul { margin-left: 1.2rem; }
code { background: #8882; padding: 0 .3rem; border-radius: 3px; } .few { opacity: .7; }
"""


@dataclass(frozen=True)
class Panel:
    """
    One picture.

    Args:
        title: what it shows.
        kind: `curves` over numbers, `groups` (a value per label), `grid` (a row of cells per name), or `diagonal` (predicted against observed).
        series: per name its points (x, y); for `groups` x is the place of the label, for `grid` that of the cell.
        x_label, y_label: of the axes.
        labels: of the groups.
        note: a sentence on how to read it.

    Example:
        >>> Panel("Loss", "curves", {"training": [(1, 2.0), (2, 1.5)]}, "step", "loss").svg().count("<polyline")
        1
    """

    title: str
    kind: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str = ""
    y_label: str = ""
    labels: Sequence[str] = field(default_factory=list)
    note: str = ""

    def svg(self) -> str:
        """As SVG text."""
        colour = plots.colours(list(self.series))
        if self.kind == "grid":
            return plots.grid({name: [y for _, y in points] for name, points in self.series.items()}, self.y_label)
        if self.kind == "groups":
            values: dict[str, list[float | None]] = {
                name: [dict(points).get(place) for place in range(len(self.labels))]
                for name, points in self.series.items()
            }
            return plots.lines(values, self.labels, colour, self.y_label)
        return plots.curves(self.series, colour, self.x_label, self.y_label, self.kind == "diagonal")

    def draw(self, axes) -> None:
        """On axes of matplotlib."""
        colour = plots.colours(list(self.series))
        if self.kind == "grid":
            cells = [[y for _, y in points] for points in self.series.values()]
            picture = axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0)
            axes.figure.colorbar(picture, ax=axes)
            axes.set_yticks(range(len(cells)), list(self.series))
            axes.locator_params(axis="x", integer=True)
        else:
            for name, points in self.series.items():
                few = len(points) < 60
                axes.plot(
                    *zip(*points, strict=True), color=colour[name], label=name, marker="o" if few else None, ms=3
                )
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
            axes.set_ylabel(self.y_label, fontsize=8)
        if self.kind == "groups":
            axes.set_xticks(range(len(self.labels)), self.labels)
            axes.set_ylim(0, None)
        if self.kind == "diagonal":
            most = max(max(point) for points in self.series.values() for point in points)
            axes.plot((0, most), (0, most), color="grey", linewidth=1, linestyle="--")
        axes.set_title(self.title, fontsize=9)
        axes.set_xlabel(self.x_label, fontsize=8)
        axes.tick_params(labelsize=7)


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Writes a page of HTML without other files; `parts` are HTML, the title is text."""
    text = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")


def panels_html(panels: Sequence[Panel]) -> list[str]:
    """A heading, a note and a picture for each panel."""
    return [f"<h2>{escape(each.title)}</h2>\n<p>{escape(each.note)}</p>\n{each.svg()}" for each in panels]


def draw_png(path: Path, panels: Sequence[Panel]) -> bool:
    """
    Draws panels two in a row.

    Returns:
        False, without writing a file, if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.4 * rows), layout="constrained")
    places = figure.subplots(rows, 2, squeeze=False).flatten()
    for axes, panel in zip(places, panels, strict=False):
        panel.draw(axes)
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True
