"""
The table of the equal search (benchmarks/quality/search.py) in docs/contest.md, made from the committed results: what each family would have reached with fewer of
its draws, what the best of all did on validation, and on test with several seeds.

    python benchmarks/quality/search_table.py           writes it into its page
    python benchmarks/quality/search_table.py --check   exits with status 1 where the page has another one
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence

from benchmarks.quality.search_spaces import FAMILIES, METRIC, name_of, winner
from benchmarks.quality.tables import RESULTS, ROOT, number, replaced, spread, write_or_check

PAGE = ROOT / "docs" / "contest.md"
SEARCH = ROOT / "benchmarks" / "results" / "quality_search.json"
BEGIN, END = "<!-- search table: benchmarks/quality/search_table.py -->\n", "<!-- end of the search table -->\n"
DATASET = "amazon-beauty"
DRAWN = (1, 2, 4, 8)


def expected_best(values: Sequence[float], drawn: int) -> float:
    """
    The mean, over all draws of `drawn` of these values without replacement, of the best one (expected validation performance, Dodge et al.,
    arXiv 1909.03004, there with replacement).

    Example:
        >>> expected_best([0.1, 0.2, 0.4], 2)  # of .1 .2, .1 .4, .2 .4
        0.3333333333333333
    """
    ordered = sorted(values)
    ways = (math.comb(rank, drawn - 1) for rank in range(len(ordered)))  # draws of which this one is the best
    return sum(value * way for value, way in zip(ordered, ways, strict=True)) / math.comb(len(ordered), drawn)


def reached(rows: Sequence[dict], family: str) -> list[float]:
    """NDCG@10 of all validation users, a value per draw of this family, in their order."""
    by_name = {row["name"]: row["value"] for row in rows}
    names = (f"{DATASET}/{name_of(family, trial)}/{METRIC}" for trial in itertools.count())
    return [by_name[name] for name in itertools.takewhile(by_name.__contains__, names)]


def table(search: Sequence[dict], judged: Sequence[dict]) -> str:
    """
    The Markdown table.

    Args:
        search: rows of the draws' results.
        judged: rows that have the winners', on validation and test.

    Raises:
        ValueError: not as many draws of each family.
    """
    by_name = {row["name"]: row for row in judged}
    found = {family: reached(search, family) for family in FAMILIES}
    trials = {family: len(values) for family, values in found.items()}
    if len(set(trials.values())) > 1:
        raise ValueError(
            f"an equal search has as many draws of each family, this one {trials}: run search.py for the others"
        )
    best_of = " | ".join(f"best of {drawn}" for drawn in DRAWN)
    lines = [
        f"| NDCG@10 on validation, but for the last two | {best_of} | of all {trials['onerec']} | three seeds | test | test, recall@10 |",
        "|---" * (len(DRAWN) + 5) + "|",
    ]
    for family, about in FAMILIES.items():
        values = found[family]
        fewer = " | ".join(number(expected_best(values, drawn)) for drawn in DRAWN)
        seeds = (
            by_name[f"{DATASET}/{winner(family)}/{metric}"] for metric in (METRIC, "test/ndcg@10", "test/recall@10")
        )
        lines.append(f"| {about.says} | {fewer} | {number(max(values))} | {' | '.join(map(spread, seeds))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    search, judged = (json.loads(path.read_text())["rows"] for path in (SEARCH, RESULTS["contest"]))
    new = replaced(PAGE.read_text(encoding="utf-8"), table(search, judged), BEGIN, END)
    return write_or_check({PAGE: new}, __doc__)


if __name__ == "__main__":
    sys.exit(main())
