"""Sequence models with features: the embedding by hand, padding, users apart, what is a target and what is excluded, training, files."""

import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from onerec_hf.baselines import NextItemCollator, NextItemDataset, SequentialRecommender, add_evidence
from onerec_hf.baselines.next_items import pad_left
from onerec_hf.baselines.read_histories import ReadHistories
from onerec_hf.data import DatasetFeatures
from onerec_hf.modeling.features import Feature, FeatureSchema
from onerec_hf.modeling.features_file import FEATURES_NAME
from onerec_hf.modeling.item_evidence import ItemEvidence
from onerec_hf.modeling.requests import Request
from onerec_hf.trainers import fit_sequential
from onerec_hf.workflows import evaluate, load_dataset
from onerec_hf.workflows.artefact import load_recommender, load_sequential, recommender_of
from onerec_hf.workflows.data_options import save_data_options
from tests.rounding import close

SCHEMA = FeatureSchema(
    user=(Feature("age", edges=(30.0,)),),
    interaction=(Feature("like", values=("0", "1")),),
    item=(Feature("genre", values=("a", "b"), slots=2),),
)
IDS = list(range(12))
ITEMS = DatasetFeatures(SCHEMA, np.array([[3 + item % 2, 0] for item in IDS], np.int32))


def make(architecture="sasrec", **config) -> SequentialRecommender:
    """A small model whose features weigh as much as its items."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "max_history": 6, "dropout_rate": 0.0, "initializer_range": 0.5, **config}
    return SequentialRecommender.from_items(IDS, coded=ITEMS, architecture=architecture, **settings).eval()


def codes(random, length):
    """(length, 2) codes of a user and of each interaction."""
    return np.stack([np.full(length, random.integers(3, 5)), random.integers(3, 5, length)], axis=1)


@pytest.mark.parametrize("architecture", ["sasrec", "hstu", "gru4rec", "acvae"])
def test_features_are_added_to_the_items_of_a_history(architecture):
    model = make(architecture)
    ids, of_user = pad_left([np.array([3, 1, 4])]), codes(np.random.default_rng(0), 3)
    of_items = np.concatenate([of_user, ITEMS.items[[3, 1, 4]]], axis=1)
    added = model.features(torch.from_numpy(of_items)[None], packed=True)
    assert (added - model.features(torch.from_numpy(of_items)[None]))[
        0, 1:
    ].abs().amin() > 0  # the user's are at each item
    scale = 4.0 if model.config.scale_embeddings else 1.0
    expected = model.encoder(scale * (model.item_embedding(ids) + added), ids != 0)
    torch.testing.assert_close(model.encode(ids, torch.from_numpy(of_user)[None]), expected)


def test_without_codes_the_values_are_missing():
    model, ids = make(), pad_left([np.array([3, 1]), np.array([4])])
    missing = torch.ones(2, 2, 2, dtype=torch.long)
    missing[1, 0] = 0  # padding
    torch.testing.assert_close(model.encode(ids), model.encode(ids, missing))


def test_users_are_ranked_alike_in_any_order_and_beside_anyone():
    random, model = np.random.default_rng(1), make()
    lengths = random.integers(1, 6, 20)
    items, of_users = [random.integers(0, 12, n) for n in lengths], [codes(random, n) for n in lengths]
    order = random.permutation(20)

    def ranked(rows):
        read = ReadHistories([items[row] for row in rows], [of_users[row] for row in rows])
        return np.concatenate([found for found, _ in model._ranked(read, 5, True, batch_size=7)])

    assert (ranked(order) == ranked(range(20))[order]).all()
    assert (np.concatenate([ranked([row]) for row in range(20)]) == ranked(range(20))).all()


def test_other_interactions_are_read_but_neither_targets_nor_excluded():
    sequence, of_user = np.array([5, 2, 7]), codes(np.random.default_rng(0), 3)
    positive = np.array([True, False, True])
    batch = NextItemCollator(with_seen=True)([NextItemDataset([sequence], 6, [of_user], [positive])[0]])
    assert batch["input_ids"].tolist() == [[6, 3]]
    assert batch["labels"].tolist() == [[-100, 8]]
    assert batch["seen_ids"].tolist() == [[6, 8]]
    assert batch["feature_ids"].tolist() == [of_user[:2].tolist()]
    columns = {"history": [[5, 2, 7]], "history_positive": [[True, False, True]], "session": [[1]]}
    columns |= {"user_features": [[3]], "history_features": [[3, 4, 3]]}
    model = make()
    ranked = model.rank_examples(Dataset.from_dict(columns), k=12)[0]
    assert 2 in ranked
    assert not {5, 7} & set(ranked.tolist())
    without = {name: column for name, column in columns.items() if not name.endswith("_features")}
    assert (model.rank_examples(Dataset.from_dict(without), k=12)[0] != ranked).any()


def hinted(users=80, length=8, seed=0):
    """Interactions whose `hint` says which half of the items the next one is of, whatever was before; and one that says nothing."""
    random = np.random.default_rng(seed)
    items = random.integers(0, 24, (users, length))
    halves = np.roll(items >= 12, -1, axis=1).astype(int)
    columns = {"user_id": np.repeat(np.arange(users), length), "item_id": items.ravel(), "hint": halves.ravel()}
    columns["noise"] = random.integers(0, 4, users * length)
    return pd.DataFrame({**columns, "timestamp": np.tile(np.arange(length), users) * 7200 + 10**9})


def test_a_model_that_reads_a_planted_hint_ranks_better(tmp_path):
    found = {}
    for names in (["hint", "noise"], ["noise"]):
        data = load_dataset(interactions=hinted(), interaction_features=names, max_history=10)
        model = fit_sequential(
            data.train_sequences, item_ids=data.item_ids.tolist(), coded=data.features, hidden_size=16, num_train_epochs=20,
            learning_rate=0.01, use_cpu=True, max_history=10, feature_dim=8,
        )  # fmt: skip
        ranked = model.rank_examples(data.test, 12, exclude_seen=False)
        targets = np.searchsorted(data.item_ids, [session[0] for session in data.test["session"]])
        found[len(names)] = ((ranked >= 12) == (targets >= 12)[:, None]).mean()
        model.save_pretrained(tmp_path / names[0])
        loaded = SequentialRecommender.from_pretrained(tmp_path / names[0])
        assert (loaded.rank_examples(data.test, 12, exclude_seen=False) == ranked).all()
    assert found[2] > 0.9 > 0.65 > found[1]  # the share of the target's half among the twelve best


def test_wrong_features_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"\(rows, places, 4\)"):
        model.encode(pad_left([np.array([1])]), torch.full((1, 1, 5), 3))
    with pytest.raises(ValueError, match="features of 12 items, and item_ids has 3"):
        SequentialRecommender.from_items([1, 2, 3], coded=ITEMS)
    plain = SequentialRecommender.from_items(IDS, hidden_size=8)
    with pytest.raises(ValueError, match="no features"):
        plain.encode(pad_left([np.array([1])]), torch.full((1, 1, 2), 3))


def test_codes_of_another_schema_are_refused_before_they_reach_a_device(saved):
    """A model on an accelerator does not look at them."""
    model = make()
    good = {"history": [[5, 2]], "user_features": [[3]], "history_features": [[3, 4]], "session": [[1]]}
    for wrong, message in (
        ({"user_features": [[9]]}, "user_features hold codes of 'age' up to 9, the schema has 0 to 4"),
        ({"history_features": [[3, -1]]}, "history_features of example 0 hold values that are no codes"),
        ({"history_features": [[3, 4, 4]]}, "history_features of example 0 hold 3 values"),
    ):
        with pytest.raises(ValueError, match=message):
            model.rank_examples(Dataset.from_dict({**good, **wrong}), k=3)
    with pytest.raises(ValueError, match="examples lack the column 'user_features' that the model's features need"):
        model.rank_examples(Dataset.from_dict(good).remove_columns("user_features"), k=3)
    with pytest.raises(ValueError, match="codes of another schema than the model"):
        fit_sequential(saved.data.train_sequences, item_ids=IDS, coded=ITEMS, hidden_size=8, use_cpu=True)


def test_evidence_is_fitted_on_what_ranking_reads(monkeypatch):
    """Features of the histories, and evidence about positive interactions only."""
    random, model = np.random.default_rng(3), make()
    columns = {name: [] for name in ("history", "history_positive", "user_features", "history_features", "session")}
    for user in range(20):
        history = random.permutation(12)[:5]
        columns["history"].append(history[:4].tolist())
        columns["history_positive"].append([True, False, True, user % 2 == 0])
        columns["user_features"].append([3 + user % 2])
        columns["history_features"].append(random.integers(3, 5, 4).tolist())
        columns["session"].append([int(history[4])])
    validation, read = Dataset.from_dict(columns), []
    encode, evidence = model.encode, ItemEvidence._from_lists

    def encoded(input_ids, feature_ids=None):
        read.append((input_ids, feature_ids))
        return encode(input_ids, feature_ids)

    def counted(self, history, *args):
        read.append((history,))
        return evidence(self, history, *args)

    monkeypatch.setattr(model, "encode", encoded)
    monkeypatch.setattr(ItemEvidence, "_from_lists", counted)
    add_evidence(model, [[1, 2, 3], [4, 5]], validation)
    fitted = read.copy()
    read.clear()
    model.rank_examples(validation, 3)
    (states, positive) = read
    assert fitted[0][1] is not None
    assert all(map(torch.equal, fitted[0], states))
    assert len(fitted) > 1
    assert all(torch.equal(about, *positive) for (about,) in fitted[1:])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A log with a column that says what comes next, another time's, and a model of it as `compare` saves one: with the options of its data."""
    folder, log = tmp_path_factory.mktemp("saved"), hinted()
    log["like"] = np.random.default_rng(5).integers(0, 4, len(log)) > 0
    options = {"positive": ["like>=1"], "interaction_features": ["hint", "time"], "history_feedback": "all"}
    people = pd.DataFrame({"user_id": range(70), "age": np.arange(70) + 0.5})
    options |= {"users": people, "user_features": ["age"], "min_item_interactions": 1, "session_length": 1}
    data = load_dataset(interactions=log, max_history=4, **options)
    model = fit_sequential(
        data.train_sequences, data.validation, item_ids=data.item_ids.tolist(), coded=data.features, hidden_size=16, max_history=4,
        num_train_epochs=3, learning_rate=0.01, feature_dim=8, evidence=True, use_cpu=True,
    )  # fmt: skip
    model.save_pretrained(folder)
    save_data_options(folder, data, exclude_seen=True)
    return SimpleNamespace(folder=folder, model=model, data=data, log=log, people=people)


