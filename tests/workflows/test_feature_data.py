"""Features of a dataset: columns of its examples equal a plain recomputation, follow every split, and learn nothing of held-out rows."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf import ItemCatalogue, OneRecProcessor
from onerec_hf.data import DataError, OneRecDataCollator, logged_samples, positive_histories
from onerec_hf.data.packing import EXAMPLE_COLUMNS
from onerec_hf.evaluation.held_out import seen_items
from onerec_hf.modeling.features import MISSING, UNKNOWN
from onerec_hf.workflows import increment, load_dataset
from onerec_hf.workflows.refit import everything
from tests.cli.commands import onerec, refused, succeeded

ALL = {
    "positive": ["like>=1"],
    "user_features": ["age", "city"],
    "item_features": ["genres"],
    "interaction_features": ["like", "ratio", "time"],
    "min_item_interactions": 3,
    "session_length": 2,
    "max_history": 7,
}


def made(seed=0, users=30, items=12, rows=900):
    """Interactions with ties in time, users without some, and items with genres."""
    random = np.random.default_rng(seed)
    # The oldest 15 rows of each user, whose times the others follow, are of training.
    table = pd.DataFrame(
        {
            "user_id": random.integers(0, users, rows),
            "item_id": random.integers(0, items, rows),
            "timestamp": 1_600_000_000 + random.integers(0, 400, rows) * 1800,
            "like": random.integers(0, 2, rows),
            "ratio": np.where(random.random(rows) < 0.1, np.nan, random.random(rows).round(2)),
        }
    )
    people = pd.DataFrame(
        {
            "user_id": range(users - 3),
            "age": random.integers(18, 80, users - 3) + 0.5,
            "city": random.choice(list("abc"), users - 3),
        }
    )
    goods = pd.DataFrame({"item_id": range(items), "genres": [["x|y", "y", "x"][i % 3] for i in range(items)]})
    return {"interactions": table, "users": people, "items": goods}


def events_of(tables, data):
    """All interactions of each user on items that are kept, in order, as dictionaries."""
    table = tables["interactions"]
    table = table[table.item_id.isin(data.item_ids)].sort_values(["user_id", "timestamp"], kind="stable")
    return {
        user: [
            {**row, "time": row["timestamp"], "positive": row["like"]}
            for row in rows.where(rows.notna(), None).to_dict("records")
        ]
        for user, rows in table.groupby("user_id")
    }


def check(data, tables, examples, everything):
    """The columns of examples against the schema's own encoding of the whole history."""
    schema = data.features.schema
    people = tables["users"].set_index("user_id").to_dict("index")
    events = events_of(tables, data)
    assert len(examples)
    for row in examples:
        read = [e for e in events[row["user_id"]] if everything or e["like"]]
        ids = [event["item_id"] for event in read]
        # The history is a stretch of what the user did.
        coded = schema.encode_interactions(read)
        wanted = np.array(row["history_features"]).reshape(len(row["history"]), -1)
        starts = [
            at
            for at in range(len(ids) - len(row["history"]) + 1)
            if ids[at : at + len(row["history"])] == row["history"] and (coded[at : at + len(wanted)] == wanted).all()
        ]
        assert starts
        assert row["user_features"] == schema.encode_users([people.get(row["user_id"])])[0].tolist()
        if everything:
            assert row["history_positive"] == [bool(read[starts[0] + place]["like"]) for place in range(len(wanted))]
    return events


@pytest.mark.parametrize("feedback", ["positive", "all"])
def test_columns_equal_the_schemas_encoding(feedback):
    tables = made()
    data = load_dataset(**tables, **ALL, history_feedback=feedback)
    plain = load_dataset(
        interactions=tables["interactions"],
        items=tables["items"],
        **{n: v for n, v in ALL.items() if "features" not in n},
    )
    everything_read = feedback == "all"
    for name in ("train", "validation", "test"):
        examples, before = getattr(data, name), getattr(plain, name)
        check(data, tables, examples, everything_read)
        # Targets and users are those of positive interactions, so that models are compared over the same.
        assert examples["session"][:] == before["session"][:]
        assert examples["user_id"][:] == before["user_id"][:]
        assert before.column_names == ["user_id", "history", "session", *(["request_time"] if name != "train" else [])]
        if name != "train" or not everything_read:
            assert positive_histories(examples) == before["history"][:]
    assert plain.features is None
    np.testing.assert_array_equal(data.train_sequences.item_ids, plain.train_sequences.item_ids)
    genres = data.features.schema.item[0]
    wanted = genres.encode(tables["items"].set_index("item_id").loc[data.item_ids, "genres"])
    np.testing.assert_array_equal(data.features.items, wanted)


