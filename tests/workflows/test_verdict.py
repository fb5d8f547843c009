"""The verdict: what the numbers say, what they cannot say, what to try, and the training that ends with it."""

import json
import shlex
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import onerec_hf.workflows.pace
from onerec_hf.cli.arguments import parse_given
from onerec_hf.evaluation import ndcg_at_k
from onerec_hf.trainers import Budget, OneRecTrainer, OneRecTrainingArguments
from onerec_hf.workflows import (
    DataSettings,
    ModelSettings,
    SemanticIDSettings,
    ShardingSettings,
    TrainSettings,
    load_dataset,
    train,
)
from onerec_hf.workflows.advice import _longer, what_to_try
from onerec_hf.workflows.evaluation import item_indices, rank_beside_baselines
from onerec_hf.workflows.pace import Pace
from onerec_hf.workflows.small_sasrec import fit_small_sasrec
from onerec_hf.workflows.verdict import Difference, Verdict
from tests.cli.commands import onerec, refused
from tests.workflows.conftest import TINY

RANDOM = np.random.default_rng(0)


def shifted(shift, users=400):
    """Gains of a baseline, and those of a model that are `shift` above them with a spread of .1."""
    baseline = RANDOM.uniform(0, 1, users)
    return baseline + RANDOM.normal(shift, 0.1, users), baseline


@pytest.mark.parametrize(("shift", "outcome"), [(0.1, "better"), (-0.1, "worse"), (0.0, "open")])
def test_two_standard_errors_decide(shift, outcome):
    """Paired: the spread of the users is ten times that of the differences."""
    gap = Difference.of(*shifted(shift))
    assert gap.outcome == outcome
    assert gap.mean == pytest.approx(shift, abs=4 * 0.1 / 20)
    assert gap.error == pytest.approx(0.1 / 20, rel=0.2)


@pytest.mark.parametrize("users", [1, 2, 29])
def test_few_users_allow_no_conclusion(users):
    gains = {"onerec": np.zeros(users), "item_knn": np.ones(users), "popularity": np.ones(users)}
    verdict = Verdict.on(gains, "onerec", "NDCG@10", advice=[("why", "command")])
    assert {gap.outcome for gap in verdict.differences.values()} == {"open"}
    assert f"on {users} test users. So few users allow no conclusion; the differences from item-kNN (-1.0000" in str(
        verdict
    )
    assert verdict.advice
    assert json.loads(json.dumps(verdict.as_json(), allow_nan=False))["item_knn"]["users"] == users


def test_the_words():
    base = RANDOM.uniform(0, 1, 400)
    noise = RANDOM.normal(0, 0.1, 400)
    noise -= noise.mean()
    noise *= 0.1 / noise.std(ddof=1)
    gains = {
        "onerec": base,
        "popularity": base - 0.2 - noise,
        "item_knn": base + 0.1 - noise,
        "sasrec": base + 0.001 - noise,
    }
    verdict = Verdict.on(gains, "onerec", "NDCG@10", ["A note."], [("more time", "onerec-hf train")])
    assert str(verdict) == (
        f"NDCG@10 of OneRec is {base.mean():.4f} on 400 test users. It is better than popularity (+0.2000 ± 0.0050, standard error over the "
        "users). It is worse than item-kNN (-0.1000 ± 0.0050). The difference from SASRec (-0.0010 ± 0.0050) is within two standard errors: "
        "400 users do not tell which is better. A note.\nTo try:\n- more time:\n  onerec-hf train"
    )
    del gains["item_knn"], gains["sasrec"]
    assert not Verdict.on(gains, "onerec", "NDCG@10", advice=[("more time", "onerec-hf train")]).advice


