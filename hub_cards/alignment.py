"""The facts of a preference alignment for cards: rewards, pairs, loss."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onerec_hf.hub_cards.common import origin
from onerec_hf.modeling.modeling_onerec_reward import OneRecForSessionReward

if TYPE_CHECKING:
    from datasets import Dataset

_REWARDS = {
    "reward": "mean reward of generated sessions, by the optimised reward",
    "heldout_reward": "mean reward of generated sessions, by a held-out judge",
}


@dataclass(frozen=True)
class Alignment:
    """
    The facts of a preference alignment; [`of`] reads them from its trainer.

    Args:
        rewards: descriptions of the reward functions; empty for given pairs.
        pairs: number of pairs per iteration, as far as known; iteration 0 for given pairs.
        iterations: number of iterations that drew pairs; 0 for given pairs.
        examples: number of training examples, None for a stream.
        share: share of the examples for which an iteration draws pairs; None for given pairs.
        drawing: how candidates are generated and selected, one sentence; empty for given pairs.
        loss: description of the loss.
        is_policy: policy optimisation, which draws sessions at every step and has no pairs.

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
    is_policy: bool = False

    @classmethod
    def of(cls, trainer: Any, pairs: Dataset | None = None) -> Alignment:
        """
        Reads a `Seq2SeqDPOTrainer` or `OneRecDPOTrainer`.

        Args:
            pairs: the pairs of all iterations, if they were kept; the trainer has those of the last iteration.
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

    @classmethod
    def of_policy(cls, trainer: Any) -> Alignment:
        """Reads a `OneRecGRPOTrainer`."""
        args, size = trainer.args, len(trainer.train_dataset)
        loss = f"{args.loss_type.upper()} (ratios per {args.importance_sampling_level}, epsilon {args.epsilon:g})"
        if args.ntp_weight:
            loss = f"next-token loss (weight {args.ntp_weight:g}) + {loss}"
        if args.beta:
            loss += f", KL divergence from the first policy (weight {args.beta:g})"
        if trainer.num_generations == 1:
            return cls([], {0: size}, 0, size, None, "", loss, is_policy=True)
        weights = args.reward_weights or [1.0] * len(trainer.reward_funcs)
        how = {"distinct": "without replacement", "sample": "independently", "beam": "by beam search"}[args.rollouts]
        where = "from the catalogue" if args.constrained else "from the whole vocabulary"
        seen = (
            "items of the history excluded"
            if args.constrained and args.exclude_seen
            else "items of the history allowed"
        )
        return cls(
            [reward_in_words(one, weight) for one, weight in zip(trainer.reward_funcs, weights, strict=True)],
            {},
            0,
            size,
            None,
            f"{args.num_generations} sessions per history, drawn {where} by the current policy {how} (temperature {args.temperature:g}), {seen}.",
            loss,
            is_policy=True,
        )


def _drawing(args: Any, select: Any) -> str:
    how = (
        "beam search"
        if args.candidates == "beam"
        else f"sampling without replacement (temperature {args.temperature:g})"
    )
    picked = {
        "best_worst": "the candidate with the largest reward is chosen, the one with the smallest rejected",
        "random_pair": "of two random candidates the one with the larger reward is chosen",
    }
    name = select.__qualname__.split(".")[0]
    seen = "items of the history excluded" if args.exclude_seen else "items of the history allowed"
    margin = f"; pairs with a reward difference of at most {args.min_margin:g} are dropped" if args.min_margin else ""
    return (
        f"{args.num_candidates} candidate sessions per history, generated by the model with {how}, {seen}; "
        f"{picked.get(name, f'pairs selected by the function {name}')}; candidates with equal rewards give no pair{margin}."
    )


def reward_in_words(function: Any, weight: float = 1.0) -> str:
    """
    Describes a reward function: a reward model with its objectives, or the name of a function.

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
        read = "its P-Score" if config.score_fusion == "p_score" else f"a weighted mean of {what}"
        words = f"the reward model {origin(config)}".strip() + f", {read} of {named}"
    return words if weight == 1 else f"{words} (weight {weight:g})"


def pairs_per_iteration(pairs: Dataset) -> dict[int, int]:
    """Number of pairs per iteration of a pair table; empty for a table without pairs (and columns)."""
    if not len(pairs):
        return {}
    return dict(sorted(Counter(pairs["iteration"]).items())) if "iteration" in pairs.column_names else {0: len(pairs)}


def before_and_after(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """
    Metrics before and after alignment, from result rows `before/onerec/metric` and `onerec/metric`, `reward/before` and
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
    for name, words in _REWARDS.items():
        if f"{name}/before" in values:
            found[words] = (values[f"{name}/before"], values[f"{name}/after"])
    return found
