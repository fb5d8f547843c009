"""The notebooks run from the first cell to the last, and end as they say."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "examples" / "notebooks"


def run(name, capsys):
    """What the code cells print, in one namespace, as a kernel runs them."""
    cells = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))["cells"]
    scope: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), scope)
    return capsys.readouterr().out


@pytest.mark.slow
def test_train_and_recommend(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = run("train_and_recommend.ipynb", capsys)
    popularity = float(re.search(r"^PopularityBaseline ([\d.]+)$", out, re.M)[1])
    assert float(re.search(r"'eval_recall@10': ([\d.]+)", out)[1]) > 2 * popularity
    assert re.search(r"^True$", out, re.M)
    assert out.splitlines()[-1].count("film ") == 3


@pytest.mark.slow
def test_reward_and_alignment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = re.findall(
        r"trained ([\d.]+), control ([\d.]+), aligned ([\d.]+)", run("reward_and_alignment.ipynb", capsys)
    )
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
        assert all(output["output_type"] == "stream" for cell in cells for output in cell["outputs"])
        assert "/work/" not in text
        assert "/tmp/" not in text
