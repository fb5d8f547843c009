"""Presets of `train`: fixed sets of options below what the caller gives."""

import pytest
from transformers import AutoModelForSeq2SeqLM

from onerec_hf import OneRecV2ForConditionalGeneration
from onerec_hf.workflows import chosen_settings, load_dataset, train
from onerec_hf.workflows.presets import PRESETS
from tests.workflows.conftest import TINY

QUICK = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}


def test_paper_is_the_defaults_of_the_settings(tables):
    assert chosen_settings(**tables, features="none", preset="paper") == []


def test_tiger(tables, tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "codebook_sizes": [8, 8, 8]}
    result = train(**tables, preset="tiger", output_dir=tmp_path / "out", **small, **QUICK)
    config, catalogue = result.model.config, result.processor.catalogue
    assert (config.num_experts, config.session_length, config.cross_attention_rope) == (1, 1, False)
    assert config.item_head is None
    assert catalogue.codebook_sizes[:3] == [8, 8, 8]
    assert len(catalogue.codebook_sizes) == 4  # the extra digit
    assert config.hidden_size == 16  # given


def test_small_takes_its_codebooks_from_the_data(tables):
    rows = {row.option: row.value for row in chosen_settings(**tables, preset="small")}
    assert (rows["codebook_sizes"], rows["max_history"], rows["max_steps"]) == ([16] * 3, 10, 1200)


@pytest.mark.slow
def test_v2_trains_a_lazy_decoder_on_prefixes(tables, tmp_path):
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "decoder_layers": 2,
        "packing_length": 64,
    }
    result = train(**tables, preset="v2", output_dir=tmp_path / "out", **small, **QUICK)
    config = result.model.config
    assert isinstance(result.model, OneRecV2ForConditionalGeneration)
    assert (config.decoder_layers, config.session_length, config.item_head.loss_weight) == (2, 1, 0)
    assert config.encoder_pools_items
    loaded = AutoModelForSeq2SeqLM.from_pretrained(result.folder)
    assert type(loaded) is OneRecV2ForConditionalGeneration
    again = train(
        load_dataset(**tables), model=str(result.folder), output_dir=tmp_path / "more", **{**QUICK, "max_steps": 1}
    )
    assert isinstance(again.model, OneRecV2ForConditionalGeneration)


def test_an_unknown_architecture_is_refused(tables, tmp_path):
    with pytest.raises(ValueError, match="--architecture onerec_v3: choose one of onerec, onerec_v2"):
        train(**tables, architecture="onerec_v3", output_dir=tmp_path / "out", **QUICK)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "auto"])
def test_a_saved_model_keeps_its_sizes(preset, tables, tmp_path):
    first = train(**tables, output_dir=tmp_path / "first", **TINY)
    more = {**QUICK, "max_steps": 1, "num_train_epochs": 1}
    result = train(
        load_dataset(**tables), model=str(first.folder), preset=preset, output_dir=tmp_path / "second", **more
    )
    assert result.model.config.hidden_size == 16
    assert result.processor.max_history == first.processor.max_history


def test_auto_goes_on_from_a_saved_model(tables, tmp_path):
    first = train(**tables, output_dir=tmp_path / "first", **{**TINY, "preset": "auto", "max_history": 6})
    assert first.model.config.encoder_is_causal
    result = train(**tables, model=str(first.folder), output_dir=tmp_path / "second", **QUICK)
    assert (result.processor.max_history, result.trainer.args.learning_rate) == (6, 0.001)
    assert "history_lengths" in result.trainer.train_dataset.dataset.column_names  # prefixes, as the encoder is causal


def test_an_unknown_preset_is_refused(tables, tmp_path):
    with pytest.raises(ValueError, match="--preset best: choose one of auto, paper, tiger, small, v2"):
        train(**tables, preset="best", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
