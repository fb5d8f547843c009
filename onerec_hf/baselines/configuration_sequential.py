"""Configuration of the sequence models SASRec, HSTU, GRU4Rec and ACVAE."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from onerec_hf.modeling.configuration_features import FeaturesConfig
from onerec_hf.modeling.configuration_item_head import check_log
from onerec_hf.modeling.hub import FORMAT_VERSION, CheckedConfig, check_sizes

ARCHITECTURES = ("sasrec", "hstu", "gru4rec", "acvae")
_RECURRENT = ("gru4rec", "acvae")


@strict
class SequentialConfig(CheckedConfig, PreTrainedConfig):
    r"""
    Configuration of [`SequentialRecommender`]. The item of index i has the input id i + 1; 0 is padding.

    Args:
        architecture (`str`, defaults to `"sasrec"`):
            `"sasrec"`: causal self-attention (arXiv 1808.09781), pre-norm. `"hstu"`: pointwise attention with gates (arXiv 2402.17152), positions
            only. `"gru4rec"`: a gated recurrent network (arXiv 1511.06939). `"acvae"`: a variational autoencoder with a recurrent and a convolutional
            layer (arXiv 2103.10693).
        num_items (`int`, defaults to 1):
            Size of the catalogue.
        hidden_size (`int`, defaults to 64):
            Width of embeddings and states.
        num_hidden_layers (`int`, *optional*):
            2 when not given; 1 for `"gru4rec"` and `"acvae"`.
        num_attention_heads (`int`, defaults to 2):
            Attention heads of `"sasrec"` and `"hstu"`.
        intermediate_size (`int`, *optional*):
            Width of the feed-forward layers of `"sasrec"` (4 x `hidden_size` when not given), or of the recurrent state of `"gru4rec"`
            and `"acvae"` (2 x `hidden_size`).
        dropout_rate (`float`, defaults to 0.2):
            Dropout of embeddings and layers.
        max_history (`int`, defaults to 50):
            Latest items of a history that are read.
        scale_embeddings (`bool`, *optional*):
            Multiply embeddings by sqrt(`hidden_size`), as the code of SASRec and HSTU does; on for these two when not given.
        loss (`str`, defaults to `"ce"`):
            `"ce"`: cross-entropy over all items, the stronger one on public data (arXiv 2309.07602). `"bce"`: binary cross-entropy with one random
            negative per target (SASRec, equation 6).
        latent_size (`int`, *optional*):
            Width of the latent variable of `"acvae"`; half of `hidden_size` when not given.
        kl_weight, contrast_weight (`float`, default to 0.05 and 0.1):
            Weights of the adversarial KL term and of the contrastive term of `"acvae"`, beside the `loss`; those of the authors' code.
        item_feature_dim (`int`, defaults to 0):
            Width of the fixed item features (such as text embeddings), in addition to the learned item embeddings; 0 for none.
        features (`FeaturesConfig` or `dict`, *optional*):
            Features of users, interactions and items ([`~onerec_hf.FeaturesConfig`]) whose embeddings are added to those of the history's items; none when not given.
        score_features (`bool`, defaults to `False`):
            Add the embeddings of an item's features to the vector that it is scored by, too.
        evidence (`bool`, defaults to `False`):
            Adds evidence about pairs of items to the scores ([`~onerec_hf.baselines.add_evidence`] sets it).
        neighbours (`int`, defaults to 50):
            Length of the evidence's neighbour lists.
        content_dim (`int`, defaults to 0):
            Width of the content vectors that the evidence compares; 0 for none.
        recent (`int`, defaults to 0):
            Interactions of the log by which the evidence counts what is asked for lately (`add_evidence` sets it where it predicts better).
        item_id_bytes (`int`, *optional*):
            How the item ids are saved with the weights: 0 for integers, the length of the longest string in UTF-8 otherwise, `None` without ids.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of new embeddings.
        format_version (`int`):
            The checkpoint format; a newer one is refused.

    Example:
        >>> SequentialConfig(architecture="gru4rec", num_items=100).intermediate_size
        128
    """

    model_type = "onerec_baseline"
    sub_configs = {"features": FeaturesConfig}  # pyright: ignore[reportAssignmentType]

    architecture: str = "sasrec"
    num_items: int = 1
    hidden_size: int = 64
    num_hidden_layers: int | None = None
    num_attention_heads: int = 2
    intermediate_size: int | None = None
    dropout_rate: float | int = 0.2
    max_history: int = 50
    scale_embeddings: bool | None = None
    loss: str = "ce"
    latent_size: int | None = None
    kl_weight: float | int = 0.05
    contrast_weight: float | int = 0.1
    item_feature_dim: int = 0
    features: FeaturesConfig | dict | None = None
    score_features: bool = False
    evidence: bool = False
    recent: int | bool = 0  # an earlier version wrote false
    neighbours: int = 50
    content_dim: int = 0
    item_id_bytes: int | None = None
    initializer_range: float = 0.02
    format_version: int = FORMAT_VERSION
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        recurrent = self.architecture in _RECURRENT
        if self.num_hidden_layers is None:
            self.num_hidden_layers = 1 if recurrent else 2
        if self.intermediate_size is None:
            self.intermediate_size = (2 if recurrent else 4) * self.hidden_size
        if self.latent_size is None:
            self.latent_size = max(1, self.hidden_size // 2)
        if self.scale_embeddings is None:
            self.scale_embeddings = not recurrent
        if isinstance(self.features, dict):
            self.features = FeaturesConfig(**self.features)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {self.architecture!r}")
        if self.loss not in ("ce", "bce"):
            raise ValueError(f'loss must be "ce" or "bce"; got {self.loss!r}')
        check_sizes(
            self,
            sizes="num_items hidden_size num_hidden_layers num_attention_heads intermediate_size latent_size max_history neighbours",
            layers="num_hidden_layers",
        )
        for name in ("kl_weight", "contrast_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number from 0 on")
        features: Any = self.features
        if features and features.pathways is not None:
            raise ValueError("a sequence model reads one history: leave pathways out of its features")
        if self.score_features and not (features and features.item_slots):
            raise ValueError("score_features=True needs features of items")
        widths = {"item_feature_dim": 2**31, "content_dim": 2**31, "item_id_bytes": 2**20}
        for name, most in widths.items():
            if not 0 <= (getattr(self, name) or 0) < most:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative, nor larger than any item's")
        check_log(self)
        if self.architecture not in _RECURRENT and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )


__all__ = ["ARCHITECTURES", "SequentialConfig"]
