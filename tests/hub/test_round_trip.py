"""Over real HTTP: what is pushed comes back, by branch, commit and token; what goes wrong is said in the client's own words."""

import time

import pandas as pd
import pytest
import torch
from datasets import Dataset
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoProcessor, pipeline

from onerec_hf import OneRecForConditionalGeneration, OneRecForSessionReward, OneRecRewardConfig, RewardItems
from onerec_hf.data.item_fields import save_items_table
from onerec_hf.trainers.onerec_config import OneRecTrainingArguments
from onerec_hf.trainers.onerec_trainer import OneRecTrainer
from tests.conftest import make_catalogue, make_model
from tests.hub.hub_server import READ, STRANGER, WRITE

REPO = "tester/onerec-movies"
HISTORY = [["m1", "m2", "m3"]]


def sessions(model, processor):
    out = model.recommend(**processor(HISTORY), num_beams=4, num_return_sequences=4)
    return processor.batch_decode(out)


def load(repo=REPO, **kwargs):
    return AutoModelForSeq2SeqLM.from_pretrained(repo, **kwargs), AutoProcessor.from_pretrained(repo, **kwargs)


def test_model_processor_and_catalogue_come_back(hub, model, processor):
    model.push_to_hub(REPO)
    assert "catalogue.safetensors" in hub.files(REPO)
    hub.calls.clear()
    processor.push_to_hub(REPO)
    assert hub.calls["lfs_put"] == 0  # the same catalogue is the same file
    loaded, loaded_processor = load()
    assert loaded.catalogue.hash == model.catalogue.hash
    assert loaded_processor.catalogue.hash == model.catalogue.hash
    assert loaded_processor.max_history == processor.max_history
    assert sessions(loaded, loaded_processor) == sessions(model, processor)
    assert not hub.unknown, "routes that the server lacks"


def test_titles_are_pushed_and_shown(hub, model, processor, tmp_path):
    titles = pd.DataFrame({"item_id": processor.catalogue.item_ids, "title": [f"Film {i}" for i in range(40)]})
    save_items_table(tmp_path, titles, processor.catalogue)
    processor.items_file = str(tmp_path / "items.parquet")
    model.push_to_hub(REPO)
    processor.push_to_hub(REPO)
    assert "items.parquet" in hub.files(REPO)
    best = pipeline("generative-recommendation", model=REPO, device="cpu")(HISTORY[0])
    assert [each["title"] for each in best] == [f"Film {each['item'][1:]}" for each in best]
    _, again = load()
    again.push_to_hub("tester/copy")  # what was loaded carries it on
    assert "items.parquet" in hub.files("tester/copy")


def test_the_processor_alone_carries_the_catalogue(hub, processor):
    processor.push_to_hub(REPO)
    assert AutoProcessor.from_pretrained(REPO)(HISTORY)["input_ids"].equal(processor(HISTORY)["input_ids"])


def test_the_model_alone_gives_a_processor(hub, model, processor):
    model.push_to_hub(REPO)
    with pytest.warns(UserWarning, match=f"{REPO} holds a catalogue but no processor"):
        made = AutoProcessor.from_pretrained(REPO)
    assert made(HISTORY)["input_ids"].equal(processor(HISTORY)["input_ids"])
    assert sessions(AutoModelForSeq2SeqLM.from_pretrained(REPO), made) == sessions(model, processor)
    hub.commit_files(REPO, {"catalogue.safetensors": None})
    with pytest.raises(OSError, match=r"neither a processor nor a catalogue.safetensors"):
        AutoProcessor.from_pretrained(REPO)


def test_reward_model_comes_back_with_its_items(hub):
    items = RewardItems([f"m{i}" for i in range(6)])
    config = {"objectives": ["vtr", "ltr"], "base_rates": [0.3, 0.02], "hidden_size": 16, "num_attention_heads": 2}
    model = OneRecForSessionReward(OneRecRewardConfig(num_items=6, **config)).eval()
    torch.nn.init.normal_(model.towers[0].out_proj.weight)
    model.set_items(items)
    model.push_to_hub("tester/reward")
    loaded = AutoModelForSequenceClassification.from_pretrained("tester/reward")
    assert type(loaded) is OneRecForSessionReward
    pairs = [["m1"], []], [["m2", "m3"], ["m5"]]
    assert loaded.reward(*pairs) == model.reward(*pairs)


def test_sharded_weights(hub, model, processor):
    model.push_to_hub(REPO, max_shard_size="50KB")
    shards = [name for name in hub.files(REPO) if name.startswith("model-")]
    assert len(shards) > 2
    loaded = AutoModelForSeq2SeqLM.from_pretrained(REPO)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_revisions_hold_their_own_weights_and_catalogue(hub, model, processor):
    other = make_model(make_catalogue(seed=5), seed=5)
    first = model.push_to_hub(REPO).oid
    other.push_to_hub(REPO)
    other.push_to_hub(REPO, revision="grown")
    for revision, wanted in ((first, model), ("main", other), ("grown", other)):
        loaded = OneRecForConditionalGeneration.from_pretrained(REPO, revision=revision)
        assert loaded.catalogue.hash == wanted.catalogue.hash
        assert torch.equal(loaded.lm_head.weight, wanted.lm_head.weight)
    with pytest.raises(OSError, match="v9 is not a valid git identifier"):
        load(revision="v9")


