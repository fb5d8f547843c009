"""OneRec-V2: the lazy decoder against its formulas in float64, brute force, transformers' beam search, single windows; files and bad configs."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM

from onerec_hf import OneRecProcessor, OneRecV2Config, OneRecV2ForConditionalGeneration, OneRecV2Model
from onerec_hf.data import PackedDataCollator, PackedDataset
from onerec_hf.modeling.beam_search import beam_search
from onerec_hf.modeling.layers_onerec import rotate
from onerec_hf.modeling.modeling_onerec_v2 import LazyBeamDecoder
from tests.conftest import make_catalogue
from tests.modeling.reference import Reference
from tests.rounding import BACKWARD, assert_close, close

CATALOGUE = make_catalogue(14, (3, 3, 4), seed=1)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)
HISTORIES = [["m1", "m9", "m3"], ["m2"], ["m4", "m5"]]
TARGETS = [["m7"], ["m0"], ["m11"]]
VARIANTS = {
    "plain": {},
    "all options": {
        "context_groups": 2,
        "context_split": 2,
        "context_layers": 2,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "first_dense_layers": 1,
        "num_shared_experts": 2,
        "tie_word_embeddings": False,
    },
    "one group of tokens": {
        "context_groups": 1,
        "encoder_pools_items": False,
        "num_experts": 4,
        "num_shared_experts": 0,
    },
    "item vectors, no rope": {"cross_attention_rope": False, "item_head": {"num_items": 14, "loss_weight": 0}},
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def make_lazy(seed=0, **config) -> OneRecV2ForConditionalGeneration:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "decoder_layers": 3,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
        "dropout_rate": 0.0,
    }
    torch.manual_seed(seed)
    model = OneRecV2ForConditionalGeneration(
        OneRecV2Config(codebook_sizes=CATALOGUE.codebook_sizes, **{**settings, **config})
    )
    with torch.no_grad():  # norms of one would hide a wrong one
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    model.set_catalogue(CATALOGUE)
    return model.eval()


class Lazy(Reference):
    """The formulas of arXiv 2508.20900, section 2, in float64: one user, no padding, no cache, no shared code with the model."""

    def norm(self, weight, x):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def swiglu(self, name, x):
        gate, up, down = (self.weights[f"{name}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
        return (F.silu(x @ gate) * (x @ up)) @ down

    def feed_forward(self, name, x):
        if f"{name}.gate.weight" not in self.weights:
            return self.swiglu(name, x)
        out = self.swiglu(f"{name}.shared_expert", x) if self.config.num_shared_experts else torch.zeros_like(x)
        scores = (x @ self.weights[f"{name}.gate.weight"].T).softmax(-1)
        for t in range(len(x)):
            for expert in scores[t].argsort(descending=True)[: self.config.num_experts_per_tok]:
                g, u = (self.weights[f"{name}.experts.gate_up_proj"][expert] @ x[t]).chunk(2)
                out[t] += scores[t, expert] * (self.weights[f"{name}.experts.down_proj"][expert] @ (F.silu(g) * u))
        return out

    def attend(self, q, k, v, group_of_head, visible):
        heads = []
        for head in range(q.shape[1]):
            group = group_of_head(head)
            scores = q[:, head] @ k[:, group].T / math.sqrt(q.shape[-1])
            heads.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[:, group])
        return torch.cat(heads, -1)

    def context(self, history):
        x = self.weights["model.encoder.embed_tokens.weight"][history]
        if self.config.item_head is not None:
            codes = history.view(-1, 4)[:, 1:] - torch.tensor(self.config.level_offsets)
            order = sorted(
                map(tuple, CATALOGUE.codes.tolist())
            )  # the vectors are in the order of their items' codes, behind one for none
            x[::4] += self.weights["model.encoder.item_head.vectors.weight"][
                [1 + order.index(tuple(c)) for c in codes.tolist()]
            ]
        if self.config.encoder_pools_items:
            x = x.view(-1, 4, x.shape[-1]).sum(1)
        return x @ self.weights["model.encoder.context_proj.weight"].T

    def log_probabilities(self, history, session):
        """Per position of the decoder inputs `session`, those of its level's codes."""
        config, weights = self.config, self.weights
        size, heads, groups = config.head_dim, config.num_attention_heads, config.context_groups
        context = self.context(history)
        slices = [
            self.norm(weights[f"model.decoder.context_layernorm.{i}.weight"], part).view(-1, groups, size)
            for i, part in enumerate(context.split(groups * size, -1))
        ]
        x = weights["model.decoder.embed_tokens.weight"][session]
        at, keys = torch.arange(len(session)), torch.arange(len(context))
        causal = torch.ones(len(at), len(at), dtype=torch.bool).tril()
        for layer in range(config.decoder_layers):
            name = f"model.decoder.layers.{layer}"
            h = self.norm(weights[f"{name}.cross_attn_layernorm.weight"], x)
            shared = layer * config.context_layers // config.decoder_layers
            k, v = (slices[shared * config.context_split + i] for i in (0, config.context_split - 1))
            q = (h @ weights[f"{name}.cross_attn.q_proj.weight"].T).view(-1, heads, size)
            if config.cross_attention_rope:
                q, k = self._rotate(q, at + len(context)), self._rotate(k, keys)
            every = torch.ones(len(at), len(keys), dtype=torch.bool)
            out = self.attend(q, k, v, lambda head: head % groups, every)
            x = x + out @ weights[f"{name}.cross_attn.o_proj.weight"].T
            h = self.norm(weights[f"{name}.input_layernorm.weight"], x)
            q, k, v = ((h @ weights[f"{name}.self_attn.{p}_proj.weight"].T).view(len(at), -1, size) for p in "qkv")
            repeats = heads // config.num_key_value_heads
            k, v = (part.repeat_interleave(repeats, 1) for part in (self._rotate(k, at), v))
            out = self.attend(self._rotate(q, at), k, v, lambda head: head, causal)
            x = x + out @ weights[f"{name}.self_attn.o_proj.weight"].T
            x = x + self.feed_forward(f"{name}.mlp", self.norm(weights[f"{name}.post_attention_layernorm.weight"], x))
        found = []
        for place in range(len(session)):
            level = place % 4
            if level == 3:  # complete: BOS is given
                found.append(None)
                continue
            start = config.level_offsets[level]
            head = weights["lm_head.weight"][start : start + config.codebook_sizes[level]]
            found.append((self.norm(weights["model.decoder.norm.weight"][level], x[place]) @ head.T).log_softmax(-1))
        return found

    def score(self, history, items):
        codes = CATALOGUE.codes[CATALOGUE.indices(items)].tolist()
        tokens = [
            t for item in codes for t in [1, *(c + o for c, o in zip(item, self.config.level_offsets, strict=True))]
        ]
        found = self.log_probabilities(history, torch.tensor(tokens[:-1]))
        return sum(found[4 * i + level][code] for i, item in enumerate(codes) for level, code in enumerate(item))


