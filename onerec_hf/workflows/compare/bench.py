"""The protocol of a comparison: its folder, the trials of each family, the winners with several seeds, their costs."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.trainers.folder_lock import LOCK
from onerec_hf.workflows.artefact import write_bytes
from onerec_hf.workflows.compare.analysis import Quality, share_of_repeats
from onerec_hf.workflows.compare.families import Family
from onerec_hf.workflows.compare.processes import POLL, Processes, Run, as_now
from onerec_hf.workflows.compare.ranking import METRIC, measure, rankable, sample
from onerec_hf.workflows.compare.settings import CompareSettings
from onerec_hf.workflows.dataset import InMemoryDataset
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.settings import DataSettings

if TYPE_CHECKING:
    from onerec_hf.workflows.compare.search import Search

STATE = "comparison.json"
REPORTS = ("report.html", "report.md", "results.json")
COST_USERS = 100
# Repeats that cannot be recommended may be at most this share of the targets.
MOST_REPEATS = 0.1


@dataclass
class Outcome:
    """
    What one family came to.

    Args:
        family: as it was declared.
        search: its trials; None for a family that was left out.
        reason: why it has no result, or None.
        trial: the number of the best trial.
        runs: the winner's runs by seed.
        quality: on test users.
        cost: of a request; what [`~onerec_hf.workflows.compare.run.measure`] found.
    """

    family: Family
    search: Search | None = None
    reason: str | None = None
    trial: int | None = None
    runs: dict[int, dict[str, Any]] = field(default_factory=dict)
    quality: Quality | None = None
    cost: dict[str, Any] | None = None
    folder: Path | None = None

    def validation(self, metric: str = METRIC) -> float:
        """Mean over the winner's seeds."""
        return float(np.mean([run["metrics"][f"validation/{metric}"] for run in self.runs.values()]))


