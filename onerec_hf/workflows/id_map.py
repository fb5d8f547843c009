"""The map of semantic IDs beside a catalogue: a page with the tree of codes, its widest branches as a picture, and items under each code."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.workflows.compare.plots import COLOURS
from onerec_hf.workflows.distributed import is_first
from onerec_hf.workflows.pictures import write_page

if TYPE_CHECKING:
    from onerec_hf.modeling.catalogue import ItemCatalogue

MAP_HTML = "semantic_ids.html"
_MOST_CODES, _MOST_ITEMS = 300, 8  # first codes on the page, and items under each: a page stays below a megabyte


def write_id_map(
    folder: Path, catalogue: ItemCatalogue, items: Mapping[Any, Mapping] | None = None, name: str | None = None
) -> None:
    """
    Writes `semantic_ids.html`: the first codes and their second codes as a picture, and a tree with the most popular items under each first
    code; the first rank writes.

    Args:
        items: fields by item id, for titles; without them ids are shown.
        name: of the model, for the heading; the folder's by default.

    Example:
        >>> import tempfile
        >>> from onerec_hf import ItemCatalogue
        >>> catalogue = ItemCatalogue(["a", "b", "c"], [[0, 0], [0, 1], [1, 1]], [2, 4])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_id_map(Path(folder), catalogue, {"a": {"title": "Alien"}})
        ...     page = Path(folder, "semantic_ids.html").read_text()
        >>> "Alien" in page, page.count("<details>")
        (True, 2)
    """
    if not is_first():
        return
    codes = np.asarray(catalogue.codes)
    counts = np.zeros(len(codes), dtype=np.int64) if catalogue.popularity is None else np.asarray(catalogue.popularity)
    first = np.bincount(codes[:, 0], minlength=catalogue.codebook_sizes[0])
    shown = np.argsort(-first, kind="stable")[: min(_MOST_CODES, int((first > 0).sum()))]
    order = np.lexsort((-counts, codes[:, 0]))  # by first code, the most popular items first
    starts = np.concatenate([[0], np.cumsum(first)])
    about = (
        f"{len(codes):,} items, {codes.shape[1]} levels of {', '.join(map(str, catalogue.codebook_sizes))} codes. Items that share their first "
        "codes are alike: in text, in the behaviour of users, or in the embeddings that were given."
    )
    tree = [
        _branch(int(code), order[starts[code] : starts[code + 1]], catalogue, items, counts) for code in np.sort(shown)
    ]
    left_out = int((first > 0).sum()) - len(shown)
    rest = f'<p class="few">{left_out:,} more first codes are not shown.</p>' if left_out else ""
    parts = [f"<p>{escape(about)}</p>", _icicle(codes, shown, counts), "<h2>Items by first code</h2>", *tree, rest]
    write_page(folder / MAP_HTML, f"Semantic IDs of {name or folder.resolve().name}", parts)


def title_of(item_id: Any, items: Mapping[Any, Mapping] | None) -> str:
    """
    The title of an item, or its id.

    Example:
        >>> title_of(7, {7: {"title": "Heat", "year": 1995}}), title_of(8, None)
        ('Heat', '8')
    """
    fields = {} if items is None else items.get(item_id, {})
    return str(fields.get("title", fields.get("name", item_id)))


def _branch(
    code: int, rows: np.ndarray, catalogue: ItemCatalogue, items: Mapping[Any, Mapping] | None, counts: np.ndarray
) -> str:
    """A first code, to be opened: its size, and its most popular items with their codes."""
    ids = catalogue.ids(rows[:_MOST_ITEMS])
    lines = [
        f"<li>{escape(title_of(item, items))} <code>{' '.join(map(str, catalogue.codes[row].tolist()))}</code></li>"
        for item, row in zip(ids, rows, strict=False)
    ]
    if len(rows) > len(ids):
        lines.append(f'<li class="few">and {len(rows) - len(ids):,} more</li>')
    examples = ", ".join(title_of(item, items) for item in ids[:3])
    share = f", {counts[rows].sum() / counts.sum():.1%} of the interactions" if counts.sum() else ""
    summary = f'<code>{code}</code> {len(rows):,} items{share} <span class="few">{escape(examples)}</span>'
    return f"<details><summary>{summary}</summary><ul>{''.join(lines)}</ul></details>"


def _icicle(codes: np.ndarray, shown: np.ndarray, counts: np.ndarray) -> str:
    """Two rows of boxes as SVG: first codes, and second codes below them; as wide as their items, darker where interactions are many."""
    width, high = 960, 60
    kept = codes[np.isin(codes[:, 0], shown)]
    popular = counts[np.isin(codes[:, 0], shown)]
    parts = []
    for level in range(min(2, codes.shape[1])):
        prefixes, rows, sizes = np.unique(kept[:, : level + 1], axis=0, return_inverse=True, return_counts=True)
        load = np.bincount(rows.reshape(-1), weights=popular, minlength=len(sizes)) / sizes
        start = 0.0
        for prefix, size, mean in zip(prefixes, sizes, load, strict=True):
            wide = width * size / len(kept)
            dark = 0.15 + 0.85 * mean / max(load.max(), 1)
            title = f"{' '.join(map(str, prefix))}: {size:,} items" + (
                f", {mean:.1f} interactions each" if load.any() else ""
            )
            parts.append(
                f'<rect x="{start:.2f}" y="{level * (high + 4)}" width="{max(wide - 0.5, 0.3):.2f}" height="{high}" fill="{COLOURS[level]}" '
                f'fill-opacity="{dark:.2f}"><title>{escape(title)}</title></rect>'
            )
            start += wide
    note = "First codes above, second codes below: as wide as their number of items, darker where items have more interactions. Point at a box for its numbers."
    height = (high + 4) * min(2, codes.shape[1])
    picture = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="The tree of semantic IDs">{"".join(parts)}</svg>'
    return f"<p>{note}</p>\n{picture}"
