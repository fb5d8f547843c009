"""The default experts implementation beside transformers' own: the same numbers, whichever path it takes."""

import pytest
import torch

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.modeling import cpu_experts as cpu_experts
from onerec_hf.modeling.layers_onerec import OneRecSparseMoeBlock
from tests.conftest import make_catalogue, make_model
from tests.rounding import BACKWARD, ROUNDED, assert_close


def make_block(implementation, **config):
    settings = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 6, "codebook_sizes": [4, 4]}
    config = OneRecConfig(**{**settings, **config})
    config._experts_implementation_internal = implementation
    torch.manual_seed(0)
    block = OneRecSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_without_gradients_it_equals_the_loop(tokens, activation, k):
    blocks = [make_block(name, hidden_act=activation, num_experts_per_tok=k) for name in ("onerec", "eager")]
    states = torch.randn(2, tokens, 32)
    with torch.no_grad():
        ours, loop = (block(states)[0] for block in blocks)
    assert_close(ours, loop)


def test_bfloat16_equals_the_loop_within_its_precision():
    blocks = [make_block(name).to(torch.bfloat16) for name in ("onerec", "eager")]
    states = torch.randn(1, 50, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        ours, loop = (block(states)[0] for block in blocks)
    assert_close(ours, loop, ROUNDED)


def test_where_onednn_is_absent_the_product_is_torchs(monkeypatch):
    states, weight = torch.randn(5, 8), torch.randn(3, 8)
    by_onednn = cpu_experts.product(states, weight)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert_close(cpu_experts.product(states, weight), by_onednn)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("frozen", [None, "experts.gate_up_proj", "experts.down_proj", "gate.weight"])
def test_gradients_equal_the_loops(k, tokens, frozen):
    """Of the states, the gates and both weights; with two tokens some experts have none, and their gradient is zero."""
    gradients = []
    for name in ("onerec", "eager"):
        block = make_block(name, num_experts_per_tok=k).train()
        for key, parameter in block.named_parameters():
            parameter.requires_grad_(key != frozen)
        torch.manual_seed(1)
        states = torch.randn(1, tokens, 32, requires_grad=True)
        block(states)[0].sin().sum().backward()
        gradients.append(
            {"states": states.grad} | {key: parameter.grad for key, parameter in block.named_parameters()}
        )
    for found in gradients:
        assert frozen is None or found.pop(frozen) is None
    assert_close(*gradients, terms=BACKWARD)


def test_autocast_and_compilation_go_another_way_with_the_same_result():
    block, states = make_block("onerec"), torch.randn(1, 20, 32)
    plain = block(states)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(block(states)[0], plain, ROUNDED, dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(states)[0]
    assert_close(compiled, plain)


def test_it_is_the_default_and_another_can_be_asked_for(tmp_path):
    model = make_model(make_catalogue())
    assert model.config._experts_implementation == "onerec"
    model.save_pretrained(tmp_path)
    assert OneRecForConditionalGeneration.from_pretrained(tmp_path).config._experts_implementation == "onerec"
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.config._experts_implementation == "eager"
    loaded.set_experts_implementation("grouped_mm")
    assert loaded.config._experts_implementation == "grouped_mm"


def test_packed_weights_give_the_same_and_changed_ones_are_noticed():
    catalogue = make_catalogue()
    model, processor = make_model(catalogue), OneRecProcessor.from_catalogue(catalogue)
    arguments = {**processor([["m1", "m2"], ["m3"]]), "num_beams": 6, "num_return_sequences": 6}
    arguments["return_dict_in_generate"] = True
    experts = model.model.decoder.layers[0].mlp.experts
    plain = model.recommend(**arguments)
    with model.packed_experts():
        assert experts.packed.holds(experts.gate_up_proj, experts.down_proj)
        packed = model.recommend(**arguments)
        assert_close(packed.sequences_scores, plain.sequences_scores)
        assert torch.equal(packed.sequences, plain.sequences)
        with torch.no_grad():
            experts.down_proj.mul_(-3)
        changed = model.recommend(**arguments)
    assert experts.packed is None
    assert not torch.allclose(changed.sequences_scores, plain.sequences_scores)
    assert_close(changed.sequences_scores, model.recommend(**arguments).sequences_scores)


def test_packed_weights_do_not_hide_an_adapter():
    from peft import LoraConfig, get_peft_model

    catalogue = make_catalogue()
    model, processor = make_model(catalogue), OneRecProcessor.from_catalogue(catalogue)
    config = LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).get_base_model()
    arguments = {**processor([["m1", "m2"]]), "num_beams": 4, "return_dict_in_generate": True}
    expected = adapted.recommend(**arguments).sequences_scores
    with adapted.packed_experts():
        assert_close(adapted.recommend(**arguments).sequences_scores, expected)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU packs no bfloat16")
def test_packed_bfloat16_weights_give_the_same():
    catalogue = make_catalogue()
    model, processor = make_model(catalogue).to(torch.bfloat16), OneRecProcessor.from_catalogue(catalogue)
    arguments = {**processor([["m1", "m2"], ["m3"]]), "num_beams": 6, "return_dict_in_generate": True}
    layer = model.model.decoder.layers[0]
    plain = model.recommend(**arguments)
    with model.packed_experts():
        assert layer.mlp.experts.packed is not None
        assert layer.self_attn.q_proj.packed is not None
        packed = model.recommend(**arguments)
        assert_close(packed.sequences_scores, plain.sequences_scores, ROUNDED, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.self_attn.v_proj.weight.mul_(-3)
        changed = model.recommend(**arguments)
    assert layer.self_attn.q_proj.packed is None
    assert_close(
        changed.sequences_scores, model.recommend(**arguments).sequences_scores, ROUNDED, dtype=torch.bfloat16
    )
    assert not torch.allclose(changed.sequences_scores, plain.sequences_scores, rtol=0.05)


def test_packing_does_nothing_for_other_dtypes():
    model = make_model(make_catalogue()).double()
    with model.packed_experts():
        assert model.model.decoder.layers[0].mlp.experts.packed is None


@pytest.mark.parametrize("frozen", [None, "weight", "states"])
@pytest.mark.parametrize("shape", [(3, 12, 32), (40, 32), (2, 32)])
def test_linear_layers_equal_torchs_forward_and_backward(monkeypatch, shape, frozen):
    monkeypatch.setattr(cpu_experts, "onednn_is_faster", lambda: True)
    ours, torchs = cpu_experts.OneRecLinear(32, 24, bias=False), torch.nn.Linear(32, 24, bias=False)
    torchs.load_state_dict(ours.state_dict())
    found = []
    for layer in (ours, torchs):
        torch.manual_seed(0)
        states = torch.randn(shape, requires_grad=frozen != "states")
        layer.weight.requires_grad_(frozen != "weight")
        out = layer(states)
        out.sin().sum().backward()
        found.append([out.detach()] + [each.grad for each in (states, layer.weight) if each.grad is not None])
    assert [len(each) for each in found] == [3 if frozen is None else 2] * 2
    for got, wanted in zip(*found, strict=True):
        assert_close(got, wanted, terms=BACKWARD)


def test_linear_layers_use_onednn_only_where_it_is_faster(monkeypatch):
    called = []
    monkeypatch.setattr(cpu_experts, "_onednn", lambda states, weight: called.append(1) or states @ weight.T)
    layer, states = cpu_experts.OneRecLinear(32, 24, bias=False), torch.randn(64, 32)
    for faster in (False, True):
        monkeypatch.setattr(cpu_experts, "onednn_is_faster", lambda faster=faster: faster)
        layer(states)
        assert len(called) == faster
    layer.double()(states.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.float()(states)
    assert len(called) == 1


def test_where_onednn_is_absent_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not cpu_experts.onednn_is_faster.__wrapped__()
    assert not cpu_experts.bfloat16_is_faster.__wrapped__(256)


def test_auto_is_the_faster_dtype(monkeypatch):
    for faster, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(cpu_experts, "bfloat16_is_faster", lambda width, faster=faster: faster)
        assert cpu_experts.inference_dtype("auto", 256) == wanted
    with pytest.raises(ValueError, match="'int4': choose one of auto, float32, bfloat16"):
        cpu_experts.inference_dtype("int4", 256)
