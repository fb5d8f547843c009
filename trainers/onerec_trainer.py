"""Trainer of the generator: session-wise next-token prediction, evaluated by beam search over the full catalogue."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalPrediction

from onerec_hf.data.collators import PREFIXES_OF_PATHWAYS, OneRecDataCollator, PackedDataCollator, draw_sessions
from onerec_hf.data.packing import EXAMPLE_COLUMNS, PackedDataset, example_sizes
from onerec_hf.data.shards.stream import BatchStream, ExampleStream
from onerec_hf.data.windows import REQUEST_TIME
from onerec_hf.evaluation.metrics import EMPTY, INVALID, invalid_id_rate
from onerec_hf.hub_cards.training import write_trainer_card
from onerec_hf.modeling.feature_codes import BESIDE_HISTORIES, check_lifelong, check_schema
from onerec_hf.trainers.callbacks import InterruptCallback, RouterBalanceCallback
from onerec_hf.trainers.checkpoints import AtomicCheckpointMixin, newest_checkpoint
from onerec_hf.trainers.faults import StepFaults
from onerec_hf.trainers.inputs import RankingSearch, first_model, own_arguments, plain_rows
from onerec_hf.trainers.onerec_config import OneRecTrainingArguments
from onerec_hf.trainers.ranking_evaluation import RankingEvaluation
from onerec_hf.trainers.sharding import unsharded_model
from onerec_hf.trainers.weight_average import AveragedWeights

if TYPE_CHECKING:
    from onerec_hf.modeling.processing_onerec import OneRecProcessor


class OneRecTrainer(
    RankingSearch, StepFaults, AtomicCheckpointMixin, AveragedWeights, RankingEvaluation, Seq2SeqTrainer
):
    """
    Trains a OneRec generator on examples `{"history": [item ids], "session": [item ids]}` with the session-wise next-token loss (paper,
    equation 4) and, with `args.predict_with_generate`, evaluates by ranking the full catalogue: Recall@k, NDCG@k, MRR@k, coverage@k
    against the items of `session`, and the invalid-ID rate (0 with constrained beam search).

    Experts are balanced without an auxiliary loss (`RouterBalanceCallback`), and their imbalance is logged as `router/max_violation`.
    Checkpoints contain the complete artefact (weights, processor, catalogue). Ctrl-C finishes the step, saves a checkpoint and raises
    `KeyboardInterrupt` with instructions to resume.

    A model with `encoder_is_causal=True` also trains on prefixes, `{"history", "sessions", "history_lengths"}`
    ([`~onerec_hf.data.prefix_examples`]): the encoder reads each history once for all its sessions. `args.packing` packs windows or prefixes into
    rows without padding.

    Args:
        model: a `OneRecForConditionalGeneration`, a PEFT model around one, or a path or Hub id. Or `model_init`, as for Trainer.
        args: [`OneRecTrainingArguments`], or plain `TrainingArguments`: what those do not have takes its default.
        processing_class: the [`OneRecProcessor`]; its catalogue is set on the model, and `max_history` limits the encoder's input.
        train_dataset, eval_dataset: datasets with the columns `history` and `session`; other columns are ignored. `train_dataset` may also
            hold prefixes, or be an [`~onerec_hf.data.ExampleStream`], of which every rank reads its part. `predict` needs no `session`.
        model_init: makes a model, `model_init()` or `model_init(trial)`, for each training and each trial of `hyperparameter_search`.
        peft_config: train this PEFT adapter instead of the model's weights.

    Raises:
        ValueError: no processor, prefixes with a fully visible encoder, or a dataset that `args.packing` does not support.

    [`StepFaults`] and [`AtomicCheckpointMixin`] document the errors during training.

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
        model: PreTrainedModel | str | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | ExampleStream | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: OneRecProcessor | None = None,
        data_collator=None,
        compute_metrics=None,
        callbacks=None,
        model_init=None,
        peft_config=None,
        **kwargs,
    ):
        args = own_arguments(args, OneRecTrainingArguments, "onerec-output")
        train_dataset, eval_dataset = plain_rows(train_dataset), plain_rows(eval_dataset)
        if isinstance(model, str):
            model = AutoModelForSeq2SeqLM.from_pretrained(model)
        if processing_class is None:
            raise ValueError("OneRecTrainer needs processing_class: pass the OneRecProcessor with the catalogue")
        self.processing_class, self._peft_config = processing_class, peft_config
        if model is not None and model_init is None:
            model = self._prepared(model)
        model = first_model(self, model, model_init, args)
        generator = _generator_of(model)
        self.eval_data_collator = data_collator or OneRecDataCollator(
            processing_class, with_seen=args.eval_exclude_seen
        )
        if args.packing and train_dataset is not None:
            train_dataset, collator = _pack(train_dataset, args, processing_class, generator.config, data_collator)
        elif data_collator is not None:
            collator = data_collator
        else:
            collator = _padding_collator(train_dataset, args, processing_class, generator.config)
        if args.session_share < 1 and not isinstance(collator, PackedDataCollator):
            raise ValueError(
                f"session_share={args.session_share:g} needs packed rows or prefixes, whose histories have several sessions; set packing=True"
            )
        if args.eval_head_alone and not (generator.config.item_head and generator.config.item_head.loss_weight):
            raise ValueError(
                "eval_head_alone needs a model with an item head that has a loss_weight; leave the option out"
            )
        self._evaluated = None
        self._item_code_tokens = None
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
        self.model_init = model_init
        self.label_smoother = None  # it would replace the model's loss, including the item loss

    def _prepared(self, model: Any) -> Any:
        """A model with the processor's catalogue, and the adapter to train."""
        processor: Any = self.processing_class
        _generator_of(model).set_catalogue(processor.catalogue)
        check_schema(_generator_of(model).config, processor.features, processor.pathways)
        check_lifelong(_generator_of(model).config, processor.lifelong)
        if self._peft_config is None:
            return model
        if is_peft_model(model):
            raise ValueError("the model has an adapter already: leave peft_config out")
        return get_peft_model(model, self._peft_config)

    def call_model_init(self, trial=None):
        model = self._prepared(super().call_model_init(trial))
        collator, config = vars(self).get("data_collator"), _generator_of(model).config
        if isinstance(collator, PackedDataCollator) and collator.encoder_is_causal != config.encoder_is_causal:
            raise ValueError(
                f"model_init made a model with encoder_is_causal={config.encoder_is_causal} after one with {collator.encoder_is_causal}, and the "
                "training rows are made for the first; keep it the same in all trials"
            )
        return model

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*EXAMPLE_COLUMNS, REQUEST_TIME, "history_positive", "examples"]

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
        """Groups by the number of history items that the encoder reads; Trainer would use token counts of text."""
        lengths = pc.list_value_length(dataset.with_format("arrow")[:]["history"])
        read = pc.min_element_wise(lengths, self.processing_class.max_history)  # type: ignore[attr-defined]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _SeededByLength(seed, batch_size, lengths=read.to_pylist())

    def _ranked_items(self):
        return self.processing_class.catalogue, self.processing_class.catalogue.active  # type: ignore[attr-defined]

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
        # The data loader of a stream counts batches.
        return (
            len(dataloader.dataset.stream)
            if isinstance(dataloader.dataset, BatchStream)
            else super().num_examples(dataloader)
        )

    def get_eval_dataloader(self, eval_dataset=None):
        if not isinstance(eval_dataset, str):
            eval_dataset = plain_rows(eval_dataset)
            _check_targets("evaluate()", self.eval_dataset if eval_dataset is None else eval_dataset)
        if eval_dataset is not None and eval_dataset is not self._evaluated and not isinstance(eval_dataset, str):
            # With persistent workers Trainer would return the loader of the previously evaluated dataset.
            vars(self).get("_eval_dataloaders", {}).pop("eval", None)
            self._evaluated = eval_dataset
        with self._collating_for_evaluation():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        test_dataset = plain_rows(test_dataset)
        if not self.args.predict_with_generate:
            _check_targets("predict() with predict_with_generate=False", test_dataset)
        with self._collating_for_evaluation():
            return super().get_test_dataloader(test_dataset)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.args.session_share < 1:
            epoch_iterator = map(self._draw_sessions(), epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _draw_sessions(self) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Draws by seed, step and rank: a resumed run draws the same, however its data loader prefetches."""
        args = self.args
        place = [args.seed if args.data_seed is None else args.data_seed, self.state.global_step, args.process_index]
        seed = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits
        generator = torch.Generator().manual_seed(seed)
        return lambda batch: draw_sessions(batch, args.session_share, generator)

    def _get_num_items_in_batch(self, batch_samples, device):
        if batch_samples and "item_targets" in batch_samples[0]:  # not in evaluations
            everything = [{"labels": batch["item_targets"]} for batch in batch_samples]
            self._item_code_tokens = super()._get_num_items_in_batch(everything, device)
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.args.label_smoothing_factor:
            inputs = {**inputs, "smoothing": self.args.label_smoothing_factor}
        if self.args.session_loss_weights is not None and model.training:
            inputs = {**inputs, "session_weights": self.args.session_loss_weights}
        if "item_targets" in inputs:
            inputs = {**inputs, "item_code_tokens": self._item_code_tokens}
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
        """(decoder_layers, num_experts) number of tokens routed to each expert over all steps; None without experts."""
        counts = self._router_balance.tokens_per_expert
        return None if counts is None else counts.cpu().numpy()

    def create_model_card(
        self, model_name: str | None = None, tags: str | list[str] | None = None, **metadata
    ) -> None:
        """
        Writes the card of the generator, or of its adapter, to `args.output_dir`; see [`~onerec_hf.hub_cards.write_trainer_card`].
        """
        write_trainer_card(self, model_name, tags, tokens_per_expert=self.tokens_per_expert, **metadata)

    def evaluation_loop(self, dataloader, *args, **kwargs):
        if not self.args.predict_with_generate:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        policy = self.accelerator.unwrap_model(self.model)
        # Packed experts: the weights do not change during evaluation.
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
        """
        Loss, ranked item indices (users, largest k) and target item indices (users, items). In the ranking -1 is an empty place and -2 an
        invalid ID; a user without candidates has empty places only.
        """
        inputs = self._prepare_inputs(dict(inputs))
        exclude, request_times = (inputs.pop(name, None) for name in ("exclude", "request_times"))
        targets = inputs.get("labels")  # predict() needs none
        loss = None if targets is None else self._count_loss(model, inputs)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        targets = None if targets is None else self.processing_class.item_indices(targets)
        return loss, self._rank(inputs, exclude, request_times), targets

    def _count_loss(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        """The loss of a batch, counted per token of its real users."""
        labels = inputs["labels"].clone()
        labels[self.real_rows(len(labels)) :] = -100
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, {**inputs, "labels": labels}).detach()
        self.count("loss", loss, (labels != -100).sum())
        return loss

    def _rank(
        self, inputs: dict[str, Any], exclude: torch.Tensor | None, request_times: torch.Tensor | None
    ) -> torch.Tensor:
        """(users, largest k) item indices, best first; -1 for an empty place, -2 for an invalid ID."""
        top, users = max(self.args.eval_top_k), len(inputs["input_ids"])
        head_alone = self.args.eval_head_alone and self.is_in_train
        without = torch.zeros(users, dtype=torch.bool)
        catalogue = self.processing_class.catalogue
        if exclude is not None and exclude.shape[1] >= catalogue.num_active:
            without = torch.tensor([not catalogue.num_left(row[row >= 0]) for row in exclude.cpu().numpy()])
            exclude = exclude.masked_fill(without[:, None].to(exclude.device), -1)
        sequences = self._generator.recommend(
            inputs["input_ids"],
            inputs["attention_mask"],
            **{name: inputs.get(name) for name in BESIDE_HISTORIES},
            session_length=1,
            num_beams=self.args.eval_num_beams,
            num_return_sequences=top,
            exclude=exclude,
            request_times=request_times,
            **({"decoder_weight": 0.0, "item_score_weight": 1.0} if head_alone else {}),
        )
        ranked = self.processing_class.item_indices(sequences).view(users, top)
        empty = (sequences[:, 1] == self._generator.config.pad_token_id).view(users, top)
        ranked = ranked.masked_fill((ranked < 0) & ~empty, INVALID)
        return ranked.masked_fill(without[:, None].to(ranked.device), EMPTY)

    def compute_ranking_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Recall, NDCG, MRR and coverage at each `args.eval_top_k`, and `invalid_id_rate`, from ranked and target item indices; with
        `unranked_users` where there are any.
        """
        metrics = self._ranking_metrics(prediction, self.processing_class.catalogue.num_active)
        return {**metrics, "invalid_id_rate": invalid_id_rate(np.asarray(prediction.predictions))}


class _SeededByLength(LengthGroupedSampler):
    """Order by seed and epoch only, equal on all ranks; their global random states diverge (dropout depends on the lengths)."""

    def __init__(self, seed: int, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return super().__iter__()


def _generator_of(model: Any) -> Any:
    """The model, without an adapter around it."""
    return model.get_base_model() if is_peft_model(model) else model


def _check_targets(call: str, dataset: Any) -> None:
    """
    Raises:
        ValueError: no column of targets.
    """
    if isinstance(dataset, dict):
        for each in dataset.values():
            _check_targets(call, each)
    elif isinstance(dataset, Dataset) and "session" not in dataset.column_names:
        raise ValueError(
            f"{call} needs the column 'session', the items that are ranked for (found: {', '.join(dataset.column_names)}). For users without "
            "it, call predict() or model.recommend()"
        )


def _are_prefixes(dataset) -> bool:
    return isinstance(dataset, Dataset | IterableDataset | ExampleStream) and "history_lengths" in (
        dataset.column_names or ()
    )


def _require_causal(config) -> None:
    if not config.encoder_is_causal:
        raise ValueError(
            "training on prefixes needs a causal encoder: a fully visible encoder also reads the items after a prefix, which are the targets. "
            "Create the model with encoder_is_causal=True, or train on windows"
        )


def _padding_collator(dataset, args: OneRecTrainingArguments, processor, config):
    """Collator for unpacked windows or prefixes, padded to few shapes with `pad_to_multiple_of`."""
    settings: dict[str, Any] = {"pad_to_multiple_of": args.pad_to_multiple_of}
    if args.pad_to_multiple_of is not None and isinstance(dataset, Dataset):
        settings["session_items"] = example_sizes(dataset)[2]
    if not _are_prefixes(dataset):
        return OneRecDataCollator(processor, **settings)
    if processor.pathways is not None:
        raise ValueError(PREFIXES_OF_PATHWAYS)
    _require_causal(config)
    # accelerate slices a dispatched batch by the rows of its first tensor, but the decoder has more rows than the encoder.
    if isinstance(dataset, IterableDataset) and args.accelerator_config.dispatch_batches is not False:
        raise ValueError(
            "prefixes from a stream do not support dispatched batches; set accelerator_config={'dispatch_batches': False}"
        )
    return PackedDataCollator(processor, encoder_is_causal=True, **settings)


def _pack(dataset, args: OneRecTrainingArguments, processor, config, data_collator):
    """The packed dataset and the collator for its rows."""
    if data_collator is not None:
        raise ValueError(
            "packing uses its own collator; omit data_collator, or pack the dataset yourself (PackedDataset)"
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(f"packing needs a datasets.Dataset, whose sizes are known; got {type(dataset).__name__}")
    if _are_prefixes(dataset):
        _require_causal(config)
    seed = args.seed if args.data_seed is None else args.data_seed
    packed = PackedDataset(
        dataset, args.packing_length, processor.max_history, seed, processor.static_places, processor.pathways
    )
    collator = PackedDataCollator(
        processor,
        config.encoder_is_causal,
        packed.items,
        packed.slots,
        packed.session_items,
        rows=args.train_batch_size if args.torch_compile else None,  # one shape, also for the last batch of an epoch
    )
    return packed, collator


def stream_dataloader(stream: ExampleStream, args: TrainingArguments, collator) -> DataLoader:
    """
    A data loader of this rank's batches. The stream is sharded already, so accelerate only moves batches to the device.

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
        # A separate generator: the start of workers must not change the random numbers of dropout.
        generator=torch.Generator().manual_seed(stream.seed),
    )
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


class StreamPositionCallback(TrainerCallback):
    """
    Tells a stream how many batches of the epoch were already trained on. Trainer discards them after a resume, so they need not be read.

    Example:
        >>> StreamPositionCallback().on_epoch_begin(None, None, None, train_dataloader=None)
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = getattr(train_dataloader, "dataset", None)
        if isinstance(batches, BatchStream):
            accumulated = args.gradient_accumulation_steps
            steps_of_epoch = -(-len(batches) // accumulated)
            batches.skip(0 if args.ignore_data_skip else state.global_step % steps_of_epoch * accumulated)
