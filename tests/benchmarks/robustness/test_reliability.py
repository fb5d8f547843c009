"""docs/explanation/reliability.md says what benchmarks/results/reliability.json holds."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_page_has_the_measured_figures():
    rows = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text())["rows"]
    measured = {row["name"]: f"{row['value']:.0f} {row['unit']}" for row in rows if row["name"].startswith("kill9/")}
    page = (ROOT / "docs" / "explanation" / "reliability.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\|[^|]*`(kill9/\w+)`[^|]*\| ([^|]*) \|", page, re.MULTILINE))
    assert told == measured
    assert len(told) == 5
