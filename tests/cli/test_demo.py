"""`onerec-hf demo`: what the page shows is what the model recommends, and what stands in titles stays text; once in a real browser."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from onerec_hf import ItemCatalogue, OneRecProcessor
from onerec_hf.cli.demo import DemoArguments
from onerec_hf.cli.demo_app import DemoRecommender, render
from tests.cli.commands import onerec, refused, write_csv
from tests.conftest import make_catalogue, make_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def recommender():
    catalogue = make_catalogue()
    items: dict = {item: {"title": f"Film {item}", "year": 1979} for item in catalogue.item_ids}
    items["m7"] = {"title": HOSTILE, "tagline": HOSTILE}
    return DemoRecommender(make_model(catalogue), OneRecProcessor.from_catalogue(catalogue, max_history=3), items)


def shared(first, second):
    """How many codes two semantic IDs have in common before they differ."""
    return next((level for level, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def test_sessions_are_the_models_and_say_what_they_share(recommender):
    history = ["m1", "m2", "m3", "m4"]
    found = recommender.sessions(history, num_beams=6, session_length=2, count=3)
    model, processor = recommender.recommender.model, recommender.recommender.processor
    out = model.recommend(
        **processor([history]), num_beams=6, num_return_sequences=3, session_length=2, exclude=[history],
        return_dict_in_generate=True,
    )  # fmt: skip
    assert [[item.item_id for item in items] for _, items in found] == processor.batch_decode(out.sequences)
    assert [score for score, _ in found] == out.sequences_scores.tolist()
    codes = {
        item: row.tolist()
        for item, row in zip(recommender.catalogue.item_ids, recommender.catalogue.codes, strict=True)
    }
    for _, items in found:
        for item in items:
            assert item.codes == codes[item.item_id]
            # The model reads the latest three.
            prefixes = [shared(codes[other], item.codes) for other in history[1:]]
            assert item.shared == max(prefixes)
            if item.shared:
                assert item.like == recommender.title(history[1:][int(np.argmax(prefixes))])
            else:
                assert item.like is None


def test_titles_are_text(recommender):
    found = recommender.sessions(["m1"], num_beams=40, session_length=1, count=39)
    page = render(found)
    assert "m7" in page
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert "tagline: &lt;img src=x" in page
    assert "year: 1979" in page
    assert re.sub(r"<style>.*?</style>", "", page, flags=re.S).count("<li>") == len(found)


def test_what_was_picked_or_typed(recommender):
    assert recommender.ids_of([" m1", "", "m2 "]) == ["m1", "m2"]
    with pytest.raises(ValueError, match=r"2 of 3 items are not in the catalogue of 40 items, e\.g\. \['x1', 'x2'\]$"):
        recommender.ids_of(["m1", "x1", "x2"])
    with pytest.raises(ValueError, match="pick or type at least one item"):
        recommender.sessions([], 4, 1, 1)
    labels = dict(recommender.choices())
    assert labels["Film m3  (m3)"] == "m3"
    catalogue = ItemCatalogue([7, 8], [[0, 1], [1, 0]], [2, 2], popularity=[1, 5])
    numbers = DemoRecommender(make_model(catalogue), OneRecProcessor.from_catalogue(catalogue))
    assert numbers.ids_of(["7", "8"]) == [7, 8]
    assert numbers.choices() == [("7", "7"), ("8", "8")]
    with pytest.raises(ValueError, match="of type int; got 'seven'"):
        numbers.ids_of(["seven"])


def test_titles_come_from_a_table(tmp_path):
    items = write_csv(tmp_path / "items.csv", [["item_id", "title"], ["m1", "Alien"], ["m2", "Brazil"]])
    catalogue = make_catalogue()
    found = DemoArguments(items=str(items)).load(str(tmp_path), catalogue)
    assert dict(found) == {"m1": {"title": "Alien"}, "m2": {"title": "Brazil"}}
    with pytest.raises(ValueError, match="no column 'name' among"):
        DemoArguments(items=str(items), title_column="name").load(str(tmp_path), catalogue)


def test_refuses(trained, tmp_path):
    refused(onerec("demo", "--model", tmp_path / "nothing"), "--model")
    refused(onerec("demo", "--model", trained.folder, "--port", "0"), "--port 0")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")
def test_in_a_browser(trained, data, tmp_path):
    """Type a history, click, read the sessions; an unknown item is said."""
    from playwright.sync_api import expect, sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "onerec_hf.cli.main",
            "demo",
            "--model",
            str(trained.folder),
            "--items",
            str(data.items),
            "--port",
            str(port),
        ],
        cwd=root,
        env={**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=log,
        stderr=log,
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        assert server.poll() is None, (tmp_path / "log").read_text()
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(f"http://127.0.0.1:{port}/", timeout=60_000)
            page.locator("#typed textarea, #typed input").first.fill("m1, m2")
            page.locator("#recommend").click()
            expect(page.locator("#sessions .onerec-session")).to_have_count(3, timeout=60_000)
            expect(page.locator("#sessions .onerec-session").first.locator("li")).to_have_count(5)
            assert " lamp " in page.locator("#sessions").inner_text()
            page.screenshot(path=os.environ.get("ONEREC_HF_DEMO_PNG", str(tmp_path / "demo.png")))
            page.locator("#typed textarea, #typed input").first.fill("m1, x9")
            page.locator("#recommend").click()
            expect(page.locator("#sessions [role=alert]")).to_contain_text("x9", timeout=60_000)
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def test_the_space_serves_the_model(trained, data, monkeypatch):
    """`examples/space/app.py` builds the page of the model that the environment names, and says so where it names none."""
    space = Path(__file__).parents[2] / "examples" / "space" / "app.py"
    monkeypatch.delenv("ONEREC_MODEL", raising=False)
    with pytest.raises(SystemExit, match="set ONEREC_MODEL"):
        runpy.run_path(str(space))
    monkeypatch.setenv("ONEREC_MODEL", str(trained.folder))
    monkeypatch.setenv("ONEREC_ITEMS", str(data.items))
    found = runpy.run_path(str(space))
    assert found["app"].title == "shop"
    assert found["recommender"].title("m1") == "red lamp 1"
