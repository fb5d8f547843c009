"""OneRec-V2 behind the server and on its card: both take it as they take OneRec."""

import pytest
import torch

from onerec_hf import OneRecV2Config, OneRecV2ForConditionalGeneration
from onerec_hf.cli.export import export_onnx
from onerec_hf.hub_cards import write_generator_card
from onerec_hf.modeling.requests import Request
from onerec_hf.serving.models import load_generator
from onerec_hf.workflows.artefact import load_model


def test_the_server_and_the_card_know_it(catalogue, processor, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "decoder_layers": 2, "context_groups": 2}
    torch.manual_seed(0)
    model = OneRecV2ForConditionalGeneration(
        OneRecV2Config(codebook_sizes=catalogue.codebook_sizes, initializer_range=0.2, **sizes)
    ).eval()
    model.set_catalogue(catalogue)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    recommender = load_generator(tmp_path, load_items=lambda folder, items: None)
    assert type(recommender.model) is OneRecV2ForConditionalGeneration
    (answer,) = recommender.recommend([Request(history=["m1", "m2"], top_k=3)])
    wanted = model.recommend(**processor([["m1", "m2"]]), num_return_sequences=3)
    assert answer.columns()["items"] == [item for (item,) in processor.batch_decode(wanted)]
    assert type(load_model("--model", str(tmp_path))) is OneRecV2ForConditionalGeneration
    with pytest.raises(ValueError, match="export writes graphs of OneRec only"):
        export_onnx(model, processor, tmp_path)

    write_generator_card(tmp_path, processor, model)
    card = (tmp_path / "README.md").read_text()
    assert "A OneRec-V2 generator" in card
    assert "| context | 32 channels per position (no encoder)" not in card  # two groups of 8 channels
    assert (
        "| context | 16 channels per position (no encoder), keys and values for 1 group of blocks, one position per item |"
        in card
    )
    assert "| encoder |" not in card
