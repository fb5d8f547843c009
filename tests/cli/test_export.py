"""`onerec-hf export`: the graphs compute what the model does, for sizes that they were not traced with."""

import onnxruntime
import pytest
import torch
from transformers import AutoProcessor

from tests.cli.commands import contents, onerec, refused, succeeded
from tests.rounding import assert_close


@pytest.mark.slow
def test_graphs_are_the_model(trained, tmp_path):
    folder = tmp_path / "onnx"
    done = succeeded(onerec("export", "--model", trained.folder, "--output_dir", folder))
    assert done.out.count("largest difference") == 2
    assert {"encoder.onnx", "decoder.onnx", "catalogue.safetensors", "processor_config.json"} <= set(contents(folder))
    assert not [path for path in tmp_path.iterdir() if path != folder]
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("encoder", "decoder"))
    processor, model = AutoProcessor.from_pretrained(folder), trained.trainer.model.eval()
    batch = processor([[f"m{i}" for i in range(7)], ["m3"], ["m4", "m5"]], sessions=[["m1"], ["m2", "m3"], ["m9"]])
    inputs = {name: value.numpy() for name, value in batch.items()}
    read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    (states,) = encoder.run(None, read)
    (logits,) = decoder.run(
        None,
        {
            "decoder_input_ids": inputs["decoder_input_ids"],
            "encoder_hidden_states": states,
            "attention_mask": inputs["attention_mask"],
        },
    )
    with torch.no_grad():
        wanted = model(**batch, use_cache=False).logits.numpy()
    real = inputs["decoder_attention_mask"].astype(bool)  # sessions end before the longest one does
    assert_close(logits[real], wanted[real])
    refused(onerec("export", "--model", trained.folder, "--output_dir", folder), "exists already and is not empty")


def test_refuses(tmp_path):
    refused(onerec("export", "--model", tmp_path / "nothing", "--output_dir", tmp_path / "out"), "--model")
    assert not (tmp_path / "out").exists()
