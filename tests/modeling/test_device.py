"""Generation on an accelerator: no waits for the device inside a session, and the answers of the CPU."""

import traceback
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from onerec_hf import OneRecProcessor
from onerec_hf.modeling import generation_onerec
from onerec_hf.modeling.beam_search import beam_search
from tests.conftest import make_catalogue, make_model

CATALOGUE = make_catalogue()
HISTORIES = [["m1", "m2", "m7"], ["m3"]]
REQUESTS = {
    "beams": {},
    "sampled": {"do_sample": True},
    "exclude": {"exclude": HISTORIES},
    "allow": {"allow": [[f"m{i}" for i in range(12)]] * 2},
    "diverse": {"diversity": 1.0},
    "item scores": {"item_score_weight": 1.0},
}
# Results whose size or value only the data tell: with each of them the host waits for an accelerator.
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "bincount", "equal"}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make(device="cpu", dtype=torch.float32):
    model = make_model(CATALOGUE, seed=3, item_head={"num_items": len(CATALOGUE), "loss_weight": 1.0})
    model.set_experts_implementation("grouped_mm")  # that of accelerators
    return model.to(device, dtype)


def answers(model, **request):
    inputs = OneRecProcessor.from_catalogue(CATALOGUE)(HISTORIES).to(model.device)
    options = {"num_beams": 8, "num_return_sequences": 4, "session_length": 3, **request}
    if options.get("do_sample"):
        options["generator"] = torch.Generator(model.device).manual_seed(0)
    return model.recommend(**inputs, **options, return_dict_in_generate=True)


class Waits(TorchDispatchMode):
    """Notes the operators of WAITS and the line of ours that calls them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        by_mask = name.startswith("index") and any(
            isinstance(each, torch.Tensor) and each.dtype == torch.bool
            for each in (args[1] if isinstance(args[1], list | tuple) else [])
        )
        if name in WAITS or by_mask:
            ours = [frame for frame in traceback.extract_stack() if "modeling" in Path(frame.filename).parts]
            self.found.append(f"{name} in {Path(ours[-1].filename).name}:{ours[-1].lineno}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_a_session_is_searched_without_waiting(request_):
    waits, model = Waits(), make()

    def audited(*args, **kwargs):
        with waits:
            return beam_search(*args, **kwargs)

    with patch.object(generation_onerec, "beam_search", audited):
        answers(model, **request_)
    assert waits.found == []


def test_the_audit_notices_waits():
    with Waits() as waits:
        values = torch.tensor([1.0, 2.0])
        values[values > 1]
        values.sum().item()
        (values > 1).nonzero()
    assert [each.split()[0] for each in waits.found] == ["index", "_local_scalar_dense", "nonzero"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("request_", [request for name, request in REQUESTS.items() if name != "sampled"])
def test_float32_answers_are_those_of_the_cpu(request_):
    expected, found = answers(make(), **request_), answers(make("cuda"), **request_)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    torch.testing.assert_close(found.sequences_scores.cpu(), expected.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_bfloat16_scores_are_near_those_of_float32():
    expected, found = answers(make("cuda")), answers(make("cuda", torch.bfloat16))
    # bfloat16 has 8 bits; a score is a sum of nine log-probabilities behind four layers.
    torch.testing.assert_close(found.sequences_scores.float(), expected.sequences_scores, rtol=0.05, atol=0.3)


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_answer_as_eager_steps_do():
    model = make("cuda")
    expected = answers(model)
    model.generation_config.compile_config = CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead")
    for _ in range(3):  # compiled, recorded, replayed
        found = answers(model)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_cuda_never_waits_inside_a_session(request_):
    model = make("cuda", torch.bfloat16)  # in float32, torch's grouped product reads the experts' counts on the host

    def strict(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return beam_search(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with patch.object(generation_onerec, "beam_search", strict):
        answers(model, **request_)
