"""Iterative preference alignment (OneRec paper, section 3.3): the trainer draws pairs and updates its reference."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.utils import logging

from onerec_hf.data.collators import feature_columns
from onerec_hf.modeling.feature_codes import FEATURE_COLUMNS
from onerec_hf.modeling.files import replacing
from onerec_hf.modeling.processing_onerec import OneRecProcessor
from onerec_hf.trainers.guards import guard, variety_reward
from onerec_hf.trainers.inputs import own_arguments, plain_rows
from onerec_hf.trainers.onerec_dpo_config import OneRecDPOConfig
from onerec_hf.trainers.pair_selection import SELECTIONS, Selection
from onerec_hf.trainers.preference_checks import check_item_rows
from onerec_hf.trainers.preference_collators import OneRecPreferenceCollator
from onerec_hf.trainers.rewards import RewardFunction, as_functions
from onerec_hf.trainers.seq2seq_dpo_trainer import Seq2SeqDPOTrainer
from onerec_hf.trainers.sharding import unsharded_model
from onerec_hf.trainers.whole_evaluation import first_rows

logger = logging.get_logger(__name__)

_PAIRS_FILE = "pairs.json"


class OneRecDPOTrainer(Seq2SeqDPOTrainer):
    """
    Minimises L = L_NTP + lambda * L_DPO on examples `{"history": [ids], "session": [ids]}`. For a share `dpo_ratio` of the examples, the model
    generates candidate sessions, and a reward selects pairs. Every `epochs_per_iteration` epochs the policy becomes the reference and new
    pairs are drawn: iterative preference alignment. Checkpoints contain pairs, iteration and reference, so training resumes exactly.

    Offline: rows with `chosen` and `rejected` (sessions of item ids) use these pairs, without generation or reward.

    Args:
        model: a `OneRecForConditionalGeneration`, or its path or Hub id.
        reward_funcs: as in TRL's GRPOTrainer, one or several of: a function `(histories, sessions) -> list of floats` over lists of
            item ids; a [`OneRecForSessionReward`]; its path or Hub id.
        args: [`OneRecDPOConfig`].
        train_dataset: rows as above.
        processing_class: the [`OneRecProcessor`].
        selection: a function instead of `args.selection`, see [`onerec_hf.trainers.pair_selection`].
        judge_funcs: held-out rewards, given as `reward_funcs`, for the guards ([`~onerec_hf.trainers.guards.GuardCallback`]).
        guard_dataset: rows of held-out users, with `history` and `session`, that the guards measure.
        kwargs: as for [`Seq2SeqDPOTrainer`].

    `trainer.pairs` is the table of the current pairs, a `datasets.Dataset` with `row`, `iteration`, `history`, `chosen`, `rejected`,
    `chosen_reward`, `rejected_reward`; it can be saved and pushed like any dataset.

    Raises:
        ValueError: missing columns, invalid rows ([`check_item_rows`]), no reward for rows without pairs, or several iterations with an adapter
            (its reference is the base model).

    Example:
        >>> def prefers_new(histories, sessions):
        ...     return [sum(item.startswith("new") for item in session) for session in sessions]
        >>> trainer = OneRecDPOTrainer(
        ...     model, prefers_new, args=OneRecDPOConfig("out"), train_dataset=train, processing_class=processor
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "dpo", "onerec", "iterative-preference-alignment"]
    _memory_settings = {
        "training": ", or a smaller max_history of the processor; for drawing pairs, draw_batch_size or num_candidates",
        "evaluation": "",
    }
    args: OneRecDPOConfig

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunction | PreTrainedModel | str | list | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        processing_class: OneRecProcessor | None = None,
        selection: Selection | None = None,
        callbacks: list[TrainerCallback] | None = None,
        judge_funcs: RewardFunction | PreTrainedModel | str | list | None = None,
        guard_dataset: Dataset | list[dict] | None = None,
        **kwargs,
    ):
        args = own_arguments(args, OneRecDPOConfig, "onerec-dpo-output")
        train_dataset = plain_rows(train_dataset)
        self.reward_funcs = as_functions(reward_funcs)
        weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"{len(weights)} reward_weights for {len(self.reward_funcs)} reward functions; pass one weight per function"
            )
        self._reward_weights = weights
        self._select = SELECTIONS[args.selection] if selection is None else selection
        if not isinstance(train_dataset, Dataset):
            raise ValueError(
                "OneRecDPOTrainer needs an indexable train_dataset, since pairs refer to its rows; pass a datasets.Dataset"
            )
        missing = {"history", "session"} - set(train_dataset.column_names)
        if missing:
            raise ValueError(
                f"the training dataset lacks {sorted(missing)}; its rows are history and session, lists of item ids, and for offline "
                f"alignment chosen and rejected; this one has {train_dataset.column_names}"
            )
        self._offline = {"chosen", "rejected"} <= set(train_dataset.column_names)
        if processing_class is None:
            raise ValueError("OneRecDPOTrainer needs processing_class: pass the OneRecProcessor with the catalogue")
        columns = ("history", "session", *(("chosen", "rejected") if self._offline else ()))
        check_item_rows(train_dataset, processing_class, columns, "training")
        if not self._offline and not self.reward_funcs:
            raise ValueError("neither reward_funcs nor columns chosen and rejected are given; pass one of them")
        has_adapter = kwargs.get("peft_config") is not None or (not isinstance(model, str) and is_peft_model(model))
        if has_adapter and not self._offline and args.num_train_epochs > args.epochs_per_iteration:
            raise ValueError(
                "with an adapter the reference is the base model in every iteration; train one iteration "
                "(num_train_epochs = epochs_per_iteration), merge, and continue from the merged model"
            )
        self._examples = train_dataset
        self._pairs: dict[int, list[dict[str, Any]]] = {}
        self.iteration = -1
        features = [name for name in FEATURE_COLUMNS if name in train_dataset.column_names]
        rows = train_dataset.select_columns([*columns, *features]).add_column("row", list(range(len(train_dataset))))  # type: ignore[call-arg]
        super().__init__(
            model,
            args=args,
            train_dataset=rows,
            processing_class=processing_class,
            data_collator=_AlignmentCollator(
                processing_class, self._pairs_of, self._any_pair if args.world_size > 1 else None
            ),
            callbacks=[_DrawAtEpoch(self), *(callbacks or [])],
            **kwargs,
        )
        guard(self, guard_dataset, judge_funcs)

    def _pairs_of(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        return [example] if "chosen" in example else self._pairs.get(example.get("row", -1), [])

    def _any_pair(self, row: int) -> list[dict[str, Any]]:
        rows = sorted(self._pairs)
        return self._pairs[rows[row % len(rows)]] if rows else []

    @property
    def pairs(self) -> Dataset:
        """The pairs of the current iteration."""
        return Dataset.from_list([pair for row in sorted(self._pairs) for pair in self._pairs[row]])

    def begin_iteration(self, iteration: int) -> None:
        """Copies the policy to the reference and draws the iteration's pairs, once per iteration."""
        if iteration == self.iteration or self._offline:
            return
        self.iteration, self._last_batch = (
            iteration,
            {},
        )  # out-of-memory errors from here on do not concern a training batch
        policy = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(policy.state_dict())
        # A separate generator: a resumed run draws the same pairs, and the training's random state does not change.
        rng = np.random.default_rng((self.args.seed, iteration))
        count = max(1, round(self.args.dpo_ratio * len(self._examples)))
        drawn = np.sort(rng.choice(len(self._examples), size=count, replace=False))
        mine = drawn[self.accelerator.process_index :: self.accelerator.num_processes]
        with unsharded_model(policy) as generator, generator.packed_experts():
            results = gather_object(list(self._draw(generator, mine.tolist(), iteration)))
        found = [pair for _, pairs in results for pair in pairs]
        self._pairs = _by_row(found)
        # Histories with tied or few candidates contribute little, so they are reported.
        without = sum(not pairs for _, pairs in results)
        short = sum(candidates < self.args.num_candidates for candidates, _ in results)
        if without or short:
            logger.warning(
                f"iteration {iteration}: {without} of {count} histories gave no pair (reward difference at most "
                f"min_margin={self.args.min_margin}), and {short} had fewer than num_candidates={self.args.num_candidates} valid sessions"
                + ("" if found else "; this iteration trains on L_NTP only")
            )
        metrics = {"count": len(found), "without": without, "short_of_candidates": short}
        if found:
            for side in ("chosen", "rejected"):
                metrics[f"{side}_reward"] = sum(pair[f"{side}_reward"] for pair in found) / len(found)
        for name, value in metrics.items():
            self._metrics["train"][f"pairs/{name}"].append(float(value))

    def _draw(self, policy, rows: list[int], iteration: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """For each row, the number of candidates and the pairs."""
        args, processor = self.args, self.processing_class
        device = self.accelerator.device
        if args.exclude_seen:
            left = [row for row in rows if self._has_candidates(self._examples[row]["history"])]
            yield from ((0, []) for _ in range(len(rows) - len(left)))
            rows = left
        for start in range(0, len(rows), args.draw_batch_size):
            some = rows[start : start + args.draw_batch_size]
            examples = [self._examples[row] for row in some]
            histories = [example["history"] for example in examples]
            features = feature_columns(processor, examples)  # type: ignore[arg-type]
            out = policy.recommend(
                **processor(histories, **features),  # type: ignore[operator]
                num_beams=args.num_candidates,
                num_return_sequences=args.num_candidates,
                session_length=args.candidate_length,
                exclude=histories if args.exclude_seen else None,
                do_sample=args.candidates == "sample",
                temperature=args.temperature,
                # One generator per history: candidates depend neither on the batch nor on the rank.
                generator=[torch.Generator(device).manual_seed(_seed(args.seed, iteration, row)) for row in some],
            )
            sessions = processor.batch_decode(out)  # type: ignore[union-attr]
            owners = [history for history in histories for _ in range(args.num_candidates)]
            bonus = args.variety_weight * np.array(
                variety_reward(owners, sessions) if args.variety_weight else [0.0] * len(owners)
            )
            for place, (row, history) in enumerate(zip(some, histories, strict=True)):
                own = slice(place * args.num_candidates, (place + 1) * args.num_candidates)
                added = bonus[own][[bool(session) for session in sessions[own]]]
                mine = [session for session in sessions[own] if session]
                rewards = self.rewards([history] * len(mine), mine) + added
                rng = np.random.default_rng((args.seed, iteration, row))
                found = []
                for chosen, rejected in self._select(rewards, rng) if mine else []:
                    # Of several rejected sessions, the best one determines the margin.
                    worth = float(rewards[rejected].max())
                    if rewards[chosen] - worth > args.min_margin:
                        pair = {"row": row, "iteration": iteration, "history": history, "chosen": mine[chosen]}
                        pair |= {name: values[place] for name, values in features.items()}
                        several = isinstance(rejected, list)
                        pair["rejected"] = [mine[place] for place in rejected] if several else mine[rejected]
                        found.append({**pair, "chosen_reward": float(rewards[chosen]), "rejected_reward": worth})
                yield len(mine), found

    def _has_candidates(self, history: list) -> bool:
        """Whether an item is left that the history does not hold."""
        catalogue: Any = self.processing_class.catalogue  # type: ignore[union-attr]
        return len(history) < catalogue.num_active or catalogue.num_left(catalogue.indices(history)) > 0

    def rewards(self, histories: list[list], sessions: list[list]) -> np.ndarray:
        """(sessions,) float64: the weighted sum of the reward functions. Raises ValueError if one is not finite."""
        total = np.zeros(len(sessions))
        for function, weight in zip(self.reward_funcs, self._reward_weights, strict=True):
            values = np.asarray(function(histories, sessions), dtype=np.float64)
            if values.shape != total.shape or not np.isfinite(values).all():
                raise ValueError(
                    f"reward function {getattr(function, '__name__', function)!r} must return one finite number per session: "
                    f"{len(sessions)} sessions, got shape {values.shape}, {int((~np.isfinite(values)).sum())} not finite"
                )
            total += weight * values
        return total

    def _compute_loss(self, model, inputs, return_outputs):
        # Gradients are averaged over ranks with different numbers of tokens and pairs, so each loss is weighted by its rank's share.
        ranks = self.accelerator.num_processes
        tokens = (inputs["ntp"]["labels"] != -100).sum()
        ntp = model(**inputs["ntp"], use_cache=False)
        share = ranks * tokens / self.accelerator.reduce(tokens) if ranks > 1 else 1.0  # type: ignore[operator]
        loss = self.args.ntp_weight * share * ntp.loss
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["loss/ntp"].append(self.accelerator.gather(ntp.loss.detach()).mean().item())
        share = self._share_of_pairs(inputs, ranks)
        if share is not None:
            with _gathering_ragged(self.accelerator, empty=ranks > 1 and not inputs["pair_count"].item()):
                dpo = super()._compute_loss(model, inputs["pairs"], False)
            self._metrics[mode]["loss/dpo"].append(self.accelerator.gather(share * dpo.detach()).mean().item())
            loss = loss + self.args.dpo_weight * share * dpo
        return (loss, ntp) if return_outputs else loss

    def _count_batch(self, model, inputs) -> torch.Tensor:
        batch = inputs["ntp"]
        real = self.real_rows(len(batch["labels"]))
        labels = batch["labels"].clone()
        labels[real:] = -100
        ntp = model(**{**batch, "labels": labels}, use_cache=False).loss
        self.count("loss/ntp", ntp, (labels != -100).sum())
        loss = self.args.ntp_weight * ntp
        if "pairs" not in inputs:
            return loss
        places, rows = inputs["pair_examples"], inputs["pairs"]["encoder_input_ids"].shape[0]
        kept = int((places < real).sum())  # in the order of the examples
        dpo = self._count_pairs(model, first_rows(inputs["pairs"], max(kept, 1), rows), bool(kept))
        self.count("loss/dpo", dpo, kept)
        return loss + self.args.dpo_weight * dpo

    def _evaluation_means(self, means: dict[str, float]) -> dict[str, float]:
        loss = self.args.ntp_weight * means["loss/ntp"]
        if "loss/dpo" in means:
            loss += self.args.dpo_weight * means["loss/dpo"]
        return {**means, "loss": loss}

    def _predictions(self, model, inputs):
        return model(**inputs["ntp"], use_cache=False).logits, inputs["ntp"]["labels"]

    def _share_of_pairs(self, inputs, ranks: int):
        """Weight of this rank's DPO loss; None if no rank has a pair."""
        if "pairs" not in inputs:
            return None
        if ranks == 1:
            return 1.0
        total = self.accelerator.reduce(inputs["pair_count"])
        return ranks * inputs["pair_count"].squeeze() / total.squeeze() if total.item() else None  # type: ignore[union-attr]

    @property
    def _reference_moves(self) -> bool:
        return self.ref_model is not None and not self._offline

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and not self._offline:
            # Not Parquet, since an iteration without pairs has no columns.
            with replacing(os.path.join(output_dir, _PAIRS_FILE)) as path:
                Path(path).write_text(json.dumps({"iteration": self.iteration, "pairs": self._pairs}))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self._offline:
            return
        saved = json.loads((Path(checkpoint) / _PAIRS_FILE).read_text())
        self.iteration, self._pairs = saved["iteration"], {int(row): pairs for row, pairs in saved["pairs"].items()}

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(inputs["ntp"])


def _by_row(pairs: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    rows: dict[int, list[dict[str, Any]]] = {}
    for pair in pairs:
        rows.setdefault(pair["row"], []).append(pair)
    return rows


@contextlib.contextmanager
def _gathering_ragged(accelerator, empty: bool) -> Iterator[None]:
    """Gathers unequal numbers of pairs for TRL's metrics, where TRL's gather would hang; with `empty` this rank contributes none."""
    if accelerator.num_processes == 1:
        yield
        return

    plain_gather = accelerator.gather

    def gather(values: torch.Tensor) -> torch.Tensor:
        if values.dim() == 0:  # sums exist on every rank
            return plain_gather(values * (not empty))
        gathered = gather_object([] if empty else values.tolist())
        return torch.tensor(gathered, dtype=values.dtype, device=values.device)

    accelerator.gather = gather
    try:
        yield
    finally:
        del accelerator.gather


class _DrawAtEpoch(TrainerCallback):
    def __init__(self, trainer: OneRecDPOTrainer):
        self._trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._trainer.begin_iteration(int(state.epoch or 0) // args.epochs_per_iteration)


class _AlignmentCollator:
    """
    The next-token batch of all examples, and the preference batch of examples with a pair. In distributed training all ranks run the same
    forward passes, so a batch without a pair gets `any_pair` with weight 0.
    """

    def __init__(
        self,
        processor: OneRecProcessor,
        pairs_of: Callable[[dict[str, Any]], list[dict[str, Any]]],
        any_pair: Callable[[int], list[dict[str, Any]]] | None = None,
    ):
        self._processor, self._pairs_of, self._any_pair = processor, pairs_of, any_pair
        self._preferences = OneRecPreferenceCollator(processor)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        histories, sessions = ([example[name] for example in examples] for name in ("history", "session"))
        features = feature_columns(self._processor, examples)
        batch: dict[str, Any] = {"ntp": dict(self._processor(histories, sessions, **features))}
        found = [self._pairs_of(example) for example in examples]
        pairs, count = [pair for those in found for pair in those], sum(map(len, found))
        if not pairs and self._any_pair is not None and "row" in examples[0]:
            pairs = self._any_pair(examples[0]["row"])
        if pairs:
            batch["pair_count"] = torch.tensor([count])
            # The example of each pair; a pair of another rank has none.
            places = [place for place, those in enumerate(found) for _ in those] or [len(examples)] * len(pairs)
            batch["pair_examples"] = torch.tensor(places)
            columns = ("history", "chosen", "rejected", *features)
            batch["pairs"] = self._preferences([{name: pair[name] for name in columns} for pair in pairs])
        return batch


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
