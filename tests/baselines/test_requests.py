"""Sequence models, popularity and item-kNN answer requests, and are saved and loaded."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from onerec_hf.baselines import (
    ItemIndex,
    ItemKNNBaseline,
    ItemRecommender,
    PopularityBaseline,
    SequentialRecommender,
    load_item_recommender,
    load_ranking,
    save_ranking,
)
from onerec_hf.modeling.requests import Request, RequestError
from tests.rounding import close

ITEMS = [f"m{number}" for number in range(12)]
rng = np.random.default_rng(0)
SEQUENCES = [rng.integers(0, 12, 6) for _ in range(40)]


def baseline(kind, **settings):
    return kind(**settings).fit(SEQUENCES, len(ITEMS))


def models():
    yield SequentialRecommender.from_items(ITEMS, hidden_size=16, max_history=4)
    yield baseline(PopularityBaseline)
    yield baseline(ItemKNNBaseline, num_neighbors=5, last_n=3)


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_each_request_has_its_own_lists(model):
    """A batch of requests with different exclusions and allow lists gets what each gets alone."""
    recommender = ItemRecommender(model, ItemIndex(ITEMS))
    requests = [
        Request(["m3", "m4"], top_k=3),
        Request(["m3", "m4"], exclude=["m0", "m1", "m2"], top_k=12),
        Request(["m5"], exclude_seen=False, top_k=12),
        Request(["m5", "unknown"], allow=["m7", "m5", "m8"], exclude=["m8"], top_k=4),
        Request(["m1"], allow=["m2", "m3", "m4"], top_k=2),
    ]
    together = recommender.recommend(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = recommender.recommend([request])
        assert answer.sessions == alone.sessions
        assert answer.scores == close(alone.scores)
        assert answer.scores == sorted(answer.scores, reverse=True)
    found = [{session[0] for session in answer.sessions} for answer in together]
    assert len(found[0]) == 3
    assert found[1] == set(ITEMS) - {"m0", "m1", "m2", "m3", "m4"}
    assert found[2] == set(ITEMS)
    assert found[3] == {"m7"}
    assert together[3].request.skipped == 1
    assert len(found[4]) == 2
    assert found[4] < {"m2", "m3", "m4"}


@pytest.mark.parametrize("model", models(), ids=lambda model: type(model).__name__)
def test_answers_are_the_models_ranking(model):
    histories = [sequence[:5] for sequence in SEQUENCES[:10]]
    rank = model.rank if isinstance(model, SequentialRecommender) else model.recommend
    items = ItemIndex(ITEMS)
    answers = ItemRecommender(model, items).recommend([Request(items.ids(rows), top_k=4) for rows in histories])
    for answer, rows in zip(answers, rank(histories, 4), strict=True):
        assert [session[0] for session in answer.sessions] == items.ids(rows)


def test_sessions_of_several_items_are_refused():
    recommender = ItemRecommender(baseline(PopularityBaseline), ItemIndex(ITEMS))
    with pytest.raises(RequestError, match="ranks single items, sessions need a OneRec"):
        recommender.recommend([Request(["m1"], session_length=2)])


@pytest.mark.parametrize("ids", [ITEMS, list(range(5, 17))], ids=["strings", "integers"])
@pytest.mark.parametrize("settings", [None, {}, {"num_neighbors": 4, "shrinkage": 1.5, "last_n": 2}])
def test_a_saved_baseline_ranks_the_same(tmp_path, ids, settings):
    model = baseline(PopularityBaseline) if settings is None else baseline(ItemKNNBaseline, **settings)
    save_ranking(tmp_path, model, ItemIndex(ids))
    again, items = load_ranking(tmp_path)
    assert (type(again), again.settings, items.item_ids) == (type(model), model.settings, ids)
    np.testing.assert_array_equal(again.recommend(SEQUENCES, 12), model.recommend(SEQUENCES, 12))
    recommender = load_item_recommender(tmp_path)
    assert recommender.recommend([Request(ids[:2], top_k=3)])[0].sessions


def test_a_baseline_with_other_items_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="fitted for 12 items, and items has 3"):
        save_ranking(tmp_path, baseline(PopularityBaseline), ItemIndex([1, 2, 3]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda config: config | {"model_type": "bert"}, "holds a model of type 'bert'"),
        ("config.json", lambda config: config | {"format_version": 99}, "format_version is 99.*Upgrade"),
        ("config.json", lambda config: config | {"num_items": 3}, "different numbers of items"),
        ("config.json", lambda config: config | {"similarity": "euclid"}, "similarity must be 'cosine'"),
        ("weights", lambda found: found | {"others": found["others"] + 100}, "others must lie between 0 and 11"),
        ("weights", lambda found: found | {"values": found["values"][1:]}, "no sparse matrix"),
        ("weights", lambda found: found | {"values": found["values"] * float("nan")}, "no sparse matrix"),
        ("weights", lambda found: found | {"popularity": found["popularity"] - 1000}, "a count for each item"),
        ("weights", lambda found: {name: found[name] for name in ("item_keys", "popularity")}, "values"),
        ("cut", None, "damaged or cut short"),
    ],
)
def test_damaged_baselines_are_refused(tmp_path, name, change, message):
    save_ranking(tmp_path, baseline(ItemKNNBaseline), ItemIndex(ITEMS))
    weights = tmp_path / "model.safetensors"
    if name == "config.json":
        path = tmp_path / name
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    elif name == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        save_file({key: tensor.contiguous() for key, tensor in change(load_file(weights)).items()}, weights)
    with pytest.raises(ValueError, match=message):
        load_ranking(tmp_path)


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="type 'bert', not one of onerec_baseline, onerec_popularity"):
        load_item_recommender(tmp_path)
