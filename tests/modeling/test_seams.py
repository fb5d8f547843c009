"""What other libraries and callers hand to a model: no mask, a config without a length, quantised weights, lists in other forms, an umask."""

import os
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig

from onerec_hf import ItemCatalogue
from onerec_hf.modeling.files import replacing
from onerec_hf.modeling.hub import _say_unquantized
from onerec_hf.semantic_ids import ResidualQuantizer
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

VARIANTS = [
    {},
    {"encoder_is_causal": True},
    {"encoder_pools_items": True},
    {"encoder_attention": "pointwise"},
    {"item_head": {"num_items": 40, "loss_weight": 1.0}},
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda config: next(iter(config), "plain"))
def test_padding_is_not_read_without_a_mask(catalogue, batch, config):
    model = make_model(catalogue, **config)
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert (batch["attention_mask"] == 0).any()
    assert_close(model(**without).loss, model(**batch).loss)
    assert_close(model(**without).logits, model(**batch).logits)
    history = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for call in (model.recommend, model.generate):
        assert torch.equal(call(batch["input_ids"], num_beams=4), call(**history, num_beams=4))


def test_a_generation_config_without_a_length_writes_a_session(model, batch):
    history = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = model.generate(**history, num_beams=4)
    given = GenerationConfig(num_beams=4)
    assert torch.equal(model.generate(**history, generation_config=given), wanted)
    assert given.max_new_tokens is None
    short = model.generate(**history, generation_config=GenerationConfig(num_beams=4, max_new_tokens=3))
    assert short.shape[1] == 4
    model.generation_config.max_new_tokens = 3  # the model's own default holds too
    assert torch.equal(model.generate(**history, num_beams=4), short)
    assert model.generate(**history, num_beams=4, max_new_tokens=7).shape[1] == 8


class Quantized(torch.Tensor):
    """A weight that can be multiplied, and is not in memory as a plain tensor is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "_linear_pointwise" in str(function):
            raise NotImplementedError("no kernel for this weight")
        with torch._C.DisableTorchFunctionSubclass():  # results are plain tensors
            result = function(*args, **(kwargs or {}))
        return result.as_subclass(cls) if function is torch.Tensor.detach else result


def test_quantized_weights_are_multiplied_by_their_own_kernels(catalogue, batch):
    model, other = make_model(catalogue), make_model(catalogue)
    for module in other.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Quantized), requires_grad=False)
    history = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for name in ("recommend", "generate"):
        assert torch.equal(getattr(other, name)(**history, num_beams=4), getattr(model, name)(**history, num_beams=4))


def test_torchao_quantizes_a_model_that_recommends(catalogue, batch):
    quantization = pytest.importorskip("torchao.quantization")
    model = make_model(catalogue)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert model.recommend(batch["input_ids"], num_beams=4).shape == (2, 8)


def test_experts_that_quantization_leaves_are_named(catalogue):
    model = make_model(catalogue)
    _say_unquantized(model)  # not quantised: nothing to say
    model.hf_quantizer = object()
    with pytest.warns(UserWarning, match=r"the experts, \d+% of the bytes, stay in torch.float32. Pass dtype="):
        _say_unquantized(model)
    dense = make_model(catalogue, num_experts=1)
    dense.hf_quantizer = object()
    _say_unquantized(dense)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_modes_of_the_umask(model, processor, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        vectors = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
        ResidualQuantizer([2, 2]).fit(vectors).save(tmp_path / "codebooks.safetensors")
        with replacing(tmp_path / "notes.txt") as temporary, open(temporary, "w") as file:
            file.write("whole")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"model.safetensors", "catalogue.safetensors", "codebooks.safetensors"} <= {path.name for path in files}
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in files} == {path.name: mode for path in files}


def test_a_saved_file_has_no_missing_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert len(saved) < len(model.state_dict())  # the tied ones
    other = make_model(make_catalogue(), seed=1)
    loaded = other.load_state_dict(saved)  # strict
    assert not loaded.missing_keys
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    del saved["model.decoder.embed_tokens.weight"]
    assert len(other.load_state_dict(saved, strict=False).missing_keys) == 3


def test_lists_of_items_in_the_forms_that_callers_have(model, processor):
    history = processor([["m1", "m2"]])
    wanted = model.recommend(**history, session_length=1, num_beams=5, num_return_sequences=5, allow=[["m3", "m4"]])
    for allow in (
        ["m3", "m4"],
        processor.catalogue.indices(["m3", "m4"]),
    ):
        if isinstance(allow, np.ndarray):
            allow = torch.from_numpy(allow)
        got = model.recommend(**history, session_length=1, num_beams=5, num_return_sequences=5, allow=allow)
        assert torch.equal(got, wanted)
    unknown = {"allow": [["m3", "m4", "new"]], "session_length": 1, "num_beams": 5, "num_return_sequences": 5}
    with pytest.raises(KeyError, match='pass unknown="skip"'):
        model.recommend(**history, **unknown)
    assert torch.equal(model.recommend(**history, **unknown, unknown="skip"), wanted)
    with pytest.raises(ValueError, match='unknown must be "error" or "skip"'):
        model.recommend(**history, unknown="drop")


def test_histories_in_the_forms_that_callers_have(processor):
    sizes = processor.catalogue.codebook_sizes
    numbers = type(processor).from_catalogue(ItemCatalogue(range(40), processor.catalogue.codes, sizes))
    wanted = numbers([[1, 2], [3, 4]], sessions=[[5], [6]])
    for form in (torch.tensor, np.array):
        for histories in (
            form([[1, 2], [3, 4]]),
            [form([1, 2]), form([3, 4])],
            [list(form([1, 2])), list(form([3, 4]))],
        ):
            got = numbers(histories, sessions=form([[5], [6]]))
            assert all(torch.equal(got[name], value) for name, value in wanted.items())
    with pytest.raises(ValueError, match="an empty batch: pass at least one history"):
        processor([])
