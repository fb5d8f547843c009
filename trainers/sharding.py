"""Models that ranks hold in shards (transformers' DistributedConfig): a whole copy to generate with, a sharded one as reference."""

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

# What a model has besides its weights.
_BESIDE = ("catalogue", "items", "generation_config")


def is_sharded(model: Any) -> bool:
    """Whether `from_pretrained(distributed_config=...)` gave each rank a part of the weights."""
    return getattr(model, "is_distributed_loading_by_transformers", False)


@contextmanager
def unsharded_model(model: PreTrainedModel) -> Iterator[Any]:
    """
    `model` itself, or for a sharded one (an adapter around it as well) a plain copy in evaluation mode with all its weights, on every rank, for as long as the context
    lasts; all ranks have to enter it.

    Beam search on shards would gather every layer's weights at each code, and hang where one rank has a batch more than another. The copy
    costs the memory of the weights alone: no gradients, no optimizer.

    Example:
        >>> with unsharded_model(trainer.model) as generator:  # doctest: +SKIP
        ...     sessions = generator.recommend(**batch)
    """
    if not is_sharded(model):
        yield model
        return
    config = copy.copy(model.config)
    config.distributed_config = None
    whole = _empty_like(model, config)
    _fill(whole, model, {name: _whole(value) for name, value in model.state_dict().items()})
    yield whole.eval()


def shard(model: PreTrainedModel, distributed_config: DistributedConfig) -> PreTrainedModel:
    """
    The rank's shard of a whole model that all ranks have alike, a new one, say; a saved one is sharded as it is read by
    `from_pretrained(..., distributed_config=...)`, without being whole anywhere.

    Raises:
        ValueError: sizes that do not fit the ranks or the model.

    Example:
        >>> model = shard(OneRecForConditionalGeneration(config), DistributedConfig(fsdp_size=2, ep_size=2))  # doctest: +SKIP
    """
    return _sharded(model, dict(model.state_dict()), distributed_config)


def sharded_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a sharded model, sharded alike: what `copy.deepcopy` is for a plain one. On its way it is whole, in each rank's CPU memory."""
    state = {name: _whole(value).cpu() for name, value in model.state_dict().items()}
    return _sharded(model, state, model.config.distributed_config)


def _sharded(model: PreTrainedModel, state: dict[str, torch.Tensor], distributed_config) -> PreTrainedModel:
    config = copy.copy(model.config)
    config.distributed_config = None
    # FSDP puts a class of its own in front of the model's.
    original: Any = next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))
    sharded = original.from_pretrained(
        None, config=config, state_dict=state, distributed_config=distributed_config, dtype=model.dtype
    )
    _set_beside(sharded, model)
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
        if name not in state:  # those that no state dict holds
            owner, _, last = name.rpartition(".")
            setattr(empty.get_submodule(owner), last, buffer.clone())
    empty.tie_weights()
    _set_beside(empty, model)


def _set_beside(empty: Any, model: Any) -> None:
    empty, model = (each.get_base_model() if isinstance(each, PeftModel) else each for each in (empty, model))
    for name in _BESIDE:
        if name in vars(model):
            setattr(empty, name, getattr(model, name))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()
