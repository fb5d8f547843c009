"""The reward model's card: the snippet runs, objectives and metrics are the model's and the rows'."""

import pytest
import torch
from huggingface_hub import ModelCard

from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
from onerec_hf.evaluation.results import result_row
from onerec_hf.hub_cards import write_reward_card
from onerec_hf.hub_cards.common import plain_text
from tests.hub_cards.reading import HOSTILE, headings, run_snippet, section, table_of


def make_reward(objectives=("vtr", "ltr"), ids=("a", "b", "c"), **config):
    torch.manual_seed(0)
    settings = {"base_rates": [0.31, 0.02], "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = OneRecForSessionReward(
        OneRecRewardConfig(num_items=len(ids), objectives=list(objectives), **{**settings, **config})
    )
    model.set_items(RewardItems(list(ids)))
    return model.eval()


def rows(objectives=("vtr", "ltr")):
    found = [
        result_row(f"{model}/{objective}/{metric}", value + number / 100, "x")
        for objective in objectives
        for number, model in enumerate(("base_rate", "onerec_reward"))
        for metric, value in (
            ("auc", 0.5),
            ("calibration_error", 0.1),
            ("bias", float("nan")),
            ("relative_log_loss", 0.9),
        )
    ]
    return [*found, *(result_row(f"test/{objective}/positives", 1234, "sessions") for objective in objectives)]


@pytest.mark.parametrize("ids", [("a", "b", "c"), (7, 8), ("```\n", "'\"\\")])
def test_the_snippet_runs(tmp_path, ids):
    model = make_reward(ids=ids)
    model.save_pretrained(tmp_path / "judge")
    write_reward_card(tmp_path / "judge", model)
    scope = run_snippet((tmp_path / "judge" / "README.md").read_text(encoding="utf-8"))
    history, session = [ids[0]], list(ids[-2:])
    assert scope["rewards"] == model.reward([history], [session])
    assert torch.equal(scope["probabilities"], model.predict([history], [session]))


def test_the_numbers_are_the_models_and_the_rows(tmp_path):
    model = make_reward(score_weights={"vtr": 1.0, "ltr": 0.5}, max_history=12)
    write_reward_card(tmp_path, model, "80 windows of training.", rows(), "shop")
    card = ModelCard.load(tmp_path / "README.md")
    assert table_of(section(card.content, "Objectives"))[2:] == [
        "| vtr | 0.31 | 1 | 1,234 |",
        "| ltr | 0.02 | 0.5 | 1,234 |",
    ]
    assert table_of(section(card.content, "Evaluation"))[2:4] == [
        "| vtr | base\\_rate | 0.5000 | - | 0.1000 | - | 0.9000 |",
        "| vtr | onerec\\_reward | 0.5100 | - | 0.1100 | - | 0.9100 |",
    ]
    described = section(card.content, "Model")
    assert f"{model.num_parameters():,} parameters" in described
    assert "the latest 12 items of a history" in described
    assert f"3 items (hash `{model.items.hash[:16]}`), no item features." in described
    assert "80 windows of training." in section(card.content, "Data")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["vtr auc"] == 0.51
    assert "vtr bias" not in found  # nothing to measure is no number
    assert {result.dataset_name for result in card.data.eval_results} == {"shop"}


def test_without_rows_it_claims_nothing(tmp_path):
    write_reward_card(tmp_path, make_reward(score_fusion="probability"))
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Evaluation" not in card.content
    assert card.data.eval_results is None
    assert "Not recorded" in card.content
    assert "weighted mean of the predicted rates" in card.content
    write_reward_card(tmp_path, make_reward(score_fusion="p_score"))
    assert "The reward is the P-Score" in ModelCard.load(tmp_path / "README.md").content


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_only_names(tmp_path, name):
    objectives = (name, "ltr")
    write_reward_card(
        tmp_path, make_reward(objectives), f"Read from {name}.", rows(objectives), name, repo_id="me/judge"
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert headings(card.text) == ["# judge", "## Objectives", "## Model", "## Data", "## Evaluation", "## Limits"]
    assert {result.dataset_name for result in card.data.eval_results} == {name}
    assert f"| {plain_text(name)} | 0.31 | 1 |" in card.content
    assert f"Read from {plain_text(name)}." in card.content
