"""
What a model adds to a history for the features of users, interactions and items (technical report, arXiv 2506.13695, section 2.2).

Each feature's codes have embeddings of a narrow width. Those of a place are concatenated and go through Dense(LeakyReLU(Dense)): one such network for
the place of the user, the report's static pathway, and one for the places of items, or for those of each pathway (`pathways`). With `user_at_items` what
describes the user is added to the items of the history too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .features import MISSING, PATHWAYS, UNKNOWN

#: Codes of places in the last slot of `feature_ids`, of models with pathways.
_SHORT_TERM, _POSITIVE = (1 + PATHWAYS.index(name) for name in ("short_term", "positive"))


class FeatureEmbedding(nn.Module):
    """
    Embeddings of feature codes. Row 0 of the table, which all features share, is zeros: of code 0, nothing.

    Args:
        config: a `OneRecConfig` with `features`.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> features = {"user": [["age", 5, 1]], "interaction": [["like", 5, 1]], "item": [["genres", 9, 2]]}
        >>> embedding = FeatureEmbedding(OneRecConfig(hidden_size=8, num_attention_heads=2, features=features))
        >>> codes = torch.tensor([[[3, 0, 0, 0], [0, 4, 3, 8], [0, 0, 0, 0]]])  # the user, an item that was liked, padding
        >>> added = embedding(codes)
        >>> added.shape, added[0].any(-1).tolist()
        (torch.Size([1, 3, 8]), [True, True, False])
    """

    def __init__(self, config):
        super().__init__()
        self.config = config.features
        self.dropout = float(self.config.dropout)  # a float of the module, which alignment's `disable_dropout` finds
        sizes = [size for _, size, _ in self.config.all]
        #: Code c of a feature has row `begin + c`, code 0 row 0.
        self.begins = [sum(size - 1 for size in sizes[:place]) for place in range(len(sizes))]
        self.table = nn.Embedding(1 + sum(size - 1 for size in sizes), self.config.dim, padding_idx=0)
        # Per slot: its feature, where the feature's rows begin, and its number of codes.
        self.slots = nn.Buffer(self._of_slots(), persistent=False)
        users, others = len(self.config.user), len(sizes) - len(self.config.user)
        self.user = self._network(users, config.hidden_size)
        self.item = self._network(others, config.hidden_size)
        self.short_term = None if self.config.pathways is None else self._network(others, config.hidden_size)

    def _network(self, features: int, width: int) -> nn.Sequential | None:
        if not features:
            return None
        return nn.Sequential(nn.Linear(features * self.config.dim, width), nn.LeakyReLU(), nn.Linear(width, width))

    def _of_slots(self) -> torch.Tensor:
        features = enumerate(zip([*self.begins, 0], self.config.columns, strict=False))
        return torch.tensor(
            [[place, begin, size] for place, (begin, (_, size, slots)) in features for _ in range(slots)]
        ).T

    @torch.no_grad()
    def initialize(self, std: float) -> None:
        """Weights with which a place's features begin about as large as a token's embedding; missing and unknown values begin at zero."""
        init.copy_(self.slots, self._of_slots())
        init.normal_(self.table.weight, std=std)
        if not getattr(self.table.weight, "_is_hf_initialized", False):
            self.table.weight[0] = 0
            for begin, (_, size, _) in zip(self.begins, self.config.all, strict=True):
                self.table.weight[begin + 1 : begin + min(size, UNKNOWN + 1)] = 0
        for network in filter(None, (self.user, self.item, self.short_term)):
            for layer in (network[0], network[2]):
                init.normal_(layer.weight, std=layer.in_features**-0.5)
                init.zeros_(layer.bias)

    def forward(self, feature_ids: torch.Tensor, packed: bool = False) -> torch.Tensor:
        """
        (rows, places, slots) codes to (rows, places, width), zeros where a place has no feature.

        Args:
            packed: rows hold several histories, so that several places may have user features.

        Raises:
            ValueError: codes of another schema.
        """
        codes, pathway = self._checked(feature_ids), None
        if self.short_term is not None:
            codes, pathway = codes[..., :-1], codes[..., -1:]
        if self.training and self.dropout > 0:
            hidden = torch.rand(*codes.shape[:-1], len(self.config.all), device=codes.device) < self.dropout
            hidden = hidden[..., self.slots[0, : codes.shape[-1]]]
            codes = torch.where(hidden & (codes > 0), MISSING, codes)
        users = self.config.user_slots
        of_users, added = codes[..., :users], None
        if self.item is not None:
            of_items = self.config.all[len(self.config.user) :]
            added = self._states(self.item, codes[..., users:], of_items, users, pathway)
        if self.user is None:
            return added
        if packed:
            if self.config.user_at_items:  # each place has its history's user: the latest place of one
                places = torch.arange(codes.shape[1], device=codes.device)
                latest = torch.where(of_users.any(-1), places, 0).cummax(1).values
                of_users = of_users.gather(1, latest.unsqueeze(-1).expand_as(of_users))
            states = self._states(self.user, of_users, self.config.user, 0)
            return states if added is None else added + states
        # One place per row: the network runs there alone.
        place = of_users.any(-1).int().argmax(1)[:, None, None]
        states = self._states(self.user, of_users.gather(1, place.expand(-1, 1, users)), self.config.user, 0)
        if added is None:
            added = states.new_zeros(*codes.shape[:2], states.shape[-1])
        if self.config.user_at_items:
            return added + states * (torch.arange(codes.shape[1], device=codes.device)[:, None] >= place)
        return added.scatter_add(1, place.expand(-1, 1, states.shape[-1]), states)

    def _states(
        self,
        network: nn.Module,
        codes: torch.Tensor,
        features: list[list],
        begin: int,
        pathway: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(..., width) of the codes (..., slots) of a network's features, whose slots begin at `begin`; short-term places have a network of their own."""
        begins, filled = self.slots[1, begin : begin + codes.shape[-1]], codes > 0
        embedded = self.table(torch.where(filled, codes + begins, 0))
        parts, slot = [], 0
        for _, _, slots in features:
            part = embedded[..., slot : slot + slots, :]
            if slots > 1:
                count = filled[..., slot : slot + slots].sum(-1, keepdim=True).clamp(min=1)
                part = part.sum(-2, keepdim=True) / count.unsqueeze(-1).to(part.dtype)
            parts.append(part.squeeze(-2))
            slot += slots
        embedded = torch.cat(parts, dim=-1)
        states = network(embedded)
        if pathway is not None:
            states = torch.where(pathway == _SHORT_TERM, self.short_term(embedded), states)  # pyright: ignore[reportOptionalCall]
        return states * filled.any(-1, keepdim=True).to(states.dtype)

    def _checked(self, feature_ids: torch.Tensor) -> torch.Tensor:
        if feature_ids.ndim != 3 or feature_ids.shape[-1] != self.config.slots:
            raise ValueError(
                f"feature_ids have shape {tuple(feature_ids.shape)}, the model's features need (rows, places, {self.config.slots}); take the "
                "processor that was saved with the model"
            )
        outside = (feature_ids < 0) | (feature_ids >= self.slots[2])
        # A look at values would make an accelerator wait, and cannot be exported.
        if feature_ids.device.type == "cpu" and not torch.compiler.is_compiling() and outside.any():
            slot = int(outside.flatten(0, 1).any(0).int().argmax())
            name, size, _ = self.config.columns[int(self.slots[0, slot])]
            raise ValueError(
                f"feature_ids hold codes of feature {name!r} outside 0 to {size - 1}: they are of another schema; take the processor that was "
                "saved with the model"
            )
        return torch.where(outside, UNKNOWN, feature_ids)


