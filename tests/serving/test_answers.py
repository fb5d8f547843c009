"""What comes over HTTP is what `recommend()` returns, for every caller's own settings, alone or in a batch."""

import numpy as np
import pytest

from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.serving.models import load_generator
from tests.rounding import close


@pytest.fixture(scope="module")
def expected(folder):
    """Answers of the library to a query."""
    model = OneRecForConditionalGeneration.from_pretrained(folder).eval()
    processor = OneRecProcessor.from_pretrained(folder)

    def answer(history, top_k=10, session_length=1, num_beams=50, exclude_seen=True, exclude=(), allow=None):
        left_out = [*exclude, *(history if exclude_seen else ())]
        out = model.recommend(
            **processor([history]),
            session_length=session_length,
            num_beams=num_beams,
            num_return_sequences=top_k,
            exclude=[left_out] if left_out else None,
            allow=None if allow is None else [allow],
            return_dict_in_generate=True,
        )
        sessions = [session for session in processor.batch_decode(out) if session]
        scores = out.sequences_scores.tolist()[: len(sessions)]
        if session_length == 1:
            return {"items": [session[0] for session in sessions], "scores": scores}
        return {"sessions": sessions, "scores": scores}

    return answer


def same(answer, wanted):
    assert {key: answer[key] for key in wanted if key != "scores"} == {
        key: value for key, value in wanted.items() if key != "scores"
    }
    assert answer["scores"] == close(wanted["scores"])


def queries(count, seed=0):
    """Different histories with different constraints and settings."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        items = [f"m{i}" for i in rng.permutation(40)]
        query = {"history": items[: rng.integers(1, 9)], "top_k": int(rng.integers(1, 12))}
        if number % 2:
            query["exclude"] = items[10 : 10 + int(rng.integers(1, 15))]
        if number % 3 == 0:
            query["allow"] = items[5:30]
        if number % 4 == 0:
            query["exclude_seen"] = False
        if number % 5 == 0:
            query["session_length"] = 2
        if number % 7 == 0:
            query["num_beams"] = 12
        found.append(query)
    return found


QUERIES = queries(24)


@pytest.mark.parametrize("number", range(8))
def test_one_answer_is_the_librarys(server, expected, number):
    response = server.post(QUERIES[number])
    assert response.status_code == 200, response.text
    same(response.json(), expected(**QUERIES[number]))
    assert response.json()["model"] == server.service.model.version
    assert response.json()["unknown_items"] == 0


def test_concurrent_callers_each_get_their_own_answer(server, expected):
    batches, histories = server.metric("onerec_batch_size_count"), server.metric("onerec_batch_size_sum")
    responses = server.post_all(QUERIES)
    for response, query in zip(responses, QUERIES, strict=True):
        assert response.status_code == 200, response.text
        same(response.json(), expected(**query))
    assert server.metric("onerec_batch_size_sum") - histories == len(QUERIES)
    assert server.metric("onerec_batch_size_count") - batches < len(QUERIES)


def test_what_arrives_while_a_batch_is_computed_shares_the_next(server, expected):
    plain = [{"history": [f"m{i}", f"m{i + 1}"], "exclude": [f"m{i + 2}"], "top_k": 1 + i % 3} for i in range(8)]
    server.hold()
    try:
        batches = server.metric("onerec_batch_size_count")
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(server.post, {"history": ["m0"], "session_length": 2})
            server.wait_until(lambda: server.service.batcher.computing)
            others = [pool.submit(server.post, query) for query in plain]
            server.wait_until(lambda: server.service.batcher.queue_length == 8)
            assert server.metric("onerec_queue_length") == 8
            assert server.metric("onerec_in_flight_requests") == 9
            server.release()
            assert first.result().status_code == 200
            for query, response in zip(plain, others, strict=True):
                same(response.result().json(), expected(**query))
    finally:
        server.release()
    assert server.metric("onerec_batch_size_count") - batches == 2
    assert server.metric("onerec_in_flight_requests") == 0


def test_many_histories_in_one_request(server, expected):
    response = server.post(QUERIES[:8])
    assert response.status_code == 200, response.text
    for answer, query in zip(response.json(), QUERIES[:8], strict=True):
        same(answer, expected(**query))


def test_long_histories_are_read_as_far_as_the_model_does_but_left_out_whole(server, expected):
    history = [f"m{i}" for i in range(30)]
    answer = server.post({"history": history, "num_beams": 40, "top_k": 40}).json()
    same(answer, expected(history[-10:], top_k=40, num_beams=40, exclude=history))
    assert not set(answer["items"]) & set(history)
    assert len(answer["items"]) == 10  # all that is left


def test_unknown_items_are_counted_and_skipped_or_an_error(server, expected):
    before = server.metric("onerec_unknown_items_total")
    query = {"history": ["x", "m1", "y"], "exclude": ["z"], "allow": ["m2", "m3", "w"]}
    answer = server.post(query).json()
    same(answer, expected(["m1"], allow=["m2", "m3"]))
    assert answer["unknown_items"] == 4
    assert server.metric("onerec_unknown_items_total") - before == 4
    response = server.post(query | {"unknown": "error"})
    assert response.status_code == 422
    assert "2 of 3 items are not in the catalogue of 40 items, e.g. ['x', 'y']" in response.json()["detail"]


def test_integer_ids(tmp_path):
    from onerec_hf import ItemCatalogue
    from tests.conftest import make_model
    from tests.serving.running import Running

    catalogue = ItemCatalogue([7, 8, 9], codes=[[0, 1], [1, 0], [1, 1]], codebook_sizes=[2, 2])
    make_model(catalogue).save_pretrained(tmp_path, include_code=False)
    OneRecProcessor.from_catalogue(catalogue).save_pretrained(tmp_path, include_code=False)
    with Running(tmp_path, unknown="error") as server:
        assert sorted(server.post({"history": [7]}).json()["items"]) == [8, 9]
        assert server.post({"history": [7, 10]}).status_code == 422
        assert server.post({"history": [7, 10], "unknown": "skip"}).json()["unknown_items"] == 1
        response = server.post({"history": ["7"]})
        assert response.status_code == 422
        assert "of type int; got '7'" in response.json()["detail"]
        assert "64 bits" in server.post({"history": [2**63]}).json()["detail"]


@pytest.mark.parametrize("user", ["u1", 7, "", 0, '"é\n', 2**70, "u" * 500])
def test_the_users_id_passes_through(server, user):
    one = server.post({"history": ["m1"], "user_id": user})
    assert one.json()["user_id"] == user
    assert "user_id" not in server.post({"history": ["m1"], "user_id": None}).json()
    many = server.post(
        [{"history": ["m1"], "user_id": user}, {"history": ["m2"]}, {"history": ["m3"], "user_id": "b"}]
    )
    assert [answer.get("user_id") for answer in many.json()] == [user, None, "b"]
    for wrong in (1.5, True, ["u1"], {}):
        assert server.post({"history": ["m1"], "user_id": wrong}).status_code == 422


def test_the_docs_page_loads_nothing_from_elsewhere(server):
    import base64
    import hashlib
    import re

    response = server.get("/docs")
    page, policy = response.text, response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(src|href|action)=["'](https?:|//)|@import|url\(""", page)
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    for name in ("history", "top_k", "user_id", "diversity", "unknown_items", "/recommend", "/reload", "openapi.json"):
        assert name in page


