"""
The session reward model R(u, S) of OneRec (arXiv 2502.18965, section 3.3): the rates at which a user responds to a whole session.

Choices where the paper leaves details open: the target-aware item is `W [v_i; u_i; v_i * u_i]` with `u_i` the history as target attention from
item `v_i` sees it; the history passes through self-attention layers first, behind a learned vector that an empty history reads alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, auto_docstring, can_return_tuple

from .configuration_onerec_reward import OneRecRewardConfig
from .hub import HubModel
from .layers_onerec import OneRecCrossAttention, OneRecEncoderLayer, OneRecRMSNorm, OneRecRotaryEmbedding
from .processing_onerec_reward import REWARD_ITEMS_NAME, RewardItems

MISSING_LABEL = -100


@dataclass
class OneRecRewardOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*):
            Masked binary cross-entropy, with labels; of the P-Score too where the model has one.
        logits (`torch.FloatTensor` of shape `(sessions, objectives)`):
            Before the sigmoid.
        p_score_logits (`torch.FloatTensor` of shape `(sessions,)`, *optional*):
            The P-Score before the sigmoid, of models with `score_fusion="p_score"`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    p_score_logits: torch.FloatTensor | None = None


def masked_bce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Equation 7 for labels in [0, 1], some of which may be missing (-100): the binary cross-entropy summed over a session's objectives, mean
    over sessions. Missing labels add nothing, neither to the loss nor to a gradient.

    Args:
        logits, labels: (sessions, objectives).

    Example:
        >>> masked_bce(torch.zeros(2, 2), torch.tensor([[1.0, -100.0], [0.5, 0.0]]))  # three times log 2, over two sessions
        tensor(1.0397)
    """
    missing = labels == MISSING_LABEL
    each = F.binary_cross_entropy_with_logits(
        logits.float(), labels.float().masked_fill(missing, 0.0), reduction="none"
    )
    return each.masked_fill(missing, 0.0).sum() / len(labels)


def within_user_loss(logits: torch.Tensor, labels: torch.Tensor, users: torch.Tensor) -> torch.Tensor:
    """
    Pairwise logistic loss between the sessions of one user, per objective: `-|y_i - y_j| log sigmoid(l_i - l_j)` where `y_i > y_j`. A session
    counts with the mean over the user's others, and the loss is the sum over objectives, mean over sessions.

    Args:
        logits, labels: (sessions, objectives), labels -100 where missing.
        users: (sessions,) equal numbers for sessions of one user.

    Example:
        >>> labels, users = torch.tensor([[1.0], [0.0], [0.0]]), torch.tensor([7, 7, 8])
        >>> within_user_loss(torch.zeros(3, 1), labels, users)  # one pair of three sessions: log 2 / 3
        tensor(0.2310)
    """
    same = users[:, None] == users[None]
    i, j = torch.nonzero(same.triu(1), as_tuple=True)
    known = (labels[i] != MISSING_LABEL) & (labels[j] != MISSING_LABEL)
    gaps = (labels[i] - labels[j]).float().masked_fill(~known, 0.0)
    margins = (logits[i] - logits[j]).float() * gaps.sign()
    others = (same.sum(1) - 1)[i].unsqueeze(-1)
    return (gaps.abs() * F.softplus(-margins) / others).sum() / len(labels)


class OneRecRewardLogit(nn.Linear):
    """The last layer of a tower or of the P-Score. It is a class so that `_init_weights` can initialise it to the base rate."""

    def __init__(self, in_features: int, rate: float):
        super().__init__(in_features, 1)
        self.rate = rate


class OneRecRewardItemEmbedding(nn.Embedding):
    """
    Learned item embeddings. With item features they start at zero: a rare item is then represented by its features, where a random vector
    would be noise.
    """


class OneRecRewardWide(nn.Linear):
    """
    Adds a linear function of the session's mean statistics to the logits of the objectives and of the P-Score. Weights start at zero; inputs are
    scaled, so that a few hundred steps at the trainer's learning rate reach weights near 1.
    """

    scale = 10.0

    def __init__(self, config: OneRecRewardConfig):
        heads = len(config.objectives) + (config.score_fusion == "p_score")
        super().__init__(config.statistics_dim, heads, bias=False)

    def forward(self, statistics):
        return super().forward(self.scale * statistics)