def test_the_schema_is_saved_with_the_model(saved, tmp_path):
    loaded = SequentialRecommender.from_pretrained(saved.folder)
    assert loaded.schema == saved.data.features.schema
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / FEATURES_NAME).read_bytes() == (saved.folder / FEATURES_NAME).read_bytes()
    SequentialRecommender.from_items([1, 2], hidden_size=8).save_pretrained(tmp_path)
    assert not (tmp_path / FEATURES_NAME).exists()  # of the model that was there before


def test_a_saved_model_is_evaluated_on_new_tables_with_its_schema(saved):
    users = saved.people
    found = evaluate(model=str(saved.folder), interactions=saved.log, users=users, top_k=[5], baselines=False)
    ranked = saved.model.rank_examples(saved.data.test, 5)
    target = np.searchsorted(saved.data.item_ids, [session[0] for session in saved.data.test["session"]])
    assert found.metrics["sasrec/recall@5"] == close(float((ranked == target[:, None]).any(1).mean()))
    changed = evaluate(
        model=str(saved.folder), interactions=saved.log.assign(hint=0), users=users, top_k=[5], baselines=False
    )
    assert changed.metrics["sasrec/recall@5"] != found.metrics["sasrec/recall@5"]
    with pytest.raises(ValueError, match="pass --users, the table with these columns"):
        evaluate(model=str(saved.folder), interactions=saved.log)


