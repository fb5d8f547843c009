"""docs/explanation/scale.md holds the tables that benchmarks/speed/scale.py computes."""

from benchmarks.speed import scale


def test_the_page_has_the_computed_tables():
    page = scale.PAGE.read_text(encoding="utf-8")
    assert scale.page() == page, "python benchmarks/speed/scale.py --write"
    assert all(f"\n| {name} |" in page for name in scale.sizes())
    assert scale.tables().count("\n### ") == len(scale.sizes())
