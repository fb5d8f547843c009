"""OneRec-V2 configuration (arXiv 2508.20900): a context without encoder layers, and a lazy decoder that reads it."""

from huggingface_hub.dataclasses import strict

from .configuration_onerec import OneRecConfig

# Options of OneRecConfig about the layers of an encoder, with the only value that a model without them has.
_OF_AN_ENCODER = {
    "encoder_layers": 0,
    "encoder_is_causal": True,
    "encoder_attention": "softmax",
    "encoder_scales_embeddings": False,
}


@strict
class OneRecV2Config(OneRecConfig):
    r"""
    Configuration of a OneRec-V2 generator (arXiv 2508.20900, section 2): the history is embedded and mapped once to the keys and values of the
    decoder's cross-attention. No layer runs over the history, so a long one costs little. Options that are not listed here are those of
    [`OneRecConfig`]; those of encoder layers do not apply.

    The history has a position per item, the sum of its tokens' embeddings (`encoder_pools_items=True`): without encoder layers the codes of an
    item do not meet otherwise.

    Args:
        decoder_layers (`int`, defaults to 8):
            Decoder blocks (the paper's N_layer).
        session_length (`int`, defaults to 1):
            Items that `generate()` and `recommend()` write by default: V2 is trained on the newest one.
        context_layers (`int`, defaults to 1):
            Different sets of keys and values (L_kv): block l of N reads set `floor(l * context_layers / N)`.
        context_split (`int`, defaults to 1):
            1: keys are the values, before rotation. 2: both have channels of their own (S_kv).
        context_groups (`int`, *optional*):
            Heads of the context's keys and values (G_kv), a divisor of `num_attention_heads` and equal to it when not given. Query head h reads group
            `h % context_groups`.
        num_experts (`int`, defaults to 1):
            Routed experts of a block; dense when 1.
        num_shared_experts (`int`, defaults to 1):
            Experts of `moe_intermediate_size` that every token uses, beside the routed ones.
        first_dense_layers (`int`, defaults to 0):
            Blocks at the beginning without experts (2 in the paper's 4B model).

    Example:
        >>> from onerec_hf import OneRecV2Config
        >>> config = OneRecV2Config(codebook_sizes=[64, 64, 64], hidden_size=32, num_attention_heads=4, context_groups=2, context_split=2)
        >>> config.head_dim, config.context_width
        (8, 32)
    """

    model_type = "onerec_v2"

    session_length: int = 1
    encoder_layers: int = 0
    decoder_layers: int = 8
    encoder_is_causal: bool = True
    encoder_pools_items: bool = True
    context_layers: int = 1
    context_split: int = 1
    context_groups: int | None = None
    num_experts: int = 1
    num_shared_experts: int = 1
    first_dense_layers: int = 0

    def __post_init__(self, **kwargs):
        if self.context_groups is None:
            self.context_groups = self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        for name, value in _OF_AN_ENCODER.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r:.40}: OneRec-V2 has no encoder layers; leave the option out"
                )
        if self.context_split not in (1, 2):
            raise ValueError(f"context_split={self.context_split}: choose 1 (keys are the values) or 2")
        if not 1 <= self.context_layers <= self.decoder_layers:
            raise ValueError(
                f"context_layers={self.context_layers} must lie between 1 and decoder_layers={self.decoder_layers}"
            )
        if self.context_groups < 1 or self.num_attention_heads % self.context_groups:
            raise ValueError(
                f"context_groups={self.context_groups} must divide num_attention_heads={self.num_attention_heads}"
            )
        if self.num_experts > 1 and not 0 <= self.first_dense_layers < self.decoder_layers:
            raise ValueError(
                f"first_dense_layers={self.first_dense_layers} leaves no block with experts: choose 0 to {self.decoder_layers - 1}, "
                "or num_experts=1"
            )
        if not 0 <= self.num_shared_experts <= 1000:
            raise ValueError(f"num_shared_experts={self.num_shared_experts} must lie between 0 and 1000")
        if self.item_head is not None and self.item_head.loss_weight:
            raise ValueError(
                f"item_head has loss_weight={self.item_head.loss_weight:g}: OneRec-V2 has no state of a history to score items by. Set it to 0, "
                "and the context reads the item vectors"
            )

    @property
    def context_width(self) -> int:
        """Channels of the context per position of the history (d_context)."""
        return self.context_split * self.context_layers * (self.context_groups or 0) * (self.head_dim or 0)

    @property
    def sparse_layers(self) -> int:
        """Decoder blocks with experts."""
        return self.decoder_layers - self.first_dense_layers if self.num_experts > 1 else 0


__all__ = ["OneRecV2Config"]
