"""Sessions that share few items (`diversity` of `recommend()`): against a greedy choice among all sessions, and what must hold at any strength."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CompileConfig

from onerec_hf import OneRecProcessor
from onerec_hf.modeling import generation_onerec
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

CATALOGUE = make_catalogue(9, (3, 3, 2), seed=1)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE)
MODEL = make_model(CATALOGUE, seed=3)
HEADED = make_model(CATALOGUE, seed=4, item_head={"num_items": 9, "loss_weight": 1.0})
EVIDENCED = make_model(CATALOGUE, seed=4, item_head={"num_items": 9, "loss_weight": 1.0, "evidence": True})
with torch.no_grad():
    follows = torch.randint(0, 10, (9, 3), generator=torch.Generator().manual_seed(0))
    EVIDENCED.get_encoder().item_head.evidence.set_list("next", follows, 4.0 * (follows > 0))
HISTORIES = [["m1", "m8", "m3"], ["m2"], ["m4", "m5"]]
ALL = 9 * 8  # sessions of two distinct items


def recommend(model, histories=HISTORIES, count=3, processor=PROCESSOR, **arguments):
    """Per history, its (session, score) pairs."""
    out = model.recommend(
        **processor(histories), num_return_sequences=count, return_dict_in_generate=True, **arguments
    )
    pairs = list(zip(map(tuple, processor.batch_decode(out)), out.sequences_scores.tolist(), strict=True))
    return [pairs[i : i + count] for i in range(0, len(pairs), count)]


def shared(one, other):
    return sum(a == b for a in one for b in other)


def different(answer):
    """Shares of different items of all pairs of a user's sessions."""
    return [1 - shared(a, b) / len(a) for (a, _), (b, _) in combinations(answer, 2)]


def chosen_of(sessions, count, weights):
    """The greedy choice among all sessions: log-probability less penalty, the first of equal ones."""
    chosen = []
    for _ in range(count):

        def value(session):
            penalties = (weights[place] * sum(item in other for other in chosen) for place, item in enumerate(session))
            return sessions[session] - sum(penalties)

        left = [session for session in sessions if session not in chosen]
        chosen.append(max(left, key=value))
    return chosen


@pytest.mark.parametrize("arguments", [{}, {"exclude": [["m1", "m2"], ["m3"], []]}, {"allow": [["m0", "m4", "m6"]]}])
@pytest.mark.parametrize(
    ("model", "weight", "weights"),
    [(MODEL, 0.0, (1, 1)), (HEADED, 2.0, (3, 1)), (EVIDENCED, 2.0, (3, 3))],
    ids=["decoder", "head", "evidence"],
)
@pytest.mark.parametrize("diversity", [0.05, 0.3, 1.0])
def test_with_all_beams_it_is_the_greedy_choice_among_all_sessions(diversity, model, weight, weights, arguments):
    arguments = {"session_length": 2, "item_score_weight": weight, **arguments}
    everything = recommend(model, count=ALL, num_beams=ALL, **arguments)
    found = recommend(model, num_beams=2 * ALL, diversity=diversity, **arguments)
    unit = diversity * math.log(9)
    for answer, sessions in zip(found, everything, strict=True):
        scores = {session: score for session, score in sessions if session}
        wanted = chosen_of(scores, 3, [unit * each for each in weights])
        assert [session for session, _ in answer] == wanted
        # Scores are the model's, without the penalty.
        assert_close([score for _, score in answer], [scores[session] for session in wanted])


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_a_stronger_penalty_shares_no_more(data):
    """For the second of two sessions, with all beams: any model, history and pair of strengths."""
    model = make_model(CATALOGUE, seed=data.draw(st.integers(0, 20)), initializer_range=0.4)
    history = data.draw(st.lists(st.sampled_from(CATALOGUE.item_ids), min_size=1, max_size=4))
    weak, strong = sorted(data.draw(st.tuples(st.floats(0.01, 2), st.floats(0.01, 2))))
    overlaps = []
    for diversity in (weak, strong):
        (answer,) = recommend(model, [history], 2, session_length=2, num_beams=ALL, diversity=diversity)
        overlaps.append(shared(answer[0][0], answer[1][0]))
    assert overlaps[0] >= overlaps[1]


LARGE = make_catalogue(60, (5, 6, 7), seed=2)
LARGE_PROCESSOR = OneRecProcessor.from_catalogue(LARGE)
USERS = [[f"m{(7 * user + 13 * place) % 60}" for place in range(1 + user % 4)] for user in range(24)]


