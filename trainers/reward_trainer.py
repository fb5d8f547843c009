"""Trainer of the reward model: masked cross-entropy per objective and pairs within users, evaluated by AUC, calibration and log loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from onerec_hf.data.feedback.collator import RewardDataCollator
from onerec_hf.evaluation.reward_metrics import reward_metrics
from onerec_hf.hub_cards.training import write_trainer_card
from onerec_hf.modeling.modeling_onerec_reward import MISSING_LABEL, OneRecForSessionReward, within_user_loss
from onerec_hf.trainers.checkpoints import AtomicCheckpointMixin
from onerec_hf.trainers.faults import StepFaults
from onerec_hf.trainers.inputs import first_model, own_arguments, plain_rows
from onerec_hf.trainers.reward_config import RewardTrainingArguments
from onerec_hf.trainers.whole_evaluation import WholeEvaluation


class RewardTrainer(StepFaults, AtomicCheckpointMixin, WholeEvaluation, Trainer):
    """
    Trains a [`~onerec_hf.OneRecForSessionReward`] on examples `{"history": [item ids], "session": [item ids], "labels": [rate or None]}`
    (arXiv 2502.18965, section 3.3, equation 7; created by [`~onerec_hf.data.feedback_windows`]). Evaluation reports the metrics of
    [`~onerec_hf.evaluation.reward_metrics.reward_metrics`] per objective, relative to `config.base_rates`.

    With the column `user_id` and `args.pair_weight`, the loss also compares the sessions of each user, and evaluation reports
    `within_user_accuracy`, the share of a user's pairs of sessions that are ordered correctly.

    Rare objectives are not reweighted, so predictions are rates, and the towers are initialised to the base rates. Checkpoints contain the
    weights and the items.

    Args:
        model: a `OneRecForSessionReward` with its items, or its path or Hub id.
        args: [`RewardTrainingArguments`].
        train_dataset, eval_dataset: datasets with the columns `history`, `session`, `labels` and optionally `user_id`; others are ignored.

    Raises:
        ValueError: a model without items, or a dataset without one label per objective.

    Example:
        >>> trainer = RewardTrainer(model, RewardTrainingArguments("out"), feedback.train, feedback.validation)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.evaluate(feedback.test, metric_key_prefix="test")["test_vtr/auc"]  # doctest: +SKIP
        >>> trainer.predict(sessions).predictions  # logits (sessions, objectives); no labels are needed  # doctest: +SKIP
    """

    _memory_settings = {"training": ", or a smaller max_history of the model", "evaluation": ""}

    def __init__(
        self,
        model: OneRecForSessionReward | str | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        data_collator=None,
        compute_metrics=None,
        model_init=None,
        **kwargs,
    ):
        args = own_arguments(args, RewardTrainingArguments, "onerec-reward-output")
        train_dataset, eval_dataset = plain_rows(train_dataset), plain_rows(eval_dataset)
        if isinstance(model, str):
            model = AutoModelForSequenceClassification.from_pretrained(model)
        reward_model: OneRecForSessionReward = first_model(self, model, model_init, args)
        if reward_model.items is None:
            raise ValueError(
                "RewardTrainer needs a model with items; call model.set_items(RewardItems(ids), features)"
            )
        for dataset in (
            train_dataset,
            *(eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)),
        ):
            _check_labels(dataset, reward_model.config.objectives)
        if args.pair_weight and isinstance(train_dataset, Dataset) and _users_of(train_dataset) is None:
            raise ValueError(
                f"pair_weight={args.pair_weight} compares the sessions of a user, but the training dataset has no column 'user_id' (found: "
                f"{train_dataset.column_names}); add it, or pass pair_weight=0"
            )
        super().__init__(
            model=reward_model,
            args=args,
            data_collator=data_collator or RewardDataCollator(reward_model.items, reward_model.config.max_history),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics or self.compute_reward_metrics,
            **kwargs,
        )
        self.model_init = model_init
        self._evaluated_users: list | None = None  # of the dataset whose loader was made last

    def _get_train_sampler(self, train_dataset=None):
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        users = _users_of(dataset)
        if users is None or not self.args.pair_weight or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(dataset)
        return _ByUser(users, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def _get_eval_sampler(self, eval_dataset):
        # In order, also with train_sampling_strategy="group_by_length": the users of predictions are told by their places.
        return None if eval_dataset is None else SequentialSampler(eval_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        users = inputs.pop("users", None)
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and users is not None and self.args.pair_weight:
            pairs = within_user_loss(outputs.logits, labels, users)
            if outputs.p_score_logits is not None:
                p_labels = self.accelerator.unwrap_model(model).p_score.labels(labels)
                pairs = pairs + within_user_loss(outputs.p_score_logits.unsqueeze(-1), p_labels, users)
            loss = loss + self.args.pair_weight * pairs
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):  # the name of one that was checked
            dataset = self.eval_dataset[dataset]  # type: ignore[index]
        else:
            eval_dataset = plain_rows(eval_dataset)
            _check_labels(eval_dataset, self._objectives)
        self._evaluated_users = _users_of(dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        test_dataset = plain_rows(test_dataset)
        _check_labels(test_dataset, self._objectives, required=False)
        self._evaluated_users = _users_of(test_dataset)
        return super().get_test_dataloader(test_dataset)

    @property
    def _objectives(self) -> list[str]:
        return self.accelerator.unwrap_model(self.model).config.objectives

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["history", "session", "labels", "user_id"]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if "labels" not in inputs:  # predict() needs none
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        labels = inputs["labels"].clone()
        rows, real = len(labels), self.real_rows(len(labels))
        labels[real:] = MISSING_LABEL  # repeated rows have no part in the loss
        loss, logits, labels = super().prediction_step(
            model, {**inputs, "labels": labels}, prediction_loss_only, ignore_keys
        )
        self.count("loss", loss * rows / max(real, 1), real)
        return loss, logits, labels

    def create_model_card(
        self, model_name: str | None = None, tags: str | list[str] | None = None, **metadata
    ) -> None:
        """
        Writes the reward model's card to `args.output_dir`; see [`~onerec_hf.hub_cards.write_trainer_card`].
        """
        write_trainer_card(self, model_name, tags, **metadata)

    def compute_reward_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The metrics of [`~onerec_hf.evaluation.reward_metrics.reward_metrics`], from logits and labels (-100 where missing)."""
        config = self.accelerator.unwrap_model(self.model).config
        probabilities = torch.from_numpy(np.asarray(prediction.predictions)).double().sigmoid().numpy()
        return reward_metrics(
            np.asarray(prediction.label_ids),
            probabilities,
            config.objectives,
            config.base_rates,
            self.args.calibration_bins,
            self._evaluated_users,
        )


