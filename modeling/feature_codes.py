"""Codes of histories' places: of raw values in requests, or of the columns of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .features import PATHWAYS, FeatureSchema, check_codes, check_pathways
from .files import listed, short

if TYPE_CHECKING:
    from .catalogue import ItemCatalogue
    from .lifelong_history import LifelongHistory


#: Columns of codes in datasets: of users, and of the interactions of their histories.
FEATURE_COLUMNS = ("user_features", "history_features")
#: Inputs of a model that stand beside the tokens of histories: of features and of a lifelong pathway.
BESIDE_HISTORIES = ("feature_ids", "lifelong_ids")


def check_schema(config, schema: FeatureSchema | None, pathways: Mapping[str, int] | None = None) -> None:
    """
    Raises:
        ValueError: a model's config and a processor's schema have different features, or other pathways.

    Example:
        >>> from onerec_hf import OneRecConfig
        >>> from onerec_hf.modeling.features import Feature
        >>> check_schema(OneRecConfig(), FeatureSchema(user=(Feature("age", edges=(18.0,)),)))
        Traceback (most recent call last):
        ...
        ValueError: model and processor have different features (only the model: none; only the processor: age of 5 codes): take the processor that was saved with the model
    """
    own = getattr(config, "features", None)
    of_model = {} if own is None else {side: getattr(own, side) for side in ("user", "interaction", "item")}
    of_schema = {} if schema is None else schema.config()
    if of_model == of_schema:
        if (of_config := None if own is None else own.pathways) != pathways:
            raise ValueError(
                f"model and processor have different pathways (the model: {of_config}; the processor: {pathways}): take the processor that was "
                "saved with the model"
            )
        return
    model, processor = (
        [f"{name} of {size} codes" for side in of.values() for name, size, _ in side] for of in (of_model, of_schema)
    )
    only_model, only_processor = (
        listed(name for name in one if name not in other) or "none"
        for one, other in ((model, processor), (processor, model))
    )
    raise ValueError(
        f"model and processor have different features (only the model: {only_model}; only the processor: {only_processor}): take the processor "
        "that was saved with the model"
    )


def check_lifelong(config, lifelong: LifelongHistory | None) -> None:
    """
    Raises:
        ValueError: a model's config and a processor have different lifelong pathways.
    """
    own = getattr(config, "lifelong", None)
    of_model = None if own is None else (own.queries, bool(config.encoder_pools_items))
    of_processor = None if lifelong is None else (lifelong.queries, lifelong.pools_items)
    if of_model != of_processor:
        model, processor = (
            "none" if of is None else f"{of[0]} queries, encoder_pools_items={of[1]}"
            for of in (of_model, of_processor)
        )
        raise ValueError(
            f"model and processor have different lifelong pathways (the model: {model}; the processor: {processor}): take the processor that was "
            "saved with the model"
        )


def split_history(history: Any, name: str = "the history") -> tuple[Any, list[dict] | None]:
    """
    Item ids of a history whose entries are ids or objects with an "item", and all entries as objects; None where no entry is one.

    Raises:
        ValueError: an object without an item.

    Example:
        >>> split_history(["m4", {"item": "m17", "like": True}])
        (['m4', 'm17'], [{'item': 'm4'}, {'item': 'm17', 'like': True}])
        >>> split_history([7, 8])
        ([7, 8], None)
    """
    if isinstance(history, Iterator):
        history = list(history)
    if not (isinstance(history, list | tuple) and any(isinstance(entry, dict) for entry in history)):
        return history, None
    objects = [entry if isinstance(entry, dict) else {"item": entry} for entry in history]
    for place, entry in enumerate(objects):
        if "item" not in entry:
            raise ValueError(
                f"entry {place} of {name} has no item (found: {short(', '.join(map(str, entry)), 80)}); an entry is an item id, or an object "
                'such as {"item": "m17", "like": true}'
            )
    return [entry["item"] for entry in objects], objects


def split_histories(histories: Sequence) -> tuple[Sequence, list[list[dict]] | None]:
    """As [`split_history`], of several: all entries are objects where one is."""
    split = [split_history(history, f"history {number}") for number, history in enumerate(histories)]
    if all(objects is None for _, objects in split):
        return histories, None
    ids = [items for items, _ in split]
    return ids, [[{"item": item} for item in items] if objects is None else objects for items, objects in split]


def interaction_codes(
    schema: FeatureSchema,
    lengths: Sequence[int] | np.ndarray,
    objects: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    codes: Sequence | None = None,
) -> np.ndarray:
    """
    (interactions, slots) int32 codes of all histories, one after another.

    Args:
        lengths: entries of each history.
        objects: the entries with raw values.
        codes: per history its codes as the column `history_features` has them, row-major; None for a history whose values are missing. Without both,
            all values are missing.

    Raises:
        ValueError: raw values of the wrong type, another number of codes than the schema has, or codes of another one.

    Example:
        >>> from onerec_hf.modeling.features import Feature
        >>> schema = FeatureSchema(interaction=(Feature("like", values=("0", "1")), Feature("hour", edges=(12.0,))))
        >>> interaction_codes(schema, [2, 1], codes=[[3, 4, 4, 3], None]).tolist()
        [[3, 4], [4, 3], [1, 1]]
    """
    slots = schema.interaction_slots
    missing = schema.encode_interactions([{}])
    if objects is not None:
        parts = [schema.encode_interactions(history) for history in objects]
    elif codes is None:
        return np.repeat(missing, int(np.sum(lengths)), axis=0)
    else:
        parts = [
            np.repeat(missing, length, axis=0) if given is None else _column(given, length, slots, user)
            for user, (given, length) in enumerate(zip(_as_many(codes, len(lengths)), lengths, strict=True))
        ]
    joined = np.concatenate(parts)
    if objects is None:
        check_codes(joined, schema.interaction, "history_features")
    return joined


def user_codes(
    schema: FeatureSchema,
    count: int,
    users: Sequence[Mapping[str, Any] | None] | None = None,
    codes: Sequence | np.ndarray | None = None,
) -> np.ndarray:
    """
    (users, slots) int32 codes of raw values, or of the column `user_features`; missing where there are none.

    Raises:
        ValueError: as [`interaction_codes`], or another number of users than histories.
    """
    missing = schema.encode_users([{}])
    if users is not None:
        if len(users) != count or not all(isinstance(user, Mapping | None) for user in users):
            raise ValueError(
                f"users must hold a dictionary of values, or None, for each of {count} histories; got {users!r:.80}"
            )
        return schema.encode_users(users)
    if codes is None:
        return np.repeat(missing, count, axis=0)
    if len(codes) != count:
        raise ValueError(f"user_features hold the codes of {len(codes)} users, there are {count} histories")
    rows = [
        missing if given is None else _column(given, 1, schema.user_slots, user, "user_features")
        for user, given in enumerate(codes)
    ]
    joined = np.concatenate(rows)
    check_codes(joined, schema.user, "user_features")
    return joined


def _as_many(codes: Sequence, count: int) -> Sequence:
    if len(codes) != count:
        raise ValueError(f"history_features hold the codes of {len(codes)} histories, there are {count}")
    return codes


def _column(given, length: int, slots: int, user: int, name: str = "history_features") -> np.ndarray:
    """(length, slots) int32 of one example's column."""
    found = np.asarray(given)
    if found.size == 0 and slots == 0:
        return np.zeros((length, 0), np.int32)
    if found.dtype.kind not in "iu" or found.size != length * slots:
        raise ValueError(
            f"{name} of example {user} hold {found.size} values of type {found.dtype}, expected {length * slots} codes: {slots} for each of {length}; "
            "prepare the data with the schema of this processor"
        )
    if found.size and not (int(found.min()) >= 0 and int(found.max()) < 2**31):
        raise ValueError(f"{name} of example {user} hold values that are no codes (below 0, or above 2^31)")
    return found.reshape(length, slots).astype(np.int32)


