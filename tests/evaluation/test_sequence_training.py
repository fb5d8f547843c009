"""What the contest's sequence models learn from (benchmarks/quality/_sequence_training.py): every next item once, as the generators do."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import prefix_examples
from onerec_hf.data.sequences import UserSequences


@pytest.fixture(scope="module")
def pieces():
    from benchmarks.quality._sequence_training import pieces

    return pieces


@settings(deadline=None)  # the first example imports what reads it
@given(length=st.integers(2, 60), longest=st.integers(2, 20))
def test_sequence_models_read_what_generators_read(pieces, length, longest):
    table = pd.DataFrame({"user_id": 1, "item_id": np.arange(length), "timestamp": np.arange(length)})
    examples = prefix_examples(UserSequences.from_interactions(table), session_length=1, max_history=longest)
    expected = [
        (history[:read], session[0])
        for history, sessions, lengths in zip(
            examples["history"], examples["sessions"], examples["history_lengths"], strict=True
        )
        for session, read in zip(sessions, lengths, strict=True)
    ]
    found = [
        (inputs[: place + 1].tolist(), target)
        for inputs, targets in pieces(np.arange(length), longest)
        for place, target in enumerate(targets.tolist())
        if target >= 0
    ]
    assert found == expected


def test_training_reaches_the_oldest_items_of_long_sequences():
    import torch
    from benchmarks.quality._sequence_models import SASRec
    from benchmarks.quality._sequence_training import train_sequence_model

    torch.manual_seed(0)
    model = SASRec(30, width=16, layers=1, dropout=0.0, max_length=4)
    train_sequence_model(model, [np.arange(30)] * 8, seed=0, epochs=150, lr=1e-2)
    histories = [np.arange(stop - 4, stop) for stop in (4, 5, 12, 29)]
    assert model.rank(histories, 1)[:, 0].tolist() == [4, 5, 12, 29]


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "hstu"])
def test_items_of_the_same_features_are_read_and_named_alike(name):
    import torch
    from benchmarks.quality._sequence_models import SEQUENCE_MODELS
    from benchmarks.quality._sequence_training import train_sequence_model

    torch.manual_seed(0)
    described = np.random.default_rng(0).normal(size=(5, 3)).repeat(2, axis=0)  # items 0 and 1 alike, 2 and 3, ...
    model = SEQUENCE_MODELS[name](10, width=16, dropout=0.0, max_length=4, features=described)
    before = model.project.weight.detach().clone()
    train_sequence_model(model, [np.array([0, 2, 4, 6])] * 4, seed=0, epochs=2)
    assert not torch.equal(before, model.project.weight)
    torch.nn.init.zeros_(model.items.weight)  # nothing but features tells items apart
    scores = model.scores(model(model.batch([np.array([0, 2, 4]), np.array([1, 3, 5])]))[:, -1])
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[:, 0::2], scores[:, 1::2])
    assert scores[0].std() > 0
    found = model.table()[1:]
    expected = torch.from_numpy(described - described.mean(0)).float()
    expected = expected / expected.abs().sum(1).mean() @ model.project.weight.T
    torch.testing.assert_close(found, expected)


@pytest.fixture
def rates(monkeypatch):
    """The learning rates of all steps of AdamW, in a list that grows."""
    import torch

    found, step = [], torch.optim.AdamW.step

    def seen(optimizer, *arguments, **more):
        found.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *arguments, **more)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    return found


def test_a_cosine_ends_with_no_learning_rate(rates):
    from benchmarks.quality._sequence_models import SASRec
    from benchmarks.quality._sequence_training import learning_rate_factor, train_sequence_model

    model = SASRec(10, width=16, layers=1, max_length=4)
    sequences = [np.array([0, 2, 4, 6])] * 5
    train_sequence_model(model, sequences, seed=0, epochs=10, batch_size=2, lr=0.5, schedule="cosine")
    assert rates == [0.5 * learning_rate_factor(done / 30) for done in range(1, 31)]
    assert rates[0] == max(rates)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_a_cosine_ends_with_the_budget_where_that_ends_first(rates):
    from benchmarks.quality._sequence_models import SASRec
    from benchmarks.quality._sequence_training import learning_rate_factor, train_sequence_model

    model, sequences = SASRec(10, width=16, layers=1, max_length=4), [np.arange(4)] * 2
    a_step = 1 / 4
    train_sequence_model(
        model, sequences, seed=0, epochs=100, lr=0.5, schedule="cosine", spent=lambda: a_step * len(rates)
    )
    assert rates == [0.5 * learning_rate_factor(share) for share in (1 / 100, 1 / 4, 2 / 4, 3 / 4)]


def test_sequence_models_learn_in_bfloat16_too():
    import torch
    from benchmarks.quality._sequence_models import SASRec
    from benchmarks.quality._sequence_training import train_sequence_model

    histories, found = [np.arange(stop - 4, stop) for stop in (5, 12, 29)], {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = SASRec(30, width=16, layers=1, dropout=0.0, max_length=4)
        train_sequence_model(model, [np.arange(30)] * 8, seed=0, epochs=150, lr=1e-2, precision=precision)
        assert model.rank(histories, 1)[:, 0].tolist() == [5, 12, 29]
        found[precision] = model.items.weight
        assert model.items.weight.dtype == torch.float32
    assert not torch.equal(found["float32"], found["bfloat16"])


@pytest.mark.parametrize("wrong", [{"schedule": "cosin"}, {"precision": "float16"}])
def test_other_schedules_and_precisions_are_refused(wrong):
    from benchmarks.quality._sequence_models import SASRec
    from benchmarks.quality._sequence_training import train_sequence_model

    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        train_sequence_model(SASRec(10, width=16), [np.arange(4)], seed=0, epochs=1, **wrong)
