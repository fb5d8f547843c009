"""Callbacks for training: expert balancing, a Ctrl-C that saves a checkpoint, an end before the schedule's, a limit of time."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration

logger = logging.get_logger(__name__)
Callback = TypeVar("Callback", bound=TrainerCallback)


def callback_of(trainer: Trainer, kind: type[Callback]) -> Callback | None:
    """
    The trainer's callback of this class, if it has one.

    Example:
        >>> callback_of(OneRecTrainer(...), RouterBalanceCallback).rate  # doctest: +SKIP
        0.001
    """
    return next((each for each in trainer.callback_handler.callbacks if isinstance(each, kind)), None)


class RouterBalanceCallback(TrainerCallback, ExportableState):
    """
    Loss-free balancing of the experts (technical report, arXiv 2506.13695; DeepSeek-V3): counts the tokens per expert
    over accumulation steps and ranks, and updates the routers' bias before each optimizer step. [`OneRecTrainer`] adds it automatically; pass
    it to a plain `Trainer` that trains a OneRec model with experts.

    Args:
        rate: step of the bias; 0 leaves it as it is.

    `tokens_per_expert` is the sum over all steps, (decoder_layers, num_experts), None before the first step. Checkpoints store it.

    Example:
        >>> from transformers import Trainer
        >>> trainer = Trainer(model=model, callbacks=[RouterBalanceCallback()], ...)  # doctest: +SKIP
    """

    def __init__(self, rate: float = 0.001):
        self.rate = rate
        self.tokens_per_expert: torch.Tensor | None = None
        self._tokens: torch.Tensor | None = None
        self._violations: list[float] = []
        self._hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._model = next(
            (module for module in model.modules() if isinstance(module, OneRecForConditionalGeneration)), None
        )
        if self._model is None:
            raise ValueError(f"RouterBalanceCallback needs a OneRec model; got {type(model).__name__}")
        self._tokens, self.tokens_per_expert = None, self._restored(state)
        # A frozen router keeps its bias, since an adapter's checkpoint would not store the updated one.
        if self._model.config.num_experts > 1 and self._model.model.decoder.layers[-1].mlp.gate.weight.requires_grad:
            self._hook = self._model.register_forward_hook(self._count)

    def state(self) -> dict:
        """The callback's state in checkpoints, in Trainer's format."""
        counts = self.tokens_per_expert
        return {
            "args": {"rate": self.rate},
            "attributes": {"tokens_per_expert": None if counts is None else counts.tolist()},
        }

    def _restored(self, state) -> torch.Tensor | None:
        name = type(self).__name__
        saved = state.stateful_callbacks.setdefault(name, self.state())  # missing in checkpoints of other trainers
        counts = saved["attributes"]["tokens_per_expert"] if state.global_step else None
        return None if counts is None else torch.tensor(counts, device=next(self._model.parameters()).device)

    @torch.compiler.disable  # one addition, which would recompile at every start of accumulation
    def _count(self, module, args, output):
        if output.tokens_per_expert is not None:
            self._tokens = output.tokens_per_expert + (0 if self._tokens is None else self._tokens)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._tokens is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._tokens)
        self.tokens_per_expert = self._tokens + (0 if self.tokens_per_expert is None else self.tokens_per_expert)
        load = self._tokens.float()
        self._violations.append(float((load.amax(1) / load.mean(1) - 1).mean()))
        self._model.update_router_bias(self._tokens, self.rate)
        self._tokens = None

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def pop_logs(self) -> dict[str, float]:
        """`router/max_violation` since the last call: relative excess load of the busiest expert, averaged over layers and steps."""
        if not self._violations:
            return {}
        mean, self._violations = sum(self._violations) / len(self._violations), []
        return {"router/max_violation": mean}


class RunRecordCallback(TrainerCallback, ExportableState):
    """
    Keeps a JSON object in the checkpoints of a trainer, under the callback's name in `trainer_state.json`: what a run was started with.

    Args:
        record: the object.

    Example:
        >>> RunRecordCallback({"learning_rate": 0.1}).state()["args"]
        {'record': {'learning_rate': 0.1}}
    """

    def __init__(self, record: dict):
        self.record = record

    def on_train_begin(self, args, state, control, **kwargs):
        state.stateful_callbacks[type(self).__name__] = self.state()  # missing in checkpoints of earlier versions

    def state(self) -> dict:
        """The callback's state in checkpoints, in Trainer's format."""
        return {"args": {"record": self.record}, "attributes": {}}


class InterruptCallback(TrainerCallback):
    """
    The first Ctrl-C finishes the step, saves a checkpoint and stops training; a second one interrupts immediately. `interrupted` is True
    afterwards.
    """

    def __init__(self):
        self.interrupted = False
        self._previous = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request_stop)

    def _request_stop(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        logger.warning("Ctrl-C: finishing this step and saving a checkpoint (press Ctrl-C again to stop immediately)")

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        """Restores the previous signal handler."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class LastStepCallback(TrainerCallback):
    """
    Stops the training after a number of steps, without changing the learning-rate schedule, which may be longer.

    Example:
        >>> LastStepCallback(100).steps
        100
    """

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.steps:
            control.should_training_stop = True


class TimeLimitCallback(TrainerCallback):
    """
    Ends a training after the step in which a time is over. An evaluation at the end of an epoch takes place then too.

    Args:
        seconds: time from the beginning of the training.
        clock: wall time, or `time.process_time` for CPU time.

    Attributes:
        seconds_used, epochs: time and length of the training.
        ended: whether the limit ended the training.

    Example:
        >>> trainer = SequentialTrainer(..., callbacks=[TimeLimitCallback(60)])  # doctest: +SKIP
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter):
        self.seconds, self.clock = seconds, clock
        self.seconds_used, self.epochs, self.ended = 0.0, 0.0, False
        self._began = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        if self.clock() - self._began >= self.seconds:
            self.ended = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds_used, self.epochs = self.clock() - self._began, state.epoch or 0.0
