"""
Users whose tastes are known: what the simulator benchmark measures against.

Items are MovieLens movies. Their vectors come from a truncated SVD of the ratings, and a user's taste is a mixture of two real users'. The probability
that a user watches an item at position k of a session is

    examined[k] * sigmoid(sharpness * cos(taste, item) + quality[item] + bias) * product over earlier items j of (1 - fatigue * max(0, cos(j, item)) ** 2)

so similar items in one session wear off, and later positions are seen less. The true reward of a session is the expected share of items watched.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SESSION_LENGTH = 5


@dataclass
class World:
    """
    Args:
        items: (items, d) unit vectors.
        quality: (items,) appeal that all users share, in logits.
        tastes: (users, d) unit vectors.
        examined: (session length,) probability that a position is seen.
        fatigue: how far an earlier similar item lowers an item's probability, 0 to 1.
    """

    items: np.ndarray
    quality: np.ndarray
    popularity: np.ndarray
    tastes: np.ndarray
    examined: np.ndarray
    fatigue: float = 0.7
    sharpness: float = 5.0
    bias: float = -1.0

    def appeal(self, user: int) -> np.ndarray:
        """(items,) probability that the user watches an item alone at a position that is seen."""
        logits = self.sharpness * self.items @ self.tastes[user] + self.quality + self.bias
        return 1 / (1 + np.exp(-logits))

    def watched(self, user: int, session: np.ndarray) -> np.ndarray:
        """(positions,) probability that each item of a session, item indices, is watched."""
        return self._watched(self.appeal(user), session)

    def _watched(self, appeal: np.ndarray, session: np.ndarray) -> np.ndarray:
        alike = np.maximum(self.items[session] @ self.items[session].T, 0.0) ** 2
        worn = np.prod(1 - self.fatigue * np.tril(alike, -1), axis=1)
        return self.examined[: len(session)] * appeal[session] * worn

    def true_reward(self, user: int, session) -> float:
        """Expected share of a session's positions that are watched; positions without an item count as not watched."""
        return float(self.watched(user, np.asarray(session)).sum() / len(self.examined)) if len(session) else 0.0

    def optimum(self, user: int, excluded=(), width: int = 50) -> tuple[float, list[int]]:
        """
        The best session: beam search over positions, improved by exchanges of one item or two positions until none helps. On catalogues small enough for
        brute force that is the best of all (`tests/benchmarks/test_alignment_simulator.py`).
        """
        appeal = self.appeal(user)
        left = np.setdiff1d(np.arange(len(self.items)), np.asarray(list(excluded), dtype=int))
        beams, values = [[]], np.zeros(1)
        for position in range(len(self.examined)):
            worth = np.stack([self._gain(appeal, beam, left, position) for beam in beams]) + values[:, None]
            for place, beam in enumerate(beams):
                worth[place, np.isin(left, beam)] = -np.inf
            best = np.argsort(-worth, axis=None, kind="stable")[:width]
            places, columns = np.unravel_index(best, worth.shape)
            beams = [[*beams[place], int(left[column])] for place, column in zip(places, columns, strict=True)]
            values = worth[places, columns]
        found = max((self._improved(appeal, beam, left) for beam in beams[:3]), key=lambda each: each[0])
        return found[0] / len(self.examined), found[1]

    def _gain(self, appeal: np.ndarray, before: list[int], candidates: np.ndarray, position: int) -> np.ndarray:
        """(candidates,) probability that each is watched after the items before it."""
        alike = np.maximum(self.items[candidates] @ self.items[before].T, 0.0) ** 2
        return self.examined[position] * appeal[candidates] * np.prod(1 - self.fatigue * alike, axis=1)

    def _improved(self, appeal: np.ndarray, session: list[int], left: np.ndarray) -> tuple[float, list[int]]:
        session, value = list(session), float(self._watched(appeal, np.array(session)).sum())
        likely = left[np.argsort(-appeal[left], kind="stable")[:60]]
        while True:
            changed = [
                [*session[:place], int(item), *session[place + 1 :]]
                for place in range(len(session))
                for item in likely
                if item not in session
            ]
            for a, b in itertools.combinations(range(len(session)), 2):
                changed.append(session.copy())
                changed[-1][a], changed[-1][b] = session[b], session[a]
            values = [float(self._watched(appeal, np.array(each)).sum()) for each in changed]
            best = int(np.argmax(values))
            if values[best] <= value + 1e-9:
                return value, session
            session, value = changed[best], values[best]


