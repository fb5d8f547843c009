"""The decoding loop behind `recommend()` and `generate()`: against transformers' beam search, brute force, exact ties and sampling theory."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CompileConfig
from transformers.generation import GenerationMixin

from onerec_hf import OneRecProcessor
from onerec_hf.modeling import beam_search as beam_search_file
from onerec_hf.modeling import generation_onerec
from onerec_hf.modeling.top_candidates import top_candidates
from tests.conftest import make_catalogue, make_model
from tests.modeling.reference import Reference
from tests.rounding import ROUNDED, assert_close, close

CATALOGUE = make_catalogue(14, (3, 3, 4), seed=1)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE)
HISTORIES = [["m1", "m9", "m3"], ["m2"], ["m4", "m5"]]


def recommend(model, histories=HISTORIES, processor=PROCESSOR, **arguments):
    """Per history, its (score, session) pairs."""
    count = arguments.setdefault("num_return_sequences", arguments.get("num_beams", 1))
    out = model.recommend(**processor(histories), return_dict_in_generate=True, **arguments)
    pairs = list(zip(out.sequences_scores.tolist(), processor.batch_decode(out), strict=True))
    return [pairs[i : i + count] for i in range(0, len(pairs), count)]


def assert_same_ranking(found, wanted):
    """The same scores, and the same sessions but where rounding may swap two."""
    assert_close([score for score, _ in found], [score for score, _ in wanted])
    by_session = {tuple(session): score for score, session in wanted}
    for (score, session), (_, other) in zip(found, wanted, strict=True):
        assert session == other or score == close(by_session[tuple(session)])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=60),
    st.integers(1, 70),
    st.integers(1, 40),
)
def test_top_candidates_is_a_stable_sort(values, k, copies):
    for scores in (torch.tensor([values, values[::-1]]), torch.tensor([values, values[::-1]]).repeat(1, copies)):
        want_values, want_places = scores.sort(dim=1, descending=True, stable=True)
        got_values, got_places = top_candidates(scores, k)
        assert torch.equal(got_values, want_values[:, :k])
        assert torch.equal(got_places, want_places[:, :k])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_candidates_of_many_by_blocks(k):
    torch.manual_seed(0)
    scores = torch.randint(0, 50, (3, 16 * k * 64 + 37)).float()
    want = scores.sort(dim=1, descending=True, stable=True)
    values, places = top_candidates(scores, k)
    assert torch.equal(values, want.values[:, :k])
    assert torch.equal(places, want.indices[:, :k])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_transformers_beam_search(data):
    """Any catalogue, model and batch: the same sessions in the same order, with the same scores."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), label="sizes")
    possible = math.prod(sizes)
    catalogue = make_catalogue(data.draw(st.integers(1, min(possible, 30)), label="items"), sizes, seed=possible)
    model = make_model(
        catalogue,
        seed=data.draw(st.integers(0, 5)),
        num_experts=data.draw(st.sampled_from([1, 4])),
        num_key_value_heads=data.draw(st.sampled_from([2, 4])),
        cross_attention_rope=data.draw(st.booleans()),
        encoder_is_causal=data.draw(st.booleans()),
        encoder_pools_items=data.draw(st.booleans()),
    )
    processor = OneRecProcessor.from_catalogue(catalogue)
    items = st.sampled_from(catalogue.item_ids)
    inputs = processor(data.draw(st.lists(st.lists(items, min_size=1, max_size=5), min_size=1, max_size=3)))
    beams, length = data.draw(st.integers(1, 40), label="beams"), data.draw(st.integers(1, 3), label="length")
    offsets, width = model.config.level_offsets, len(sizes) + 1
    legal = {tuple(c + o for c, o in zip(code, offsets, strict=True)) for code in catalogue.codes.tolist()}

    def allowed(_, tokens):
        level = (len(tokens) - 1) % width
        if level == width - 1:
            return [1]
        prefix = tuple(tokens[len(tokens) - level :].tolist())
        return sorted({item[level] for item in legal if item[:level] == prefix}) or [0]  # dead beams go on somehow

    # Over several items the prefix function would also score BOS, which is given; there the peer has our logits processor.
    by_prefix = {"constrained": False, "prefix_allowed_tokens_fn": allowed}
    theirs = model.generate(
        **inputs,
        **(by_prefix if length == 1 else {"distinct": False}),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=length * width - 1,
        length_penalty=0.0,
        eos_token_id=None,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ours = model.recommend(
        **inputs,
        num_beams=beams,
        num_return_sequences=beams,
        session_length=length,
        distinct=False,
        return_dict_in_generate=True,
    )
    scores = ours.sequences_scores.view(-1, beams)
    assert (scores.diff(dim=1) <= 0).all() or beams == 1 or scores.isinf().any()
    if beams == 1:
        assert torch.equal(ours.sequences, theirs.sequences)
        return
    found = ours.sequences_scores > -math.inf
    assert_close(ours.sequences_scores[found], theirs.sequences_scores[found])
    # Their dead beams have large negative numbers where ours say that there is nothing.
    assert (theirs.sequences_scores[~found] < -1e6).all()
    apart = torch.full_like(scores, math.inf)
    gaps = scores[:, :-1] - scores[:, 1:]
    apart[:, :-1] = gaps
    apart[:, 1:] = torch.minimum(apart[:, 1:], gaps)
    clear = found & (apart.flatten() > 1e-3)
    assert torch.equal(ours.sequences[clear], theirs.sequences[clear])


def legal_sessions(model, history, length, allowed):
    """Log-probabilities (model's own; sampled from) of every session of distinct allowed items, by walking the tree in float64."""
    reference, tokens = Reference(model), PROCESSOR([history])["input_ids"][0]
    offsets, codes = model.config.level_offsets, CATALOGUE.codes.tolist()
    rows = {CATALOGUE.item_ids.index(item) for item in allowed}
    found = []

    def walk(session, written, prefix, score, sampled_from):
        level = len(prefix)
        if level == 3:
            row = next(r for r in rows if codes[r] == prefix)
            if len(session) + 1 == length:
                found.append((score, sampled_from, [*(CATALOGUE.item_ids[r] for r in [*session, row])]))
                return
            walk([*session, row], [*written, 1], [], score, sampled_from)
            return
        left = [codes[r] for r in rows if r not in session and codes[r][:level] == prefix]
        choices = sorted({code[level] for code in left})
        logits = reference.logits(tokens, torch.tensor(written))[-1]
        own = logits.log_softmax(-1)
        held = logits[[c + offsets[level] for c in choices]].log_softmax(-1)
        for code, log_probability in zip(choices, held.tolist(), strict=True):
            token = code + offsets[level]
            walk(
                session,
                [*written, token],
                [*prefix, code],
                score + float(own[token]),
                sampled_from + log_probability,
            )

    walk([], [1], [], 0.0, 0.0)
    return sorted(found, reverse=True)


MODEL = make_model(CATALOGUE, seed=3)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.sampled_from(CATALOGUE.item_ids), min_size=2, max_size=14, unique=True),
    st.lists(st.sampled_from(CATALOGUE.item_ids), max_size=10, unique=True),
    st.integers(1, 2),
)
def test_allowed_less_excluded_items_equal_brute_force(allow, exclude, length):
    left = [item for item in allow if item not in exclude]
    arguments = {"allow": [allow], "exclude": [exclude] * 2, "session_length": length, "num_beams": 200}
    if not left:
        with pytest.raises(ValueError, match="of user 0 leave none of the 14 items"):
            recommend(MODEL, HISTORIES[:2], **arguments)
        return
    answers = recommend(MODEL, HISTORIES[:2], **arguments)
    for history, answer in zip(HISTORIES, answers, strict=False):
        wanted = legal_sessions(MODEL, history, length, left) if len(left) >= length else []
        assert_same_ranking(answer[: len(wanted)], [(score, session) for score, _, session in wanted])
        assert all(answer == (-math.inf, []) for answer in answer[len(wanted) :])


