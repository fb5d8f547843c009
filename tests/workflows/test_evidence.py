"""Evidence of the item head in a workflow: counts of training rows only, weights of validation users, content of the items table."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
from onerec_hf.data.evidence_counts import count_evidence
from onerec_hf.modeling.item_evidence import DEFAULT_WEIGHTS, LISTS
from onerec_hf.modeling.requests import Recommender
from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
from onerec_hf.trainers.watching import recommended_sessions
from onerec_hf.workflows import evaluate, load_dataset, load_model, load_processor, train
from onerec_hf.workflows.artefact import new_model
from onerec_hf.workflows.compare.ranking import requests_of
from onerec_hf.workflows.evidence import (
    candidate_features,
    content_of_catalogue,
    content_vectors,
    fit_evidence,
    rows_of_items,
)
from onerec_hf.workflows.semantic_ids import fit_catalogue
from onerec_hf.workflows.settings import ModelSettings, SemanticIDSettings
from tests.modeling.test_lifelong import HISTORIES, ITEMS, made
from tests.modeling.test_lifelong import TINY as LIFELONG_TINY
from tests.rounding import assert_close
from tests.workflows.conftest import TINY

HEAD = {"item_head": True, "item_head_content": True, "item_head_evidence": True, "item_head_codes": True}
RANKED = {"item_score_weight": 1.0, "decoder_weight": 0.0}


def untrained(dataset):
    """A model with evidence that nothing has filled, and its processor."""
    from onerec_hf import OneRecProcessor

    fitted = fit_catalogue(dataset, SemanticIDSettings(codebook_sizes=[8, 8, 8]))
    processor = OneRecProcessor.from_catalogue(fitted.catalogue, max_history=8)
    sizes = {name: value for name, value in TINY.items() if name in ModelSettings.__dataclass_fields__}
    settings = ModelSettings(**sizes, **HEAD)
    return new_model(settings, processor, 5, content_of_catalogue(dataset, processor).vectors), processor


def pairs(model, name):
    """What the lists hold: (row, neighbour) to count."""
    items, counts = model.get_encoder().item_head.evidence.list_of(name)
    return {
        (row, int(item)): float(count)
        for row, (of_row, values) in enumerate(zip(items, counts, strict=True))
        for item, count in zip(of_row, values, strict=True)
        if item
    }


def test_counts_are_of_training_rows_only(tables):
    """The lists equal a count of the training sequences by hand."""
    dataset = load_dataset(**tables)
    model, processor = untrained(dataset)
    fit_evidence(model, processor, dataset)
    head = model.get_encoder().item_head
    expected = {name: {} for name in LISTS}
    sequences = dataset.train_sequences
    rows = np.split(rows_of_items(model, processor.catalogue.indices(sequences.item_ids)), sequences.offsets[1:-1])
    for row in rows:
        for first, second in pairwise(row):
            expected["next"][first, second] = expected["next"].get((first, second), 0) + 1
            expected["before"][second, first] = expected["before"].get((second, first), 0) + 1
    for name in ("next", "before"):
        assert pairs(model, name) == expected[name]
    counted = np.bincount(np.concatenate(rows), minlength=len(head.keys) + 1)
    assert head.evidence.interactions.tolist() == counted.tolist()


def test_a_planted_validation_pair_leaves_no_trace(tables):
    """A user whose held-out items follow each other nowhere else: the same counts as without these two items."""
    interactions = tables["interactions"]
    known = set(zip(interactions["item_id"], interactions.groupby("user_id")["item_id"].shift(-1), strict=True))
    items = sorted(interactions["item_id"].unique())
    first, second, third = next(
        (a, b, c) for a in items for b in items for c in items if len({a, b, c}) == 3 and not {(a, b), (b, c)} & known
    )
    planted = interactions.iloc[:4].assign(user_id="planted", item_id=[items[0], first, second, third])
    dataset = load_dataset(interactions=pd.concat([interactions, planted]), items=tables["items"])
    assert [second] in dataset.validation["session"]
    assert [third] in dataset.test["session"]
    model, processor = untrained(dataset)
    fit_evidence(model, processor, dataset)
    a, b, c = rows_of_items(model, processor.catalogue.indices([first, second, third])).tolist()
    for name in ("next", "before"):
        assert not {(a, b), (b, a), (b, c), (c, b)} & set(pairs(model, name))


def test_long_lists_keep_the_strongest_neighbours(tables):
    dataset = load_dataset(**tables)
    model, processor = untrained(dataset)
    evidence = model.get_encoder().item_head.evidence
    rows = rows_of_items(model, processor.catalogue.indices(dataset.train_sequences.item_ids))
    count_evidence(evidence, (rows - 1, dataset.train_sequences.offsets))
    degree = (evidence.interactions + 1).rsqrt()
    strength = evidence.near_counts * degree[evidence.near_items.long()]
    strength = torch.where(evidence.near_items > 0, strength, 0.0)
    assert (strength[:, :-1] >= strength[:, 1:] - 1e-6 * strength[:, :1]).all()


def test_train_evaluates_and_saves_it(tables, tmp_path):
    dataset = load_dataset(**tables)
    result = train(dataset, output_dir=tmp_path / "model", **TINY, **HEAD, **RANKED)
    model = load_model("--model", str(tmp_path / "model"))
    head = model.get_encoder().item_head
    assert head.evidence.interactions.sum() == len(dataset.train_sequences.item_ids)
    assert head.content.any()
    assert model.generation_config.decoder_weight == 0
    again = evaluate(dataset, model=str(tmp_path / "model")).metrics
    assert again == {name: value for name, value in result.metrics.items() if name in again}
    processor = load_processor("--model", str(tmp_path / "model"))
    histories = dataset.test[:5]["history"]
    options = {"num_beams": 5, "num_return_sequences": 5, "session_length": 1}
    assert torch.equal(
        model.recommend(**processor(histories), **options),
        result.model.eval().recommend(**processor(histories), **options),
    )


def test_without_validation_users_the_default_weights_stay(tables):
    dataset = load_dataset(**tables)
    model, processor = untrained(dataset)
    nobody = dataset.validation.select([])
    object.__setattr__(dataset, "split", type(dataset.split)(**{**vars(dataset.split), "validation": nobody}))
    assert list(fit_evidence(model, processor, dataset).values()) == pytest.approx(DEFAULT_WEIGHTS)


@pytest.mark.parametrize("dim", [4, 64])
def test_content_vectors_keep_inner_products(tables, dim):
    """More dimensions than given change nothing; fewer keep the largest part, and lengths stay 1."""
    random = np.random.default_rng(0)
    items = tables["items"]
    low_rank = random.normal(size=(len(items), 3)) @ random.normal(size=(3, 16))
    dataset = load_dataset(**tables, embeddings=low_rank.astype(np.float32))
    found = content_vectors(dataset, dim).vectors
    given = dataset.items.select(dataset.item_ids).embeddings
    given = given / np.linalg.norm(given, axis=1, keepdims=True)
    assert found.shape == (len(dataset.item_ids), min(dim, 16))
    assert_close(torch.tensor(found @ found.T), torch.tensor(given @ given.T))


def test_items_without_content_are_said(tables, capsys, tmp_path):
    dataset = load_dataset(interactions=tables["interactions"])
    train(dataset, output_dir=tmp_path / "model", **TINY, **HEAD, **RANKED)
    said = capsys.readouterr().err
    assert "the item head has no content vectors" in said
    (weights,) = [line for line in said.splitlines() if line.startswith("evidence weights: head")]
    assert "before" in weights
    assert "content" not in weights  # none was fitted
    assert load_model("--model", str(tmp_path / "model")).config.item_head.content_dim == 0


def test_weights_are_fitted_with_a_lifelong_pathway():
    """Candidates are scored by the states of whole histories."""
    _, processor = made()
    torch.manual_seed(0)
    head = {"num_items": ITEMS, "loss_weight": 1.0, "evidence": True, "neighbours": 4}
    model = OneRecForConditionalGeneration(
        OneRecConfig(**LIFELONG_TINY, lifelong={"items": 3, "queries": 8}, item_head=head)
    )
    model.set_catalogue(processor.catalogue)
    features = []
    for history in (HISTORIES[0], [39, 38, *HISTORIES[0][2:]]):
        users = Dataset.from_dict({"history": [history], "session": [[9]]})
        found, rows, targets = candidate_features(model, processor, users, exclude_seen=False)
        assert found.isfinite().all()
        assert int(targets[0]) in rows[0].tolist()
        features.append(found[0, rows[0].argsort()])
    assert not torch.equal(*features)


def test_what_is_asked_for_lately(tables, tmp_path):
    """
    In the last days everybody takes one of five items. The model finds and saves that, goes on with the weights of another one, and forgets it in data
    without times.
    """
    draw = np.random.default_rng(0)
    days = {u: 10 + draw.permutation(200)[:4] for u in range(120)}
    rows = [(f"n{u}", f"m{draw.integers(35)}", day) for u in range(120) for day in days[u]]
    rows += [(f"n{u}", f"m{35 + draw.integers(5)}", 1000 + draw.integers(50)) for u in range(120) for _ in range(3)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).drop_duplicates(["user_id", "item_id"])
    items = pd.DataFrame({"item_id": [f"m{i}" for i in range(40)], "title": [f"word{i % 9}" for i in range(40)]})
    dataset = load_dataset(interactions=log, items=items, min_item_interactions=1)
    model, processor = untrained(dataset)
    found = fit_evidence(model, processor, dataset)
    head = model.get_encoder().item_head
    assert found["recent"] > 0.2
    assert fit_evidence(model, processor, dataset) == found  # whatever was fitted before
    train = dataset.train_sequences
    rows_of = rows_of_items(model, processor.catalogue.indices(train.item_ids))
    order = np.argsort(train.timestamps, kind="stable")
    assert head.evidence.log_items.tolist() == rows_of[order].tolist()
    assert head.evidence.log_times.tolist() == train.timestamps[order].tolist()
    model.save_pretrained(tmp_path)
    again = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.get_encoder().item_head.evidence.log_items, head.evidence.log_items)
    # Evaluations know when the held-out users came: within half a year of random items, or in the last days.
    model.generation_config.item_score_weight, model.generation_config.decoder_weight = 1.0, 0.0
    args = OneRecTrainingArguments(str(tmp_path / "scratch"), eval_top_k=[5], report_to="none", use_cpu=True)
    trainer, users = OneRecTrainer(model, args, processing_class=processor), dataset.validation
    ranked = [
        trainer.predict(some).predictions
        for some in (
            users,
            users.remove_columns("request_time"),
            users.remove_columns("request_time").add_column("request_time", [5] * len(users)),
        )
    ]
    late = processor.catalogue.indices([f"m{i}" for i in range(35, 40)])
    when, now, long_ago = (np.isin(items, late).mean() for items in ranked)
    assert min(when, now) > 2 * long_ago
    sessions = recommended_sessions(model, processor, users.to_list(), session_length=1)
    assert (np.isin(processor.catalogue.indices([session[0] for session in sessions]), late).mean()) > 2 * long_ago
    whole = concatenate_datasets([dataset.train, users])  # rows without a time are of now
    trainer.train_dataset = whole
    assert trainer.get_train_dataloader().collate_fn(whole.to_list()[-2:])["input_ids"].shape[0] == 2
    asked = requests_of(Recommender(model, processor), users, exclude_seen=True)
    assert [request.request_time for request in asked] == list(users["request_time"])
    other, _ = untrained(dataset)
    assert fit_evidence(other, processor, dataset, weights_of=model) == found
    assert torch.equal(other.get_encoder().item_head.evidence.log_items, head.evidence.log_items)
    places = {
        "interactions": log.sort_values("timestamp").drop(columns="timestamp"),
        "items": items,
        "timestamp_column": "none",
    }
    assert "recent" not in fit_evidence(model, processor, load_dataset(**places))
    assert not model.config.item_head.recent
