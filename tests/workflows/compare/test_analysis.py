"""Strata of users: they part the users, and say what they say."""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.workflows import load_in_memory
from onerec_hf.workflows.compare.analysis import Quality, by_strata, share_of_repeats, strata, thirds
from onerec_hf.workflows.compare.plots import dots, lines, points


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    rows = [
        (user, int(item), time)
        for user in range(50)
        for time, item in enumerate(rng.integers(0, 15, rng.integers(4, 20)))
    ]
    rows += [(50, item, time) for time, item in enumerate([1, 2, 1, 77, 1, 1])]  # target 1, the history repeats it
    rows += [(51, item, time) for time, item in enumerate([1, 2, 3, 4, 99])]  # 99 only here: never in training
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return load_in_memory(interactions=table, min_item_interactions=1)


def test_groups_part_the_users(data):
    groups = strata(data)
    assert len(groups) == 5
    for masks in groups.values():
        assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1] * len(data.test)
    users = data.test["user_id"]
    assert groups["cold targets"]["never in training"][users.index(51)]
    assert groups["repeated targets"]["target in the history"][users.index(50)]
    assert groups["repeats in the history"]["more"][users.index(50)]  # two of five
    assert groups["repeats in the history"]["none"][users.index(51)]


def test_the_share_of_repeats_counts_targets(data):
    examples = data.test.select([data.test["user_id"].index(user) for user in (50, 51)])
    assert share_of_repeats(examples) == 0.5


@pytest.mark.parametrize("values", [[1], [3, 3, 3], [0, 1], [5, 1, 9, 9, 2, 2, 7], list(range(100))])
def test_thirds_part_the_values(values):
    masks = thirds(np.array(values))
    assert sum(mask.astype(int) for mask in masks.values()).tolist() == [1] * len(values)
    if len(values) == 100:
        assert [mask.sum() for mask in masks.values()] == [33, 33, 34]


def test_quality_is_a_mean_over_seeds(data):
    target = np.searchsorted(data.item_ids, [session[0] for session in data.test["session"]])
    right = np.stack([target, *([np.full_like(target, -1)] * 9)], axis=1)
    quality = Quality.of([right, np.full_like(right, -1)], data.test, data)
    assert quality.seeds == {"recall@10": [1.0, 0.0], "ndcg@10": [1.0, 0.0]}
    assert set(quality.users["ndcg@10"]) == {0.5}
    found = by_strata({"half": quality}, data)
    assert {one["values"]["half"]["mean"] for one in found} == {0.5}
    assert sum(one["users"] for one in found if one["group"] == "cold targets") == len(data.test)


def test_pictures_are_svg_whatever_a_title_holds():
    from xml.etree import ElementTree

    name = 'A & B <"x">'
    pictures = [
        dots([(name, 0.0, 0.0)], {name: "#000"}, name),
        points([(name, 0.001, 0.0), ("other", 5000.0, 0.2)], {name: "#000", "other": "#111"}, "s", name),
        lines({name: [None, None], "other": [0.1, None]}, ["1", "2"], {name: "#000", "other": "#111"}, name),
    ]
    for picture in pictures:
        assert name in "".join(ElementTree.fromstring(picture).itertext())
