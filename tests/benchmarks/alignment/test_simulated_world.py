"""The simulator's users: fatigue, positions, determinism, and the optimum against brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from benchmarks.alignment.simulated_world import World, logged_sessions, movielens_world
from tests.rounding import close


def small_world(seed=0, items=8, users=3, length=3, **settings):
    rng = np.random.default_rng(seed)
    vectors, tastes = (rng.normal(size=(count, 4)) for count in (items, users))
    vectors, tastes = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, tastes))
    quality, popularity = rng.normal(size=items) * 0.3, rng.normal(size=items)
    return World(vectors, quality, popularity, tastes, 0.9 ** np.arange(length), **settings)


def test_similar_items_wear_off_and_others_do_not():
    world = small_world(fatigue=0.5)
    world.items[1], world.items[2] = world.items[0], np.array([0.0, 0.0, 0.0, 1.0])
    world.items[0] = world.items[1] = np.array([1.0, 0.0, 0.0, 0.0])
    world.quality[1] = world.quality[0]
    alone, appeal = world.watched(0, np.array([0])), world.appeal(0)
    assert alone[0] == close(appeal[0])
    twice = world.watched(0, np.array([0, 1]))
    assert twice[1] == close(0.9 * appeal[1] * 0.5)  # the same again, half worn off
    assert world.watched(0, np.array([0, 2]))[1] == close(0.9 * appeal[2])  # orthogonal
    assert replace(world, fatigue=0.0).watched(0, np.array([0, 1]))[1] == close(0.9 * appeal[1])


def test_a_better_item_belongs_in_front():
    world = small_world(fatigue=0.0)
    better, worse = np.argsort(-world.appeal(0))[[0, -1]]
    assert world.true_reward(0, [better, worse]) > world.true_reward(0, [worse, better])
    assert world.true_reward(0, []) == 0
    assert world.true_reward(0, [better]) < world.true_reward(0, [better, worse])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fatigue", [0.0, 0.7, 1.0])
def test_the_optimum_is_that_of_brute_force(seed, fatigue):
    world = small_world(seed, fatigue=fatigue)
    for user in range(3):
        excluded = {user}
        every = itertools.permutations([item for item in range(8) if item not in excluded], 3)
        best = max(world.true_reward(user, each) for each in every)
        value, session = world.optimum(user, excluded)
        assert value == close(best)
        assert world.true_reward(user, session) == close(value)
        assert not excluded & set(session)
        assert len(set(session)) == 3


def test_a_log_shows_each_item_once_and_prefers_what_the_user_likes():
    world = small_world(items=200, users=60, length=5)
    log = logged_sessions(world, 6, seed=3)
    assert log == logged_sessions(world, 6, seed=3)
    assert log != logged_sessions(world, 6, seed=4)
    for sessions in log:
        shown = [item for row, _ in sessions for item in row]
        assert len(shown) == len(set(shown)) == 30
    rewards = [world.true_reward(user, row) for user, sessions in enumerate(log) for row, _ in sessions]
    rng = np.random.default_rng(0)
    drawn = [world.true_reward(user, rng.choice(200, 5, replace=False)) for user in range(60) for _ in range(6)]
    best = [world.optimum(user)[0] for user in range(5)]
    assert np.mean(drawn) < 0.9 * np.mean(rewards)
    assert np.mean(rewards[: 5 * 6]) < 0.9 * np.mean(best)
    watched = np.mean([yes for sessions in log for _, seen in sessions for yes in seen])
    assert abs(watched - np.mean(rewards)) < 0.03  # what was watched is drawn from the true rates


def test_a_world_of_a_table_of_ratings(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(u, int(m), float(rng.integers(1, 6))) for u in range(30) for m in rng.choice(40, 12, replace=False)]
    pd.DataFrame(rows, columns=["userId", "movieId", "rating"]).to_parquet(tmp_path / "ratings.parquet")
    movies = pd.DataFrame({"movieId": range(40), "title": [f"Film {i}" for i in range(40)]})
    movies.to_parquet(tmp_path / "movies.parquet")
    world, titles = movielens_world(tmp_path, users=50, items=20, dimensions=4)
    again, _ = movielens_world(tmp_path, users=50, items=20, dimensions=4)
    assert np.array_equal(world.tastes, again.tastes)
    assert world.items.shape == (20, 4)
    assert len(titles) == 20
    assert world.tastes.shape == (50, 4)
    assert np.linalg.norm(world.items, axis=1) == close(np.ones(20))
    assert not np.array_equal(world.tastes, movielens_world(tmp_path, 50, 20, seed=1, dimensions=4)[0].tastes)
