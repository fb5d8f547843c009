"""Options of a comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from onerec_hf.workflows.settings import OutputSettings


@dataclass
class CompareSettings(OutputSettings):
    """
    The families, the trials and the evaluation.

    Example:
        >>> CompareSettings(trials=4, budget="90m").seconds()
        5400.0
    """

    output_dir: str = field(
        default="comparison", metadata={"help": "Folder for the report, the runs and the winners' models."}
    )
    families: list[str] | None = field(
        default=None,
        metadata={"help": "Model families to compare; all that the table allows by default."},
    )
    trials: int = field(default=8, metadata={"help": "Trials for each family with a search space."})
    budget: str | None = field(
        default=None,
        metadata={
            "help": "Wall time for everything, such as 30m or 2h: fewer trials, the same number for each family."
        },
    )
    jobs: int = field(default=1, metadata={"help": "Runs at a time, each with its share of the cores."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Seeds that each family's best settings are trained with."},
    )
    spaces: str | None = field(
        default=None,
        metadata={"help": "Folder of YAML files with families and search spaces, in place of the package's."},
    )
    validation_users: int = field(
        default=5000, metadata={"help": "Validation users that choose checkpoints and settings, a random sample."}
    )
    exclude_seen: bool | None = field(
        default=None,
        metadata={
            "help": "Leave out the items of a user's history. By default unless more than a tenth of the validation targets repeat one."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the trials and of the sampler."})

    def check(self) -> None:
        """
        Raises:
            ValueError: numbers below 1, no or repeated seeds, or a budget that is no time.
        """
        for option in ("trials", "jobs", "validation_users"):
            if getattr(self, option) < 1:
                raise ValueError(f"--{option} must be at least 1; got {getattr(self, option)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}: pass different numbers from 0 on")
        self.seconds()

    def seconds(self) -> float | None:
        """
        The budget in seconds; None without one.

        Raises:
            ValueError: it is no wall time.
        """
        if self.budget is None:
            return None
        from onerec_hf.trainers.budget import Budget

        try:
            budget = Budget.parse(self.budget)
        except ValueError as error:
            raise ValueError(f"--budget: {error}") from None
        if budget.cpu:
            raise ValueError(f"--budget {self.budget}: a comparison takes wall time, such as 30m or 2h")
        return budget.seconds

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)