def test_allow_takes_one_list_per_user_or_one_for_all():
    category = ["m0", "m3", "m7"]
    shared = recommend(MODEL, session_length=1, num_beams=5, allow=[category])
    assert all({item for _, session in answer for item in session} == set(category) for answer in shared)
    rows = torch.from_numpy(CATALOGUE.indices(category))[None]
    assert recommend(MODEL, session_length=1, num_beams=5, allow=rows) == shared
    apart = recommend(MODEL, session_length=1, num_beams=5, allow=[["m0"], ["m3", "m7"], category])
    assert [len([session for _, session in answer if session]) for answer in apart] == [1, 2, 3]
    with pytest.raises(
        ValueError, match="allow has lists for 2 users, input_ids has 3; pass one list per user, or one"
    ):
        recommend(MODEL, allow=[category, category])


def test_items_named_twice_count_once():
    """Counting an excluded item twice would empty a prefix that still has another one."""
    rows = torch.arange(14)[:, None]
    once = MODEL.recommend(
        **PROCESSOR([["m1"]] * 14), session_length=1, num_beams=14, num_return_sequences=14, exclude=rows
    )
    twice = MODEL.recommend(
        **PROCESSOR([["m1"]] * 14),
        session_length=1,
        num_beams=14,
        num_return_sequences=14,
        exclude=torch.cat([rows, torch.full_like(rows, -1), rows], dim=1),
    )
    assert torch.equal(once, twice)
    assert [len([s for s in PROCESSOR.batch_decode(once[i : i + 14]) if s]) for i in range(0, 196, 14)] == [13] * 14
    pair = recommend(MODEL, session_length=2, num_beams=4, allow=[["m3", "m3", "m5"]])
    assert {tuple(session) for answer in pair for _, session in answer if session} == {("m3", "m5"), ("m5", "m3")}