def pathway_places(
    pathways: Mapping[str, int], schema: FeatureSchema, codes: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    What the pathways read of histories: the latest interactions of any feedback, then the latest positive ones.

    Args:
        codes: (interactions, slots) of all histories, one after another.
        lengths: (users,) interactions of each history.

    Returns:
        (n,) places among the interactions, user by user, (users,) their numbers, and (n,) codes of their pathways.

    Raises:
        ValueError: pathways that are not both there, or a schema that does not tell positive interactions from others.

    Example:
        >>> from onerec_hf.modeling.features import Feature
        >>> schema = FeatureSchema(interaction=(Feature("positive", values=("1", "0")),))
        >>> found = pathway_places({"short_term": 2, "positive": 9}, schema, np.array([[3], [4], [4], [3]]), np.array([3, 1]))
        >>> [part.tolist() for part in found]
        [[1, 2, 0, 3, 3], [3, 2], [1, 1, 2, 1, 2]]
    """
    check_pathways(pathways, schema.not_positive)
    owner, ends = np.repeat(np.arange(len(lengths)), lengths), np.cumsum(lengths)
    chosen = []
    for name, members in zip(PATHWAYS, (np.ones(len(codes), bool), schema.are_positive(codes)), strict=True):
        counts = np.cumsum(members)
        chosen.append(np.flatnonzero(members & (counts[ends - 1][owner] - counts < pathways[name])))
    places = np.concatenate(chosen)
    pathway = np.repeat(np.arange(1, 1 + len(PATHWAYS)), list(map(len, chosen)))
    order = np.lexsort((pathway, owner[places]))
    return places[order], np.bincount(owner[places], minlength=len(lengths)), pathway[order]


def place_codes(
    schema: FeatureSchema,
    users: np.ndarray | None,
    items: np.ndarray,
    lengths: np.ndarray,
    pathway: np.ndarray | None = None,
) -> np.ndarray:
    """
    (users, places, slots) int64 codes of padded histories: of the static place, where the schema has user features, and of items, and in a last slot the
    pathway of each place where there are pathways.

    Args:
        users: (users, user slots) codes, or None without user features.
        items: (items, interaction slots + item slots) codes, one history after another.
        lengths: (users,) items of each history.
        pathway: (items,) of [`pathway_places`].
    """
    static = schema.static_places
    ids = np.zeros((len(lengths), static + int(lengths.max()), schema.slots + (pathway is not None)), np.int64)
    if users is not None:
        ids[:, :static, : schema.user_slots] = users[:, None]
    there = np.arange(int(lengths.max())) < lengths[:, None]
    ids[:, static:, schema.user_slots : schema.slots][there] = items
    if pathway is not None:
        ids[:, static:, -1][there] = pathway
    return ids


@dataclass(frozen=True, eq=False)
class RequestFeatures:
    """
    The codes of one request.

    Args:
        user: (user slots,) codes.
        history: (items, interaction slots) codes of the history.
    """

    user: np.ndarray
    history: np.ndarray

    @classmethod
    def of(
        cls,
        schema: FeatureSchema,
        request: Any,
        ids: Any,
        objects: list[dict] | None,
        catalogue: ItemCatalogue,
    ) -> RequestFeatures:
        """
        The codes of a request's raw values, or those that it holds itself, of the items that the catalogue holds.

        Args:
            request: a [`Request`].
            ids, objects: its history, of [`split_history`].

        Raises:
            ValueError: values of the wrong type, values beside codes, or codes of another schema.
        """
        user, given = request.user, request.history_features
        if not isinstance(user, Mapping | None):
            raise ValueError(f"user must be an object with values of features; got {user!r:.60}")
        if (user is not None and request.user_features is not None) or (objects is not None and given is not None):
            raise ValueError("pass values (user, objects in the history) or codes (user_features, history_features)")
        known = np.flatnonzero(catalogue.indices(ids, unknown="mask") >= 0) if len(ids) else np.zeros(0, np.int64)
        if given is None:
            # As in training, the gap is to the interaction before with an item that the catalogue holds.
            read = None if objects is None else [[objects[place] for place in known.tolist()]]
            codes = interaction_codes(schema, [len(known)], read)
        else:
            codes = interaction_codes(schema, [len(ids)], codes=[given])[known]
        of_user = None if request.user_features is None else [request.user_features]
        return cls(user_codes(schema, 1, None if user is None else [user], of_user)[0], codes)

    def latest(self, keep: int | None) -> RequestFeatures:
        """Those of the latest `keep` items; None for all."""
        return self if keep is None else replace(self, history=self.history[-keep:])

    @staticmethod
    def columns(features: Sequence[RequestFeatures | None]) -> dict[str, list]:
        """What the processor takes beside the histories; nothing for a model without features."""
        found = [each for each in features if each is not None]
        if not found:
            return {}
        return {
            "user_features": [each.user for each in found],
            "history_features": [each.history for each in found],
        }


__all__ = [
    "BESIDE_HISTORIES",
    "FEATURE_COLUMNS",
    "RequestFeatures",
    "check_lifelong",
    "check_schema",
    "interaction_codes",
    "pathway_places",
    "place_codes",
    "split_histories",
    "split_history",
    "user_codes",
]
