"""Policy optimisation of sessions by rewards: GRPO and its losses, ECPO and GBPO, on TRL's trainer."""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
import zlib
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.utils import logging
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler, get_callable_name

from onerec_hf.data.collators import FEATURE_COLUMNS, OneRecDataCollator, feature_columns, positive_items
from onerec_hf.data.events import positive_histories
from onerec_hf.hub_cards.alignment import Alignment
from onerec_hf.hub_cards.training import write_trainer_card
from onerec_hf.modeling.feature_codes import check_schema
from onerec_hf.modeling.files import replacing
from onerec_hf.modeling.processing_onerec import OneRecProcessor
from onerec_hf.trainers.checkpoints import AtomicCheckpointMixin
from onerec_hf.trainers.faults import StepFaults
from onerec_hf.trainers.guards import guard, variety_reward
from onerec_hf.trainers.inputs import own_arguments, plain_rows
from onerec_hf.trainers.onerec_grpo_config import OWN_LOSSES, OneRecGRPOConfig
from onerec_hf.trainers.policy_losses import ecpo_old_logps, gbpo_old_logps
from onerec_hf.trainers.preference_checks import check_item_rows
from onerec_hf.trainers.rewards import RewardFunction, as_functions, check_reward_items, reward_values
from onerec_hf.trainers.rollouts import code_places, legal_codes, right_padded, roll_out, token_log_probs
from onerec_hf.trainers.seq2seq_dpo_trainer import check_adapter, disable_plain_dropout, load_generator
from onerec_hf.trainers.sharding import is_sharded, sharded_copy, unsharded_model

logger = logging.get_logger(__name__)

# Columns that are not passed on to reward functions.
_OWN_COLUMNS = {"prompt", "history", "session", "advantage", "legal"}


