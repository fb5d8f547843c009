"""
Memory per GPU and bytes sent per step for recipes/scale/*.yaml, computed by onerec_hf.planning.

    python benchmarks/speed/scale.py            # prints a table per size: every strategy on 1 to 128 GPUs
    python benchmarks/speed/scale.py --write    # writes the summary into docs/explanation/scale.md

Nothing is measured here; tests/planning holds the computation against real steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from onerec_hf import OneRecConfig
from onerec_hf.planning import (
    STRATEGIES,
    Batch,
    Plan,
    active_parameters,
    best,
    count_parameters,
    layouts,
    make_plans,
)
from onerec_hf.planning.plan import gib, gigabytes

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explanation" / "scale.md"
BEGIN, END = "<!-- begin: benchmarks/speed/scale.py -->\n", "<!-- end: benchmarks/speed/scale.py -->\n"
GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
USERS = 64


def sizes() -> dict[str, tuple[OneRecConfig, Batch]]:
    """The recipes by name, from the smallest."""
    found = {}
    for file in (ROOT / "recipes" / "scale").glob("*.yaml"):
        options = yaml.safe_load(file.read_text(encoding="utf-8"))
        batch = Batch(USERS, options.pop("max_history"), options["session_length"])
        found[file.stem] = OneRecConfig(**options), batch
    return dict(sorted(found.items(), key=lambda item: count_parameters(item[1][0])))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def models() -> str:
    """A row per recipe."""
    rows = [
        [
            name,
            f"{count_parameters(config) / 1e9:.3f}",
            f"{active_parameters(config) / 1e9:.3f}",
            str(config.hidden_size),
            f"{config.encoder_layers} + {config.decoder_layers}",
            str(config.intermediate_size),
            str(config.moe_intermediate_size),
            f"{make_plans(config, layouts(config, 1), batch)[0].flops / 1e12:.1f}",
        ]
        for name, (config, batch) in sizes().items()
    ]
    header = ["recipe", "parameters, 10^9", "active", "width", "layers", "feed-forward", "expert", "TFLOPs per GPU"]
    return markdown(header, rows)


def cell(plan: Plan | None) -> str:
    """GiB per GPU and GB sent; struck out where the layout cannot train or does not fit."""
    if plan is None:
        return ""
    sent = gigabytes(plan.sent_in_node + plan.sent_between_nodes)
    text = f"{gib(plan.total)} / {sent}"
    if plan.problem:
        return "no: table"
    return text if plan.fits else f"~~{text}~~"


def size_table(config: OneRecConfig, batch: Batch) -> str:
    """A row per number of GPUs, a column per strategy."""
    rows = []
    for gpus in GPUS:
        plans = {plan.layout.strategy: plan for plan in make_plans(config, layouts(config, gpus), batch)}
        choice = best(list(plans.values()))
        rows.append(
            [
                str(gpus),
                *(cell(plans.get(strategy)) for strategy in STRATEGIES),
                f"{choice.layout.strategy}, {1000 * choice.step_seconds:.3g} ms" if choice else "none fits",
            ]
        )
    return markdown(["GPUs", *STRATEGIES, "to start with"], rows)


def summary() -> str:
    """A row per size, a column per number of GPUs: the simplest strategy that fits."""
    shown = (1, 4, 8, 16, 64)
    rows = []
    for name, (config, batch) in sizes().items():
        row = [name]
        for gpus in shown:
            choice = best(make_plans(config, layouts(config, gpus), batch))
            if choice is None:
                row.append("none fits")
                continue
            step = f"{1000 * choice.step_seconds:.3g} ms"
            row.append(f"{choice.layout.strategy}: {cell(choice)}, {step}")
        rows.append(row)
    return markdown(["recipe", *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in shown)], rows)


def tables() -> str:
    """Every size on every number of GPUs."""
    parts = [models()]
    for name, (config, batch) in sizes().items():
        parts.append(f"### {name}\n\n{size_table(config, batch)}")
    return "\n" + "\n".join(parts) + "\n"


def page() -> str:
    """The page with the tables as they are computed now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{models()}\n{summary()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the summary into docs/explanation/scale.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
