"""
SASRec, HSTU, GRU4Rec and ACVAE as one model: a history of item embeddings becomes one state per position, and items are ranked by their inner products
with the last one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import ModelOutput

from onerec_hf.baselines.acvae import ACVAEEncoder
from onerec_hf.baselines.configuration_sequential import SequentialConfig
from onerec_hf.baselines.item_index import ItemIndex
from onerec_hf.baselines.next_items import IGNORED, draw_negatives, pad_left
from onerec_hf.baselines.read_histories import ReadHistories
from onerec_hf.baselines.sequential_encoders import GRU4RecEncoder, HSTUEncoder, HSTULayer, SASRecEncoder
from onerec_hf.modeling.feature_codes import check_schema
from onerec_hf.modeling.feature_embedding import FeatureEmbedding
from onerec_hf.modeling.features import MISSING, FeatureSchema
from onerec_hf.modeling.features_file import FEATURES_NAME, find_features, save_features
from onerec_hf.modeling.hub import HubModel, check_complete
from onerec_hf.modeling.item_evidence import ItemEvidence, times_of

if TYPE_CHECKING:
    from onerec_hf.data.feature_tables import DatasetFeatures

_ENCODERS = {"sasrec": SASRecEncoder, "hstu": HSTUEncoder, "gru4rec": GRU4RecEncoder, "acvae": ACVAEEncoder}


@dataclass
class SequentialOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*):
            Mean over targets, with labels; in training with the other terms of `"acvae"`.
        logits (`torch.FloatTensor` of shape `(users, num_items)`, *optional*):
            Scores of all items as the next one, without labels.
        last_hidden_state (`torch.FloatTensor` of shape `(users, t, hidden_size)`):
            The state after each position.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class SequentialRecommender(HubModel, PreTrainedModel):
    """
    A sequence model of one of four architectures (`config.architecture`), with the ids of its items and, optionally, fixed item features. Saved
    in safetensors and loaded like any transformers model, also by `AutoModel`.

    Example:
        >>> from onerec_hf.baselines import SequentialRecommender
        >>> model = SequentialRecommender.from_items(["m17", "m4", "m256"], architecture="sasrec", hidden_size=16)
        >>> sorted(item for item, score in model.recommend([["m4"]], top_k=2)[0])
        ['m17', 'm256']
    """

    config: SequentialConfig
    config_class = SequentialConfig
    item_embedding: nn.Embedding
    item_keys: torch.Tensor | None
    item_features: torch.Tensor | None
    item_codes: torch.Tensor | None
    content: torch.Tensor | None
    base_model_prefix = ""
    main_input_name = "input_ids"
    # The loss is a mean over targets, of which a batch may train on a share: Trainer divides by accumulation steps.
    accepts_loss_kwargs = False
    include_code = False  # the class is onerec_hf's, not of the code that travels with a generator
    _files_beside = _former_beside = (FEATURES_NAME,)
    #: What values became which codes of the features that it reads; saved beside the weights. None for a model without features.
    schema: FeatureSchema | None = None

    def __init__(self, config: SequentialConfig):
        super().__init__(config)
        self._items: ItemIndex | None = None
        width, features = config.hidden_size, config.item_feature_dim
        self.item_embedding = nn.Embedding(config.num_items + 1, width, padding_idx=0)
        self.item_features = nn.Buffer(torch.zeros(config.num_items + 1, features)) if features else None
        self.feature_proj = nn.Linear(features, width, bias=False) if features else None
        self.features = FeatureEmbedding(config) if config.features is not None else None
        own: Any = config.features
        codes = own.item_slots if own is not None else 0
        # Of input ids; without the values of an item they are missing ones, which begin at zero.
        self.item_codes = nn.Buffer(torch.zeros(config.num_items + 1, codes, dtype=torch.int32)) if codes else None
        self.encoder = _ENCODERS[config.architecture](config)
        # Set by `add_evidence`, after training.
        self.evidence = None
        if config.evidence:
            self.evidence = ItemEvidence(config.num_items, config.neighbours, recent=config.recent)
        content = (config.num_items + 1, config.content_dim)
        self.register_buffer("content", torch.zeros(content, dtype=torch.float16) if config.content_dim else None)
        keys = None
        if config.item_id_bytes is not None:
            shape = (config.num_items, config.item_id_bytes) if config.item_id_bytes else (config.num_items,)
            keys = torch.zeros(shape, dtype=torch.uint8 if config.item_id_bytes else torch.int64)
        self.register_buffer("item_keys", keys)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.GRU | nn.Conv1d):  # torch's own initialisation
            inputs = module.hidden_size if isinstance(module, nn.GRU) else module.weight[0].numel()
            bound = inputs**-0.5
            for weight in module.parameters(recurse=False):
                init.uniform_(weight, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, HSTULayer):
            init.zeros_(module.distance_bias)
        elif isinstance(module, FeatureEmbedding):
            module.initialize(self.config.initializer_range)

    @classmethod
    def from_items(
        cls,
        item_ids: Iterable,
        features: np.ndarray | None = None,
        coded: DatasetFeatures | None = None,
        feature_dim: int = 32,
        feature_dropout: float = 0.0,
        **config,
    ) -> SequentialRecommender:
        """
        A new model for these items.

        Args:
            item_ids: N distinct integers or strings.
            features: (N, d) finite floats, one row per item, such as text embeddings.
            coded: features of users, interactions and items that it reads ([`~onerec_hf.data.DatasetFeatures`], items in the order of `item_ids`).
            feature_dim, feature_dropout: of their embeddings ([`~onerec_hf.FeaturesConfig`]).
            config: settings of [`SequentialConfig`], without `num_items`, `item_feature_dim` and `features`.

        Raises:
            ValueError, TypeError: as `set_items`; features of other items.
        """
        items = item_ids if isinstance(item_ids, ItemIndex) else ItemIndex(item_ids)
        width = 0 if features is None else np.shape(features)[-1]
        if coded is not None:
            config["features"] = {**coded.schema.config(), "dim": feature_dim, "dropout": feature_dropout}
        model = cls(SequentialConfig(num_items=len(items), item_feature_dim=width, **config))
        model.set_items(items, features)
        model.schema = None if coded is None else coded.schema
        if coded is not None and model.item_codes is not None:
            if len(coded.items) != len(items):
                raise ValueError(f"coded has features of {len(coded.items)} items, and item_ids has {len(items)} ids")
            model.item_codes[1:] = torch.from_numpy(coded.items)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Loads a model from a folder or a Hub repository; arguments as for `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: pickled, damaged or missing weights, a newer checkpoint format.
            OSError: no such folder or repository.
        """
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        check_complete(info)
        return (model, info) if with_info else model

    @property
    def items(self) -> ItemIndex | None:
        """The ids of the items in the order of their indices; None for a model without ids."""
        if self._items is None and self.item_keys is not None:
            self._items = ItemIndex.from_tensor(self.item_keys)
        return self._items

    def set_items(self, item_ids: Iterable | ItemIndex, features: np.ndarray | None = None) -> None:
        """
        Sets the ids of the model's items, and for a new model their features. Features are centred and scaled, and their projection is initialised
        to the size of the item embeddings: do not call it with features on a trained model.

        Args:
            item_ids: `config.num_items` distinct integers or strings.
            features: (num_items, item_feature_dim) finite floats.

        Raises:
            ValueError: another number of items, repeated ids, features of another shape or not finite.
            TypeError: ids that are neither all integers nor all strings.
        """
        items = item_ids if isinstance(item_ids, ItemIndex) else ItemIndex(item_ids)
        if len(items) != self.config.num_items:
            raise ValueError(f"the model has num_items={self.config.num_items}, and item_ids has {len(items)} ids")
        if features is not None:
            self._set_features(items, np.asarray(features, dtype=np.float32))
        self._items, keys = items, items.to_tensor()
        self.item_keys = keys.to(self.device)
        self.config.item_id_bytes = keys.shape[1] if keys.ndim == 2 else 0

    @torch.no_grad()
    def _set_features(self, items: ItemIndex, features: np.ndarray) -> None:
        expected, table = (self.config.num_items, self.config.item_feature_dim), self.item_features
        if features.shape != expected or not isinstance(table, torch.Tensor) or self.feature_proj is None:
            raise ValueError(
                f"features: expected shape {expected} (num_items, item_feature_dim); got {features.shape}"
            )
        if (bad := ~np.isfinite(features).all(1)).any():
            first = items.ids(np.flatnonzero(bad)[:1])[0]
            raise ValueError(f"features: {int(bad.sum())} rows hold NaN or infinity (first: item {first!r})")
        # A step of Adam moves each weight of the projection as far as each of an embedding: with absolute values that sum to 1 both move an
        # item by as much.
        centred = torch.from_numpy(features - features.mean(0))
        scaled = centred / centred.abs().sum(1).mean().clamp(min=1e-12)
        table[1:] = scaled.to(table)
        size = scaled.square().sum(1).mean().sqrt().clamp(min=1e-12)
        nn.init.normal_(self.feature_proj.weight, std=float(self.config.initializer_range / size))

    def get_input_embeddings(self):
        return self.item_embedding

    def set_input_embeddings(self, value: nn.Embedding):
        self.item_embedding = value

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) input ids to (..., hidden_size): rows of `item_vectors`, without computing the others."""
        vectors = self.item_embedding(ids)
        if self.feature_proj is None or self.item_features is None:
            return vectors
        return vectors + self.feature_proj(self.item_features[ids].to(vectors.dtype))

    def item_vectors(self) -> torch.Tensor:
        """(num_items, hidden_size) vectors by which items are read and scored."""
        vectors = self.item_embedding.weight[1:]
        if self.feature_proj is not None and self.item_features is not None:
            vectors = vectors + self.feature_proj(self.item_features[1:].to(vectors.dtype))
        if self.config.score_features and self.features is not None and self.item_codes is not None:
            own: Any = self.config.features
            others = own.slots - self.item_codes.shape[1]
            codes = F.pad(self.item_codes[1:].long(), (others, 0))
            vectors = vectors + self.features(codes.unsqueeze(1), packed=True).squeeze(1)
        return vectors

    def _of_features(self, input_ids: torch.Tensor, feature_ids: torch.Tensor | None) -> torch.Tensor | float:
        """(users, t, hidden_size) that features add to the items of histories."""
        if self.features is None:
            if feature_ids is not None:
                raise ValueError("this model has no features: leave feature_ids out")
            return 0.0
        if feature_ids is None:
            own: Any = self.config.features
            slots = own.slots - (0 if self.item_codes is None else self.item_codes.shape[1])
            feature_ids = (input_ids != 0).long().unsqueeze(-1).expand(-1, -1, slots) * MISSING
        if self.item_codes is not None:
            feature_ids = torch.cat([feature_ids, self.item_codes[input_ids].long()], dim=-1)
        return self.features(feature_ids, packed=True)  # the user's features are at each item

    def encode(self, input_ids: torch.Tensor, feature_ids: torch.Tensor | None = None) -> torch.Tensor:
        """(users, t) input ids to (users, t, hidden_size) states; a state depends on its position and those before it."""
        return self.encoder(self._embedded(input_ids, feature_ids), input_ids != 0)

    def _embedded(self, input_ids: torch.Tensor, feature_ids: torch.Tensor | None) -> torch.Tensor:
        """(users, t, hidden_size) that the encoder reads."""
        if input_ids.shape[1] > self.config.max_history:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} positions and max_history is {self.config.max_history}. Cut histories to the latest items"
            )
        scale = self.config.hidden_size**0.5 if self.config.scale_embeddings else 1.0
        embedded = self.embed(input_ids) + self._of_features(input_ids, feature_ids)
        return scale * embedded

    def forward(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor | None = None,
        seen_ids: torch.LongTensor | None = None,
        label_smoothing: float = 0.0,
        feature_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> SequentialOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(users, t)`):
            Item indices + 1, oldest first, padded with 0 on the left.
        labels (`torch.LongTensor` of shape `(users, t)`, *optional*):
            The input id of the item that follows each position; -100 where there is none.
        seen_ids (`torch.LongTensor` of shape `(users, s)`, *optional*):
            For `loss="bce"`, items that are never drawn as negatives; those of `input_ids` and `labels` when not given.
        label_smoothing (`float`, *optional*):
            Share of a target's probability that `loss="ce"` spreads over all items.
        feature_ids (`torch.LongTensor` of shape `(users, t, slots)`, *optional*):
            With `config.features`: codes of the user and of the interaction at each item, 0 at padding; those of items are the model's. Without
            them the values are missing.
        """
        if labels is not None and self.training and isinstance(self.encoder, ACVAEEncoder):
            states, added = self.encoder.with_loss(self._embedded(input_ids, feature_ids), input_ids != 0)
        else:
            states, added = self.encode(input_ids, feature_ids), 0.0
        if labels is None:
            return SequentialOutput(logits=self._scores(states, input_ids), last_hidden_state=states)
        real = labels != IGNORED
        if self.config.loss == "ce":
            scores = states[real] @ self.item_vectors().T
            loss = F.cross_entropy(scores, labels[real] - 1, label_smoothing=label_smoothing)
            return SequentialOutput(loss=loss + added, last_hidden_state=states)
        if label_smoothing:
            raise ValueError(f'label_smoothing={label_smoothing} needs loss="ce"; "bce" has no labels to smooth')
        seen = torch.cat([input_ids, labels.clamp(min=0)], dim=1) if seen_ids is None else seen_ids
        negatives = draw_negatives(seen, real.nonzero()[:, 0], self.config.num_items)
        positive, negative = ((states[real] * self.embed(ids)).sum(-1) for ids in (labels[real], negatives))
        loss = -(F.logsigmoid(positive) + F.logsigmoid(-negative)).mean()
        return SequentialOutput(loss=loss + added, last_hidden_state=states)

    def _scores(self, states, input_ids, vectors=None, legal=None, times=None) -> torch.Tensor:
        """(users, num_items) scores of all items after the last state, with the evidence; only `legal` items take places among its candidates."""
        scores = states[:, -1] @ (self.item_vectors() if vectors is None else vectors).T
        if self.evidence is None:
            return scores
        return self.evidence.add(scores.float(), input_ids, self.content, legal=legal, times=times)

    @torch.no_grad()
    def top_items(
        self,
        input_ids: torch.Tensor,
        k: int,
        exclude_ids: torch.Tensor | None = None,
        allowed: torch.Tensor | None = None,
        vectors: torch.Tensor | None = None,
        feature_ids: torch.Tensor | None = None,
        positive_ids: torch.Tensor | None = None,
        request_times: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The k best next items among all of the catalogue.

        Args:
            input_ids: (users, t).
            exclude_ids: (users, e) input ids to leave out, padded with 0.
            allowed: (num_items,) bool, False for items to leave out for all users.
            vectors: `item_vectors()`, precomputed for many batches.
            feature_ids: as for `forward`.
            positive_ids: (users, p) input ids of the positive interactions, padded with 0: what evidence is about; `input_ids` when not given.
            request_times: (users,) int64 in the unit of the training table, for evidence of what was asked for lately; now when not given.

        Returns:
            (users, k) item indices, best first, -1 where fewer than k items remain, and their scores.
        """
        legal = torch.ones(len(input_ids), self.config.num_items + 1, dtype=torch.bool, device=input_ids.device)
        legal[:, 0] = False
        if allowed is not None:
            legal[:, 1:] &= allowed
        if exclude_ids is not None:
            legal.scatter_(1, exclude_ids, False)
        states = self.encode(input_ids, feature_ids)
        positive = input_ids if positive_ids is None else positive_ids
        times = times_of(len(states), request_times, states.device)
        scores = self._scores(states, positive, vectors, legal[:, 1:], times)
        values, ids = F.pad(scores, (1, 0)).masked_fill_(~legal, -torch.inf).topk(min(k, self.config.num_items))
        indices = (ids - 1).masked_fill(values == -torch.inf, -1)
        more = k - indices.shape[1]
        return F.pad(indices, (0, more), value=-1), F.pad(values, (0, more), value=-torch.inf)

    def rank(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        exclude_seen: bool = True,
        batch_size: int = 256,
        active: np.ndarray | None = None,
    ) -> np.ndarray:
        """
        The k best items for each history of item indices; the interface of [`PopularityBaseline.recommend`].

        Args:
            histories: arrays of item indices, oldest first, none of them empty. The latest `config.max_history` are read.
            k: items per history, at least 1.
            exclude_seen: leave out all items of the history.
            batch_size: histories at a time.
            active: (num_items,) bool, false for retired items, which are in no ranking; all are ranked when not given.

        Returns:
            (n, k) int64 item indices, best first, -1 where fewer than k items remain.

        Raises:
            ValueError: k < 1, an empty history, or an index outside the catalogue.
        """
        read = ReadHistories(list(histories))
        allowed = None if active is None else torch.from_numpy(np.array(active)).to(self.device)
        found = [indices for indices, _ in self._ranked(read, k, exclude_seen, batch_size, allowed=allowed)]
        return np.concatenate([np.empty((0, k), dtype=np.int64), *found])

    def rank_examples(
        self, examples, k: int, exclude_seen: bool = True, batch_size: int = 256, active: np.ndarray | None = None
    ) -> np.ndarray:
        """
        `rank` for examples ([`~onerec_hf.data.leave_one_out`]), with the features in their columns. Only positive interactions of a history are left out.

        Raises:
            ValueError: as `rank`; a model without item ids, or codes of another schema than the model's. KeyError: unknown items.
        """
        if self.items is None:
            raise ValueError("this model has no item ids: call set_items(item_ids)")
        self.check_schema()
        read = ReadHistories.of_examples(examples, self.items, self.schema)
        allowed = None if active is None else torch.from_numpy(np.array(active)).to(self.device)
        found = [indices for indices, _ in self._ranked(read, k, exclude_seen, batch_size, allowed=allowed)]
        return np.concatenate([np.empty((0, k), dtype=np.int64), *found])

    @torch.no_grad()
    def _ranked(self, read: ReadHistories, k: int, exclude_seen: bool, batch_size: int, excluded=(), allowed=None):
        """Indices and scores, batch by batch."""
        if k < 1:
            raise ValueError(f"top_k must be at least 1; got {k}")
        for number, history in enumerate(read.items):
            if not len(history):
                raise ValueError(
                    f"histories[{number}] holds no item of the model's catalogue; leave it out, or rank it by PopularityBaseline"
                )
            if np.min(history) < 0 or np.max(history) >= self.config.num_items:
                raise ValueError(
                    f"histories[{number}]: item indices must lie between 0 and {self.config.num_items - 1}; got {np.min(history)} to {np.max(history)}"
                )
        training, shut = self.training, np.asarray(excluded, dtype=np.int64)
        self.eval()
        try:
            vectors = self.item_vectors()
            for start in range(0, len(read.items), batch_size):
                batch = read[start : start + batch_size]
                inputs = {name: value.to(self.device) for name, value in batch.inputs(self.config.max_history).items()}
                seen = pad_left([np.concatenate([shut, items if exclude_seen else shut[:0]]) for items in batch.seen])
                found = self.top_items(
                    k=k, exclude_ids=seen.to(self.device), allowed=allowed, vectors=vectors, **inputs
                )
                indices, scores = found
                yield indices.cpu().numpy(), scores.float().cpu().numpy()
        finally:
            self.train(training)

    def recommend(
        self,
        histories: Sequence[Sequence],
        top_k: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: Sequence = (),
        allow: Sequence | None = None,
        unknown: str = "skip",
        batch_size: int = 256,
    ) -> list[list[tuple]]:
        """
        The best items of the catalogue for each history of item ids.

        Args:
            histories: item ids, oldest first. The latest `config.max_history` are read.
            top_k: items per history, at least 1.
            exclude_seen: leave out all items of the history.
            exclude: more item ids to leave out, for all histories.
            allow: the only item ids to choose from, for all histories.
            unknown: `"skip"` leaves unknown ids out; `"error"` raises.
            batch_size: histories at a time.

        Returns:
            per history up to `top_k` pairs of item id and score, best first; fewer where no more items are left.

        Raises:
            ValueError: a model without item ids, a history or `allow` without a known item, another value of `unknown`, top_k < 1.
            KeyError: with `unknown="error"`, an unknown id.
            TypeError: ids of the other type.
        """
        items = self.items
        if items is None:
            raise ValueError("this model has no item ids: call set_items(item_ids), or rank() with item indices")
        if unknown not in ("skip", "error"):
            raise ValueError(f'unknown must be "skip" or "error"; got {unknown!r}')

        def known(ids: Sequence, name: str) -> np.ndarray:
            try:
                rows = items.indices(ids, "mask" if unknown == "skip" else "error")
            except (KeyError, TypeError, ValueError) as error:
                raise type(error)(f"{name}: {error.args[0]}") from None
            return rows[rows >= 0]

        rows = [known(history, f"histories[{number}]") for number, history in enumerate(histories)]
        allowed = None
        if allow is not None:
            chosen = known(allow, "allow")
            if not len(chosen):
                raise ValueError("allow holds no item of the model's catalogue")
            allowed = torch.zeros(self.config.num_items, dtype=torch.bool, device=self.device)
            allowed[torch.from_numpy(chosen).to(self.device)] = True
        return [
            [(item, float(score)) for item, score in zip(items.ids(best[best >= 0]), scores, strict=False)]
            for found in self._ranked(
                ReadHistories(rows), top_k, exclude_seen, batch_size, known(exclude, "exclude"), allowed
            )
            for best, scores in zip(*found, strict=True)
        ]

    def check_schema(self) -> None:
        """
        Raises:
            ValueError: the model reads features, and its schema was not saved with it: all their values would be missing.
        """
        if self.config.features is not None and self.schema is None:
            raise ValueError(
                f"the sequence model reads features, and {FEATURES_NAME} is not beside its weights: all their values would be missing. Copy that file "
                "too, or set model.schema and save the model again"
            )

    def _save_beside(self, folder):
        items = self.items
        if self.schema is not None and items is not None:
            none = torch.zeros(len(items) + 1, 0) if self.item_codes is None else self.item_codes
            save_features(os.path.join(folder, FEATURES_NAME), self.schema, none[1:].cpu().numpy(), items.hash)

    def _load_beside(self, repo, **kwargs):
        items: Any = self.items  # damaged ids are an error of loading
        found: Any = None
        if self.config.features is not None and items is not None:
            found = find_features(repo, items, **kwargs)
        if found is not None:
            self.schema = found[0]
            check_schema(self.config, self.schema)


__all__ = ["SequentialOutput", "SequentialRecommender"]
