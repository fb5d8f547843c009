"""One path for a request: pipeline, `recommend`, server and demo give the items, scores and titles that `model.recommend()` gives."""

import json
import pickle
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import pipeline

from onerec_hf import OneRecProcessor
from onerec_hf.cli.arguments import ShownItemArguments
from onerec_hf.cli.demo import DemoArguments
from onerec_hf.cli.demo_app import DemoRecommender
from onerec_hf.cli.recommend import RecommendArguments, answer_lines
from onerec_hf.data.item_fields import save_items_table
from onerec_hf.modeling.items_file import saved_items
from onerec_hf.modeling.requests import (
    AnswerCounts,
    ItemIdTypeError,
    Recommender,
    Request,
    RequestError,
    UnknownItemError,
    known_indices,
)
from onerec_hf.serving.models import ServedModel, spell_key
from onerec_hf.serving.schema import Answer as AnswerSchema
from onerec_hf.serving.schema import Query
from onerec_hf.serving.settings import ServingSettings
from onerec_hf.workflows.artefact import load_model, load_processor
from tests.conftest import make_catalogue, make_model
from tests.rounding import close

NUM_ITEMS, MAX_HISTORY = 40, 10
IDS = [f"m{i}" for i in range(NUM_ITEMS)]
FIELDS = {item: {"title": f"Film {item}", "year": 1940 + place} for place, item in enumerate(IDS) if place % 3}
OPTIONS = [
    {"top_k": 5, "num_beams": 12, "session_length": 1, "exclude_seen": True},
    {"top_k": 4, "num_beams": 40, "session_length": 1, "exclude_seen": False},
    {"top_k": 3, "num_beams": 8, "session_length": 2, "exclude_seen": True},
    {"top_k": 3, "num_beams": 8, "session_length": 2, "exclude_seen": True, "diversity": 0.5},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its items table."""
    folder, catalogue = tmp_path_factory.mktemp("requests") / "model", make_catalogue(NUM_ITEMS)
    make_model(catalogue).save_pretrained(folder, include_code=False)
    OneRecProcessor.from_catalogue(catalogue, max_history=MAX_HISTORY).save_pretrained(folder, include_code=False)
    table = pd.DataFrame([{"item_id": item, **fields} for item, fields in FIELDS.items()])
    assert save_items_table(folder, table, catalogue) == ""
    return folder


@pytest.fixture(scope="module")
def recommender(folder):
    processor = load_processor("--model", str(folder))
    model = load_model("--model", str(folder)).eval()
    assert processor.catalogue is not None
    return Recommender(model, processor, saved_items(folder, processor.catalogue))


@pytest.fixture(scope="module")
def served(folder):
    served = ServedModel.load(str(folder))
    assert served is not None
    yield served
    served.close()


def random_requests(seed, count=12):
    """Histories and their constraints: unknown ids, histories that are cut, empty ones, and ones that leave nothing."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        ids = [IDS[i] for i in rng.permutation(NUM_ITEMS)]
        request = {"history": ids[: rng.integers(1, 25)]}
        if number % 3 == 0:
            request["history"] = [*request["history"][:2], "x1", *request["history"][2:], "x2"]
        if number % 4 == 1:
            request["exclude"] = [*ids[20 : 20 + int(rng.integers(1, 15))], "x3"]
        if number % 4 == 2:
            request["allow"] = [*ids[5:35], "x4"]
        if number == 5:
            request["history"] = []
        if number == 6:
            request["history"] = ["x5", "x6"]
        if number == 7:
            request["allow"] = request["history"][:1]
            request["exclude"] = request["history"][:1]
        found.append(request)
    return found


def reference(recommender, request, top_k, num_beams, session_length, exclude_seen, diversity=0.0):
    """Sessions and scores by `model.recommend()` alone, one request at a time."""
    history, exclude = ([i for i in request.get(key, []) if i in IDS] for key in ("history", "exclude"))
    allow = [i for i in request["allow"] if i in IDS] if "allow" in request else IDS
    exclude = [*exclude, *(history if exclude_seen else ())]
    if not history or len(set(allow) - set(exclude)) < session_length:
        return [], []
    out = recommender.model.recommend(
        **recommender.processor([history[-MAX_HISTORY:]]),
        session_length=session_length,
        num_beams=num_beams,
        num_return_sequences=top_k,
        diversity=diversity,
        exclude=[exclude] if exclude else None,
        allow=[allow],
        return_dict_in_generate=True,
    )
    pairs = zip(recommender.processor.batch_decode(out), out.sequences_scores.tolist(), strict=True)
    found = [pair for pair in pairs if pair[0]]
    return [session for session, _ in found], [score for _, score in found]


def assert_same(found, wanted, accuracy=1e-4):
    (sessions, scores, fields), (wanted_sessions, wanted_scores) = found, wanted
    assert sessions == wanted_sessions
    assert scores == pytest.approx(wanted_scores, abs=accuracy)
    assert fields == [[FIELDS.get(item, {}) for item in session] for session in sessions]


def by_pipeline(recommend, requests, options):
    def columns(answer):
        sessions = [each.get("items", [each]) for each in answer]
        fields = [[{k: v for k, v in one.items() if k not in ("item", "score")} for one in each] for each in sessions]
        return [[one["item"] for one in each] for each in sessions], [each["score"] for each in answer], fields

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its counts are checked below
        return [columns(answer) for answer in recommend(requests, batch_size=5, **options)]


def from_columns(answer):
    single = "items" in answer
    sessions = [[item] for item in answer["items"]] if single else answer["sessions"]
    return sessions, answer["scores"], [[fields] for fields in answer["fields"]] if single else answer["fields"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_all_four_give_the_same_answers(folder, recommender, served, options, seed):
    requests = random_requests(seed)
    wanted = [reference(recommender, request, **options) for request in requests]
    assert [not sessions for sessions, _ in wanted] == [number in (5, 6, 7) for number in range(len(requests))]

    pipe = pipeline("generative-recommendation", model=str(folder), device="cpu")
    for found, expected in zip(by_pipeline(pipe, requests, options), wanted, strict=True):
        assert_same(found, expected)

    args = RecommendArguments(unknown="skip", **options)
    numbered = [(number, request) for number, request in enumerate(requests, 1) if wanted[number - 1][0]]
    lines, counts = answer_lines(recommender, numbered, args)
    for (number, _), line in zip(numbered, lines, strict=True):
        assert_same(from_columns(json.loads(line)), wanted[number - 1], accuracy=1e-3)
    assert counts.histories == len(numbered)

    queries = [Query(**request, **options) for request in requests]
    taken: dict = {}
    for number, query in enumerate(queries):
        if wanted[number][0]:
            key, resolved = served.prepare(query, "history", ServingSettings(), unknown="skip")
            taken.setdefault(key, []).append((number, resolved))
        else:
            with pytest.raises(RequestError, match=r"^history.*(nothing to read|leave 0 of 40 items)"):
                served.prepare(query, "history", ServingSettings(), unknown="skip")
    assert len(taken) == 2  # with and without an allow list
    for key, batch in taken.items():
        for (number, _), answer in zip(batch, served.answer(key, [resolved for _, resolved in batch]), strict=True):
            assert_same(from_columns(AnswerSchema(**answer).model_dump(exclude_none=True)), wanted[number])

    items = DemoArguments().load(folder, recommender.catalogue)
    demo = DemoRecommender(recommender.model, recommender.processor, items)
    for request in requests:
        history = [item for item in request["history"] if item in IDS]
        if history:
            plain = {"history": history}
            sizes = {name: value for name, value in options.items() if name != "top_k"}
            found = demo.sessions(history, count=options["top_k"], **sizes)
            expected = reference(recommender, plain, **options)
            assert [[item.item_id for item in session] for _, session in found] == expected[0]
            assert [score for score, _ in found] == pytest.approx(expected[1], abs=1e-4)
            for item in (item for _, session in found for item in session):
                assert item.title == FIELDS.get(item.item_id, {}).get("title", item.item_id)
                assert item.fields == {k: v for k, v in FIELDS.get(item.item_id, {}).items() if k != "title"}


def test_what_was_left_out_is_counted(recommender):
    requests = random_requests(0)
    counts = AnswerCounts()
    for answer in recommender.recommend(Request(**request) for request in requests):
        counts.add(answer)
    unknown = [sum(i not in IDS for key in request for i in request[key]) for request in requests]
    cut = sum(len([i for i in request["history"] if i in IDS]) > MAX_HISTORY for request in requests)
    assert vars(counts) == {"histories": 12, "skipped": sum(unknown), "empty": 2, "exhausted": 1, "cut": cut}
    assert str(counts) == (
        f"left out {sum(unknown)} items that are not in the catalogue; 2 of 12 histories hold no known item: an empty answer; "
        f"1 of 12 histories leave nothing to recommend: an empty answer; read only the latest items of {cut} of 12 histories, which "
        "are longer than the model reads"
    )
    twice = AnswerCounts(histories=1)
    twice += counts
    assert twice.histories == 13
    assert str(AnswerCounts(histories=3)) == ""


def test_requests_of_one_kind_are_one_search(recommender, monkeypatch):
    batches = []
    original = recommender.model.recommend

    def counted(input_ids, **kwargs):
        batches.append((len(input_ids), kwargs["session_length"], kwargs["allow"] is not None))
        return original(input_ids, **kwargs)

    monkeypatch.setattr(recommender.model, "recommend", counted)
    requests = [
        Request(["m1"], top_k=2),
        Request(["m2"], top_k=7, exclude=["m3"]),
        Request(["m3"], allow=["m4", "m5"]),
        Request(["m4"], session_length=2),
        Request([]),
        Request(["m5"], num_beams=12),
        Request(["m6"], exclude_seen=False),
        Request(["m7"], diversity=0.5),  # of single items: nothing is shared
        Request(["m8"], session_length=2, diversity=0.5, top_k=2),
        Request(["m9"], session_length=2, diversity=0.5, top_k=3),  # how many sessions there are decides which
    ]
    answers = recommender.recommend(requests)
    assert sorted(batches) == [(1, 1, False), (1, 1, True), *[(1, 2, False)] * 3, (4, 1, False)]
    assert [len(answer.sessions) for answer in answers] == [2, 7, 2, 10, 0, 10, 10, 10, 2, 3]
    assert [answer.request.request for answer in answers] == requests


def test_messages_spell_options_as_the_caller_does(recommender):
    with pytest.raises(UnknownItemError) as unknown:
        recommender.resolve(Request(["m1", "x1"], unknown="error"))
    start = "the history: 1 of 2 items are not in the catalogue of 40 items, e.g. ['x1']; pass "
    assert isinstance(unknown.value, KeyError)
    assert str(unknown.value) == f'{start}unknown="skip" to leave them out'
    assert unknown.value.message(spell_key) == f'{start}"unknown": "skip" to leave them out'
    assert str(pickle.loads(pickle.dumps(unknown.value))) == str(unknown.value)  # as a worker process hands it on
    problem = recommender.problem(recommender.resolve(Request(IDS)))
    assert problem.message(spell_key) == (
        "the history: its exclusions and allow list leave 0 of 40 items, too few for a session of 1; pass "
        '"exclude_seen": false to recommend items of the history again'
    )
    empty = recommender.problem(recommender.resolve(Request([], name="history number 3")))
    assert str(empty) == (
        'history number 3 is empty: there is nothing to read; pass unknown="skip" for an empty answer'
    )
    assert recommender.problem(recommender.resolve(Request(["m1"]))) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diversity": -1}, "^diversity must be a finite number, at least 0; got -1"),
        ({"top_k": 0}, "^top_k must be at least 1; got 0"),
        ({"max_history": -1}, "^max_history must be at least 1; got -1"),
        ({"unknown": "ignore"}, '^unknown must be "skip" or "error"; got \'ignore\''),
        ({"top_k": 9, "num_beams": 3}, "^top_k=9 exceeds num_beams=3; raise num_beams"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(RequestError, match=message):
        Request(["m1"], **options)


def test_ids_in_every_form(recommender):
    for ids in (
        ["m1", "m2"],
        ("m1", "m2"),
        np.array(["m1", "m2"]),
        (i for i in ["m1", "m2"]),
        pd.Series(["m1", "m2"]),
    ):
        rows, skipped = known_indices(recommender.catalogue, ids, "the list", "error")
        assert (rows.tolist(), skipped) == ([1, 2], 0)
    for bad in ("m1", b"m1", {"m1": 1}, 7, None):
        with pytest.raises(RequestError, match=r"^the list must be a list of item ids"):
            known_indices(recommender.catalogue, bad, "the list", "skip")
    with pytest.raises(TypeError, match=r"^the list: item ids of this catalogue are of type str; got 7") as error:
        known_indices(recommender.catalogue, torch.tensor([7, 8]), "the list", "skip")
    assert isinstance(error.value, ItemIdTypeError)


def test_max_history_of_a_request_wins(recommender):
    (short, long) = recommender.recommend([Request(IDS[:8], max_history=2), Request(IDS[:8])])
    assert (short.request.history, short.request.cut) == (["m6", "m7"], True)
    assert (long.request.history, long.request.cut) == (IDS[:8], False)
    assert not {item for (item,) in short.sessions} & set(IDS[:8])


def test_scores_that_are_not_finite_are_refused(recommender, monkeypatch):
    original = recommender.model.recommend

    def damaged(*args, **kwargs):
        output = original(*args, **kwargs)
        output["sequences_scores"] = output["sequences_scores"] * float("nan")
        return output

    monkeypatch.setattr(recommender.model, "recommend", damaged)
    with pytest.raises(ValueError, match="scores are not finite numbers: its weights are damaged"):
        recommender.recommend([Request(["m1"], top_k=1)])


def test_a_given_table_wins_over_the_saved_one(folder, recommender, tmp_path):
    pd.DataFrame({"item_id": IDS, "title": [f"Mine {item}" for item in IDS]}).to_csv(
        tmp_path / "mine.csv", index=False
    )
    mine = ShownItemArguments(items=str(tmp_path / "mine.csv")).load(folder, recommender.catalogue)
    assert mine is not None
    assert mine["m1"] == {"title": "Mine m1"}
    assert ShownItemArguments(show_fields=False).load(folder, recommender.catalogue) is None
    pipe = pipeline("generative-recommendation", model=str(folder), device="cpu", items={"m1": "Given"})
    assert [set(each) - {"item", "score"} for each in pipe(["m2"], allow=["m1", "m4"])] in (
        [{"title"}, set()],
        [set(), {"title"}],
    )
    saved = pipeline("generative-recommendation", model=str(folder), device="cpu")
    assert saved(["m2"], allow=["m1"])[0]["title"] == "Film m1"
    assert saved(["m2"], allow=["m1"], items={"m1": "Given"})[0]["title"] == "Given"
    assert saved(["m2"], allow=["m1"])[0]["title"] == "Film m1"


def test_a_damaged_table_is_named_by_all_four(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "items.parquet").write_bytes(b"PAR1 nothing")
    catalogue = make_catalogue(NUM_ITEMS)
    for load in (
        lambda: pipeline("generative-recommendation", model=str(tmp_path / "model"), device="cpu"),
        lambda: RecommendArguments().load(tmp_path / "model", catalogue),
        lambda: DemoArguments().load(tmp_path / "model", catalogue),
        lambda: ServedModel.load(str(tmp_path / "model")),
    ):
        with pytest.raises(ValueError, match=r"items\.parquet: cannot be read"):
            load()


def test_the_processor_carries_the_table(folder, tmp_path):
    processor = OneRecProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "copy", include_code=False)
    wanted = (folder / "items.parquet").read_bytes()
    assert (tmp_path / "copy" / "items.parquet").read_bytes() == wanted
    assert "items_file" not in (tmp_path / "copy" / "processor_config.json").read_text()
    processor.save_pretrained(folder, include_code=False)  # onto itself
    assert (folder / "items.parquet").read_bytes() == wanted
    shutil.rmtree(tmp_path / "copy")
    pipe = pipeline("generative-recommendation", model=str(folder), device="cpu")
    pipe.save_pretrained(tmp_path / "pipeline", include_code=False)
    assert (tmp_path / "pipeline" / "items.parquet").read_bytes() == wanted


@pytest.mark.parametrize("ids", [[IDS[3], IDS[0], IDS[25], IDS[39]], IDS])
def test_candidates_are_ranked_alike_everywhere(folder, recommender, served, ids):
    """All of them, with the scores of a search that prunes nothing; those of the history too."""
    history = [IDS[3], IDS[7]]
    (answer,) = recommender.recommend([Request(history, candidates=[*ids, "x1"], unknown="skip", top_k=1)])
    out = recommender.model.recommend(
        **recommender.processor([history]),
        session_length=1,
        num_beams=NUM_ITEMS,
        num_return_sequences=NUM_ITEMS,
        return_dict_in_generate=True,
    )
    scores = dict(
        zip((item for (item,) in recommender.processor.batch_decode(out)), out.sequences_scores.tolist(), strict=True)
    )
    assert [item for (item,) in answer.sessions] == sorted(ids, key=lambda item: -scores[item])
    assert answer.scores == close([scores[item] for (item,) in answer.sessions])
    assert answer.request.skipped == 1

    pipe = pipeline("generative-recommendation", model=str(folder), device="cpu")
    wanted = answer.rows()
    assert pipe(history, candidates=ids) == wanted
    assert pipe({"history": history, "candidates": ids}) == wanted
    key, resolved = served.prepare(Query(history=history, candidates=ids), "history", ServingSettings(), "skip")
    (from_server,) = served.answer(key, [resolved])
    assert from_server["items"] == [row["item"] for row in wanted]
    assert from_server["scores"] == close(answer.scores)


def test_candidates_go_with_single_items_and_without_allow(recommender, served):
    with pytest.raises(RequestError, match="single items"):
        Request(["m1"], candidates=["m2"], session_length=2)
    with pytest.raises(RequestError, match="pass one of them"):
        Request(["m1"], candidates=["m2"], allow=["m2"])
    resolved = recommender.resolve(Request(["m1"], candidates=["x2"]))
    assert "none of the candidates" in str(recommender.problem(resolved))
    (answer,) = recommender.recommend([Request(["m1"], candidates=["m2", "m3"], exclude=["m3"])])
    assert answer.sessions == [["m2"]]


def test_one_list_holds_for_all_users(recommender):
    model, inputs = recommender.model, recommender.processor([["m1"], ["m2"]])
    options = {"session_length": 1, "num_beams": 5, "num_return_sequences": 3}
    wanted = model.recommend(**inputs, **options, allow=[["m5", "m6", "m7"]] * 2)
    assert torch.equal(model.recommend(**inputs, **options, allow=["m5", "m6", "m7"]), wanted)
    rows = torch.tensor(recommender.catalogue.indices(["m5", "m6", "m7"]))
    assert torch.equal(model.recommend(**inputs, **options, allow=rows), wanted)
    excluded = model.recommend(**inputs, **options, exclude=["m5"])
    assert torch.equal(excluded, model.recommend(**inputs, **options, exclude=[["m5"], ["m5"]]))


def test_similar_items_have_the_nearest_vectors(folder, recommender):
    vectors = torch.nn.functional.normalize(recommender.item_vectors(), dim=1)
    (found,) = recommender.similar_items(["m3"], top_k=NUM_ITEMS)
    cosines = (vectors @ vectors[3]).tolist()
    assert {row["item"] for row in found} == set(IDS) - {"m3"}
    assert [row["score"] for row in found] == close(sorted(cosines[:3] + cosines[4:], reverse=True))
    assert found[0].get("title") == FIELDS.get(found[0]["item"], {}).get("title")
    pipe = pipeline("generative-recommendation", model=str(folder), device="cpu")
    assert [row["item"] for row in pipe.similar_items(["m3"], top_k=4)[0]] == [row["item"] for row in found[:4]]
    with pytest.raises(UnknownItemError):
        recommender.similar_items(["x3"])


def test_sequence_models_rank_candidates_and_find_similar_items():
    from onerec_hf.baselines import ItemRecommender, PopularityBaseline, SequentialRecommender

    model = SequentialRecommender.from_items(IDS, hidden_size=16)
    recommender = ItemRecommender(model, model.items)
    (answer,) = recommender.recommend([Request(["m1"], candidates=["m1", "m8", "m9"], top_k=1)])
    assert {item for (item,) in answer.sessions} == {"m1", "m8", "m9"}
    assert len(recommender.similar_items(["m1"], 3)[0]) == 3
    popular = ItemRecommender(PopularityBaseline().fit([[0, 1]], NUM_ITEMS), model.items)
    with pytest.raises(RequestError, match="no vectors of items"):
        popular.similar_items(["m1"])
