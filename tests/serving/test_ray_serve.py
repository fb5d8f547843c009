"""The example for Ray Serve on a local cluster: no request is lost while a replica is killed and while the model is replaced."""

import asyncio
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from onerec_hf.serving.models import ServedModel, version_of
from onerec_hf.serving.schema import Query
from onerec_hf.serving.server import listen
from onerec_hf.serving.settings import ServingSettings

ROOT = Path(__file__).parents[2]
HISTORIES = [["m1", "m2"], ["m3"], ["m4", "m5", "m6", "m7"]]


class Clients:
    """Clients that send the next request when they have the answer to the last one."""

    def __init__(self, url, count):
        self.url, self.answers = url, []
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]

    def _ask(self, number):
        with httpx.Client(timeout=120, trust_env=False) as client:
            while not self._ended.is_set():
                number = (number + 1) % len(HISTORIES)
                response = client.post(self.url, json={"history": HISTORIES[number], "top_k": 3})
                self.answers.append((response.status_code, number, response.json()))

    def wait(self, condition):
        """Until a condition on a new answer holds."""
        start, end = len(self.answers), time.monotonic() + 240
        while not any(map(condition, self.answers[start:])):
            assert time.monotonic() < end
            assert any(thread.is_alive() for thread in self._threads)
            time.sleep(0.05)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        for thread in self._threads:
            thread.join()


def expected(folder):
    """The items of each history, by the model alone."""
    model = ServedModel.load(str(folder))
    found = []
    for history in HISTORIES:
        key, row = model.prepare(Query(history=history, top_k=3), "history", ServingSettings(), "skip")
        found += [model.answer(key, [row])[0]["items"]]
    model.close()
    return found


def replicas():
    """Processes of the cluster that hold a model."""
    found = []
    for process in psutil.Process().children(recursive=True):
        line = process.cmdline()
        if line and line[0].startswith("ray::ServeReplica:onerec:Model"):
            found.append(process)
    return found


def test_a_body_is_read_up_to_the_limit():
    pytest.importorskip("ray.serve")
    spec = importlib.util.spec_from_file_location("serve_with_ray", ROOT / "examples" / "serve_with_ray.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sent, answered = [], []

    async def receive():
        sent.append(1 << 18)
        return {"type": "http.request", "body": bytes(sent[-1]), "more_body": len(sent) < 40}

    class Answer:
        async def remote(self, scope, body):
            answered.append(len(body))
            return 413, {}, b""

    scope = {"type": "http", "method": "POST", "path": "/recommend", "query_string": b"", "headers": []}
    front = example.Front.func_or_class(SimpleNamespace(answer=Answer()))
    response = asyncio.run(front(example.Request(scope, receive)))
    assert response.status_code == 413
    assert sum(sent) == answered[0] == (1 << 20) + (1 << 18)


def test_a_replica_without_the_token_does_not_start(monkeypatch):
    pytest.importorskip("ray.serve")
    monkeypatch.delenv("ONEREC_HF_TOKEN", raising=False)
    spec = importlib.util.spec_from_file_location("serve_with_ray", ROOT / "examples" / "serve_with_ray.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = object.__new__(example.Model.func_or_class)
    with pytest.raises(RuntimeError, match="ONEREC_HF_TOKEN is not set where `ray start` ran"):
        asyncio.run(model.__init__("no-model", needs_token=True))


@pytest.mark.slow
def test_no_request_is_lost(save, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.serve")
    folders = [save(seed=0), save(seed=1)]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # on a busy machine
    ray.init(num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]

    def deploy(folder):
        command = [sys.executable, ROOT / "examples" / "serve_with_ray.py", "--model", folder, "--replicas", "2"]
        env = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        subprocess.run([*command, "--cpus", "0.5", "--port", str(port)], env=env, check=True, timeout=300)

    try:
        deploy(folders[0])
        with Clients(f"http://127.0.0.1:{port}/recommend", count=8) as clients:
            clients.wait(lambda answer: True)
            before = replicas()
            before[0].send_signal(signal.SIGKILL)
            clients.wait(lambda answer: True)
            deploy(folders[1])
            clients.wait(lambda answer: answer[2].get("model") == version_of(folders[1]))
        health = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60, trust_env=False)
        refused = httpx.post(f"http://127.0.0.1:{port}/recommend", json={"history": []}, timeout=60, trust_env=False)
    finally:
        ray.shutdown()
    assert len(before) == 2
    assert Counter(status for status, *_ in clients.answers) == {200: len(clients.answers)}
    versions = {version_of(folder): expected(folder) for folder in folders}
    assert {answer["model"] for _, _, answer in clients.answers} == set(versions)
    for _, number, answer in clients.answers:
        assert answer["items"] == versions[answer["model"]][number]
    assert (health.status_code, refused.status_code) == (200, 422)
    assert "empty" in refused.json()["detail"]
