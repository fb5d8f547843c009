"""Embeddings smoothed over the user-item graph: LightGCN's dense matrix by hand, items without users, wrong input."""

import numpy as np
import pytest

from onerec_hf.semantic_ids import graph_embeddings
from tests.rounding import assert_close

USERS = [np.array([0, 1, 1, 4]), np.array([1, 2]), np.array([4, 0]), np.array([], dtype=int), np.array([1])]


def by_hand(embeddings, sequences, layers):
    """LightGCN's equations with the adjacency of users and items as one dense matrix; users begin at zero, odd layers are left out."""
    items, users = len(embeddings), len(sequences)
    adjacency = np.zeros((users + items, users + items))
    for user, sequence in enumerate(sequences):
        for item in sequence:
            adjacency[user, users + item] = adjacency[users + item, user] = 1
    degree = adjacency.sum(1)
    scale = np.array([0.0 if each == 0 else each**-0.5 for each in degree])
    propagation = scale[:, None] * adjacency * scale
    state = np.concatenate([np.zeros((users, embeddings.shape[1])), embeddings])
    found = [state]
    for _ in range(2 * layers):
        found.append(propagation @ found[-1])
    assert not found[1][users:].any()  # a layer to users only
    mean = np.mean([each[users:] for each in found[::2]], axis=0)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_it_is_the_dense_propagation(layers):
    vectors = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    found = graph_embeddings(vectors, USERS, layers)
    assert_close(found, by_hand(vectors.astype(np.float64), USERS, layers).astype(np.float32))
    if layers > 1:
        assert np.abs(found - graph_embeddings(vectors, USERS, layers - 1)).max() > 0.01


def test_items_without_users_keep_their_content():
    vectors = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)
    found = graph_embeddings(vectors, USERS, 2)
    alone = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert_close(found[[3, 5]], alone[[3, 5]])
    assert np.abs(found[[0, 1, 2, 4]] - alone[[0, 1, 2, 4]]).max(1).min() > 0.01
    assert_close(graph_embeddings(vectors, []), alone)


def test_an_item_without_content_gets_that_of_its_neighbours():
    vectors = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], dtype=np.float32)
    found = graph_embeddings(vectors, [np.array([0, 1])])
    assert_close(found, np.array([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]], dtype=np.float32))


def test_refuses():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        graph_embeddings(np.eye(2), USERS[1:2], 0)
    with pytest.raises(ValueError, match="item indices 0 to 4, but the embeddings have rows 0 to 2"):
        graph_embeddings(np.eye(3), USERS)
