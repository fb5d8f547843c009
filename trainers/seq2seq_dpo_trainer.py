"""DPO for encoder-decoder models, based on TRL's trainer and losses."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from safetensors.torch import load_model, save_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, PreTrainedModel, TrainingArguments
from trl.data_utils import apply_chat_template, extract_prompt, is_conversational
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import global_then_local_main_first

from onerec_hf.hub_cards.alignment import Alignment
from onerec_hf.hub_cards.training import write_trainer_card
from onerec_hf.modeling.feature_codes import BESIDE_HISTORIES, FEATURE_COLUMNS, check_lifelong, check_schema
from onerec_hf.modeling.processing_onerec import OneRecProcessor
from onerec_hf.trainers.checkpoints import AtomicCheckpointMixin
from onerec_hf.trainers.faults import StepFaults
from onerec_hf.trainers.inputs import own_arguments, plain_rows
from onerec_hf.trainers.preference_checks import check_item_rows
from onerec_hf.trainers.preference_collators import OneRecPreferenceCollator, Seq2SeqPreferenceCollator
from onerec_hf.trainers.preference_losses import s_dpo_loss, simpo_reference
from onerec_hf.trainers.seq2seq_dpo_config import Seq2SeqDPOConfig
from onerec_hf.trainers.sharding import is_sharded, sharded_copy
from onerec_hf.trainers.trl_adapter import (
    bind_to_itself,
    check_scores,
    enable_decoder_first,
    scores_levels,
    takes_decoder_first,
)
from onerec_hf.trainers.whole_evaluation import WholeEvaluation, first_rows

_TEXT = ("prompt", "chosen", "rejected")
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_ITEMS = ("history", "chosen", "rejected")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
_REFERENCE_FILE = "reference.safetensors"


class Seq2SeqDPOTrainer(StepFaults, AtomicCheckpointMixin, WholeEvaluation, DPOTrainer):
    """
    `trl.DPOTrainer` for encoder-decoder models: DPO (arXiv 2305.18290; OneRec paper, equation 10) and all other losses and options of TRL.
    The encoder reads the prompt once per pair; only the decoder's sequence is scored.

    Rows of a text dataset have TRL's columns `prompt`, `chosen`, `rejected` (strings, conversations, or token ids `prompt_ids`,
    `chosen_ids`, `rejected_ids`). With a [`OneRecProcessor`] they are `history`, `chosen`, `rejected`, lists of item ids. Rows with
    `ref_chosen_logps` and `ref_rejected_logps` keep them with `precompute_ref_log_probs`.

    The routers of a OneRec decoder keep their balancing bias, and no auxiliary loss is added unless `router_aux_loss_coef` or the model's
    `output_router_logits` enables it. `disable_dropout` also covers dropout rates stored as numbers (attention in T5, all of Bart), unlike TRL's.

    Args:
        model: an encoder-decoder model, a PEFT model around one, or a path or Hub id.
        ref_model: the reference (default: a frozen copy of `model`, with PEFT the model without its adapter).
        args: [`Seq2SeqDPOConfig`].
        data_collator: a custom collator with the output of [`Seq2SeqPreferenceCollator`]; the dataset is then used unchanged.
        processing_class: the tokenizer, or the [`OneRecProcessor`].
        kwargs: as for `trl.DPOTrainer`.

    Raises:
        ValueError: a decoder-only model, missing columns, invalid rows of items ([`check_item_rows`]), or a model that TRL's fused head
            scores wrongly.

    Example:
        >>> trainer = Seq2SeqDPOTrainer(
        ...     "google-t5/t5-small", args=Seq2SeqDPOConfig("out"), train_dataset=pairs
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "dpo", "seq2seq"]
    _arguments: type[Seq2SeqDPOConfig] = Seq2SeqDPOConfig
    args: Seq2SeqDPOConfig
    model: PreTrainedModel
    ref_model: Any

    def __init__(
        self,
        model: PreTrainedModel | str,
        ref_model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict | None = None,
        processing_class=None,
        peft_config=None,
        quantization_config=None,
        **kwargs,
    ):
        args = own_arguments(args, self._arguments, "seq2seq-dpo-output")
        train_dataset, eval_dataset = plain_rows(train_dataset), plain_rows(eval_dataset)
        if isinstance(model, str):
            model = load_generator(model, args, quantization_config)
            quantization_config = None
        generator: Any = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
        has_adapter = peft_config is not None or is_peft_model(model)
        check_adapter(peft_config, model)
        if ref_model is None and not (has_adapter or args.precompute_ref_log_probs or args.reference_free):
            ref_model = _frozen_copy(model)
        for each in (generator, ref_model):
            if each is not None:
                enable_decoder_first(each)
        if ref_model is not None:
            ref_model.requires_grad_(False).eval()
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                generator.config._name_or_path, trust_remote_code=args.trust_remote_code
            )
        if isinstance(processing_class, OneRecProcessor):
            generator.set_catalogue(processing_class.catalogue)
            check_schema(generator.config, processing_class.features, processing_class.pathways)
            check_lifelong(generator.config, processing_class.lifelong)
            # TRL assumes a vision model for a processor and allows unused parameters; here all parameters are used.
            if args.ddp_find_unused_parameters is None:
                args.ddp_find_unused_parameters = False
        self._uses_rows_unchanged = data_collator is not None
        if data_collator is None:
            data_collator = _collator(generator, processing_class, args)
        # With precomputed log-probabilities TRL creates no reference model, as needed for reference-free losses.
        args.precompute_ref_log_probs |= args.reference_free
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            quantization_config=quantization_config,
            **kwargs,
        )
        bind_to_itself(generator)
        if self.ref_model is not None and scores_levels(self.ref_model):
            bind_to_itself(self.ref_model)
        if args.reference_free:
            args.precompute_ref_log_probs = self.precompute_ref_logps = False
        if args.disable_dropout:
            for each in (self.model, self.ref_model):
                if each is not None:
                    disable_plain_dropout(each)
        # OneRec's config always has a coefficient, which alone would make TRL add the auxiliary loss.
        if args.router_aux_loss_coef is None and not getattr(generator.config, "output_router_logits", False):
            self.aux_loss_enabled = False
        if not takes_decoder_first(generator):
            check_scores(generator)

    def _prepare_dataset(self, dataset, processing_class, args: Seq2SeqDPOConfig, dataset_name):
        if self._uses_rows_unchanged:
            return dataset
        first = next(iter(dataset))
        if isinstance(processing_class, OneRecProcessor):
            _with_columns(dataset, first, _ITEMS, dataset_name)
            if isinstance(dataset, Dataset):  # rows of a stream are only available in training
                check_item_rows(dataset, processing_class, _ITEMS, dataset_name)
            return dataset
        if set(_TOKENS) <= set(first):
            return dataset
        settings: dict[str, Any] = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        with global_then_local_main_first():
            if "prompt" not in first:
                dataset = dataset.map(extract_prompt, **settings)
            _with_columns(dataset, next(iter(dataset)), _TEXT, dataset_name)
            return dataset.map(
                _tokenize,
                fn_kwargs={"tokenizer": self._tokenizer, "max_prompt_length": args.max_prompt_length},
                **settings,
            )

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = sorted({*_ITEMS, *FEATURE_COLUMNS, *_TOKENS, *_REFERENCE})

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.args.reference_free or set(_REFERENCE) <= set(dataset.column_names or ()):
            return dataset
        was_training = self.model.training
        self.model.eval()
        # TRL shares the values through a cache file next to the dataset's; in-memory datasets have a separate folder per process.
        in_memory = isinstance(dataset, Dataset) and not dataset.cache_files
        if in_memory and self.accelerator.num_processes > 1:
            dataset = self._score_in_memory(dataset, batch_size)
        else:
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        self.model.train(was_training)
        return dataset

    def _score_in_memory(self, dataset: Dataset, batch_size: int) -> Dataset:
        """Adds the reference's log-probabilities, gathered from all ranks."""
        loader = self.accelerator.prepare(DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator))  # type: ignore[arg-type]
        parts = [
            self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.ref_model or self.model, batch))
            for batch in loader
        ]
        for column, values in zip(_REFERENCE, zip(*parts, strict=True), strict=True):
            dataset = dataset.add_column(column, torch.cat(values).float().tolist())  # type: ignore[call-arg]
        return dataset

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
        write_trainer_card(self, model_name, tags, alignment=Alignment.of(self), datasets=dataset_name, **metadata)

    @property
    def _reference_moves(self) -> bool:
        """Whether the reference changes during training (TR-DPO) and belongs in checkpoints; TRL resumes with the initial one."""
        return self.args.sync_ref_model

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._reference_moves and self.args.should_save:
            save_model(self.ref_model, os.path.join(output_dir, _REFERENCE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._reference_moves and checkpoint is not None:
            load_model(self.ref_model, os.path.join(checkpoint, _REFERENCE_FILE))

    def _compute_loss(self, model, inputs, return_outputs):
        if self.loss_types == ["s_dpo"]:
            loss = self._s_dpo(model, inputs)
        elif self.args.reference_free:
            gamma = self.args.simpo_gamma if "sigmoid_norm" in self.loss_types else 0.0
            reference = simpo_reference(inputs["completion_mask"], self.beta, gamma)
            self.precompute_ref_logps = True
            loss = super()._compute_loss(model, {**inputs, **dict(zip(_REFERENCE, reference, strict=True))}, False)
            self.precompute_ref_logps = False
        else:
            loss = super()._compute_loss(model, inputs, False)
        return (loss, self._outputs(model, inputs)) if return_outputs else loss

    @torch.no_grad()
    def _outputs(self, model, inputs):
        """The model's outputs of all decoder rows, with logits."""
        repeats = inputs["input_ids"].shape[0] // inputs["encoder_input_ids"].shape[0]
        features = {name: inputs[name].repeat(repeats, 1, 1) for name in BESIDE_HISTORIES if name in inputs}
        return model(
            **features,
            input_ids=inputs["encoder_input_ids"].repeat(repeats, 1),
            attention_mask=inputs["encoder_attention_mask"].repeat(repeats, 1),
            decoder_input_ids=inputs["input_ids"],
            decoder_attention_mask=inputs["attention_mask"],
            use_cache=False,
        )

    def _predictions(self, model, inputs):
        """Logits and labels, for `compute_metrics`."""
        return self._outputs(model, inputs).logits, inputs["input_ids"]

    def evaluation_loop(self, *args, **kwargs):
        self._metrics["eval"].clear()
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), _without_gathering(self.accelerator):
            loss = self._count_batch(model, inputs)
            if prediction_loss_only:
                return loss, None, None
            return loss, *self._predictions(model, inputs)

    def _count_batch(self, model, inputs) -> torch.Tensor:
        """The loss of a batch; it and TRL's metrics are counted per pair, or per token where they are of tokens."""
        rows = inputs["encoder_input_ids"].shape[0]
        real = self.real_rows(rows)
        loss = self._count_pairs(model, first_rows(inputs, max(real, 1), rows), bool(real))
        self.count("loss", loss, real)
        return loss

    def _count_pairs(self, model, inputs, real: bool = True) -> torch.Tensor:
        """The DPO loss of pairs, with TRL's metrics counted; of pairs that are not `real`, with weight 0."""
        loss = Seq2SeqDPOTrainer._compute_loss(self, model, inputs, False)
        pairs = inputs["encoder_input_ids"].shape[0]
        tokens = inputs["completion_mask"][:, 1:].view(-1, pairs, inputs["completion_mask"].shape[1] - 1).sum((1, 2))
        of_tokens = {
            "entropy": tokens.sum(),
            "mean_token_accuracy": tokens[0],
            "logits/chosen": tokens[0],
            "logits/rejected": tokens[1:].sum(),
        }
        for name in [name for name in self._metrics["eval"] if name != "num_tokens"]:  # those are of the training
            (value,) = self._metrics["eval"].pop(name)
            self.count(name, value, of_tokens.get(name, pairs) * real)
        return loss

    def _s_dpo(self, model, inputs) -> torch.Tensor:
        """S-DPO of a batch with (1 + N) * B decoder rows."""
        users = inputs["encoder_input_ids"].shape[0]
        ref_logps = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, inputs))
        scored = {name: value for name, value in inputs.items() if name != "completion_mask"}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**scored, **router, labels=labels, fused_lm_head=True, use_cache=False)
        logps = outputs.log_probs.sum(1)
        ratios = (logps - ref_logps).view(-1, users)
        loss = s_dpo_loss(ratios[0], ratios[1:].T, self.beta).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        rewards = self.beta * ratios.detach()
        logged: dict[str, torch.Tensor] = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1:].mean(0),
            "rewards/accuracies": (rewards[0] > rewards[1:].amax(0)).float(),
            "rewards/margins": rewards[0] - rewards[1:].mean(0),
            "logps/chosen": logps.detach()[:users],
            "logps/rejected": logps.detach()[users:],
        }
        for name, value in logged.items():
            self._metrics["train" if self.model.training else "eval"][name].append(
                torch.as_tensor(self.accelerator.gather(value)).mean().item()
            )
        return loss


