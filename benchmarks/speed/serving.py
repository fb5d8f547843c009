"""
Load test of `onerec-hf serve` on loopback, compared with two simple endpoints.

    python benchmarks/speed/serving.py --json benchmarks/results/serving.json

The same saved model (3.1 million parameters: d = 128, 2 + 2 layers, 24 experts, 12,000 items) is served three times, each server a process with one
torch thread, and answers the same requests: histories of 5 to 50 items, ten items by 50 beams, those of the history left out.

  onerec     `onerec-hf serve` with its defaults
  prefix_fn  FastAPI and `model.generate(prefix_allowed_tokens_fn=...)` over a dict of prefixes, the seen items dropped from 50 beams afterwards
  generate   FastAPI and `model.generate()` under our own constraint: the library's fast path, without batches

The last two are plain `def` endpoints (a thread of FastAPI's pool each) that answer one request at a time: a lock, since threads that compete for
the interpreter are slower. N clients send their next request when they have the answer to the last one, over a persistent connection. The
servers are interleaved in each repetition. Clients (one process) and servers share the machine's cores.

Rows, N = 1, 8, 64: `<server>/rps_N` requests per second; `<server>/p50_N`, `<server>/p99_N` milliseconds from sending to the whole answer;
`<server>/cpu_N` CPU milliseconds of the server per request. `rps_over_<peer>_N` are ratios within a repetition, `cpu_<peer>_over_onerec_N` too.
`onerec/batch_N` is the mean batch. `lost`: requests of all servers together that had no answer, or another than 200 with ten items.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/speed/serving.py`

from benchmarks.harness import finish, parser, say

ITEMS, CODES = 12_000, 256
CLIENTS = (1, 8, 64)
SERVERS = ("onerec", "prefix_fn", "generate")
BEAMS, TOP = 50, 10


def save_model(folder: str, quick: bool) -> None:
    """A generator with random weights and a catalogue of random semantic IDs."""
    import numpy as np
    import torch

    from benchmarks.speed.generation import random_codes
    from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor

    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4}
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    layers: dict[str, Any] = (
        {"encoder_layers": 1, "decoder_layers": 1} if quick else {"encoder_layers": 2, "decoder_layers": 2}
    )
    torch.manual_seed(0)
    config = OneRecConfig(
        codebook_sizes=[CODES] * 3,
        num_attention_heads=4,
        initializer_range=0.1,
        **layers,
        **(small if quick else sizes),
    )
    model: Any = OneRecForConditionalGeneration(config)
    catalogue = ItemCatalogue(np.arange(ITEMS), random_codes(ITEMS, CODES), [CODES] * 3)
    model.set_catalogue(catalogue)
    model.save_pretrained(folder, include_code=False)
    OneRecProcessor.from_catalogue(catalogue, max_history=50).save_pretrained(folder, include_code=False)
    say(f"{sum(weight.numel() for weight in model.parameters()):,} parameters")


def naive_app(folder: str, kind: str):
    """What one would write first: a `def` endpoint around `generate`."""
    import threading
    from collections import defaultdict

    import torch
    from fastapi import FastAPI
    from transformers import AutoModelForSeq2SeqLM, AutoProcessor

    import onerec_hf  # noqa: F401

    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    found: dict[tuple, set[int]] = defaultdict(set)
    for item in (processor.catalogue.codes + torch.tensor(model.config.level_offsets).numpy()).tolist():
        for level in range(3):
            found[tuple(item[:level])].add(item[level])
    children = {prefix: sorted(tokens) for prefix, tokens in found.items()}
    settings = {"num_beams": BEAMS, "max_new_tokens": 3, "length_penalty": 0.0}
    lock, app = threading.Lock(), FastAPI()

    @app.post("/recommend")
    def recommend(history: Annotated[list[int], Body(embed=True)]):
        seen = set(history)
        with lock, torch.no_grad():
            inputs = processor([history])
            if kind == "prefix_fn":
                out = model.generate(
                    **inputs,
                    **settings,
                    num_return_sequences=BEAMS,
                    constrained=False,
                    prefix_allowed_tokens_fn=lambda _, tokens: children[tuple(tokens[1:].tolist())],
                )
            else:
                rows = torch.from_numpy(processor.catalogue.indices(history))[None]
                out = model.generate(**inputs, **settings, num_return_sequences=TOP, exclude=rows)
        return {"items": [item for (item,) in processor.batch_decode(out) if item not in seen][:TOP]}

    return app


def naive_main(folder: str, kind: str) -> None:
    """A process that serves [`naive_app`] on a free port, which it prints."""
    import uvicorn

    from onerec_hf.serving.server import listen

    app, bound = naive_app(folder, kind), listen("127.0.0.1", 0)
    print(f"http://127.0.0.1:{bound.getsockname()[1]} ", file=sys.stderr, flush=True)
    asyncio.run(uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).serve([bound]))


class Server:
    """A server's process, once it answers."""

    def __init__(self, name: str, folder: str, log: Path):
        self.name, self.log, self.started = name, log, time.perf_counter()
        command = (
            ["-m", "onerec_hf.cli.main", "serve", "--model", folder, "--port", "0", "--threads", "1"]
            if name == "onerec"
            else [__file__, "--naive", folder, name]
        )
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, *command], stderr=log.open("w"), env=env)

    def wait(self) -> float:
        """Seconds from its start to its first answer."""
        while "http://" not in self.log.read_text():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name}: {self.log.read_text()}")
            time.sleep(0.02)
        self.port = int(self.log.read_text().split("http://127.0.0.1:")[1].split()[0])
        while True:
            try:
                self.ask([1, 2, 3])
                return time.perf_counter() - self.started
            except urllib.error.HTTPError as error:  # which is an OSError
                raise RuntimeError(f"{self.name}: {error.read().decode()}\n{self.log.read_text()}") from error
            except OSError:
                time.sleep(0.02)

    def ask(self, history: list[int]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/recommend",
            json.dumps({"history": history}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)

    def cpu(self) -> float:
        """CPU seconds of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024

    def batches(self) -> tuple[float, float]:
        """How many batches `onerec` has computed, and of how many histories."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as response:
            lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[0] != "#")
        return float(lines["onerec_batch_size_count"]), float(lines["onerec_batch_size_sum"])


