"""The pictures beside a model: what they show is what was measured, and what stands in titles stays text."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from onerec_hf import ItemCatalogue
from onerec_hf.hub_cards.experts import load_over_mean
from onerec_hf.workflows import train
from onerec_hf.workflows.evaluation import Ranking
from onerec_hf.workflows.id_map import write_id_map
from onerec_hf.workflows.pictures import Panel
from onerec_hf.workflows.training_report import calibration_panels, popularity_panel, training_panels
from tests.workflows.conftest import TINY


def pictures(page: Path) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.S)
    ]


@pytest.fixture(scope="module")
def result(tables, tmp_path_factory):
    often = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "validation_users": 20}
    return train(**tables, **TINY, **often, output_dir=str(tmp_path_factory.mktemp("report") / "films"))


def test_a_training_writes_its_report_beside_the_model(result):
    page = (result.folder / "training_report.html").read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["Loss", "Validation", "Load of the experts", "Quality by popularity"]
    assert len(pictures(result.folder / "training_report.html")) == 4
    assert (result.folder / "training_report.png").read_bytes()[:4] == b"\x89PNG"
    card = (result.folder / "README.md").read_text(encoding="utf-8")
    assert "](training_report.png)" in card
    assert "](semantic_ids.html)" in card
    ids = (result.folder / "semantic_ids.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"https?://www\.w3\.org/\S+", "", page + ids)  # nothing is fetched from elsewhere


def test_the_panels_hold_the_trainers_numbers(result):
    panels = {panel.title: panel for panel in training_panels(result.trainer)}
    logs = result.trainer.state.log_history
    assert [y for _, y in panels["Loss"].series["training"]] == [row["loss"] for row in logs if "loss" in row]
    assert [x for x, _ in panels["Loss"].series["validation"]] == [1, 2, 3]
    assert len(panels["Validation"].series["ndcg@10"]) == 3
    load = load_over_mean(result.trainer.tokens_per_expert)
    assert [[y for _, y in row] for row in panels["Load of the experts"].series.values()] == load.tolist()


def test_quality_by_popularity_is_the_metric_in_parts():
    rng = np.random.default_rng(0)
    popularity = np.array([0, 1, 5, 9, 40])
    relevant = rng.integers(0, 5, (60, 1))
    ranked = {"onerec": np.argsort(rng.random((60, 5)), axis=1), "popularity": np.tile([4, 3, 2, 1, 0], (60, 1))}
    (panel,) = popularity_panel(Ranking([], ranked, relevant, np.ones(60, dtype=bool)), popularity, 5)
    sizes = [int(re.search(r"\((\d+) users\)", label)[1]) for label in panel.labels]
    assert sum(sizes) == 60
    places = 1 + (ranked["onerec"] == relevant).argmax(1)
    whole = (1 / np.log2(places + 1)).mean()
    parts = [y for _, y in panel.series["onerec"]]
    assert np.average(parts, weights=sizes) == pytest.approx(whole)
    assert panel.series["popularity"][-1][1] > panel.series["popularity"][0][1]
    assert popularity_panel(Ranking([], ranked, relevant, np.ones(60, dtype=bool)), None, 5) == []


def test_calibration_shows_rates_that_are_off():
    rng = np.random.default_rng(0)
    p = rng.random((4000, 1))
    labels = (rng.random((4000, 1)) < p).astype(float)
    labels[:5] = np.nan
    predicted = {"right": p, "twice": np.minimum(2 * p, 1)}
    (panel,) = calibration_panels(labels, predicted, ["vtr"])
    gaps = {name: np.mean([abs(x - y) for x, y in points]) for name, points in panel.series.items()}
    assert gaps["right"] < 0.03 < 0.15 < gaps["twice"]
    assert ElementTree.fromstring(panel.svg()) is not None


def test_titles_stay_text_and_a_large_tree_stays_small(tmp_path):
    codes = np.stack(np.unravel_index(np.arange(6000), (1000, 3, 2)), axis=1)
    names = [f"m{i}" for i in range(6000)]
    catalogue = ItemCatalogue(names, codes, [1000, 3, 2], popularity=np.arange(6000))
    write_id_map(tmp_path, catalogue, {"m5": {"title": "<img src=x onerror=alert(1)>"}, "m4": {"name": "A & B"}})
    page = (tmp_path / "semantic_ids.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert "A &amp; B" in page
    assert "700 more first codes are not shown" in page
    assert len(page) < 1_000_000
    (picture,) = pictures(tmp_path / "semantic_ids.html")
    boxes = [float(box.get("width")) for box in picture.iter() if box.tag.endswith("rect")]
    assert len(boxes) == 300 + 900
    assert sum(boxes[:300]) == pytest.approx(960, abs=300)


@pytest.mark.parametrize("kind", ["curves", "groups", "grid", "diagonal"])
def test_every_kind_of_panel_is_drawn_of_a_single_point(kind):
    panel = Panel("One", kind, {"<a>": [(0, 0.0)]}, "x", "y", ["only"])
    assert ElementTree.fromstring(panel.svg()) is not None
    from matplotlib.figure import Figure

    panel.draw(Figure().subplots())
