"""What is said of a table that was loaded: feedback that nothing chooses from, and interactions with rare items."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import ExampleSettings, prepare_log
from onerec_hf.workflows import load_dataset
from onerec_hf.workflows.data_options import DATA_OPTIONS_NAME
from onerec_hf.workflows.loading import load_in_memory


@pytest.mark.filterwarnings("ignore:interactions. dropped")
def test_a_log_of_several_events_is_asked_for_its_positive_ones(capsys, tmp_path):
    log = pd.DataFrame({"user_id": [1] * 5 + [2] * 5, "item_id": [*range(5)] * 2, "timestamp": [*range(5)] * 2})
    log["event"] = ["view", "buy"] * 5
    load_dataset(interactions=log, min_item_interactions=1)
    assert "Every row counts as positive, whatever its 'event' (" in capsys.readouterr().err
    load_dataset(interactions=log, min_item_interactions=1, positive=["event=view"])
    (tmp_path / DATA_OPTIONS_NAME).write_text("{}")  # of a model
    load_dataset(interactions=log, min_item_interactions=1, model=str(tmp_path))
    load_in_memory(interactions=log, min_item_interactions=1)  # of a command without the option
    load_dataset(interactions=log.assign(event=[{"type": 1}, {"type": 2}] * 5), min_item_interactions=1)
    assert "Every row counts as positive" not in capsys.readouterr().err


def test_what_a_prepared_folder_has_may_be_named(tmp_path):
    log = pd.DataFrame({"user_id": [1] * 5 + [2] * 5, "item_id": [*range(5)] * 2, "timestamp": [*range(5)] * 2})
    log.to_csv(tmp_path / "log.csv", index=False)
    prepare_log(tmp_path / "log.csv", tmp_path / "ready", settings=ExampleSettings(min_item_interactions=1))
    named = {"features": "none", "history_feedback": "positive"}
    assert load_dataset(prepared=str(tmp_path / "ready"), **named).features is None


def test_a_long_tail_that_is_left_out_is_said(capsys):
    """Every user has four items that all have, and two of his own."""
    items = np.concatenate([[0, 1, 2, 3, 10 + 2 * user, 11 + 2 * user] for user in range(6)])
    log = pd.DataFrame({"user_id": np.repeat(range(6), 6), "item_id": items, "timestamp": [*range(6)] * 6})
    load_dataset(interactions=log)
    assert (
        "--min_item_interactions 5 leaves out 12 of 16 items, with 33% of the positive interactions: they are never recommended."
        in capsys.readouterr().err
    )
    load_dataset(interactions=log, min_item_interactions=1)
    assert "leaves out" not in capsys.readouterr().err
