"""Without a trainer of ours: transformers' Trainer and Seq2SeqTrainer, and PEFT's LoRA on attention and packed experts."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from onerec_hf import OneRecProcessor
from onerec_hf.data import OneRecDataCollator
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

CATALOGUE = make_catalogue()
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=10)
COLLATOR = OneRecDataCollator(PROCESSOR)
ATTENTION, EXPERTS = ["q_proj", "k_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "both": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
}


def examples(step, count=64):
    """Histories of three items, `step` apart on a ring of the catalogue, and the two that follow."""
    walks = [[f"m{(start + step * i) % 40}" for i in range(5)] for start in range(count)]
    return Dataset.from_dict({"history": [walk[:3] for walk in walks], "session": [walk[3:] for walk in walks]})


def train(model, folder, step=1, trainer=Trainer, arguments=TrainingArguments, evaluate=None, **settings):
    defaults = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 16, "report_to": "none"}
    args = arguments(
        str(folder),
        **{**defaults, **settings},
        logging_steps=20,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        use_cpu=True,
    )
    run = trainer(model, args, train_dataset=examples(step), eval_dataset=evaluate, data_collator=COLLATOR)
    run.train()
    return run


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def sessions(model):
    out = model.eval().recommend(
        **PROCESSOR([["m1", "m2", "m3"], ["m9"]]), num_beams=8, num_return_sequences=8, return_dict_in_generate=True
    )
    return PROCESSOR.batch_decode(out), out.sequences_scores


def assert_same(one, other):
    assert_close(one[1], other[1])
    assert one[0] == other[0]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model(CATALOGUE).save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


def adapted(folder, targets, **settings):
    return get_peft_model(load(folder), LoraConfig(r=4, lora_alpha=8, **TARGETS[targets], **settings))


def test_plain_trainer(base_folder, tmp_path):
    model = load(base_folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = train(model, tmp_path)
    assert losses(run)[-1] < 0.6 * losses(run)[0]
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    run.save_model(tmp_path / "tuned")
    assert_same(sessions(load(tmp_path / "tuned")), sessions(model))


def test_seq2seq_trainer_evaluates_by_generation(base_folder, tmp_path):
    seen = {}

    def share_of_items(prediction):
        seen["predictions"] = PROCESSOR.batch_decode(torch.as_tensor(prediction.predictions))
        wanted = PROCESSOR.batch_decode(torch.as_tensor(prediction.label_ids))
        hits = [one == other for one, other in zip(seen["predictions"], wanted, strict=True)]
        return {"sessions": sum(hits) / len(hits)}

    def with_metric(*args, **kwargs):
        return Seq2SeqTrainer(*args, compute_metrics=share_of_items, **kwargs)

    run = train(
        load(base_folder),
        tmp_path,
        trainer=with_metric,
        arguments=Seq2SeqTrainingArguments,
        evaluate=examples(1, count=20),
        predict_with_generate=True,
        generation_num_beams=4,
        max_steps=120,
    )
    metrics = run.evaluate()
    assert metrics["eval_sessions"] > 0.5
    assert metrics["eval_loss"] < losses(run)[0]
    assert all(len(session) == 2 and None not in session for session in seen["predictions"])


@pytest.mark.parametrize("targets", TARGETS)
def test_lora_learns_and_leaves_the_base_alone(base_folder, tmp_path, targets):
    model = adapted(base_folder, targets)
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    run = train(model, tmp_path)
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    after = model.state_dict()
    assert not [name for name, value in before.items() if not torch.equal(value, after[name])]
    moved = [name for name, value in after.items() if "lora_B" in name and bool(value.any())]
    assert len(moved) == sum("lora_B" in name for name in after)
    assert any("experts" in name for name in moved) == (targets != "attention")


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_merges_and_loads_to_what_it_was(base_folder, tmp_path, targets):
    model = adapted(base_folder, targets, init_lora_weights=False)
    wanted = sessions(model)
    assert wanted[0] != sessions(load(base_folder))[0]
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert_same(sessions(load(tmp_path / "adapter")), wanted)
    assert_same(sessions(PeftModel.from_pretrained(load(base_folder), tmp_path / "adapter")), wanted)
    loaded = load(base_folder)
    loaded.load_adapter(tmp_path / "adapter")
    assert_same(sessions(loaded), wanted)

    merged = model.merge_and_unload()
    assert_same(sessions(merged), wanted)
    merged.save_pretrained(tmp_path / "merged")
    assert_same(sessions(load(tmp_path / "merged")), wanted)


def test_an_adapter_for_a_grown_catalogue_brings_it(base_folder, tmp_path):
    taken = {tuple(codes) for codes in CATALOGUE.codes.tolist()}
    free = [[a, b, c] for a in range(4) for b in range(5) for c in range(6) if (a, b, c) not in taken]
    grown = CATALOGUE.add(["new0", "new1"], free[:2])
    base = load(base_folder)
    base.set_catalogue(grown)
    processor = OneRecProcessor.from_catalogue(grown)
    model = get_peft_model(base, LoraConfig(r=4, **TARGETS["both"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter").eval()
    assert loaded.catalogue.hash == grown.hash
    inputs = {**processor([["new0", "m1"]]), "session_length": 1, "num_beams": 42, "num_return_sequences": 42}
    assert processor.batch_decode(loaded.recommend(**inputs)) == processor.batch_decode(model.recommend(**inputs))

    OneRecProcessor.from_catalogue(make_catalogue(seed=1)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter: this model was trained with the catalogue"):
        load(tmp_path / "adapter")
