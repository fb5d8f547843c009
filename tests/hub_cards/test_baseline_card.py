"""The card of a sequence model: its snippet runs, its numbers are the run's, and names in the data cannot become markup."""

import pytest
import torch
from huggingface_hub import ModelCard

from onerec_hf.baselines import SequentialConfig, SequentialRecommender
from onerec_hf.hub_cards import write_baseline_card
from tests.hub_cards.reading import HOSTILE, headings, run_snippet, section, table_of


def make(item_ids=("a", "b", "c", "d"), **config) -> SequentialRecommender:
    torch.manual_seed(0)
    return SequentialRecommender.from_items(list(item_ids), hidden_size=8, **config).eval()


@pytest.mark.parametrize("architecture", ["sasrec", "hstu", "gru4rec", "acvae"])
def test_the_snippet_runs(architecture, tmp_path):
    model = make(architecture=architecture)
    model.save_pretrained(tmp_path)
    write_baseline_card(tmp_path, model)
    card = (tmp_path / "README.md").read_text()
    assert run_snippet(card)["recommended"] == model.recommend([["a", "b", "c"]], top_k=10)
    assert "Not recorded." in section(card, "Data")
    assert f"| parameters | {model.num_parameters():,} |" in section(card, "Model")


def test_rows_become_a_table_and_the_model_index(tmp_path):
    rows = [{"name": f"{name}/ndcg@10", "value": value} for name, value in (("sasrec", 0.12345), ("popularity", 0.05))]
    write_baseline_card(tmp_path, make(), "Nine users.", rows, dataset="movielens", metadata={"license": "mit"})
    card = ModelCard.load(tmp_path / "README.md")
    assert table_of(section(card.content, "Evaluation"))[2:] == ["| sasrec | 0.1235 |", "| popularity | 0.0500 |"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("ndcg@10", 0.1235, "movielens")
    assert card.data.license == "mit"
    assert "Nine users." in section(card.content, "Data")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_in_the_data_cannot_become_markup(hostile, tmp_path):
    model = make(item_ids=(hostile, "b", "c"))
    model.save_pretrained(tmp_path)
    write_baseline_card(tmp_path, model, f"Of {hostile}.", [{"name": f"{hostile}/ndcg@10", "value": 0.1}])
    card = (tmp_path / "README.md").read_text()
    assert run_snippet(card)["recommended"] == model.recommend([[hostile, "b", "c"]], top_k=10)
    wanted = ["# " + tmp_path.name.replace("_", "\\_"), "## Model", "## Data", "## Evaluation", "## Limits"]
    assert headings(card.split("```")[0] + card.split("```")[-1]) == wanted
    assert "<script>" not in card.split("```")[-1]


def test_a_model_without_ids_has_no_card(tmp_path):
    with pytest.raises(ValueError, match="the model has no item ids"):
        write_baseline_card(tmp_path, SequentialRecommender(SequentialConfig(num_items=2)))