class Bench:
    """
    The data and the protocol that all runs share.

    Args:
        data: how each run reads the table.
        dataset: as this process read it.
        how: the comparison's settings.
        began: `time.monotonic()` from which the budget counts.
    """

    def __init__(self, data: DataSettings, dataset: InMemoryDataset, how: CompareSettings, began: float):
        self.data, self.how, self.folder = data, how, how.folder
        self.repeats = share_of_repeats(sample(dataset, how.validation_users))
        self.exclude_seen = self.repeats <= MOST_REPEATS if how.exclude_seen is None else how.exclude_seen
        self.dataset, seen = rankable(dataset, self.exclude_seen, how.validation_users)
        self.validation = self.dataset.validation
        if len(self.dataset.test) < 2:
            raise ValueError(
                "the table leaves one test user: a difference between models has no standard error. Add users"
            )
        seconds = how.seconds()
        self.until = None if seconds is None else began + seconds
        self.trials = 0
        self.seeds: list[int] = []
        self.notes = [f"{split.capitalize()}: {text}" for split, of in seen.items() if (text := of.about_unranked())]
        if dataset.features is not None:
            self.notes.append("Sequence models and generators read the features; popularity and item-kNN do not.")

    def open_folder(self, families: list[Family]) -> None:
        """
        Makes the output folder, or checks that it holds this comparison.

        Raises:
            FileExistsError: it holds something else. ValueError: it holds a comparison with other data or settings.
        """
        path, mine = self.folder / STATE, ("runs", "models", "scratch")
        if self.how.overwrite:
            for name in mine:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in (STATE, *REPORTS):
                (self.folder / name).unlink(missing_ok=True)
        if self.folder.is_dir() and not path.is_file() and any(each.name != LOCK for each in self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} is not empty and holds no comparison. Name another --output_dir")
        state = {
            "data": asdict(self.data),
            "fingerprint": fingerprint(self.dataset),
            "exclude_seen": self.exclude_seen,
            "validation_users": self.how.validation_users,
            "seed": self.how.seed,
            "families": {family.name: family.content() for family in families},
        }
        state = json.loads(json.dumps(state))  # tuples and paths as they are read back
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            spaces = before.pop("families")
            differ = [key for key in before if as_now(key, state[key]) != as_now(key, before[key])]
            differ += [
                f"space of {name}"
                for name in state["families"]
                if spaces.get(name, state["families"][name]) != state["families"][name]
            ]
            if differ:
                raise ValueError(
                    f"{self.folder} holds a comparison with another {', '.join(differ)}. Name another --output_dir, or pass --overwrite to replace it"
                )
            state["families"] = {**spaces, **state["families"]}
            say(f"{self.folder} holds this comparison: finished runs are kept")
        (self.folder / "runs").mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(state, indent=1) + "\n").encode())

    def data_options(self) -> str:
        """The options about data of this comparison, for commands in the report."""
        defaults = DataSettings()
        given = [(name, value) for name, value in asdict(self.data).items() if value != getattr(defaults, name)]
        listed = [
            f"--{name} {' '.join(map(shlex.quote, map(str, value if isinstance(value, list) else [value])))}"
            for name, value in given
        ]
        return " ".join([*listed, *([] if self.exclude_seen else ["--no_exclude_seen"])])

    def search(self, families: list[Family], processes: Processes) -> list[Outcome]:
        """
        Runs the trials.

        Raises:
            ValueError: a family that was named needs content and the table has none; or no family finished a trial.
        """
        from onerec_hf.workflows.compare.search import Search, run_trials

        outcomes = []
        for family in families:
            without = family.needs_content and self.dataset.items is None
            if without and self.how.families:
                raise ValueError(
                    f"--families {family.name} needs item texts or embeddings. Pass --items, or leave it out"
                )
            search = None if without else Search(family, self.how.trials, self.how.seed, self.trial)
            reason = "left out: the table has neither item texts nor embeddings (--items)" if without else None
            outcomes.append(Outcome(family, search, reason))
        searches = [outcome.search for outcome in outcomes if outcome.search is not None]
        self.trials = run_trials(searches, processes, len(self.how.seeds), self.until)
        for outcome in outcomes:
            if outcome.search is not None:
                outcome.trial = outcome.search.best(self.trials if outcome.family.space else None)
                outcome.reason = None if outcome.trial is not None else outcome.search.reason()
        if all(outcome.trial is None for outcome in outcomes):
            why = "; ".join(f"{outcome.family.name}: {outcome.reason}" for outcome in outcomes)
            budget = (
                f"--budget {self.how.budget}: " if self.until is not None and time.monotonic() > self.until else ""
            )
            raise ValueError(f"{budget}no family finished a trial ({why}). The logs are in {self.folder / 'runs'}")
        wanted = self.how.trials
        if self.trials < wanted and any(family.space for family in families):
            self.notes.append(
                f"The budget of {self.how.budget} allowed {self.trials} of {wanted} trials for each family."
            )
        if late := [
            outcome.family.title for outcome in outcomes if outcome.search is not None and not outcome.search.count()
        ]:
            self.notes.append(
                f"The comparison is not fair: the budget of {self.how.budget} ended before {', '.join(late)} finished a trial. Pass a larger --budget."
            )
        return outcomes

    def train_winners(self, outcomes: list[Outcome], processes: Processes) -> None:
        """Trains each family's best settings with every seed; within a budget, with at least the first one."""
        waiting, slowest = [], 0.0
        winners = [outcome for outcome in outcomes if outcome.trial is not None]
        for outcome in winners:
            assert outcome.search is not None
            assert outcome.trial is not None
            slowest += outcome.search.found[outcome.trial]["seconds"]
        for number, seed in enumerate(self.how.seeds):
            if number and self.until is not None and time.monotonic() + slowest / self.how.jobs > self.until:
                self.notes.append(f"The budget of {self.how.budget} allowed {number} of {len(self.how.seeds)} seeds.")
                break
            waiting = [(outcome, self.winner(outcome, seed, keep=number == 0)) for outcome in winners]
            found = _all([run for _, run in waiting], processes)
            for outcome, run in waiting:
                result = found[run.name]
                if result["state"] == "finished":
                    outcome.runs[seed] = result
                    outcome.folder = outcome.folder or Path(run.spec["folder"])
                else:
                    outcome.reason = f"seed {seed}: {result['reason']}"
            self.seeds.append(seed)
        for outcome in winners:
            if outcome.reason is not None:  # a mean over fewer seeds than the others'
                outcome.runs, outcome.trial = {}, None
                continue
            paths = [self._rankings(outcome, seed) for seed in outcome.runs]
            outcome.quality = Quality.of([np.load(path)["rows"] for path in paths], self.dataset.test, self.dataset)
        if all(outcome.quality is None for outcome in outcomes):
            raise ValueError(
                f"no winner could be trained: {winners[0].reason}. The logs are in {self.folder / 'runs'}"
            )

    def measure_costs(self, outcomes: list[Outcome]) -> None:
        """Milliseconds of a request and size, one family after the other on one thread: none of our runs is under way."""
        for outcome in outcomes:
            if outcome.quality is not None and outcome.folder is not None:
                outcome.cost = measure(outcome.folder, self.dataset, self.exclude_seen, COST_USERS)

    def trial(self, family: Family, number: int, settings: dict[str, Any]) -> Run:
        """The run of a trial."""
        return self._run("trial", family, number, {"split": "validation", "settings": settings, "seed": self.how.seed})

    def winner(self, outcome: Outcome, seed: int, keep: bool) -> Run:
        """The run of a family's best settings with a seed."""
        assert outcome.search is not None
        assert outcome.trial is not None
        settings = outcome.search.found[outcome.trial]["spec"]["settings"]
        spec = {"split": "test", "settings": settings, "seed": seed, "rankings": str(self._rankings(outcome, seed))}
        if keep:
            spec |= {
                "keep": True,
                "folder": str(self.folder / "models" / f"{outcome.family.name}-{outcome.trial:02d}"),
            }
        return self._run(f"best-{outcome.trial:02d}-seed", outcome.family, seed, spec)

    def _rankings(self, outcome: Outcome, seed: int) -> Path:
        return self.folder / "runs" / f"{outcome.family.name}-best-{outcome.trial:02d}-seed-{seed:02d}.npz"

    def _run(self, kind: str, family: Family, number: int, spec: dict[str, Any]) -> Run:
        name = f"{family.name}-{kind}-{number:02d}"
        result = self.folder / "runs" / f"{name}.json"
        shared = {
            "family": asdict(family),
            "data": asdict(self.data),
            "exclude_seen": self.exclude_seen,
            "validation_users": self.how.validation_users,
            "folder": str(self.folder / "scratch" / name),
            "keep": False,
            "result": str(result),
            "progress": str(result.with_suffix(".progress")),
        }
        return Run(name, family.name, number, json.loads(json.dumps({**shared, **spec})))