class OneRecGRPOTrainer(StepFaults, AtomicCheckpointMixin, GRPOTrainer):
    """
    `trl.GRPOTrainer` for OneRec: for each history the policy draws G sessions, rewards score them, and their probability rises or falls by
    how they compare within the group; `loss_type` names the objective, among them ECPO (OneRec technical report) and GBPO (OneRec-V2)
    ([`onerec_hf.trainers.policy_losses`]). Beside it the next-token loss on real sessions, weighted by `ntp_weight`.

    **The policy** is the decoder at `args.temperature`. With `constrained=True` it is the softmax over the legal continuations at each code:
    items of the catalogue, distinct in a session, without the history's (`exclude_seen`); sessions are drawn from it by
    [`recommend`] and their log-probabilities are those that they were drawn with. With `constrained=False` it is the softmax over the full
    vocabulary for both. BOS between items is given and no action. Item scores of an item head are no part of the policy.

    Args:
        model: a `OneRecForConditionalGeneration`, a PEFT model around one, or a path or Hub id.
        reward_funcs: as in TRL, one or several of: a function `(histories, sessions) -> list of floats` over lists of item ids, which may return None
            where it does not apply, and gets the further columns of the dataset by name if it takes `**kwargs`; a
            [`OneRecForSessionReward`]; its path or Hub id. `args.reward_weights` weighs them.
        args: [`OneRecGRPOConfig`].
        train_dataset: rows with `history` and, for the next-token loss, `session`; for a model with features also with the columns that its schema
            reads. Rows with an `advantage` (a number, not None) are samples
            of another policy: their `session` is the sample, its advantage the given one, and its old probability the current one (`pi_old = sg(pi)`). If
            all rows are, nothing is drawn and no reward is needed.
        eval_dataset: as `train_dataset`; sessions are drawn and scored.
        ntp_dataset: rows with `history` and `session` for the next-token loss; by default those of `train_dataset` without a negative `advantage`. Sessions
            with items that left the catalogue are left out, with a warning.
        processing_class: the [`OneRecProcessor`].
        judge_funcs: held-out rewards, given as `reward_funcs`, for the guards ([`~onerec_hf.trainers.guards.GuardCallback`]).
        guard_dataset: rows of held-out users, with `history` and `session`, that the guards measure.
        kwargs: as for `trl.GRPOTrainer`.

    Beside TRL's metrics it logs `loss/ntp`, `rollouts/legal` (share of drawn items that are in the catalogue), `rollouts/left_out` (share of
    sessions without a reward: illegal, None, or none left to draw) and `frac_reward_zero_std` (share without a gradient: rewards of a group that are equal, or all None).

    Raises:
        ValueError: missing columns, unknown items, no or unfitting rewards, a reward model of another catalogue, fewer histories than a generation
            batch has, or settings that do not apply.

    Example:
        >>> def prefers_new(histories, sessions):
        ...     return [sum(item.startswith("new") for item in session) for session in sessions]
        >>> trainer = OneRecGRPOTrainer(
        ...     model, prefers_new, args=OneRecGRPOConfig("out"), train_dataset=train, processing_class=processor
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "grpo", "onerec"]
    _memory_settings = {
        "training": ", or a smaller rollout_batch_size or max_history of the processor",
        "evaluation": "",
    }
    args: OneRecGRPOConfig
    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: RewardFunction | PreTrainedModel | str | list | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict | None = None,
        processing_class: OneRecProcessor | None = None,
        ntp_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config=None,
        quantization_config=None,
        judge_funcs: RewardFunction | PreTrainedModel | str | list | None = None,
        guard_dataset: Dataset | list[dict] | None = None,
        **kwargs,
    ):
        args = own_arguments(args, OneRecGRPOConfig, "onerec-grpo-output")
        if isinstance(model, str):
            model = load_generator(model, args, quantization_config)
            quantization_config = None
        if processing_class is None:
            raise ValueError("OneRecGRPOTrainer needs processing_class: pass the OneRecProcessor with the catalogue")
        check_adapter(peft_config, model)
        generator: Any = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
        if generator.config.lifelong is not None:
            raise ValueError(
                "OneRecGRPOTrainer does not read lifelong histories, which this model does. Align it with OneRecDPOTrainer, or train one without"
            )
        if processing_class.pathways is not None or getattr(generator.config.features, "pathways", None) is not None:
            raise ValueError(
                "OneRecGRPOTrainer does not read pathways, which this model does. Align it with OneRecDPOTrainer, or train one without"
            )
        generator.set_catalogue(processing_class.catalogue)
        check_schema(generator.config, processing_class.features)
        self._generator, self._pad = generator, processing_class.tokenizer.pad_token_id
        self._rollout_length = args.rollout_length or generator.config.session_length
        train_dataset = self._checked(plain_rows(train_dataset), processing_class, args, "training")
        eval_dataset = plain_rows(eval_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {n: self._checked(each, processing_class, args, n) for n, each in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._checked(eval_dataset, processing_class, args, "evaluation")
        self._num_logged = len(_logged_rows(train_dataset))
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset} if eval_dataset else {}
        self._ntp_rows = self._next_token_rows(train_dataset, plain_rows(ntp_dataset), processing_class, args)
        functions = as_functions(reward_funcs)
        for function in functions:
            check_reward_items(function, processing_class.catalogue)
        if not functions and any(len(_logged_rows(each)) < len(each) for each in (train_dataset, *evaluated.values())):
            raise ValueError("neither reward_funcs nor a column advantage in all rows are given; pass one of them")
        if args.ddp_find_unused_parameters is None:  # those of an item head are used by the next-token loss
            args.ddp_find_unused_parameters = not args.ntp_weight
        # TRL loads the reference from the Hub; here it is a copy. An adapter has its base model as reference.
        beta, own_reference = args.beta, bool(args.beta) and peft_config is None and not is_peft_model(model)
        if own_reference:
            reference = sharded_copy(model) if is_sharded(model) else copy.deepcopy(model)
            reference.requires_grad_(False).eval()
            args.beta = 0.0
        super().__init__(
            model=model,
            reward_funcs=functions or [given_advantage],
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            # TRL takes a processor for that of a vision model.
            processing_class=processing_class.tokenizer,
            callbacks=callbacks,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **kwargs,
        )
        self.processing_class = self.callback_handler.processing_class = processing_class
        if args.disable_dropout:  # TRL's covers modules alone
            disable_plain_dropout(generator)
        del generator.forward  # TRL's fused head, which scores the full vocabulary of decoder-only models
        if args.variety_weight and functions:
            self.reward_funcs.append(variety_reward)
            self.reward_weights = torch.cat([self.reward_weights, torch.tensor([args.variety_weight])])
        self.reward_func_names = _distinct_names(self.reward_funcs)
        if own_reference:
            args.beta = self.beta = beta
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        self.max_completion_length = self._rollout_length * len(processing_class.tokenizer.codebook_sizes)
        if args.loss_type in OWN_LOSSES:
            self.loss_type, self.importance_sampling_level = "grpo", "token"
            if args.loss_type == "gbpo":
                self.epsilon_low = self.epsilon_high = math.inf
        # OneRec's config always has a coefficient, which alone would make TRL add the auxiliary loss.
        if args.router_aux_loss_coef is None and not generator.config.output_router_logits:
            self.aux_loss_enabled = False
        if self._num_logged == len(train_dataset):
            self.num_generations = 1  # each sample once
        self._whole_sessions = args.loss_type in OWN_LOSSES and args.importance_sampling_level == "sequence"
        self._scored: dict[str, Any] | None = None
        self._feature_ids: torch.Tensor | None = None  # of the prompts that TRL scores
        self._ntp_part = (-1, 0)  # optimizer step, and which of its batches
        batch = args.generation_batch_size // self.num_generations
        if len(train_dataset) < batch:
            raise ValueError(
                f"{len(train_dataset)} histories are fewer than the {batch} of a generation batch: lower per_device_train_batch_size, "
                "steps_per_generation or gradient_accumulation_steps, or raise num_generations"
            )
        guard(self, guard_dataset, judge_funcs)

    # -- data --------------------------------------------------------------------------------
    def _checked(self, dataset: Any, processor: OneRecProcessor, args: OneRecGRPOConfig, name: str) -> Dataset:
        """The dataset without histories that leave too few items for a session; they are counted."""
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"OneRecGRPOTrainer needs an indexable {name} dataset; pass a datasets.Dataset"
                + ("" if dataset is None else f" (got {type(dataset).__name__})")
            )
        if "history" not in dataset.column_names:
            raise ValueError(
                f"the {name} dataset lacks the column 'history' (found: {dataset.column_names}); its rows are history and, for the "
                "next-token loss, session, lists of item ids"
            )
        check_item_rows(dataset, processor, ("history",), name)
        feature_columns(processor, list(dataset.select(range(min(1, len(dataset))))))
        _check_logged(dataset, processor, name)
        empty = [row for row, history in enumerate(dataset["history"]) if not history]
        if empty:
            raise ValueError(
                f"the {name} dataset: 'history' is empty in {len(empty)} of {len(dataset)} rows (first: row {empty[0]}); drop these rows"
            )
        if not (args.constrained and args.exclude_seen):
            return dataset
        catalogue: Any = processor.catalogue
        needed = self._rollout_length
        kept = [
            row
            for row, history in enumerate(positive_histories(dataset))
            if catalogue.num_active - len(history) >= needed
            or catalogue.num_left(catalogue.indices(history)) >= needed
        ]
        if len(kept) == len(dataset):
            return dataset
        if not kept:
            raise ValueError(
                f"the {name} dataset: every history leaves fewer than {needed} items for a session; pass exclude_seen=False"
            )
        logger.warning(
            f"the {name} dataset: {len(dataset) - len(kept)} of {len(dataset)} histories are left out, since fewer than {needed} items that "
            "they do not hold are left"
        )
        return dataset.select(kept)

    def _next_token_rows(self, dataset, ntp_dataset, processor, args: OneRecGRPOConfig) -> Dataset | None:
        if not args.ntp_weight:
            return None
        rows, name = (dataset, "training") if ntp_dataset is None else (ntp_dataset, "next-token")
        missing = [column for column in ("history", "session") if column not in rows.column_names]
        if missing:
            raise ValueError(
                f"the {name} dataset lacks {missing} for the next-token loss (found: {rows.column_names}); add it, or pass ntp_weight=0"
            )
        check_item_rows(rows, processor, ("history", "session"), name)
        if ntp_dataset is None and self._num_logged:  # bad samples of another policy are nothing to learn
            rows = rows.select([row for row, value in enumerate(rows["advantage"]) if value is None or value > 0])
        active, lengths = processor.catalogue.active, [len(session) for session in rows["session"]]
        written = active[processor.catalogue.indices([item for session in rows["session"] for item in session])]
        kept = np.array([part.all() for part in np.split(written, np.cumsum(lengths)[:-1])], dtype=bool)
        if len(rows) and not kept.all():
            logger.warning(
                f"the {name} dataset: {int((~kept).sum())} of {len(rows)} sessions are left out of the next-token loss, since they hold items that "
                "left the catalogue"
            )
            rows = rows.select(np.flatnonzero(kept))
        if not len(rows):
            raise ValueError(
                f"the {name} dataset has no row for the next-token loss; pass ntp_dataset, or ntp_weight=0"
            )
        features = [column for column in FEATURE_COLUMNS if column in rows.column_names]
        return rows.select_columns(["history", "session", *features])

    def _get_train_sampler(self, dataset: Dataset | None = None):
        sampler: Any = super()._get_train_sampler(dataset)
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return _EpochSampler(**{name: getattr(sampler, name) for name in names})

    # -- rollouts ----------------------------------------------------------------------------
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        rows = [{**row, "prompt": list(positive_items(row))} for row in inputs]
        self.rollout_func = lambda prompts, trainer: self._roll_out(rows, mode)
        with warnings.catch_warnings():  # TRL reads the deprecated name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            output = super()._generate_and_score_completions(rows)
        for name in [name for name in self._metrics[mode] if name.startswith("completions/")]:
            del self._metrics[mode][name]  # all sessions have the same length
        device = output["advantages"].device
        advantages = output["advantages"] * self._varied[self._mine(len(rows))]
        if not self.args.constrained and mode == "train":
            legal = torch.tensor([row["legal"] for row in rows], device=device)
            advantages = advantages + self.args.format_weight * (legal & self._format_samples(len(rows)).to(device))
        logged = torch.tensor([_is_logged(row) for row in rows], device=device)
        given = torch.tensor([row["advantage"] if _is_logged(row) else 0.0 for row in rows]).to(advantages)
        output["advantages"], output["off_policy"] = torch.where(logged, given, advantages), logged
        # TRL takes the spread of rewards within rounding, and none where all are missing.
        without = torch.where(logged, given == 0, ~self._varied[self._mine(len(rows))]).float()
        self._metrics[mode]["frac_reward_zero_std"][-1] = self.accelerator.gather(without).mean().item()  # type: ignore[union-attr]
        if self._feature_ids is not None:
            output["feature_ids"], self._feature_ids = self._feature_ids, None
        # Sessions that share a history stay together when TRL shuffles and splits the batch: the encoder then runs once per history.
        block = math.gcd(*_runs(output["prompt_ids"], output.get("feature_ids")))
        if mode == "train":
            block = math.gcd(block, self.args.per_device_train_batch_size)
        return {name: value if value.dim() == 0 else value.unflatten(0, (-1, block)) for name, value in output.items()}

    def _mine(self, rows: int) -> slice:
        """The place of this rank's `rows` among those of all ranks."""
        return slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)

    def _places(self, rows: int, mode: str) -> tuple[list[int], list[int], int]:
        """For each of this rank's rows the number of its group among those of all ranks, its place in the group; and the group's size."""
        count = self.num_generations if mode == "train" else self.num_generations_eval
        places = range(self._mine(rows).start, self._mine(rows).stop)
        return [place // count for place in places], [place % count for place in places], count

    def _roll_out(self, rows: list[dict[str, Any]], mode: str) -> dict[str, Any]:
        """This rank's sessions in the form of TRL's rollout functions. A history that several ranks share is drawn for by each of them."""
        processor: Any = self.processing_class
        groups, slots, count = self._places(len(rows), mode)
        to_draw = {group: row for group, row in zip(groups, rows, strict=True) if not _is_logged(row)}
        drawn = dict(zip(to_draw, self._draw(list(to_draw.items()), count, mode), strict=True))
        completions = [
            _written(processor, row["session"]) if _is_logged(row) else drawn[group][slot]
            for row, group, slot in zip(rows, groups, slots, strict=True)
        ]
        tokens = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True, padding_value=self._pad)
        blocks = tokens.unflatten(1, (-1, self._generator.config.tokens_per_item))
        codes = blocks[..., 1:] - torch.tensor(processor.tokenizer.level_offsets)
        in_catalogue, written = processor.catalogue.trie.find_leaves(codes) >= 0, blocks[..., 1] != self._pad
        legal = (in_catalogue | ~written).all(1) & written[:, 0]
        logged = torch.tensor([_is_logged(row) for row in rows])
        for place in logged.nonzero().flatten().tolist():  # the policy cannot draw some samples of another one
            legal[place] &= not self.args.constrained or self._is_possible(rows[place])
        actions = torch.ones_like(blocks)
        actions[..., 0] = 0  # BOS is given
        actions[~written | (logged & ~legal)[:, None]] = 0
        counts = torch.stack([(in_catalogue & written)[~logged].sum(), written[~logged].sum()])
        everywhere: Any = self.accelerator.gather(counts.to(self.accelerator.device))
        right, drawn_items = everywhere.view(-1, 2).sum(0).tolist()
        if drawn_items:
            self._metrics[mode]["rollouts/legal"].append(right / drawn_items)
        # The whole history: what the constraint leaves out is read from it, the encoder reads the latest items.
        longest = max(len(row["history"]) for row in rows)
        whole = processor([row["history"] for row in rows], max_history=longest, **feature_columns(processor, rows))
        prompts = zip(whole["input_ids"], whole["attention_mask"].bool(), strict=True)
        if "feature_ids" in whole:
            lengths = whole["attention_mask"].sum(1) // self._generator.config.tokens_per_item
            codes = [row[:length] for row, length in zip(whole["feature_ids"], lengths.tolist(), strict=True)]
            padded = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True, padding_side="left")
            self._feature_ids = padded.to(self.accelerator.device)
        return {
            "prompt_ids": [ids[mask].tolist() for ids, mask in prompts],
            "completion_ids": tokens.tolist(),
            "logprobs": None,
            "env_mask": actions.flatten(1).tolist(),
            "legal": legal.tolist(),
        }

    def _is_possible(self, row: dict[str, Any]) -> bool:
        """Whether the constrained policy can draw a row's session of catalogue items."""
        session, seen = row["session"], set(positive_items(row)) if self.args.exclude_seen else set()
        return len(set(session)) == len(session) and not seen & set(session)

    def _draw(self, groups: list[tuple[int, dict[str, Any]]], count: int, mode: str) -> list[torch.Tensor]:
        """For each group's number and row, `count` sessions (count, tokens) on the CPU."""
        processor: Any = self.processing_class
        found: list[torch.Tensor] = []
        with unsharded_model(self.accelerator.unwrap_model(self.model)) as sampler, sampler.packed_experts():
            for start in range(0, len(groups), self.args.rollout_batch_size):
                some = groups[start : start + self.args.rollout_batch_size]
                tokens = roll_out(
                    sampler,
                    processor,
                    [row["history"] for _, row in some],
                    count,
                    [self._random(group, row["history"], mode) for group, row in some],
                    how=self.args.rollouts,
                    temperature=self.temperature,
                    session_length=self._rollout_length,
                    exclude_seen=self.args.exclude_seen,
                    constrained=self.args.constrained,
                    features=feature_columns(processor, [row for _, row in some]),
                )
                found.extend(tokens.cpu().unflatten(0, (len(some), count)))
        return found

    @property
    def _rollout(self) -> int:
        """The number of the current rollout: the same however many batches a step has."""
        return self._step // (self.args.steps_per_generation * self.num_iterations)

    def _random(self, group: int, history: list, mode: str) -> torch.Generator:
        """Random numbers of a group: they depend neither on the batch nor on the ranks, and an evaluation draws the same each time."""
        of_group = (1 + self._rollout, group) if mode == "train" else (0, zlib.crc32(repr(history).encode()))
        seed = np.random.SeedSequence((self.args.seed, *of_group)).generate_state(1)[0]
        return torch.Generator(self.accelerator.device).manual_seed(int(seed))

    def _format_samples(self, rows: int) -> torch.Tensor:
        """(rows,) bool: which of this rank's rows are among the K of their group that get the format reward."""
        groups, slots, count = self._places(rows, "train")
        chosen = {
            group: np.random.default_rng((self.args.seed, self._rollout, group)).permutation(count)
            for group in set(groups)
        }
        picked = [slot in chosen[group][: self.args.format_samples] for group, slot in zip(groups, slots, strict=True)]
        return torch.tensor(picked)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        mode = "train" if self.model.training else "eval"
        rewards = torch.full((len(inputs), len(self.reward_funcs)), math.nan)
        scored = [place for place, row in enumerate(inputs) if row["legal"] and not _is_logged(row)]
        columns = {name: [inputs[place][name] for place in scored] for name in inputs[0] if name not in _OWN_COLUMNS}
        for index, (function, name) in enumerate(zip(self.reward_funcs, self.reward_func_names, strict=True)):
            if function is given_advantage:
                rewards[:, index] = torch.tensor([row["advantage"] if row["legal"] else math.nan for row in inputs])
            elif scored:
                sessions = [completions[place] for place in scored]
                wanted = columns if _takes_columns(function) else {}
                values = reward_values(function, name, [prompts[place] for place in scored], sessions, **wanted)
                rewards[scored, index] = torch.from_numpy(values).float()
        if self.reward_funcs[-1] is variety_reward:  # an addition to a reward: none where no other one applies
            rewards[rewards[:, :-1].isnan().all(1), -1] = math.nan
        useful = torch.tensor([_is_logged(row) and row["legal"] for row in inputs])
        left_out = (rewards.isnan().all(1) & ~useful).float().to(self.accelerator.device)
        self._metrics[mode]["rollouts/left_out"].append(self.accelerator.gather(left_out).mean().item())  # type: ignore[union-attr]
        everywhere: Any = self.accelerator.gather(rewards.to(self.accelerator.device))
        # Equal rewards give no gradient; their mean may differ from them by rounding.
        grouped = everywhere.view(-1, self._places(len(inputs), mode)[2], everywhere.shape[1])
        varied = grouped.nan_to_num(-math.inf).amax(1) > grouped.nan_to_num(math.inf).amin(1)
        self._varied = varied.any(1).repeat_interleave(grouped.shape[1])
        return everywhere

    # -- loss --------------------------------------------------------------------------------
    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **of_pictures,
    ):
        features, size = self._feature_ids, batch_size or len(input_ids)
        parts = [
            self._score(
                model,
                input_ids[start : start + size],
                attention_mask[start : start + size],
                None if features is None else features[start : start + size],
                logits_to_keep,
                compute_aux_loss,
            )
            for start in range(0, len(input_ids), size)
        ]
        logps, entropies = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        if self._scored is not None:  # TRL computes the ratio next, with these old log-probabilities
            self._scored["old_per_token_logps"] = self._old_logps(logps.detach(), self._scored)
        return logps, entropies, torch.stack([part[2] for part in parts]).mean() if compute_aux_loss else None

    def _score(self, model, input_ids, attention_mask, feature_ids, logits_to_keep: int, compute_aux_loss: bool):
        """Log-probabilities (rows, tokens), or of whole sessions (rows, 1), entropies (rows, tokens), and the routers' loss."""
        generator, processor = self._generator, self.processing_class
        config, keep = generator.config, logits_to_keep
        # The decoder's rows are all histories once, then all of them again, as the model reads several rows per history.
        block = math.gcd(*_runs(input_ids[:, :-keep], feature_ids))
        order = torch.arange(len(input_ids), device=input_ids.device).view(-1, block).T.flatten()
        sequences, whole = input_ids[order, -keep:], input_ids[:, :-keep]
        width, read = config.tokens_per_item, (processor.max_history, processor.static_places)  # type: ignore[union-attr]
        there = attention_mask[::block, :-keep:width]
        history, mask = right_padded(whole[::block].unflatten(1, (-1, width)), there, *read)
        places = code_places(keep - 1, width, input_ids.device)
        beside = {"output_router_logits": True} if compute_aux_loss else {}
        if feature_ids is not None:
            beside["feature_ids"] = right_padded(feature_ids[::block], there, *read)[0]
        with self.accelerator.autocast():
            out = model(
                input_ids=sequences[:, :-1],
                attention_mask=(sequences[:, :-1] != self._pad).long(),
                encoder_input_ids=history.flatten(1),
                encoder_attention_mask=mask.repeat_interleave(width, 1),
                logits_to_keep=places,
                use_cache=False,
                **beside,
            )
        legal = None
        if self.args.constrained:
            codes = None if feature_ids is None else feature_ids[order]
            seen = generator.history_indices(whole[order], codes) if self.args.exclude_seen else None
            legal = legal_codes(generator, seen)
        scores = token_log_probs(out.logits, sequences, places, self.temperature, legal)
        logps, entropies = (
            torch.nn.functional.pad(part.masked_fill(sequences[:, 1:] == self._pad, 0.0), (1, 0))[order.argsort()]
            for part in scores
        )
        if self._whole_sessions:
            logps = logps.sum(1, keepdim=True)
        entropies = entropies if self._entropy_bonus_enabled else entropies.detach()
        return logps, entropies, out.aux_loss if compute_aux_loss else None

    def _old_logps(self, logps: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The log-probabilities in the denominator of the ratio."""
        advantages = inputs["advantages"].unsqueeze(1)
        old = inputs.get("old_per_token_logps")
        old = logps if old is None else torch.where(inputs["off_policy"].unsqueeze(1), logps, old)
        if self.args.loss_type == "ecpo":
            return ecpo_old_logps(logps, old, advantages, self.epsilon_high, self.args.ecpo_delta)
        return gbpo_old_logps(logps, old, advantages) if self.args.loss_type == "gbpo" else old

    def _compute_loss(self, model, inputs):
        inputs = {name: value if value.dim() == 0 else value.flatten(0, 1) for name, value in inputs.items()}
        self._scored, self._feature_ids = inputs, inputs.get("feature_ids")
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._scored = self._feature_ids = None
        if self._ntp_rows is None or not self.model.training:
            return loss
        return loss + self.args.ntp_weight * self._next_token_loss(model) / self.current_gradient_accumulation_steps

    def _next_token_loss(self, model) -> torch.Tensor:
        """
        Of this rank's part of the optimizer step's random real sessions. Batches with more tokens have more weight: the gradient is that of one process and one
        batch.
        """
        rows, accelerator, size = self._ntp_rows, self.accelerator, self.args.ntp_batch_size
        assert rows is not None
        step, parts = self.state.global_step, self.current_gradient_accumulation_steps
        part = (self._ntp_part[1] + 1) % parts if self._ntp_part[0] == step else 0
        self._ntp_part = (step, part)
        ranks = accelerator.num_processes
        drawn = np.random.default_rng((self.args.seed, step)).integers(len(rows), size=size * ranks * parts)
        begin = (part * ranks + accelerator.process_index) * size
        collate = OneRecDataCollator(self.processing_class)  # type: ignore[arg-type]
        batch = collate([rows[place] for place in drawn[begin : begin + size].tolist()])
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.autocast():
            ntp = model(**batch, use_cache=False).loss
        items = sum(map(len, rows.select(drawn.tolist())["session"]))
        levels = self._generator.config.tokens_per_item - 1
        share = ranks * parts * (batch["labels"] != -100).sum() / (items * levels)
        self._metrics["train"]["loss/ntp"].append(accelerator.gather(share * ntp.detach()).mean().item())
        return share * ntp

    # -- checkpoints and cards ---------------------------------------------------------------
    def _rollouts_file(self, folder) -> str:
        return os.path.join(folder, f"rollouts-{self.args.process_index}.safetensors")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        kept = {"step": torch.tensor(self._step)}
        if self._buffered_inputs is not None and self._step % (self.args.steps_per_generation * self.num_iterations):
            for index, batch in enumerate(self._buffered_inputs):
                kept |= {f"{index}/{name}": value.clone() for name, value in batch.items()}
        os.makedirs(output_dir, exist_ok=True)
        with replacing(self._rollouts_file(output_dir)) as path:
            save_file(kept, path)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._rollouts_file(checkpoint)
        if not os.path.isfile(path):
            raise ValueError(
                f"{checkpoint} holds no {os.path.basename(path)}: it was saved with save_only_model, by fewer ranks or by another trainer; resume "
                "from a complete checkpoint, or load its model and begin anew"
            )
        kept = load_file(path, device=str(self.accelerator.device))
        self._step, batches = int(kept.pop("step")), {}
        for name, value in kept.items():
            index, _, name = name.partition("/")
            batches.setdefault(int(index), {})[name] = value
        self._buffered_inputs = [batches[index] for index in sorted(batches)] or None

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **metadata,
    ) -> None:
        """
        Writes the model's card to `args.output_dir`; see [`~onerec_hf.hub_cards.write_trainer_card`]. `dataset_name` is a Hub dataset id.
        """
        write_trainer_card(
            self, model_name, tags, alignment=Alignment.of_policy(self), datasets=dataset_name, **metadata
        )


class _EpochSampler(RepeatSampler):
    """TRL's sampler with an order per epoch: a run that resumes in a later epoch reads the rows that an uninterrupted one does."""

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + epoch)


