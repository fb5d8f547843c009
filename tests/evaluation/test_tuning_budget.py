"""What settings would have reached with fewer of them tried (benchmarks/_quality_budget.py)."""

import itertools
import json
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def budget(benchmarks):
    import _quality_budget

    return _quality_budget


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=7), data=st.data())
def test_the_best_of_some_is_the_mean_over_all_draws(budget, values, data):
    drawn = data.draw(st.integers(1, len(values)))
    draws = [max(some) for some in itertools.combinations(values, drawn)]
    assert budget.expected_best(values, drawn) == pytest.approx(statistics.mean(draws))


def test_settings_count_once_and_what_was_asked_or_fused_not_at_all(budget, tmp_path):
    def row(name, settings, seeds, recipe="r.yaml", minutes=None):
        return {"name": name, "settings": settings, "recipe": recipe, "minutes": minutes, "seeds": seeds}

    metric, sasrec = "validation/ndcg@10", {"model": "sasrec", "lr": 1}
    generator = {"session_length": 1, "item_embeddings": "true", "dropout_rate": 0.2}
    rows = [
        row(f"beauty/one/{metric}", sasrec, {"0": 0.1}),
        row(f"beauty/one_on_a_gpu/{metric}", {"model": "sasrec", "lr": "1", "scaled": False}, {"0": 0.3}),
        row(f"beauty/latest/{metric}", sasrec, {"0": 0.3, "1": 0.2}, recipe="other.yaml"),
        row(f"beauty/shorter/{metric}", sasrec, {"0": 0.4}, minutes=6),
        row("beauty/one/test/ndcg@10", sasrec, {"0": 0.9}),
        row(f"beauty/generator/{metric}", {**generator, "item_score_weight": 8}, {"0": 0.5}),
        row(f"beauty/weighs_more/{metric}", {**generator, "item_loss_weight": 0, "item_score_weight": 32}, {"0": 0.6}),
        row(f"beauty/larger/{metric}", generator, {"0": 0.7}, recipe="large.yaml"),
        row(f"beauty/asked/{metric}", {"judged": ["one-0"]}, {"0": 0.9}),
        row(f"beauty/fused/{metric}", {"fused": ["one-0"]}, {"0": 0.9}),
    ]
    for name, some in zip(budget.TRIED, (rows[:1], rows[1:2], [], rows[2:]), strict=True):
        (tmp_path / name).write_text(json.dumps({"rows": some}))
    assert [value for _, value in budget.tried(tmp_path)] == pytest.approx([0.25, 0.4, 0.6, 0.7])
