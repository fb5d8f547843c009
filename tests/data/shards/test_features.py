"""Features of a prepared log: what the same log has in memory, whatever its format, buckets and files."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from onerec_hf.data import (
    DataError,
    ExampleSettings,
    PositiveFeedback,
    PreparedFolder,
    feature_tables,
    prepare_log,
    read_items,
    read_users,
)
from onerec_hf.data.shards.features import LogFeatures
from onerec_hf.workflows import load_dataset
from tests.workflows.test_feature_data import made

NAMES = {"user": ["age", "city"], "interaction": ["like", "ratio", "kind", "seen", "time"], "item": ["genres"]}
AUTO = {side: ["auto"] for side in NAMES}
SIZES = {"min_item_interactions": 3, "session_length": 2, "max_history": 7}


def table(seed=0):
    rows = made(seed)
    log = rows["interactions"]
    log["kind"] = [[None, "NA", "a b", "7", "x"][i % 5] for i in range(len(log))]
    log["seen"] = log["ratio"].isna()
    return rows


def sorted_rows(rows):
    return sorted(rows, key=repr)


@pytest.mark.filterwarnings("ignore:interactions. dropped")
@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
@pytest.mark.parametrize("names", [NAMES, AUTO], ids=["named", "auto"])
@pytest.mark.parametrize("feedback", ["positive", "all"])
@pytest.mark.parametrize("train_on", ["windows", "prefixes"])
def test_streamed_equals_in_memory(tmp_path, monkeypatch, suffix, names, feedback, train_on):
    if (names is AUTO) != (train_on == "prefixes"):
        pytest.skip("half of the cases")
    # A schema of more rows is learned from a share of the users, the same in both.
    monkeypatch.setattr(feature_tables, "MOST_ROWS", 200)
    tables = table()
    log, path = tables["interactions"], tmp_path / "log"
    log = pd.concat([log, log.iloc[:40]])  # exact duplicates
    path.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(log)), 3)):
        file = path / f"{number}.{suffix}"
        if suffix == "csv":
            log.iloc[part].to_csv(file, index=False)
        elif suffix == "parquet":
            log.iloc[part].to_parquet(file, index=False)
        else:
            log.iloc[part].to_json(file, orient="records", lines=True)
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "csv":
        log.to_csv(whole, index=False)
    elif suffix == "parquet":
        log.to_parquet(whole, index=False)
    else:
        log.to_json(whole, orient="records", lines=True)
    options = {f"{side}_features": columns for side, columns in names.items()}
    data = load_dataset(
        interactions=str(whole),
        users=tables["users"],
        items=tables["items"],
        positive=["like>=1"],
        **SIZES,
        **options,
        history_feedback=feedback,
    )
    data = data.on_prefixes() if train_on == "prefixes" else data
    features = LogFeatures(names, read_users(tables["users"]), read_items(tables["items"]), feedback == "all")
    manifest = prepare_log(
        path,
        tmp_path / "ready",
        positive=PositiveFeedback({"like": 1}),
        settings=ExampleSettings(*SIZES.values(), train_on=train_on),
        num_shards=3,
        rows_per_bucket=50,
        features=features,
    )
    folder = PreparedFolder(tmp_path / "ready")
    assert manifest["settings"]["num_buckets"] > 5
    assert folder.features.schema == data.features.schema
    np.testing.assert_array_equal(folder.features.items, data.features.items)
    train = [row for name, _ in folder.train_files for row in pq.read_table(folder.path / name).to_pylist()]
    assert sorted_rows(train) == sorted_rows(data.train.to_list())
    for split in ("validation", "test"):
        in_memory = getattr(data, split).remove_columns("request_time")  # a prepared folder has no times
        assert sorted_rows(folder.held_out(split).to_list()) == sorted_rows(in_memory.to_list())
    counts = manifest["counts"]
    assert counts["rows"] - counts["not_positive"] - counts["repeated"] - counts["rare_items"] == counts["kept"]
    prepared = load_dataset(prepared=str(tmp_path / "ready"))
    named = {name: value for name, value in data.options.items() if "feature" in name or "feedback" in name}
    assert {name: prepared.options.get(name) for name in named} == named
    assert prepared.protocol.split(" Features,")[1] in data.protocol


def test_fractions_of_times_are_no_feature_and_part_no_ties(tmp_path):
    rows = np.arange(900)
    log = pd.DataFrame({"user_id": rows // 30, "item_id": rows * 7 % 12, "like": rows % 5 % 2})
    log["timestamp"] = 10 + np.where(log.user_id < 4, 0.5, rows % 30 / 40)  # equal for four users only
    log.to_csv(tmp_path / "log.csv", index=False)
    cut = log.assign(timestamp=10, timestamp_fraction=log.timestamp - 10)  # as `read_interactions` has them
    cut.to_csv(tmp_path / "cut.csv", index=False)
    named, every = LogFeatures({"interaction": ["like"]}), LogFeatures({"interaction": ["auto"]})
    tied = [
        prepare_log(tmp_path / f"{file}.csv", tmp_path / name, features=features)["counts"]["tied"]
        for file, name, features in (("log", "plain", None), ("log", "named", named), ("cut", "auto", every))
    ]
    assert tied == [4, 4, 4]
    assert {feature.name for feature in every.schema.interaction} == {"like", "time"}


def test_the_schema_of_another_folder_is_refused(tmp_path):
    log = table()["interactions"]
    for name, values in (("mine", [0, 1]), ("other", ["no", "yes"])):
        log.assign(like=np.array(values)[log.like]).to_csv(tmp_path / f"{name}.csv", index=False)
        prepare_log(tmp_path / f"{name}.csv", tmp_path / name, features=LogFeatures({"interaction": ["like"]}))
    schema = tmp_path / "mine" / "features.json"
    schema.write_bytes((tmp_path / "other" / "features.json").read_bytes())
    with pytest.raises(DataError, match=r"features.json: damaged.*of another folder"):
        _ = PreparedFolder(tmp_path / "mine").features
    schema.unlink()
    with pytest.raises(DataError, match=r"features.json: damaged"):
        _ = load_dataset(prepared=str(tmp_path / "mine")).features


def test_bad_features(tmp_path):
    tables = table()
    tables["interactions"].to_csv(tmp_path / "log.csv", index=False)

    def prepare(names, **kwargs):
        return prepare_log(tmp_path / "log.csv", tmp_path / "ready", features=LogFeatures(names, **kwargs))

    with pytest.raises(DataError, match="--interaction_features: no column 'size' among: like, ratio, kind, seen"):
        prepare({"interaction": ["size"]})
    with pytest.raises(DataError, match="--users: none of 30 users of the interactions has a row"):
        prepare(
            {"user": ["age"]}, users=read_users(tables["users"].assign(user_id=lambda users: users.user_id + 1000))
        )
    with pytest.raises(DataError, match="1 of 12 interacted items have no row"):
        prepare({"item": ["genres"]}, items=read_items(tables["items"][1:]))
    assert not (tmp_path / "ready").exists()
    prepare({"interaction": ["like"]})
    (tmp_path / "ready" / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"features.json: damaged"):
        _ = PreparedFolder(tmp_path / "ready").features
