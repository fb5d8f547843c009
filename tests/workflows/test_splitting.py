"""The split of a table: by time, of given files, ties counted and shuffled; and runs over them."""

import json

import numpy as np
import pandas as pd
import pytest

from onerec_hf.data import Ties, UserSequences, given_split, leave_one_out
from onerec_hf.workflows import load_dataset
from tests.cli.commands import onerec, refused, succeeded
from tests.rounding import close
from tests.workflows.conftest import TINY, options_of

NAMES = ["user_id", "item_id", "timestamp"]


def table(users=40, items=20, length=10, step=86_400):
    """Chains of items, an item a day from 1970-01-01."""
    starts = np.random.default_rng(0).integers(0, items, users)
    rows = [(f"u{u:02}", f"m{(s + k) % items}", step * k + u) for u, s in enumerate(starts) for k in range(length)]
    return pd.DataFrame(rows, columns=NAMES)


def test_periods_are_dates_or_numbers():
    frame = table()
    by_date = load_dataset(
        interactions=frame, holdout="temporal", validation_start="1970-01-07", test_start="1970-01-09T00:00:00Z"
    )
    by_number = load_dataset(
        interactions=frame, holdout="temporal", validation_start=str(6 * 86_400), test_start=str(8 * 86_400)
    )
    for data in (by_date, by_number):
        assert (data.train_sequences.timestamps < 6 * 86_400).all()
        row, items = data.test[0], frame.item_id[:10].tolist()
        assert (row["history"], row["session"]) == (items[:8], items[8:])
        assert data.validation[0]["session"] == items[6:8]
        assert len(data.test) == len(data.validation) == 40
    counted = load_dataset(interactions=frame, holdout="temporal")
    assert len(counted.train_sequences.item_ids) == pytest.approx(0.8 * len(frame), abs=40)
    smaller = counted.cut(session_length=1, max_history=3)  # what auto does
    assert smaller.test is counted.test
    assert "up to 1 target items after up to 3 history items" in smaller.protocol
    assert "up to 5 target items" not in smaller.protocol


def test_rows_that_are_left_out_do_not_change_the_kind_of_split():
    """Of `--new_items skip`: the periods stay."""
    data = load_dataset(interactions=table(), holdout="temporal")
    kept = data.where(data.sequences.item_ids != "m3", "Without m3.")
    assert "Temporal split" in kept.protocol
    assert kept.test["session"][:] == [
        [item for item in session if item != "m3"]
        for user, session in zip(data.test["user_id"], data.test["session"], strict=True)
        if user in set(kept.test["user_id"])
    ]
    assert len(kept.test) > 30
    assert max(map(len, kept.test["session"])) > 0


def test_given_files_are_the_split(tmp_path):
    frame = table()
    day = frame.timestamp // 86_400
    names = {}
    for name, rows in (
        ("train", frame[day < 6]),
        ("validation", frame[(day >= 6) & (day < 8)]),
        ("test", frame[day >= 8]),
    ):
        names[name] = str(tmp_path / f"{name}.csv")
        if name == "test":  # a user of whom nothing is known
            rows = pd.concat([rows, pd.DataFrame([("new", "m3", 0)], columns=NAMES)])
        rows.to_csv(names[name], index=False)
    data = load_dataset(
        interactions=names["train"],
        holdout="given",
        validation_interactions=names["validation"],
        test_interactions=names["test"],
    )
    wanted = load_dataset(
        interactions=frame, holdout="temporal", validation_start=str(6 * 86_400), test_start=str(8 * 86_400)
    )
    for part in ("train", "validation", "test"):
        assert getattr(data, part).to_list() == getattr(wanted, part).to_list()
    assert "1 test users without a history are left out" in data.protocol


def test_a_given_split_keeps_the_order_of_its_tables():
    """Times of different tables need not agree."""
    parts = [
        UserSequences.from_interactions(pd.DataFrame([(1, item, time) for item, time in rows], columns=NAMES))
        for rows in ([(5, 90), (6, 91)], [(7, 3)], [(8, 2), (9, 1)])
    ]
    split = given_split(*parts)
    assert split.validation[0]["history"] == [5, 6]
    assert (split.test[0]["history"], split.test[0]["session"]) == ([5, 6, 7], [9, 8])


