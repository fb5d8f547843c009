"""The losses beyond TRL's: through the trainer against formulas over log-probabilities of single rows."""

import copy
import math

import pytest
import torch
from datasets import Dataset

from onerec_hf.trainers.preference_losses import cdpo_settings, s_dpo_loss
from tests.conftest import make_model
from tests.rounding import close
from tests.trainers.preference_runs import CATALOGUE, MAKERS, arguments, by_hand, losses, make_trainer, pairs_for

BETA, GAMMA, ALPHA, SMOOTHING = 0.4, 0.7, 0.3, 0.2


def softplus_of_minus(x):
    return math.log1p(math.exp(-x))


def rows_by_hand(kind, policy, reference):
    """Per pair: (log pi, log ref, length) of the chosen and of the rejected answer."""
    return [
        [
            (*by_hand(policy, kind, row, which), by_hand(reference, kind, row, which)[0])
            for which in ("chosen", "rejected")
        ]
        for row in pairs_for(kind)
    ]


def other_policy(kind):
    policy = MAKERS[kind]()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    return policy


def simpo(win, lose):
    return softplus_of_minus(BETA * (win[0] / win[1] - lose[0] / lose[1]) - GAMMA)


def cdpo(win, lose):
    x = BETA * ((win[0] - win[2]) - (lose[0] - lose[2]))
    return (1 - SMOOTHING) * softplus_of_minus(x) + SMOOTHING * softplus_of_minus(-x)


def rdpo(win, lose):
    x = BETA * ((win[0] - win[2]) - (lose[0] - lose[2]))
    return ((1 - SMOOTHING) * softplus_of_minus(x) - SMOOTHING * softplus_of_minus(-x)) / (1 - 2 * SMOOTHING)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("loss_type", "formula"), [("simpo", simpo), ("cdpo", cdpo), ("robust", rdpo)])
def test_loss_equals_its_formula(tmp_path, kind, loss_type, formula):
    policy, reference = other_policy(kind), MAKERS[kind]()
    pairs = rows_by_hand(kind, policy, reference)
    smoothing = {} if loss_type == "simpo" else {"label_smoothing": SMOOTHING}
    trainer = make_trainer(
        tmp_path,
        kind,
        copy.deepcopy(policy),
        ref_model=reference,
        loss_type=loss_type,
        beta=BETA,
        simpo_gamma=GAMMA,
        **smoothing,
    )
    got = trainer.evaluate(pairs_for(kind))["eval_loss"]
    assert got == close(sum(formula(*pair) for pair in pairs) / len(pairs))


def test_cpo_is_preference_and_likelihood(tmp_path):
    policy = other_policy("bart")
    pairs = rows_by_hand("bart", policy, policy)
    trainer = make_trainer(tmp_path, "bart", copy.deepcopy(policy), loss_type="cpo", beta=BETA, cpo_alpha=ALPHA)
    assert trainer.ref_model is None
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        got = float(trainer.compute_loss(trainer.model, batch))
    preference = sum(softplus_of_minus(BETA * (win[0] - lose[0])) for win, lose in pairs) / len(pairs)
    likelihood = -sum(win[0] for win, _ in pairs) / sum(win[1] for win, _ in pairs)
    assert got == close(preference + ALPHA * likelihood)


@pytest.mark.parametrize("kind", MAKERS)
def test_s_dpo_with_one_negative_is_dpo(tmp_path, kind):
    runs = [make_trainer(tmp_path, kind, loss_type=loss_type, max_steps=4) for loss_type in ("sigmoid", "s_dpo")]
    for run in runs:
        run.train()
    assert losses(runs[1]) == close(losses(runs[0]))
    keys = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    for one, other in zip(runs[0].state.log_history[:-1], runs[1].state.log_history[:-1], strict=True):
        assert [other[key] for key in keys] == close([one[key] for key in keys])


def test_s_dpo_with_three_negatives(tmp_path):
    negatives = [[["m1"], ["m2", "m3"], ["m4"]], [["m5", "m6"], ["m7"], ["m8"]]]
    rows = Dataset.from_list(
        [
            {"history": [f"m{i}", "m9"], "chosen": ["m10", "m11"], "rejected": several}
            for i, several in enumerate(negatives)
        ]
    )
    policy, reference = other_policy("onerec"), make_model(CATALOGUE)
    wanted = []
    for row in rows:
        answers = [{"history": row["history"], "answer": answer} for answer in [row["chosen"], *row["rejected"]]]
        win, *lose = [
            by_hand(policy, "onerec", answer, "answer")[0] - by_hand(reference, "onerec", answer, "answer")[0]
            for answer in answers
        ]
        margin = -math.log(sum(math.exp(BETA * (ratio - win)) for ratio in lose))
        wanted.append(softplus_of_minus(margin))
    trainer = make_trainer(
        tmp_path, model=copy.deepcopy(policy), ref_model=reference, train_dataset=rows, loss_type="s_dpo", beta=BETA
    )
    assert trainer.evaluate(rows)["eval_loss"] == close(sum(wanted) / 2)
    trainer.train()
    with pytest.raises(ValueError, match="2 to 3 rejected answers"):
        trainer.data_collator([rows[0], {**rows[1], "rejected": negatives[1][:2]}])


def test_s_dpo_loss_by_hand():
    got = s_dpo_loss(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0], [0.0, 0.0]]), beta=0.5)
    wanted = [math.log(1 + math.exp(-0.5) + math.exp(0.5)), math.log(3)]  # the softmax form of the same
    assert got.tolist() == pytest.approx(wanted)


def test_settings(tmp_path):
    assert cdpo_settings(0.0) == {"sigmoid": 2.0, "robust": -1.0}
    mixed = arguments(tmp_path, loss_type=["cdpo", "sft"], loss_weights=[1.0, 0.5], label_smoothing=0.25)
    assert (mixed.loss_type, mixed.loss_weights) == (["sigmoid", "robust", "sft"], [1.5, -0.5, 0.5])
    plain = arguments(tmp_path, loss_type="ipo")
    assert (plain.loss_type, plain.loss_weights, plain.reference_free) == (["ipo"], None, False)
    with pytest.raises(ValueError, match="which stores one"):
        arguments(tmp_path, loss_type="s_dpo", precompute_ref_log_probs=True)
