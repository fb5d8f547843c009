"""What the tests of features share: a schema of all kinds of features, a processor with it, tiny models, and users with raw values and with codes."""

import numpy as np
import torch

from onerec_hf import OneRecProcessor
from onerec_hf.modeling.features import Feature, FeatureSchema
from tests.conftest import make_catalogue, make_model

CATALOGUE = make_catalogue()
SCHEMA = FeatureSchema(
    user=(
        Feature("age", edges=(18.0, 40.0)),
        Feature("city", values=("Rome", "Paris")),
        Feature("tags", hashes=7, slots=2),
    ),
    interaction=(
        Feature("like", values=("0", "1")),
        Feature("time", edges=(60.0, 3600.0), derive="gap"),
        Feature("time", values=tuple(str(hour) for hour in range(24)), derive="hour"),
    ),
    item=(
        Feature("genres", values=("Action", "Drama", "Comedy"), slots=3, separator="|"),
        Feature("year", edges=(1990.0,)),
    ),
)
GENRES = ["Action", "Drama|Comedy", "Action|Drama|Comedy", None, "Western"]
ITEM_FEATURES = SCHEMA.encode_items(
    [{"genres": GENRES[i % 5], "year": 1980 + i if i % 3 else None} for i in range(len(CATALOGUE))]
)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, 8, SCHEMA, ITEM_FEATURES)
HISTORIES = [
    [
        {"item": "m1", "time": 1000, "like": True},
        {"item": "m2", "time": 1030},
        {"item": "m3", "time": 9000, "like": 0},
    ],
    ["m5"],
]
USERS = [{"age": 31, "city": "Rome", "tags": ["a", "b"]}, {"city": "Oslo"}]
SESSIONS = [["m4", "m6"], ["m7"]]


def make(schema=SCHEMA, features=None, **config):
    """A model whose features all matter: rows of missing and unknown values are not zero either."""
    model = make_model(CATALOGUE, features={**schema.config(), "dim": 6, **(features or {})}, **config)
    torch.manual_seed(1)
    model.model.encoder.features.table.weight.data[1:].normal_(std=0.5)
    return model


def columns(histories=HISTORIES, users=USERS):
    """Examples as datasets hold them."""
    ids = [[entry["item"] if isinstance(entry, dict) else entry for entry in history] for history in histories]
    entries = [[entry if isinstance(entry, dict) else {"item": entry} for entry in history] for history in histories]
    of_users = SCHEMA.encode_users(users)
    return [
        {
            "history": history,
            "user_features": of_users[user].tolist(),
            "history_features": SCHEMA.encode_interactions(entries[user]).flatten().tolist(),
        }
        for user, history in enumerate(ids)
    ]


def random_examples(count, seed=0, longest=8):
    """Histories of random items, with random raw values."""
    rng = np.random.default_rng(seed)
    histories, users = [], []
    for _ in range(count):
        length = int(rng.integers(1, longest + 1))
        times = np.sort(rng.integers(0, 10**6, length))
        picked = rng.choice(len(CATALOGUE), length, replace=False)
        histories.append(
            [
                {"item": f"m{item}", "time": int(time), "like": bool(rng.integers(2))}
                for item, time in zip(picked, times, strict=True)
            ]
        )
        users.append({"age": int(rng.integers(10, 60)), "tags": [str(rng.integers(9)) for _ in range(2)]})
    return histories, users