@pytest.mark.parametrize("feedback", ["positive", "all"])
def test_every_way_of_cutting_keeps_features(feedback):
    tables = made(1)
    data = load_dataset(**tables, **ALL, history_feedback=feedback)
    for again in (
        data.cut(session_length=1, max_history=4),
        everything(data),
        data.where(data.sequences.item_ids != 3, ""),
    ):
        if 3 not in again.item_ids:
            tables = {**tables, "interactions": tables["interactions"].query("item_id != 3")}
        check(again, tables, again.train, feedback == "all")
        check(again, tables, again.test, feedback == "all")


@pytest.mark.parametrize("feedback", ["positive", "all"])
def test_prefixes_read_what_windows_read(feedback):
    data = load_dataset(**made(2), **{**ALL, "max_history": 200}, history_feedback=feedback)
    slots = data.features.schema.interaction_slots

    def windows(examples):
        for row in examples:
            sessions, lengths = (
                row.get("sessions", [row.get("session")]),
                row.get("history_lengths", [len(row["history"])]),
            )
            for session, length in zip(sessions, lengths, strict=True):
                yield row["history"][:length], session, row["history_features"][: length * slots], row["user_features"]

    assert list(windows(data.on_prefixes().train)) == list(windows(data.train))
    short = load_dataset(**made(2), **ALL, history_feedback=feedback).on_prefixes().train
    assert max(map(len, short["history"])) <= ALL["max_history"]
    assert all(len(f) == len(h) * slots for f, h in zip(short["history_features"], short["history"], strict=True))


@pytest.mark.filterwarnings("ignore:interactions. dropped")
@pytest.mark.parametrize("feedback", ["positive", "all"])
def test_shuffled_ties_shuffle_interactions_with_their_features(feedback):
    tables = made(3)
    tables["interactions"]["timestamp"] //= 40_000
    # The ratio names the row.
    tables["interactions"]["ratio"] = tables["interactions"].item_id + 0.5
    data = load_dataset(**tables, **ALL, history_feedback=feedback, ties="shuffle")
    plain = load_dataset(
        interactions=tables["interactions"],
        positive=ALL["positive"],
        ties="shuffle",
        min_item_interactions=3,
        session_length=2,
        max_history=7,
    )
    assert positive_histories(data.test) == plain.test["history"][:]
    again = load_dataset(**tables, **ALL, history_feedback=feedback).with_shuffled_ties()
    assert again.test.to_list() == data.test.to_list()
    schema = data.features.schema
    slot = [feature.key for feature in schema.interaction].index("ratio")
    for row in [*data.train, *data.test]:
        mine = np.array(row["history_features"]).reshape(-1, schema.interaction_slots)[:, slot]
        assert mine.tolist() == schema.interaction[slot].encode([item + 0.5 for item in row["history"]])[:, 0].tolist()
    if feedback == "all":  # and those that are not positive are not in the order of the file either
        in_file = load_dataset(**tables, **ALL, history_feedback=feedback)
        assert [f[:9] for f in data.test["history_positive"]] != [f[:9] for f in in_file.test["history_positive"]]


def test_temporal_and_given_splits():
    tables = made(4)
    table = tables["interactions"].sort_values("timestamp", kind="stable")
    data = load_dataset(**tables, **ALL, history_feedback="all", holdout="temporal")
    for name in ("train", "validation", "test"):
        check(data, tables, getattr(data, name), True)
    train, validation, test = table[:600], table[600:750], table[750:]
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("v", validation), ("t", test)):
            part.to_csv(f"{folder}/{name}.csv", index=False)
        files = {"validation_interactions": f"{folder}/v.csv", "test_interactions": f"{folder}/t.csv"}
        given = load_dataset(
            **{**tables, "interactions": train}, **ALL, **files, history_feedback="all", holdout="given"
        )
        plain = load_dataset(
            interactions=train,
            positive=ALL["positive"],
            **files,
            holdout="given",
            min_item_interactions=3,
            session_length=2,
            max_history=7,
        )
    for name in ("train", "validation", "test"):
        check(given, tables, getattr(given, name), True)
        assert getattr(given, name)["session"][:] == getattr(plain, name)["session"][:]
    assert positive_histories(given.test) == plain.test["history"][:]


