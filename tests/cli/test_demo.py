"""`onerec-hf demo`: what the page shows is what the model recommends, and what stands in titles stays text; once in a real browser."""

import contextlib
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
from onerec_hf.cli.demo_app import DemoRecommender, build_app, render
from tests.cli.commands import item_rows, onerec, refused, write_csv
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


def test_titles_can_be_typed():
    items = {
        "m1": {"title": "Matrix, The (1999)"},
        "m2": {"title": "Heat"},
        "m3": {"title": "Heat"},
        "m4": {"title": "7"},
    }
    items |= {
        "m5": {"title": "Toy Story (1995)"},
        "m6": {"title": "Toy Story 2 (1999)"},
        "m8": {"title": "Alien; Aliens"},
    }
    catalogue = make_catalogue()
    popular = ItemCatalogue(
        catalogue.item_ids, catalogue.codes, catalogue.codebook_sizes, popularity=[i == 3 for i in range(40)]
    )
    typed = DemoRecommender(make_model(popular), OneRecProcessor.from_catalogue(popular), items).typed
    assert typed("m9, matrix, the (1999), HEAT\n toy story (1995)") == ["m9", "m1", "m3", "m5"]
    assert typed("Matrix, m2; Toy Story 2") == ["m1", "m2", "m6"]
    assert typed("7") == ["m4"]
    assert typed(" ,\n;") == []
    with pytest.raises(
        ValueError, match=r"2 titles begin with 'toy': Toy Story \(1995\), Toy Story 2 \(1999\)\. Type more"
    ):
        typed("m1, toy")
    with pytest.raises(ValueError, match="'Casablanca' is neither an id nor the beginning of a title among 40 items"):
        typed("m1, Casablanca, m2")
    numbers = ItemCatalogue([7, 8], [[0, 1], [1, 0]], [2, 2])
    typed = DemoRecommender(make_model(numbers), OneRecProcessor.from_catalogue(numbers), {8: {"title": "7"}}).typed
    assert typed("7, 8") == [7, 8]  # an id goes before a title


def test_the_page_begins_with_an_example(recommender):
    for history in recommender.examples():
        assert len(history) == 3
        rows = recommender.catalogue.indices(history)
        assert len(set(recommender.catalogue.codes[rows, 0].tolist())) == 1
    few = ItemCatalogue([7, 8], [[0, 1], [1, 0]], [2, 2])
    assert DemoRecommender(make_model(few), OneRecProcessor.from_catalogue(few)).examples() == [[7, 8]]
    page = build_app(recommender)
    filled = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "history")
    assert filled.value == recommender.examples()[0]


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
def test_in_a_browser(trained, tmp_path):
    """The page opens with an example; type a history, click, read the sessions; an unknown item is said; no width overflows."""
    from playwright.sync_api import expect, sync_playwright

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    header, *rows = item_rows()
    rows = [[item, f"{title} {'Donaudampfschiff' * 12}", genre] for item, title, genre in rows]
    items = write_csv(tmp_path / "items.csv", [header, *rows])
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
            str(items),
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
            expect(page.locator("#sessions .onerec-session")).to_have_count(3, timeout=60_000)  # of the example
            pictures = Path(os.environ.get("ONEREC_HF_DEMO_PICTURES", str(tmp_path)))
            for width in (320, 390, 768, 1280, 1600):
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(300)
                page.screenshot(path=pictures / f"demo-{width}.png", full_page=True)
                wide = page.evaluate(
                    "[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)"
                    ".map(e => e.tagName + '.' + e.className + ' ' + e.getBoundingClientRect().right)"
                )
                assert not wide, (width, wide[:5])
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
            page.set_viewport_size({"width": 1280, "height": 900})
            page.locator("#typed textarea, #typed input").first.fill("m1, red lamp 2 ")
            page.locator("#recommend").click()
            expect(page.locator("#sessions .onerec-session")).to_have_count(3, timeout=60_000)
            expect(page.locator("#sessions .onerec-session").first.locator("li")).to_have_count(5)
            assert " lamp " in page.locator("#sessions").inner_text()
            page.locator("#typed textarea, #typed input").first.fill("m1, x9")
            alert = page.locator("#sessions [role=alert]")
            for _ in range(12):  # a click while the answer before it is still computed is ignored
                page.locator("#recommend").click()
                with contextlib.suppress(AssertionError):
                    expect(alert).to_contain_text("x9", timeout=5_000)
                    break
            assert "x9" in alert.inner_text()
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