class _ByUser(Sampler[int]):
    """Rows in the order of shuffled users, so that a batch holds whole users but for its ends. Order by seed and epoch only, equal on all ranks."""

    def __init__(self, users: Sequence, seed: int):
        owners = np.unique(np.asarray(users), return_inverse=True)[1]
        self._rows = np.split(np.argsort(owners, kind="stable"), np.cumsum(np.bincount(owners))[:-1])
        self._length, self._seed, self._epoch = len(owners), seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(len(self._rows))
        return iter(np.concatenate([self._rows[user] for user in order]).tolist())


def _users_of(dataset: Any) -> list | None:
    """The column `user_id`, where the dataset has one."""
    return dataset["user_id"][:] if isinstance(dataset, Dataset) and "user_id" in dataset.column_names else None


def _check_labels(dataset, objectives: list[str], required: bool = True) -> None:
    """
    Raises:
        ValueError: missing columns, or labels of other objectives; sessions without labels are fine where they are not `required`.
    """
    if not isinstance(dataset, Dataset):
        return
    missing = {"history", "session", "labels"} - set(dataset.column_names)
    if not required and "labels" in missing:
        if missing == {"labels"}:
            return
        missing.remove("labels")
    if missing:
        hint = "; for sessions without labels call predict()" if missing == {"labels"} else ""
        raise ValueError(
            f"the dataset has no column {sorted(missing)[0]!r} (found: {dataset.column_names}); create it with onerec_hf.data.feedback_windows{hint}"
        )
    if len(dataset) and len(dataset[0]["labels"]) != len(objectives):
        raise ValueError(
            f"column 'labels': {len(dataset[0]['labels'])} labels per row, but the model has the objectives {objectives}; use the same objectives for "
            "both"
        )
