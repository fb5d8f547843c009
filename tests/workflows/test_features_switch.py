"""`--features auto`: the options that it stands for, and what `train` says of columns that no features were asked of."""

import json
import shlex
from typing import Any

import numpy as np
import pandas as pd
import pytest

import onerec_hf.workflows.loading
import onerec_hf.workflows.unread
from onerec_hf.cli.arguments import parse_given
from onerec_hf.workflows import DataSettings, chosen_settings, load_dataset, train
from onerec_hf.workflows.data_options import DATA_OPTIONS_NAME
from onerec_hf.workflows.loading import as_dataset
from onerec_hf.workflows.unread import unread
from onerec_hf.workflows.verdict import Verdict
from tests.cli.commands import onerec, refused, succeeded
from tests.workflows.conftest import TINY, options_of
from tests.workflows.test_feature_data import made

SIZES: dict[str, Any] = {"min_item_interactions": 3, "session_length": 2, "max_history": 7}
LIKED: dict[str, Any] = {"positive": ["like>=1"], **SIZES}
SIDES = ("user_features", "item_features", "interaction_features")
FOUR: dict[str, Any] = {**{side: ["auto"] for side in SIDES}, "history_feedback": "all"}
HINT = "age, city of users; genres of items; like, ratio of interactions; interactions that are not positive"


def same(one, other):
    assert one.options == other.options
    assert (one.features is None) == (other.features is None)
    assert one.features is None or one.features.schema == other.features.schema
    assert one.train.to_list() == other.train.to_list()
    assert one.test.to_list() == other.test.to_list()


def without_users(tables):
    return {name: table for name, table in tables.items() if name != "users"}


@pytest.mark.parametrize(
    ("beside", "stands_for"),
    [
        ({}, FOUR),
        ({"user_features": ["age"]}, {**FOUR, "user_features": ["age"]}),
        ({"item_features": ["genres"]}, FOUR),
        ({"interaction_features": ["ratio"]}, {**FOUR, "interaction_features": ["ratio"]}),
        ({"history_feedback": "positive"}, {**FOUR, "history_feedback": "positive"}),
    ],
)
def test_it_stands_for_four_options_of_which_a_given_one_wins(beside, stands_for):
    same(load_dataset(**made(), **LIKED, features="auto", **beside), load_dataset(**made(), **LIKED, **stands_for))


def test_it_takes_the_tables_that_are_there():
    tables = made()
    log = {"interactions": tables["interactions"]}
    same(
        load_dataset(**without_users(tables), **SIZES, features="auto"),  # every interaction is positive
        load_dataset(**without_users(tables), **SIZES, item_features=["auto"], interaction_features=["auto"]),
    )
    every = {"positive": ["like>=0"], **SIZES}
    same(load_dataset(**log, **every, features="auto"), load_dataset(**log, **every, interaction_features=["auto"]))
    data = load_dataset(**log, **every, features="auto", history_feedback="all")
    assert data.options["history_feedback"] == "all"
    same(load_dataset(DataSettings(**every, features="auto"), **log), load_dataset(**log, **every, features="auto"))


@pytest.mark.parametrize("features", [None, "none"])
def test_without_it_nothing_changes(features):
    plain = load_dataset(**without_users(made()), **LIKED, features=features)
    assert plain.tables is None
    assert not {*FOUR, "features"} & plain.options.keys()


def test_columns_that_a_table_of_targets_lacks_are_no_features(tmp_path, capsys, monkeypatch):
    table = made()["interactions"].sort_values("timestamp")
    files = {}
    for name, rows in (("validation", table[700:800].drop(columns="ratio")), ("test", table[800:])):
        files[f"{name}_interactions"] = str(tmp_path / f"{name}.csv")
        rows.to_csv(files[f"{name}_interactions"], index=False)
    options = {"interactions": table[:700], **LIKED, "holdout": "given", **files}
    data = load_dataset(**options, features="auto")
    assert data.options["interaction_features"] == ["like", "time"]
    assert "ratio (not in every table)" in capsys.readouterr().err
    for rows in (700, 300):  # all users, and some
        monkeypatch.setattr(onerec_hf.workflows.unread, "_ROWS", rows)
        assert unread(load_dataset(**options)) == "like of interactions; interactions that are not positive"


def test_a_saved_schema_is_what_it_stands_for():
    tables = made()
    first = load_dataset(**tables, **LIKED, user_features=["age"], interaction_features=["ratio"])
    schema = first.features.schema
    same(load_dataset(**tables, **LIKED, features="auto", schema=schema), first)
    with pytest.raises(ValueError, match="--features none: a saved model keeps its features"):
        load_dataset(**tables, **LIKED, features="none", schema=schema)


