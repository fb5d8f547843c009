"""
What the contest's models would have reached had each been tuned as little as the others: of the settings that were tried on validation, the best of
n that are drawn at random, on average over all draws (expected validation performance, Dodge et al., arXiv 1909.03004, here without replacement).
A table of docs/contest.md, made from the committed results.

    python benchmarks/_quality_budget.py           writes it into its page
    python benchmarks/_quality_budget.py --check   exits with status 1 where the page has another one
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from _quality_table import ROOT, number, replaced, write_or_check

PAGE = ROOT / "docs" / "contest.md"
BEGIN, END = "<!-- budget table: benchmarks/_quality_budget.py -->\n", "<!-- end of the budget table -->\n"
# Where settings that were tried on validation stand; quality.json has those of its rows that stand nowhere else.
TRIED = ("quality_validation.json", "quality_validation_cpu.json", "quality_validation_tuned.json", "quality.json")
METRIC = "validation/ndcg@10"
ASKED = ("item_score_weight", "item_score_weights", "per_device_eval_batch_size")
DRAWN = (1, 2, 4, 8, 16, 20)

Settings = dict[str, object]


def _sequence(model: str, texts: bool) -> Callable[[Settings], bool]:
    return lambda settings: (
        settings.get("model") == model and settings.get("loss", "ce") == "ce" and (texts or "features" not in settings)
    )


TEXTS = "and those that read texts"
FAMILIES: list[tuple[str, Callable[[Settings], bool]]] = [
    # Features of a generator were an experiment that is not in the library.
    (
        "OneRec with item vectors",
        lambda settings: settings.get("item_embeddings") == "true" and "features" not in settings,
    ),
    ("SASRec", _sequence("sasrec", texts=False)),
    (TEXTS, _sequence("sasrec", texts=True)),
    ("HSTU", _sequence("hstu", texts=False)),
    (TEXTS, _sequence("hstu", texts=True)),
    ("GRU4Rec", _sequence("gru4rec", texts=False)),
    (TEXTS, _sequence("gru4rec", texts=True)),
    ("TIGER of our parts", lambda settings: settings.get("quantizer") == "rq-vae"),
]


def expected_best(values: Sequence[float], drawn: int) -> float:
    """
    The mean, over all draws of `drawn` of these values without replacement, of the best one.

    Example:
        >>> expected_best([0.1, 0.2, 0.4], 2)  # of .1 .2, .1 .4, .2 .4
        0.3333333333333333
    """
    ordered = sorted(values)
    ways = (math.comb(rank, drawn - 1) for rank in range(len(ordered)))  # draws of which this one is the best
    return sum(value * way for value, way in zip(ordered, ways, strict=True)) / math.comb(len(ordered), drawn)


def tried(results: Path = ROOT / "benchmarks" / "results") -> Iterator[tuple[Settings, float]]:
    """Each of the settings once, under whatever names and on whatever devices it ran, and the mean over seeds of what validation said of its latest run."""
    found: dict[str, tuple[Settings, float]] = {}
    for name in TRIED:
        for row in json.loads((results / name).read_text())["rows"]:
            settings = row["settings"]
            trained = "judged" not in settings and "fused" not in settings
            if trained and row["name"].endswith(METRIC):
                found[_key(row)] = settings, statistics.mean(row["seeds"].values())
    yield from found.values()


def _key(row: dict) -> str:
    """
    What tells settings apart: not how a number is written, what is off, how a trained generator is asked, nor the recipe of a sequence model, which
    takes nothing from it but the length of histories.
    """
    settings = {name: str(value) for name, value in row["settings"].items() if name not in ASKED}
    trained = {name: value for name, value in settings.items() if value not in ("0", "False", "false", "[]")}
    return json.dumps([trained, row["minutes"], "model" in settings or row["recipe"]], sort_keys=True)


def table(settings: Sequence[tuple[Settings, float]]) -> str:
    """The Markdown table of these settings and what they reached."""
    lines = [
        f"| best of so many, on average | {' | '.join(map(str, DRAWN))} | all | tried |",
        "|---" * (len(DRAWN) + 3) + "|",
    ]
    for family, belongs in FAMILIES:
        values = [value for some, value in settings if belongs(some)]
        best = [number(expected_best(values, n)) if n <= len(values) else "" for n in DRAWN]
        lines.append(f"| {family} | {' | '.join(best)} | {number(max(values))} | {len(values)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    new = replaced(PAGE.read_text(encoding="utf-8"), table(list(tried())), BEGIN, END)
    return write_or_check({PAGE: new}, __doc__)


if __name__ == "__main__":
    sys.exit(main())
