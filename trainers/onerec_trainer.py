"""The generator's trainer: session-wise next-token prediction, judged by beam search over the whole catalogue."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction, has_length

from onerec_hf.data.collators import OneRecDataCollator, PackedDataCollator
from onerec_hf.data.packing import PackedDataset, example_sizes
from onerec_hf.data.shards.stream import BatchStream, ExampleStream
from onerec_hf.evaluation.metrics import invalid_id_rate, ranking_metrics
from onerec_hf.hub_cards.training import write_trainer_card
from onerec_hf.trainers.callbacks import InterruptCallback, RouterBalanceCallback
from onerec_hf.trainers.checkpoints import AtomicCheckpointMixin, newest_checkpoint
from onerec_hf.trainers.faults import StepFaults
from onerec_hf.trainers.onerec_config import OneRecTrainingArguments
from onerec_hf.trainers.sharding import unsharded_model

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor


class OneRecTrainer(StepFaults, AtomicCheckpointMixin, Seq2SeqTrainer):
    """
    Trains a OneRec generator on examples `{"history": [item ids], "session": [item ids]}` with the session-wise next-token loss (paper,
    equation 4) and, with `args.predict_with_generate`, evaluates by ranking the full catalogue: Recall@k, NDCG@k, MRR@k, coverage@k
    against the items of `session`, and the share of illegal ids (which constrained beam search holds at 0).

    Experts are balanced without an extra loss (`RouterBalanceCallback`) and their imbalance is logged as `router/max_violation`. Checkpoints hold
    the whole artefact (weights, processor, catalogue). Ctrl-C finishes the step, saves a checkpoint and raises `KeyboardInterrupt` with
    the way to resume.

    A model with `encoder_is_causal=True` also trains on prefixes, `{"history", "sessions", "history_lengths"}`
    ([`~onerec_hf.data.prefix_examples`]): each history is read once for all its sessions. `args.packing` packs windows or prefixes into
    rows without padding.

    Args:
        model: a `OneRecForConditionalGeneration`, a PEFT model around one, or a path or Hub id.
        args: [`OneRecTrainingArguments`].
        processing_class: the [`OneRecProcessor`]; its catalogue becomes the model's, its `max_history` says how much the encoder reads.
        train_dataset, eval_dataset: datasets with the columns `history` and `session`; other columns are ignored. To train on, prefixes
            as well, and an [`~onerec_hf.data.ExampleStream`], of which every rank reads its part.

    Raises:
        ValueError: no processor, prefixes for a fully visible encoder, or `args.packing` with what cannot be packed.

    Faults of a training are those of [`StepFaults`] and [`AtomicCheckpointMixin`].

    Example:
        >>> trainer = OneRecTrainer(
        ...     model, OneRecTrainingArguments("out"), train_dataset=split.train, eval_dataset=split.validation, processing_class=processor
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> trainer.evaluate(split.test, metric_key_prefix="test")["test_recall@10"]  # doctest: +SKIP
    """

    _memory_settings = {
        "training": ", or a smaller max_history of the processor, or packing=True",
        "evaluation": ", eval_num_beams, or set eval_accumulation_steps=1",
    }

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: OneRecTrainingArguments | None = None,
        train_dataset: Dataset | ExampleStream | None = None,
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
        if args.packing and train_dataset is not None:
            train_dataset, collator = _pack(train_dataset, args, processing_class, generator.config, data_collator)
        elif data_collator is not None:
            collator = data_collator
        else:
            collator = _padding_collator(train_dataset, args, processing_class, generator.config)
        self._evaluated = None
        self._router_balance = RouterBalanceCallback(args.router_bias_update_rate)
        self._interrupt = InterruptCallback()
        if args.predict_with_generate and compute_metrics is None:
            compute_metrics = self.compute_ranking_metrics
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[self._router_balance, self._interrupt, StreamPositionCallback(), *(callbacks or [])],
            **kwargs,
        )
        self.label_smoother = None  # it would take the place of the model's loss, item loss and balancing loss with it

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = ["history", "session", "sessions", "history_lengths", "examples"]

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
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _SeededByLength(seed, batch_size, lengths=read.to_pylist())

    @contextmanager
    def _collating_for_evaluation(self):
        training_collator, self.data_collator = self.data_collator, self.eval_data_collator
        try:
            yield
        finally:
            self.data_collator = training_collator

    def get_train_dataloader(self):
        if isinstance(self.train_dataset, ExampleStream):
            return stream_dataloader(self.train_dataset, self.args, self.data_collator)
        return super().get_train_dataloader()

    def num_examples(self, dataloader) -> int:
        # A stream's data loader counts batches.
        return (
            len(dataloader.dataset.stream)
            if isinstance(dataloader.dataset, BatchStream)
            else super().num_examples(dataloader)
        )

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and eval_dataset is not self._evaluated and not isinstance(eval_dataset, str):
            # With persistent workers Trainer would answer with the loader of the data that was evaluated before.
            vars(self).get("_eval_dataloaders", {}).pop("eval", None)
            self._evaluated = eval_dataset
        with self._collating_for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._collating_for_evaluation():
            return super().get_test_dataloader(test_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.label_smoothing_factor:
            inputs = {**inputs, "smoothing": self.args.label_smoothing_factor}
        if self.args.session_loss_weights is not None and model.training:
            inputs = {**inputs, "session_weights": self.args.session_loss_weights}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._interrupt.restore()
        if self._interrupt.interrupted:
            checkpoint = newest_checkpoint(str(self.args.output_dir))
            raise KeyboardInterrupt(
                f"training stopped at step {self.state.global_step}; resume it with resume_from_checkpoint={checkpoint!r}"
            )
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            logs.update(self._router_balance.pop_logs())
        super().log(logs, *args, **kwargs)

    @property
    def tokens_per_expert(self) -> np.ndarray | None:
        """(decoder_layers, num_experts) tokens that chose each expert in all steps; None without experts."""
        counts = self._router_balance.tokens_per_expert
        return None if counts is None else counts.cpu().numpy()

    def create_model_card(
        self, model_name: str | None = None, tags: str | list[str] | None = None, **metadata
    ) -> None:
        """
        Writes the card of the generator, or of its adapter, into `args.output_dir`, from what the trainer knows; see
        [`~onerec_hf.hub_cards.write_trainer_card`].
        """
        write_trainer_card(self, model_name, tags, tokens_per_expert=self.tokens_per_expert, **metadata)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        check_countable(dataloader, self.args.world_size)
        # Seq2SeqTrainer would keep the users that fill up the ranks' last batches: they would count twice.
        self.gather_function = self.accelerator.gather_for_metrics
        if not self.args.predict_with_generate:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        # Packed: thousands of rankings by the same weights.
        with unsharded_model(policy) as self._generator, self._generator.packed_experts():
            return super().evaluation_loop(dataloader, *args, **kwargs)

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
        sequences = self._generator.recommend(
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
        """Recall, NDCG, MRR and coverage at each `args.eval_top_k`, and `invalid_id_rate`, from ranked and target rows."""
        ranked = np.asarray(prediction.predictions)
        relevant = np.maximum(np.asarray(prediction.label_ids), -1)  # -100 pads ranks of unequal width
        metrics = ranking_metrics(
            ranked, relevant, ks=tuple(self.args.eval_top_k), num_items=len(self.processing_class.catalogue)
        )
        return {**metrics, "invalid_id_rate": invalid_id_rate(ranked)}


class _SeededByLength(LengthGroupedSampler):
    """An order of the seed and the epoch alone: ranks have to agree on it, and their own random numbers drift apart (dropout draws by length)."""

    def __init__(self, seed: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()


def _are_prefixes(dataset) -> bool:
    return isinstance(dataset, Dataset | IterableDataset | ExampleStream) and "history_lengths" in (
        dataset.column_names or ()
    )


def _require_causal(config) -> None:
    if not config.encoder_is_causal:
        raise ValueError(
            "training on prefixes needs a causal encoder: a fully visible one reads the items that follow a prefix, which are the targets. "
            "Make the model with encoder_is_causal=True, or train on windows"
        )


def _padding_collator(dataset, args: OneRecTrainingArguments, processor, config):
    """Collator for windows or prefixes, a row each; with `pad_to_multiple_of`, for batches of few shapes."""
    settings: dict[str, Any] = {"pad_to_multiple_of": args.pad_to_multiple_of}
    if args.pad_to_multiple_of is not None and isinstance(dataset, Dataset):
        settings["session_items"] = example_sizes(dataset)[2]
    if not _are_prefixes(dataset):
        return OneRecDataCollator(processor, **settings)
    _require_causal(config)
    # accelerate would cut a dispatched batch by its first tensor's rows; the decoder has more rows than the encoder.
    if isinstance(dataset, IterableDataset) and args.accelerator_config.dispatch_batches is not False:
        raise ValueError(
            "prefixes from a stream cannot be dispatched: set accelerator_config={'dispatch_batches': False}"
        )
    return PackedDataCollator(processor, encoder_is_causal=True, **settings)


def _pack(dataset, args: OneRecTrainingArguments, processor, config, data_collator):
    """The packed dataset and the collator for its rows."""
    if data_collator is not None:
        raise ValueError(
            "packing makes a collator of its own: leave data_collator out, or pack the dataset yourself (PackedDataset)"
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"packing needs a datasets.Dataset to train on, whose sizes are known; got {type(dataset).__name__}"
        )
    if _are_prefixes(dataset):
        _require_causal(config)
    seed = args.seed if args.data_seed is None else args.data_seed
    packed = PackedDataset(dataset, args.packing_length, processor.max_history, seed)
    collator = PackedDataCollator(
        processor,
        config.encoder_is_causal,
        packed.items,
        packed.slots,
        packed.session_items,
        rows=args.train_batch_size if args.torch_compile else None,  # one shape, also for an epoch's last batch
    )
    return packed, collator


def check_countable(dataloader: DataLoader, ranks: int) -> None:
    """
    Checks that the evaluation's length is known where ranks share it: their last batches are filled up with users from the beginning, who can
    be taken off again only if it is known how many there are.

    Raises:
        ValueError: a stream for more than one rank.
    """
    if ranks > 1 and not has_length(dataloader.dataset):
        raise ValueError(
            f"the evaluation reads a stream, and {ranks} ranks share it: some users would count twice. Give a datasets.Dataset "
            "(Dataset.from_generator or from_parquet keep it on disk), or evaluate on one process"
        )


def stream_dataloader(stream: ExampleStream, args: TrainingArguments, collator) -> DataLoader:
    """
    A data loader of this rank's batches. The stream is dealt out already: accelerate only moves batches to the device.

    Example:
        >>> loader = stream_dataloader(PreparedFolder("prepared").train(), args, collator)  # doctest: +SKIP
    """
    if stream.seed is None:
        stream.seed = args.seed if args.data_seed is None else args.data_seed
    batches = stream.batches(
        args.train_batch_size, collator, args.process_index, args.world_size, args.dataloader_num_workers
    )
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        # Its own numbers: how often workers are started must not decide what dropout draws.
        generator=torch.Generator().manual_seed(stream.seed),
    )
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


class StreamPositionCallback(TrainerCallback):
    """
    Tells a stream how many batches of the epoch that begins were trained on before: those Trainer takes and throws away, and they need not
    be read for that.

    Example:
        >>> StreamPositionCallback().on_epoch_begin(None, None, None, train_dataloader=None)
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = getattr(train_dataloader, "dataset", None)
        if isinstance(batches, BatchStream):
            accumulated = args.gradient_accumulation_steps
            steps_of_epoch = -(-len(batches) // accumulated)
            batches.skip(0 if args.ignore_data_skip else state.global_step % steps_of_epoch * accumulated)
