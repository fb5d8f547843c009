"""A repository's own code: it is all there, it does the same, and where the package is installed it is left alone."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    pipeline,
)

from onerec_hf import OneRecForConditionalGeneration, OneRecForSessionReward, OneRecRewardConfig, RewardItems
from tests.hub.strangers import stranger

REPO, REWARD, PLAIN = "tester/onerec-movies", "tester/onerec-reward", "tester/onerec-plain"
HISTORY, SESSIONS = ["m1", "m2", "m3"], [["m2", "m3"], ["m5"]]
ROOM = Path(__file__).resolve().parents[2] / "modeling"
CODE = {f"code/{file.name}" for file in ROOM.glob("*.py") if file.name != "__init__.py"}


@pytest.fixture
def reward():
    torch.manual_seed(0)
    config = {"objectives": ["vtr", "ltr"], "base_rates": [0.3, 0.02], "hidden_size": 16, "num_attention_heads": 2}
    model = OneRecForSessionReward(OneRecRewardConfig(num_items=6, **config)).eval()
    for tower in model.towers:
        torch.nn.init.normal_(tower.out_proj.weight)
    model.set_items(RewardItems([f"m{i}" for i in range(6)]))
    return model


def sessions(model, processor):
    return processor.batch_decode(model.recommend(**processor([HISTORY]), num_beams=4, num_return_sequences=4))


def without_the_package(hub, tmp_path, **asked):
    """What `remote_code.py` prints, in a process with empty caches of its own."""
    return stranger(hub, tmp_path, str(Path(__file__).parent / "remote_code.py"), json.dumps(asked))


def test_a_process_without_the_package_does_the_same(hub, model, processor, reward, tmp_path):
    model_only = model.push_to_hub(REPO).oid
    processor.push_to_hub(REPO)
    for one in (model, processor):
        one.push_to_hub(PLAIN, include_code=False)
    reward.push_to_hub(REWARD)
    assert set(hub.files(REPO)) >= CODE
    assert not CODE & set(hub.files(PLAIN))
    names = json.loads(hub.text(REPO, "config.json"))["custom_pipelines"]["generative-recommendation"]
    assert names == {"impl": "code/pipeline_onerec.GenerativeRecommendationPipeline", "pt": ["AutoModelForSeq2SeqLM"]}
    assert "custom_pipelines" not in hub.text(PLAIN, "config.json") + hub.text(REWARD, "config.json")
    assert "auto_map" not in "".join(hub.text(PLAIN, name) for name in hub.files(PLAIN) if name.endswith(".json"))

    folder = tmp_path / "saved-by-stranger"
    asked = {"repo": REPO, "model_only": model_only, "plain": PLAIN, "reward": REWARD, "folder": str(folder)}
    answer, stderr = without_the_package(hub, tmp_path, history=HISTORY, sessions=SESSIONS, **asked)

    wanted = sessions(model, processor)
    generated = model.generate(**processor([HISTORY]), num_beams=4, num_return_sequences=4)
    recommender = pipeline("generative-recommendation", model=model, processor=processor, device="cpu")
    recommended = recommender([HISTORY, HISTORY[:1]], items={"m4": "Alien"})
    for place in ("hub", "folder"):  # what was pushed, and what was loaded from there and saved again
        found = answer[place]
        assert all(module.startswith("transformers_modules.") for module in found["modules"])
        assert found["recommend"] == wanted
        assert found["generate"] == processor.batch_decode(generated)
        module, answers = found["pipeline"]
        assert module.startswith("transformers_modules.")
        for one, other in zip(answers, recommended, strict=True):
            assert [(each["item"], each.get("title")) for each in one] == [
                (each["item"], each.get("title")) for each in other
            ]
        assert (found["backbone"], found["tokenizer"]) == ("OneRecModel", "OneRecTokenizer")
        assert found["experts"] == model.config._experts_implementation
    assert answer["reward"] == pytest.approx(reward.reward([HISTORY, []], SESSIONS))
    assert answer["made"] == [["m4"]]
    assert answer["warnings"] == []
    assert "warning" not in stderr.lower(), stderr
    for without_code, untrusted in (answer["refused"][:2], answer["refused"][2:]):  # by AutoConfig, by pipeline()
        assert "model type `onerec`" in without_code
        assert "trust_remote_code=True" in untrusted
    assert answer["installed"] == [True, "onerec_hf.modeling.processing_onerec"]

    # What the stranger saved loads through the package.
    loaded, loaded_processor = (
        OneRecForConditionalGeneration.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder),
    )
    assert sessions(loaded, loaded_processor) == wanted


@pytest.mark.parametrize("trust", [None, True])
def test_the_package_is_used_where_it_is_installed(hub, model, processor, reward, trust, capfd):
    for one, repo in ((model, REPO), (processor, REPO), (reward, REWARD)):
        one.push_to_hub(repo)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    capfd.readouterr()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            loaded = AutoModelForSeq2SeqLM.from_pretrained(REPO, trust_remote_code=trust)
            loaded_processor = AutoProcessor.from_pretrained(REPO, trust_remote_code=trust)
            config = AutoConfig.from_pretrained(REPO, trust_remote_code=trust)
            recommender = pipeline("generative-recommendation", model=REPO, trust_remote_code=trust, device="cpu")
            judge = AutoModelForSequenceClassification.from_pretrained(REWARD, trust_remote_code=trust)
    finally:
        transformers.logging.set_verbosity(verbosity)
    said = capfd.readouterr()
    assert "warn" not in (said.out + said.err).lower()
    for thing in (loaded, loaded_processor, loaded_processor.tokenizer, config, judge, recommender, recommender.model):
        assert type(thing).__module__.startswith("onerec_hf.modeling."), type(thing)
    assert not [name for name in sys.modules if name.startswith("transformers_modules") and "onerec" in name]
    assert sessions(loaded, loaded_processor) == sessions(model, processor)


def test_code_is_left_out_of_what_is_saved_after_loading(hub, model, processor, tmp_path):
    model.push_to_hub(REPO)
    processor.push_to_hub(REPO)
    loaded, loaded_processor = AutoModelForSeq2SeqLM.from_pretrained(REPO), AutoProcessor.from_pretrained(REPO)
    loaded.include_code = loaded_processor.include_code = False  # as one sets it for a trainer
    for one in (loaded, loaded_processor):
        one.save_pretrained(tmp_path / "plain")
    names = {str(file.relative_to(tmp_path / "plain")) for file in (tmp_path / "plain").rglob("*")}
    assert not CODE & names
    texts = [file.read_text() for file in (tmp_path / "plain").glob("*.json")]
    left_out = ("auto_map", "custom_pipelines", "include_code")
    assert not any(name in text for name in left_out for text in texts)
    loaded.save_pretrained(tmp_path / "whole", include_code=True)
    assert {str(file.relative_to(tmp_path / "whole")) for file in (tmp_path / "whole").rglob("*")} >= CODE
    model.push_to_hub(PLAIN, include_code=False)
    assert model.include_code  # for that push only


def test_a_pipeline_is_pushed_whole_and_its_repository_works_without_code_too(hub, model, processor):
    recommender = pipeline("generative-recommendation", model=model, processor=processor, device="cpu", top_k=3)
    recommender.push_to_hub(REPO)
    assert set(hub.files(REPO)) >= CODE | {"catalogue.safetensors", "processor_config.json", "model.safetensors"}
    for one in (model, processor):
        one.push_to_hub(PLAIN, include_code=False)
    for repo in (REPO, PLAIN):
        loaded = pipeline("generative-recommendation", model=repo, device="cpu", top_k=3)
        assert [each["item"] for each in loaded(HISTORY)] == [each["item"] for each in recommender(HISTORY)]
