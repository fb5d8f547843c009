"""Runs commands in this process, and what the tests of all commands assert about them."""

import contextlib
import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from onerec_hf import ItemCatalogue
from onerec_hf.cli.main import main
from onerec_hf.semantic_ids import ResidualQuantizer

# The smallest generator that has every part, and three steps: what these tests look at does not depend on its quality.
TINY = [
    "--preset",
    "paper",
    "--hidden_size",
    "16",
    "--intermediate_size",
    "16",
    "--moe_intermediate_size",
    "8",
    "--num_experts",
    "2",
    "--encoder_layers",
    "1",
    "--decoder_layers",
    "1",
    "--num_attention_heads",
    "2",
    "--max_steps",
    "3",
    "--logging_steps",
    "1",
    "--disable_tqdm",
    "true",
    "--use_cpu",
    "true",
    "--verdict_sasrec",
    "false",
]
CODES = ["--codebook_sizes", "8", "8", "8"]
NUM_ITEMS, NUM_USERS = 40, 30


@dataclass
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one error message, from where the program names itself to the end of stderr."""
        lines = self.err.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("onerec-hf ")]
        assert len(starts) == 1, self.err
        return "\n".join(lines[starts[0] :])


def onerec(*argv, stdin: str = "") -> Done:
    """`onerec-hf ARGV...` without a process of its own (which would import for seconds)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        status = main([str(part) for part in argv])
    return Done(status, out.getvalue(), err.getvalue())


def succeeded(done: Done) -> Done:
    assert done.status == 0, done.err
    return done


def refused(done: Done, *fragments: str) -> str:
    """The message of a command that exits with 2, prints no result and no traceback, and names every fragment."""
    assert done.status == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    message = done.message
    for fragment in fragments:
        assert fragment in message, message
    return message


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def codes(folder: Path) -> tuple[str, list]:
    """The catalogue's hash and the codebooks of an artefact (the files' own bytes differ: safetensors shuffles its metadata)."""
    quantizer = ResidualQuantizer.load(folder / "codebooks.safetensors")
    catalogue = ItemCatalogue.load(folder / "catalogue.safetensors")
    return catalogue.hash, [codebook.tolist() for codebook in quantizer.codebooks_]


def write_csv(path: Path, rows: list) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def interaction_rows() -> list[list]:
    """Header and rows: every user walks through the items with a stride of 1, 2 or 3."""
    rows = [
        [f"u{user}", f"m{(11 * user + step * (1 + user % 3)) % NUM_ITEMS}", 100 * user + step]
        for user in range(NUM_USERS)
        for step in range(12)
    ]
    return [["user_id", "item_id", "timestamp"], *rows]


def rated_rows() -> list[list]:
    """`interaction_rows` with a rating of 1 to 5 that belongs to the item."""
    header, *rows = interaction_rows()
    return [[*header, "rating"], *([*row, 1 + int(row[1][1:]) % 5] for row in rows)]


def item_rows() -> list[list]:
    """Header and rows: titles that group the items in tens."""
    colours = ("red", "blue", "green", "black")
    return [
        ["item_id", "title", "genre"],
        *([f"m{i}", f"{colours[i // 10]} lamp {i}", "indoor" if i % 2 else "garden"] for i in range(NUM_ITEMS)),
    ]