def given_advantage(histories: list[list], sessions: list[list]) -> list[float]:
    """The reward of a training on samples with given advantages."""
    raise NotImplementedError("the advantages are given")


def _is_logged(row: dict[str, Any]) -> bool:
    """Whether a row's session is a sample of another policy."""
    return row.get("advantage") is not None


def _logged_rows(dataset: Dataset) -> list[int]:
    """The rows that have an advantage."""
    given = dataset["advantage"] if "advantage" in dataset.column_names else []
    return [row for row, value in enumerate(given) if value is not None]


def _check_logged(dataset: Dataset, processor: OneRecProcessor, name: str) -> None:
    """
    Raises:
        ValueError: advantages that are not finite, or samples that are no sessions of the catalogue's items.
    """
    logged = dataset.select(_logged_rows(dataset))
    if not len(logged):
        return
    wrong = sum(not (isinstance(value, int | float) and math.isfinite(value)) for value in logged["advantage"])
    if wrong:
        raise ValueError(
            f"the {name} dataset: {wrong} of {len(logged)} values of 'advantage' are no finite numbers; leave these rows out, or None where sessions are "
            "to be drawn"
        )
    if "session" not in logged.column_names:
        raise ValueError(f"the {name} dataset has advantages but no column 'session', the samples that they are of")
    check_item_rows(logged, processor, ("session",), name)


def _written(processor: Any, session: list) -> torch.Tensor:
    """(tokens,) `BOS a b c BOS a b c` of a session of item ids."""
    encoded = processor.sessions([session])
    return torch.cat([encoded["decoder_input_ids"][0], encoded["labels"][0, -1:]])


def _runs(prompts: torch.Tensor, feature_ids: torch.Tensor | None) -> list[int]:
    """Lengths of runs of rows with equal histories."""
    rows = prompts if feature_ids is None else torch.cat([prompts, feature_ids.flatten(1)], 1)
    return torch.unique_consecutive(rows, dim=0, return_counts=True)[1].tolist()


def _takes_columns(function: RewardFunction) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


def _distinct_names(functions: list) -> list[str]:
    """Names of reward functions for metrics: a model's folder, a function's name, numbered where they repeat."""
    names: list[str] = []
    for function in functions:
        model = getattr(function, "__self__", None)
        path = model.config._name_or_path if isinstance(model, PreTrainedModel) else ""
        name = os.path.basename(os.path.normpath(path)) if path else get_callable_name(function)
        names.append(f"{name}_{len(names)}" if name in names else name)
    return names
