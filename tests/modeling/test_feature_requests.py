"""Features in requests: library, pipeline, command line, server and demo give what `recommend()` gives for the same values."""

import copy
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import pipeline

from onerec_hf import OneRecProcessor
from onerec_hf.cli.demo_app import DemoRecommender
from onerec_hf.cli.recommend import RecommendArguments, answer_lines, read_requests
from onerec_hf.cli.recommend_inputs import table_requests
from onerec_hf.modeling.features import Feature, FeatureSchema
from onerec_hf.modeling.requests import Recommender, Request, RequestError
from onerec_hf.serving.bodies import check_structure
from onerec_hf.serving.models import ServedModel
from onerec_hf.serving.schema import Query
from onerec_hf.serving.settings import ServingSettings
from tests.cli.commands import onerec, refused, succeeded
from tests.conftest import make_model
from tests.modeling.feature_models import CATALOGUE, HISTORIES, PROCESSOR, SCHEMA, USERS, columns, make
from tests.rounding import close
from tests.serving.running import Running

MODEL = make()
OPTIONS = {"top_k": 5, "num_beams": 12}


def expected(history, user, processor=PROCESSOR, model=MODEL, **given):
    seen = [[entry["item"] if isinstance(entry, dict) else entry for entry in history]]
    out = model.recommend(
        **processor([history], users=[user], **given),
        session_length=1,
        num_beams=12,
        num_return_sequences=5,
        exclude=seen,
        return_dict_in_generate=True,
    )
    return [item for (item,) in processor.batch_decode(out)], close(out.sequences_scores.tolist())


@pytest.fixture(scope="module")
def recommender():
    return Recommender(MODEL, PROCESSOR)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "model"
    MODEL.save_pretrained(folder, include_code=False)
    PROCESSOR.save_pretrained(folder, include_code=False)
    return folder


def test_answers_equal_recommend(recommender):
    requests = [Request(history, user=user, **OPTIONS) for history, user in zip(HISTORIES, USERS, strict=True)]
    plain = Request(["m1", "m2", "m3"], **OPTIONS)
    for request, answer in zip([*requests, plain], recommender.recommend([*requests, plain]), strict=True):
        items, scores = expected(request.history, request.user)
        assert ([item for (item,) in answer.sessions], answer.scores) == (items, scores)
    with_values, _, without = recommender.recommend([*requests, plain])
    assert with_values.scores != close(without.scores)


def test_codes_belong_to_the_items_that_are_read(recommender):
    long = [{"item": f"m{i}", "time": 100 * i, "like": i % 2} for i in range(12)]
    long.insert(9, {"item": "unknown", "time": 950})
    (answer,) = recommender.recommend([Request(long, max_history=3, **OPTIONS)])
    assert (answer.request.history, answer.request.skipped, answer.request.cut) == (["m9", "m10", "m11"], 1, True)
    # As in training, the gap is to the interaction before with an item that the catalogue holds.
    whole = SCHEMA.encode_interactions([entry for entry in long if entry["item"] != "unknown"])
    assert np.array_equal(answer.request.features.history, whole[-3:])
    (other,) = recommender.recommend([Request([*long, {"item": "gone"}], max_history=3, **OPTIONS)])
    assert np.array_equal(other.request.features.history, whole[-3:])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([{"id": "m1"}]), "entry 0 of the history has no item"),
        (Request(["m1"], user="anna"), "the history: user must be an object"),
        (Request(["m1"], user={"age": "old"}), "the history: feature 'age' is a number"),
        (Request([{"item": "m1", "time": "soon"}]), "the history: a time is seconds"),
        (Request([{"item": ["m1"]}]), "the history"),
    ],
)
def test_bad_values_are_one_request_error(recommender, request_, message):
    with pytest.raises(RequestError, match=message):
        recommender.resolve(request_)


def test_a_history_may_be_an_iterator_or_an_array(recommender):
    for history in (iter(["m1", "m2"]), np.array(["m1", "m2"])):
        resolved = recommender.resolve(Request(history))
        assert resolved.history == ["m1", "m2"]
        assert resolved.features.history.shape == (2, SCHEMA.interaction_slots)


