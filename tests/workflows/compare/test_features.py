"""A comparison on tables with features: which families read them, that the winners serve and evaluate with them, and that other features are another comparison."""

import json

import numpy as np
import pandas as pd
import pytest

from onerec_hf.evaluation.metrics import ndcg_at_k
from onerec_hf.modeling.requests import Request
from onerec_hf.serving import ServedModel, ServingSettings
from onerec_hf.serving.schema import Query
from onerec_hf.workflows import DataSettings, evaluate
from onerec_hf.workflows.artefact import recommender_of
from onerec_hf.workflows.compare import compare_models
from onerec_hf.workflows.compare.ranking import targets
from onerec_hf.workflows.data_options import excludes_seen
from onerec_hf.workflows.loading import load_in_memory
from tests.rounding import close

pytestmark = pytest.mark.slow  # each run of a family is a process

FAMILIES = {
    "item_knn": "title: Item-kNN\nkind: ranking\nsettings: {model: item_knn}\n",
    "sasrec": "title: SASRec\nkind: sequential\nsettings: {architecture: sasrec, hidden_size: 16, num_train_epochs: 2, learning_rate: 0.01, feature_dim: 4, use_cpu: true}\n",
    "onerec": (
        "title: OneRec\nkind: onerec\ndata: {session_length: 1}\nsettings: {preset: paper, codebook_sizes: auto, hidden_size: 16, encoder_layers: 1, "
        "decoder_layers: 1, num_experts: 1, num_attention_heads: 2, feature_dim: 4, learning_rate: 0.01, max_steps: 5, eval_strategy: steps, "
        "eval_steps: 5, save_strategy: steps, save_steps: 5, use_cpu: true, embedding: behaviour}\n"
    ),
}


def tables(folder, users=40, length=9):
    """Interactions, some of which are not positive, and the ages of most users."""
    random = np.random.default_rng(0)
    log = pd.DataFrame(
        {
            "user_id": np.repeat(np.arange(users), length),
            "item_id": random.integers(0, 20, users * length),
            "timestamp": np.tile(np.arange(length), users) * 7200 + 10**9,
            "like": (random.random(users * length) < 0.8).astype(int),
            "page": random.integers(0, 3, users * length),
        }
    )
    log.to_csv(folder / "log.csv", index=False)
    pd.DataFrame({"user_id": range(users - 5), "age": np.arange(users - 5) % 7}).to_csv(
        folder / "users.csv", index=False
    )
    return DataSettings(
        interactions=str(folder / "log.csv"), users=str(folder / "users.csv"), user_features=["age"], interaction_features=["page", "time"],
        positive=["like>=1"], history_feedback="all", min_item_interactions=1, max_history=6,
    )  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    (folder / "spaces").mkdir()
    for name, text in FAMILIES.items():
        (folder / "spaces" / f"{name}.yaml").write_text(text)
    data = tables(folder)
    options = {"output_dir": str(folder / "out"), "spaces": str(folder / "spaces"), "trials": 1, "seeds": [0]}
    return compare_models(data, **options), data, options


@pytest.mark.parametrize("name", FAMILIES)
def test_winners_evaluate_and_answer_as_the_report_says(compared, name):
    found, settings, _ = compared
    data = load_in_memory(settings)
    (folder,) = (found.folder / "models").glob(f"{name}-*")
    recommender = recommender_of(folder)
    reported = found.metrics[f"{name}/ndcg@10"]
    again = evaluate(settings, model=str(folder), baselines=name == "item_knn").metrics
    assert again[f"{name}/ndcg@10"] == close(reported)
    if name == "item_knn":
        assert recommender.schema is None
        plain = evaluate(interactions=settings.interactions, model=str(folder)).metrics  # no users are needed
        assert plain[f"{name}/ndcg@10"] == close(reported)
        return
    assert recommender.schema == data.features.schema
    rows = [{name: row[name] for name in ("history", "user_features", "history_features")} for row in data.test]
    ranked = np.full((len(rows), 10), -1)
    how = {"exclude_seen": excludes_seen("--model", str(folder))}
    for user, answer in enumerate(recommender.recommend([Request(**row, **how) for row in rows])):
        ranked[user, : len(answer.sessions)] = np.searchsorted(data.item_ids, np.ravel(answer.sessions))
    assert float(np.mean(ndcg_at_k(ranked, targets(data.test, data), 10))) == close(reported)
    run = json.loads(next((found.folder / "runs").glob(f"{name}-best-*.json")).read_text())
    assert not any(key.startswith("feature_worth") for key in run["metrics"])
    config = json.loads((folder / "config.json").read_text())["features"]
    assert (config["dim"], config["dropout"]) == (4, 0.2)


@pytest.mark.parametrize("name", ["sasrec", "onerec"])
def test_the_server_reads_values(compared, name):
    (folder,) = (compared[0].folder / "models").glob(f"{name}-*")
    served = ServedModel.load(str(folder), load_recommender=recommender_of)
    scores = []
    for like, age in ((True, 1), (True, 5), (False, 1)):
        query = Query(history=[3, {"item": 5, "page": 2, "positive": like}], user={"age": age}, top_k=20)
        key, row = served.prepare(query, "history", ServingSettings(), unknown="skip")
        (answer,) = served.answer(key, [row])
        assert (5 in answer["items"]) != like  # what was not positive may be recommended
        scores.append(answer["scores"])
    assert scores[0] != scores[1]
    served.close()


def test_other_features_are_another_comparison(compared):
    found, settings, options = compared
    assert "read the features" in (found.folder / "report.md").read_text()
    users = pd.read_csv(settings.users)
    users.assign(age=users.age + 1).to_csv(settings.users, index=False)
    with pytest.raises(ValueError, match="another fingerprint"):
        compare_models(settings, **options)
    users.to_csv(settings.users, index=False)
