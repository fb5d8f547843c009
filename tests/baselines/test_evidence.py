"""Evidence about pairs of items beside a sequence model: what it ranks, by which weights, in files, and from which rows."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from onerec_hf.baselines import SequentialRecommender, add_evidence
from onerec_hf.baselines.next_items import pad_left
from onerec_hf.baselines.requests import ItemRecommender
from onerec_hf.data import UserSequences
from onerec_hf.modeling.item_evidence import DEFAULT_WEIGHTS, FEATURES, LISTS
from onerec_hf.trainers import SequentialTrainer, SequentialTrainingArguments, fit_sequential
from onerec_hf.workflows.compare.ranking import requests_of
from tests.rounding import assert_close, close

IDS = [f"m{i}" for i in range(12)]
PAIRS = [["m0", "m7"], ["m0", "m7"], ["m1", "m3", "m7"], ["m5"]]


def make(ids=IDS, **config) -> SequentialRecommender:
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "max_history": 6, "dropout_rate": 0.0, "initializer_range": 0.02, **config}
    return SequentialRecommender.from_items(ids, **settings).eval()


def held_out(*pairs) -> Dataset:
    return Dataset.from_list([{"history": history, "session": [item]} for history, item in pairs])


def same_answers(one, other):
    found, wanted = (dict(model.recommend([["m0", "m3"]], top_k=5)[0]) for model in (one, other))
    assert list(found) == list(wanted)
    assert list(found.values()) == close(list(wanted.values()))


def test_scores_are_those_by_hand():
    """One user, one history; every feature of the formula by loops."""
    content = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    content[4] = 0  # without content
    model, history = make(), [0, 5, 3]
    plain = model(pad_left([np.array(history)])).logits[0]
    add_evidence(model, PAIRS, content=content)
    model.evidence.set_weights(torch.tensor([2.0, 0.5, 0.25, 0.125, 1.5, -1.0, 0.75]))
    rows = [[int(item[1:]) for item in sequence] for sequence in PAIRS]
    counts, follow, bought = np.zeros((12, 12)), np.zeros((12, 12)), np.zeros(12)
    for sequence in rows:
        for first, a in enumerate(sequence):
            bought[a] += 1
            for second in range(first + 1, len(sequence)):
                counts[a, sequence[second]] += 0.7 ** (second - first - 1)
                counts[sequence[second], a] += 0.3 * 0.7 ** (second - first - 1)
            if first + 1 < len(sequence):
                follow[a, sequence[first + 1]] += 1
    near = counts * np.outer((bought + 1) ** -0.5, (bought + 1) ** -0.5)
    unit = content / np.maximum(np.linalg.norm(content, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit[history].T
    by_hand = (
        2.0 * plain.detach().numpy()
        + 0.5 * np.log1p(10 * sum(0.8 ** (2 - j) * near[item] for j, item in enumerate(history)))
        + 0.25 * np.log1p(follow[3])
        + 0.125 * np.log1p(follow[:, 3])
        + 1.5 * cosines.max(1)
        - cosines[:, -1]
        + 0.75 * np.log1p(bought)
    )
    found = model(pad_left([np.array(history)])).logits[0].detach().numpy()
    # Content counts from the least similar candidate on: a constant for each user, which ranks nothing. It is kept in float16.
    assert_close(found - found[0], by_hand - by_hand[0], terms=4, dtype=torch.float16)
    order = [item for item in np.argsort(-by_hand) if item not in history]
    assert model.rank([np.array(history)], 9)[0].tolist() == order


def test_rank_and_recommend_use_it_and_training_does_not():
    model = make()
    ids, labels = pad_left([np.array([2, 0])]), torch.tensor([[-100, 8]])
    loss = model(ids, labels=labels).loss
    before = model.rank([np.array([2, 0])], 3)
    add_evidence(model, PAIRS)
    assert model.rank([np.array([2, 0])], 3)[0, 0] == 7 != before[0, 0]
    assert model.recommend([["m2", "m0"]], top_k=1)[0][0][0] == "m7"
    assert model.recommend([["m2", "m0"]], top_k=1, exclude=["m7"])[0][0][0] != "m7"
    assert [item for item, _ in model.recommend([["m2", "m0"]], top_k=5, allow=["m7", "m4"])[0]] == ["m7", "m4"]
    assert model.rank([np.array([0, 7])], 12)[0].tolist().count(-1) == 2  # seen items stay out
    assert torch.equal(model(ids, labels=labels).loss, loss)


def test_weights_are_fitted_on_validation_users():
    """Each validation target directly followed the last item in training; head and content say nothing about it."""
    draw = np.random.default_rng(0)
    partner = draw.permutation(40)
    ids = [f"m{i}" for i in range(40)]
    sequences = [[ids[a], ids[partner[a]]] for a in range(40)]
    validation = held_out(*(([ids[draw.integers(40)], ids[a]], ids[partner[a]]) for a in range(40) if partner[a] != a))
    model = make(ids)
    model.item_embedding.weight.data[1:] = torch.from_numpy(draw.normal(size=(40, 16))).float()
    content = draw.normal(size=(40, 4))
    add_evidence(model, sequences, validation, content)
    weights = dict(zip(FEATURES, model.evidence.weights.tolist(), strict=True))
    start = dict(zip(weights, DEFAULT_WEIGHTS, strict=True))
    assert weights["next"] > start["next"]
    assert weights["head"] < start["head"]
    histories = [np.array([int(item[1:]) for item in history]) for history in validation["history"]]
    targets = [int(session[0][1:]) for session in validation["session"]]
    legal = [target not in history for target, history in zip(targets, histories, strict=True)]
    hits = model.rank(histories, 1)[:, 0] == targets
    assert hits[legal].mean() > 0.9


def test_no_validation_users_leave_the_default_weights():
    model = make()
    add_evidence(model, PAIRS)
    assert model.evidence.weights.tolist() == pytest.approx(DEFAULT_WEIGHTS)
    add_evidence(model, PAIRS, held_out((["m0"], "m0")))  # its target is seen, so no candidate
    assert model.evidence.weights.tolist() == pytest.approx(DEFAULT_WEIGHTS)


def test_saved_and_loaded(tmp_path):
    model = make()
    add_evidence(model, PAIRS, held_out((["m0"], "m7"), (["m1"], "m3")), np.eye(12), neighbours=4)
    model.save_pretrained(tmp_path)
    loaded = SequentialRecommender.from_pretrained(tmp_path)
    assert loaded.evidence.near_items.shape == (13, 4)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    same_answers(loaded, model)


@pytest.mark.parametrize("features", [None, np.random.default_rng(0).normal(size=(12, 4))], ids=["ids", "features"])
def test_trained_in_one_call_from_training_rows_only(tmp_path, features):
    """A planted validation pair and a test item leave no trace in the counts."""
    training = {"hidden_size": 8, "num_train_epochs": 1, "use_cpu": True, "item_ids": IDS, "features": features}
    validation = held_out((["m0", "m9"], "m10"), (["m1"], "m3"))
    output = str(tmp_path / "out")
    model = fit_sequential(PAIRS, validation, evidence=True, output_dir=output, **training)
    counted = fit_sequential(PAIRS, evidence=True, **training)
    for name in LISTS:
        assert all(map(torch.equal, model.evidence.list_of(name), counted.evidence.list_of(name)))
    assert not model.evidence.near_items[[10, 11]].any()
    assert model.evidence.interactions[[10, 11]].tolist() == [0, 0]
    assert (model.content is None) == (features is None)
    loaded = SequentialRecommender.from_pretrained(output)
    same_answers(loaded, model)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "50 neighbours a list" in card
    assert ("cosines of content" in card) == (features is not None)
    assert fit_sequential(PAIRS, **training).evidence is None


def test_bad_input():
    with pytest.raises(ValueError, match=r"content: expected shape \(12, d\).*got \(3, 2\)"):
        add_evidence(make(), PAIRS, content=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"content: 1 rows hold NaN or infinity \(first: row 2\)"):
        add_evidence(make(), PAIRS, content=np.where(np.arange(12)[:, None] == 2, np.nan, 1.0))
    with pytest.raises(KeyError, match="zebra"):
        add_evidence(make(), [["m0", "zebra"]])
    for nothing in ([], [[]], [["m0"]]):
        model = make()
        add_evidence(model, nothing)
        assert not model.evidence.near_items.any()
        assert len(model.recommend([["m0"]], top_k=3)[0]) == 3
    model = make(["only"])
    add_evidence(model, [["only", "only"]])
    assert model.recommend([["only"]], top_k=1, exclude_seen=False)[0][0][0] == "only"


def test_what_is_asked_for_lately_counts(tmp_path):
    """The items of lately are told by the times of the training sequences; lists of items have none."""
    draw = np.random.default_rng(0)
    rows = [(u, f"m{draw.integers(10)}", int(draw.integers(1, 99))) for u in range(200) for _ in range(3)]
    rows += [(u, f"m{10 + draw.integers(2)}", 200 + u) for u in range(60)]
    sequences = UserSequences.from_interactions(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]))
    validation = held_out(*((["m0"], f"m{10 + draw.integers(2)}") for _ in range(100)))
    validation = validation.add_column("request_time", [250] * 100)
    model, without = make(), make()
    add_evidence(model, sequences, validation)
    add_evidence(without, sequences.lists(), validation)
    assert model.config.recent == 660
    assert float(model.evidence.weights[-2:].sum()) > 0
    assert not without.config.recent
    assert len(without.evidence.weights) == len(FEATURES)
    model.save_pretrained(tmp_path)
    same_answers(SequentialRecommender.from_pretrained(tmp_path), model)
    # What counts is what was asked for before a request: of examples, in the trainer and of requests.
    model.evidence.set_weights(F.pad(torch.ones(2), (len(FEATURES), 0)))
    earlier = validation.remove_columns("request_time").add_column("request_time", [90] * 100)
    args = SequentialTrainingArguments(str(tmp_path / "scratch"), eval_top_k=[2], report_to="none", use_cpu=True)
    trainer = SequentialTrainer(model, args)
    for users, lately in ((validation, True), (earlier, False)):
        requests = requests_of(ItemRecommender(model, model.items), users, exclude_seen=True)
        answers = ItemRecommender(model, model.items).recommend(requests)
        first = model.items.indices([answer.sessions[0][0] for answer in answers])
        for ranked in (model.rank_examples(users, 2)[:, 0], trainer.predict(users).predictions[:, 0], first):
            assert ((ranked >= 10) == lately).all()