def test_values_mean_nothing_to_a_model_without_features():
    model, processor = make_model(CATALOGUE), OneRecProcessor.from_catalogue(CATALOGUE, 8)
    recommender = Recommender(model, processor)
    with_values, without = recommender.recommend([Request(HISTORIES[0], user={"age": 3}), Request(["m1", "m2", "m3"])])
    assert (with_values.sessions, with_values.scores) == (without.sessions, without.scores)
    assert with_values.request.features is None


def test_a_processor_without_features_refuses_values_of_users():
    with pytest.raises(ValueError, match="this processor has no features; leave users, user_features"):
        OneRecProcessor.from_catalogue(CATALOGUE, 8)([["m1"]], users=[{"age": 3}])


def test_model_and_processor_must_have_the_same_features():
    with pytest.raises(ValueError, match=r"different features \(only the model: age of 6 codes"):
        Recommender(MODEL, OneRecProcessor.from_catalogue(CATALOGUE, 8))
    changed = copy.deepcopy(MODEL)
    changed.config.features.user[0][1] += 1
    with pytest.raises(ValueError, match="only the model: age of 7 codes; only the processor: age of 6 codes"):
        Recommender(changed, PROCESSOR)


def test_pipeline():
    recommend = pipeline("generative-recommendation", model=MODEL, processor=PROCESSOR, device="cpu", **OPTIONS)
    items, scores = expected(HISTORIES[0], USERS[0])
    answer = recommend({"history": HISTORIES[0], "user": USERS[0]})
    assert ([row["item"] for row in answer], [row["score"] for row in answer]) == (items, scores)
    one, batch = recommend(HISTORIES[0]), recommend([HISTORIES[0], HISTORIES[1]], batch_size=2)
    assert [row["item"] for row in one] == expected(HISTORIES[0], None)[0]
    for answer, history in zip(batch, HISTORIES, strict=True):
        assert [row["score"] for row in answer] == expected(history, None)[1]


def test_rows_of_a_dataset_are_answered_with_their_codes(recommender):
    rows = [row | {"user_id": number, "session": ["m9"]} for number, row in enumerate(columns())]
    recommend = pipeline("generative-recommendation", model=MODEL, processor=PROCESSOR, device="cpu", **OPTIONS)
    for answer, history, user in zip(recommend(rows), HISTORIES, USERS, strict=True):
        assert ([row["item"] for row in answer], [row["score"] for row in answer]) == expected(history, user)
    # Codes of the whole history, of which the catalogue lacks an item and the model reads the latest.
    row = {"history": ["gone", *rows[0]["history"]], "history_features": [4, 3, 3, *rows[0]["history_features"]]}
    resolved = recommender.resolve(Request(**row, max_history=2))
    assert resolved.features.history.ravel().tolist() == rows[0]["history_features"][3:]
    for wrong, message in (
        ({"history_features": [3, 3]}, "hold 2 values of type int64, expected 9 codes"),
        ({"history_features": [99] * 9}, "hold codes of 'like' up to 99"),
        ({"user": USERS[0]}, r"pass values \(user, objects in the history\) or codes"),
        ({"history": HISTORIES[0]}, "pass values"),
    ):
        with pytest.raises(RequestError, match=message):
            recommender.resolve(Request(**{**columns()[0], **wrong}))


def test_recommend_lines(recommender):
    text = json.dumps({"user_id": 7, "history": HISTORIES[0], "user": USERS[0]}) + "\n" + json.dumps(HISTORIES[1])
    args = RecommendArguments(**OPTIONS)
    lines, _ = answer_lines(recommender, list(read_requests(io.StringIO(text))), args)
    first, second = map(json.loads, lines)
    assert (first["user_id"], first["items"]) == (7, expected(HISTORIES[0], USERS[0])[0])
    assert second["items"] == expected(HISTORIES[1], None)[0]
    bad = json.dumps({"history": ["m1"], "user": {"age": "old"}})
    with pytest.raises(ValueError, match=r"^line 1: the history: feature 'age' is a number"):
        answer_lines(recommender, list(read_requests(io.StringIO(bad))), args)


def test_served_model(folder):
    served = ServedModel.load(str(folder))
    query = Query(history=HISTORIES[0], user=USERS[0], **OPTIONS)
    key, request = served.prepare(query, "history", ServingSettings(), "skip")
    (answer,) = served.answer(key, [request])
    items, scores = expected(HISTORIES[0], USERS[0])
    assert (answer["items"], answer["scores"]) == (items, scores)
    served.close()


