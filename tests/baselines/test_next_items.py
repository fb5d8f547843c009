"""What sequence models train on: every next item once, as the generators do."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_hf.baselines import NextItemDataset
from onerec_hf.baselines.next_items import pieces
from onerec_hf.data import prefix_examples
from onerec_hf.data.sequences import UserSequences


@settings(deadline=None)  # the first example imports what reads it
@given(length=st.integers(2, 60), longest=st.integers(2, 20))
def test_sequence_models_read_what_generators_read(length, longest):
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


@pytest.mark.parametrize("longest", [1, 2, 3, 7])
def test_every_item_but_the_first_is_a_target_once(longest):
    dataset = NextItemDataset([np.arange(20), np.arange(20, 22), np.array([22])], longest)
    targets = np.concatenate([dataset[row]["targets"] for row in range(len(dataset))])
    assert sorted(targets[targets >= 0].tolist()) == [*range(1, 20), 21]


def test_sequences_without_a_next_item_are_refused():
    with pytest.raises(ValueError, match="no training sequence has two items"):
        NextItemDataset([np.array([3]), np.array([], dtype=int)], 4)