def movielens_world(
    folder: str | Path, users: int, items: int, seed: int = 0, dimensions: int = 16, length: int = SESSION_LENGTH
) -> tuple[World, list[str]]:
    """A world over the most rated movies, and their titles."""
    import pandas as pd

    ratings = pd.read_parquet(Path(folder) / "ratings.parquet")
    movies = pd.read_parquet(Path(folder) / "movies.parquet").set_index("movieId")
    counts: Any = ratings.groupby("movieId").size()
    counts = counts.sort_values(ascending=False, kind="stable").head(items)
    ratings = ratings[ratings["movieId"].isin(counts.index)]
    table = ratings.pivot_table(index="userId", columns="movieId", values="rating")[list(counts.index)]
    means = table.mean()
    # A movie that a user rated is closer to the user's taste than one not rated, and more so with a high rating.
    liked = table.sub(table.mean(axis=1), axis=0).add(1.0).fillna(0.0).to_numpy()
    left, sizes, right = np.linalg.svd(liked - liked.mean(0), full_matrices=False)
    vectors = right[:dimensions].T * np.sqrt(sizes[:dimensions])
    real = left[:, :dimensions] * np.sqrt(sizes[:dimensions])
    rng = np.random.default_rng((seed, 1))
    pairs, shares = rng.integers(0, len(real), (users, 2)), rng.beta(2, 1, (users, 1))
    mixed = shares * _unit(real)[pairs[:, 0]] + (1 - shares) * _unit(real)[pairs[:, 1]]
    quality = ((means - means.mean()) / means.std()).to_numpy() * 0.4
    popularity = np.log(counts.to_numpy() / counts.mean())
    world = World(_unit(vectors), quality, popularity, _unit(mixed), 0.92 ** np.arange(length))
    return world, [str(movies.loc[movie, "title"]) for movie in counts.index]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def logged_sessions(
    world: World, sessions: int, seed: int, noise: float = 0.6, temperature: float = 0.8, related: float = 0.3
) -> list[list[tuple[list[int], list[bool]]]]:
    """
    What an imperfect policy showed to each user, `sessions` times, and which items were watched. The policy prefers popular items, has a blurred view of the taste and
    does not know fatigue. It shows no item twice.

    Args:
        noise: length of the random vector added to the taste's unit vector.
        temperature: of the softmax over the policy's scores, from which a session is drawn without replacement.
        related: share of sessions of one item and those most like it.
    """
    rng, log = np.random.default_rng((seed, 2)), []
    length, width = len(world.examined), world.items.shape[1]
    for user in range(len(world.tastes)):
        seen_as = world.tastes[user] + noise * rng.normal(size=width) / np.sqrt(width)
        scores = (3.0 * world.items @ seen_as + 0.5 * world.popularity) / temperature
        left = np.ones(len(scores), dtype=bool)
        mine = []
        for _ in range(sessions):
            keys = np.where(left, scores + rng.gumbel(size=len(scores)), -np.inf)
            if rng.random() < related:
                keys = np.where(left, world.items @ world.items[keys.argmax()], -np.inf)
            row = rng.permutation(np.argsort(-keys, kind="stable")[:length])
            left[row] = False
            watched = rng.random(length) < world.watched(user, row)
            mine.append((row.tolist(), watched.tolist()))
        log.append(mine)
    return log
