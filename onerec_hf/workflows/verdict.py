"""The verdict on a model in words: against each baseline, with the uncertainty of this many test users, and what to try below one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

NAMES = {
    "onerec": "OneRec",
    "sasrec": "SASRec",
    "hstu": "HSTU",
    "gru4rec": "GRU4Rec",
    "acvae": "ACVAE",
    "popularity": "popularity",
    "item_knn": "item-kNN",
}
#: With fewer test users the standard error itself is too uncertain.
FEWEST_USERS = 30
_SAID = {
    "better": "It is better than {}.",
    "worse": "It is worse than {}.",
    "open": "The difference{s} from {} {be} within two standard errors: {users} users do not tell which is better.",
}
_FEW = "So few users allow no conclusion; the difference{s} from {} {be} uncertain."


@dataclass(frozen=True)
class Difference:
    """
    A metric of the model minus that of a baseline, paired over the test users.

    Args:
        mean: over users.
        error: its standard error; NaN for a single user.
        users: how many there are.

    Example:
        >>> Difference.of(np.array([1.0, 0.5, 1.0, 0.5] * 10), np.array([0.0, 0.5] * 20)).outcome
        'better'
    """

    mean: float
    error: float
    users: int

    @classmethod
    def of(cls, model: np.ndarray, baseline: np.ndarray) -> Difference:
        """From (users,) values of both, in the same order."""
        gains = np.asarray(model, dtype=np.float64) - baseline
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        return cls(float(gains.mean()), float(error), len(gains))

    @property
    def outcome(self) -> str:
        """`better` or `worse` where the difference is above two standard errors of enough users, else `open`."""
        if self.users < FEWEST_USERS or not abs(self.mean) > 2 * self.error:
            return "open"
        return "better" if self.mean > 0 else "worse"

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class Verdict:
    """
    A model against the baselines.

    Args:
        sentences: what can be concluded, and what cannot.
        differences: by baseline.
        advice: what to try, as (reason, command).

    Example:
        >>> gains = {"onerec": np.full(100, 0.5), "popularity": np.full(100, 0.25)}
        >>> print(Verdict.on(gains, "onerec", "NDCG@10"))
        NDCG@10 of OneRec is 0.5000 on 100 test users. It is better than popularity (+0.2500 ± 0.0000, standard error over the users).
    """

    sentences: str
    differences: Mapping[str, Difference]
    advice: Sequence[tuple[str, str]] = field(default=())

    @classmethod
    def on(
        cls,
        gains: Mapping[str, np.ndarray],
        name: str,
        metric: str,
        notes: Sequence[str] = (),
        advice: Sequence[tuple[str, str]] = (),
        always: Sequence[tuple[str, str]] = (),
    ) -> Verdict:
        """
        Args:
            gains: (users,) values of the metric by model, of the same users in the same order.
            name: the model; all others are baselines.
            metric: what the values are, for the text.
            notes: further sentences.
            advice: kept where the model is not above every baseline.
            always: advice that is kept in any case.
        """
        differences = {each: Difference.of(gains[name], gains[each]) for each in gains if each != name}
        users = len(gains[name])
        sentences = [f"{metric} of {NAMES[name]} is {gains[name].mean():.4f} on {users:,} test users."]
        groups = {outcome: [each for each in differences if differences[each].outcome == outcome] for outcome in _SAID}
        scale = ", standard error over the users"  # of the first difference only
        for outcome, some in groups.items():
            if some:
                listed = [
                    f"{NAMES[each]} ({differences[each]}{'' if number else scale})" for number, each in enumerate(some)
                ]
                many = "s" if len(some) > 1 else "", "are" if len(some) > 1 else "is"
                text = _FEW if users < FEWEST_USERS else _SAID[outcome]
                sentences.append(text.format(_listed(listed), users=f"{users:,}", s=many[0], be=many[1]))
                scale = ""
        above_all = all(gap.outcome == "better" or gap.mean > 0 for gap in differences.values())
        return cls(" ".join([*sentences, *notes]), differences, (*always, *(() if above_all else advice)))

    def as_json(self) -> dict[str, dict[str, float | None]]:
        """Differences with their standard errors, for `results.json`."""
        return {
            name: {
                "mean": gap.mean,
                "standard_error": None if math.isnan(gap.error) else gap.error,
                "users": gap.users,
            }
            for name, gap in self.differences.items()
        }

    def __str__(self) -> str:
        tries = [f"- {why}:\n  {command}" for why, command in self.advice]
        return "\n".join([self.sentences, *(["To try:"] if tries else []), *tries])


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