def positive_places(config, feature_ids: torch.Tensor | None) -> torch.Tensor | bool:
    """
    (users, places) bool, places that are not those of interactions that were not positive; True where a model cannot tell them apart. With pathways those
    of positive interactions: the short-term pathway repeats some of them.
    """
    if config is not None and config.pathways is not None and feature_ids is not None:
        return feature_ids[..., -1] == _POSITIVE
    slot = None if config is None or feature_ids is None else config.not_positive_slot
    return True if slot is None else feature_ids[..., slot[0]] != slot[1]


def with_features(
    embedding: FeatureEmbedding | None,
    embeddings: torch.Tensor,
    feature_ids: torch.Tensor | None,
    stride: int,
    packed: bool = False,
) -> torch.Tensor:
    """
    A history's embeddings (rows, t, width), with those of features added to the first token of each place of `stride` tokens. Rows that are `packed`
    hold several histories.

    Raises:
        ValueError: features for a model without, none for a model with features, or another number of places.
    """
    if embedding is None:
        if feature_ids is not None:
            raise ValueError("this model has no features; take its own processor, or leave feature_ids out")
        return embeddings
    if feature_ids is None:
        raise ValueError(
            "this model reads features: pass feature_ids beside input_ids, as the processor that was saved with it makes them"
        )
    added = embedding(feature_ids.to(embeddings.device), packed)
    if (added.shape[0], added.shape[1] * stride) != tuple(embeddings.shape[:2]):
        raise ValueError(
            f"feature_ids have {added.shape[0]} rows of {added.shape[1]} places, input_ids {embeddings.shape[0]} rows of {embeddings.shape[1]} tokens, "
            f"{stride} per place; pass both from one call of the processor"
        )
    return embeddings + F.pad(added.unsqueeze(2), (0, 0, 0, stride - 1)).flatten(1, 2)


__all__ = ["FeatureEmbedding", "positive_places", "with_features"]
