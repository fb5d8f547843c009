"""Clients that hold connections, stall, leave, or send what is costly: others are served as before, and the server ends when it should."""

import contextlib
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from onerec_hf.serving import connections
from onerec_hf.serving.connections import Seldom
from tests.serving.running import Running

GOOD = {"history": ["m1", "m2"]}


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def head(length, path="/recommend", method="POST", host="x"):
    return (
        f"{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    ).encode()


def test_an_upload_that_stalls_does_not_hold_the_end(folder):
    with Running(folder, drain_timeout=60.0, timeout=60.0) as server, connect(server) as stalled:
        stalled.sendall(head(100) + b'{"history"')
        server.wait_until(lambda: server.service.uploads)
        started = time.monotonic()
        server.stop()
        answer = b"".join(iter(lambda: stalled.recv(10_000), b"")).decode()
        server.wait_until(lambda: server.stopped)
        assert time.monotonic() - started < 20
    assert " 503 " in answer
    assert "stopping" in answer


def test_an_upload_that_goes_on_is_answered_at_the_end(folder):
    body = json.dumps(GOOD).encode()
    with Running(folder) as server, connect(server) as slow:
        slow.sendall(head(len(body)) + body[:5])
        server.wait_until(lambda: server.service.uploads)
        server.stop()
        server.wait_until(lambda: server.service.draining)
        slow.sendall(body[5:])
        assert b" 200 " in slow.recv(100)


def test_half_a_head_does_not_hold_the_end(folder):
    with Running(folder) as server, connect(server) as stalled:
        stalled.sendall(head(100)[:20])
        server.wait_until(lambda: server.server.server_state.connections)
        started = time.monotonic()
        server.stop()
        server.wait_until(lambda: server.stopped)
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("sent", [b"", b"GET /health HT"])
def test_a_head_that_does_not_arrive(folder, sent):
    with Running(folder, timeout=0.3) as server, connect(server) as stalled:
        stalled.sendall(sent)
        started = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert stalled.recv(100) == b""
        assert time.monotonic() - started < 20


def test_idle_connections_make_way_for_others(folder, monkeypatch, caplog):
    monkeypatch.setattr(connections, "capacity", lambda: (4, 8))
    monkeypatch.setattr("onerec_hf.serving.server.capacity", connections.capacity)
    with Running(folder) as server:
        held = []
        for _ in range(20):
            held.append(connect(server))
            held[-1].sendall(b"GET /health HTTP/1.1\r\n")
        assert [server.post(GOOD).status_code for _ in range(5)] == [200] * 5
        assert len(server.server.server_state.connections) <= 5
        for each in held:
            each.close()
    assert "closing the idle one" in caplog.text


def test_capacity_stays_below_the_descriptors(monkeypatch):
    import resource

    for limit in (64, 256, 1024, resource.RLIM_INFINITY):
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        monkeypatch.setattr("os.listdir", lambda path: ["0"] * 20)
        most, waiting = connections.capacity()
        assert 0 < waiting <= most
        assert limit < 0 or most + waiting + 20 < limit


def test_the_log_takes_a_message_once_in_a_while(caplog):
    logger = logging.getLogger("tests.seldom")
    seldom = Seldom(seconds=0.2)
    logger.addFilter(seldom)
    for number in range(1000):
        logger.error(f"out of descriptors\nsocket {number}")
    time.sleep(0.25)
    logger.error("out of descriptors\nagain")
    logger.error("another")
    logger.removeFilter(seldom)
    assert [record.getMessage().split("\n")[0] for record in caplog.records] == [
        "out of descriptors",
        "out of descriptors (999 more like it before)",
        "another",
    ]


def test_who_leaves_is_not_computed(folder):
    with Running(folder, max_batch_size=1) as server:
        server.hold()
        waiting = threading.Thread(target=server.post, args=(GOOD,))
        waiting.start()
        server.wait_until(lambda: server.service.batcher.computing)
        with connect(server) as leaves:
            body = json.dumps([GOOD] * 8).encode()
            leaves.sendall(head(len(body)) + body)
            server.wait_until(lambda: server.service.in_flight == 2)
        server.wait_until(lambda: server.service.in_flight == 1)
        server.release()
        waiting.join()
        server.wait_until(lambda: not server.service.batcher.queue_length)
        assert server.metric("onerec_batch_size_sum") == 1


def test_no_redirect_leads_to_the_host_that_a_request_names(server):
    for path in ("/recommend/", "/health/", "//recommend", "/docs/"):
        with connect(server) as client:
            client.sendall(head(0, path, "GET", host="evil.example"))
            answer = client.recv(10_000).decode()
        assert " 404 " in answer
        assert "location" not in answer.lower()
        assert "evil" not in answer


def test_a_reload_that_hangs_is_given_up(folder):
    """Neither later reloads nor the end wait for it; a model that comes too late is let go."""
    token, go_on = "a-token-of-the-tests", threading.Event()
    with Running(folder, token=token, reload_timeout=0.5) as server:
        load, late = server.service._load, []

        def hanging(version):
            assert go_on.wait(60)
            late.append(load(""))
            return late[-1]

        server.service._load = hanging
        version = server.service.model.version
        refused = server.post(b"", "/reload")
        assert refused.status_code == 409
        assert refused.json()["detail"].startswith("reload failed: the model is not loaded after 0.5 seconds")
        server.service._load = load
        assert server.post(b"", "/reload").json()["reloaded"] is False
        go_on.set()
        server.wait_until(lambda: late)
        server.wait_until(lambda: not server.service.is_loading)
        assert server.service.model.version == version
        assert server.service.model is not late[0]
        server.wait_until(lambda: late[0].model.get_decoder().layers[0].mlp.experts.packed is None)
        assert server.post(GOOD).status_code == 200
        go_on.clear()
        server.service._load = hanging
        reload = threading.Thread(target=server.post, args=(b"", "/reload"))
        server.service.settings.__dict__["reload_timeout"] = 60.0
        reload.start()
        server.wait_until(lambda: server.service.is_loading)
        started = time.monotonic()
        server.stop()
        server.wait_until(lambda: server.stopped)
        assert time.monotonic() - started < 20
        go_on.set()
        reload.join()


@pytest.mark.parametrize(
    "body",
    [b"[" + b"[]," * 100_000 + b"[]]", json.dumps([GOOD] * 20_000).encode(), b"{" + b'"a":1,' * 100_000 + b'"b":1}'],
    ids=["lists", "queries", "keys"],
)
def test_many_small_parts_are_refused_before_they_are_parsed(folder, body, monkeypatch):
    with Running(folder) as server:
        parser = SimpleNamespace(loads=lambda body: pytest.fail("parsed"))
        monkeypatch.setattr("onerec_hf.serving.bodies.json", parser)
        response = server.post(body)
        assert response.status_code == 422
        assert "this server accepts 1 to 64 histories per request" in response.json()["detail"]


def test_structure_inside_of_strings_is_none(server):
    ids = ["[{:" * 400] * 3
    assert server.post(GOOD | {"exclude": ids}).json()["unknown_items"] == 3


def test_small_requests_beside_the_largest(folder):
    """Two clients send requests of the largest size without end; a small one is answered between their steps."""
    large = [{"history": ["m1", "m2"], "top_k": 100, "num_beams": 128, "session_length": 10}] * 32
    small, stop = {"history": ["m1"], "top_k": 1, "num_beams": 4}, threading.Event()
    with Running(folder, drain_timeout=0.0) as server:

        def ask():
            while not stop.is_set():
                server.post(large)

        clients = [threading.Thread(target=ask) for _ in range(2)]
        for each in clients:
            each.start()
        try:
            server.wait_until(lambda: server.service.batcher.computing)
            batcher = server.service.batcher
            for _ in range(5):
                before, open_batches = batcher._now, list(batcher._running)
                assert server.post(small).status_code == 200
                # No more than the batches that were open, and another of each client, have been computed meanwhile.
                assert batcher._now - before <= 3 * max(batch.cost for batch in [*open_batches, *batcher._running])
        finally:
            stop.set()
            server.stop()
            for each in clients:
                each.join()