def test_auto_beside_a_model_stands_for_the_feedback_that_it_reads(monkeypatch, files, tmp_path):
    settings = DataSettings(**files, **LIKED, features="auto")
    first = load_dataset(settings)
    for name, value in (("saved_schema", first.features.schema), ("model_type", "onerec")):
        monkeypatch.setattr(onerec_hf.workflows.loading, name, lambda *_, value=value: value)
    (tmp_path / DATA_OPTIONS_NAME).write_text(json.dumps(first.options))
    again = as_dataset(settings, str(tmp_path))
    same(again, first)
    assert again.options["history_feedback"] == "all"
    for call in (load_dataset, lambda model, **options: as_dataset(options, model)):
        with pytest.raises(ValueError, match="--features none: a saved model keeps its features"):
            call(**files, model=str(tmp_path), features="none")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"features": "on"}, "--features on: choose auto or none, or name columns with --user_features"),
        ({"features": "none"}, "--users goes with --user_features or --features auto"),
        ({}, "--users goes with --user_features or --features auto"),
        ({"features": "auto", "user_features": ["size"]}, "--user_features: no column 'size' among: age, city"),
        ({"features": "auto", "history_feedback": "some"}, "--history_feedback some: choose positive or all"),
    ],
)
def test_wrong_values(options, error):
    with pytest.raises(ValueError, match=error):
        load_dataset(**made(), **LIKED, **options)


@pytest.mark.parametrize("positive", [["like>=1"], ["like>=0"], None])
def test_prepare_has_the_same(tmp_path, positive):
    tables = made()
    for name, table in tables.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    read = {name: str(tmp_path / f"{name}.csv") for name in tables}
    options = {**SIZES, **({"positive": positive} if positive else {}), **read, "features": "auto"}
    folder = str(tmp_path / "ready")
    succeeded(onerec("prepare", *options_of(options), "--output_dir", folder))
    data, prepared = load_dataset(**options), load_dataset(prepared=folder)
    assert prepared.features.schema == data.features.schema
    assert prepared.options == data.options
    in_memory = data.test.remove_columns("request_time")  # a prepared folder has no times
    assert sorted(prepared.test.to_list(), key=repr) == sorted(in_memory.to_list(), key=repr)
    assert unread(prepared) == ""
    with pytest.raises(ValueError, match="--features goes with --interactions; what a prepared folder holds"):
        load_dataset(prepared=folder, features="auto")
    with pytest.raises(ValueError, match="--features goes with"):
        load_dataset(prepared=folder, features="none")
    feedback = "all" if positive == ["like>=1"] else "positive"
    assert load_dataset(prepared=folder, history_feedback=feedback).options == data.options
    with pytest.raises(ValueError, match="--history_feedback goes with"):
        load_dataset(prepared=folder, history_feedback="positive" if feedback == "all" else "all")
    refused(onerec("prepare", *options_of({**options, "features": "on"}), "--output_dir", folder), "--features on")
    del options["features"]
    refused(onerec("prepare", *options_of(options), "--output_dir", folder), "--users goes with", "--features auto")


def with_users(**options):
    """A dataset whose source has users, as a named one does, without features of them."""
    asked = load_dataset(**made(), **{**LIKED, **options}, features="auto")
    plain = load_dataset(**without_users(made()), **{**LIKED, **options})
    object.__setattr__(plain, "source", asked.source)
    return plain


@pytest.mark.parametrize("rows", [200_000, 300])  # all users, and some
@pytest.mark.parametrize("options", [{}, {"ties": "shuffle"}, {"holdout": "temporal"}])
def test_what_is_not_read(options, rows, monkeypatch):
    monkeypatch.setattr(onerec_hf.workflows.unread, "_ROWS", rows)
    plain = with_users(**options)
    assert unread(plain) == HINT
    assert unread(load_dataset(**without_users(made()), **{**LIKED, **options}, features="none")) == ""
    assert unread(load_dataset(**without_users(made()), **{**LIKED, **options}, item_features=["genres"])) == ""


@pytest.mark.filterwarnings("ignore:interactions. ")
def test_times_alone_are_not_worth_a_word():
    log = made()["interactions"][["user_id", "item_id", "timestamp"]]
    assert unread(load_dataset(interactions=log, **SIZES)) == ""
    assert unread(load_dataset(interactions=log.assign(note=np.arange(len(log)).astype(str)), **SIZES)) == ""
    assert unread(load_dataset(interactions=log.assign(tab=log.item_id % 2), **SIZES)) == "tab of interactions"


def test_feedback_that_was_refused_is_not_offered():
    asked = {**without_users(made()), **LIKED, "history_feedback": "positive"}
    assert unread(load_dataset(**asked)) == "genres of items; ratio of interactions"