def test_ties_keep_the_order_of_the_codes():
    model = make_model(CATALOGUE, seed=3)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # also the embeddings: every code of every level scores the same
    by_code = [CATALOGUE.item_ids[row] for row in sorted(range(14), key=lambda row: CATALOGUE.codes[row].tolist())]
    for beams in (1, 4, 9, 14, 20):
        for answer in recommend(model, session_length=1, num_beams=beams):
            assert [session for _, session in answer if session] == [[item] for item in by_code[:beams]]


@pytest.mark.parametrize("config", [{}, {"num_key_value_heads": 2}, {"num_experts": 1}], ids=str)
def test_bfloat16_scores_are_the_forward_passes_within_its_precision(config):
    model = make_model(CATALOGUE, seed=3, **config).to(torch.bfloat16)
    answers = recommend(model, HISTORIES, session_length=2, num_beams=12)
    for history, answer in zip(HISTORIES, answers, strict=True):
        for score, session in answer:
            batch = PROCESSOR([history], sessions=[session])
            with torch.no_grad():
                logits = model(**batch).logits.float().log_softmax(-1)
            labels = batch["labels"][0]
            kept = labels >= 0
            assert score == close(float(logits[0, kept, labels[kept]].sum()), ROUNDED, dtype=torch.bfloat16)


def test_bfloat16_logits_do_not_tie():
    """Two codes whose weights differ by the last digit of bfloat16 have scores that float32 tells apart."""
    model = make_model(CATALOGUE, seed=3).to(torch.bfloat16)
    first = slice(model.config.level_offsets[0], model.config.level_offsets[0] + 3)
    with torch.no_grad():
        rows = model.lm_head.weight[first]
        rows[:] = rows[:1].clone()
        rows[1, 0] *= 1 + torch.finfo(torch.bfloat16).eps
    hidden = torch.full((1, 32), 4.0, dtype=torch.bfloat16)
    tokens = slice(0, model.config.vocab_size)
    codes = torch.arange(3)[None]
    with torch.no_grad():
        logits, _ = beam_search_file._child_logits(hidden, model.lm_head, tokens, first, codes)
    assert logits[0, 0] == logits[0, 2] != logits[0, 1]


@pytest.mark.parametrize(
    "arguments", [{}, {"exclude_seen": True}, {"allow": [["m0", "m1", "m2"], ["m3"], ["m4", "m0"]]}]
)
def test_a_few_users_at_a_time_get_the_same(monkeypatch, arguments):
    together = recommend(MODEL, session_length=1, num_beams=4, **arguments)
    monkeypatch.setattr(generation_onerec, "_CPU_ROWS_AT_ONCE", 4)
    apart = recommend(MODEL, session_length=1, num_beams=4, **arguments)
    for one, other in zip(together, apart, strict=True):
        assert_same_ranking(one, other)


def test_dropout_is_off_and_the_mode_stays():
    model = make_model(CATALOGUE, seed=3, dropout_rate=0.5, attention_dropout=0.3)
    expected = recommend(model, num_beams=3)
    model.train()
    model.model.encoder.eval()
    assert recommend(model, num_beams=3) == expected
    assert model.training
    assert not model.model.encoder.training
    assert model.model.decoder.layers[0].mlp.training


