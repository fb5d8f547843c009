"""
Trains a session head (NAR4Rec, arXiv 2402.06871) on top of a trained generator, whose weights stay as they are: likelihood of sessions of high utility,
unlikelihood of sessions of low utility (section 4.2). With reward functions the head also draws sessions from its own matrix: the best of a history counts as
high, the worst as low.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onerec_hf.data.collators import feature_columns, positive_items
from onerec_hf.modeling.beam_search import gumbel_noise
from onerec_hf.modeling.feature_codes import BESIDE_HISTORIES
from onerec_hf.modeling.layers_onerec import at_places
from onerec_hf.modeling.session_head import (
    ParallelDecoder,
    SessionHead,
    likeness,
    read_sessions,
    session_head_loss,
    users_at_once,
)
from onerec_hf.trainers.rewards import as_functions, check_reward_items, reward_values
from onerec_hf.trainers.session_head_config import SessionHeadArguments

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

#: Weights of likeness that held-out histories choose from.
ALPHAS = (0.0, 0.01, 0.03, 0.1, 0.2)
_ENCODE_BATCH, _MOST_HELD_OUT = 256, 1000


@dataclass
class _Encoded:
    """What the head reads of examples, and the places of their sessions' items among the candidates."""

    states: torch.Tensor  # (n, width)
    scores: torch.Tensor  # (n, C)
    leaves: torch.Tensor  # (n, C)
    sessions: torch.Tensor  # (n, positions), -1 where the item is no candidate
    likely: torch.Tensor  # (n,) bool

    def __getitem__(self, rows) -> _Encoded:
        return _Encoded(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def fit_session_head(
    model: OneRecForConditionalGeneration,
    processor: OneRecProcessor,
    examples: Iterable[Any],
    reward_funcs: Any = None,
    args: SessionHeadArguments | None = None,
    *,
    utility_column: str | None = None,
    exclude_seen: bool = True,
) -> dict[str, float]:
    """
    Trains a session head and sets it as `model.parallel_decoder`, which `save_pretrained` saves. The model's own weights do not change.

    Args:
        examples: rows with `history` and `session`, item ids, as training has them; a tenth of them is held out to choose `alpha`.
        reward_funcs: functions or reward models, as of the preference trainers; their sum is the utility of drawn sessions.
        utility_column: a column of the examples, numbers: sessions below its median are made unlikely. Without it all of them count as likely.
        exclude_seen: as in the evaluation: items of the history are no candidates.

    Returns:
        `loss` of the last epoch, `covered`, the share of the sessions' items that are candidates, `alpha`, and `heldout`: the mean reward of held-out histories'
        sessions, without rewards the share of their real sessions' items that they hold.

    Raises:
        ValueError: a model without item scores, no examples, sessions without a candidate, or a utility that is no finite number.

    Example:
        >>> fit_session_head(model, processor, dataset.train.to_list(), reward_model)  # doctest: +SKIP
        {'loss': 4.1, 'covered': 0.71, 'alpha': 0.01, 'heldout': 0.38}
    """
    args = args or SessionHeadArguments()
    args.check()
    rewards, rows = as_functions(reward_funcs), list(examples)
    head_config: Any = model.config.item_head
    if head_config is None or not head_config.loss_weight:
        raise ValueError(
            "a session head reads the candidates of an item head, and this model has none with a loss_weight above 0. Train one: onerec-hf train --item_head"
        )
    if model.catalogue is None:
        raise ValueError("this model has no item catalogue; set one with model.set_catalogue(processor.catalogue)")
    for function in rewards:
        check_reward_items(function, model.catalogue)
    rows = [row for row in rows if row["history"] and row["session"]]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} examples with a history and a session: pass at least 2")
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    rows = [rows[place] for place in order]
    likely, training = _likely(rows, utility_column), model.training
    model.eval()
    try:
        encoded, vectors = _encode(model, processor, rows, args.candidates, likely, exclude_seen)
    finally:
        model.train(training)
    held_out = min(_MOST_HELD_OUT, max(1, len(rows) // 10))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        head = SessionHead(vectors.shape[1], encoded.sessions.shape[1], args.width).to(vectors.device)
    ids = _ids_of_leaves(model)
    rewarded = _rewarded(rewards, ids, rows) if rewards else None
    loss = _train(head, encoded, vectors, range(held_out, len(rows)), args, rewarded, generator)
    head.eval()
    alpha, found = _choose_alpha(head, encoded[:held_out], vectors, args.alpha, rewarded)
    model.parallel_decoder = ParallelDecoder(head.cpu(), args.candidates, alpha)
    covered = float(
        (encoded.sessions >= 0).sum() / sum(min(len(row["session"]), encoded.sessions.shape[1]) for row in rows)
    )
    return {"loss": loss, "covered": covered, "alpha": alpha, "heldout": found}


def pick_sessions(
    reward_funcs: Any, histories: Sequence[list], sessions: Sequence[list], count: int = 1
) -> list[list[int]]:
    """
    The evaluator's choice among generated sessions (NAR4Rec, section 4): per history the places of the `count` sessions with the highest reward, best first.

    Args:
        reward_funcs: as of the preference trainers; their sum counts.
        histories: item ids.
        sessions: equally many for each history, in order.

    Raises:
        ValueError: another number of sessions than a multiple of the histories', or a reward that is no finite number.

    Example:
        >>> pick_sessions(lambda histories, sessions: [s[0] for s in sessions], [[7], [8]], [[1], [2], [6], [5]])
        [[1], [0]]
    """
    each, rest = divmod(len(sessions), max(1, len(histories)))
    if rest:
        raise ValueError(f"{len(sessions)} sessions for {len(histories)} histories: pass equally many for each")
    repeated = [history for history in histories for _ in range(each)]
    values = _utilities(as_functions(reward_funcs), repeated, list(sessions)).reshape(len(histories), each)
    return np.argsort(-values, axis=1, kind="stable")[:, :count].tolist()


def _utilities(functions: Sequence[Callable], histories: list, sessions: list) -> np.ndarray:
    """(sessions,) sums of rewards; a reward that does not apply counts as 0."""
    values = [reward_values(each, str(place), histories, sessions) for place, each in enumerate(functions)]
    return np.nansum(values, axis=0)


def _likely(rows: list, column: str | None) -> torch.Tensor:
    """(rows,) bool, whether a session's utility is high."""
    if column is None:
        return torch.ones(len(rows), dtype=torch.bool)
    try:
        values = np.array([float(row[column]) for row in rows])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"utility_column {column!r} must hold a number in each example ({error!r:.80})") from error
    if not np.isfinite(values).all():
        raise ValueError(
            f"utility_column {column!r}: {int((~np.isfinite(values)).sum())} values are not finite numbers"
        )
    return torch.from_numpy(values >= np.median(values))


@torch.no_grad()
def _encode(
    model: Any, processor: OneRecProcessor, rows: list, candidates: int, likely: torch.Tensor, exclude_seen: bool
) -> tuple[_Encoded, torch.Tensor]:
    """The examples through the frozen encoder, and the (leaves, width) vectors of items."""
    encoder, catalogue, parts = model.get_encoder(), model.catalogue, []
    trie = catalogue.trie.to(model.device)
    length = model.config.session_length
    for start in range(0, len(rows), _ENCODE_BATCH):
        some = rows[start : start + _ENCODE_BATCH]
        batch = processor([row["history"] for row in some], **feature_columns(processor, some))
        batch = {name: value.to(model.device) for name, value in batch.items()}
        exclude = None
        if exclude_seen:
            exclude = model._rows_per_user([positive_items(row) for row in some], "exclude", len(some), "skip")
        constraint = model._constraint(exclude, None, True)
        beside = {name: batch.get(name) for name in BESIDE_HISTORIES}
        states = encoder(batch["input_ids"], batch["attention_mask"], **beside).last_hidden_state
        mask = at_places(batch["attention_mask"], model.config.encoder_stride)
        item_scores = model._item_scores(states, mask, trie, 1.0, batch["input_ids"], batch.get("feature_ids"))
        scores, leaves = item_scores.best(constraint, candidates)
        targets = torch.full((len(some), length), -1, device=model.device)
        for place, row in enumerate(some):
            found = torch.from_numpy(catalogue.indices(row["session"][:length], "mask")).to(model.device)
            targets[place, : len(found)] = torch.where(found >= 0, trie.index_to_leaf[found.clamp(min=0)], -1)
        hits = (targets[..., None] == leaves[:, None]) & scores.isfinite()[:, None]
        sessions = torch.where(hits.any(2), hits.long().argmax(2), -1)
        parts.append((item_scores.states.float(), scores, leaves, sessions))
    states, scores, leaves, sessions = (torch.cat(part) for part in zip(*parts, strict=True))
    if not (sessions >= 0).any():
        raise ValueError(
            f"no item of {len(rows):,} sessions is among the {candidates} best candidates of the item head: train the model longer, or raise candidates"
        )
    return _Encoded(states, scores, leaves, sessions, likely.to(model.device)), item_scores.scorer.vectors


def _ids_of_leaves(model: Any) -> np.ndarray:
    """Item ids by leaf."""
    ids = np.empty(model.catalogue.trie.num_leaves, dtype=object)
    ids[:] = model.catalogue.ids(model.catalogue.trie.leaf_to_index.numpy())
    return ids


def _rewarded(functions: list, ids: np.ndarray, rows: list) -> Callable[[Sequence[int], torch.Tensor], np.ndarray]:
    """(rows, n) utilities of sessions, (rows, n, positions) leaves, of some of the examples."""
    histories = [positive_items(row) for row in rows]

    def rewarded(places: Sequence[int], leaves: torch.Tensor) -> np.ndarray:
        each = leaves.shape[1]
        sessions = [ids[session].tolist() for session in leaves.flatten(0, 1).cpu().numpy()]
        repeated = [histories[place] for place in places for _ in range(each)]
        return _utilities(functions, repeated, sessions).reshape(len(places), each)

    return rewarded


def _train(
    head: SessionHead,
    encoded: _Encoded,
    vectors: torch.Tensor,
    train: range,
    args: SessionHeadArguments,
    rewarded: Callable | None,
    generator: torch.Generator,
) -> float:
    """The mean loss of the last epoch."""
    steps = args.epochs * -(-len(train) // args.batch_size)
    optimizer = torch.optim.AdamW(head.parameters(), args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    head.train()
    for epoch in range(args.epochs):
        losses = []
        order = torch.tensor(train)[torch.randperm(len(train), generator=generator)]
        for places in order.split(args.batch_size):
            some = encoded[places]
            log_probs, _ = head(some.states, vectors[some.leaves], some.scores)
            loss = _loss(log_probs, some.sessions, some.likely, args.unlikelihood)
            if rewarded is not None and epoch:
                loss = loss + _drawn_loss(log_probs, some.leaves, places.tolist(), args, rewarded, generator)
            if not loss.isfinite():
                raise ValueError("the session head's loss is not finite: pass a lower learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return float(np.mean(losses))


def _loss(log_probs: torch.Tensor, sessions: torch.Tensor, likely: torch.Tensor, unlikelihood: float) -> torch.Tensor:
    high = session_head_loss(log_probs, sessions.where(likely[:, None], -1), likely)
    if likely.all():
        return high
    return high + unlikelihood * session_head_loss(log_probs, sessions.where(~likely[:, None], -1), likely)


def _drawn_loss(
    log_probs: torch.Tensor, leaves: torch.Tensor, places: list[int], args: SessionHeadArguments, rewarded, generator
) -> torch.Tensor:
    """Of the best and the worst of sessions that are drawn from the matrix."""
    matrix, count = log_probs.detach(), min(args.drawn, leaves.shape[1])
    shape = (len(leaves), count, matrix.shape[2], matrix.shape[1])
    noise = gumbel_noise(torch.empty(shape), generator).to(matrix.device)
    unread = matrix.new_zeros(len(leaves), matrix.shape[1], matrix.shape[1])
    chosen, totals = read_sessions(matrix, unread, count, noise=noise)
    values = torch.from_numpy(rewarded(places, leaves.gather(1, chosen.flatten(1)).view(chosen.shape))).to(
        matrix.device
    )
    complete = totals.isfinite()  # fewer candidates than positions leave none
    best = values.masked_fill(~complete, -math.inf).argmax(1, keepdim=True)
    worst = values.masked_fill(~complete, math.inf).argmin(1, keepdim=True)
    differ = (values.gather(1, best) > values.gather(1, worst)) & complete.any(1, keepdim=True)

    def of(which: torch.Tensor, likely: bool) -> torch.Tensor:
        session = chosen.gather(1, which[..., None].expand(-1, -1, chosen.shape[2]))[:, 0]
        session = session.where(differ, -1)
        return session_head_loss(log_probs, session, torch.full((len(session),), likely, device=matrix.device))

    return of(best, True) + args.unlikelihood * of(worst, False)


@torch.no_grad()
def _choose_alpha(
    head: SessionHead, encoded: _Encoded, vectors: torch.Tensor, given: float | None, rewarded: Callable | None
) -> tuple[float, float]:
    """The weight of likeness with the best held-out sessions, the smallest of equal ones, and how good they are."""
    found = {}
    alphas = ALPHAS if given is None else (given,)
    read: dict[float, list[torch.Tensor]] = {alpha: [] for alpha in alphas}
    # The likeness of all pairs of candidates is kept for some of the histories at a time.
    for places in torch.arange(len(encoded.leaves)).split(users_at_once(encoded.leaves.shape[1])):
        some = encoded[places]
        log_probs, representations = head(some.states, vectors[some.leaves], some.scores)
        alike = likeness(representations)
        for alpha in alphas:
            read[alpha].append(read_sessions(log_probs, alike, 1, alpha)[0])
    real = encoded.sessions.where(encoded.likely[:, None], -1)
    for alpha in alphas:
        sessions = torch.cat(read[alpha])
        if rewarded is None:
            hits = (real[:, :, None] == sessions).any(2).sum()
            found[alpha] = float(hits / (real >= 0).sum().clamp(min=1))
        else:
            leaves = encoded.leaves.gather(1, sessions.flatten(1)).view(sessions.shape)
            found[alpha] = float(rewarded(range(len(leaves)), leaves).mean())
    best = max(found, key=lambda alpha: (found[alpha], -alpha))
    return best, found[best]