@pytest.mark.parametrize("holdout", ["last", "temporal"])
@pytest.mark.parametrize("feedback", ["positive", "all"])
def test_nothing_of_held_out_rows_reaches_schema_or_history(holdout, feedback):
    """A leak is planted: held-out rows have values of their own, a huge number and an item's target as a category."""
    tables = made(5)
    table = tables["interactions"].sort_values(["user_id", "timestamp"], kind="stable", ignore_index=True)
    table["note"] = np.where(np.arange(len(table)) % 2, "a", "b")
    options = {
        **ALL,
        "interaction_features": ["like", "ratio", "note", "time"],
        "history_feedback": feedback,
        "holdout": holdout,
    }
    clean = load_dataset(**{**tables, "interactions": table}, **options)
    # Rows from each user's validation target on, or of the held-out periods.
    liked = table[table.like == 1]
    if holdout == "last":
        from_end = liked.groupby("user_id").cumcount(ascending=False)
        first = liked[from_end == 1].groupby("user_id").apply(lambda rows: rows.index[0])
        late = table.index.to_numpy() >= table.user_id.map(first).fillna(len(table)).to_numpy()
    else:
        late = table.timestamp.to_numpy() >= clean.train_sequences.timestamps.max() + 1
        assert (
            clean.sequences.timestamps[clean.sequences.timestamps > clean.train_sequences.timestamps.max()].min()
        ) >= 0
    assert 0 < late.sum() < len(table) / 2
    planted = table.copy()
    planted.loc[late, "ratio"] = 1e6 + planted.item_id[late]
    planted.loc[late, "note"] = "leak" + planted.item_id[late].astype(str)
    leaky = load_dataset(**{**tables, "interactions": planted}, **options)
    assert leaky.features.schema == clean.features.schema
    assert "leak" not in leaky.features.schema.to_json()
    assert leaky.train.to_list() == clean.train.to_list()
    if (holdout, feedback) != (
        "temporal",
        "all",
    ):  # there a validation history holds the period's interactions before its target
        assert leaky.validation.to_list() == clean.validation.to_list()
    # The test's histories hold what came before: there the planted values are unknown, and the target's own row is not among them.
    test = leaky.test.to_list()
    assert [row["session"] for row in test] == [row["session"] for row in clean.test.to_list()]
    if holdout == "temporal":  # histories end before the period
        assert positive_histories(leaky.test) == positive_histories(clean.test)
    slot = [feature.key for feature in leaky.features.schema.interaction].index("note")
    notes = [np.array(row["history_features"]).reshape(len(row["history"]), -1)[:, slot] for row in test]
    assert max(map(max, notes)) <= 4  # no code of its own
    assert any((note == UNKNOWN).any() for note in notes)


def test_what_only_held_out_users_and_items_have_is_unknown():
    tables = made(6)
    # Item 11 occurs last in everything: its genre is not in training.
    table = tables["interactions"].assign(like=1)
    table = table[(table.item_id != 11)]
    last = table.groupby("user_id").timestamp.max() + 60
    extra = pd.DataFrame({"user_id": last.index, "item_id": 11, "timestamp": last.to_numpy(), "like": 1, "ratio": 0.5})
    tables["items"].loc[11, "genres"] = "secret"
    data = load_dataset(**{**tables, "interactions": pd.concat([table, extra])}, **ALL)
    assert 11 in data.item_ids
    assert "secret" not in data.features.schema.to_json()
    assert data.features.items[-1].tolist() == [UNKNOWN, 0]


