"""A session head learns the sessions of the data and what a reward prefers, and leaves the model as it is; the evaluator's choice."""

import copy

import pytest
import torch

from onerec_hf import OneRecProcessor
from onerec_hf.trainers import SessionHeadArguments, fit_session_head, pick_sessions
from onerec_hf.trainers.session_head import ALPHAS
from onerec_hf.trainers.watching import recommended_sessions
from tests.conftest import make_catalogue, make_model
from tests.rounding import close

CATALOGUE = make_catalogue(20, (3, 3, 3))
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=6)
HEADED = {"session_length": 3, "encoder_layers": 1, "decoder_layers": 1, "item_head": {"num_items": 20}}
# After m0, m1, ... come the three items that follow on a circle, in this order.
EXAMPLES = [
    {"history": [f"m{place}"], "session": [f"m{(place + step) % 20}" for step in (1, 2, 3)]} for place in range(20)
] * 3
QUICK = {"candidates": 20, "width": 16, "epochs": 20, "batch_size": 16, "learning_rate": 0.02}


@pytest.fixture
def model():
    return make_model(CATALOGUE, **HEADED)


def parallel(model, **options):
    return recommended_sessions(model, PROCESSOR, EXAMPLES[:20], session_decoding="parallel", **options)


def hits(sessions, rows=EXAMPLES[:20]) -> float:
    """Share of items that are at their place of the circle."""
    return sum(
        item == wanted
        for session, row in zip(sessions, rows, strict=True)
        for item, wanted in zip(session, row["session"], strict=True)
    ) / (3 * len(sessions))


def test_it_learns_which_item_comes_at_which_place_and_changes_no_weight(model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    args = SessionHeadArguments(**{**QUICK, "epochs": 40})
    facts = fit_session_head(model, PROCESSOR, EXAMPLES, args=args)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hits(parallel(model)) > 0.9
    assert hits(recommended_sessions(model, PROCESSOR, EXAMPLES[:20])) < 0.3  # the decoder, which is not trained
    assert facts["covered"] == close(1.0)
    assert facts["heldout"] > 0.9
    assert facts["alpha"] == model.parallel_decoder.alpha in ALPHAS
    again = make_model(CATALOGUE, **HEADED)
    fit_session_head(again, PROCESSOR, EXAMPLES, args=args)
    assert parallel(again) == parallel(model)  # the same seed


def likes(histories, sessions):
    """A reward for m4, m8 and m12, wherever they are."""
    return [float(len({"m4", "m8", "m12"} & set(session))) for session in sessions]


def test_a_reward_draws_sessions_to_what_it_prefers(model):
    rewards = {}
    for name, reward in (("data", None), ("reward", likes)):
        fit_session_head(model, PROCESSOR, EXAMPLES, reward, SessionHeadArguments(**{**QUICK, "epochs": 12}))
        rewards[name] = sum(likes(None, parallel(model)))
    assert rewards["reward"] > 2 * rewards["data"]


def test_sessions_of_low_utility_become_unlikely(model):
    rows = [{**row, "worth": float(place % 2)} for place, row in enumerate(EXAMPLES)]
    # Users of even places are not wanted on the circle: without the column they get it too.
    found = {}
    for column in (None, "worth"):
        args = SessionHeadArguments(**QUICK, unlikelihood=3.0)
        fit_session_head(model, PROCESSOR, rows, args=args, utility_column=column)
        sessions = parallel(model)
        found[column] = (
            hits(sessions[1::2], rows[1:20:2]),
            sum(
                item in row["session"]
                for session, row in zip(sessions[::2], rows[:20:2], strict=True)
                for item in session
            ),
        )
    assert found[None][1] > 25
    assert found["worth"][0] > 0.7
    assert found["worth"][1] < found[None][1] / 2


def test_a_given_alpha_is_kept_and_seen_items_may_be_candidates(model):
    rows = [{"history": row["history"], "session": row["history"]} for row in EXAMPLES]
    with pytest.raises(ValueError, match="no item of 60 sessions is among the 20 best candidates"):
        fit_session_head(model, PROCESSOR, rows, args=SessionHeadArguments(**QUICK))
    args = SessionHeadArguments(**{**QUICK, "epochs": 1, "alpha": 0.4})
    assert fit_session_head(model, PROCESSOR, rows, args=args, exclude_seen=False)["alpha"] == 0.4


def test_the_evaluator_picks_the_best_of_each_history():
    sessions = [["m1"], ["m4"], ["m8", "m12"], ["m2"], ["m3"], ["m4"]]
    assert pick_sessions(likes, [["m0"], ["m1"]], sessions, count=2) == [[2, 1], [2, 0]]
    both = [likes, lambda histories, sessions: [9.0 * (session == ["m1"]) for session in sessions]]
    assert pick_sessions(both, [["m0"], ["m1"]], sessions) == [[0], [2]]
    with pytest.raises(ValueError, match="6 sessions for 4 histories"):
        pick_sessions(likes, [["m0"]] * 4, sessions)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"examples": EXAMPLES[:1]}, "1 examples with a history and a session: pass at least 2"),
        ({"utility_column": "worth"}, "utility_column 'worth' must hold a number in each example"),
        (
            {"examples": [{**row, "worth": float("nan")} for row in EXAMPLES], "utility_column": "worth"},
            "60 values are not",
        ),
        ({"reward_funcs": lambda histories, sessions: [float("inf")] * len(sessions)}, "not finite"),
        ({"args": SessionHeadArguments(width=6)}, "width=6 must be a multiple of 4"),
        ({"args": SessionHeadArguments(alpha=1.0)}, "alpha=1.0 must lie in"),
        ({"args": SessionHeadArguments(**{**QUICK, "learning_rate": 1e30})}, "loss is not finite"),
    ],
)
def test_what_cannot_be_trained(model, change, reason):
    with pytest.raises(ValueError, match=reason):
        fit_session_head(
            **{
                "model": model,
                "processor": PROCESSOR,
                "examples": EXAMPLES,
                "args": SessionHeadArguments(**QUICK),
                **change,
            }
        )
    assert model.parallel_decoder is None


@pytest.mark.parametrize("head", [None, {"num_items": 20, "loss_weight": 0.0}])
def test_a_model_without_item_scores_is_refused(head):
    with pytest.raises(ValueError, match="reads the candidates of an item head, and this model has none"):
        fit_session_head(make_model(CATALOGUE, item_head=head), PROCESSOR, EXAMPLES)
