"""The model against a float64 recomputation, and against itself: backends, experts, caches, folded beams, precision, compilation."""

import copy

import pytest
import torch

from onerec_hf import OneRecForConditionalGeneration, OneRecModel
from tests.conftest import make_catalogue, make_model
from tests.modeling.reference import Reference
from tests.rounding import BACKWARD, ROUNDED, assert_close

VARIANTS = {
    "default": {},
    "no cross rope": {"cross_attention_rope": False},
    "causal encoder": {"encoder_is_causal": True},
    "dense": {"num_experts": 1},
    "normalised gates": {"norm_topk_prob": True},
    "grouped queries": {"num_key_value_heads": 2},
    "24 experts": {"num_experts": 24},
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_loss_and_log_probabilities_equal_float64(config, catalogue, processor):
    model = make_model(catalogue, **config)
    if model.config.num_experts > 1:  # a bias that changes the choice, so that the test sees it
        for layer in model.model.decoder.layers:
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.3)
    batch = processor([["m1", "m2", "m3"], ["m5"]], sessions=[["m4", "m6"], ["m7"]])
    reference = Reference(model)
    with torch.no_grad():
        out = model(**batch)
    losses = []
    for i in range(2):
        history = batch["input_ids"][i][batch["attention_mask"][i] == 1]
        length = int(batch["decoder_attention_mask"][i].sum())
        wanted = reference.logits(history, batch["decoder_input_ids"][i, :length]).log_softmax(-1)
        got = out.logits[i, :length].log_softmax(-1)
        assert_close(got, wanted)
        labels = batch["labels"][i, :length]
        losses += [-wanted[t, label] for t, label in enumerate(labels.tolist()) if label != -100]
    assert len(losses) == 9  # three items of three codes
    assert_close(out.loss, torch.stack(losses).mean())


def test_num_items_in_batch_divides_the_sum(model, batch):
    mean = model(**batch).loss
    assert_close(model(**batch, num_items_in_batch=torch.tensor(18)).loss, mean / 2)


def test_decoder_inputs_from_labels_equal_the_processors(model, batch):
    derived = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    real = batch["decoder_attention_mask"].bool()
    assert torch.equal(derived[real], batch["decoder_input_ids"][real])
    labels_only = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    assert_close(model(**labels_only).loss, model(**batch).loss)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(model, processor, padding):
    alone = processor([["m5", "m6"]], sessions=[["m7"]])
    pads = torch.zeros(1, 4, dtype=torch.long)
    order = (pads, alone["input_ids"]) if padding == "left" else (alone["input_ids"], pads)
    padded = torch.cat(order, 1)
    with torch.no_grad():
        wanted = model(**alone).logits
        got = model(
            input_ids=padded, attention_mask=(padded != 0).long(), decoder_input_ids=alone["decoder_input_ids"]
        ).logits
    assert_close(got, wanted)


# Flex attention's fused kernel is for compiled models; this is about its numbers.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_backends_agree(model, batch, attention):
    wanted = model(**batch).logits
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    # Flex attention without its kernels, which take a minute to compile; tests/modeling/test_packing.py compiles them.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        got = model(**batch).logits
    real = batch["decoder_attention_mask"].bool()
    assert_close(got[real], wanted[real])


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_expert_implementations_agree_in_loss_and_gradient(catalogue, batch, experts):
    def run(implementation):
        model = make_model(catalogue)
        model.set_experts_implementation(implementation)
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (wanted, wanted_gradients), (got, gradients) = run("eager"), run(experts)
    assert_close(got, wanted)
    assert_close(gradients, wanted_gradients, terms=BACKWARD)


def test_gradient_checkpointing_changes_neither_loss_gradients_nor_expert_counts(catalogue, batch):
    def run(checkpointing):
        model = make_model(catalogue).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        out = model(**batch)
        out.loss.backward()
        return out.loss.detach(), out.tokens_per_expert, {name: p.grad for name, p in model.named_parameters()}

    (loss, counts, gradients), (loss_again, counts_again, gradients_again) = run(False), run(True)
    assert torch.equal(loss, loss_again)
    assert torch.equal(counts, counts_again)
    assert_close(gradients_again, gradients, terms=BACKWARD)


def test_expert_counts_are_of_real_tokens(model, batch):
    counts = model.train()(**batch).tokens_per_expert
    real = int(batch["decoder_attention_mask"].sum())
    assert counts.shape == (2, 4)
    assert counts.sum(1).tolist() == [2 * real, 2 * real]
    assert model.eval()(**batch).tokens_per_expert is None


