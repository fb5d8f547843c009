"""
Sessions in one pass, after NAR4Rec (Ren et al., KDD 2024, arXiv 2402.06871): `recommend(session_decoding="parallel")`.

The item head's best C candidates and the m positions of a session become a (candidates x positions) matrix of probabilities, without a decoder:

    matching model (section 4.1)         P[i, j] = exp(x_i . t_j) / sum over candidates k of exp(x_k . t_j)
    unlikelihood training (section 4.2)  -sum_j log P[y_j, j] for a session y of high utility, -sum_j log(1 - P[y_j, j]) for one of low utility
    contrastive decoding (section 4.3)   y_j = argmax over candidates i that are not placed of
                                               (1 - alpha) P[i, j] - alpha max over placed k of cos(x_i, x_k)

x_i is a candidate's vector after self-attention among the candidates, t_j a position's after self-attention among the positions and cross-attention to the
candidates. Two things are ours: the user's state is added to both, and the item head's log-probability of a candidate to its exponent, so that an
untrained head ranks as the item head does.

The head is no part of the model's weights or config: it is trained after them ([`~onerec_hf.trainers.fit_session_head`]) and saved beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .beam_search import Beams, gumbel_noise
from .constraint import CatalogueConstraint
from .files import find_file, read_safetensors, replacing, short
from .item_scores import ItemScores
from .top_candidates import top_candidates

SESSION_HEAD_NAME = "session_head.safetensors"
_FORMAT, _VERSION, _LARGEST = "onerec-session-head", "1", 4096
DECODINGS = ("beam", "parallel")


class SessionHead(nn.Module):
    """
    The matching model: candidates and positions to the matrix of log-probabilities.

    Args:
        item_width: of item vectors and user states.
        positions: the longest session.
        width: of the head.
        heads: of its attention; divides `width`.

    Raises:
        ValueError: sizes that no head has.

    Example:
        >>> head = SessionHead(item_width=8, positions=3, width=16).eval()
        >>> scores = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()  # the last candidate is not legal
        >>> matrix, _ = head(torch.randn(1, 8), torch.randn(1, 4, 8), scores)
        >>> matrix.exp().round(decimals=2)[0].T  # untrained: as the item head ranks, at each position
        tensor([[0.5000, 0.3000, 0.2000, 0.0000],
                [0.5000, 0.3000, 0.2000, 0.0000],
                [0.5000, 0.3000, 0.2000, 0.0000]], grad_fn=...)
    """

    def __init__(self, item_width: int, positions: int, width: int = 64, heads: int = 4):
        super().__init__()
        sizes = (item_width, positions, width, heads)
        if not all(type(size) is int and 1 <= size <= _LARGEST for size in sizes) or width % heads:
            raise ValueError(f"item_width, positions, width and heads (which divides width) cannot be {sizes}")
        self.sizes = dict(zip(("item_width", "positions", "width", "heads"), sizes, strict=True))
        self.item, self.user = nn.Linear(item_width, width), nn.Linear(item_width, width)
        self.score = nn.Linear(1, width, bias=False)
        self.position = nn.Parameter(torch.randn(positions, width))
        layer: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.candidate_layer = nn.TransformerEncoderLayer(width, heads, 2 * width, **layer)
        self.position_layer = nn.TransformerDecoderLayer(width, heads, 2 * width, **layer)
        self.candidate_norm, self.position_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.match = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.match.weight)

    def forward(
        self, states: torch.Tensor, vectors: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states: (users, item_width) states at the ends of the histories.
            vectors: (users, candidates, item_width) the item head's vectors of the candidates.
            scores: (users, candidates) its log-probabilities, -inf for candidates that are not legal; at least one is.

        Returns:
            (users, candidates, positions) log-probabilities, the columns of which add up to one, and (users, candidates, width) representations.
        """
        width, illegal = self.sizes["item_width"], scores.isinf()
        scores = scores.log_softmax(1)
        user = self.user(F.layer_norm(states.float(), (width,)))[:, None]
        known = scores.masked_fill(illegal, 0.0)[..., None]
        items = self.item(F.layer_norm(vectors.float(), (width,))) + self.score(known) + user
        items = self.candidate_norm(self.candidate_layer(items, src_key_padding_mask=illegal))
        places = self.position_layer(self.position + user, items, memory_key_padding_mask=illegal)
        places = self.match(self.position_norm(places))
        logits = items @ places.mT / self.sizes["width"] ** 0.5 + scores[..., None]
        return logits.log_softmax(1), items


