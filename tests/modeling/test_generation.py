"""Constrained generation against brute force over the catalogue and against transformers' own beam search with a Python trie."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf import CatalogueConstraint, OneRecProcessor, SemanticIDLogitsProcessor
from tests.conftest import make_catalogue, make_model
from tests.modeling.reference import Reference
from tests.rounding import assert_close, close

CATALOGUE = make_catalogue(14, (3, 3, 4), seed=1)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE)
MODEL = make_model(CATALOGUE, seed=3)
ITEMS = CATALOGUE.item_ids
# Python's trie for prefix_allowed_tokens_fn.
OFFSETS = MODEL.config.level_offsets
TOKENS = {tuple(c + o for c, o in zip(code, OFFSETS, strict=True)) for code in CATALOGUE.codes.tolist()}


def brute_force(history, session_length, excluded=(), distinct=True):
    """All legal sessions with their log-probabilities in float64, best first."""
    reference = Reference(MODEL)
    tokens = PROCESSOR([history])["input_ids"][0]
    names = [item for item in ITEMS if item not in excluded]
    sessions = (
        itertools.permutations(names, session_length) if distinct else itertools.product(names, repeat=session_length)
    )
    scored = []
    for session in sessions:
        codes = CATALOGUE.codes[CATALOGUE.indices(session)].tolist()
        scored.append((float(reference.session_log_probability(tokens, codes, OFFSETS)), list(session)))
    return sorted(scored, reverse=True)


def recommend(histories, **arguments):
    out = MODEL.recommend(**PROCESSOR(histories), return_dict_in_generate=True, **arguments)
    count = arguments.get("num_return_sequences", 1)
    sessions, scores = PROCESSOR.batch_decode(out), out.sequences_scores.tolist()
    return [
        list(zip(scores[i : i + count], sessions[i : i + count], strict=True)) for i in range(0, len(sessions), count)
    ]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(ITEMS), min_size=1, max_size=5), min_size=1, max_size=3),
    st.lists(st.sampled_from(ITEMS), max_size=13, unique=True),
)
def test_wide_beams_rank_every_item_as_brute_force_does(histories, excluded):
    answers = recommend(
        histories, session_length=1, num_beams=20, num_return_sequences=20, exclude=[excluded] * len(histories)
    )
    for history, answer in zip(histories, answers, strict=True):
        wanted = brute_force(history, 1, excluded)
        legal = answer[: len(wanted)]
        assert [session for _, session in legal] == [session for _, session in wanted]
        assert_close([score for score, _ in legal], [score for score, _ in wanted])
        assert all(session == [] and score == float("-inf") for score, session in answer[len(wanted) :])


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("excluded", [[], ITEMS[:11]])
def test_sessions_of_two_items_equal_brute_force(distinct, excluded):
    wanted = brute_force(["m1", "m9"], 2, excluded, distinct)
    (answer,) = recommend(
        [["m1", "m9"]],
        session_length=2,
        num_beams=len(ITEMS) ** 2,
        num_return_sequences=len(ITEMS) ** 2,
        exclude=[excluded],
        distinct=distinct,
    )
    legal = answer[: len(wanted)]
    assert [session for _, session in legal] == [session for _, session in wanted]
    assert_close([score for score, _ in legal], [score for score, _ in wanted])
    assert all(session == [] for _, session in answer[len(wanted) :])


def prefix_allowed_tokens(_, ids):
    position = (len(ids) - 1) % 4
    if position == 3:
        return [1]
    prefix = tuple(ids[len(ids) - position :].tolist())
    return sorted({tokens[position] for tokens in TOKENS if tokens[:position] == prefix})


@pytest.mark.parametrize("num_beams", [1, 3, 10])
def test_equals_transformers_beam_search_with_a_python_trie(num_beams):
    inputs = PROCESSOR([["m1", "m9", "m3"], ["m2"]])
    arguments = {
        "num_beams": num_beams,
        "num_return_sequences": num_beams,
        "max_new_tokens": 3,
        "length_penalty": 0.0,
        "eos_token_id": None,
        "do_sample": False,
    }
    theirs = MODEL.generate(**inputs, constrained=False, prefix_allowed_tokens_fn=prefix_allowed_tokens, **arguments)
    ours = MODEL.recommend(**inputs, session_length=1, num_beams=num_beams, num_return_sequences=num_beams)
    through_generate = MODEL.generate(**inputs, **arguments)
    assert torch.equal(ours, theirs)
    assert torch.equal(through_generate, theirs)


def test_generate_without_arguments_writes_a_legal_session():
    sequences = MODEL.generate(**PROCESSOR([["m1"], ["m2", "m3"]]))
    sessions = PROCESSOR.batch_decode(sequences)
    assert [len(set(session)) for session in sessions] == [2, 2]
    assert all(item in ITEMS for session in sessions for item in session)


def test_sampling_is_constrained_too():
    torch.manual_seed(0)
    sequences = MODEL.generate(**PROCESSOR([["m1"]]), do_sample=True, num_return_sequences=50)
    sessions = PROCESSOR.batch_decode(sequences)
    assert all(None not in session and len(set(session)) == 2 for session in sessions)
    assert len({tuple(session) for session in sessions}) > 5


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_no_illegal_repeated_or_excluded_item_ever(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    possible = int(torch.tensor(sizes).prod())
    catalogue = make_catalogue(
        data.draw(st.integers(min(2, possible), possible)), sizes, seed=data.draw(st.integers(0, 9))
    )
    model, processor = make_model(catalogue), OneRecProcessor.from_catalogue(catalogue)
    histories = data.draw(
        st.lists(st.lists(st.sampled_from(catalogue.item_ids), min_size=1, max_size=4), min_size=1, max_size=3)
    )
    seen = [set(history) for history in histories]
    session_length = data.draw(st.integers(1, 3))
    beams = data.draw(st.integers(1, 12))
    if any(len(names) == len(catalogue) for names in seen):
        with pytest.raises(ValueError, match="leave none"):
            model.recommend(**processor(histories), exclude_seen=True)
        return
    out = model.recommend(
        **processor(histories),
        session_length=session_length,
        num_beams=beams,
        num_return_sequences=beams,
        exclude_seen=True,
        return_dict_in_generate=True,
    )
    sessions = processor.batch_decode(out)
    found = [tuple(session) for session in sessions]
    for i, session in enumerate(sessions):
        assert None not in session
        assert not set(session) & seen[i // beams]
        assert len(set(session)) == len(session)
        assert len(session) in (0, session_length)
        assert (out.sequences_scores[i] == float("-inf")) == (session == [])
    for user in range(len(histories)):
        mine = [session for session in found[user * beams : (user + 1) * beams] if session]
        assert len(set(mine)) == len(mine)  # beams differ
        # Sessions exist wherever enough items are left.
        assert bool(mine) == (len(catalogue) - len(seen[user]) >= session_length) or beams < len(catalogue)


def test_beams_and_batches_do_not_meet():
    histories = [["m1", "m9", "m3"], ["m2"], ["m4", "m5"]]
    together = recommend(histories, session_length=2, num_beams=5, num_return_sequences=5)
    for history, answer in zip(histories, together, strict=True):
        (alone,) = recommend([history], session_length=2, num_beams=5, num_return_sequences=5)
        assert [session for _, session in alone] == [session for _, session in answer]


def test_scores_are_the_training_log_probabilities():
    """The score of a session is minus the summed next-token loss of that session."""
    (answer,) = recommend([["m1", "m9"]], session_length=2, num_beams=4, num_return_sequences=4)
    for score, session in answer:
        batch = PROCESSOR([["m1", "m9"]], sessions=[session])
        with torch.no_grad():
            loss = MODEL(**batch, num_items_in_batch=1).loss
        assert score == close(-float(loss))


def test_exclude_takes_ids_rows_and_history():
    inputs, rows = PROCESSOR([["m1", "m9"]]), torch.tensor([[1, 9, -1]])
    by_row = MODEL.recommend(**inputs, session_length=1, num_beams=14, num_return_sequences=14, exclude=rows)
    by_id = MODEL.recommend(**inputs, session_length=1, num_beams=14, num_return_sequences=14, exclude=[["m1", "m9"]])
    by_history = MODEL.recommend(**inputs, session_length=1, num_beams=14, num_return_sequences=14, exclude_seen=True)
    assert torch.equal(by_row, by_id)
    assert torch.equal(by_row, by_history)
    assert sum(map(len, PROCESSOR.batch_decode(by_row))) == 12
    with pytest.raises(KeyError, match="not in the catalogue"):
        MODEL.recommend(**inputs, exclude=[["nothing"]])


def test_constraint_keeps_legal_scores_and_gives_bos_probability_one():
    constraint = SemanticIDLogitsProcessor(CatalogueConstraint(CATALOGUE.trie), OFFSETS, 1)
    scores = torch.randn(2, MODEL.config.vocab_size)
    start = torch.tensor([[1], [1]])
    first = constraint(start, scores)
    used = {tokens[0] for tokens in TOKENS}
    for token in range(MODEL.config.vocab_size):
        wanted = scores[:, token] if token in used else torch.full((2,), float("-inf"))
        assert torch.equal(first[:, token], wanted)
    complete = torch.tensor([[1, *sorted(TOKENS)[0]], [1, *sorted(TOKENS)[1]]])
    forced = constraint(complete, scores)
    assert forced[:, 1].tolist() == [0.0, 0.0]
    assert torch.isinf(forced).sum() == forced.numel() - 2


def test_refuses(model, processor):
    inputs = processor([["m1"]])
    with pytest.raises(ValueError, match="exceeds num_beams=2; raise num_beams"):
        model.recommend(**inputs, num_beams=2, num_return_sequences=3)
    other = make_catalogue(seed=5)
    with pytest.raises(ValueError, match=r"trained with the catalogue .* load the catalogue that was saved"):
        model.set_catalogue(other)
    with pytest.raises(ValueError, match="codebooks of"):
        model.set_catalogue(make_catalogue(5, (3, 3)))
    model.catalogue = None
    with pytest.raises(ValueError, match="no item catalogue"):
        model.recommend(**inputs)
    with pytest.raises(ValueError, match="exclude and allow need constrained"):
        model.generate(**inputs, exclude=torch.tensor([[0]]))


def test_cross_attention_cache_holds_one_row_per_user():
    """transformers' beam search shares the history's keys and values among the beams of a user."""
    out = MODEL.generate(**PROCESSOR([["m1"], ["m2"]]), num_beams=5, return_dict_in_generate=True, output_scores=True)
    layer = out.past_key_values.cross_attention_cache.layers[0]
    assert layer.keys.shape[0] == 2
    assert out.past_key_values.self_attention_cache.layers[0].keys.shape[0] == 10
