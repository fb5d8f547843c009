"""The items of a reward model: item ids to input ids. It travels with the checkpoint as `reward_items.safetensors`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

import numpy as np
import torch
from safetensors.numpy import save_file

from .files import find_file, read_safetensors, refusing, replacing, sort_header
from .item_ids import decode_ids, encode_ids, find_keys, longest_id

REWARD_ITEMS_NAME = "reward_items.safetensors"
_FORMAT = "onerec-reward-items"


class RewardItems:
    """
    N distinct item ids in the order of item indices. Item i has the input id i + 1; 0 is padding.

    It is not the generator's catalogue: a reward model does not read semantic IDs, so they may change.

    Args:
        item_ids: N distinct integers or strings.

    Raises:
        ValueError: no ids, or ids that repeat.
        TypeError: neither all integers nor all strings.

    Example:
        >>> items = RewardItems(["m17", "m4", "m256"])
        >>> batch = items.encode([["m4"], []], [["m17", "m256"], ["m4"]])
        >>> batch["input_ids"].tolist(), batch["session_input_ids"].tolist()
        ([[2], [0]], [[1, 3], [2, 0]])
    """

    def __init__(self, item_ids: Sequence | np.ndarray):
        self._keys, self.id_type = encode_ids(item_ids)
        if not len(self._keys):
            raise ValueError("a reward model needs at least one item")
        self._order = np.argsort(self._keys)
        ordered = self._keys[self._order]
        if (repeated := ordered[1:] == ordered[:-1]).any():
            first = decode_ids(ordered[1:][repeated][:1])[0]
            raise ValueError(f"{int(repeated.sum())} item ids repeat, e.g. {first!r}; give every item one row")
        self.hash = hashlib.sha256(f"{_FORMAT}/{self.id_type}/".encode() + self._keys.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._keys)

    def __deepcopy__(self, memo):  # immutable: copies of a model share it
        return self

    @property
    def item_ids(self) -> list:
        """All item ids in the order of item indices."""
        return decode_ids(self._keys)

    def indices(self, item_ids: Sequence, what: str = "item") -> np.ndarray:
        """
        (n,) int64 item indices of item ids.

        Raises:
            KeyError: unknown ids (how many, the first three).
            TypeError: ids of the other type.
        """
        wanted, id_type = encode_ids(item_ids, longest_id(self._keys))
        if not len(wanted):  # no ids are of any type
            return np.zeros(0, dtype=np.int64)
        if id_type != self.id_type:
            raise TypeError(
                f"{what} ids: the reward model's are of type {self.id_type}; got {decode_ids(wanted[:1])[0]!r}"
            )
        rows = find_keys(self._keys, self._order, wanted)
        if (missing := rows < 0).any():
            raise KeyError(
                f"{int(missing.sum())} of {len(wanted)} {what} ids are not among the {len(self)} items of the reward model, e.g. "
                f"{decode_ids(wanted[missing][:3])}; leave these items out, or train the reward model with them"
            )
        return rows

    def encode(
        self, histories: Sequence[Sequence], sessions: Sequence[Sequence], max_history: int | None = None
    ) -> dict[str, torch.Tensor]:
        """
        A model's inputs, padded on the right.

        Args:
            histories: per session, the user's item ids, oldest first; may be empty.
            sessions: item ids, at least one each.
            max_history: latest items of a history to keep; all when not given.

        Returns:
            `input_ids`, `attention_mask` (n, longest history, at least 1) and `session_input_ids`, `session_attention_mask` (n, longest
            session), int64.

        Raises:
            KeyError: unknown items. TypeError: ids of the other type.
            ValueError: unequal numbers of histories and sessions, no session, or empty sessions (how many, which is the first).
        """
        if len(histories) != len(sessions):
            raise ValueError(f"{len(histories)} histories but {len(sessions)} sessions: pass one history per session")
        batch = self.encode_shared(histories, range(len(sessions)), sessions, max_history)
        del batch["history_index"]
        return batch

    def encode_shared(
        self,
        histories: Sequence[Sequence],
        history_index: Sequence[int],
        sessions: Sequence[Sequence],
        max_history: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        As [`encode`], for sessions that share histories: session i belongs to `histories[history_index[i]]`. Returns `history_index`
        (sessions,) too.
        """
        if not len(sessions):
            raise ValueError("there is no session to encode; pass at least one")
        empty = np.flatnonzero([not len(session) for session in sessions])
        if len(empty):
            raise ValueError(
                f"{len(empty)} of {len(sessions)} sessions are empty (first: number {empty[0]}); leave them out"
            )
        if max_history is not None:
            histories = [history[max(0, len(history) - max_history) :] for history in histories]
        history_ids, history_mask = self._pad(histories, "history item")
        session_ids, session_mask = self._pad(sessions, "session item")
        return {
            "input_ids": history_ids,
            "attention_mask": history_mask,
            "session_input_ids": session_ids,
            "session_attention_mask": session_mask,
            "history_index": torch.tensor(history_index, dtype=torch.long),
        }

    def _pad(self, lists: Sequence[Sequence], what: str) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        mask = np.arange(max(1, int(lengths.max()))) < lengths[:, None]
        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = self.indices([item for items in lists for item in items], what) + 1
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the ids as one safetensors file, to a temporary name first, then renamed."""
        keys = self._keys
        if keys.dtype.kind == "S":  # safetensors has no bytes
            keys = keys.view(np.uint8).reshape(len(keys), -1)
        with replacing(path) as temporary:
            save_file({"item_ids": np.ascontiguousarray(keys)}, temporary, {"format": _FORMAT, "hash": self.hash})
            sort_header(temporary)

    @classmethod
    def load(cls, path: str | os.PathLike) -> RewardItems:
        """
        Reads what `save` wrote.

        Raises:
            ValueError: the file holds something else, or ids that do not match its hash.
        """
        tensors, metadata = read_safetensors(path, "np")
        if metadata.get("format") != _FORMAT or "item_ids" not in tensors:
            raise ValueError(f"{path} holds no items of a reward model (format {metadata.get('format')!r:.80})")
        keys = tensors["item_ids"]
        with refusing(path):
            if keys.ndim == 2:
                keys = np.ascontiguousarray(keys, dtype=np.uint8).view(f"S{keys.shape[1]}")[:, 0]
            items = cls(decode_ids(keys))
        if items.hash != metadata.get("hash"):
            raise ValueError(f"{path} does not match its hash: it was damaged; copy or download it again")
        return items

    @classmethod
    def find(cls, repo: str | os.PathLike, **kwargs) -> RewardItems | None:
        """The items of a local folder or Hub repository, or `None` where it holds none. Takes `from_pretrained`'s hub arguments."""
        path = find_file(repo, REWARD_ITEMS_NAME, **kwargs)
        return None if path is None else cls.load(path)


__all__ = ["REWARD_ITEMS_NAME", "RewardItems"]