async def client(port: int, end: float, rng: random.Random, seconds: list[float], lost: list[str]) -> None:
    """Sends a request, reads its answer, and again until `end`."""
    writer: Any = None
    while time.perf_counter() < end:
        history = rng.sample(range(ITEMS), rng.randint(5, 50))
        body = json.dumps({"history": history}).encode()
        head = f"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        started = time.perf_counter()
        try:
            if writer is None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            answer = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)).decode().lower()
            content = await reader.readexactly(int(answer.split("content-length:")[1].split("\r\n")[0]))
        except (TimeoutError, OSError, EOFError) as error:
            lost.append(repr(error))
            writer = None
            continue
        if not answer.startswith("http/1.1 200"):
            lost.append(content.decode()[:200])
        elif len(set(json.loads(content)["items"]) - set(history)) != TOP:
            lost.append(f"not {TOP} new items")
        else:
            seconds.append(time.perf_counter() - started)
    if writer is not None:
        writer.close()


async def load(port: int, clients: int, duration: float, seed: int) -> tuple[list[float], list[str], float]:
    """Seconds of each answered request, what was lost, and how long it took until the last answer."""
    seconds: list[float] = []
    lost: list[str] = []
    started = time.perf_counter()
    callers = (
        client(port, started + duration, random.Random(1000 * seed + number), seconds, lost)
        for number in range(clients)
    )
    await asyncio.gather(*callers)
    return seconds, lost, time.perf_counter() - started


def check_answers(servers: dict[str, Server]) -> None:
    """All servers answer with the same items: they have the same weights."""
    rng = random.Random(0)
    for _ in range(3):
        history = rng.sample(range(ITEMS), 20)
        mine = servers["onerec"].ask(history)
        peer = servers["generate"].ask(history)
        if mine["items"] != peer["items"]:
            raise AssertionError(f"onerec answers {mine['items']}, generate {peer['items']}")


