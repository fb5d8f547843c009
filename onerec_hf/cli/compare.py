"""`onerec-hf compare`: model families on your table, equally tuned, with costs and a report."""

from __future__ import annotations

from onerec_hf.cli.arguments import command_line, parse_given
from onerec_hf.workflows.compare.settings import CompareSettings
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.settings import DataSettings


def main(argv: list[str]) -> None:
    given = parse_given((DataSettings, CompareSettings), argv, "compare")
    from onerec_hf.workflows.compare.comparison import compare_models
    from onerec_hf.workflows.results import ranking_table

    found = compare_models(**given, command=command_line("compare", argv))
    print(
        ranking_table(
            [
                row
                for row in found.rows
                if row["name"].count("/") == 1 and "@10" in row["name"] and "difference" not in row["name"]
            ]
        )
    )
    say(
        f"best on validation: {found.best}; serve it: onerec-hf serve --model {found.model}\nreport: {found.folder / 'report.html'}"
    )
