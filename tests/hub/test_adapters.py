"""Adapters on the Hub: pushed by PEFT or by a trainer, and loaded on top of a base that is on the Hub too."""

import numpy as np
import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, Trainer, TrainingArguments, pipeline

from onerec_hf import OneRecForConditionalGeneration
from onerec_hf.data import OneRecDataCollator

# PEFT looks for the base's config on the real Hub, and takes a vocabulary that it does not find for unchanged, as it is here.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in tester/")
BASE, ADAPTER = "tester/onerec-movies", "tester/onerec-movies-late-night"
HISTORY = ["m1", "m2", "m3"]


@pytest.fixture
def base(hub, model, processor):
    model.push_to_hub(BASE)
    processor.push_to_hub(BASE)
    return AutoModelForSeq2SeqLM.from_pretrained(BASE)


def adapt(base, **settings):
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=experts, **settings)
    return get_peft_model(base, config)


def ranked(model, processor, history=HISTORY):
    out = model.eval().recommend(**processor([history]), session_length=1, num_beams=42, num_return_sequences=42)
    return [session[0] for session in processor.batch_decode(out) if session]


def test_an_adapter_is_pushed_and_loads_on_top_of_its_base(hub, base, processor):
    before = ranked(base, processor)
    adapted = adapt(base, init_lora_weights=False)
    adapted.push_to_hub(ADAPTER)
    wanted = ranked(adapted, processor)
    assert wanted != before
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(hub.files(ADAPTER))
    assert not {"model.safetensors", "config.json"} & set(hub.files(ADAPTER))

    for loader in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration):
        assert ranked(loader.from_pretrained(ADAPTER), processor) == wanted
    fresh = AutoModelForSeq2SeqLM.from_pretrained(BASE)
    assert ranked(PeftModel.from_pretrained(fresh, ADAPTER), processor) == wanted
    fresh = AutoModelForSeq2SeqLM.from_pretrained(BASE)
    fresh.load_adapter(ADAPTER)
    assert ranked(fresh, processor) == wanted
    fresh.disable_adapters()
    assert ranked(fresh, processor) == before
    merged = adapted.merge_and_unload()
    merged.push_to_hub("tester/onerec-merged")
    assert ranked(AutoModelForSeq2SeqLM.from_pretrained("tester/onerec-merged"), processor) == wanted


def test_a_trainer_pushes_the_adapter_alone(hub, base, processor, tmp_path):
    walks = [[f"m{(start + i) % 40}" for i in range(5)] for start in range(16)]
    rows = Dataset.from_dict({"history": [walk[:3] for walk in walks], "session": [walk[3:] for walk in walks]})
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-2,
        push_to_hub=True,
        hub_model_id=ADAPTER,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    collator = OneRecDataCollator(processor)
    trainer = Trainer(adapt(base), arguments, train_dataset=rows, data_collator=collator, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    assert "adapter_model.safetensors" in hub.files(ADAPTER)
    assert "model.safetensors" not in hub.files(ADAPTER)
    loaded, loaded_processor = (
        AutoModelForSeq2SeqLM.from_pretrained(ADAPTER),
        AutoProcessor.from_pretrained(ADAPTER),
    )
    assert ranked(loaded, loaded_processor) == ranked(trainer.model, processor)


def test_an_adapter_brings_the_catalogue_that_its_base_has_grown_to(hub, base, processor):
    catalogue = base.catalogue
    free = np.argwhere(catalogue.free_last_codes(catalogue.codes[:1, :-1])[0]).flatten()[:2]
    grown = catalogue.add(["new0", "new1"], [[*catalogue.codes[0, :-1], code] for code in free])
    base.set_catalogue(grown)
    processor.set_catalogue(grown)
    adapted = adapt(base, init_lora_weights=False)
    adapted.push_to_hub(ADAPTER)
    processor.push_to_hub(ADAPTER)
    wanted = ranked(adapted, processor, ["new0", "m1"])
    assert {"new0", "new1"} <= set(wanted)
    loaded_processor = AutoProcessor.from_pretrained(ADAPTER)
    for loader in (AutoModelForSeq2SeqLM, OneRecForConditionalGeneration):
        loaded = loader.from_pretrained(ADAPTER)
        assert ranked(loaded, loaded_processor, ["new0", "m1"]) == wanted
    recommender = pipeline("generative-recommendation", model=loaded, processor=loaded_processor, device="cpu")
    assert recommender(["new0", "m1"], exclude_seen=False)[0]["item"] == wanted[0]
    assert len(AutoModelForSeq2SeqLM.from_pretrained(BASE).catalogue) == 40


@pytest.mark.parametrize("own_processor", [False, True])
def test_a_pipeline_takes_an_adapters_name(hub, base, processor, own_processor):
    adapted = adapt(base, init_lora_weights=False)
    adapted.push_to_hub(ADAPTER)
    if own_processor:
        processor.push_to_hub(ADAPTER)
    recommender = pipeline("generative-recommendation", model=ADAPTER, device="cpu", exclude_seen=False)
    answer = recommender(HISTORY)
    assert [each["item"] for each in answer] == ranked(adapted, processor)[:10]