def test_an_adapter_is_heard():
    from peft import LoraConfig, get_peft_model

    model = make_model(CATALOGUE, seed=3)
    before = recommend(model, num_beams=4)
    adapted = get_peft_model(
        model,
        LoraConfig(
            target_modules=["q_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.down_proj"],
            init_lora_weights=False,
        ),
    )
    with_adapter = recommend(adapted.get_base_model(), num_beams=4)
    assert with_adapter != before
    merged = recommend(adapted.merge_and_unload(), num_beams=4)
    for one, other in zip(with_adapter, merged, strict=True):
        assert_same_ranking(one, other)


class Counted:
    """Counts calls of a function of `generation_onerec`."""

    def __init__(self, monkeypatch, name):
        self.calls, self._function = 0, getattr(generation_onerec, name)
        monkeypatch.setattr(generation_onerec, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self._function(*args, **kwargs)


@pytest.mark.parametrize("beams", [1, 4])
def test_generate_takes_the_fast_path_and_answers_alike(monkeypatch, beams):
    fast = Counted(monkeypatch, "beam_search")
    inputs, arguments = PROCESSOR(HISTORIES), {"num_beams": beams, "num_return_sequences": beams, "do_sample": False}
    quick = MODEL.generate(**inputs, **arguments, return_dict_in_generate=True, length_penalty=0.7)
    assert fast.calls == 1
    slow = MODEL.generate(**inputs, **arguments, return_dict_in_generate=True, length_penalty=0.7, output_scores=True)
    assert fast.calls == 1
    assert len(slow.scores) == 7
    assert torch.equal(quick.sequences, slow.sequences)
    if beams > 1:
        assert_close(quick.sequences_scores, slow.sequences_scores)


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True},
        {"num_beams": 2, "max_new_tokens": 2},
        {"num_beams": 2, "output_scores": True, "return_dict_in_generate": True},
        {"num_beams": 2, "repetition_penalty": 1.5},
        {"num_beams": 2, "max_time": 100.0},
        {"num_beams": 2, "constrained": False},
        {"decoder_input_ids": torch.tensor([[1, 5], [1, 6], [1, 5]]), "max_new_tokens": 2},
    ],
)
def test_generate_leaves_to_transformers_what_the_fast_path_does_not_do(monkeypatch, arguments):
    fast = Counted(monkeypatch, "beam_search")
    out = MODEL.generate(**PROCESSOR(HISTORIES), **arguments)
    assert fast.calls == 0
    assert len(getattr(out, "sequences", out)) == 3


def test_seq2seq_trainer_predicts_by_the_fast_path(monkeypatch, tmp_path):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    fast = Counted(monkeypatch, "beam_search")
    model = make_model(CATALOGUE, seed=3)
    rows = [
        {name: value[0].tolist() for name, value in PROCESSOR([history], sessions=[["m0", "m2"]]).items()}
        for history in HISTORIES[:2] + HISTORIES[:1]
        if len(history) == 3
    ]
    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        predict_with_generate=True,
        generation_num_beams=3,
        generation_max_length=8,
        report_to="none",
        use_cpu=True,
    )
    trainer = Seq2SeqTrainer(
        model, arguments, data_collator=lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
    )
    out = trainer.predict(rows)
    assert fast.calls == 1
    expected = model.recommend(**PROCESSOR([HISTORIES[0]] * 2), num_beams=3)
    assert out.predictions[:, : expected.shape[1]].tolist() == expected.tolist()


def test_transformers_still_calls_the_methods_that_lead_to_the_fast_path():
    """They are private there: should they go, generate() would be slow without a word."""
    assert callable(GenerationMixin._beam_search)
    assert callable(GenerationMixin._sample)


