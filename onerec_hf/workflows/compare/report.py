"""The report of a comparison: what was found in words, tables and pictures; as HTML without other files, as markdown, and as result rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.evaluation.results import machine, result_row, write_results
from onerec_hf.workflows.artefact import write_bytes
from onerec_hf.workflows.compare import plots
from onerec_hf.workflows.compare.analysis import by_strata
from onerec_hf.workflows.compare.numbers import duration, number, signed, spread
from onerec_hf.workflows.compare.ranking import METRIC
from onerec_hf.workflows.verdict import FEWEST_USERS, Difference

if TYPE_CHECKING:
    from onerec_hf.workflows.compare.bench import Bench, Outcome

VALUE = f"validation/{METRIC}"
TEMPLATES = Path(__file__).with_name("templates")
CLEAR = 2.0  # standard errors from which a difference counts


@dataclass(frozen=True, eq=False)
class Table:
    """A table: its columns, and rows of cells; the first cell of a row is text, the others numbers."""

    head: list[str]
    rows: list[list[str]]


def write_report(
    folder: Path, bench: Bench, outcomes: list[Outcome], command: str | None
) -> tuple[list[dict[str, Any]], str]:
    """Writes report.html, report.md and results.json; returns the result rows and the name of the best family."""
    view = View(bench, outcomes)
    rows = view.rows()
    write_results(
        folder / "results.json",
        rows,
        command=command,
        dataset=bench.dataset.name,
        protocol=bench.dataset.protocol,
        best=view.best.family.name,
        settings={outcome.family.name: next(iter(outcome.runs.values()))["settings"] for outcome in view.ranked},
        failed={outcome.family.name: outcome.reason for outcome in view.failed},
        strata=view.strata,
    )
    from jinja2 import Environment, FileSystemLoader

    for name, escapes in (("report.html", True), ("report.md", False)):
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=escapes, trim_blocks=True, lstrip_blocks=True
        )
        text = environment.get_template(f"{name}.jinja").render(view=view, command=command, machine=machine())
        write_bytes(folder / name, text.encode())
    return rows, view.best.family.name


class View:
    """
    What the templates show.

    Args:
        bench: data and protocol.
        outcomes: of all families.
    """

    def __init__(self, bench: Bench, outcomes: list[Outcome]):
        self.bench, self.outcomes = bench, outcomes
        self.ranked = sorted((one for one in outcomes if one.quality is not None), key=lambda one: -one.validation())
        self.failed = [one for one in outcomes if one.quality is None]
        self.best = self.ranked[0]
        self.strata = by_strata(
            {one.family.name: one.quality for one in self.ranked if one.quality is not None}, bench.dataset
        )
        self.colour = plots.colours([one.family.title for one in self.ranked])
        self.users = len(bench.dataset.test)
        self.differences = {
            one.family.name: Difference.of(_users(one), _users(self.best))
            for one in self.ranked
            if one is not self.best
        }

    @property
    def counts(self) -> str:
        """The data in one sentence."""
        counts = self.bench.dataset.counts()
        return f"{counts['of them kept']:,} interactions of {counts['users']:,} users with {counts['items']:,} items"

    def verdict(self) -> list[str]:
        """What the numbers say, sentence by sentence."""
        best, quality = self.best, self.best.quality
        assert quality is not None
        found = [
            f"{best.family.title} has the best validation NDCG@10 ({number(best.validation())}). On test it reaches NDCG@10 "
            f"{number(quality.mean(METRIC))} and recall@10 {number(quality.mean('recall@10'))}, over {_count(len(self.bench.seeds), 'seed')} and "
            f"{self.users:,} users."
        ]
        if self.users < FEWEST_USERS:
            return [*found, f"{_count(self.users, 'test user')} are too few to tell models apart."]
        level, ahead = self._compared()
        if ahead:
            found.append(f"On test {_listed(ahead)} is ahead, although validation chose another: consider both.")
        if level:
            shown = [f"{one.family.title} ({signed(self.differences[one.family.name])})" for one in level]
            found.append(f"Not clearly different on test, within {CLEAR:g} standard errors: {', '.join(shown)}.")
        elif self.differences and not ahead:
            found.append(f"Every other model is behind by more than {CLEAR:g} standard errors.")
        cheapest = min([best, *level], key=lambda one: _mean(one, "train_cpu_seconds"))
        if cheapest is not best:
            found.append(
                f"Of these, {cheapest.family.title} is the cheapest to train: {duration(_mean(cheapest, 'train_cpu_seconds'))} of CPU time "
                f"against {duration(_mean(best, 'train_cpu_seconds'))}."
            )
        baseline = next((one for one in self.ranked if one.family.name == "item_knn"), None)
        if baseline is not None and baseline is not best and (behind := self._behind(baseline)):
            found.append(
                f"Behind item-kNN by more than {CLEAR:g} standard errors: {', '.join(one.family.title for one in behind)}."
            )
        if self.differences:
            error = float(np.median([found.error for found in self.differences.values()]))
            found.append(
                f"With {self.users:,} test users, differences below about {number(CLEAR * error)} NDCG@10 cannot be told from chance."
            )
        return found

    def notes(self) -> list[str]:
        """Warnings about data and protocol."""
        found, bench = list(self.bench.notes), self.bench
        if bench.exclude_seen and bench.repeats:
            found.append(
                f"{bench.repeats:.1%} of the validation targets repeat an item of the user's history. Such items are not recommended "
                "(--exclude_seen), so these targets are missed by every model."
            )
        elif bench.repeats:
            found.append(
                f"{bench.repeats:.1%} of the validation targets repeat an item of the history; items of the history may be recommended."
            )
        return found

    def quality_table(self) -> Table:
        rows = []
        for one in self.ranked:
            assert one.quality is not None
            shown = [spread([run["metrics"][VALUE] for run in one.runs.values()])]
            shown += [spread(one.quality.seeds[metric]) for metric in ("recall@10", METRIC)]
            against = "best" if one is self.best else signed(self.differences[one.family.name])
            rows.append([one.family.title, self._trials(one), *shown, against])
        rows += [[one.family.title, self._trials(one), "", "", "", one.reason or ""] for one in self.failed]
        return Table(
            ["model", "trials", "validation NDCG@10", "test recall@10", "test NDCG@10", "to the best, NDCG@10"], rows
        )

    def cost_table(self) -> Table:
        rows = []
        for one in self.ranked:
            assert one.search is not None
            assert one.cost is not None
            cost = one.cost
            search = sum(found.get("train_cpu_seconds", 0.0) for found in one.search.found.values())
            latency = f"{cost['ms']:.1f}, {cost['ms_95']:.1f}"
            peak = max(run["peak_gib"] for run in one.runs.values())
            parameters = next(iter(one.runs.values()))["parameters"]
            size = f"{cost['bytes'] / 2**20:.1f}"
            train = duration(_mean(one, "train_cpu_seconds"))
            rows.append([one.family.title, train, duration(search), f"{peak:.2f}", latency, f"{parameters:,}", size])
        head = [
            "model",
            "training, CPU time",
            "all trials, CPU time",
            "peak memory, GiB",
            "CPU ms per user (median, 95 %)",
            "weights",
            "MiB on disk",
        ]
        return Table(head, rows)

    def strata_tables(self) -> dict[str, Table]:
        """Per group: NDCG@10 of each family on each stratum."""
        tables = {}
        for group in dict.fromkeys(one["group"] for one in self.strata):
            some = [one for one in self.strata if one["group"] == group]
            head = ["NDCG@10", *(f"{one['name']} ({_count(one['users'], 'user')})" for one in some)]
            rows = []
            for family in self.ranked:
                values = [one["values"][family.family.name] for one in some]
                shown = [
                    f"{number(value['mean'])}" + ("" if value["error"] is None else f" ± {number(value['error'])}")
                    for value in values
                ]
                rows.append([family.family.title, *shown])
            tables[group] = Table(head, rows)
        return tables

    def settings_table(self) -> Table:
        rows = []
        for one in self.ranked:
            settings = next(iter(one.runs.values()))["settings"]
            epochs = [run["epochs"] for run in one.runs.values() if run.get("epochs")]
            # What no trial changes stands in the family's file, and all of it in results.json.
            drawn = [name for name in settings if name not in one.family.settings or name in one.family.space]
            shown = ", ".join(f"{name}={_plain(settings[name])}" for name in drawn)
            rows.append([one.family.title, shown, f"{np.mean(epochs):.3g}" if epochs else ""])
        return Table(["model", "chosen settings", "epochs trained"], rows)

    def pictures(self) -> dict[str, str]:
        """SVG by title."""
        rows = []
        for one in self.ranked:
            values = _users(one)
            rows.append(
                (one.family.title, float(values.mean()), CLEAR * float(values.std(ddof=1)) / len(values) ** 0.5)
            )
        found = {
            f"NDCG@10 on test, ± {CLEAR:g} standard errors over users": plots.dots(
                rows, self.colour, "NDCG@10 on test"
            )
        }
        costs = {
            "CPU seconds of one training": lambda one: _mean(one, "train_cpu_seconds"),
            "CPU ms per user": lambda one: (one.cost or {}).get("ms", 0),
        }
        for label, cost in costs.items():
            at = [
                (one.family.title, max(float(cost(one)), 1e-3), float(_users(one).mean()))
                for one in self.ranked
                if cost(one)
            ]
            if at:
                found[f"NDCG@10 on test against {label}"] = plots.points(at, self.colour, label, "NDCG@10 on test")
        searched = {one.family.title: self._best_so_far(one) for one in self.ranked if one.family.space}
        if searched and self.bench.trials > 1:
            found["Best validation NDCG@10 after each trial"] = plots.lines(
                searched, [str(trial + 1) for trial in range(self.bench.trials)], self.colour, "NDCG@10 on validation"
            )
        return found

    def strata_pictures(self) -> dict[str, str]:
        """SVG by group."""
        found = {}
        for group in dict.fromkeys(one["group"] for one in self.strata):
            some = [one for one in self.strata if one["group"] == group]
            series = {
                one.family.title: [each["values"][one.family.name]["mean"] for each in some] for one in self.ranked
            }
            found[group] = plots.lines(series, [one["name"] for one in some], self.colour, "NDCG@10 on test")
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Result rows: quality, paired differences and costs of each family."""
        found = []
        for one in self.ranked:
            name, quality = one.family.name, one.quality
            assert quality is not None
            for metric, values in quality.seeds.items():
                found.append(
                    result_row(
                        f"{name}/{metric}",
                        quality.mean(metric),
                        "share",
                        f"{self.best.family.name}/{metric}",
                        _ends(values),
                    )
                )
            values = [run["metrics"][VALUE] for run in one.runs.values()]
            found.append(result_row(f"{name}/{VALUE}", float(np.mean(values)), "share", spread=_ends(values)))
            if one is not self.best:
                more = self.differences[name]
                found.append(
                    result_row(
                        f"{name}/{METRIC}_difference",
                        more.mean,
                        "share",
                        self.best.family.name,
                        (more.mean - more.error, more.mean + more.error),
                    )
                )
            found.append(result_row(f"{name}/train_cpu_seconds", _mean(one, "train_cpu_seconds"), "s"))
            found.append(result_row(f"{name}/peak_memory", max(run["peak_gib"] for run in one.runs.values()), "GiB"))
            for cost, unit in (("ms", "ms"), ("bytes", "bytes")):
                if one.cost and cost in one.cost:
                    found.append(result_row(f"{name}/{'latency' if cost == 'ms' else 'size'}", one.cost[cost], unit))
        return found

    def _compared(self) -> tuple[list[Outcome], list[str]]:
        """Families that are level with the best on test, and titles of those that are ahead."""
        level, ahead = [], []
        for one in self.ranked[1:]:
            outcome = self.differences[one.family.name].outcome
            level += [one] if outcome == "open" else []
            ahead += [one.family.title] if outcome == "better" else []
        return level, ahead

    def _behind(self, baseline: Outcome) -> list[Outcome]:
        others = [one for one in self.ranked if one.family.name not in ("popularity", baseline.family.name)]
        return [one for one in others if Difference.of(_users(one), _users(baseline)).outcome == "worse"]

    def _trials(self, one: Outcome) -> str:
        if one.search is None:
            return "0"
        states = [found["state"] for _, found in sorted(one.search.found.items())]
        others = [f"{states.count(state)} {state}" for state in ("pruned", "failed", "stopped") if state in states]
        return f"{len(states)}" + (f" ({', '.join(others)})" if others else "")

    def _best_so_far(self, one: Outcome) -> list[float | None]:
        assert one.search is not None
        best, found = None, []
        for trial in range(self.bench.trials):
            result = one.search.found.get(trial, {"state": "stopped"})
            if result["state"] == "finished":
                best = max(best or 0.0, result["metrics"][VALUE])
            found.append(best)
        return found


def _users(one: Outcome) -> np.ndarray:
    assert one.quality is not None
    return one.quality.users[METRIC]


def _mean(one: Outcome, name: str) -> float:
    return float(np.mean([run[name] for run in one.runs.values()]))


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def _count(count: int, name: str) -> str:
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def _listed(titles: list[str]) -> str:
    return " and ".join(titles)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
