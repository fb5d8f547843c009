"""
Runs the notebooks and stores what they print and plot: `python examples/notebooks/execute.py`. Needs no Jupyter; a cell's output is its text and
its figures of matplotlib.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "agg")
FOLDER = Path(__file__).resolve().parent


def execute(path: Path) -> dict[str, Any]:
    """The notebook with new outputs: its code cells run in one namespace, in the current folder."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    scope: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), scope)
            text = out.getvalue()
            cell["outputs"] = (
                [{"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}] if text else []
            )
            cell["outputs"] += figures()
    return notebook


def figures() -> list[dict[str, Any]]:
    """The figures that a cell has left open, as outputs; they are closed."""
    from matplotlib import pyplot

    outputs = []
    for number in pyplot.get_fignums():
        png = io.BytesIO()
        pyplot.figure(number).savefig(png, format="png", dpi=70, metadata={"Software": None})
        picture = {"image/png": base64.b64encode(png.getvalue()).decode()}
        outputs.append({"data": picture, "metadata": {}, "output_type": "display_data"})
    pyplot.close("all")
    return outputs


if __name__ == "__main__":
    here = os.getcwd()
    for path in sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            try:
                notebook = execute(path)
            finally:
                os.chdir(here)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name)