def test_users_without_a_row_are_missing_and_counted(capsys):
    data = load_dataset(**made(), **ALL)
    assert "3 of 30 users have no row in --users: their features are missing." in capsys.readouterr().err
    assert [row["user_features"] for row in data.test if row["user_id"] >= 27] == [[MISSING, MISSING]] * 3
    tables = made()
    tables["users"]["user_id"] += 1000
    with pytest.raises(DataError, match="none of 30 users of the interactions has a row"):
        load_dataset(**tables, **ALL)


def test_auto_guesses_and_says_why(capsys):
    tables = made()
    tables["items"]["title"] = [f"title {i}" for i in range(12)]
    tables["users"]["planet"] = "earth"
    tables["users"]["vector"] = [[0.5, 0.1]] * 27
    auto = {name: ["auto"] for name in ALL if "features" in name}
    data = load_dataset(**tables, **{**ALL, **auto}, history_feedback="all")
    said = capsys.readouterr().err
    assert (
        "Features of users: age (2 buckets of a number), city (3 values); left out: planet (constant), vector (vectors are no feature)."
        in said
    )
    assert "left out: title (each of 12 values occurs once)" in said
    assert "positive (2 values, flag)" in said
    assert {name: value for name, value in data.options.items() if "feature" in name or "feedback" in name} == {
        "user_features": ["age", "city"],
        "item_features": ["genres"],
        "interaction_features": ["like", "ratio", "time"],
        "history_feedback": "all",
    }
    assert (
        "Features, learned from training rows: of users age, city; of items genres; of interactions like, ratio, time"
        in data.protocol
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"user_features": ["size"]}, "--user_features: no column 'size' among: age, city"),
        ({"user_features": ["user_id"]}, "--user_features user_id: an id is no feature"),
        ({"interaction_features": ["timestamp"]}, "--interaction_features timestamp: write time for the times"),
        ({"interaction_features": ["like", "like"]}, "name each column once"),
        ({"users": None}, "--user_features age city: pass --users, the table with these columns"),
        ({"user_features": None}, "--users goes with --user_features or --features auto; pass both or neither"),
        ({"items": None}, "--item_features genres: pass --items"),
        ({"history_feedback": "every"}, "--history_feedback every: choose positive or all"),
    ],
)
def test_bad_options(options, error):
    with pytest.raises(ValueError, match=error):
        load_dataset(**{**made(), **ALL, **options})


def test_one_name_for_two_features():
    tables = made()
    tables["users"]["ratio"] = [0.5, 1.5, 2.5] * 9
    with pytest.raises(ValueError, match="--interaction_features ratio: a feature of users has this name"):
        load_dataset(**tables, **{**ALL, "user_features": ["ratio"]})


def test_a_saved_schema_encodes_newer_rows(capsys):
    tables = made(7)
    first = load_dataset(**tables, **ALL, history_feedback="all")
    schema = first.features.schema
    newest = tables["interactions"].timestamp.max()
    more = made(8, rows=200)["interactions"].assign(ratio=9.0)
    more["timestamp"] += newest - more.timestamp.min() + 1
    grown = {**tables, "interactions": pd.concat([tables["interactions"], more])}
    grown["users"] = grown["users"].assign(city=["z"] * 5 + grown["users"].city.tolist()[5:])
    data = load_dataset(**grown, **ALL, history_feedback="all", schema=schema)
    assert "5 unknown" in capsys.readouterr().err
    assert data.features.schema == schema
    check(data, grown, data.train, True)
    assert (
        load_dataset(**grown, **ALL, history_feedback="all").with_schema(schema).train.to_list()
        == data.train.to_list()
    )
    assert data.with_schema(schema) is data
    grown["users"] = grown["users"].assign(age="old")
    with pytest.raises(DataError, match="column 'age': feature 'age' is a number; got 'old'"):
        load_dataset(**grown, **ALL, history_feedback="all", schema=schema)
    with pytest.raises(DataError, match="--user_features: no column 'age'"):
        load_dataset(
            **{**grown, "users": grown["users"].drop(columns="age")}, **ALL, history_feedback="all", schema=schema
        )