def test_train_and_evaluate_by_time(tmp_path):
    file = tmp_path / "log.csv"
    table().to_csv(file, index=False)
    settings = {**TINY, "codebook_sizes": [4, 4, 4], "eval_top_k": [10]}
    common = ["--interactions", file, "--holdout", "temporal", "--test_start", "1970-01-10"]
    folder = tmp_path / "m"
    succeeded(onerec("train", *common, "--output_dir", folder, *options_of(settings)))
    saved = json.loads((folder / "data_options.json").read_text())
    assert (saved["holdout"], saved["test_start"]) == ("temporal", "1970-01-10")
    command = ["evaluate", "--model", folder, "--interactions", file, "--json", tmp_path / "e.json", "--top_k", 10]
    succeeded(onerec(*command))  # the split of the training, without options
    rows = {row["name"]: row["value"] for row in json.loads((tmp_path / "e.json").read_text())["rows"]}
    trained = {row["name"]: row["value"] for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert {name: trained[name] for name in rows} == close(rows)
    more = [*options_of({**settings, "max_steps": 1}), "--model", folder, "--output_dir", tmp_path / "n"]
    assert "all training interactions are read again" in succeeded(onerec("train", "--interactions", file, *more)).err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--holdout", "random"], "--holdout random: choose one of last, temporal, given"),
        (["--test_start", "5"], "--test_start goes with --holdout temporal"),
        (["--holdout", "given"], "--holdout given needs --validation_interactions"),
        (["--holdout", "temporal", "--test_start", "soon"], "--test_start soon: pass a number"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(options, words, tmp_path):
    table().to_csv(tmp_path / "log.csv", index=False)
    done = onerec("train", "--interactions", tmp_path / "log.csv", "--output_dir", tmp_path / "m", *options)
    refused(done, words)
    assert not (tmp_path / "m").exists()


def baskets(ordered=True):
    """Six items of each user at one instant, sorted by id or not, and a seventh later for half of the users."""
    rng, rows = np.random.default_rng(0), []
    for user in range(40):
        items = rng.choice(30, 7, replace=False)
        first = sorted(items[:6]) if ordered else items[:6]
        rows += [(user, int(item), 0) for item in first] + ([(user, int(items[6]), 1)] if user % 2 else [])
    return pd.DataFrame(rows, columns=NAMES)


def test_targets_that_a_tie_decides_are_counted_and_shuffled():
    frame = baskets()
    sequences = UserSequences.from_interactions(frame)
    found = Ties.of(sequences)
    assert (found.targets, found.tied, found.rows, found.in_order) == (40, 20, 200, 1.0)
    with pytest.warns(UserWarning, match="A tie in time decides 20 of 40 test targets .* sorted by item id"):
        assert "A tie in time decides 20 of 40" in leave_one_out(sequences).description
    data = load_dataset(interactions=frame)  # no warning: it stands in the protocol
    assert "--ties shuffle puts them in random order." in data.protocol
    shuffled = [load_dataset(interactions=frame, ties="shuffle", ties_seed=seed) for seed in (0, 0, 1)]
    targets = [each.test["session"][:] for each in shuffled]
    assert targets[0] == targets[1] != targets[2]
    above = [np.mean([row["session"][0] > max(row["history"]) for row in each.test]) for each in (data, shuffled[0])]
    assert above[0] > 0.5 > above[1]
    assert "sorted by item id" not in shuffled[0].protocol
    assert data.with_shuffled_ties().test["session"][:] == targets[0]


def test_ties_in_no_order_are_counted_without_a_warning():
    description = leave_one_out(UserSequences.from_interactions(baskets(ordered=False))).description
    assert "A tie in time decides 20 of 40 test targets (50.0%)." in description
