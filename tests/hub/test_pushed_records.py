"""`push_to_hub` of what was trained: card, results, codebooks and titles come along, and say nothing about other weights."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoProcessor, pipeline

from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
from onerec_hf.hub_cards import write_reward_card
from onerec_hf.workflows import train
from tests.workflows.conftest import TINY, tables  # noqa: F401 (a fixture)

REPO = "tester/onerec-films"
RECORD = {
    *("README.md", "results.json", "data_options.json", "trained_on.json", "expert_load.png"),
    *("codebooks.safetensors", "item_encoder.safetensors", "semantic_ids.json", "semantic_ids.html"),
    *("training_report.html", "training_report.png", "items.parquet", "catalogue.safetensors"),
}


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):  # noqa: F811
    """A training's result; its folder is shared, and must not be changed."""
    return train(**tables, **TINY, output_dir=str(tmp_path_factory.mktemp("trained") / "films"))


def load(repo, **kwargs):
    return AutoModelForSeq2SeqLM.from_pretrained(repo, **kwargs), AutoProcessor.from_pretrained(repo, **kwargs)


def check_repository(hub, folder, repo=REPO):
    """The repository holds the record of the folder, and its card names the repository."""
    assert set(hub.files(repo)) >= RECORD
    pushed = snapshot_download(repo)
    for name in RECORD - {"README.md"}:
        with open(f"{pushed}/{name}", "rb") as ours, open(folder / name, "rb") as theirs:
            assert ours.read() == theirs.read(), name
    card, own = ModelCard.load(repo), ModelCard.load(folder / "README.md")
    assert "## Evaluation" in card.text
    assert f"from_pretrained({repo!r})" in card.text
    assert str(folder) not in card.text.split("## The run")[0]
    assert card.text.split("## Semantic IDs")[1].strip() == own.text.split("## Semantic IDs")[1].strip()
    assert card.data.model_name == repo.split("/")[1]
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {
        one.metric_type: one.metric_value for one in own.data.eval_results
    }


@pytest.mark.parametrize("order", ["model first", "processor first"])
def test_a_trained_model_keeps_its_record(hub, trained, order):
    pair = [trained.model, trained.processor]
    for one in pair if order == "model first" else pair[::-1]:
        one.push_to_hub(REPO)
    check_repository(hub, trained.folder)


def test_a_loaded_model_keeps_its_record(hub, trained):
    model, processor = load(str(trained.folder))
    model.push_to_hub(REPO, tags=["films"])
    assert "films" in ModelCard.load(REPO).data.tags
    before = hub.text(REPO, "README.md")
    processor.push_to_hub(REPO)
    assert hub.text(REPO, "README.md") == before
    check_repository(hub, trained.folder)
    model, processor = load(REPO)  # and from one repository into another
    for one in (model, processor):
        one.push_to_hub("tester/copy")
    check_repository(hub, trained.folder, "tester/copy")
    best = pipeline("generative-recommendation", model="tester/copy", device="cpu")(processor.catalogue.ids([0, 1]))
    assert all(each["title"] for each in best)


def test_the_model_alone_keeps_titles(hub, trained):
    load(str(trained.folder))[0].push_to_hub(REPO)
    check_repository(hub, trained.folder)


@pytest.mark.parametrize("options", [{"max_shard_size": "20KB"}, {"dtype": torch.bfloat16}])
def test_the_same_weights_in_other_files(hub, trained, options):
    dtype = {"dtype": options.pop("dtype")} if "dtype" in options else {}
    load(str(trained.folder), **dtype)[0].push_to_hub(REPO, **options)
    assert "## Evaluation" in hub.text(REPO, "README.md")
    assert "results.json" in hub.files(REPO)


def test_results_of_other_weights_are_not_pushed(hub, trained):
    """A model that was trained further since is not what the card was measured on; its semantic IDs are the same."""
    model, processor = load(str(trained.folder))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    for one in (model, processor):
        one.push_to_hub(REPO)
    assert "## Evaluation" not in hub.text(REPO, "README.md")
    assert "results were not recorded" in hub.text(REPO, "README.md")
    files = set(hub.files(REPO))
    assert not files & {"results.json", "trained_on.json", "expert_load.png"}
    assert files >= {"codebooks.safetensors", "semantic_ids.json", "items.parquet"}


def test_the_next_training_replaces_the_card_of_the_last_and_no_other(hub, trained):
    model, _ = load(str(trained.folder))
    model.push_to_hub(REPO)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.push_to_hub(REPO)
    assert "## Evaluation" not in hub.text(REPO, "README.md")
    ModelCard("---\nlicense: mit\n---\n\n# Films\n\nMine.\n").push_to_hub(REPO)
    load(str(trained.folder))[0].push_to_hub(REPO)
    assert ModelCard.load(REPO).text.strip() == "# Films\n\nMine."


def test_saving_in_place_with_push_keeps_the_folders_card(hub, trained, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(trained.folder, folder)
    model, processor = load(str(folder))
    for one in (model, processor):
        one.save_pretrained(folder, push_to_hub=True, repo_id=REPO)
    check_repository(hub, trained.folder)
    assert "## Evaluation" in (folder / "README.md").read_text(encoding="utf-8")
    assert json.loads((folder / "results.json").read_text())["rows"] == trained.rows


def test_a_folder_that_is_gone_leaves_the_plain_card(hub, trained, tmp_path):
    folder = tmp_path / "films"
    shutil.copytree(trained.folder, folder)
    model, _ = load(str(folder))
    shutil.rmtree(folder)
    model.push_to_hub(REPO)
    assert "results were not recorded" in hub.text(REPO, "README.md")


def test_a_reward_model_keeps_its_card(hub, tmp_path):
    config = OneRecRewardConfig(
        num_items=3, objectives=["vtr"], base_rates=[0.3], hidden_size=8, num_attention_heads=2
    )
    model = OneRecForSessionReward(config)
    model.set_items(RewardItems(["a", "b", "c"]))
    model.save_pretrained(tmp_path / "judge")
    write_reward_card(tmp_path / "judge", model, "Ten impressions of three items.")
    (tmp_path / "judge" / "results.json").write_text("{}")
    AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "judge")).push_to_hub("tester/reward")
    assert "Ten impressions of three items." in hub.text("tester/reward", "README.md")
    assert hub.text("tester/reward", "results.json") == "{}"
    assert "from_pretrained('tester/reward')" in hub.text("tester/reward", "README.md")
