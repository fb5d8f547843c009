"""OneRec configuration: one flat config for the encoder and the sparse-MoE decoder."""

from math import prod

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_features import FeaturesConfig
from .configuration_item_head import ItemHeadConfig, item_blocks
from .configuration_lifelong import LifelongConfig
from .hub import FEATURES_FORMAT_VERSION, FORMAT_VERSION, CheckedConfig, check_sizes

# <pad>, <bos>, <eos>, <sep>: the ids below are fixed, semantic-ID tokens follow.
NUM_SPECIAL_TOKENS = 4
MOST_SESSION_ITEMS = 1000
# Options of format version 1, and what took their place.
_FORMER_OPTIONS = {
    "num_item_embeddings": "item_head={'num_items': ...}",
    "item_embedding_dropout": "item_head={'dropout': ...}",
    "item_loss_weight": "item_head={'loss_weight': ...}",
    "item_scores_with_codes": "item_head={'score_codes': ...}",
    "item_score_weight": "recommend(item_score_weight=...) or model.generation_config.item_score_weight",
    "session_loss_weights": "OneRecTrainingArguments(session_loss_weights=...)",
    "router_bias_update_rate": "OneRecTrainingArguments(router_bias_update_rate=...)",
}


@strict
class OneRecConfig(CheckedConfig, PreTrainedConfig):
    r"""
    Configuration of a OneRec generator (arXiv 2502.18965, section 3.2): an encoder over the user's history, written as
    `SEP a b c` per item, and a decoder with sparse mixture-of-experts layers that writes a session as `BOS a b c` per item.

    Token ids are computed, not looked up: code `k` of level `l` has the id `4 + sum(codebook_sizes[:l]) + k`, after `<pad>`=0,
    `<bos>`=1, `<eos>`=2 and `<sep>`=3. `vocab_size` is rounded up to a multiple of 64: a tied embedding whose rows do not divide by the
    number of FSDP shards trains wrong without a message.

    Args:
        codebook_sizes (`list[int]`, defaults to `[256, 256, 256]`):
            Codes per level of a semantic ID; its length is the number of levels.
        session_length (`int`, defaults to 5):
            Items of a session (the paper's m): the default length of `generate()` and `recommend()`.
        hidden_size, encoder_layers, decoder_layers, num_attention_heads, num_key_value_heads, head_dim:
            Width and depth of both stacks. `num_hidden_layers` reads as `decoder_layers`.
        intermediate_size (`int`, defaults to 1024):
            Width of the (SwiGLU) feed-forward layers of the encoder, and of the decoder where `num_experts` is 1.
        moe_intermediate_size (`int`, *optional*):
            Width of one expert; `intermediate_size` when not given (section 3.2: an expert is a feed-forward layer).
        num_experts, num_experts_per_tok (`int`, default to 24 and 2):
            Experts of each decoder layer and how many a token uses. `num_experts=1` gives a dense decoder.
        norm_topk_prob (`bool`, defaults to `False`):
            Whether the gates of the chosen experts are rescaled to sum to one. The paper's equation does not.
        router_aux_loss_coef, output_router_logits:
            The classic load-balancing loss, added when `output_router_logits=True`.
        encoder_is_causal (`bool`, defaults to `False`):
            Causal self-attention in the encoder; the paper's encoder is fully visible.
        encoder_attention (`str`, defaults to `"softmax"`):
            Or `"pointwise"`: self-attention without a softmax, as in HSTU ([`OneRecPointwiseAttention`]).
        encoder_pools_items (`bool`, defaults to `False`):
            Sum the embeddings of an item's tokens before the first layer: one position per item. Histories are then `tokens_per_item` times shorter
            for the encoder and for cross-attention. The paper's encoder reads the tokens.
        encoder_scales_embeddings (`bool`, defaults to `False`):
            Multiply the encoder's embeddings by `sqrt(hidden_size)`. The embeddings then outweigh the updates of the layers for longer, and item
            scores are learned in fewer steps. `inputs_embeds` are not scaled.
        decoder_scales_embeddings (`bool`, defaults to `False`):
            Multiply the decoder's embeddings by `sqrt(hidden_size)`. New embeddings are small: unscaled, the code before is drowned by the updates of
            the layers, and an item's second and third code are learned in many more steps. `decoder_inputs_embeds` are not scaled.
        cross_attention_rope (`bool`, defaults to `True`):
            Rotary positions in cross-attention too, with the session placed right after the history, so that the decoder sees how long
            ago each history item was. `False` is the plain cross-attention of T5.
        item_head (`ItemHeadConfig` or `dict`, *optional*):
            A learned vector per item beside its semantic ID, and item scores from it ([`ItemHeadConfig`]); none when not given, as in the paper.
        features (`FeaturesConfig` or `dict`, *optional*):
            Features of users, interactions and items that the encoder reads beside semantic IDs ([`FeaturesConfig`]); none when not given.
        lifelong (`LifelongConfig` or `dict`, *optional*):
            The pathway of what is older than the processor's `max_history` ([`LifelongConfig`]); none when not given.
        catalogue_hash (`str`, *optional*):
            Hash of the item catalogue that the model was trained with; another catalogue is refused.
        format_version (`int`):
            The checkpoint format; a newer format than the code's is refused.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> config = OneRecConfig(codebook_sizes=[64, 64, 64], hidden_size=32, num_attention_heads=2)
        >>> config.vocab_size, config.level_offsets, config.tokens_per_item
        (256, [4, 68, 132], 4)
    """

    model_type = "onerec"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "tokens_per_expert"]
    sub_configs = {"item_head": ItemHeadConfig, "features": FeaturesConfig, "lifelong": LifelongConfig}
    # The caches size themselves from num_hidden_layers, and they live in the decoder.
    attribute_map = {"num_hidden_layers": "decoder_layers", "num_local_experts": "num_experts"}
    base_model_fsdp_plan = None  # the inherited default names the modules of a decoder-only model

    codebook_sizes: list[int] | None = None
    session_length: int = 5
    vocab_size: int | None = None
    hidden_size: int = 256
    intermediate_size: int = 1024
    moe_intermediate_size: int | None = None
    encoder_layers: int = 4
    decoder_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    dropout_rate: float | int = 0.1
    attention_dropout: float | int = 0.0
    encoder_is_causal: bool = False
    encoder_attention: str = "softmax"
    encoder_pools_items: bool = False
    encoder_scales_embeddings: bool = False
    decoder_scales_embeddings: bool = False
    cross_attention_rope: bool = True
    num_experts: int = 24
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False
    router_aux_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    item_head: ItemHeadConfig | dict | None = None
    features: FeaturesConfig | dict | None = None
    lifelong: LifelongConfig | dict | None = None
    catalogue_hash: str | None = None
    format_version: int = FORMAT_VERSION
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    sep_token_id: int | None = 3
    decoder_start_token_id: int | None = 1

    def __post_init__(self, **kwargs):
        for name in kwargs.keys() & _FORMER_OPTIONS.keys():  # the base class accepts any name silently
            raise ValueError(f"{name} is no option of OneRecConfig any more: use {_FORMER_OPTIONS[name]}")
        if self.codebook_sizes is None:
            self.codebook_sizes = [256, 256, 256]
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        if self.vocab_size is None:
            self.vocab_size = -(-(NUM_SPECIAL_TOKENS + sum(self.codebook_sizes)) // 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if isinstance(self.item_head, dict):
            self.item_head = ItemHeadConfig(**self.item_head)
        if isinstance(self.features, dict):
            self.features = FeaturesConfig(**self.features)
        if isinstance(self.lifelong, dict):
            self.lifelong = LifelongConfig(**self.lifelong)
        low_rank = isinstance(self.item_head, ItemHeadConfig) and self.item_head.rank is not None
        if self.features is not None or self.lifelong is not None or low_rank:
            self.format_version = FEATURES_FORMAT_VERSION
        super().__post_init__(**kwargs)

    def to_dict(self):
        output = super().to_dict()
        for part in ("features", "lifelong"):  # the config.json of a model without stays as earlier versions wrote it
            if getattr(self, part) is None:
                output.pop(part, None)
        return output

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if config_dict.get("format_version", 1) == 1:
            config_dict = _from_version_1(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        check_sizes(
            self,
            sizes="hidden_size intermediate_size moe_intermediate_size head_dim num_attention_heads num_key_value_heads "
            "num_experts num_experts_per_tok session_length max_position_embeddings",
            layers="encoder_layers decoder_layers",
        )
        if self.session_length > MOST_SESSION_ITEMS:  # what generate() writes by default, and makes room for
            raise ValueError(f"session_length={self.session_length} must be at most {MOST_SESSION_ITEMS:,} items")
        if not self.codebook_sizes or min(self.codebook_sizes) < 1 or max(self.codebook_sizes) >= 2**31:
            raise ValueError(
                f"codebook_sizes must hold positive sizes, one per level; got {self.codebook_sizes!s:.200}"
            )
        if self.vocab_size < NUM_SPECIAL_TOKENS + sum(self.codebook_sizes):
            raise ValueError(
                f"vocab_size={self.vocab_size} cannot hold {NUM_SPECIAL_TOKENS} special tokens and codebooks of "
                f"{self.codebook_sizes}; leave vocab_size out and it is computed"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts and self.num_experts > 1:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} must lie between 1 and num_experts={self.num_experts}"
            )
        if self.item_head is not None and prod(self.codebook_sizes) >= 2**63:
            raise ValueError(
                f"item_head needs semantic IDs that fit into 63 bits; codebooks of {self.codebook_sizes} do not"
            )
        if isinstance(self.item_head, ItemHeadConfig) and self.item_head.rank is not None:
            item_blocks(self.item_head, self.hidden_size)
        if self.encoder_attention not in ("softmax", "pointwise"):
            raise ValueError(f"encoder_attention={self.encoder_attention!r:.80}: choose softmax or pointwise")
        if self.lifelong is not None and self.lifelong.queries * self.encoder_stride % self.tokens_per_item:
            raise ValueError(
                f"lifelong: queries={self.lifelong.queries} must be a multiple of the {self.tokens_per_item} tokens of an item, or set "
                "encoder_pools_items=True"
            )
        if self.lifelong is not None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"lifelong: hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary positions turn pairs of channels)")

    @property
    def num_codebooks(self) -> int:
        """Levels of a semantic ID."""
        return len(self.codebook_sizes)

    @property
    def tokens_per_item(self) -> int:
        """Tokens that one item takes in either stack: its separator (SEP or BOS) and one code per level."""
        return len(self.codebook_sizes) + 1

    @property
    def encoder_stride(self) -> int:
        """Tokens of a history that share a position in the encoder: all of an item with `encoder_pools_items`, otherwise one."""
        return self.tokens_per_item if self.encoder_pools_items else 1

    @property
    def sparse_layers(self) -> int:
        """Decoder layers with experts."""
        return self.decoder_layers if self.num_experts > 1 else 0

    @property
    def level_offsets(self) -> list[int]:
        """Token id of code 0 of each level."""
        return [NUM_SPECIAL_TOKENS + sum(self.codebook_sizes[:level]) for level in range(len(self.codebook_sizes))]


def _from_version_1(config: dict) -> dict:
    """A config.json of format version 1 in today's terms; what has left the config (training arguments, `item_score_weight`) is dropped."""
    gone = ("session_loss_weights", "router_bias_update_rate", "item_score_weight")
    config = {name: value for name, value in config.items() if name not in gone}
    head = {
        "num_items": config.pop("num_item_embeddings", None),
        "dropout": config.pop("item_embedding_dropout", 0.0),
        "loss_weight": config.pop("item_loss_weight", 0.0),
        "score_codes": config.pop("item_scores_with_codes", False),
    }
    return config if head["num_items"] is None else {**config, "item_head": head}


__all__ = ["MOST_SESSION_ITEMS", "NUM_SPECIAL_TOKENS", "OneRecConfig"]
