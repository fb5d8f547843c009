"""Sharded models (transformers' DistributedConfig): an unsharded copy for generation, and sharded copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

# Attributes of a model besides its weights.
_ATTRIBUTES = ("catalogue", "items", "generation_config")


def is_sharded(model: Any) -> bool:
    """Whether the model was loaded with `from_pretrained(distributed_config=...)`."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


@contextmanager
def unsharded_model(model: PreTrainedModel) -> Iterator[Any]:
    """
    The model itself, or for a sharded model (also with an adapter) an unsharded copy in evaluation mode on every rank, inside the context.
    All ranks must enter it.

    Beam search on shards would gather the weights of every layer for each code, and deadlock if ranks have unequal numbers of batches. The
    copy takes the memory of the weights only: no gradients, no optimizer.

    Example:
        >>> with unsharded_model(trainer.model) as generator:  # doctest: +SKIP
        ...     sessions = generator.recommend(**batch)
    """
    if not is_sharded(model):
        yield model
        return
    config = copy.copy(model.config)
    config.distributed_config = None
    unsharded = _empty_like(model, config)
    _fill(unsharded, model, {name: _full(value) for name, value in model.state_dict().items()})
    yield unsharded.eval()


def shard(model: PreTrainedModel, distributed_config: DistributedConfig) -> PreTrainedModel:
    """
    Shards a model that is equal on all ranks, such as a new one. A saved model is sharded while loading with
    `from_pretrained(..., distributed_config=...)`, without an unsharded copy.

    Raises:
        ValueError: sizes that do not match the ranks or the model.

    Example:
        >>> model = shard(OneRecForConditionalGeneration(config), DistributedConfig(fsdp_size=2, ep_size=2))  # doctest: +SKIP
    """
    return _sharded(model, dict(model.state_dict()), distributed_config)


def sharded_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a sharded model with the same sharding. The full weights pass through each rank's CPU memory."""
    state = {name: _full(value).cpu() for name, value in model.state_dict().items()}
    return _sharded(model, state, model.config.distributed_config)


def _sharded(model: PreTrainedModel, state: dict[str, torch.Tensor], distributed_config) -> PreTrainedModel:
    config = copy.copy(model.config)
    config.distributed_config = None
    # FSDP inserts a class in front of the model's class.
    original: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    sharded = original.from_pretrained(
        None, config=config, state_dict=state, distributed_config=distributed_config, dtype=model.dtype
    )
    _copy_attributes(sharded, model)
    return sharded.train(model.training)


def _empty_like(model: Any, config) -> Any:
    with torch.device("meta"):
        if isinstance(model, PeftModel):
            base = _empty_like(model.get_base_model(), config)
            return get_peft_model(base, model.active_peft_config, adapter_name=model.active_adapter)
        return type(model)(config)


def _fill(empty: Any, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> None:
    empty.load_state_dict(state, assign=True)
    for name, buffer in model.named_buffers():
        if name not in state:  # non-persistent buffers
            owner, _, last = name.rpartition(".")
            setattr(empty.get_submodule(owner), last, buffer.clone())
    empty.tie_weights()
    _copy_attributes(empty, model)


def _copy_attributes(empty: Any, model: Any) -> None:
    empty, model = (each.get_base_model() if isinstance(each, PeftModel) else each for each in (empty, model))
    for name in _ATTRIBUTES:
        if name in vars(model):
            setattr(empty, name, getattr(model, name))


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()
