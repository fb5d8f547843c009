"""The trainer of the sequence models SASRec, HSTU, GRU4Rec and ACVAE: every next item is a target, held-out users select the checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModel, EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction, IntervalStrategy

from onerec_hf.baselines.configuration_sequential import SequentialConfig
from onerec_hf.baselines.evidence import add_evidence
from onerec_hf.baselines.item_index import ItemIndex
from onerec_hf.baselines.modeling_sequential import SequentialRecommender
from onerec_hf.baselines.next_items import IGNORED, NextItemCollator, NextItemDataset, pad_left
from onerec_hf.baselines.read_histories import ReadHistories, of_places
from onerec_hf.data.sequences import UserSequences
from onerec_hf.data.windows import REQUEST_TIME
from onerec_hf.hub_cards.training import write_trainer_card
from onerec_hf.trainers.checkpoints import AtomicCheckpointMixin
from onerec_hf.trainers.faults import StepFaults
from onerec_hf.trainers.inputs import first_model, own_arguments, plain_rows
from onerec_hf.trainers.ranking_evaluation import RankingEvaluation
from onerec_hf.trainers.sequential_config import SequentialTrainingArguments
from onerec_hf.trainers.weight_average import AveragedWeights

if TYPE_CHECKING:
    from onerec_hf.data.feature_tables import DatasetFeatures
    from onerec_hf.modeling.features import FeatureSchema


class SequentialTrainer(StepFaults, AtomicCheckpointMixin, AveragedWeights, RankingEvaluation, Trainer):
    """
    Trains a [`~onerec_hf.baselines.SequentialRecommender`]. Every item of a training sequence but the first is a target once; sequences longer than
    `config.max_history` are cut into pieces. Evaluation ranks the full catalogue: Recall@k, NDCG@k, MRR@k and coverage@k.

    With `eval_dataset`, the checkpoint with the best `args.metric_for_best_model` is kept, and training stops when the metric has not risen for
    `args.early_stopping_patience` evaluations (transformers' `EarlyStoppingCallback`). Without it, the last weights are kept.

    Args:
        model: a `SequentialRecommender` with its item ids, or a path or Hub id of one.
        args: [`SequentialTrainingArguments`].
        train_dataset: sequences of item ids in time order, one per user ([`~onerec_hf.data.UserSequences`], which may have features, or lists).
        eval_dataset: examples with the columns `history` and `session` (item ids), as [`~onerec_hf.data.leave_one_out`] makes them.

    Raises:
        ValueError: a model without item ids, no sequence of two items, or items that are not in the model's catalogue.

    Example:
        >>> split = leave_one_out(sequences)  # doctest: +SKIP
        >>> model = SequentialRecommender.from_items(item_ids, architecture="sasrec", hidden_size=128)  # doctest: +SKIP
        >>> trainer = SequentialTrainer(
        ...     model, SequentialTrainingArguments("out"), split.train_sequences, split.validation
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.evaluate(split.test, metric_key_prefix="test")["test_ndcg@10"]  # doctest: +SKIP
    """

    _memory_settings = {"training": ", or a smaller max_history of the model, or target_share", "evaluation": ""}

    def __init__(
        self,
        model: SequentialRecommender | str | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Iterable[Sequence] | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks=None,
        model_init=None,
        **kwargs,
    ):
        args = own_arguments(args, SequentialTrainingArguments, "sequential-output")
        eval_dataset = plain_rows(eval_dataset)
        recommender: Any = AutoModel.from_pretrained(model) if isinstance(model, str) else model
        recommender = first_model(self, recommender, model_init, args)
        if recommender.items is None:
            raise ValueError("the model has no item ids: make it with SequentialRecommender.from_items(item_ids)")
        recommender.check_schema()
        if eval_dataset is None:  # no checkpoint selection
            args = copy.copy(args)
            args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        elif args.load_best_model_at_end and args.early_stopping_patience is not None:
            callbacks = [EarlyStoppingCallback(args.early_stopping_patience), *(callbacks or ())]
        for name, dataset in (
            eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        ).items():
            _check_known(name, dataset, recommender.items)
        config = recommender.config
        super().__init__(
            model=recommender,
            args=args,
            data_collator=NextItemCollator(with_seen=config.loss == "bce"),
            train_dataset=None
            if train_dataset is None
            else _indexed(train_dataset, recommender.items, config.max_history, recommender.schema),
            eval_dataset=eval_dataset,
            compute_metrics=self.compute_ranking_metrics,
            callbacks=callbacks,
            **kwargs,
        )
        self._eval_collator = _EvaluationCollator(
            recommender.items, config.max_history, args.eval_exclude_seen, recommender.schema
        )
        self.model_init = model_init
        self.label_smoother = None  # the model smooths, over the scores of all items

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                *("history", "session", "inputs", "targets", "sequence", "codes"),
                *("history_features", "history_positive", "user_features", REQUEST_TIME),
            ]

    def _ranked_items(self):
        recommender: Any = self.accelerator.unwrap_model(self.model)
        return recommender.items, None

    @contextmanager
    def _collating_for_evaluation(self):
        training_collator, self.data_collator = self.data_collator, self._eval_collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    def get_eval_dataloader(self, eval_dataset=None):
        with self._collating_for_evaluation():
            return super().get_eval_dataloader(plain_rows(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        with self._collating_for_evaluation():
            return super().get_test_dataloader(plain_rows(test_dataset))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.label_smoothing_factor:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        if self.args.target_share < 1:
            labels = inputs["labels"]
            dropped = torch.rand(labels.shape, device=labels.device) >= self.args.target_share
            if (drawn := labels.masked_fill(dropped, IGNORED)).gt(0).any():
                inputs = {**inputs, "labels": drawn}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """No loss; ranked item indices (users, largest k) and target indices (users, items), -1 where there is none."""
        inputs = self._prepare_inputs(inputs)
        recommender: Any = self.accelerator.unwrap_model(self.model)
        labels = inputs.pop("labels", None)
        ranked, _ = recommender.top_items(k=max(self.args.eval_top_k), **inputs)
        return None, ranked, labels

    def compute_ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Recall, NDCG, MRR and coverage at each `args.eval_top_k`, from ranked and target indices; with `unranked_users` where there are any."""
        items: Any = self.accelerator.unwrap_model(self.model)
        return self._ranking_metrics(prediction, items.config.num_items)

    def create_model_card(
        self, model_name: str | None = None, tags: str | list[str] | None = None, **metadata
    ) -> None:
        """Writes the model's card into `args.output_dir`; see [`~onerec_hf.hub_cards.write_trainer_card`]."""
        write_trainer_card(self, model_name, tags, **metadata)


class _EvaluationCollator:
    """Examples of histories and sessions to input ids, ids to leave out, and target indices."""

    def __init__(self, items: ItemIndex, max_history: int, exclude_seen: bool, schema: FeatureSchema | None):
        self.items, self.max_history = items, max_history
        self.exclude_seen, self.schema = exclude_seen, schema

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {name: [example[name] for example in examples] for name in examples[0]}
        read = ReadHistories.of_examples(columns, self.items, self.schema)
        batch = read.inputs(self.max_history)
        if "session" in examples[0]:  # predict() needs none
            batch["labels"] = pad_left([self.items.indices(example["session"]) for example in examples]) - 1
        if self.exclude_seen:
            batch["exclude_ids"] = pad_left(read.seen)
        return batch


def _indexed(
    sequences: Iterable[Sequence], items: ItemIndex, max_history: int, schema: FeatureSchema | None
) -> NextItemDataset:
    if isinstance(sequences, UserSequences) and sequences.events is not None:
        if schema is not None and sequences.events.schema not in (None, schema):
            raise ValueError(
                "train_dataset has codes of another schema than the model; make both from one dataset, or load it with the model's schema"
            )
        read = sequences.histories
        cuts = read.offsets[1:-1]
        rows = np.split(_rows("train_dataset", read.item_ids, items), cuts)
        positive = None if read.positive is None else np.split(read.positive, cuts)
        nothing = np.zeros((len(read.item_ids), 0), np.int32)
        of_places_only = read.codes is None and read.users is None
        codes = None
        if schema is not None and not of_places_only:
            of_history = np.split(nothing if read.codes is None else read.codes, cuts)
            users = np.zeros((len(rows), 0), np.int32) if read.users is None else read.users
            codes = [of_places(user, some) for user, some in zip(users, of_history, strict=True)]
        return NextItemDataset(rows, max_history, codes, positive)
    arrays = [np.asarray(sequence) for sequence in sequences]
    lengths = [len(array) for array in arrays]
    flat = np.concatenate(arrays) if sum(lengths) else np.empty(0, dtype=np.int64)
    rows = _rows("train_dataset", flat, items)
    return NextItemDataset(np.split(rows, np.cumsum(lengths)[:-1]), max_history)


def _check_known(name: str, dataset: Dataset | None, items: ItemIndex) -> None:
    if not isinstance(dataset, Dataset):
        return
    missing = {"history", "session"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name} has no column {sorted(missing)[0]!r} (found: {', '.join(dataset.column_names)}). Make it with onerec_hf.data.leave_one_out"
        )
    table = dataset.with_format("arrow")[:]
    for column in ("history", "session"):
        values = table[column].combine_chunks() if hasattr(table[column], "combine_chunks") else table[column]
        _rows(f"{name}, column {column!r}", values.flatten().to_numpy(zero_copy_only=False), items)
        if (
            column == "history"
            and (empty := np.flatnonzero(values.value_lengths().to_numpy(zero_copy_only=False) == 0)).size
        ):
            raise ValueError(
                f"{name}: {len(empty)} histories are empty (first: row {empty[0]}). Leave these users out"
            )


def _rows(name: str, item_ids: np.ndarray, items: ItemIndex) -> np.ndarray:
    try:
        return items.indices(item_ids)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: {error.args[0]}") from None


def fit_sequential(
    train_sequences: Iterable[Sequence],
    validation: Dataset | None = None,
    *,
    item_ids: Iterable | None = None,
    features: np.ndarray | None = None,
    coded: DatasetFeatures | None = None,
    evidence: bool = False,
    output_dir: str | None = None,
    callbacks: Sequence = (),
    **settings,
) -> SequentialRecommender:
    """
    Trains a sequence model in one call.

    Args:
        train_sequences: sequences of item ids in time order, one per user.
        validation: examples that select the checkpoint; see [`SequentialTrainer`]. Without it, the last weights are kept.
        item_ids: the catalogue; the items of the sequences and of `validation` when not given.
        features: (N, d) one row per item of `item_ids`.
        coded: features whose codes are in `train_sequences` and `validation` ([`~onerec_hf.data.DatasetFeatures`]); items in the order of `item_ids`.
        evidence: add evidence about pairs of items after the training ([`~onerec_hf.baselines.add_evidence`]): counts of `train_sequences`,
            cosines of `features`, weights fitted on `validation`.
        output_dir: where checkpoints, the model and its card are written; nothing is kept on disk when not given.
        callbacks: more callbacks of the trainer.
        settings: of [`~onerec_hf.baselines.SequentialConfig`] and [`SequentialTrainingArguments`]: `architecture`, `hidden_size`,
            `learning_rate`, `seed`, ...

    Raises:
        ValueError: features without `item_ids`, and what [`SequentialTrainer`] raises.
        TypeError: a setting that neither of them has.

    Example:
        >>> model = fit_sequential([[1, 2, 3], [2, 3, 4]], architecture="gru4rec", hidden_size=8, num_train_epochs=1, use_cpu=True)
        >>> len(model.recommend([[1, 2]], top_k=2)[0])
        2
    """
    sequences = [np.asarray(sequence) for sequence in train_sequences]
    if item_ids is None:
        if features is not None or coded is not None:
            raise ValueError("features needs item_ids: the item of each row")
        held_out = [] if validation is None else [*validation["history"], *validation["session"]]
        item_ids = np.unique(np.concatenate([*sequences, *map(np.asarray, held_out)])).tolist()
    names = {field.name for field in dataclasses.fields(SequentialConfig)} - {
        "evidence",
        "recent",
        "content_dim",
        "features",
    }
    names |= {"feature_dim", "feature_dropout"}
    config = {name: settings.pop(name) for name in list(settings) if name in names}
    with tempfile.TemporaryDirectory() as scratch:
        args = SequentialTrainingArguments(
            **{
                "output_dir": output_dir or scratch,
                "report_to": "none",
                "disable_tqdm": output_dir is None,
                "save_strategy": "epoch" if output_dir else "best",
                "save_only_model": output_dir is None,
                **settings,
            }
        )
        torch.manual_seed(args.seed)
        model = SequentialRecommender.from_items(item_ids, features, coded, **config)
        read = train_sequences if isinstance(train_sequences, UserSequences) else sequences
        trainer = SequentialTrainer(model, args, read, validation, callbacks=list(callbacks))
        if not output_dir:
            trainer.remove_callback(PrinterCallback)
        trainer.train()
        if evidence:
            add_evidence(model, read, validation, features, exclude_seen=args.eval_exclude_seen)
        if output_dir:
            model.save_pretrained(output_dir)
            trainer.create_model_card()
    return model.eval()
