"""Result files of quickstart, evaluation and benchmarks: rows of named values with machine, versions, date and command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from onerec_hf.modeling.files import replacing

_PACKAGES = ("onerec-hf", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")


def result_row(
    name: str, value: float, unit: str, against: str | None = None, spread: Sequence[float] | None = None
) -> dict[str, Any]:
    """
    One result: name, value, unit, the name of a baseline result, and [min, max] over repetitions.

    Example:
        >>> result_row("onerec/recall@10", 0.1, "share", against="popularity/recall@10")["unit"]
        'share'
    """
    return {
        "name": name,
        "value": float(value),
        "unit": unit,
        "against": against,
        "spread": None if spread is None else [float(low_high) for low_high in spread],
    }


def machine() -> str:
    """
    Processor, cores and memory of this machine in one line.

    Example:
        >>> "core" in machine()
        True
    """
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


def write_results(
    path: str | os.PathLike, rows: list[dict[str, Any]], command: str | None = None, **more: Any
) -> None:
    """
    Writes `{"machine", "versions", "date", "command", "rows", ...}` as JSON, under a temporary name that is then renamed.

    Args:
        rows: from [`result_row`].
        command: the command line (default: that of this process).
        more: further top-level entries (seed, protocol, ...).

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_results(f"{folder}/results.json", [result_row("seconds", 1.5, "s")], seed=0)
        ...     sorted(json.loads(Path(folder, "results.json").read_text()))
        ['command', 'date', 'machine', 'rows', 'seed', 'versions']
    """
    content = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": command or shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "rows": rows,
        **more,
    }
    with replacing(path) as temporary, open(temporary, "w") as file:
        file.write(_text(content))


def _text(content: dict[str, Any]) -> str:
    """JSON with one line per row, and per entry of a mapping of mappings."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = [json.dumps(row) for row in value]
            parts.append(f"{json.dumps(key)}: [\n  " + ",\n  ".join(lines) + "\n ]")
        elif isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
            lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()]
            parts.append(f"{json.dumps(key)}: {{\n  " + ",\n  ".join(lines) + "\n }")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def table(rows: list[list[str]], header: list[str]) -> str:
    """
    Aligned plain text; the first column to the left, the others to the right.

    Example:
        >>> print(table([["onerec", "0.25"]], ["", "recall@10"]))
                recall@10
        onerec       0.25
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