def test_columns_without_a_name_are_no_features():
    tables = without_users(made())
    tables["items"] = pd.concat([tables["items"], pd.DataFrame(np.eye(len(tables["items"]), 4))], axis=1)
    tables["interactions"] = tables["interactions"].rename(columns={"ratio": 7})
    assert unread(load_dataset(**tables, **SIZES)) == "genres of items; like of interactions"
    data = load_dataset(**tables, **SIZES, features="auto")
    assert (data.options["item_features"], data.options["interaction_features"]) == (["genres"], ["like", "time"])


@pytest.mark.filterwarnings("ignore:interactions. dropped")
def test_held_out_rows_do_not_count():
    log = made()["interactions"].sort_values(["user_id", "timestamp"], kind="stable")[
        ["user_id", "item_id", "timestamp"]
    ]
    newest = log.groupby("user_id").cumcount(ascending=False)
    assert unread(load_dataset(interactions=log.assign(tab=np.minimum(newest, 2)), **SIZES)) == ""
    assert unread(load_dataset(interactions=log.assign(tab=np.minimum(newest, 3)), **SIZES)) == "tab of interactions"


def test_many_columns_are_counted():
    log = made()["interactions"]
    log = log.assign(**{f"flag{number}": (log.item_id + number) % 2 for number in range(4)})
    assert unread(load_dataset(interactions=log, **SIZES)) == "like, ratio and 4 more of interactions"


def test_advice_for_any_outcome():
    gains = {"onerec": np.full(40, 0.5), "popularity": np.full(40, 0.25)}
    longer, features = ("longer", "train"), ("features", "train")
    assert Verdict.on(gains, "onerec", "NDCG@10", advice=[longer], always=[features]).advice == (features,)
    gains["popularity"] *= 4
    assert Verdict.on(gains, "onerec", "NDCG@10", advice=[longer], always=[features]).advice == (features, longer)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    for name, table in made().items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return {name: str(folder / f"{name}.csv") for name in made()}


def test_train_says_what_it_does_not_read(files, tmp_path):
    data = {name: files[name] for name in ("interactions", "items")}
    given = [
        *options_of({**data, **LIKED, **TINY}),
        "--codebook_sizes",
        "4",
        "4",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    wanted = "auto would also read genres of items; like, ratio of interactions; interactions that are not positive"
    dry = succeeded(onerec("train", *given, "--dry_run"))
    assert dry.out.split() == ["--features", "none", *wanted.split()]
    assert not any(
        row.option == "features" for row in chosen_settings(**data, **LIKED, features="auto", preset="paper")
    )
    done = succeeded(onerec("train", *given))
    assert wanted in done.err
    tries = done.out.split("To try:\n")[1].splitlines()
    assert tries[0] == f"- features, which the model does not read: {wanted.removeprefix('auto would also read ')}:"
    command = shlex.split(tries[1])
    assert command[:2] == ["onerec-hf", "train"]
    assert parse_given((DataSettings,), [*command[command.index("--features") :][:2]], "train") == {"features": "auto"}
    assert command[-2:] == ["--output_dir", f"{tmp_path / 'out'}-2"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["settings"] == [{"option": "features", "value": "none", "reason": wanted}]
    # A model keeps reading nothing, and nothing more is said.
    further = onerec("train", *options_of({**data, **LIKED}), "--model", tmp_path / "out", "--dry_run")
    assert "--features" not in succeeded(further).out
    asked = onerec(
        "train", *options_of({**data, **LIKED}), "--model", tmp_path / "out", "--features", "auto", "--dry_run"
    )
    refused(asked, "the model reads no features")


def test_a_model_holds_the_options_that_it_stood_for(files, tmp_path):
    options = {**files, **LIKED, "features": "auto", "history_feedback": "positive"}
    result = train(**options, **{**TINY, "codebook_sizes": [4, 4]}, feature_worth=False, output_dir=tmp_path / "out")
    assert result.verdict is not None
    assert not any("features" in why for why, _ in result.verdict.advice)
    saved = json.loads((tmp_path / "out" / DATA_OPTIONS_NAME).read_text())
    assert {name: saved.get(name) for name in (*FOUR, "features")} == {
        "user_features": ["age", "city"],
        "item_features": ["genres"],
        "interaction_features": ["ratio", "time"],
        "history_feedback": None,  # positive, the default
        "features": None,
    }
    again = load_dataset(**files, model=str(tmp_path / "out"), features="auto")
    assert "history_feedback" not in again.options
    assert again.options == {name: value for name, value in saved.items() if name != "exclude_seen"}