def session_head_loss(log_probs: torch.Tensor, sessions: torch.Tensor, likely: torch.Tensor) -> torch.Tensor:
    """
    Likelihood of sessions of high utility and unlikelihood of those of low utility (section 4.2), a mean over the items that are candidates.

    Args:
        log_probs: (sessions, candidates, positions), the matrix.
        sessions: (sessions, positions) which candidate is at each position, -1 for items that are no candidates.
        likely: (sessions,) bool, whether the utility is high.

    Example:
        >>> matrix = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
        >>> session = torch.tensor([[0, -1]])
        >>> session_head_loss(matrix, session, torch.tensor([True])), session_head_loss(matrix, session, torch.tensor([False]))
        (tensor(0.6931), tensor(0.6931))
    """
    known = sessions >= 0
    chosen = log_probs.gather(1, sessions.clamp(min=0)[:, None])[:, 0]
    # log(1 - P), which is -inf at P = 1.
    unlikely = torch.log1p(-chosen.exp().clamp(max=1 - 1e-6))
    return -(torch.where(likely[:, None], chosen, unlikely) * known).sum() / known.sum().clamp(min=1)


class ParallelDecoder:
    """
    Reads sessions from a session head's matrix: what a model has as `parallel_decoder` where one was trained.

    Args:
        head: on the CPU; it follows the scores' device.
        candidates: C, the item head's best items that sessions are made of.
        alpha: weight of likeness to items that are placed, in [0, 1): 0 for none.

    Raises:
        ValueError: numbers outside of these ranges.
    """

    def __init__(self, head: SessionHead, candidates: int = 100, alpha: float = 0.0):
        if not (type(candidates) is int and 1 <= candidates <= _LARGEST and 0 <= alpha < 1):
            raise ValueError(f"candidates={candidates!r:.40} and alpha={alpha!r:.40} must be in [1, 4096] and [0, 1)")
        self.head, self.candidates, self.alpha = head.eval(), candidates, alpha

    def matrix(
        self, item_scores: ItemScores, constraint: CatalogueConstraint, least: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(users, C, positions) log-probabilities, (users, C, width) representations and (users, C) leaves of the candidates, `least` of them or more."""
        scores, leaves = item_scores.best(constraint, max(self.candidates, least))
        head = self.head.to(leaves.device)
        return (*head(item_scores.states, item_scores.scorer.vectors[leaves], scores), leaves)

    def search(
        self,
        item_scores: ItemScores,
        constraint: CatalogueConstraint,
        session_length: int,
        count: int,
        sample: bool = False,
        temperature: float = 1.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Beams:
        """`count` sessions per user, as [`read_sessions`] reads them; from `count` candidates where the head has fewer."""
        log_probs, representations, leaves = self.matrix(item_scores, constraint, count)
        noise = None
        if sample:
            shape = (len(leaves), min(count, leaves.shape[1]), session_length, leaves.shape[1])
            noise = gumbel_noise(log_probs.new_empty(shape), generator) * temperature
        log_probs = log_probs[..., :session_length]
        alpha = 0.0 if sample else self.alpha
        chosen, scores = read_sessions(log_probs, likeness(representations), count, alpha, noise)
        found = leaves.gather(1, chosen.flatten(1)).view(chosen.shape)
        return Beams(found, scores)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file: to a temporary name first, then renamed."""
        from safetensors.torch import save_file

        about = {**self.head.sizes, "candidates": self.candidates, "alpha": self.alpha}
        weights = {name: value.contiguous().cpu() for name, value in self.head.state_dict().items()}
        with replacing(path) as temporary:
            save_file(weights, temporary, {"format": _FORMAT, "version": _VERSION, "settings": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> ParallelDecoder:
        """
        What [`save`] wrote.

        Raises:
            ValueError: the file is damaged, or of another version.
        """
        tensors, metadata = read_safetensors(path)
        found = (metadata.get("format"), metadata.get("version"))
        if found != (_FORMAT, _VERSION):
            raise ValueError(
                f"{os.fspath(path)} is no session head of version {_VERSION} ({short(found)}); upgrade onerec-hf"
            )
        try:
            settings = json.loads(metadata["settings"])
            own = {name: settings.pop(name) for name in ("candidates", "alpha")}
            with torch.device("meta"):  # sizes of a damaged file take no memory
                head = SessionHead(**settings)
            head.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
            return cls(head, **own)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)} is damaged ({short(error)}); copy or download it again") from error

    @classmethod
    def find(cls, repo: str | os.PathLike, **kwargs) -> ParallelDecoder | None:
        """The session head of a local folder or Hub repository; None where it has none. Takes `from_pretrained`'s hub arguments."""
        path = find_file(repo, SESSION_HEAD_NAME, **kwargs)
        return None if path is None else cls.load(path)


def read_sessions(
    log_probs: torch.Tensor, alike: torch.Tensor, count: int, alpha: float = 0.0, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `count` sessions per user from a matrix, by contrastive decoding (section 4.3), no item twice in one. They differ in their first items: the `count` best ones of
    the first position.

    Args:
        log_probs: (users, candidates, positions), -inf for candidates that are not legal.
        alike: (users, candidates, candidates) cosines.
        alpha: weight of the likeness.
        noise: (users, min(count, candidates), positions, candidates) added to log-probabilities in place of the likeness: Gumbel noise samples.

    Returns:
        (users, min(count, candidates), positions) candidates, and the sum of their log-probabilities, by which the sessions are sorted; -inf where too few
        candidates are legal.

    Example:
        >>> matrix = torch.tensor([[[0.5, 0.5], [0.3, 0.3], [0.2, 0.2]]]).log()
        >>> alike = torch.tensor([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]])
        >>> read_sessions(matrix, alike, count=1)[0].tolist(), read_sessions(matrix, alike, count=1, alpha=0.5)[0].tolist()
        ([[[0, 1]]], [[[0, 2]]])
    """
    users, candidates, positions = log_probs.shape
    count = min(count, candidates)
    first = log_probs[..., 0] if noise is None else log_probs[..., 0] + noise[:, 0, 0]
    place = top_candidates(first, count)[1]
    chosen, total = [place], log_probs[..., 0].gather(1, place)
    taken = torch.zeros(users, count, candidates, dtype=torch.bool, device=log_probs.device)
    nearest = alike.new_full(taken.shape, -1.0)
    for position in range(1, positions):
        taken.scatter_(2, place[..., None], True)
        nearest = torch.maximum(nearest, alike.gather(1, place[..., None].expand(-1, -1, candidates)))
        column = log_probs[:, None, :, position].expand_as(nearest).masked_fill(taken, float("-inf"))
        if noise is None:
            values = ((1 - alpha) * column.exp() - alpha * nearest).masked_fill(column.isinf(), float("-inf"))
        else:
            values = column + noise[:, :, position]
        place = values.argmax(2)
        chosen.append(place)
        total = total + column.gather(2, place[..., None])[..., 0]
    total, order = total.sort(dim=1, descending=True, stable=True)
    sessions = torch.stack(chosen, 2)
    return sessions.gather(1, order[..., None].expand_as(sessions)), total


def likeness(representations: torch.Tensor) -> torch.Tensor:
    """(users, candidates, candidates) cosines of representations (users, candidates, width)."""
    unit = F.normalize(representations, dim=-1)
    return unit @ unit.mT


def users_at_once(candidates: int) -> int:
    """Histories whose pairs of candidates are compared at once: about a GiB of them."""
    return max(1, 2**25 // candidates**2)


def decoder_of(model: Any, decoding: str, session_length: int, **unread: Any) -> ParallelDecoder | None:
    """
    What `recommend()` decodes with: None for beam search.

    Args:
        unread: options that only beam search reads, False where they are not given.

    Raises:
        ValueError: another decoding, a model without a session head, sessions longer than it was trained for, or options that it does not read.
    """
    if decoding not in DECODINGS:
        raise ValueError(f"session_decoding must be one of {', '.join(DECODINGS)}; got {decoding!r:.80}")
    if decoding == "beam":
        return None
    parallel = model.parallel_decoder
    if parallel is None:
        raise ValueError(
            'session_decoding="parallel" needs a session head, and this model has none: train one with `onerec-hf session-head --model FOLDER`'
        )
    if session_length > parallel.head.sizes["positions"]:
        raise ValueError(
            f"session_length={session_length}: the session head was trained for sessions of up to {parallel.head.sizes['positions']} items; "
            'pass a shorter one, or session_decoding="beam"'
        )
    if given := [name for name, value in unread.items() if value]:
        raise ValueError(f'session_decoding="parallel" does not read {", ".join(given)}; leave it out')
    return parallel


__all__ = [
    "DECODINGS",
    "SESSION_HEAD_NAME",
    "ParallelDecoder",
    "SessionHead",
    "decoder_of",
    "likeness",
    "read_sessions",
    "session_head_loss",
    "users_at_once",
]