def test_a_private_repository_is_for_those_with_its_token(hub, model, processor, monkeypatch, tmp_path):
    model.push_to_hub(REPO, private=True)
    processor.push_to_hub(REPO)
    monkeypatch.delenv("HF_TOKEN")
    loaded, loaded_processor = load(token=READ)
    assert sessions(loaded, loaded_processor) == sessions(model, processor)
    for token in (STRANGER, False):
        with pytest.raises(OSError, match="private repository"):
            OneRecForConditionalGeneration.from_pretrained(REPO, token=token, cache_dir=tmp_path / "empty")


def test_a_missing_repository_is_named(hub):
    for load_one in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration, OneRecForSessionReward):
        with pytest.raises(OSError, match="tester/nothing is not a local folder and is not a valid model identifier"):
            load_one.from_pretrained("tester/nothing")


def test_wrong_and_read_only_tokens(hub, model, processor):
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as wrong:
        model.push_to_hub(REPO, token="hf_wrong")
    assert wrong.value.response.status_code == 401
    model.push_to_hub(REPO)
    for load_one in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration, AutoProcessor):
        with pytest.raises(OSError, match="Invalid credentials"):
            load_one.from_pretrained(REPO, token="hf_wrong")
    before = hub.files(REPO)
    for one in (model, processor):
        for token in (READ, STRANGER):
            with pytest.raises(HfHubHTTPError, match="you don't have the rights to write") as refused:
                one.push_to_hub(REPO, token=token)
            assert refused.value.response.status_code == 403
    assert hub.files(REPO) == before
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download("tester/nothing")


def test_an_interrupted_push_is_taken_up_again(hub, model):
    def push():
        hub.calls.clear()
        return model.push_to_hub(REPO, max_shard_size="50KB")

    hub.fail = {"lfs_put": [507]}  # one weight file is refused, others arrive
    with pytest.raises(
        RuntimeError, match=r"Error while uploading 'model-\d+-of-\d+.safetensors' to the Hub"
    ) as failed:
        push()
    assert "507 Insufficient Storage" in str(failed.value.__cause__)
    assert not hub.files(REPO)  # a commit is whole or not at all
    hub.fail = {"commit": [507]}  # now all files arrive, and the commit fails
    with pytest.raises(HfHubHTTPError, match="507 Insufficient Storage"):
        push()
    assert not hub.files(REPO)
    push()
    assert hub.calls["lfs_put"] == 0  # everything was there already
    assert torch.equal(AutoModelForSeq2SeqLM.from_pretrained(REPO).lm_head.weight, model.lm_head.weight)


def test_an_unsteady_server_is_asked_again(hub, model):
    hub.fail = {"lfs_batch": [503]}
    model.push_to_hub(REPO)
    assert hub.calls["lfs_batch"] == 2


def test_saving_with_push_uploads_all_that_it_wrote(hub, model, processor, tmp_path):
    folder = tmp_path / "out"
    for _ in range(2):  # the second time every file is there already
        model.save_pretrained(folder, push_to_hub=True, repo_id=REPO)
        processor.save_pretrained(folder, push_to_hub=True, repo_id=REPO)
        written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert "code/modeling_onerec.py" in written
        assert written <= set(hub.files(REPO))
        assert sessions(*load()) == sessions(model, processor)
        hub.repos.clear()
        time.sleep(0.01)


def test_a_snapshot_is_a_folder_like_any_other(hub, model, processor, tmp_path):
    model.push_to_hub(REPO)
    processor.push_to_hub(REPO)
    for folder in (snapshot_download(REPO), snapshot_download(REPO, local_dir=tmp_path / "copy")):
        assert sessions(*load(folder)) == sessions(model, processor)


def test_what_was_loaded_once_loads_offline(hub, model, processor, monkeypatch):
    model.push_to_hub(REPO)
    processor.push_to_hub(REPO)
    load()
    model.push_to_hub("tester/bare")
    hub.commit_files("tester/bare", {"catalogue.safetensors": None})
    for load_one in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration):
        load_one.from_pretrained("tester/bare")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert sessions(*load()) == sessions(model, processor)
    for load_one in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration):
        assert load_one.from_pretrained("tester/bare").catalogue is None  # that there is none is known, too
    for load_one in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration, OneRecForSessionReward):
        with pytest.raises(OSError, match="couldn't connect"):
            load_one.from_pretrained("tester/never-seen")


def test_a_catalogue_that_cannot_be_asked_for_is_not_taken_for_none(hub, model, monkeypatch):
    model.push_to_hub(REPO)
    for name in ("config.json", "model.safetensors"):
        hf_hub_download(REPO, name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load_one in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration):
        with pytest.raises(OSError, match="couldn't connect"):
            load_one.from_pretrained(REPO)


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_trainer_pushes_what_loads(hub, catalogue, processor, tmp_path, strategy):
    rows = Dataset.from_list([{"history": ["m1", "m2"], "session": ["m3"]}, {"history": ["m4"], "session": ["m5"]}])
    args = OneRecTrainingArguments(
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=WRITE,
        hub_strategy=strategy,
        hub_always_push=True,
        max_steps=2,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = OneRecTrainer(make_model(catalogue), args, train_dataset=rows, processing_class=processor)
    trainer.train()
    if strategy == "end":
        trainer.push_to_hub()
    commits = [commit for commit in hub.repos["models", REPO].commits if commit.files]
    for commit in commits:  # what is pushed in the middle of training is whole too
        assert {"config.json", "code/modeling_onerec.py", "code/processing_onerec.py", "catalogue.safetensors"} <= set(
            commit.files
        )
        pushed, pushed_processor = load(revision=commit.oid)
        assert len(sessions(pushed, pushed_processor)) == 4
    assert sessions(pushed, pushed_processor) == sessions(trainer.model.eval(), processor)
