"""The documentation builds as a site, and its reference holds what is public."""

import doctest
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import onerec_hf
import onerec_hf.trainers

ROOT = Path(__file__).resolve().parents[1]


def test_docstrings_become_readable():
    readable = runpy.run_path(str(ROOT / "docs" / "docstrings.py"))["readable"]
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(readable, "readable", globs={"readable": readable}):
        runner.run(example)
    assert runner.summarize() == (0, 1)


@pytest.mark.slow
def test_the_site_builds_and_its_reference_is_whole(tmp_path):
    done = subprocess.run(  # without -q, under which --strict counts no warning
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = {
        path.parent.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8")
        for path in tmp_path.rglob("index.html")
    }
    anchors = {
        anchor.split(".")[-1] for page in pages.values() for anchor in re.findall(r'id="(onerec_hf[\w.]+)"', page)
    }
    public = {*onerec_hf.__all__, *onerec_hf.trainers.__all__} - {"register_auto_classes"}
    assert public <= anchors, public - anchors
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert (name if name != "index" else ".") in pages