def test_over_http(folder):
    with Running(folder, max_histories=4, max_history_items=50) as server:
        bodies = [
            {"history": history, "user": user, **OPTIONS}
            for history, user in [*zip(HISTORIES, USERS, strict=True), (HISTORIES[0], None)]
        ]
        for response, body in zip(server.post_all(bodies), bodies, strict=True):
            items, scores = expected(body["history"], body["user"])
            assert (response.json()["items"], response.json()["scores"]) == (items, scores)
        many = [{"item": f"m{i % 40}", "time": i, "like": True, "note": "x"} for i in range(50)]
        assert server.post([{"history": many, "exclude_seen": False}] * 4).status_code == 200
        for body, message in (
            ({"history": ["m1"], "user": {"age": "old"}}, "history: feature 'age' is a number; got 'old'"),
            ({"history": ["m1"], "user": {"age": {"a": 1}}}, "user.age"),
            ({"history": [{"like": True}]}, "entry 0 of history has no item"),
            ({"history": [["m1"]]}, "history[0] must be an item id (integer or string), or an object"),
            ({"history": ["m1"], "user": 3}, "user: "),
            ({"history": [{"item": "m1", "time": "soon"}]}, "a time is seconds"),
        ):
            response = server.post(body)
            assert response.status_code == 422
            assert message in response.json()["detail"]
        bomb = b'{"history": [' + b'{"item": "m1"},' * 5000 + b'"m1"]}'
        assert "lists and objects" in server.post(bomb).json()["detail"]


def test_objects_are_limited_as_before_without_features():
    body = b'{"history": [' + b'{"item": "m1"},' * 500 + b'"m1"]}'
    check_structure(body, 8, max_entries=1000)
    with pytest.raises(Exception, match="lists and objects"):
        check_structure(body, 8)


def test_demo():
    demo = DemoRecommender(MODEL, PROCESSOR)
    assert demo.user_columns() == ["age", "city", "tags"]
    user = demo.user_of(json.dumps(USERS[0]))
    found = demo.sessions(["m1", "m2"], 12, 1, 5, user=user)
    items, scores = expected(["m1", "m2"], USERS[0])
    assert ([item.item_id for _, (item,) in found], [score for score, _ in found]) == (items, scores)
    for text in ("age=3", "[1]", '{"a"', "3"):
        with pytest.raises(ValueError, match="the user is no JSON object"):
            demo.user_of(text)
    assert DemoRecommender(make_model(CATALOGUE), OneRecProcessor.from_catalogue(CATALOGUE)).user_columns() == []