def _all(runs: list[Run], processes: Processes) -> dict[str, dict[str, Any]]:
    """What the runs measured, by name; those with a file are not repeated."""
    found = {run.name: result for run in runs if (result := run.found()) is not None}
    waiting = [run for run in runs if run.name not in found]
    while waiting or processes.runs:
        while waiting and processes.free:
            processes.start(waiting.pop(0))
        for run, result in processes.ended():
            found[run.name] = result
            test = result.get("metrics", {}).get(f"test/{METRIC}")
            what = result.get("reason", result["state"]) if test is None else f"test/{METRIC} {test:.4f}"
            say(f"{run.name}: {what} ({result['seconds']:.0f} s)")
        time.sleep(POLL)
    return found


def fingerprint(data: InMemoryDataset) -> str:
    """Changes when the table does: users, items and their order, texts, embeddings and features."""
    digest = hashlib.sha256()
    sequences, items = data.sequences, data.items
    for array in (sequences.user_ids, sequences.offsets, sequences.item_ids):
        digest.update(repr(array.tolist()).encode())
    if items is not None:
        table = items.select(data.item_ids)
        digest.update(repr(table.frame["text"].tolist()).encode())
        if table.embeddings is not None:
            digest.update(np.ascontiguousarray(table.embeddings).tobytes())
    if data.features is not None:
        read = sequences.histories
        digest.update(data.features.schema.to_json().encode())
        for array in (data.features.items, read.positive, read.codes, read.users):
            digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
