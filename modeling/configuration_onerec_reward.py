"""Configuration of the session reward model."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .hub import FORMAT_VERSION, CheckedConfig, check_sizes


@strict
class OneRecRewardConfig(CheckedConfig, PreTrainedConfig):
    r"""
    Configuration of [`OneRecForSessionReward`] (arXiv 2502.18965, section 3.3: the reward model R(u, S)). The paper gives no sizes.

    The item of index i in [`RewardItems`] has the input id i + 1; 0 is padding.

    Args:
        num_items (`int`, defaults to 1):
            Number of items.
        item_feature_dim (`int`, defaults to 0):
            Width of the fixed item features, in addition to the learned item embeddings; 0 for none.
        statistics_dim (`int`, defaults to 0):
            Width of the items' statistics of an earlier period, which may be replaced by later ones (`set_statistics`); 0 for none.
        objectives (`list[str]`, defaults to `["swt", "vtr", "wtr", "ltr"]`):
            One sigmoid tower each: session watch time, view, follow and like rates (equation 6). They become `id2label`.
        base_rates (`list[float]`, *optional*):
            Mean label of each objective in training. A new model's towers start from predicting them, and `score()` measures against
            them; `[0.5, ...]` when not given.
        score_weights (`dict[str, float]`, *optional*):
            Weight of each objective in `score()`; objectives that are left out count nothing, and every one counts 1 when not given.
        score_fusion (`str`, defaults to `"lift"`):
            `"lift"`: the weighted mean of `r_k / base_rate_k`, so that a session like the average one scores 1 and rare objectives count
            as much as common ones; `"probability"`: the weighted mean of `r_k` (the paper does not specify the fusion); `"p_score"`: the
            P-Score of OneRec's technical report (arXiv 2506.13695), a head that reads the towers' states and the states of user and session
            and is trained on the sum of the objectives' cross-entropies, weighted by `score_weights`.
        pooling (`str`, defaults to `"sum"`):
            How a session's items are pooled before the towers: `"sum"` (equation 6) or `"mean"`.
        hidden_size, num_attention_heads, intermediate_size:
            Width of items, attention and feed-forward layers.
        history_layers, session_layers (`int`, default to 1):
            Self-attention layers over the history and over the session's items (equation 5).
        tower_size (`int`, defaults to 32):
            Width of a tower's hidden layer.
        max_history (`int`, defaults to 50):
            Latest items of a history that are read.
        items_hash (`str`, *optional*):
            Hash of the items' ids in order; a model refuses other items.
        feature_fingerprint (`str`, *optional*):
            Identifies the item features (`onerec_hf.semantic_ids.embedding_fingerprint`).
        format_version (`int`):
            The checkpoint format; a newer format than the code's is refused.

    Example:
        >>> from onerec_hf import OneRecRewardConfig
        >>> OneRecRewardConfig(num_items=100, objectives=["vtr", "ltr"], base_rates=[0.3, 0.02]).id2label
        {0: 'vtr', 1: 'ltr'}
    """

    model_type = "onerec_reward"
    keys_to_ignore_at_inference = ["p_score_logits"]
    encoder_is_causal = False  # not a field: the generator's encoder layers, which this model uses, read it
    base_model_fsdp_plan = None

    num_items: int = 1
    item_feature_dim: int = 0
    statistics_dim: int = 0
    objectives: list[str] | None = None
    base_rates: list[float] | None = None
    score_weights: dict[str, float | int] | None = None
    score_fusion: str = "lift"
    pooling: str = "sum"
    hidden_size: int = 64
    intermediate_size: int = 128
    history_layers: int = 1
    session_layers: int = 1
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tower_size: int = 32
    hidden_act: str = "silu"
    max_history: int = 50
    max_position_embeddings: int = 512
    rope_parameters: RopeParameters | dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    dropout_rate: float | int = 0.1
    attention_dropout: float | int = 0.0
    items_hash: str | None = None
    feature_fingerprint: str | None = None
    format_version: int = FORMAT_VERSION
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.objectives is None:
            self.objectives = ["swt", "vtr", "wtr", "ltr"]
        if self.base_rates is None:
            self.base_rates = [0.5] * len(self.objectives)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        kwargs["id2label"] = dict(enumerate(self.objectives))
        kwargs["label2id"] = {name: k for k, name in enumerate(self.objectives)}
        kwargs["problem_type"] = "multi_label_classification"
        kwargs.pop("num_labels", None)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        check_sizes(
            self,
            sizes="num_items hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim tower_size max_history "
            "max_position_embeddings",
            layers="history_layers session_layers item_feature_dim statistics_dim",
        )
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives must be distinct names, at least one; got {self.objectives}")
        if len(self.base_rates) != len(self.objectives) or not all(0 < rate < 1 for rate in self.base_rates):
            raise ValueError(
                f"base_rates must hold one number between 0 and 1 for each of {self.objectives}; got {self.base_rates}. An objective "
                "that never or always happens in training cannot be learned: leave it out"
            )
        unknown = set(self.score_weights or ()) - set(self.objectives)
        if unknown:
            raise ValueError(f"score_weights names {sorted(unknown)}; the objectives are {self.objectives}")
        if self.score_weights is not None and not sum(self.score_weights.values()):
            raise ValueError(f"score_weights must not sum to zero; got {self.score_weights}")
        if self.score_fusion not in ("lift", "probability", "p_score"):
            raise ValueError(f'score_fusion must be "lift", "probability" or "p_score"; got {self.score_fusion!r}')
        if self.score_fusion == "p_score" and min((self.score_weights or {"": 1.0}).values()) < 0:
            raise ValueError(f'score_fusion="p_score" needs score_weights of at least 0; got {self.score_weights}')
        if self.pooling not in ("sum", "mean"):
            raise ValueError(f'pooling must be "sum" or "mean"; got {self.pooling!r}')
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary positions turn pairs of channels)")


__all__ = ["OneRecRewardConfig"]
