"""The notebooks run from the first cell to the last, and end as they say."""

import base64
import json
import re
import runpy
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "examples" / "notebooks"


def run(name):
    """What the code cells print, in one namespace, as a kernel runs them; each plots as often as its stored outputs say."""
    execute = runpy.run_path(str(NOTEBOOKS / "execute.py"))["execute"]
    stored = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    printed = []
    for before, cell in zip(stored, execute(NOTEBOOKS / name)["cells"], strict=True):
        kinds = [[output["output_type"] for output in one.get("outputs", [])] for one in (before, cell)]
        assert kinds[0] == kinds[1], "".join(cell["source"])
        printed += [text for output in cell.get("outputs", []) for text in output.get("text", [])]
    return "".join(printed)


@pytest.mark.slow
def test_train_and_recommend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run("train_and_recommend.ipynb")
    popularity = float(re.search(r"^PopularityBaseline ([\d.]+)$", out, re.M)[1])
    assert float(re.search(r"'eval_recall@10': ([\d.]+)", out)[1]) > 2 * popularity
    assert re.search(r"^True$", out, re.M)
    assert out.splitlines()[-1].count("film ") == 3


@pytest.mark.slow
def test_reward_and_alignment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = re.findall(r"trained ([\d.]+), control ([\d.]+), aligned ([\d.]+)", run("reward_and_alignment.ipynb"))
    _, control, aligned = map(float, found[0])
    assert aligned > control + 0.05


def test_notebooks_say_what_they_printed():
    """Whoever reads them on a page sees results; none is an error, and none names this machine."""
    names = {path.name for path in NOTEBOOKS.glob("*.ipynb")}
    assert names == {"train_and_recommend.ipynb", "reward_and_alignment.ipynb"}
    for path in NOTEBOOKS.glob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
        pictures = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
        assert len(pictures) == 2
        assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
        assert "/work/" not in text
        assert "/tmp/" not in text