def test_router_bias_moves_against_the_load_and_only_the_choice(model, batch):
    model.update_router_bias(torch.tensor([[9, 1, 1, 1], [3, 3, 3, 3]]), rate=0.1)
    first, second = (layer.mlp.gate.e_score_correction_bias for layer in model.model.decoder.layers)
    assert_close(first, torch.tensor([-0.1, 0.1, 0.1, 0.1]))
    assert not second.any()
    x = torch.randn(5, 32)
    gate = model.model.decoder.layers[0].mlp.gate
    gate.e_score_correction_bias.copy_(torch.tensor([10.0, 10.0, 0, 0]))
    logits, weights, index = gate(x)
    assert index.sort(-1).values.tolist() == [[0, 1]] * 5
    assert_close(weights, logits.softmax(-1).gather(1, index))


def test_cached_steps_equal_one_pass(model, batch):
    with torch.no_grad():
        wanted = model(**batch).logits
        history = model.get_encoder()(batch["input_ids"], batch["attention_mask"])
        cache, steps = None, []
        for t in range(batch["decoder_input_ids"].shape[1]):
            out = model(
                attention_mask=batch["attention_mask"],
                encoder_outputs=history,
                decoder_input_ids=batch["decoder_input_ids"][:, t : t + 1],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    real = batch["decoder_attention_mask"].bool()
    assert_close(torch.cat(steps, 1)[real], wanted[real])


def test_folded_beams_equal_repeated_histories(model, batch):
    """Three decoder rows per user that share one encoder row give what three copies of the history give."""
    beams = batch["decoder_input_ids"].repeat_interleave(3, 0)
    beams[1::3, 1] = 5
    with torch.no_grad():
        history = model.get_encoder()(batch["input_ids"], batch["attention_mask"])
        folded = model(encoder_outputs=history, attention_mask=batch["attention_mask"], decoder_input_ids=beams).logits
        repeated = model(
            input_ids=batch["input_ids"].repeat_interleave(3, 0),
            attention_mask=batch["attention_mask"].repeat_interleave(3, 0),
            decoder_input_ids=beams,
        ).logits
    assert_close(folded, repeated)


def test_trl_layout_equals_the_plain_one(model, batch):
    """TRL scores `input_ids` and sends the history beside it: chosen rows of all users, then rejected ones."""
    decoder, mask = batch["decoder_input_ids"].repeat(2, 1), batch["decoder_attention_mask"].repeat(2, 1)
    decoder[2:, 1] = 5
    with torch.no_grad():
        got = model.model(
            input_ids=decoder,
            attention_mask=mask,
            encoder_input_ids=batch["input_ids"],
            encoder_attention_mask=batch["attention_mask"],
        ).last_hidden_state
        wanted = model.model(
            input_ids=batch["input_ids"].repeat(2, 1),
            attention_mask=batch["attention_mask"].repeat(2, 1),
            decoder_input_ids=decoder,
            decoder_attention_mask=mask,
        ).last_hidden_state
    assert_close(got, wanted)


def test_router_logits_and_aux_loss(model, batch):
    out = model(**batch, output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(14, 4), (14, 4)]
    plain = model(**batch).loss
    assert_close(out.loss, plain + model.config.router_aux_loss_coef * out.aux_loss)


def test_hidden_states_and_attentions(model, batch):
    model.set_attn_implementation("eager")
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.decoder_hidden_states) == len(out.encoder_hidden_states) == 3
    assert [tuple(a.shape) for a in out.cross_attentions] == [(2, 4, 7, 12)] * 2
    assert_close(out.cross_attentions[0].sum(-1), torch.ones(2, 4, 7))


def test_bfloat16(catalogue, batch, tmp_path):
    model = make_model(catalogue, initializer_range=0.05)
    wanted = model(**batch).loss
    model.save_pretrained(tmp_path)
    low = OneRecForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.lm_head.weight.dtype == torch.bfloat16
    assert low.model.decoder.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert_close(low(**batch).loss, wanted, ROUNDED, dtype=torch.bfloat16)


@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(model, batch, training):
    model.train(training)
    wanted = model(**batch)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    got = compiled(**batch)
    assert_close(got.loss, wanted.loss)
    if training:
        assert torch.equal(got.tokens_per_expert, wanted.tokens_per_expert)
        got.loss.backward()


def test_tied_embeddings_survive_saving(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = OneRecForConditionalGeneration.from_pretrained(tmp_path)
    table = loaded.lm_head.weight
    assert table is loaded.model.encoder.embed_tokens.weight
    assert table is loaded.model.decoder.embed_tokens.weight
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_every_parameter_gets_a_gradient(batch):
    catalogue = make_catalogue()
    model = make_model(catalogue, num_experts=2)  # top-2 of 2: every expert is used
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_backbone_needs_exactly_one_input(model):
    assert isinstance(model.model, OneRecModel)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(decoder_input_ids=torch.tensor([[1]]))
