"""
The tail of a mixed load: the server's batcher, which computes small batches between the steps of large ones, beside batch by batch.

Clients of four kinds send the next request when they have the answer to the last one: sessions of 1 and 5 items by 10 and 128 beams, histories of 5 to 50
items, of the model of `serving.py`, in this process with one torch thread. The two batchers are interleaved: `steps` is the server's, `batches` the same
without small batches between steps. Answers of both equal those of a request alone.

Rows: `<batcher>/p50_<items>x<beams>` and `p99_...` in milliseconds, `<batcher>/rps` requests per second, `p99_ratio_<items>x<beams>` of a repetition
(batch by batch over the server's; above 1 the server's tail is shorter).
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/mixed_load.py`

from benchmarks.harness import finish, one_thread, parser, say
from benchmarks.speed.serving import ITEMS, save_model
from onerec_hf.evaluation.results import result_row
from onerec_hf.serving import RecommendationService, ServedModel, ServingSettings, batching
from onerec_hf.serving.schema import Query

# Clients by kind: items of a session, beams.
CLIENTS = {(1, 10): 1, (1, 128): 1, (5, 10): 1, (5, 128): 1}
# The share of a running batch's cost that a small batch between its steps may have.
BATCHERS = {"steps": batching._SMALL, "batches": 0.0}


def queries(kind: tuple[int, int], seed: int) -> Any:
    """Requests of a kind, without end."""
    rng = random.Random(f"{kind} {seed}")
    while True:
        history = rng.sample(range(ITEMS), rng.randint(5, 50))
        yield Query.model_validate({"history": history, "top_k": 10, "session_length": kind[0], "num_beams": kind[1]})


async def load(model: ServedModel, duration: float, seed: int) -> dict[tuple[int, int], list[float]]:
    """Seconds of each request, by kind."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    async with RecommendationService(model, ServingSettings(timeout=600), load=lambda version: None) as service:
        end = time.perf_counter() + duration

        async def client(kind: tuple[int, int], number: int) -> None:
            for query in queries(kind, 1000 * seed + number):
                started = time.perf_counter()
                if started > end:
                    return
                await service.recommend([query], ["history"])
                found[kind].append(time.perf_counter() - started)

        await asyncio.gather(*(client(kind, n) for kind, clients in CLIENTS.items() for n in range(clients)))
    return found


async def check(model: ServedModel) -> None:
    """Answers under load equal those of requests alone."""
    import json

    kinds = [kind for kind in CLIENTS for _ in range(3)]
    wanted = [next(queries(kind, number)) for number, kind in enumerate(kinds)]
    async with RecommendationService(model, ServingSettings(timeout=600), load=lambda version: None) as service:
        alone = [json.loads((await service.recommend([query], ["history"]))[0]) for query in wanted]
        together = await asyncio.gather(*(service.recommend([query], ["history"]) for query in wanted))
    for mine, (theirs,) in zip(alone, together, strict=True):
        key = "items" if "items" in mine else "sessions"
        if mine[key] != json.loads(theirs)[key]:
            raise AssertionError(f"{mine[key]} alone, {json.loads(theirs)[key]} under load")


def main() -> None:
    args = parser(__doc__).parse_args()
    one_thread()
    duration, repetitions = (3.0, 1) if args.quick else (20.0, 3)
    values: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        save_model(f"{folder}/model", args.quick)

        def loaded() -> ServedModel:
            model = ServedModel.load(f"{folder}/model")
            assert model is not None
            return model

        asyncio.run(check(loaded()))
        for repetition in range(repetitions):
            tails: dict[str, dict[tuple[int, int], float]] = {}
            for name, share in BATCHERS.items():
                batching._SMALL = share
                found = asyncio.run(load(loaded(), duration, repetition))
                tails[name] = {}
                for kind in CLIENTS:
                    seconds, label = sorted(found[kind]), f"{kind[0]}x{kind[1]}"
                    tails[name][kind] = 1e3 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))]
                    values[f"{name}/p50_{label}"].append(1e3 * statistics.median(seconds))
                    values[f"{name}/p99_{label}"].append(tails[name][kind])
                values[f"{name}/rps"].append(sum(map(len, found.values())) / duration)
                say(f"{repetition} {name}: { ({kind: round(tail) for kind, tail in tails[name].items()}) }")
            for kind in CLIENTS:
                values[f"p99_ratio_{kind[0]}x{kind[1]}"].append(tails["batches"][kind] / tails["steps"][kind])
    rows = []
    for name, each in values.items():
        unit = "ratio" if "ratio" in name else "requests/s" if name.endswith("rps") else "ms"
        rows.append(result_row(name, statistics.median(each), unit, spread=[min(each), max(each)]))
    finish(rows, args.json, clients={f"{items}x{beams}": n for (items, beams), n in CLIENTS.items()})


if __name__ == "__main__":
    main()