class OneRecRewardTower(nn.Module):
    """The MLP of one objective (equation 6), up to its sigmoid."""

    def __init__(self, config: OneRecRewardConfig, objective: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.tower_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout_rate)
        self.out_proj = OneRecRewardLogit(config.tower_size, config.base_rates[objective])

    def forward(self, states):
        """(sessions, 1) logits and the (sessions, tower_size) states before them."""
        states = self.act_fn(self.up_proj(states))
        return self.out_proj(self.dropout(states)), states


class OneRecRewardPScore(nn.Module):
    """
    The P-Score (arXiv 2506.13695): one logit from the towers' states, the user's and the session's. Its target is the objectives' mean label by
    `config.score_weights`: cross-entropies with one prediction, weighted and summed, are that of their mean label.
    """

    def __init__(self, config: OneRecRewardConfig):
        super().__init__()
        weights = config.score_weights or {}
        weights = [float(weights.get(name, 0.0 if weights else 1.0)) for name in config.objectives]
        self.weights = [weight / sum(weights) for weight in weights]
        width = len(config.objectives) * config.tower_size + 2 * config.hidden_size
        self.up_proj = nn.Linear(width, config.tower_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout_rate)
        rate = sum(weight * rate for weight, rate in zip(self.weights, config.base_rates, strict=True))
        self.out_proj = OneRecRewardLogit(config.tower_size, rate)

    def forward(self, states):
        return self.out_proj(self.dropout(self.act_fn(self.up_proj(states)))).squeeze(-1)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """(sessions, 1) weighted mean of (sessions, objectives) labels, -100 where an objective with a weight is missing."""
        labels = labels.float()  # integers would round the weights to 0
        weights = labels.new_tensor(self.weights)
        missing = ((labels == MISSING_LABEL) & (weights > 0)).any(1, keepdim=True)
        mean = (labels.masked_fill(labels == MISSING_LABEL, 0.0) * weights).sum(1, keepdim=True)
        return mean.masked_fill(missing, MISSING_LABEL)


@auto_docstring
class OneRecRewardPreTrainedModel(HubModel, PreTrainedModel):
    config: OneRecRewardConfig
    _auto_map = {
        "AutoConfig": "configuration_onerec_reward.OneRecRewardConfig",
        "AutoModelForSequenceClassification": "modeling_onerec_reward.OneRecForSessionReward",
    }
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecEncoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, OneRecRewardLogit):
            init.constant_(module.bias, float(torch.logit(torch.tensor(module.rate))))
            init.zeros_(module.weight)
            return
        if isinstance(module, OneRecRewardItemEmbedding) and self.config.item_feature_dim:
            init.zeros_(module.weight)
            return
        if isinstance(module, OneRecRewardWide):
            init.zeros_(module.weight)
            return
        super()._init_weights(module)
        if isinstance(module, OneRecForSessionReward):
            init.normal_(module.history_start, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.item_features)
            if module.item_statistics is not None:
                init.zeros_(module.item_statistics)


