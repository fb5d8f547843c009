"""Turns failures inside a step into actionable errors: non-finite loss, out of memory, lost ranks."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.utils import logging

from onerec_hf.modeling.files import replacing
from onerec_hf.modeling.processing_onerec import OneRecProcessor
from onerec_hf.trainers.checkpoints import newest_checkpoint
from onerec_hf.trainers.rollouts import right_padded

logger = logging.get_logger(__name__)

# Messages of CPU allocators; accelerators raise torch.OutOfMemoryError. The last one is the C++ library's, for small allocations.
_NO_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc")
# Messages of gloo about unresponsive processes; NCCL raises torch.distributed.DistError.
_LOST_RANK = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Application timeout",
    "Broken pipe",
)


class NonFiniteError(FloatingPointError):
    """Non-finite loss or gradient. `path` is the file with this rank's examples, None if another rank caused it."""

    def __init__(self, message: str, path: str | None):
        super().__init__(message)
        self.path = path


class BatchOutOfMemoryError(torch.OutOfMemoryError, MemoryError):
    """A batch does not fit into memory. The message contains its shape and the settings to change."""


class LostRankError(ConnectionError):
    """Another rank died or did not respond within `ddp_timeout` seconds."""


class StepFaults(Trainer):
    """
    Trainer mixin. With `args.stop_at_nonfinite`, training stops on all ranks before an optimizer step with a non-finite loss or gradient, and
    each rank with a non-finite loss writes the examples of the micro-batch to `output_dir/nonfinite-step-S-rank-R.jsonl`. The check reads the
    gradient norm once per optimizer step and replaces Trainer's `logging_nan_inf_filter`, which checks every micro-batch. With fp16 only the
    loss is checked, since the scaler skips steps with infinite gradients.

    Out-of-memory errors and lost ranks raise errors with instructions.

    Raises:
        NonFiniteError: non-finite loss or gradient.
        BatchOutOfMemoryError: in training and evaluation.
        LostRankError: in distributed training.
    """

    #: Memory-saving settings for the messages, in addition to Trainer's.
    _memory_settings = {"training": "", "evaluation": ""}
    _last_batch: dict[str, Any] = {}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step_batches: list[tuple[dict[str, Any], torch.Tensor]] = []
        if self._stops_at_nonfinite:
            self.args.logging_nan_inf_filter = False
        # With use_cpu, TrainingArguments creates the process group without ddp_timeout.
        if self.args.use_cpu and self.args.world_size > 1:
            _set_pg_timeout(timedelta(seconds=self.args.ddp_timeout), None)

    @property
    def _stops_at_nonfinite(self) -> bool:
        return self.args.stop_at_nonfinite  # type: ignore[attr-defined]

    # -- non-finite loss ---------------------------------------------------------------------
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (self._stops_at_nonfinite and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = dict(inputs)  # Trainer removes the labels for a compute_loss_func
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = computed[0] if isinstance(computed, tuple) else computed
        plain = loss.detach()
        self._step_batches.append((batch, plain))
        # The factor is 1 for a finite loss and NaN otherwise, so the gradient is NaN too and reaches the norm of every rank.
        loss = loss * (1 + (plain - plain))
        return (loss, *computed[1:]) if isinstance(computed, tuple) else loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self._stops_at_nonfinite:
            batches, self._step_batches = self._step_batches, []
            plain = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            if not torch.isfinite(plain).all():
                self._stop_at(float(plain), batches)
        return norm

    def _stop_at(self, norm: float, batches: list[tuple[dict[str, Any], torch.Tensor]]) -> None:
        losses = [float(loss.mean()) for _, loss in batches]
        causes = [place for place, (_, loss) in enumerate(batches) if not torch.isfinite(loss).all()]
        anywhere: Any = torch.tensor(float(len(causes)), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:  # the norm is equal on all ranks, so all reach this line
            anywhere = self.accelerator.reduce(anywhere)
        if not anywhere.item():
            if self.accelerator.scaler is not None:
                return
            causes = list(range(len(batches)))  # the micro-batch of a non-finite gradient is unknown
        step, rank = self.state.global_step + 1, self.args.process_index
        path = self._write_examples(step, rank, [(place, losses[place], batches[place][0]) for place in causes])
        if path is None:
            what = "the loss is not finite on another rank, which saved its examples"
        elif anywhere.item():
            what = f"the loss of micro-batch {causes[0] + 1} of {len(batches)} is {losses[causes[0]]}; the examples are in {path}"
        else:
            what = f"the loss is {losses} and the norm of its gradient {norm}; the step's examples are in {path}"
        last = newest_checkpoint(str(self.args.output_dir))
        raise NonFiniteError(
            f"training stopped at step {step}, before the weights changed: {what}. Inspect them, lower learning_rate, set max_grad_norm, or "
            "use bf16 or fp32 instead of fp16; stop_at_nonfinite=False disables this check. "
            + (f"The newest checkpoint is {last}" if last else "There is no checkpoint yet"),
            path,
        )

    def _write_examples(self, step: int, rank: int, batches: list[tuple[int, float, dict[str, Any]]]) -> str | None:
        if not batches:
            return None
        os.makedirs(str(self.args.output_dir), exist_ok=True)
        path = os.path.join(str(self.args.output_dir), f"nonfinite-step-{step}-rank-{rank}.jsonl")
        items = getattr(self.accelerator.unwrap_model(self.model), "items", None)  # of a reward or sequence model
        with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for place, loss, batch in batches:
                for example in batch_examples(batch, self.processing_class, items):
                    file.write(json.dumps({"micro_batch": place + 1, "loss": str(loss), **example}) + "\n")
        return path

    # -- out of memory, lost ranks -----------------------------------------------------------
    def _prepare_inputs(self, inputs):
        self._last_batch = (
            inputs if isinstance(inputs, Mapping) else {}
        )  # rows from which sessions are drawn have no shape
        return super()._prepare_inputs(inputs)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self._step_batches = []
        with self._explaining("training"):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        with self._explaining("evaluation"):
            return super().evaluation_loop(*args, **kwargs)

    @contextlib.contextmanager
    def _explaining(self, phase: str) -> Iterator[None]:
        """Converts out-of-memory and communication errors to actionable ones."""
        try:
            yield
        except (BatchOutOfMemoryError, LostRankError):
            raise  # already converted, by an evaluation inside training
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise BatchOutOfMemoryError(self._out_of_memory(phase, error)) from error
            if self.args.world_size > 1 and is_lost_rank(error):
                raise LostRankError(self._lost_rank(phase, error)) from error
            raise
        finally:
            self._last_batch, self._step_batches = {}, []

    def _out_of_memory(self, phase: str, error: BaseException) -> str:
        size = "per_device_train_batch_size" if phase == "training" else "per_device_eval_batch_size"
        fix = f"Lower {size} ({getattr(self.args, size)})"
        if phase == "training":
            fix += (
                f" and raise gradient_accumulation_steps ({self.args.gradient_accumulation_steps}) by as much, or set "
            )
            fix += "activation_checkpointing=True"
        shapes = _shapes(self._last_batch)
        where = f"on a batch of {shapes}" if shapes else "outside a batch"
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        step = self.state.global_step + (phase == "training")
        return f"out of memory at step {step}, in {phase} {where}. {fix}{self._memory_settings[phase]}. ({first})"

    def _lost_rank(self, phase: str, error: BaseException) -> str:
        last = newest_checkpoint(str(self.args.output_dir))
        return (
            f"rank {self.args.process_index} of {self.args.world_size}: another rank died, or did not respond for {self.args.ddp_timeout} seconds "
            f"(ddp_timeout), at step {self.state.global_step} of {self.state.max_steps}, in {phase}; see the launcher's output. "
            + (
                f"Restart all ranks with resume_from_checkpoint={last!r}"
                if last
                else "There is no checkpoint yet; restart training"
            )
            + f". ({str(error).strip().splitlines()[0]})"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """
    Whether an error means that an accelerator, the system or Python is out of memory.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")), is_out_of_memory(RuntimeError("shapes"))
        (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)


def is_lost_rank(error: BaseException) -> bool:
    """
    Whether a collective failed because another process does not respond.

    Example:
        >>> is_lost_rank(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3821"))
        True
    """
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in _LOST_RANK)


def _shapes(batch: dict[str, Any], before: str = "") -> str:
    parts = [
        _shapes(value, f"{name}.") if isinstance(value, dict) else f"{before}{name} {tuple(value.shape)}"
        for name, value in batch.items()
        if isinstance(value, dict) or (isinstance(value, torch.Tensor) and value.dim() > 1 and "mask" not in name)
    ]
    return ", ".join(parts)


def batch_examples(batch: dict[str, Any], processing_class: Any = None, items: Any = None) -> list[dict[str, list]]:
    """
    Decodes a batch to its examples, for inspection. Histories are truncated as in the batch.

    Args:
        batch: from a collator of this package: windows, packed rows, prefixes, preferences, alignment, rollouts, reward, next
            items.
        processing_class: the [`OneRecProcessor`], or the tokenizer of a text model.
        items: the item ids of a reward model or a sequence model.

    Returns:
        for each example `history` and `session` (or `chosen` and `rejected`, or `targets`), lists of item ids, with None for invalid IDs; token
        ids for the batch of a text model.

    Example:
        >>> from onerec_hf import ItemCatalogue, OneRecProcessor
        >>> catalogue = ItemCatalogue(["m4", "m17"], codes=[[0, 1], [1, 0]], codebook_sizes=[2, 2])
        >>> processor = OneRecProcessor.from_catalogue(catalogue)
        >>> batch_examples(processor([["m4", "m17"]], sessions=[["m4"]]), processor)
        [{'history': ['m4', 'm17'], 'session': ['m4']}]
    """
    batch = {name: value.detach().cpu() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    if "ntp" in batch:
        preferences = batch_examples(batch["pairs"], processing_class) if "pairs" in batch else []
        return [*batch_examples(batch["ntp"], processing_class), *preferences]
    if "completion_ids" in batch:
        prompts = right_padded(batch["prompt_ids"].flatten(0, -2), batch["prompt_mask"].flatten(0, -2))[0]
        drawn = processing_class.batch_decode(batch["completion_ids"].flatten(0, -2))
        histories = _histories(prompts, processing_class)
        return [{"history": history, "session": session} for history, session in zip(histories, drawn, strict=True)]
    if "session_input_ids" in batch:
        return [
            {"history": _ids(history, items), "session": _ids(session, items)}
            for history, session in zip(batch["input_ids"].tolist(), batch["session_input_ids"].tolist(), strict=True)
        ]
    if items is not None:
        return [
            {"history": _ids(history, items), "targets": _ids(targets, items)}
            for history, targets in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ]
    if "encoder_input_ids" in batch:
        return _preferences(batch, processing_class)
    if not isinstance(processing_class, OneRecProcessor):
        return [{name: row.tolist()} for name, value in batch.items() if name == "input_ids" for row in value]
    sessions = processing_class.batch_decode(batch["labels"])
    if "history_ranges" not in batch:
        histories = _histories(batch["input_ids"], processing_class)
        return [{"history": history, "session": session} for history, session in zip(histories, sessions, strict=True)]
    slots = batch["history_ranges"].shape[1]
    written = (batch["labels"] != -100).any(1).tolist()
    ranges = batch["history_ranges"].flatten(0, 1).tolist()
    return [
        {
            "history": _histories(batch["input_ids"][slot // slots, None, begin:end], processing_class)[0],
            "session": session,
        }
        for slot, ((begin, end), session) in enumerate(zip(ranges, sessions, strict=True))
        if written[slot]
    ]


def _histories(tokens: torch.Tensor, processor: OneRecProcessor) -> list[list]:
    """Item ids of `SEP a b c` rows: like sessions, with SEP instead of BOS before each item."""
    tokenizer = processor.tokenizer
    # Places of the user's features and of the lifelong pathway hold EOS: they are no items.
    tokens = tokens.masked_fill(tokens == tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokens = tokens.masked_fill(tokens == tokenizer.sep_token_id, tokenizer.bos_token_id)
    tokens[:, 0] = tokenizer.bos_token_id
    return processor.batch_decode(tokens)


def _ids(rows: list[int], items) -> list:
    item_ids = items.item_ids
    return [item_ids[row - 1] for row in rows if row > 0]


def _preferences(batch: dict[str, torch.Tensor], processing_class: Any) -> list[dict[str, list]]:
    prompts, answers = batch["encoder_input_ids"], batch["input_ids"]
    if isinstance(processing_class, OneRecProcessor):
        names = ("history", "chosen", "rejected")
        read, written = _histories(prompts, processing_class), processing_class.batch_decode(answers)
    else:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        read = [row[mask].tolist() for row, mask in zip(prompts, batch["encoder_attention_mask"].bool(), strict=True)]
        written = [row[mask].tolist() for row, mask in zip(answers, batch["completion_mask"].bool(), strict=True)]
    found, users = [], len(read)
    for user, prompt in enumerate(read):
        chosen, *rejected = written[user::users]
        found.append(dict(zip(names, (prompt, chosen, rejected[0] if len(rejected) == 1 else rejected), strict=True)))
    return found