def measure(servers: dict[str, Server], repetitions: int, duration: dict[int, float]):
    """Lists over repetitions by row name, and everything that was lost."""
    values: dict[str, list[float]] = defaultdict(list)
    lost: list[str] = []
    for repetition in range(repetitions):
        for clients in CLIENTS:
            for name, server in servers.items():
                before, batches = server.cpu(), server.batches() if name == "onerec" else (0, 0)
                seconds, missing, took = asyncio.run(load(server.port, clients, duration[clients], repetition))
                lost += [f"{name}, {clients} clients: {reason}" for reason in missing]
                seconds.sort()
                values[f"{name}/rps_{clients}"].append(len(seconds) / took)
                values[f"{name}/p50_{clients}"].append(1e3 * statistics.median(seconds))
                values[f"{name}/p99_{clients}"].append(1e3 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))])
                values[f"{name}/cpu_{clients}"].append(1e3 * (server.cpu() - before) / len(seconds))
                if name == "onerec":
                    count, histories = server.batches()
                    values[f"onerec/batch_{clients}"].append((histories - batches[1]) / (count - batches[0]))
                say(
                    f"{repetition} {name:>9} {clients:>2} clients: {len(seconds) / took:6.1f} requests/s, {len(missing)} lost"
                )
    return values, lost


def rows_of(values: dict[str, list[float]]) -> list[dict[str, Any]]:
    from onerec_hf.evaluation.results import result_row

    units = {"rps": "requests/s", "p50": "ms", "p99": "ms", "cpu": "ms", "batch": "histories"}
    rows = []
    for name, each in values.items():
        unit = units[name.split("/")[1].split("_")[0]]
        rows.append(result_row(name, statistics.median(each), unit, spread=[min(each), max(each)]))
    for clients in CLIENTS:
        for peer in SERVERS[1:]:
            for label, mine, theirs in (
                (f"rps_over_{peer}_{clients}", f"onerec/rps_{clients}", f"{peer}/rps_{clients}"),
                (f"cpu_{peer}_over_onerec_{clients}", f"{peer}/cpu_{clients}", f"onerec/cpu_{clients}"),
            ):
                ratios = [a / b for a, b in zip(values[mine], values[theirs], strict=True)]
                rows.append(
                    result_row(
                        label, statistics.median(ratios), "ratio", against=theirs, spread=[min(ratios), max(ratios)]
                    )
                )
    return rows


def main() -> None:
    from onerec_hf.evaluation.results import result_row

    args = parser(__doc__).parse_args()
    duration = {clients: 0.7 if args.quick else 6.0 if clients == 64 else 3.0 for clients in CLIENTS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(f"{folder}/model", args.quick)
        servers = {name: Server(name, f"{folder}/model", Path(folder, name)) for name in SERVERS}
        try:
            started = {name: server.wait() for name, server in servers.items()}
            if not args.quick:  # on its own: the others were loading too
                servers["onerec"].process.terminate()
                servers["onerec"].process.wait()
                servers["onerec"] = Server("onerec", f"{folder}/model", Path(folder, "again"))
                started["onerec"] = servers["onerec"].wait()
            idle = servers["onerec"].memory_mib()
            check_answers(servers)
            values, lost = measure(servers, 1 if args.quick else 3, duration)
            busy = servers["onerec"].memory_mib()
            servers["onerec"].process.terminate()
            status = servers["onerec"].process.wait(60)
        finally:
            for server in servers.values():
                server.process.kill()
                server.process.wait()
    for reason in lost[:10]:
        say(f"lost: {reason}")
    rows = rows_of(values)
    rows += [
        result_row("onerec/start", started["onerec"], "s"),
        result_row("onerec/idle_memory", idle, "MiB"),
        result_row("onerec/memory_after_load", busy, "MiB"),
        result_row("onerec/exit_status", status, "status"),
        result_row("lost", len(lost), "requests"),
    ]
    finish(rows, args.json, cores=os.cpu_count(), clients_share_cores=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--naive"]:
        naive_main(*sys.argv[2:])
    else:
        main()