class OneRecForSessionReward(OneRecRewardPreTrainedModel):
    """
    Scores sessions of items for a user: one probability per objective, and one number fused from them.

    Registered for `AutoModelForSequenceClassification`: like a text reward model, it gives a sequence one logit per label
    (`problem_type="multi_label_classification"`).

    Example:
        >>> from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
        >>> items = RewardItems(["m17", "m4", "m256"])
        >>> model = OneRecForSessionReward(OneRecRewardConfig(num_items=3, objectives=["vtr", "ltr"], base_rates=[0.3, 0.02]))
        >>> model.set_items(items)
        >>> rewards = model.reward([["m4"], []], [["m17", "m256"], ["m4"]])  # an untrained one predicts base rates: lift 1
        >>> [round(reward, 3) for reward in rewards]
        [1.0, 1.0]
    """

    # Labels are averaged over sessions, and Trainer's `num_items_in_batch` counts labels: it divides by accumulation steps instead.
    accepts_loss_kwargs = False
    main_input_name = "input_ids"
    _fsdp_plan = {"history_layers.*": "free_full_weight", "session_layers.*": "free_full_weight"}
    _files_beside = (REWARD_ITEMS_NAME,)

    def __init__(self, config: OneRecRewardConfig):
        super().__init__(config)
        width = config.hidden_size
        self.items: RewardItems | None = None
        self.item_embedding = OneRecRewardItemEmbedding(config.num_items + 1, width, padding_idx=0)
        self.item_features = nn.Buffer(torch.zeros(config.num_items + 1, config.item_feature_dim))
        self.feature_proj = nn.Linear(config.item_feature_dim, width, bias=False) if config.item_feature_dim else None
        # Models without statistics keep the tensors that they were saved with.
        read = config.statistics_dim > 0
        self.item_statistics = nn.Buffer(torch.zeros(config.num_items + 1, config.statistics_dim)) if read else None
        self.statistics_proj = nn.Linear(config.statistics_dim, width, bias=False) if read else None
        self.statistics_wide = OneRecRewardWide(config) if read else None
        self.item_norm = OneRecRMSNorm(width, config.rms_norm_eps)
        self.history_start = nn.Parameter(torch.empty(width))
        self.history_layers = nn.ModuleList([OneRecEncoderLayer(config, i) for i in range(config.history_layers)])
        self.history_norm = OneRecRMSNorm(width, config.rms_norm_eps)
        self.target_attn = OneRecCrossAttention(config, 0, is_causal=False)
        self.target_proj = nn.Linear(3 * width, width)
        self.session_layers = nn.ModuleList([OneRecEncoderLayer(config, i) for i in range(config.session_layers)])
        self.session_norm = OneRecRMSNorm(width, config.rms_norm_eps)
        self.rotary_emb = OneRecRotaryEmbedding(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.towers = nn.ModuleList([OneRecRewardTower(config, k) for k in range(len(config.objectives))])
        self.p_score = OneRecRewardPScore(config) if config.score_fusion == "p_score" else None
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.item_embedding

    def set_input_embeddings(self, value):
        self.item_embedding = value

    def set_items(self, items: RewardItems, features: np.ndarray | torch.Tensor | None = None) -> None:
        """
        Sets the ids of the model's items, and for a new model their features, which are saved with its weights.

        Args:
            items: N items in the order of their indices.
            features: (N, item_feature_dim) finite floats, row by row.

        Raises:
            ValueError: another number of items than `config.num_items`, other items than `config.items_hash`, features of another
                shape or not finite.
        """
        if len(items) != self.config.num_items:
            raise ValueError(f"the model was made for {self.config.num_items} items; the table has {len(items)}")
        if self.config.items_hash not in (None, items.hash):
            raise ValueError(
                f"these items (hash {items.hash[:12]}) are not those that the reward model was trained with "
                f"({self.config.items_hash[:12]}); load it from the folder that it was saved to"
            )
        if features is not None:
            self.item_features[1:] = self._item_rows("features", features, items)
        self.items, self.config.items_hash = items, items.hash

    def set_statistics(self, statistics: np.ndarray | torch.Tensor) -> None:
        """
        Replaces the items' statistics by those of a later period, computed in the same way
        ([`~onerec_hf.data.feedback.item_statistics.ItemStatistics`]). They are saved with the weights.

        Args:
            statistics: (N, statistics_dim) finite floats, row by row.

        Raises:
            ValueError: a model without statistics or without items, statistics of another shape or not finite.
        """
        if self.item_statistics is None or self.items is None:
            what = "statistics (statistics_dim=0)" if self.item_statistics is None else "item ids (set_items)"
            raise ValueError(f"set_statistics: this reward model has no {what}")
        self.item_statistics[1:] = self._item_rows("statistics", statistics, self.items)

    def _item_rows(self, what: str, values: np.ndarray | torch.Tensor, items: RewardItems) -> torch.Tensor:
        """(items, d) values as the model's buffer of this kind holds them, or ValueError."""
        values = torch.as_tensor(np.asarray(values))
        buffer, width = getattr(self, f"item_{what}"), "item_feature_dim" if what == "features" else "statistics_dim"
        expected = (len(items), buffer.shape[1])
        if tuple(values.shape) != expected:
            raise ValueError(f"item {what}: expected shape {expected} (items, {width}), got {tuple(values.shape)}")
        bad = ~torch.isfinite(values).all(1)
        if bad.any():
            first = items.item_ids[int(bad.nonzero()[0])]
            raise ValueError(
                f"item {what}: {int(bad.sum())} of {len(values)} rows hold NaN or infinity (first: item {first!r})"
            )
        return values.to(buffer)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.item_embedding(ids)
        if self.feature_proj is not None:
            states = states + self.feature_proj(self.item_features[ids].to(states.dtype))
        if self.statistics_proj is not None:
            states = states + self.statistics_proj(self.item_statistics[ids].to(states.dtype))
        return self.item_norm(states)

    def _positions(self, states: torch.Tensor, first: int = 0):
        positions = torch.arange(first, first + states.shape[1], device=states.device).unsqueeze(0)
        return self.rotary_emb(states, positions)

    def _encode_history(self, input_ids, attention_mask) -> tuple[torch.Tensor, torch.Tensor]:
        """(users, 1 + t, width) states and (users, 1 + t) mask; the first position is never padding."""
        states = torch.cat([self.history_start.expand(len(input_ids), 1, -1), self._embed(input_ids)], dim=1)
        mask = F.pad(attention_mask, (1, 0), value=1)
        attend = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=mask)
        states, positions = self.dropout(states), self._positions(states)
        for layer in self.history_layers:
            states = layer(states, attention_mask=attend, position_embeddings=positions)
        return self.history_norm(states), mask

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor,
        session_input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        session_attention_mask: torch.LongTensor | None = None,
        history_index: torch.LongTensor | None = None,
        labels: torch.FloatTensor | None = None,
        **kwargs,
    ) -> OneRecRewardOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(users, t)`):
            Item indices + 1 of the histories, oldest first, padded with 0 on the right.
        session_input_ids (`torch.LongTensor` of shape `(sessions, m)`):
            Item indices + 1 of the sessions, padded with 0 on the right.
        session_attention_mask (`torch.LongTensor` of shape `(sessions, m)`, *optional*):
            1 on items, 0 on padding; from `session_input_ids` when not given, as `attention_mask` from `input_ids`.
        history_index (`torch.LongTensor` of shape `(sessions,)`, *optional*):
            Which row of `input_ids` each session belongs to, so that a history with many sessions is read once; row by row when not given.
        labels (`torch.FloatTensor` of shape `(sessions, objectives)`, *optional*):
            Numbers in [0, 1]; -100 where missing.
        """
        attention_mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        session_mask = (session_input_ids != 0).long() if session_attention_mask is None else session_attention_mask
        history, history_mask = self._encode_history(input_ids, attention_mask)
        if history_index is not None:
            history, history_mask = history[history_index], history_mask[history_index]
        items = self._embed(session_input_ids)
        see_history = create_bidirectional_mask(
            config=self.config, inputs_embeds=items, attention_mask=history_mask, encoder_hidden_states=history
        )
        seen, _ = self.target_attn(items, history, attention_mask=see_history)
        states = self.dropout(self.target_proj(torch.cat([items, seen, items * seen], dim=-1)))
        see_session = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=session_mask)
        positions = self._positions(states)
        for layer in self.session_layers:
            states = layer(states, attention_mask=see_session, position_embeddings=positions)
        weights = session_mask.to(states.dtype)
        pooled = (self.session_norm(states) * weights.unsqueeze(-1)).sum(1)
        if self.config.pooling == "mean":
            pooled = pooled / weights.sum(1, keepdim=True)
        logits, hidden = (
            torch.cat(parts, dim=-1) for parts in zip(*(tower(pooled) for tower in self.towers), strict=True)
        )
        wide = None
        if self.statistics_wide is not None:
            statistics = self.item_statistics[session_input_ids].to(weights.dtype) * weights.unsqueeze(-1)
            wide = self.statistics_wide(statistics.sum(1) / weights.sum(1, keepdim=True))
            logits = logits + wide[:, : logits.shape[1]]
        p_score, loss = None, None if labels is None else masked_bce(logits, labels)
        if self.p_score is not None:
            read = history_mask.to(history.dtype).unsqueeze(-1)
            user = (history * read).sum(1) / read.sum(1)
            p_score = self.p_score(torch.cat([hidden, user, pooled], dim=-1))
            if wide is not None:
                p_score = p_score + wide[:, -1]
            if loss is not None:
                loss = loss + masked_bce(p_score.unsqueeze(-1), self.p_score.labels(labels))
        return OneRecRewardOutput(loss=loss, logits=logits, p_score_logits=p_score)

    def fuse(self, probabilities: torch.Tensor, weights: dict[str, float] | None = None) -> torch.Tensor:
        """
        (sessions,) scores of (sessions, objectives) probabilities: the weighted mean of lifts over the base rates, or of probabilities
        (`config.score_fusion`). It does not read a P-Score.

        Args:
            weights: per objective, in place of `config.score_weights`.

        Raises:
            ValueError: a weight for something that is no objective, or weights that sum to zero.
        """
        names = self.config.objectives
        weights = weights or self.config.score_weights or dict.fromkeys(names, 1.0)
        if unknown := set(weights) - set(names):
            raise ValueError(f"weights names {sorted(unknown)}; the objectives are {names}")
        if not (total := sum(weights.values())):
            raise ValueError(f"weights must not sum to zero; got {weights}")
        scale = probabilities.new_tensor([weights.get(name, 0.0) / total for name in names])
        if self.config.score_fusion != "probability":
            scale = scale / probabilities.new_tensor(self.config.base_rates)
        return probabilities @ scale

    def score(self, *args, weights: dict[str, float] | None = None, **kwargs) -> torch.Tensor:
        """(sessions,) float32 scores, as [`reward`] gives them; takes what `forward` takes, and `weights` as [`fuse`] does."""
        return self._scores(self(*args, **kwargs), weights)

    def _scores(self, output: OneRecRewardOutput, weights: dict[str, float] | None) -> torch.Tensor:
        if output.p_score_logits is not None and weights is None:
            return output.p_score_logits.float().sigmoid()
        return self.fuse(output.logits.float().sigmoid(), weights)

    def predict(
        self, histories: Sequence[Sequence], sessions: Sequence[Sequence], batch_size: int = 512
    ) -> torch.Tensor:
        """
        Probabilities of sessions of item ids, without dropout; a history is encoded once for all its sessions in a batch.

        Args:
            histories: per session, the user's item ids, oldest first; may be empty. The latest `config.max_history` are read.
            sessions: item ids, at least one each.
            batch_size: sessions at a time.

        Returns:
            (sessions, objectives) float32, on the CPU.

        Raises:
            ValueError: a model without items, unequal numbers, empty sessions. KeyError: unknown items.
        """
        return self._read(histories, sessions, batch_size).logits.float().sigmoid()

    @torch.no_grad()
    def _read(self, histories, sessions, batch_size: int) -> OneRecRewardOutput:
        """The output for all sessions, on the CPU."""
        if self.items is None:
            raise ValueError("this reward model has no item ids; set some with set_items(RewardItems(...))")
        if len(histories) != len(sessions):
            raise ValueError(f"{len(histories)} histories but {len(sessions)} sessions: pass one history per session")
        training, parts = self.training, []
        self.eval()
        try:
            for start in range(0, len(sessions), batch_size):
                owners: dict[tuple, int] = {}
                index = [owners.setdefault(tuple(h), len(owners)) for h in histories[start : start + batch_size]]
                batch = self.items.encode_shared(
                    list(owners), index, sessions[start : start + batch_size], self.config.max_history
                )
                parts.append(self(**{name: value.to(self.device) for name, value in batch.items()}))
        finally:
            self.train(training)
        return OneRecRewardOutput(**{name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]})

    def reward(
        self,
        histories: Sequence[Sequence],
        sessions: Sequence[Sequence],
        weights: dict[str, float] | None = None,
        batch_size: int = 512,
    ) -> list[float]:
        """
        One score per session of item ids, as a reward function for preference alignment: the fused objectives, or the P-Score where
        `config.score_fusion` is `"p_score"`. With `weights` it is always the fused objectives. Arguments and errors as for [`predict`] and
        [`fuse`].
        """
        return self._scores(self._read(histories, sessions, batch_size), weights).tolist()

    def _save_beside(self, folder):
        if self.items is not None:
            self.items.save(f"{folder}/{REWARD_ITEMS_NAME}")

    def _load_beside(self, repo, **kwargs):
        items = RewardItems.find(repo, **kwargs)
        if items is not None:
            self.set_items(items)


__all__ = [
    "OneRecForSessionReward",
    "OneRecRewardOutput",
    "OneRecRewardPreTrainedModel",
    "masked_bce",
    "within_user_loss",
]