def test_default_strength_and_the_way_there():
    """Sessions of five by a narrow beam: today's beams are almost the same, at 1 every pair of every user has at least 60 % different items."""
    model = make_model(LARGE, seed=5, initializer_range=0.3)
    means, losses = [], []
    for diversity in (0.0, 0.05, 0.2, 1.0):
        answers = recommend(
            model, USERS, processor=LARGE_PROCESSOR, session_length=5, num_beams=20, diversity=diversity
        )
        pairs = [share for answer in answers for share in different(answer)]
        means.append(sum(pairs) / len(pairs))
        losses.append(sum(answer[0][1] - answer[2][1] for answer in answers) / len(answers))
    assert means[0] < 0.4
    assert means == sorted(means)
    assert min(pairs) >= 0.6
    assert losses == sorted(losses)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_the_constraint_holds(data):
    users = data.draw(st.integers(1, 3))
    items = st.sampled_from(LARGE.item_ids)
    exclude = [data.draw(st.lists(items, max_size=30, unique=True)) for _ in range(users)]
    allow = data.draw(st.one_of(st.none(), st.lists(items, min_size=45, max_size=60, unique=True)))
    answers = recommend(
        make_model(LARGE, seed=data.draw(st.integers(0, 3))),
        USERS[:users],
        data.draw(st.integers(2, 5)),
        LARGE_PROCESSOR,
        session_length=data.draw(st.integers(2, 4)),
        num_beams=data.draw(st.integers(5, 12)),
        diversity=data.draw(st.floats(0.01, 3)),
        exclude=exclude,
        allow=None if allow is None else [allow],
    )
    for answer, left_out in zip(answers, exclude, strict=True):
        sessions = [session for session, _ in answer]
        assert len(set(sessions)) == len(sessions)
        for session in sessions:
            assert len(set(session)) == len(session)
            assert not set(session) & set(left_out)
            assert allow is None or set(session) <= set(allow)


def test_the_first_session_is_the_best_one():
    plain = recommend(MODEL, session_length=3, num_beams=10)
    assert recommend(MODEL, session_length=3, num_beams=10, diversity=0.0) == plain
    diverse = recommend(MODEL, session_length=3, num_beams=10, diversity=0.5)
    assert [answer[0] for answer in diverse] == [answer[0] for answer in plain]
    assert diverse != plain


@pytest.mark.parametrize("arguments", [{"session_length": 1}, {"session_length": 3, "count": 1}])
def test_single_items_and_single_sessions_share_nothing(arguments):
    assert recommend(MODEL, num_beams=6, diversity=2.0, **arguments) == recommend(MODEL, num_beams=6, **arguments)


def test_too_few_sessions_are_filled_with_empty_ones():
    answers = recommend(MODEL, count=4, session_length=2, num_beams=8, allow=[["m0", "m3"]], diversity=1.0)
    for answer in answers:
        assert {session for session, _ in answer[:2]} == {("m0", "m3"), ("m3", "m0")}
        assert answer[2:] == [((), -math.inf)] * 2


def test_users_do_not_depend_on_each_other(monkeypatch):
    arguments = {"session_length": 3, "num_beams": 8, "diversity": 0.3, "exclude_seen": True}
    together = recommend(MODEL, **arguments)
    monkeypatch.setattr(generation_onerec, "_CPU_ROWS_AT_ONCE", 8)
    for one, other in zip(together, recommend(MODEL, **arguments), strict=True):
        assert [session for session, _ in one] == [session for session, _ in other]
        assert_close([score for _, score in one], [score for _, score in other])


def test_static_shapes_answer_alike(monkeypatch):
    """What is compiled attends to all places of the buffer, also to those of the searches before."""
    model, arguments = make_model(CATALOGUE, seed=3), {"session_length": 2, "num_beams": 6, "diversity": 0.4}
    expected = recommend(model, **arguments)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model.generation_config.compile_config = CompileConfig()
    for one, other in zip(expected, recommend(model, **arguments), strict=True):
        assert [session for session, _ in one] == [session for session, _ in other]
        assert_close([score for _, score in one], [score for _, score in other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"diversity": -0.1}, "diversity=-0.1 must be a finite number, at least 0"),
        ({"diversity": math.nan}, "diversity=nan must be a finite number"),
        ({"diversity": math.inf}, "diversity=inf must be a finite number"),
        ({"diversity": 1.0, "do_sample": True}, "diversity=1.0 goes with beam search: leave out do_sample"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        recommend(MODEL, num_beams=4, **arguments)
