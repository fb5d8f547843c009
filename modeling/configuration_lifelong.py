"""Configuration of the lifelong pathway: how far a history beyond `max_history` is compressed."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .hub import check_sizes


@strict
class LifelongConfig(PreTrainedConfig):
    r"""
    Configuration of the lifelong pathway ([`LifelongPathway`]), an optional part of a OneRec: `OneRecConfig(lifelong={})` (technical report,
    arXiv 2506.13695, section 2.2).

    Args:
        items (`int`, defaults to 2000):
            Items that a longer history is compressed to ([`compress_history`]).
        queries (`int`, defaults to 128):
            States that the encoder reads of them; a multiple of `tokens_per_item`, unless the encoder pools items.
        layers (`int`, defaults to 2):
            Blocks of the Q-Former.

    Raises:
        ValueError: a size below 1.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> OneRecConfig(lifelong={"items": 500}).lifelong.queries
        128
    """

    model_type = "onerec_lifelong"
    base_config_key = "lifelong"

    items: int = 2000
    queries: int = 128
    layers: int = 2

    def validate_architecture(self):
        check_sizes(self, sizes="items queries", layers="layers")


__all__ = ["LifelongConfig"]