def test_prepare_takes_the_options(tmp_path):
    tables = made()
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    log, out = ["--interactions", tmp_path / "interactions.csv"], ["--output_dir", tmp_path / "ready"]
    users = ["--users", tmp_path / "users.csv", "--user_features", "age"]
    run = succeeded(
        onerec("prepare", *log, *out, *users, "--interaction_features", "like", "time", "--history_feedback", "all")
    )
    assert "Features of users: age" in run.err
    data = load_dataset(prepared=str(tmp_path / "ready"))
    assert data.features.schema.config()["user"] == [["age", data.features.schema.user[0].size, 1]]
    assert {"history_features", "user_features", "history_positive"} <= set(data.test.column_names)
    refused(onerec("prepare", *log, *out, "--overwrite", *users[:2]), "--users goes with --user_features")
    with pytest.raises(
        ValueError, match="--interaction_features goes with --interactions; what a prepared folder holds was chosen"
    ):
        load_dataset(prepared=str(tmp_path / "ready"), interaction_features=["like"])


def test_an_increment_reads_the_features_of_all_rows_before(monkeypatch):
    tables = made(10)
    data = load_dataset(**tables, **ALL, history_feedback="all")
    until = int(np.quantile(data.sequences.timestamps, 0.5))
    trained_on = {"until": until, "interactions": 10, "users": 30, "held_out": 2}
    catalogue = ItemCatalogue(data.item_ids[:-1], [[i % 4, i // 4] for i in range(len(data.item_ids) - 1)], [4, 4])
    monkeypatch.setattr(increment, "_read", lambda model: trained_on)
    monkeypatch.setattr(increment, "load_processor", lambda option, model: OneRecProcessor.from_catalogue(catalogue))
    monkeypatch.setattr(increment, "check_catalogue", lambda *args, **kwargs: None)
    newer = increment.newer(data, "model")
    # Rows of an item that the catalogue lacks are no history either, positive or not.
    assert data.item_ids[-1] not in newer.item_ids
    known = {**tables, "interactions": tables["interactions"].query(f"item_id != {data.item_ids[-1]}")}
    assert 0 < len(newer.train) < len(data.train)
    for examples in (newer.train, newer.validation, newer.test):
        check(newer, known, examples, everything=True)
    assert newer.features.schema == data.features.schema
    assert len(newer.features.items) == len(newer.item_ids)


def test_only_positive_items_are_left_out_of_rankings():
    data = load_dataset(**made(11), **ALL, history_feedback="all")
    codes = [[i % 4, i // 4] for i in range(len(data.item_ids))]
    catalogue = ItemCatalogue(data.item_ids, codes, [4, 4])
    features = data.features
    processor = OneRecProcessor.from_catalogue(catalogue, features=features.schema, item_features=features.items)
    rows = list(data.test)[:5]
    batch = OneRecDataCollator(processor, with_seen=True)(rows)
    for row, excluded in zip(rows, batch["exclude"].tolist(), strict=True):
        liked = {item for item, flag in zip(row["history"], row["history_positive"], strict=True) if flag}
        assert set(catalogue.ids([place for place in excluded if place >= 0])) == liked
    seen = seen_items(data.test, catalogue)
    assert seen.unranked.tolist() == [
        len(set(history)) == len(data.item_ids) for history in positive_histories(data.test)
    ]
    # The trainer keeps the column that says so.
    assert "history_positive" in EXAMPLE_COLUMNS


ONE_BY_ONE = {
    "positive": ["like>=1"],
    "history_feedback": "all",
    "min_item_interactions": 1,
    "session_length": 1,
    "holdout": "last",
}


def test_shuffling_ties_moves_no_row_of_another_fraction():
    rows = [(user, place // 2 % 5, 5 + place / 10, place % 2) for user in range(20) for place in range(10)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "like"])
    in_file, shuffled = (load_dataset(interactions=log, ties=ties, **ONE_BY_ONE) for ties in ("file", "shuffle"))
    for name in ("train", "validation", "test"):
        assert getattr(shuffled, name).to_list() == getattr(in_file, name).to_list()


def given_tables(folder, *tables):
    """Tables of the same rows for each user, the first one in memory: (item, time, like)."""
    logs = [
        pd.DataFrame(
            [(user, *row) for user in range(30) for row in rows], columns=["user_id", "item_id", "timestamp", "like"]
        )
        for rows in tables
    ]
    for name, log in zip(("validation", "test"), logs[1:], strict=True):
        log.to_csv(folder / f"{name}.csv", index=False)
    files = {f"{name}_interactions": str(folder / f"{name}.csv") for name in ("validation", "test")}
    return {"interactions": logs[0], **files, **ONE_BY_ONE, "holdout": "given"}


def test_shuffling_ties_moves_no_row_of_another_given_table(tmp_path):
    # Item 4 of the validation table has the time of item 3 of training.
    options = given_tables(tmp_path, [(1, 1, 1), (2, 2, 1), (3, 5, 1)], [(4, 5, 0), (5, 6, 1)], [(4, 7, 1), (6, 8, 1)])
    in_file, shuffled = (load_dataset(**options, ties=ties, stride=1) for ties in ("file", "shuffle"))
    assert not any(4 in history for history in shuffled.train["history"])
    for name in ("train", "validation", "test"):
        assert getattr(shuffled, name).to_list() == getattr(in_file, name).to_list()


@pytest.mark.parametrize("ties", ["file", "shuffle"])
def test_rare_items_of_given_tables_are_in_no_history(tmp_path, ties):
    options = given_tables(tmp_path, [(1, 1, 1), (9, 2, 0), (2, 3, 1), (1, 4, 1)], [(2, 5, 1)], [(9, 6, 0), (1, 7, 1)])
    data = load_dataset(**{**options, "min_item_interactions": 2}, ties=ties)
    assert 9 not in data.item_ids
    assert not any(9 in history for part in (data.train, data.validation, data.test) for history in part["history"])


@pytest.mark.parametrize("feedback", ["positive", "all"])
def test_a_column_named_positive_is_no_feature(feedback, capsys):
    # Its schema would be read again as one whose histories hold other interactions too.
    tables = made()
    tables["interactions"]["positive"] = tables["interactions"].like
    options = {**ALL, "history_feedback": feedback}
    with pytest.raises(ValueError, match="--interaction_features positive: this name is taken; rename the column"):
        load_dataset(**tables, **{**options, "interaction_features": ["positive"]})
    data = load_dataset(**tables, **{**options, "interaction_features": ["auto"]})
    schema = data.features.schema
    assert data.options["interaction_features"] == (["like"] if feedback == "all" else []) + ["ratio", "time"]
    assert (schema.not_positive is None) == (feedback == "positive")
    again = load_dataset(**tables, **{**options, "interaction_features": ["auto"]}, schema=schema)
    for name in ("train", "validation", "test"):
        assert getattr(again, name).to_list() == getattr(data, name).to_list()


def test_auto_leaves_out_the_fractions_of_times():
    tables = made()
    tables["interactions"]["timestamp"] += np.arange(900) % 4 / 4
    data = load_dataset(**tables, **{**ALL, "interaction_features": ["auto"]})
    assert data.options["interaction_features"] == ["ratio", "time"]  # like is constant among positives


@pytest.mark.parametrize("feedback", ["positive", "all"])
def test_logged_samples_read_what_came_before_them(feedback):
    tables = made(3)
    data = load_dataset(**tables, **ALL, history_feedback=feedback)
    items = data.item_ids.tolist()
    catalogue = ItemCatalogue(items, [[place // 4, place % 4] for place in range(len(items))], [4, 4])
    log = tables["interactions"].assign(play_time_ms=1.0, duration_ms=1000)
    samples, _ = logged_samples(log, data.train_sequences, catalogue, max_history=7)
    events, own = check(data, tables, samples, feedback == "all"), data.train_sequences
    times = dict(zip(own.user_ids.tolist(), np.split(own.timestamps, own.offsets[1:-1]), strict=True))
    wanted = []
    for row in log.itertuples():
        period = times.get(row.user_id, np.zeros(1))
        if not period[0] < row.timestamp < period[-1]:
            continue
        before = [event for event in events[row.user_id] if event["timestamp"] < row.timestamp]
        read = [event for event in before if feedback == "all" or event["like"]][-7:]
        if row.item_id not in [event["item_id"] for event in read if event["like"]]:
            wanted.append(([event["item_id"] for event in read], [row.item_id]))
    assert sorted(zip(samples["history"], samples["session"], strict=True)) == sorted(wanted)