def test_requests_are_answered_as_in_evaluation(saved):
    """Rows with codes, raw values, and in a batch: histories longer than the model reads, and interactions that were not positive."""
    recommender, schema, examples = recommender_of(saved.folder), saved.data.features.schema, saved.data.test
    ranked = saved.model.rank_examples(examples, 5)
    rows = [{name: row[name] for name in ("history", "user_features", "history_features")} for row in examples]
    answers = recommender.recommend([Request(**row, top_k=5) for row in rows])
    assert [[item for (item,) in answer.sessions] for answer in answers] == saved.data.item_ids[ranked].tolist()
    ages = saved.people.set_index("user_id").age.to_dict()
    raw = []
    for example in examples:
        own = saved.log[saved.log.user_id == example["user_id"]].head(len(example["history"]))
        entries = [
            {"item": row.item_id, "time": row.timestamp, "hint": row.hint, "positive": row.like}
            for row in own.itertuples()
        ]
        raw.append(Request(entries, user={"age": ages.get(example["user_id"])}, top_k=5))
    for coded, answer in zip(answers, recommender.recommend(raw), strict=True):
        assert (answer.sessions, answer.scores) == (coded.sessions, close(coded.scores))
    assert np.array_equal(answers[0].request.features.user, schema.encode_users([{"age": ages[0]}])[0])
    plain = recommender.recommend([Request(row["history"], top_k=5) for row in rows])
    assert [answer.sessions for answer in plain] != [answer.sessions for answer in answers]


def test_a_model_without_its_schema_is_refused(saved, tmp_path):
    shutil.copytree(saved.folder, tmp_path / "copy")
    (tmp_path / "copy" / FEATURES_NAME).unlink()
    for call in (
        lambda: load_recommender("--model", str(tmp_path / "copy"), lambda *_: None),
        lambda: load_sequential("--model", str(tmp_path / "copy")),
    ):
        with pytest.raises(ValueError, match=r"reads features, and features.safetensors is not beside its weights"):
            call()
    other = SequentialRecommender.from_items(IDS, coded=ITEMS, hidden_size=8)
    other.save_pretrained(tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / FEATURES_NAME, tmp_path / "copy" / FEATURES_NAME)
    with pytest.raises(ValueError, match="was saved with the catalogue"):
        SequentialRecommender.from_pretrained(tmp_path / "copy")