def test_similar_items_are_those_of_the_pipeline(server, folder):
    found = load_generator(folder).similar_items(["m4", "m17"], top_k=3)
    response = server.client.post(f"{server.url}/similar", json={"similar_to": ["m4", "m17"], "top_k": 3})
    assert response.status_code == 200, response.text
    answers = response.json()
    assert [answer["similar_to"] for answer in answers] == ["m4", "m17"]
    for answer, similar in zip(answers, found, strict=True):
        assert answer["items"] == [each["item"] for each in similar]
        assert answer["scores"] == close([each["score"] for each in similar])
        assert answer["model"] == server.service.model.version
    assert server.metric('onerec_requests_total{path="/similar",status="200"}') >= 1
    page = server.client.get(f"{server.url}/docs").text
    assert "POST /similar" in page
    assert "similar_to" in page


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"similar_to": ["m4", "x9"]}, "similar_to: 1 of 2 items are not in the catalogue"),
        ({"similar_to": []}, "items of similar_to per request"),
        ({"similar_to": ["m4"] * 65}, "items of similar_to per request"),
        ({"similar_to": ["m4"], "top_k": 10**6}, "top_k is at most"),
        ({"similar_to": [4]}, "similar_to"),
        ({"similar_to": ["m4", 1.5]}, "similar_to[1] must be an item id"),
        ({"history": ["m4"]}, "similar_to"),
        ({"similar_to": ["m4"], "history": ["m4"]}, "unknown key 'history'; use similar_to, top_k"),
        (["m4"], '{"similar_to": [item ids]}'),
    ],
)
def test_requests_for_similar_items_that_are_refused(server, body, words):
    response = server.client.post(f"{server.url}/similar", json=body)
    assert response.status_code == 422
    assert words in response.json()["detail"]
