"""What settings would have reached with fewer of them tried (benchmarks/_quality_budget.py)."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def budget():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import _quality_budget

        yield _quality_budget


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=7), data=st.data())
def test_the_best_of_some_is_the_mean_over_all_draws(budget, values, data):
    drawn = data.draw(st.integers(1, len(values)))
    draws = [max(some) for some in itertools.combinations(values, drawn)]
    assert budget.expected_best(values, drawn) == pytest.approx(statistics.mean(draws))


def test_settings_count_once_and_what_was_asked_or_fused_not_at_all(budget, tmp_path):
    def row(name, settings, seeds, minutes=None):
        return {"name": name, "settings": settings, "recipe": "r.yaml", "minutes": minutes, "seeds": seeds}

    metric = "validation/ndcg@10"
    rows = [
        row(f"beauty/one/{metric}", {"model": "sasrec", "lr": 1}, {"0": 0.1}),
        row(f"beauty/one_on_a_gpu/{metric}", {"model": "sasrec", "lr": "1"}, {"0": 0.3, "1": 0.2}),
        row(f"beauty/shorter/{metric}", {"model": "sasrec", "lr": 1}, {"0": 0.4}, minutes=6),
        row("beauty/one/test/ndcg@10", {"model": "sasrec", "lr": 1}, {"0": 0.9}),
        row(f"beauty/asked/{metric}", {"judged": ["one-0"]}, {"0": 0.9}),
        row(f"beauty/fused/{metric}", {"fused": ["one-0"]}, {"0": 0.9}),
    ]
    for name, some in zip(budget.TRIED, ([rows[0]], [rows[1]], [], rows[2:]), strict=True):
        (tmp_path / name).write_text(json.dumps({"rows": some}))
    assert [value for _, value in budget.tried(tmp_path)] == pytest.approx([0.2, 0.4])
