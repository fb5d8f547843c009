"""The adapter's card: base and adapter load by its snippet, and its numbers are PEFT's."""

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM

from onerec_hf.hub_cards import write_adapter_card
from tests.hub_cards.reading import run_snippet, section


@pytest.fixture
def adapted(model, processor, tmp_path):
    """A base in `tmp_path / "base"`, and an adapter of it whose weights differ from nothing."""
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    experts = {"target_parameters": ["experts.gate_up_proj"], "init_lora_weights": False}
    return get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=6, **experts)).eval()


@pytest.mark.parametrize("own_processor", [True, False])
def test_the_snippet_runs(adapted, processor, tmp_path, own_processor):
    folder = tmp_path / "adapter"
    adapted.save_pretrained(folder)
    if own_processor:
        processor.save_pretrained(folder)
    write_adapter_card(folder, adapted, processor)
    card = (folder / "README.md").read_text(encoding="utf-8")
    wanted = adapted.recommend(**processor([["m0", "m1", "m2"]]), num_beams=20, session_length=2)
    assert run_snippet(card)["sessions"] == processor.batch_decode(wanted)
    assert ("and the processor" in card) == own_processor


def test_the_numbers_are_pefts(adapted, processor, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")  # with PEFT's template
    assert "More Information Needed" in (tmp_path / "adapter" / "README.md").read_text()
    write_adapter_card(tmp_path / "adapter", adapted, processor, data="New users of <i>May</i>.")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert "More Information Needed" not in card.content
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a folder is no repository
    described = section(card.content, "Adapter")
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert f"| trained parameters | {trained:,} of {sum(p.numel() for p in adapted.parameters()):,} |" in described
    for line in ("| kind | LORA |", "| rank | 3 |", "| alpha | 6 |", "| modules | q\\_proj, v\\_proj |"):
        assert line in described
    assert "| parameters (packed experts) | experts.gate\\_up\\_proj |" in described
    assert processor.catalogue.hash[:16] in described
    assert "New users of &lt;i&gt;May&lt;/i&gt;." in card.content


def test_a_base_that_was_never_saved_cannot_be_named(model, processor, tmp_path):
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    write_adapter_card(tmp_path, adapted, processor)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "```python" not in card
    assert "was not saved" in card
    write_adapter_card(tmp_path, adapted, processor, base="me/onerec-movies", repo_id="me/may")
    assert "AutoModelForSeq2SeqLM.from_pretrained('me/onerec-movies')" in (tmp_path / "README.md").read_text()