def test_samples_all_sessions_once_with_their_probabilities():
    """With as many beams as sessions, sampling without replacement draws each once; their probabilities sum to one."""
    for length in (1, 2):
        wanted = legal_sessions(MODEL, HISTORIES[0], length, CATALOGUE.item_ids)
        out = MODEL.recommend(
            **PROCESSOR(HISTORIES[:1]),
            do_sample=True,
            session_length=length,
            num_beams=len(wanted) + 3,
            num_return_sequences=len(wanted) + 3,
            return_dict_in_generate=True,
            generator=torch.Generator().manual_seed(0),
        )
        sessions = PROCESSOR.batch_decode(out)
        assert sessions[len(wanted) :] == [[]] * 3
        got = {
            tuple(session): (score, sampled)
            for session, score, sampled in zip(
                sessions, out.sequences_scores.tolist(), out.sampling_scores.tolist(), strict=True
            )
            if session
        }
        assert len(got) == len(wanted)
        for score, sampled, session in wanted:
            assert got[tuple(session)] == close((score, sampled))
        assert float(out.sampling_scores.exp().sum()) == close(1)
        keys = out.sampling_keys[: len(wanted)]
        assert (keys.diff() <= 0).all()
        assert [math.inf * -1] * 3 == out.sampling_keys[len(wanted) :].tolist()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_in_the_proportions_of_draws_without_replacement(temperature):
    model = make_model(make_catalogue(5, (2, 3), seed=0), seed=1, initializer_range=0.1)
    processor = OneRecProcessor.from_catalogue(model.catalogue)
    users, draws = 500, 10
    generator = torch.Generator().manual_seed(0)
    pairs, probabilities = Counter(), {}
    for _ in range(draws):
        out = model.recommend(
            **processor([["m0", "m1"]] * users),
            do_sample=True,
            temperature=temperature,
            session_length=1,
            num_beams=5,
            num_return_sequences=5,
            return_dict_in_generate=True,
            generator=generator,
        )
        items = processor.item_indices(out.sequences).view(users, 5)
        pairs.update(map(tuple, items[:, :2].tolist()))
        probabilities.update(zip(items.flatten().tolist(), out.sampling_scores.exp().tolist(), strict=True))
    total = users * draws
    assert sum(probabilities.values()) == close(1)
    for first in range(5):
        for second in set(range(5)) - {first}:
            p = probabilities[first] * probabilities[second] / (1 - probabilities[first])
            assert pairs[first, second] / total == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / total))


def test_a_generator_repeats_the_draw_and_temperature_must_be_positive():
    draw = [
        recommend(MODEL, do_sample=True, num_beams=4, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2]
    with pytest.raises(ValueError, match=r"temperature=0.0 must be positive; for the most probable"):
        recommend(MODEL, do_sample=True, temperature=0.0)


def test_with_a_generator_of_its_own_a_user_does_not_depend_on_the_others():
    """Other users in the batch, another order, longer histories beside: the same sessions and keys."""

    def drawn(places):
        out = MODEL.recommend(
            **PROCESSOR([HISTORIES[place] for place in places]),
            do_sample=True,
            session_length=2,
            num_beams=6,
            num_return_sequences=6,
            exclude=[HISTORIES[place] for place in places],
            generator=[torch.Generator().manual_seed(place) for place in places],
            return_dict_in_generate=True,
        )
        sessions, keys = PROCESSOR.batch_decode(out), out.sampling_keys
        return {place: (sessions[6 * i : 6 * i + 6], keys[6 * i : 6 * i + 6]) for i, place in enumerate(places)}

    together, backwards = drawn(range(len(HISTORIES))), drawn(range(len(HISTORIES) - 1, -1, -1))
    for place in range(len(HISTORIES)):
        for other in (backwards, drawn([place])):
            assert other[place][0] == together[place][0]
            assert_close(other[place][1], together[place][1])
    with pytest.raises(ValueError, match="1 generators for 2 users: pass one each, or one for all"):
        MODEL.recommend(**PROCESSOR([["m1"], ["m2"]]), do_sample=True, generator=[torch.Generator()])


def test_compiled_steps_answer_alike_and_compile_once():
    model = make_model(CATALOGUE, seed=3)
    expected = recommend(model, num_beams=5, session_length=3)
    model.generation_config.compile_config = CompileConfig(
        fullgraph=True, dynamic=False, backend="aot_eager", mode=None
    )
    counters = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counters.clear()
    for _ in range(2):
        answers = recommend(model, num_beams=5, session_length=3)
        for one, other in zip(expected, answers, strict=True):
            assert_same_ranking(one, other)
    # The first code with one beam a user, the second with as many beams as first codes (3), then one or two tokens at full width.
    assert counters["unique_graphs"] == 4
