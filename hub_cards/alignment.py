"""What a run of preference alignment knows of itself: who judged, which pairs, which loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onerec_hf.hub_cards.common import origin
from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

if TYPE_CHECKING:
    from datasets import Dataset

_JUDGES = {
    "reward": "mean reward of generated sessions, by the reward that picked the pairs",
    "heldout_reward": "mean reward of generated sessions, by a reward model that picked none",
}


@dataclass(frozen=True)
class Alignment:
    """
    The facts of a preference alignment; [`of`] reads them from its trainer.

    Args:
        rewards: what judged the candidates, in words, one each; empty where the pairs were given.
        pairs: per iteration the number of pairs, as far as known; of given pairs iteration 0.
        iterations: how often pairs were drawn; 0 where they were given.
        examples: rows of the training dataset, None for a stream.
        share: the share of the examples for which each iteration draws pairs; None where they were given.
        drawing: how candidates are made and picked, a sentence; empty where the pairs were given.
        loss: the loss, in words.

    Example:
        >>> Alignment([], {0: 20}, 0, 20, None, "", "DPO (sigmoid), beta 0.1").pairs
        {0: 20}
    """

    rewards: list[str]
    pairs: dict[int, int]
    iterations: int
    examples: int | None
    share: float | None
    drawing: str
    loss: str

    @classmethod
    def of(cls, trainer: Any, pairs: Dataset | None = None) -> Alignment:
        """
        Reads a `Seq2SeqDPOTrainer` or `OneRecDPOTrainer`.

        Args:
            pairs: the table of all iterations' pairs, where it was kept; the trainer itself has the last iteration's.
        """
        args, dataset = trainer.args, trainer.train_dataset
        loss = f"DPO ({' + '.join([args.loss_type] if isinstance(args.loss_type, str) else args.loss_type)}), beta {args.beta:g}"
        loss += ", without a reference" if args.reference_free else ""
        iterated = getattr(args, "dpo_ratio", None) is not None  # OneRecDPOConfig
        if iterated:
            loss = f"next-token loss (weight {args.ntp_weight:g}) + {loss} (weight {args.dpo_weight:g})"
        functions = getattr(trainer, "reward_funcs", [])
        size = len(dataset) if hasattr(dataset, "__len__") else None
        if not functions or {"chosen", "rejected"} <= set(dataset.column_names or ()):
            return cls([], {} if size is None else {0: size}, 0, size, None, "", loss)
        weights = args.reward_weights or [1.0] * len(functions)
        table = trainer.pairs if pairs is None else pairs
        return cls(
            [reward_in_words(one, weight) for one, weight in zip(functions, weights, strict=True)],
            pairs_per_iteration(table),
            trainer.iteration + 1,
            size,
            args.dpo_ratio,
            _drawing(args, trainer._select),
            loss,
        )


def _drawing(args: Any, select: Any) -> str:
    how = (
        "beam search"
        if args.candidates == "beam"
        else f"sampling without replacement (temperature {args.temperature:g})"
    )
    picked = {
        "best_worst": "the candidate of the largest reward is chosen, that of the smallest rejected",
        "random_pair": "of two candidates at random the one of the larger reward is chosen",
    }
    name = select.__qualname__.split(".")[0]
    seen = "items of the history left out" if args.exclude_seen else "items of the history allowed"
    margin = f"; pairs whose rewards differ by {args.min_margin:g} or less are dropped" if args.min_margin else ""
    return (
        f"{args.num_candidates} candidate sessions per history by {how} from the model itself, {seen}; "
        f"{picked.get(name, f'pairs picked by the function {name}')}; candidates of equal reward give no pair{margin}."
    )


def reward_in_words(function: Any, weight: float = 1.0) -> str:
    """
    What a reward function is: a reward model with its objectives, or a function by its name.

    Example:
        >>> def prefers_new(histories, sessions): ...
        >>> reward_in_words(prefers_new, 0.5)
        'the function prefers_new (weight 0.5)'
    """
    model = getattr(function, "__self__", None)
    words = f"the function {getattr(function, '__name__', type(function).__name__)}"
    if isinstance(model, OneRecForSessionReward):
        config = model.config
        weights = config.score_weights or dict.fromkeys(config.objectives, 1.0)
        what = "lifts over base rates" if config.score_fusion == "lift" else "probabilities"
        named = ", ".join(f"{name} (weight {weights.get(name, 0.0):g})" for name in config.objectives)
        words = f"the reward model {origin(config)}".strip() + f", a weighted mean of {what} of {named}"
    return words if weight == 1 else f"{words} (weight {weight:g})"


def pairs_per_iteration(pairs: Dataset) -> dict[int, int]:
    """The number of pairs of each iteration of a pair table; an empty one has none, and no columns."""
    if not len(pairs):
        return {}
    return dict(sorted(Counter(pairs["iteration"]).items())) if "iteration" in pairs.column_names else {0: len(pairs)}


def before_and_after(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """
    What was measured before and after alignment, of result rows `before/onerec/metric` and `onerec/metric`, `reward/before` and
    `reward/after`, `heldout_reward/before` and `heldout_reward/after`.

    Example:
        >>> before_and_after([{"name": "before/onerec/recall@10", "value": 0.1}, {"name": "onerec/recall@10", "value": 0.2}])
        {'recall@10': (0.1, 0.2)}
    """
    values = {row["name"]: row["value"] for row in rows}
    found = {}
    for name in values:
        metric = name.removeprefix("before/onerec/")
        if metric != name and f"onerec/{metric}" in values:
            found[metric] = (values[name], values[f"onerec/{metric}"])
    for name, words in _JUDGES.items():
        if f"{name}/before" in values:
            found[words] = (values[f"{name}/before"], values[f"{name}/after"])
    return found
