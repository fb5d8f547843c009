"""
The tables of the contest, made from the results of benchmarks/quality/run.py: README's, with the numbers of others' papers beside ours, and the
ablations of docs/contest.md.

    python benchmarks/quality/tables.py           writes them into their pages
    python benchmarks/quality/tables.py --check   exits with status 1 where a page has another one
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.quality.experiments import ROWS

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"contest": ROOT / "README.md", "ablations": ROOT / "docs" / "contest.md"}
RESULTS = {
    "contest": ROOT / "benchmarks" / "results" / "quality.json",
    "ablations": ROOT / "benchmarks" / "results" / "quality_ablations.json",
}
BEGIN, END = "<!-- quality table: benchmarks/quality/tables.py -->\n", "<!-- end of the quality table -->\n"

# What stands in a row, and what was published for Beauty with the same split: recall@10, NDCG@10, where.
CONTEST = {
    "popularity": ("Popularity", ""),
    "item_knn": ("Item-kNN", ""),
    "gru4rec": ("GRU4Rec, full cross-entropy", ".0283 / .0137 (TIGER's paper)"),
    "gru4rec_smoothed": ("tuned further: labels smoothed, wider, larger steps", ""),
    "searched_gru4rec": ("the best of 16 settings drawn at random", ""),
    "sasrec_bce": ("SASRec, one random negative", ".0605 / .0318 (TIGER's paper)"),
    "sasrec_ce": ("SASRec, full cross-entropy", ".0859 / .0503 (a replication)"),
    "sasrec_ce_smoothed": ("tuned further: labels smoothed, larger steps", ""),
    "sasrec_ce_smoothed_fused": ("its three seeds, fused by rank", ""),
    "searched_sasrec": ("SASRec, the best of 16 settings drawn at random", ""),
    "sasrec_ce_text": ("SASRec that reads items' texts too, labels smoothed", ""),
    "sasrec_ce_text_fused": ("its three seeds, fused by rank", ""),
    "searched_sasrec_text": ("SASRec that reads items' texts too, the best of 16 settings drawn at random", ""),
    "searched_sasrec_text_fused": ("its three seeds, fused by rank", ""),
    "hstu": ("HSTU, full cross-entropy", ".0704 / .0389 (ActionPiece's paper)"),
    "hstu_smoothed": ("tuned further: labels smoothed, larger batches", ""),
    "hstu_smoothed_fused": ("its three seeds, fused by rank", ""),
    "searched_hstu": ("HSTU, the best of 16 settings drawn at random", ""),
    "tiger": ("TIGER of our parts", ".0648 / .0384 (TIGER's paper)"),
    "searched_tiger": ("the best of 16 settings drawn at random", ""),
    "codes_text": ("*of 0.2 million weights, 2 minutes of a CPU:* OneRec, one item a session, IDs of texts", ""),
    "codes": ("+ aligned IDs", ""),
    "codes_m5": ("+ sessions of five, 6 to 8 minutes", ""),
    "codes_ntp": ("aligned IDs, one item, as many steps more as alignment takes, without preferences", ""),
    "codes_ipa": ("the same steps with preference alignment", ""),
    "onerec_pointwise": ("*larger:* OneRec, one item a session", ""),
    "onerec_items_scaled_cpu": ("*on a CPU in 15 minutes:* one place per item, scaled, beams guided", ""),
    "onerec_items_coded_cpu": ("and items named by their codes too, 15 minutes", ""),
    "onerec_items_dropout": ("and item vectors left out at random, more dropout, 12 minutes of a CPU", ""),
    "onerec_items_smoothed": ("and labels smoothed, item scores weighing more, 12 minutes of a CPU", ""),
    "onerec_items_smoothed_fused": ("its three seeds, fused by rank", ""),
    "searched_onerec": ("OneRec, the best of 16 settings drawn at random", ""),
    "searched_onerec_fused": ("its three seeds, fused by rank", ""),
    "onerec_sasrec_fused": ("*two models fused by rank:* the OneRec and the SASRec tuned further by hand", ""),
    "onerec_sasrec_text_fused": ("the OneRec and the SASRec that reads texts, tuned by hand", ""),
    "searched_onerec_sasrec_text_fused": ("the OneRec and the SASRec that reads texts, of 16 settings each", ""),
    "searched_sasrec_text_pair_fused": ("two seeds of that SASRec", ""),
    "searched_sasrec_both_fused": ("that SASRec and the one without texts, of 16 settings each", ""),
    "searched_hstu_sasrec_text_fused": ("that SASRec and the HSTU of 16 settings", ""),
    "onerec_sasrec_text_six_fused": (
        "*three and three:* the OneRec and the SASRec that reads texts, tuned by hand",
        "",
    ),
    "searched_onerec_sasrec_text_six_fused": ("the OneRec and the SASRec that reads texts, of 16 settings each", ""),
    "searched_sasrec_six_fused": ("the SASRecs with texts and without, of 16 settings each", ""),
}


def table(which: str, results: dict, dataset: str = "amazon-beauty") -> str:
    """
    The Markdown table.

    Args:
        which: `contest` or `ablations`.
        results: the JSON's content.
    """
    rows = {row["name"]: row for row in results["rows"]}
    split, last = ("test", "published") if which == "contest" else ("validation", "weights")
    named = CONTEST if which == "contest" else {name: (row.says, "") for name, row in ROWS.items()}
    lines = [f"| Beauty, {split} | recall@10 | NDCG@10 | seeds | {last} |", "|---|---|---|---|---|"]
    for name, (says, published) in named.items():
        row = f"{dataset}/{name}"
        if f"{row}/{split}/recall@10" not in rows:
            continue
        recall, ndcg = (rows[f"{row}/{split}/{metric}@10"] for metric in ("recall", "ndcg"))
        end = published if which == "contest" else f"{rows[f'{row}/parameters']['value']:,.0f}"
        lines.append(f"| {says} | {spread(recall)} | {spread(ndcg)} | {len(recall['seeds'])} | {end} |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """`.0726`"""
    return f"{value:.4f}".lstrip("0")


def spread(row: dict) -> str:
    """`.0726 ± .0015`: mean and standard deviation over seeds."""
    text = number(row["value"])
    return text if row["deviation"] is None else f"{text} ± {row['deviation']:.4f}".replace("± 0", "± ")


def replaced(page: str, new: str, begin: str = BEGIN, end: str = END) -> str:
    """
    The page with this table in place of its own.

    Raises:
        ValueError: the page has no place for it.
    """
    before, found, rest = page.partition(begin)
    _, ends, after = rest.partition(end)
    if not (found and ends):
        raise ValueError(f"a page of the quality tables lacks the lines {begin.strip()} and {end.strip()}")
    return before + begin + new + end + after


def write_or_check(pages: dict[Path, str], description: str | None) -> int:
    """Writes pages as they should be, or with `--check` says which are not; the exit status."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing")
    check, differ = arguments.parse_args().check, 0
    for path, new in pages.items():
        if not check:
            path.write_text(new, encoding="utf-8")
        elif new != path.read_text(encoding="utf-8"):
            print(f"{path} has another table than the results give: run {Path(sys.argv[0]).name}", file=sys.stderr)
            differ = 1
    return differ


def main() -> int:
    pages = {}
    for which, path in PAGES.items():
        results = json.loads(RESULTS[which].read_text())
        pages[path] = replaced(path.read_text(encoding="utf-8"), table(which, results))
    return write_or_check(pages, __doc__)


if __name__ == "__main__":
    sys.exit(main())
