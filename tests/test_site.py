"""The documentation builds as a site, and its reference holds what is public."""

import doctest
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mkdocs.exceptions import PluginError

import onerec_hf
import onerec_hf.trainers

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("file", "function"), [("docstrings.py", "readable"), ("hooks.py", "broken_links")])
def test_examples_of_the_sites_hooks(file, function):
    scope = runpy.run_path(str(ROOT / "docs" / file))
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(scope[function], function, globs=scope):
        runner.run(example)
    assert runner.summarize().failed == 0
    assert runner.tries > 0


def test_links_that_lead_nowhere_fail_the_build(tmp_path):
    hook = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    (tmp_path / "how-to").mkdir()
    (tmp_path / "index.html").write_text('<a href="how-to/a.html#there">a</a><a href="https://example.org/b">b</a>')
    (tmp_path / "how-to" / "a.html").write_text('<h1 id="there"></h1><a href="../index.html">up</a>')
    config = SimpleNamespace(site_dir=str(tmp_path))
    hook["on_post_build"](config)
    for link in ("gone.html", "../index.html#gone", "../pictures/gone.svg", "/gone.html", "../how-to/"):
        (tmp_path / "how-to" / "b.html").write_text(f'<a href="a.html">a</a><img src="{link}">')
        with pytest.raises(PluginError, match=re.escape(f"1 broken links:\n  how-to/b.html: {link}")):
            hook["on_post_build"](config)


@pytest.mark.slow
def test_the_site_builds_and_its_reference_is_whole(tmp_path):
    done = subprocess.run(  # without -q, under which --strict counts no warning
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "ONEREC_HF_REPOSITORY": "https://example.org/onerec_hf.git"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = {
        path.relative_to(tmp_path).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        for path in tmp_path.rglob("*.html")
    }
    anchors = {
        anchor.split(".")[-1] for page in pages.values() for anchor in re.findall(r'id="(onerec_hf[\w.]+)"', page)
    }
    public = {*onerec_hf.__all__, *onerec_hf.trainers.__all__} - {"register_auto_classes"}
    assert public <= anchors, public - anchors
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name in pages
    options = pages["reference/options"]
    for option, default in (("hidden_size", "128"), ("learning_rate", "0.0002"), ("max_batch_size", "32")):
        assert re.search(rf"<code>--{option}</code></td>\s*<td>\w+</td>\s*<td><code>{default}</code>", options), option
    assert 'href="https://example.org/onerec_hf"' in pages["index"]
