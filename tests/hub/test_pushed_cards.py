"""What a repository says of itself after a push, over HTTP: true, complete, and nobody's own card overwritten."""

import json
import re

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments
from tests.conftest import make_catalogue, make_model
from tests.hub.hub_server import WRITE

REPO = "tester/onerec-movies"


def snippet(card):
    (code,) = re.findall(r"^```python\n(.*?)^```$", card.content, flags=re.S | re.M)
    scope = {}
    exec(code, scope)
    return scope


def facts(card):
    return json.loads(re.search(r"^```json\n(.*?)^```$", card.content, flags=re.S | re.M)[1])


def test_a_plain_push_says_what_the_config_says(hub, model, processor):
    model.push_to_hub(REPO, tags=["films"])
    card = ModelCard.load(REPO)
    assert "More Information Needed" not in card.content
    assert card.data.library_name == "transformers"
    assert set(card.data.tags) >= {"films", "onerec"}
    assert facts(card)["parameters"] == model.num_parameters()
    assert facts(card)["codebook_sizes"] == [4, 5, 6]
    assert facts(card)["catalogue_hash"] == model.catalogue.hash
    assert snippet(card)["model"].num_parameters() == model.num_parameters()
    processor.push_to_hub(REPO)
    assert ModelCard.load(REPO).content.strip() == card.content.strip()


def test_the_next_push_writes_its_own_numbers(hub, model):
    model.push_to_hub(REPO)
    other = make_model(make_catalogue(), num_experts=1)
    other.push_to_hub(REPO)
    assert facts(ModelCard.load(REPO))["parameters"] == other.num_parameters() != model.num_parameters()


def test_a_card_of_ones_own_is_kept(hub, model, processor):
    model.push_to_hub(REPO)
    ModelCard("---\nlicense: mit\n---\n\n# Films\n\nMine.\n").push_to_hub(REPO)
    for one in (model, processor):
        one.push_to_hub(REPO)
        card = ModelCard.load(REPO)
        assert card.text.strip() == "# Films\n\nMine."
        assert card.data.license == "mit"


def test_a_processor_alone_is_no_model_and_gets_no_card(hub, model, processor):
    processor.push_to_hub(REPO)
    assert "README.md" not in hub.files(REPO)
    model.push_to_hub(REPO)
    assert facts(ModelCard.load(REPO))["parameters"] == model.num_parameters()


def test_saving_with_push_as_well(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=REPO)
    assert facts(ModelCard.load(REPO))["parameters"] == model.num_parameters()


def test_a_reward_model_with_hostile_objectives(hub):
    names = ["`</code>\n```\n# big", "<b>ltr</b>"]
    config = OneRecRewardConfig(
        num_items=3, objectives=names, base_rates=[0.3, 0.02], hidden_size=8, num_attention_heads=2
    )
    model = OneRecForSessionReward(config)
    model.set_items(RewardItems(["a", "b", "c"]))
    model.push_to_hub("tester/judge")
    card = ModelCard.load("tester/judge")
    assert facts(card)["objectives"] == names
    assert [line for line in card.content.splitlines() if line.startswith("#")] == ["# judge"]
    assert type(snippet(card)["model"]) is OneRecForSessionReward


@pytest.mark.filterwarnings(
    "ignore:Could not find a config file:UserWarning"
)  # PEFT looks for the base model on the Hub
@pytest.mark.parametrize("adapted", [False, True])
def test_trainer_pushes_our_card(hub, catalogue, processor, tmp_path, adapted):
    rows = Dataset.from_list([{"history": ["m1", "m2"], "session": ["m3"]}, {"history": ["m4"], "session": ["m5"]}])
    model = make_model(catalogue)
    if adapted:
        from peft import LoraConfig, get_peft_model

        model.push_to_hub("tester/base")
        model = AutoModelForSeq2SeqLM.from_pretrained("tester/base")
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    args = OneRecTrainingArguments(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=WRITE,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = OneRecTrainer(model, args, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.push_to_hub(license="mit", tags="films")
    card = ModelCard.load(REPO)
    assert "More Information" not in card.content.title()
    assert card.data.license == "mit"
    assert {"films", "onerec"} <= set(card.data.tags)
    assert "`OneRecTrainer` on 2 examples: steps 2," in card.content
    assert card.data.base_model == ("tester/base" if adapted else None)
    assert card.data.library_name == ("peft" if adapted else "transformers")
    assert len(snippet(card)["sessions"][0]) == 2