def load_generator(path: str, args: Any, quantization_config) -> PreTrainedModel:
    """Loads with AutoModelForSeq2SeqLM; TRL looks the class up in transformers and loads plugin models as causal LMs."""
    settings: dict[str, Any] = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}  # type: ignore[dict-item]
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    args.model_init_kwargs = None  # already used; TRL warns if they are passed with a model
    return AutoModelForSeq2SeqLM.from_pretrained(path, **settings)


def check_adapter(peft_config, model) -> None:
    """
    Raises:
        ValueError: an adapter that prepends tokens.
    """
    configs = [peft_config] if peft_config is not None else getattr(model, "peft_config", {}).values()
    if any(config.is_prompt_learning for config in configs):
        raise ValueError(
            "prompt-learning adapters prepend virtual tokens to input_ids, which belong to the decoder here; use LoRA or another weight adapter"
        )


@contextlib.contextmanager
def _without_gathering(accelerator) -> Iterator[None]:
    """TRL's metrics of a batch become those of this rank; an evaluation gathers its sums at the end."""
    accelerator.gather = accelerator.gather_for_metrics = lambda values: values
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    if is_sharded(model):
        return sharded_copy(model)
    return copy.deepcopy(model)


def disable_plain_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def _collator(generator: PreTrainedModel, processing_class, args: Seq2SeqDPOConfig):
    if isinstance(processing_class, OneRecProcessor):
        return OneRecPreferenceCollator(processing_class)
    generation: Any = generator.generation_config
    # What generate() begins with.
    start = generation.bos_token_id if generation.decoder_start_token_id is None else generation.decoder_start_token_id
    if start is None:
        raise ValueError(
            f"{type(generator).__name__} has no decoder start token; set "
            "model.generation_config.decoder_start_token_id"
        )
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Seq2SeqPreferenceCollator(tokenizer.pad_token_id, start, args.max_length, args.pad_to_multiple_of)  # type: ignore[arg-type]


def _with_columns(dataset, first: dict, wanted: tuple[str, ...], name: str):
    missing = [column for column in wanted if column not in first]
    if missing:
        raise ValueError(
            f"the {name} dataset lacks the columns {missing} (found: {sorted(first)}); preference rows need {list(wanted)}"
        )
    return dataset


def _tokenize(row: dict[str, Any], tokenizer, max_prompt_length: int | None) -> dict[str, list]:
    """Tokenizes prompt and answers separately, each with special tokens; answers end with EOS."""
    templated = is_conversational(row)
    if templated:
        row = dict(apply_chat_template(row, tokenizer))
    prompt = tokenizer(
        row["prompt"],
        add_special_tokens=not templated,
        truncation=max_prompt_length is not None,
        max_length=max_prompt_length,
    )

    def answer(text):
        if isinstance(text, list):
            return [answer(one) for one in text]
        ids = tokenizer(text_target=text, add_special_tokens=not templated)["input_ids"]
        return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]

    return {
        "prompt_ids": prompt["input_ids"],
        "chosen_ids": answer(row["chosen"]),
        "rejected_ids": answer(row["rejected"]),
    }