def history_tokens(history):
    return PROCESSOR([history])["input_ids"][0]


@each_variant
def test_loss_equals_float64(config):
    model = make_lazy(**config)
    wanted = -sum(Lazy(model).score(history_tokens(h), t) for h, t in zip(HISTORIES, TARGETS, strict=True)) / 9
    with torch.no_grad():
        out = model(**PROCESSOR(HISTORIES, sessions=TARGETS))
    assert_close(out.loss, wanted)
    # A softmax over the vocabulary is one over the level.
    labels = PROCESSOR(HISTORIES, sessions=TARGETS)["labels"]
    picked = out.logits.log_softmax(-1).gather(-1, labels[..., None])
    assert_close(-picked.mean(), wanted)
    assert (out.logits.isfinite().sum(-1) == torch.tensor([3, 3, 4])).all()


@each_variant
def test_recommend_equals_brute_force_and_generate(config):
    model, reference = make_lazy(**config), Lazy(make_lazy(**config))
    inputs = PROCESSOR(HISTORIES)
    found = model.recommend(**inputs, num_beams=14, num_return_sequences=14, return_dict_in_generate=True)
    scores = {
        (user, item): float(reference.score(history_tokens(history), [item]))
        for user, history in enumerate(HISTORIES)
        for item in CATALOGUE.item_ids
    }
    items = [session[0] for session in PROCESSOR.batch_decode(found)]
    assert [scores[row // 14, item] for row, item in enumerate(items)] == close(found.sequences_scores.tolist())
    for user in range(3):
        best = sorted((value for (of, _), value in scores.items() if of == user), reverse=True)
        assert best == close(found.sequences_scores[user * 14 : user * 14 + 14].tolist())
    slow = model.generate(
        **inputs,
        num_beams=14,
        num_return_sequences=14,
        max_new_tokens=3,
        length_penalty=0.0,
        output_scores=True,  # not by the fast path
        return_dict_in_generate=True,
    )
    assert torch.equal(slow.sequences, found.sequences)
    assert_close(slow.sequences_scores, found.sequences_scores)


@each_variant
def test_sessions_of_two_items_equal_float64_and_generate(config):
    model, reference = make_lazy(**config), Lazy(make_lazy(**config))
    inputs = PROCESSOR(HISTORIES)
    found = model.recommend(
        **inputs, session_length=2, num_beams=6, num_return_sequences=2, return_dict_in_generate=True
    )
    for row, items in enumerate(PROCESSOR.batch_decode(found)):
        wanted = float(reference.score(history_tokens(HISTORIES[row // 2]), items))
        assert float(found.sequences_scores[row]) == close(wanted)
    slow = model.generate(
        **inputs,
        num_beams=6,
        num_return_sequences=2,
        max_new_tokens=7,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(slow.sequences, found.sequences)
    assert_close(slow.sequences_scores, found.sequences_scores)


def test_padding_and_the_order_of_users_change_nothing():
    model = make_lazy(**VARIANTS["all options"])
    batch = PROCESSOR(HISTORIES, sessions=TARGETS)
    with torch.no_grad():
        together = model(**batch).logits
        for row, (history, target) in enumerate(zip(HISTORIES, TARGETS, strict=True)):
            assert_close(model(**PROCESSOR([history], sessions=[target])).logits[0], together[row])
        order = torch.tensor([2, 0, 1])
        permuted = {name: value[order] for name, value in batch.items()}
        assert_close(model(**permuted).logits, together[order])
        padded = dict(batch)
        for name in ("input_ids", "attention_mask"):
            padded[name] = F.pad(batch[name], (8, 0))
        assert_close(model(**padded).logits, together)


PREFIXES = [
    {"history": ["m1", "m2", "m3"], "sessions": [["m2"], ["m3", "m9"], ["m9"]], "history_lengths": [1, 2, 3]},
    {"history": ["m5"], "sessions": [["m7"]], "history_lengths": [1]},
    {"history": ["m4", "m6", "m5", "m0"], "sessions": [["m5"], ["m11", "m12"]], "history_lengths": [2, 4]},
]


@each_variant
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_prefixes_equal_their_windows(config, attention):
    """Loss and every gradient; the context of a prefix is a range of the whole history's."""
    model = make_lazy(**config)
    model.set_attn_implementation(attention)
    packed = PackedDataset(Dataset.from_list(PREFIXES), 8)
    collator = PackedDataCollator(
        PROCESSOR, True, items=packed.items, slots=packed.slots, session_items=packed.session_items
    )
    rows = collator([packed[i] for i in range(len(packed))])
    assert rows["segment_ids"].max() > 1
    windows = [
        PROCESSOR([example["history"][:length]], sessions=[session])
        for example in PREFIXES
        for length, session in zip(example["history_lengths"], example["sessions"], strict=True)
    ]

    def losses(batches):
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = model(**batch, num_items_in_batch=torch.tensor(24.0)).loss
            loss.backward()
            total += loss.detach()
        return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    (wanted, wanted_gradients), (loss, gradients) = losses(windows), losses([rows])
    assert_close(loss, wanted)
    assert_close(gradients, wanted_gradients, terms=BACKWARD)


@each_variant
def test_every_parameter_learns(config):
    model = make_lazy(**config).train()
    model(**PROCESSOR(HISTORIES, sessions=[["m7", "m1"], ["m0"], ["m11"]])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    if model.config.num_experts > 1:
        counts = model(**PROCESSOR(HISTORIES, sessions=TARGETS)).tokens_per_expert
        assert counts.shape == (model.config.sparse_layers, 4)
        assert counts.sum(1).tolist() == [9 * 2] * model.config.sparse_layers
        before = model.model.decoder.layers[-1].mlp.gate.e_score_correction_bias.clone()
        model.update_router_bias(counts, 0.1)
        assert not torch.equal(model.model.decoder.layers[-1].mlp.gate.e_score_correction_bias, before)


def test_gradient_checkpointing_and_label_smoothing():
    model, batch = make_lazy(**VARIANTS["all options"]).train(), PROCESSOR(HISTORIES, sessions=TARGETS)
    model(**batch).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    assert_close({name: p.grad for name, p in model.named_parameters()}, wanted, terms=BACKWARD)
    # Smoothing spreads probability over the codes of a level.
    out, smoothed = model(**batch), model(**batch, smoothing=0.3).loss
    levels = [out.logits[:, level][out.logits[:, level].isfinite()].view(3, -1) for level in range(3)]
    spread = -torch.stack([level.log_softmax(-1).mean() for level in levels]).mean()
    assert_close(smoothed, 0.7 * out.loss + 0.3 * spread)


def test_attentions_are_those_of_heads():
    model, batch = make_lazy(**VARIANTS["all options"]), PROCESSOR(HISTORIES, sessions=TARGETS)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**batch, output_attentions=True)
    for weights in out.cross_attentions:
        assert weights.shape == (3, 4, 3, 3)
        assert_close(weights.sum(-1), torch.ones(3, 4, 3))
    weights = out.cross_attentions[0]
    # Heads 0 and 2 read the same group of keys; the first query of the first user recomputed from the projections.
    decoder, context = model.get_decoder(), out.encoder_last_hidden_state[:1]
    layer, places = decoder.layers[0], torch.arange(3)[None]
    rope = decoder.rotary_emb(context, places)
    key = decoder.keys_values(context, tuple(part.unsqueeze(-2) for part in rope))[0][0][0]
    hidden = layer.cross_attn_layernorm(decoder.embed_tokens(torch.tensor([[1]])))
    query = layer.cross_attn.q_proj(hidden).view(4, 8)
    cos, sin = (part[0] for part in decoder.rotary_emb(context, torch.tensor([[3]])))
    for head in range(4):
        scores = key[head % 2] @ rotate(query[head : head + 1], cos, sin)[0] * 8**-0.5
        assert_close(weights[0, head, 0], scores.softmax(-1))


def test_beams_share_the_context():
    """Keys and values exist once per set and user, whatever the number of layers and beams."""
    model = make_lazy(**VARIANTS["all options"])
    context = model.get_encoder()(**PROCESSOR(HISTORIES)).last_hidden_state
    assert context.shape == (3, 3, 2 * 2 * 2 * 8)
    decoder = model._beam_decoder(model.get_decoder(), context, None, 50, 7)
    assert [tuple(part.shape) for pair in decoder._cross for part in pair] == [(3, 2, 3, 8)] * 4


def test_static_shapes_and_wrapped_heads_answer_alike():
    model = make_lazy(**VARIANTS["all options"])
    inputs, constraint = PROCESSOR(HISTORIES), model._constraint(None, None, True)
    mask = inputs["attention_mask"][:, ::4]
    with torch.no_grad():
        context = model.get_encoder()(**inputs).last_hidden_state
        found = [
            beam_search(LazyBeamDecoder(model.get_decoder(), context, mask, 6, 7, static), head, constraint, 6, 2)
            for static in (False, True)
            for head in (model.lm_head, torch.nn.Sequential(model.lm_head))
        ]
        for other in found[1:]:
            assert torch.equal(other.leaves, found[0].leaves)
            assert_close(other.scores, found[0].scores)
        wanted = model(**PROCESSOR(HISTORIES, sessions=TARGETS))
        model.lm_head = torch.nn.Sequential(model.lm_head)
        again = model(**PROCESSOR(HISTORIES, sessions=TARGETS))
    assert_close(again.logits, wanted.logits)


def test_files_and_auto_classes(tmp_path):
    model = make_lazy(**VARIANTS["all options"])
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    assert (tmp_path / "code" / "modeling_onerec_v2.py").is_file()
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is OneRecV2Config
    assert config.auto_map["AutoModel"] == "code/modeling_onerec_v2.OneRecV2Model"
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is OneRecV2ForConditionalGeneration
    assert loaded.catalogue.hash == CATALOGUE.hash
    assert type(AutoModel.from_pretrained(tmp_path)) is OneRecV2Model
    batch = PROCESSOR(HISTORIES, sessions=TARGETS)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert torch.equal(loaded.recommend(**PROCESSOR(HISTORIES)), model.recommend(**PROCESSOR(HISTORIES)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encoder_layers": 2}, "encoder_layers=2: OneRec-V2 has no encoder layers"),
        ({"encoder_is_causal": False}, "encoder_is_causal=False: OneRec-V2 has no encoder layers"),
        ({"context_split": 3}, "context_split=3: choose 1"),
        ({"context_layers": 4}, "context_layers=4 must lie between 1 and decoder_layers=3"),
        ({"context_layers": 0}, "context_layers=0 must lie between 1"),
        ({"context_groups": 3}, "context_groups=3 must divide num_attention_heads=4"),
        ({"num_experts": 4, "first_dense_layers": 3}, "first_dense_layers=3 leaves no block with experts"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must lie between"),
        ({"item_head": {"num_items": 14}}, "OneRec-V2 has no state of a history to score items by"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(Exception, match=message) as caught:
        make_lazy(**config)
    assert isinstance(caught.value.__cause__ or caught.value, ValueError)
