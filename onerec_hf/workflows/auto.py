"""Settings chosen from the data: what is counted, and the rules that turn counts into options, each with its reason."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from onerec_hf.workflows.dataset import InMemoryDataset, RecommendationDataset
from onerec_hf.workflows.settings import sizes_of_pathways

# The rules' numbers, in the order of the rules.
ITEMS_PER_CODE = 50
SMALLEST_CODEBOOK, LARGEST_CODEBOOK = 16, 256
SHORTEST_HISTORY, LONGEST_HISTORY = 10, 50
TIED_TARGETS = 0.01  # share of test targets that a tie decides, from which ties matter
SMALL_ITEMS, SMALL_INTERACTIONS = 3_000, 20_000  # below either: the smaller width
SMALL_WIDTH, WIDTH = 64, 128
HEAD_ITEMS, HEAD_MEMORY = 1_000_000, 0.25  # most items of an item head, and its largest share of the memory
DENSE = 50  # interactions per item from which the data counts as dense
DROPOUT, DENSE_DROPOUT = 0.45, 0.2
FEATURE_DROPOUT = 0.2
SMOOTHING, DENSE_SMOOTHING = 0.2, 0.0
ROW = 64  # items of a packed row; more where histories are longer than half of it
TOKENS, STEPS_OF_AN_EPOCH = 512, 40  # items of a step; fewer where an epoch would have fewer steps
EPOCHS, STEPS = 10, 3_000  # at most, the more of the two: small sets need many epochs, validation ends what needs none
RATE, WARMUP = 0.005, 50
SESSION, SESSION_SHARE = 5, 0.1
PATIENCE, EVAL_STEPS = 3, 500
PLATEAU, STEPS_OF_AN_EVALUATION = (
    2,
    100,
)  # evaluations without a better one, none of them after fewer steps: they would be noise
MORE_EPOCHS, RATE_OF_MORE = 3, 0.001  # to go on from a trained model
REPEATS = 0.1  # share of targets in their own history, from which seen items are ranked


class Choice(NamedTuple):
    """An option of `onerec-hf train`, its value and the reason for it."""

    option: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Statistics:
    """
    What the rules read of a dataset.

    Args:
        users, items, interactions: after filtering; interactions with the held-out ones.
        per_item, per_user: median and 95th percentile of training interactions, of users with at least two; None for a prepared folder, which is
            not read for that.
        repeats: share of training targets that stand in their own history.
        tied_targets: share of test targets whose time equals that of the item before.
        ties_in_order: share of neighbours of equal time with ascending item ids, or with descending ones if that is more.
        texts: distinct texts of the items.
        embeddings: whether the items have given embeddings.
        features: how many features of users, interactions and items the examples have.
        accelerator: whether training runs on one.
        memory: bytes of the accelerator, or of this machine.
        in_memory: whether the training examples can still be cut otherwise.
        lengths: (users,) training interactions that histories hold; None for a prepared folder.
    """

    users: int
    items: int
    interactions: int
    per_item: tuple[float, float] | None = None
    per_user: tuple[float, float] | None = None
    repeats: float = 0.0
    tied_targets: float = 0.0
    ties_in_order: float = 0.0
    texts: int = 0
    embeddings: bool = False
    features: int = 0
    accelerator: bool = False
    memory: int = 16 * 2**30
    in_memory: bool = True
    lengths: np.ndarray | None = None

    @classmethod
    def of(cls, data: RecommendationDataset, use_cpu: bool = False) -> Statistics:
        """Counts a dataset; a prepared folder's counts are in its manifest."""
        counts, accelerator = data.counts(), None if use_cpu else _accelerator_memory()
        found: dict[str, Any] = {
            "users": counts["users"],
            "items": len(data.item_ids),
            "interactions": counts["of them kept"],
            "accelerator": accelerator is not None,
            "memory": accelerator or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        }
        if data.items is not None:
            texts = set(data.items.select(data.item_ids).frame["text"]) - {""}
            found |= {"texts": len(texts), "embeddings": data.items.embeddings is not None}
        if data.features is not None:
            found["features"] = len(data.features.schema.all)
        if not isinstance(data, InMemoryDataset):
            return cls(**found, in_memory=False)
        rows = data.train_rows()
        lengths, flat = np.array([len(row) for row in rows]), np.concatenate(rows)
        read = np.diff(data.train_sequences.histories.offsets)  # with the interactions that are no targets
        pairs = np.unique(np.repeat(np.arange(len(rows)), lengths) * len(data.item_ids) + flat)
        return cls(
            **found,
            per_item=_spread(np.bincount(flat, minlength=len(data.item_ids))),
            per_user=_spread(read[read > 1]),  # one interaction is no history
            lengths=read,
            repeats=float((len(flat) - len(pairs)) / max(1, len(flat) - len(rows))),
            **_ties(data),
        )

    def items_read(self, max_history: int) -> int:
        """History items of an epoch over prefixes: histories beyond `max_history` are read in overlapping chunks."""
        if self.lengths is None:
            return self.interactions
        longest = np.maximum(self.lengths - 1, 0)
        step = max(1, max_history // 2)
        full = -(-np.maximum(longest - max_history, 0) // step)
        return int((full * max_history + longest - full * step).sum())

    @property
    def positive_share(self) -> float:
        """Share of positive interactions among those that histories hold."""
        return 1.0 if self.lengths is None else min(1.0, self.interactions / max(1, int(self.lengths.sum())))

    def places_read(self, max_history: int, pathways: Mapping[str, int]) -> int:
        """Places of an epoch over windows with pathways: a window for each positive interaction, which reads those before it."""
        if self.lengths is None:
            return self.interactions
        before = np.minimum(np.arange(max(2, int(self.lengths.max(initial=0)))), max_history)
        places = np.minimum(before, pathways["short_term"])
        places = places + np.minimum(before * self.positive_share, pathways["positive"])
        return int(self.positive_share * np.cumsum(places)[np.maximum(self.lengths - 1, 0)].sum())


def _spread(counts: np.ndarray) -> tuple[float, float]:
    """Median and 95th percentile."""
    return float(np.median(counts)), float(np.percentile(counts, 95))


def _ties(data: InMemoryDataset) -> dict[str, Any]:
    """The shares about ties of a dataset in the table's order; ties decide no target of another split than leave-one-out."""
    from onerec_hf.data import Ties

    if data.settings.holdout != "last":
        return {}
    found = Ties.of(data.sequences)
    return {"tied_targets": found.share, "ties_in_order": found.in_order}


def _accelerator_memory() -> int | None:
    """Bytes of the accelerator; None without one. One whose memory torch cannot tell counts as this machine's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if torch.accelerator.is_available() else None


class Table:
    """The rows of a choice; what the caller gave stands in it as given, and rules that depend on it read it from here."""

    def __init__(self, given: Mapping[str, Any], saved: Mapping[str, Any] | None = None):
        self.given = given
        #: Sizes of the pathways of the model, a new or a saved one.
        self.pathways = sizes_of_pathways(given.get("pathways")) if saved is None else saved.get("pathways")
        #: Whether it has a lifelong pathway.
        self.lifelong = (given if saved is None else saved).get("lifelong") is not None
        #: Whether a saved model has an item head; a new one's is a choice.
        self.item_head = saved is not None and saved.get("item_head") is not None
        self.rows: list[Choice] = []

    def add(self, option: str, value: Any, reason: str) -> Any:
        """Adds a row and returns the option's final value."""
        row = Choice(option, self.given[option], "given") if option in self.given else Choice(option, value, reason)
        self.rows.append(row)
        return row.value


def choose(
    found: Statistics, given: Mapping[str, Any] | None = None, saved: Mapping[str, Any] | None = None
) -> list[Choice]:
    """
    The options of `onerec-hf train` for data of these statistics.

    Args:
        given: options that the caller decided; they stay, and the others fit them.
        saved: `encoder_is_causal`, `session_length`, `max_history`, `pathways`, `lifelong` and `item_head` of a model or checkpoint to go on from, which the
            examples must fit.

    Example:
        >>> rows = choose(Statistics(users=22_363, items=12_101, interactions=198_502, per_user=(4, 19)), {"hidden_size": 96})
        >>> [row.value for row in rows if row.option in ("codebook_sizes", "hidden_size", "intermediate_size", "max_history")]
        [20, [256, 256, 256], 96, 192]
    """
    table = Table(given or {}, saved)
    if found.in_memory:
        _examples(found, table, saved)
    if saved is None:
        if table.given.get("semantic_ids") is None:
            _semantic_ids(found, table)
        _model(found, table)
    goes_on = table.given.get("model") is not None
    # A checkpoint of another run has no state of early stopping.
    strategy = _validation_strategy(table.given) if saved is None or goes_on else None
    plateau = strategy is not None and not goes_on and _may_end_on_a_plateau(table.given)
    steps = _training(found, table, goes_on, plateau)
    if strategy is not None:
        _stopping(table, strategy, steps, plateau)
    elif table.given.get("fsdp_size", 1) != 1:
        table.add("save_strategy", "no", "the optimizer of a sharded model cannot be saved")
    _evaluation(found, table)
    return table.rows


def _examples(found: Statistics, table: Table, saved: Mapping[str, Any] | None) -> None:
    """How interactions are cut; before the model, which reads such examples."""
    causal = table.given.get("encoder_is_causal", True) if saved is None else saved.get("encoder_is_causal", False)
    pathways = table.pathways
    if pathways is not None or table.lifelong:
        which = "what is older than a history" if table.lifelong else "the short-term pathway"
        table.add("train_on", "windows", f"{which} differs for each target")
    else:
        table.add(
            "train_on",
            "prefixes" if causal else "windows",
            "one pass over a history trains on all its items" if causal else "the encoder is fully visible",
        )
    assert found.per_user is not None
    longest, most = found.per_user[1], LONGEST_HISTORY
    if pathways is not None:  # as many interactions as hold the positive ones of that pathway
        most = max(pathways["short_term"], pathways["positive"] / found.positive_share)
    length = 10 * -(-int(min(most, max(SHORTEST_HISTORY, longest))) // 10)
    latest = f", of which the latest {length} are read" if length < longest else ""
    for option, value, reason in (
        ("max_history", length, f"95 % of histories hold at most {longest:,.0f} training interactions{latest}"),
        ("session_length", SESSION, "the paper's sessions; the next item is their first"),
    ):
        if saved is None:
            table.add(option, value, reason)
        elif option in saved:
            table.add(option, saved[option], "of the saved model")
    from onerec_hf.data.ties import IN_ORDER

    tied = f"a tie decides {found.tied_targets:.1%} of the test targets"
    if found.tied_targets < TIED_TARGETS:
        table.add("ties", "file", tied)
    elif found.ties_in_order < IN_ORDER:
        table.add("ties", "file", f"{tied}, and the table has them in no order of ids")
    else:
        table.add("ties", "shuffle", f"{tied}, which the table has sorted by item ({found.ties_in_order:.0%})")


def _semantic_ids(found: Statistics, table: Table) -> None:
    size = codebook_size(found.items)
    table.add("codebook_sizes", [size] * 3, f"{found.items:,} items, about {max(1, found.items // size)} to a code")
    if found.embeddings:
        table.add("embedding", "given+behaviour", "the items have embeddings")
    elif found.texts > 1:
        table.add("embedding", "text+behaviour", f"the items have {found.texts:,} different texts")
    else:
        table.add("embedding", "behaviour", "no texts that tell the items apart")


def codebook_size(num_items: int) -> int:
    """
    The power of two, 16 to 256, that gives about 50 items a first-level code: small sets collapse with large codebooks. At most the number of
    items.

    Example:
        >>> [codebook_size(items) for items in (5, 60, 1600, 12_801, 10**7)]
        [5, 16, 32, 256, 256]
    """
    power = 2 ** round(math.log2(max(1, num_items / ITEMS_PER_CODE)))
    return min(num_items, max(SMALLEST_CODEBOOK, min(LARGEST_CODEBOOK, power)))


def _model(found: Statistics, table: Table) -> None:
    small = found.items < SMALL_ITEMS or found.interactions < SMALL_INTERACTIONS
    size = f"{found.items:,} items, {found.interactions:,} interactions"
    width = table.add("hidden_size", SMALL_WIDTH if small else WIDTH, size)
    table.add("intermediate_size", 2 * width, f"twice the width of {width}")
    table.add("encoder_layers", 2, "the encoder does most of the work")
    table.add("decoder_layers", 1, "enough behind an item head")
    table.add("num_experts", 1, "experts pay off far beyond this size")
    table.add("encoder_is_causal", True, "a prefix must not see what follows it")
    table.add("encoder_attention", "pointwise", "better than softmax on short histories")
    table.add("encoder_pools_items", True, "one position per item instead of one per code")
    table.add("encoder_scales_embeddings", True, "with one position per item")
    dense, per_item = (
        found.interactions >= DENSE * found.items,
        f"{found.interactions / found.items:,.0f} interactions per item",
    )
    table.add("dropout_rate", DENSE_DROPOUT if dense else DROPOUT, per_item)
    if found.features:
        several = f"{found.features} feature{'s' if found.features > 1 else ''}"
        table.add("feature_dim", max(8, width // 2), f"half the width of {width}, for {several}")
        table.add("feature_dropout", FEATURE_DROPOUT, "a value that is missing costs less")
        table.add("feature_user_at_items", True, "short histories attend little to a token of the user")
    _item_head(found, table, width)


def _item_head(found: Statistics, table: Table, width: int) -> None:
    memory = found.items * width * 4 * 4  # weights, gradients and two moments of AdamW, in float32
    room = HEAD_MEMORY * found.memory
    fits = found.items <= HEAD_ITEMS and memory <= room
    needs = f"{found.items:,} vectors need {_bytes(memory)} in training, of {_bytes(found.memory)}"
    if not table.add("item_head", fits, needs):
        return
    table.add("item_head_dropout", 0.3, "items must also be read from their codes")
    if table.given.get("item_head_loss_weight") == 0:  # vectors without scores
        return
    if found.in_memory and (items := _value(table, "session_length", SESSION)) > 1:
        table.add("item_head_loss_weight", float(items), f"as much as the codes of the first of {items} items")
    table.add("item_head_codes", True, "rare items share what their codes have learned")
    if found.embeddings or found.texts > 1:
        table.add("item_head_content", True, "similar items share what their content has learned")
    if table.given.get("fsdp_size", 1) == 1:  # it is fitted on unsharded weights
        table.add("item_head_evidence", True, "pairs of items count without being learned")
    table.add("item_score_weight", 32.0, "sessions follow the item head")
    table.add("decoder_weight", 0.0, "the item head alone ranks single items")


def _training(found: Statistics, table: Table, goes_on: bool, plateau: bool) -> int:
    """Returns the steps of an epoch."""
    interactions = found.interactions
    unpacked = "a lifelong history is not packed" if table.lifelong else "a stream of examples is not packed"
    may_pack = found.in_memory and not table.lifelong
    packing = table.add("packing", may_pack, "no padding" if may_pack else unpacked)
    if packing:
        longest = _value(table, "max_history", LONGEST_HISTORY)
        history, pathways = longest, table.pathways
        if pathways is not None:
            longest = sum(min(longest, size) for size in pathways.values())
        length = table.add("packing_length", max(ROW, 2 * longest), f"items of a row; histories have up to {longest}")
        rows = max(1, min(TOKENS, interactions // STEPS_OF_AN_EPOCH) // length)
        rows = table.add("per_device_train_batch_size", rows, f"rows of {length} items; {interactions:,} interactions")
        read = found.items_read(longest) if pathways is None else found.places_read(history, pathways)
        batch = rows * length
        if _value(table, "session_length", SESSION) > 1 and _value(table, "item_head", table.item_head):
            table.add("session_share", SESSION_SHARE, "the decoder trains on these sessions, the item head on all")
    else:
        batch, read = table.add("per_device_train_batch_size", 128, "examples of a step"), interactions
    steps = max(1, read // batch)
    epochs = MORE_EPOCHS if goes_on else max(EPOCHS, -(-STEPS // steps)) if plateau else EPOCHS
    epochs = table.add("num_train_epochs", epochs, f"at most; about {steps:,} steps each")
    rate = RATE_OF_MORE if goes_on else RATE
    table.add("learning_rate", rate, "goes on from a trained model" if goes_on else f"steps of {batch} items")
    if plateau:
        table.add("lr_scheduler_type", "constant_with_warmup", "until validation NDCG rises no longer")
    else:
        table.add("lr_scheduler_type", "cosine", "ends where the epochs end")
    total = table.given.get("max_steps", 0)
    total = total if total > 0 else int(steps * epochs)
    table.add("warmup_steps", min(WARMUP, total // 10), f"of about {total:,} steps")
    table.add("weight_decay", 0.05, "as tuned")
    if not _shards(table.given):  # the average is of whole weights
        table.add("average_weights", True, "the noise of single steps averages out")
    dense, per_item = interactions >= DENSE * found.items, f"{interactions / found.items:,.0f} interactions per item"
    table.add("label_smoothing_factor", DENSE_SMOOTHING if dense else SMOOTHING, per_item)
    table.add("logging_steps", 50, "a line of losses every 50 steps")
    return steps


def _shards(given: Mapping[str, Any]) -> bool:
    """Whether the model is sharded, by our options, by Trainer's or by `accelerate launch`."""
    by_launch = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    return given.get("fsdp_size", 1) != 1 or bool(given.get("fsdp") or given.get("deepspeed")) or by_launch


def _validation_strategy(given: Mapping[str, Any]) -> str | None:
    """When validation chooses the best checkpoint: steps, epoch, or auto for either; None where the caller saves or evaluates otherwise."""
    if given.get("fsdp_size", 1) != 1:
        return None
    strategies = [given[option] for option in ("eval_strategy", "save_strategy") if option in given]
    if "no" in strategies or len(set(strategies)) > 1 or not given.get("predict_with_generate", True):
        return None
    return strategies[0] if strategies else "auto"


def _may_end_on_a_plateau(given: Mapping[str, Any]) -> bool:
    """Whether the caller leaves the schedule to the validation."""
    return given.get("decay_on_plateau", PLATEAU) is not None and not given.keys() & {
        "lr_scheduler_type",
        "early_stopping_patience",
    }


def _stopping(table: Table, strategy: str, steps: int, plateau: bool) -> None:
    """The best checkpoint by validation, and an end where it gets no better."""
    given = table.given
    if strategy == "auto":
        strategy = "steps" if plateau and steps < STEPS_OF_AN_EVALUATION else "epoch"
    table.add("eval_strategy", strategy, "validation NDCG chooses the checkpoint")
    table.add("save_strategy", strategy, "with each evaluation")
    if strategy == "steps":
        least = STEPS_OF_AN_EVALUATION if steps < STEPS_OF_AN_EVALUATION else EVAL_STEPS
        steps = given.get("eval_steps", given.get("save_steps", least))
        table.add("eval_steps", steps, "with each checkpoint")
        table.add("save_steps", steps, "with each evaluation")
    table.add("save_total_limit", 1, "the best checkpoint is kept beside the last one")
    table.add("load_best_model_at_end", True, "the best checkpoint becomes the model")
    ks = given.get("eval_top_k", [5, 10])
    table.add("metric_for_best_model", f"ndcg@{10 if 10 in ks else max(ks)}", "of validation users")
    table.add("greater_is_better", True, "NDCG")
    if plateau:
        table.add("decay_on_plateau", PLATEAU, "evaluations without a better one end the constant learning rate")
    else:
        table.add("early_stopping_patience", PATIENCE, "evaluations without a better one end the training")


def _evaluation(found: Statistics, table: Table) -> None:
    repeated = f"{found.repeats:.1%} of the targets repeat an item of their history"
    table.add("eval_exclude_seen", found.repeats <= REPEATS, repeated)
    table.add("eval_num_beams", max(30, *_value(table, "eval_top_k", [5, 10])), "beams of the ranking")
    table.add(
        "per_device_eval_batch_size", 256 if found.items <= 200_000 else 64, f"scores of {found.items:,} items each"
    )


def _value(table: Table, option: str, default: Any) -> Any:
    """The option's value so far."""
    return next((row.value for row in table.rows if row.option == option), table.given.get(option, default))


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def choices_table(choices: Sequence[Choice]) -> str:
    """
    The choices as text, an option a line, values as on the command line.

    Example:
        >>> print(choices_table([Choice("codebook_sizes", [16, 16], "60 items"), Choice("packing", True, "no padding")]))
        --codebook_sizes  16 16  60 items
        --packing         true   no padding
    """
    lines = [(f"--{row.option}", shown(row.value), row.reason) for row in choices]
    widths = [max((len(line[column]) for line in lines), default=0) for column in (0, 1)]
    return "\n".join(
        f"{option:<{widths[0]}}  {value:<{widths[1]}}  {reason}".rstrip() for option, value, reason in lines
    )


def shown(value: Any) -> str:
    """A value as on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(shown, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