@pytest.fixture(scope="module")
def dataset(tables):
    return load_dataset(**tables)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A training with the SASRec, which has a second."""
    folder = tmp_path_factory.mktemp("verdict") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onerec_hf.workflows.pace, "LEAST_SECONDS", 1.0)
        result = train(dataset, output_dir=folder, **{**TINY, "verdict_sasrec": True})
    return result


def test_a_training_ends_with_it(trained, dataset):
    results = json.loads((trained.folder / "results.json").read_text())
    assert results["verdict"] == str(trained.verdict)
    assert results["differences"].keys() == {"popularity", "item_knn", "sasrec"}
    rows = {row["name"]: row["value"] for row in results["rows"]}
    assert rows.keys() >= {"sasrec/recall@10", "sasrec/ndcg@5", "sasrec/coverage@10"}
    for name, gap in results["differences"].items():
        assert gap["mean"] == pytest.approx(rows["onerec/ndcg@10"] - rows[f"{name}/ndcg@10"], abs=1e-9)
        assert gap["users"] == len(dataset.test)
    assert "The SASRec has width 64 and was trained for" in results["verdict"]
    card = (trained.folder / "README.md").read_text()
    assert "NDCG@10 of OneRec is" in card
    assert "| sasrec |" in card


def test_a_sasrec_that_ran_out_of_time_is_not_called_trained(trained, dataset):
    trainer = trained.trainer
    args, catalogue = trainer.args, trainer.processing_class.catalogue
    note = fit_small_sasrec(dataset, catalogue, args, seconds=0).note
    assert note.endswith("until its share of the run's time was over: a longer training may be better.")


def test_rankings_are_in_the_order_of_the_users(trained, dataset):
    """Whatever order the trainer evaluates them in; the standard error is that of paired differences."""
    trainer = trained.trainer
    wanted, relevant = item_indices(dataset.test, trainer.processing_class.catalogue)
    for strategy in ("random", "group_by_length"):
        trainer.args.train_sampling_strategy = strategy
        ranking = rank_beside_baselines(trainer, dataset, "test")
        assert trainer.args.train_sampling_strategy == strategy
        assert ranking.relevant.tolist() == relevant.tolist()
        for ranked, history in zip(ranking.ranked["onerec"], wanted, strict=True):
            assert not set(ranked) & set(history)
        mine, theirs = (ndcg_at_k(ranking.ranked[name], relevant, 10, per_row=True) for name in ("onerec", "item_knn"))
        gap = trained.verdict.differences["item_knn"]
        assert gap.error == pytest.approx((mine - theirs).std(ddof=1) / len(relevant) ** 0.5)


def test_without_baselines_there_is_none(dataset, tmp_path):
    result = train(dataset, output_dir=tmp_path / "out", **TINY, baselines=False)
    assert result.verdict is None
    assert "verdict" not in json.loads((tmp_path / "out" / "results.json").read_text())


def test_commands_to_try_are_commands(trained):
    command = "onerec-hf train --interactions 'my clicks.csv' --max_steps 3 --overwrite --output_dir mine"
    tries = dict(what_to_try(trained.trainer, Path("mine"), command, {"interactions": "my clicks.csv", "stride": 2}))
    kinds = (DataSettings, SemanticIDSettings, ModelSettings, ShardingSettings, TrainSettings, OneRecTrainingArguments)
    *trainings, comparison = map(shlex.split, tries.values())
    longer, head = (parse_given(kinds, words[2:], "train") for words in trainings)
    assert longer == {"interactions": "my clicks.csv", "max_steps": 6, "output_dir": "mine-2"}
    assert (head["item_head"], head["max_steps"], "overwrite" in head) == (True, 3, False)
    assert comparison[:2] == ["onerec-hf", "compare"]
    assert parse_given((DataSettings, TrainSettings, OneRecTrainingArguments), comparison[2:], "compare") == {
        "interactions": "my clicks.csv",
        "stride": 2,
        "output_dir": "mine-comparison",
    }
    assert "longer training: it read each training example 0.088 times" in tries
    budget = what_to_try(trained.trainer, Path("mine"), f"{command} --budget 1h30m-cpu", fixed_sizes=True)
    assert [words.split("--budget ")[1] for _, words in budget] == ["3h-cpu --output_dir mine-2"]


@pytest.mark.parametrize(
    ("given", "longer"),
    [
        (["--budget", " 10m"], {"budget": "20m"}),
        (["--budget=2h-cpu"], {"budget": "4h-cpu"}),
        (["--interactions", "my --budget log.csv"], {"num_train_epochs": 6}),
    ],
)
def test_a_budget_is_a_word_of_the_command(given, longer):
    trainer: Any = SimpleNamespace(args=SimpleNamespace(max_steps=-1, num_train_epochs=3))
    assert _longer(trainer, shlex.join(["onerec-hf", "train", *given])) == longer
    assert _longer(trainer, None) == {"num_train_epochs": 6}  # a call from Python


def test_a_training_that_a_plateau_ended_was_long_enough(tmp_path, dataset):
    settings = {
        **TINY,
        "max_steps": 40,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.0,
        "eval_strategy": "steps",
    }
    settings |= {"eval_steps": 2, "metric_for_best_model": "ndcg@10", "decay_on_plateau": 1, "save_strategy": "steps"}
    trainer = train(dataset, output_dir=tmp_path / "out", save_steps=2, **settings).trainer
    assert trainer.state.global_step < 10
    trainer.state.best_global_step = max(entry["step"] for entry in trainer.state.log_history)
    assert not any("longer" in reason for reason, _ in what_to_try(trainer, Path("mine")))


def test_in_python_it_is_a_call(trained):
    (_, longer), (_, head) = what_to_try(trained.trainer, Path("mine"))
    assert longer == "train(..., max_steps=6, output_dir='mine-2')"
    assert head.startswith("train(..., item_head=True, ")


def test_a_sasrec_that_fails_loses_nothing(dataset, tmp_path, monkeypatch):
    def fails(*args):
        raise MemoryError("too large")

    monkeypatch.setattr("onerec_hf.workflows.conclusion.fit_small_sasrec", fails)
    result = train(dataset, output_dir=tmp_path / "out", **{**TINY, "verdict_sasrec": True})
    assert "No SASRec is beside it: its training failed (too large)." in result.verdict.sentences
    assert "item_knn" in result.verdict.differences


def test_the_sasrec_is_within_a_budget():
    """A fifth of it, less where less is left, by the clock of the budget."""
    budget = Budget.parse("100s-cpu").start()
    pace = Pace(budget, sasrec=True)
    assert pace.of_sasrec(50) == (20, time.process_time)
    budget.carry(90)
    assert pace.of_sasrec(50)[0] == pytest.approx(10, abs=1)
    budget.carry(200)
    assert pace.of_sasrec(50)[0] == 0
    assert Pace(budget).of_sasrec(50) is None
    assert Pace(sasrec=True).of_sasrec(100) == (25, time.perf_counter)
    assert Pace(sasrec=True).of_sasrec(1)[0] == 5


def test_weights_that_diverged(trained, dataset, files, tmp_path, monkeypatch):
    """Neither saved after a training nor evaluated."""
    step = OneRecTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            model.get_input_embeddings().weight.data[0] = torch.nan
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(OneRecTrainer, "training_step", training_step)
        with pytest.raises(
            FloatingPointError, match=r"weights are not finite, .*Train again with a lower --learning_rate"
        ):
            train(dataset, output_dir=tmp_path / "out", **TINY)
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    weights = load_file(trained.folder / "model.safetensors")
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    save_file(weights | {name: weights[name] * torch.nan}, trained.folder / "model.safetensors", {"format": "pt"})
    done = onerec("evaluate", "--model", trained.folder, "--interactions", files["interactions"])
    refused(done, "not finite", "diverged")
