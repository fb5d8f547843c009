"""What a request may hold and who may send it: every refusal has its status and a sentence that says what to mend."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.running import Running

TOKEN = "a-token-of-the-tests"
GOOD = {"history": ["m1", "m2"]}

REFUSED = [
    (b"{", 400, "not valid JSON: Expecting property name"),
    (b"\xff\xfe", 400, "not valid JSON"),
    (b"\xfa", 400, "parsing the body"),
    (b'{"history": ["m1"]', 400, "not valid JSON"),
    (b'{"history": [1' + b"0" * 5000 + b"]}", 400, "parsing the body"),
    (b"[" * 3000, 422, "holds 3000 lists and objects; this server accepts 1 to 8 histories per request"),
    (b'{"history": ["m1"]' + b',"a":1' * 1000 + b"}", 422, "holds 1001 keys"),
    (b'"' + b'\\"' * 9_000 + b"[" * 1000, 400, "not valid JSON: Unterminated string"),
    (b"", 422, 'send an object like {"history"'),
    (3, 422, 'send an object like {"history"'),
    (["m1"], 422, "query 0: send an object"),
    ({}, 422, "history: Field required"),
    ([GOOD, {"top_k": 3}], 422, "query 1: history: Field required"),
    ([], 422, "1 to 8 histories per request; got 0"),
    ([GOOD] * 9, 422, "1 to 8 histories per request; got 9"),
    ({"history": []}, 422, "history is empty"),
    ([GOOD, {"history": ["x"]}], 422, "history of query 1 holds no item of the catalogue"),
    ({"history": "m1"}, 422, "history: Input should be a valid list"),
    ({"history": None}, 422, "history: Input should be a valid list"),
    ({"history": [["m1"]]}, 422, "history[0] must be an item id"),
    ({"history": ["m1", True]}, 422, "history[1] must be an item id"),
    ({"history": ["m1", 1.0]}, 422, "history[1] must be an item id"),
    (b'{"history": [NaN]}', 422, "history[0] must be an item id"),
    (b'{"history": ["\\ud800"]}', 422, "history"),
    ({"history": ["m1\0"]}, 422, "NUL"),
    ({"history": [7]}, 422, "of type str; got 7"),
    ({"history": ["m1", 7]}, 422, "all integers or all strings"),
    ({"history": ["m1"] * 51}, 422, "history has 51 items, this server takes 50"),
    (GOOD | {"exclude": ["m1"] * 46}, 422, "exclude of history has 46 items, this server takes 45"),
    (GOOD | {"allow": ["m1"] * 46}, 422, "allow of history has 46 items, this server takes 45"),
    (GOOD | {"allow": []}, 422, "leave 0 of 40 items"),
    (GOOD | {"allow": ["m1"]}, 422, "leave 0 of 40 items, too few for a session of 1"),
    (GOOD | {"exclude": [f"m{i}" for i in range(1, 39)], "session_length": 3}, 422, "leave 2 of 40 items, too few"),
    (GOOD | {"top_k": 0}, 422, "top_k: Input should be greater than or equal to 1"),
    (GOOD | {"top_k": 101}, 422, "top_k is at most 100 on this server; got 101"),
    (GOOD | {"top_k": 10**30}, 422, "top_k is at most 100 on this server; got far more"),
    (GOOD | {"top_k": "5"}, 422, "top_k: Input should be a valid integer"),
    (GOOD | {"top_k": 2.5}, 422, "top_k: Input should be a valid integer"),
    (GOOD | {"top_k": True}, 422, "top_k: Input should be a valid integer"),
    (GOOD | {"num_beams": 129}, 422, "num_beams is at most 128"),
    (GOOD | {"num_beams": 5, "top_k": 6}, 422, "top_k=6 exceeds num_beams=5; raise num_beams"),
    (GOOD | {"session_length": 11}, 422, "session_length is at most 10"),
    (GOOD | {"exclude_seen": "no"}, 422, "exclude_seen: Input should be a valid boolean"),
    (GOOD | {"unknown": "ignore"}, 422, "unknown:"),
    (GOOD | {"topk": 3}, 422, "unknown key 'topk'; use history, user, top_k"),
    (GOOD | {"k" * 500: 3}, 422, "unknown key"),
]


@pytest.mark.parametrize(("body", "status", "fragment"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(server, body, status, fragment):
    response = server.post(body)
    assert response.status_code == status, response.text
    detail = response.json()["detail"]
    assert fragment in detail
    assert len(detail) < 400


def test_sizes(server):
    too_large = {"history": ["m1"], "exclude": ["m" * 20_000]}
    assert server.post(too_large).status_code == 413
    assert "limit of 20000 bytes" in server.post(too_large).json()["detail"]

    def chunks():
        for _ in range(40):
            yield b" " * 1000

    response = server.client.post(
        server.url + "/recommend", content=chunks(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert server.post(GOOD).status_code == 200


def test_other_types_of_content_paths_and_methods(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = server.post(GOOD, headers={"content-type": kind})
        assert response.status_code == 415, response.text
    assert server.post(GOOD, headers={"content-type": "application/json; charset=utf-8"}).status_code == 200
    assert server.get("/recommend").status_code == 405
    assert server.get("/nothing").status_code == 404


def test_probes_and_schema(server):
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready", "model": server.service.model.version}
    schema = server.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/recommend", "/similar", "/health", "/ready", "/metrics", "/reload"}
    assert set(schema["components"]["schemas"]["Query"]["properties"]) >= {"history", "exclude", "allow", "top_k"}
    assert set(schema["paths"]["/recommend"]["post"]["responses"]) >= {"200", "401", "413", "422", "503", "504"}


def test_metrics_are_prometheus_text(server):
    from prometheus_client.parser import text_string_to_metric_families

    server.post(GOOD)
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    assert {"onerec_requests", "onerec_request_seconds", "onerec_batch_size", "onerec_queue_length"} <= set(families)
    (model,) = families["onerec_model_info"].samples
    assert model.labels == {"version": server.service.model.version}
    paths = {sample.labels["path"] for sample in families["onerec_requests"].samples}
    server.get("/one-of-many-paths")
    assert "/one-of-many-paths" not in server.get("/metrics").text
    assert "/recommend" in paths


def test_without_a_token_there_is_no_reload_over_http(server):
    response = server.post(b"", "/reload")
    assert response.status_code == 403
    assert "SIGHUP" in response.json()["detail"]


@pytest.fixture(scope="module")
def guarded(folder):
    with Running(folder, token=TOKEN, max_body_bytes=1000, max_queue=4, max_histories=4, timeout=3.0) as running:
        yield running


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer wrong", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"]
)  # fmt: skip
def test_without_the_token(guarded, authorization):
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    for method, path in (("POST", "/recommend"), ("GET", "/metrics"), ("POST", "/reload"), ("GET", "/nothing")):
        response = guarded.client.request(method, guarded.url + path, headers=headers, content=b"x" * 900)
        assert response.status_code == 401, (path, response.text)
        assert response.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in response.text
    for path in ("/health", "/ready", "/openapi.json"):
        assert guarded.get(path).status_code == 200


def test_with_the_token(guarded):
    assert guarded.post(GOOD).status_code == 200
    assert guarded.post(GOOD, headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
    assert guarded.post(b"", "/reload").json()["reloaded"] is False
    assert TOKEN not in guarded.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text


def test_a_full_queue_and_the_timeout(guarded):
    """One batch is held: the queue of four fills, the next request is refused, those that wait get 504 after three seconds."""
    batcher = guarded.service.batcher
    guarded.hold()
    try:
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(guarded.post, GOOD)
            guarded.wait_until(lambda: batcher.computing)
            waiting = pool.submit(guarded.post, [GOOD] * 4)
            guarded.wait_until(lambda: batcher.queue_length == 4)
            refused = guarded.post(GOOD)
            assert refused.status_code == 503
            assert "queue of 4 histories is full" in refused.json()["detail"]
            assert int(refused.headers["retry-after"]) >= 1
            for response in (first.result(), waiting.result()):
                assert response.status_code == 504
                assert "within 3 seconds" in response.json()["detail"]
    finally:
        guarded.release()
    guarded.wait_until(lambda: not batcher.computing and not batcher.queue_length)
    assert guarded.post(GOOD).status_code == 200


def test_a_body_that_does_not_arrive(guarded):
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        head = f"POST /recommend HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n"
        slow.sendall((head + 'content-type: application/json\r\ncontent-length: 100\r\n\r\n{"history"').encode())
        answer = b"".join(iter(lambda: slow.recv(10_000), b"")).decode()
    assert " 408 " in answer
    assert "did not arrive within 3 seconds" in answer
    assert json.loads(answer.split("\r\n\r\n")[1])


def test_failures_of_the_model_are_said_without_details(guarded, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("inner secret")

    monkeypatch.setattr(guarded.service.model.model, "recommend", broken)
    response = guarded.post(GOOD)
    assert response.status_code == 500
    assert "inner secret" not in response.text
    assert "inner secret" in caplog.text
    monkeypatch.undo()
    assert guarded.post(GOOD).status_code == 200
