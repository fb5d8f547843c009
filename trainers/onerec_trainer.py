"""The generator's trainer: session-wise next-token prediction, judged by beam search over the whole catalogue."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, Seq2SeqTrainer, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction, get_last_checkpoint

from onerec_hf.data.collators import OneRecDataCollator
from onerec_hf.evaluation.metrics import illegal_share, ranking_metrics
from onerec_hf.trainers.callbacks import InterruptCallback, RouterBalanceCallback
from onerec_hf.trainers.onerec_config import OneRecTrainingArguments

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor


class OneRecTrainer(Seq2SeqTrainer):
    """
    Trains a OneRec generator on examples `{"history": [item ids], "session": [item ids]}` with the session-wise next-token loss (paper,
    equation 4) and, with `args.predict_with_generate`, evaluates by ranking the full catalogue: Recall@k, NDCG@k, MRR@k, coverage@k
    against the items of `session`, and the share of illegal ids (which constrained beam search holds at 0).

    Experts are balanced without an extra loss (`RouterBalanceCallback`) and their imbalance is logged as `router/max_violation`. Checkpoints hold
    the whole artefact (weights, processor, catalogue). Ctrl-C finishes the step, saves a checkpoint and raises `KeyboardInterrupt` with
    the way to resume.

    Args:
        model: a `OneRecForConditionalGeneration`, a PEFT model around one, or a path or Hub id.
        args: [`OneRecTrainingArguments`].
        processing_class: the [`OneRecProcessor`]; its catalogue becomes the model's, its `max_history` says how much the encoder reads.
        train_dataset, eval_dataset: datasets with the columns `history` and `session`; other columns are ignored.

    Example:
        >>> trainer = OneRecTrainer(
        ...     model, OneRecTrainingArguments("out"), train_dataset=split.train, eval_dataset=split.validation, processing_class=processor
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.evaluate(split.test, metric_key_prefix="test")["test_recall@10"]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: OneRecTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: OneRecProcessor | None = None,
        data_collator=None,
        compute_metrics=None,
        callbacks=None,
        **kwargs,
    ):
        args = args if args is not None else OneRecTrainingArguments("onerec-output")
        if isinstance(model, str):
            model = AutoModelForSeq2SeqLM.from_pretrained(model)
        if processing_class is None:
            raise ValueError("OneRecTrainer needs processing_class: the OneRecProcessor that holds the catalogue")
        generator = model.get_base_model() if hasattr(model, "get_base_model") else model
        generator.set_catalogue(processing_class.catalogue)
        self.eval_data_collator = data_collator or OneRecDataCollator(
            processing_class, with_seen=args.eval_exclude_seen
        )
        self._router_balance, self._interrupt = RouterBalanceCallback(), InterruptCallback()
        if args.predict_with_generate and compute_metrics is None:
            compute_metrics = self.compute_ranking_metrics
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or OneRecDataCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[self._router_balance, self._interrupt, *(callbacks or [])],
            **kwargs,
        )

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["history", "session"]

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(dataset, Dataset):
            return self._by_length(dataset, self.args.train_batch_size * self.args.gradient_accumulation_steps)
        return super()._get_train_sampler(dataset)

    def _get_eval_sampler(self, eval_dataset):
        if self.args.train_sampling_strategy == "group_by_length" and isinstance(eval_dataset, Dataset):
            return self._by_length(eval_dataset, self.args.eval_batch_size)
        return super()._get_eval_sampler(eval_dataset)

    def _by_length(self, dataset: Dataset, batch_size: int) -> LengthGroupedSampler:
        """By how many items of a history the encoder reads; Trainer itself would look for a text's token count."""
        lengths = pc.list_value_length(dataset.with_format("arrow")[:]["history"])
        read = pc.min_element_wise(lengths, self.processing_class.max_history)  # type: ignore[attr-defined]
        return LengthGroupedSampler(batch_size, lengths=read.to_pylist())

    @contextmanager
    def _collating_for_evaluation(self):
        training_collator, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    def get_eval_dataloader(self, eval_dataset=None):
        with self._collating_for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._collating_for_evaluation():
            return super().get_test_dataloader(test_dataset)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._interrupt.restore()
        if self._interrupt.interrupted:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            raise KeyboardInterrupt(
                f"training stopped at step {self.state.global_step}; resume it with resume_from_checkpoint={checkpoint!r}"
            )
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update(self._router_balance.pop_logs())
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs,
    ):
        """Loss, ranked catalogue rows (users, largest k) and target rows (users, items); -1 where a beam or target holds no item."""
        inputs = self._prepare_inputs(dict(inputs))
        exclude = inputs.pop("exclude", None)
        loss, _, _ = Trainer.prediction_step(self, model, inputs, prediction_loss_only=True)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        top = max(self.args.eval_top_k)
        generator = self.accelerator.unwrap_model(model)
        sequences = generator.recommend(
            inputs["input_ids"],
            inputs["attention_mask"],
            session_length=1,
            num_beams=self.args.eval_num_beams,
            num_return_sequences=top,
            exclude=exclude,
        )
        ranked = self.processing_class.item_rows(sequences).view(len(inputs["input_ids"]), top)
        return loss, ranked, self.processing_class.item_rows(inputs["labels"])

    def compute_ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Recall, NDCG, MRR and coverage at each `args.eval_top_k`, and `illegal_share`, from ranked and target rows."""
        ranked = np.asarray(prediction.predictions)
        relevant = np.maximum(np.asarray(prediction.label_ids), -1)  # -100 pads ranks of unequal width
        metrics = ranking_metrics(
            ranked, relevant, ks=tuple(self.args.eval_top_k), num_items=len(self.processing_class.catalogue)
        )
        return {**metrics, "illegal_share": illegal_share(ranked)}