def test_the_number_of_users_does_not_matter(recommender):
    torch.manual_seed(0)
    requests = [Request(HISTORIES[i % 2], user=USERS[(i // 2) % 2], **OPTIONS) for i in range(7)]
    together = recommender.recommend(requests)
    for request, answer in zip(requests, together, strict=True):
        (alone,) = recommender.recommend([request])
        assert (alone.sessions, alone.scores) == (answer.sessions, close(answer.scores))


def test_users_of_a_table_have_its_values(tmp_path, capsys):
    rows = ["user_id,item_id,timestamp,like", "u1,m1,1000,1", "u1,m3,9000,0", "u2,m5,5,", "u1,m2,1030,"]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(rows))
    names = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "timestamp"}
    found = [request for _, request in table_requests(str(path), None, names, (), True, SCHEMA)]
    assert "features of users (age, city, tags); pass --users_file" in capsys.readouterr().err
    assert [[entry["item"] for entry in request["history"]] for request in found] == [["m1", "m2", "m3"], ["m5"]]
    codes = [SCHEMA.encode_interactions(request["history"]) for request in found]
    assert np.array_equal(codes[0], SCHEMA.encode_interactions(HISTORIES[0]))
    assert codes[1].tolist() == [[1, 1, 3]]
    liked = [request for _, request in table_requests(str(path), ["u1"], names, ["like>0"], True, SCHEMA)]
    assert [entry["item"] for entry in liked[0]["history"]] == ["m1"]
    assert liked[0]["exclude"] == ["m2", "m3"]
    read = [request for _, request in table_requests(str(path), ["u1"], names, ["like>0"], True, SCHEMA, whole=True)]
    assert [entry["item"] for entry in read[0]["history"]] == ["m1", "m2", "m3"]
    schema = FeatureSchema(interaction=(Feature("positive", values=("0", "1")),))
    (flagged,) = [each for _, each in table_requests(str(path), ["u1"], names, ["like>0"], True, schema, whole=True)]
    assert schema.encode_interactions(flagged["history"]).tolist() == [[4], [3], [3]]


def test_a_table_of_users(folder, tmp_path):
    """Values of the users' table beside those of the interactions; what it lacks is counted, what cannot be read is refused."""
    log, people = tmp_path / "log.csv", tmp_path / "people.csv"
    log.write_text("user_id,item_id,timestamp,like\nu1,m1,1000,1\nu1,m2,1030,\nu1,m3,9000,0\nu2,m5,5,\n")
    people.write_text("user_id,age,city\nu3,20,Rome\nu1,31,Rome\n")
    arguments = ["recommend", "--model", folder, "--interactions", log, "--num_beams", 12, "--top_k", 5]
    done = succeeded(onerec(*arguments, "--users_file", people))
    first, second = map(json.loads, done.out.splitlines())
    assert first["items"] == expected(HISTORIES[0], {"age": 31, "city": "Rome"})[0]
    assert second["items"] == expected([{"item": "m5", "time": 5}], None)[0]
    assert first.keys() == {"user_id", "items", "scores"}
    assert "1 of 2 users have no row in --users_file" in done.err
    assert "missing values, which" in done.err
    assert "features of users (tags)" in done.err
    assert json.loads(succeeded(onerec(*arguments)).out.splitlines()[0])["scores"] != first["scores"]
    alone = succeeded(onerec(*arguments, "--users_file", people, "--users", "u2"))
    assert json.loads(alone.out)["items"] == second["items"]
    assert "1 of 1 users have no row in --users_file" in alone.err
    refused(onerec(*arguments[:3], "--users_file", people), "--users_file goes with --interactions")
    for text, message in (
        ("user_id,age\nu1,old\n", "feature 'age' is a number; got 'old'"),
        ("user_id,height\nu1,3\n", "has none of the columns that the model reads of users: age, city, tags"),
        ("user_id,age\nu1,3\nu1,4\n", "duplicate an earlier user id"),
        ("user_id,age\nu9,3\n", "none of 2 users of the interactions has a row"),
        ("name,age\nu9,3\n", "no column 'user_id' among"),
    ):
        people.write_text(text)
        refused(onerec(*arguments, "--users_file", people), message)


def test_flags_and_dates_of_a_table_are_those_of_its_rows(tmp_path):
    dates = pd.date_range("2024-01-01", periods=4, freq="D")
    log = pd.DataFrame({"user_id": "u1", "item_id": ["m1", "m2", "m3", "m4"], "timestamp": range(4), "start": dates})
    log.assign(like=[0, 1, 0, 1]).to_parquet(tmp_path / "log.parquet")
    names = {"user_column": "user_id", "item_column": "item_id", "timestamp_column": "timestamp"}

    def coded(feature, whole):
        schema = FeatureSchema(interaction=(feature,))
        path = str(tmp_path / "log.parquet")
        ((_, request),) = table_requests(path, None, names, ["like>0"], True, schema, whole=whole)
        return schema.encode_interactions(request["history"]).flatten().tolist()

    flag, start = Feature("positive", values=("0", "1")), Feature("start", edges=(dates[2].timestamp(),))
    assert coded(flag, whole=True) == [3, 4, 3, 4]
    assert coded(flag, whole=False) == [4, 4]
    assert coded(start, whole=True) == [3, 3, 4, 4]
    assert coded(start, whole=False) == [3, 4]


def test_what_was_seen_is_what_was_positive():
    schema = FeatureSchema(interaction=(Feature("positive", values=("0", "1")),))
    recommender = Recommender(make(schema), OneRecProcessor.from_catalogue(CATALOGUE, 8, schema))
    history = [{"item": "m1", "positive": False}, {"item": "m2", "positive": True}, "m3", {"item": "gone"}]

    def excluded(history, by=recommender):
        return CATALOGUE.ids(by.resolve(Request(history)).exclude)

    assert excluded(history) == ["m2", "m3"]
    assert excluded([*history, "m1"]) == ["m1", "m2", "m3"]  # once positive is seen
    assert excluded(["m1", "m2"]) == ["m1", "m2"]
    assert excluded(history, Recommender(MODEL, PROCESSOR)) == ["m1", "m2", "m3"]  # histories of positives only
