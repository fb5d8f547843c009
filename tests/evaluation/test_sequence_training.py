"""What the contest's sequence models learn from (benchmarks/_sequence_training.py): every next item once, as the generators do."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.data import prefix_examples
from onerec_hf.data.sequences import UserSequences

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        from _sequence_training import pieces

        yield pieces


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


def test_training_reaches_the_oldest_items_of_long_sequences(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import torch
    from _sequence_models import SASRec
    from _sequence_training import train_sequence_model

    torch.manual_seed(0)
    model = SASRec(30, width=16, layers=1, dropout=0.0, max_length=4)
    train_sequence_model(model, [np.arange(30)] * 8, seed=0, epochs=150, lr=1e-2)
    histories = [np.arange(stop - 4, stop) for stop in (4, 5, 12, 29)]
    assert model.rank(histories, 1)[:, 0].tolist() == [4, 5, 12, 29]
