"""OneRec configuration: one flat config for the encoder and the sparse-MoE decoder."""

from math import inf, prod

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .hub import FORMAT_VERSION, check_sizes, checked_format, reading_config

# <pad>, <bos>, <eos>, <sep>: the ids below are fixed, semantic-ID tokens follow.
NUM_SPECIAL_TOKENS = 4


@strict
class OneRecConfig(PreTrainedConfig):
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
        session_loss_weights (`list[float]`, *optional*):
            What a session's items count in the training loss, first to last, relative to their mean; items beyond these count as the
            last. All the same when not given, as in the paper's equation 4. `[4, 1, 1, 1, 1]` learns first items more, which are
            what a ranking asks for. The item loss (`item_loss_weight`) is not weighed.
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
        router_bias_update_rate (`float`, defaults to 0.001):
            Step of the loss-free balancing bias (technical report, arXiv 2506.13695), which moves the choice of experts, never
            their gates. 0 switches it off. Applied by `RouterBalanceCallback`.
        router_aux_loss_coef, output_router_logits:
            The classic load-balancing loss, added when `output_router_logits=True`.
        encoder_is_causal (`bool`, defaults to `False`):
            Causal self-attention in the encoder; the paper's encoder is fully visible.
        encoder_attention (`str`, defaults to `"softmax"`):
            Or `"pointwise"`: the encoder's self-attention without a softmax, as in HSTU ([`OneRecPointwiseAttention`]).
        encoder_pools_items (`bool`, defaults to `False`):
            One place per item in the encoder: the embeddings of its tokens are summed before the first layer. Histories are then
            `tokens_per_item` times shorter for the encoder and for cross-attention; the paper's encoder reads the tokens.
        encoder_scales_embeddings (`bool`, defaults to `False`):
            The encoder multiplies what it embeds by `sqrt(hidden_size)`: what a history says directly then outweighs what its layers add
            for longer, and item scores ([`OneRecItemEmbedding`]) are learned in fewer steps. Not done to `inputs_embeds`.
        cross_attention_rope (`bool`, defaults to `True`):
            Rotary positions in cross-attention too, with the session placed right after the history, so that the decoder sees how long
            ago each history item was. `False` is the plain cross-attention of T5.
        num_item_embeddings (`int`, *optional*):
            Items of the catalogue, each of which gets a learned vector that the encoder reads beside its codes ([`OneRecItemEmbedding`]);
            none when not given, as in the paper. Items that join the catalogue later are read by their codes alone.
        item_embedding_dropout (`float`, defaults to 0):
            Share of a history's items whose vector is hidden in training.
        item_loss_weight (`float`, defaults to 0):
            Weight of a second loss: the history's state names the session's first item among all item vectors, by a softmax over the
            catalogue. Needs `num_item_embeddings`, and cannot be trained in shards.
        item_score_weight (`float`, defaults to 0):
            What that log-probability of its first item counts beside a session's own in `recommend()`, where it guides the beams from the
            first code on; needs `item_loss_weight`.
        item_scores_with_codes (`bool`, defaults to `False`):
            Items are named by the embeddings of their codes too, added to their vectors, as the encoder reads them: items that share codes
            learn from each other, and one that joins the catalogue later has a score. Needs `item_loss_weight`.
        catalogue_hash (`str`, *optional*):
            Hash of the item catalogue that the model was trained with; another catalogue is refused.
        format_version (`int`):
            The checkpoint format; a config in a newer one than the code knows is refused.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> config = OneRecConfig(codebook_sizes=[64, 64, 64], hidden_size=32, num_attention_heads=2)
        >>> config.vocab_size, config.level_offsets, config.tokens_per_item
        (256, [4, 68, 132], 4)
    """

    model_type = "onerec"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "tokens_per_expert"]
    # The caches size themselves from num_hidden_layers, and they live in the decoder.
    attribute_map = {"num_hidden_layers": "decoder_layers", "num_local_experts": "num_experts"}
    base_model_fsdp_plan = None  # the inherited default names the modules of a decoder-only model

    codebook_sizes: list[int] | None = None
    session_length: int = 5
    session_loss_weights: list[float | int] | None = None
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
    cross_attention_rope: bool = True
    num_experts: int = 24
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = False
    router_bias_update_rate: float | int = 0.001
    router_aux_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    num_item_embeddings: int | None = None
    item_embedding_dropout: float | int = 0.0
    item_loss_weight: float | int = 0.0
    item_score_weight: float | int = 0.0
    item_scores_with_codes: bool = False
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
        if self.codebook_sizes is None:
            self.codebook_sizes = [256, 256, 256]
        self.codebook_sizes = [int(size) for size in self.codebook_sizes]
        if self.session_loss_weights is not None:
            self.session_loss_weights = [float(weight) for weight in self.session_loss_weights]
        if self.vocab_size is None:
            self.vocab_size = -(-(NUM_SPECIAL_TOKENS + sum(self.codebook_sizes)) // 64) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(checked_format(config_dict), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        with reading_config(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def validate_architecture(self):
        check_sizes(
            self,
            sizes="hidden_size intermediate_size moe_intermediate_size head_dim num_attention_heads num_key_value_heads "
            "num_experts num_experts_per_tok session_length max_position_embeddings",
            layers="encoder_layers decoder_layers",
        )
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
        if self.num_item_embeddings is not None:
            check_sizes(self, sizes="num_item_embeddings", layers="")
            if prod(self.codebook_sizes) >= 2**63:
                raise ValueError(
                    f"num_item_embeddings needs semantic IDs that fit into 63 bits; codebooks of {self.codebook_sizes} do not"
                )
        weights = self.session_loss_weights
        if weights is not None and not (weights and min(weights) >= 0 and 0 < sum(weights) < inf):
            raise ValueError(
                f"session_loss_weights={weights!s:.200} must be a number for each item of a session: none negative, not all of them 0"
            )
        if min(self.item_loss_weight, self.item_score_weight) < 0:
            raise ValueError(
                f"item_loss_weight={self.item_loss_weight} and item_score_weight={self.item_score_weight} must not be negative"
            )
        if self.item_loss_weight and not self.num_item_embeddings:
            raise ValueError(
                f"item_loss_weight={self.item_loss_weight} needs num_item_embeddings, the items of the catalogue"
            )
        for name in ("item_score_weight", "item_scores_with_codes"):
            if getattr(self, name) and not self.item_loss_weight:
                raise ValueError(f"{name}={getattr(self, name)} needs item_loss_weight: nothing learns these scores")
        if not 0 <= self.item_embedding_dropout < 1:
            raise ValueError(f"item_embedding_dropout={self.item_embedding_dropout} must lie between 0 and 1")
        if self.encoder_attention not in ("softmax", "pointwise"):
            raise ValueError(f"encoder_attention={self.encoder_attention!r:.80}: choose softmax or pointwise")
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
        """Tokens of a history that share a place in the encoder: all of an item with `encoder_pools_items`, otherwise one."""
        return self.tokens_per_item if self.encoder_pools_items else 1

    @property
    def level_offsets(self) -> list[int]:
        """Token id of code 0 of each level."""
        return [NUM_SPECIAL_TOKENS + sum(self.codebook_sizes[:level]) for level in range(len(self.codebook_sizes))]


__all__ = ["NUM_SPECIAL_TOKENS", "OneRecConfig"]
