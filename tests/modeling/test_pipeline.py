"""pipeline("generative-recommendation"): the same answers as recommend(), in every form of input, and what it says about bad ones."""

import subprocess
import sys
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.pt_utils import KeyDataset

import onerec_hf
from onerec_hf import GenerativeRecommendationPipeline, ItemCatalogue, OneRecProcessor
from tests.conftest import make_catalogue, make_model
from tests.rounding import close

TASK = "generative-recommendation"
HISTORIES = [["m1", "m2", "m3"], ["m5"], ["m7", "m8"], ["m9", "m1"], ["m11"]]
CATALOGUE = make_catalogue()
MODEL, PROCESSOR = make_model(CATALOGUE), OneRecProcessor.from_catalogue(CATALOGUE, max_history=10)


def make(model=MODEL, processor=PROCESSOR, **options):
    return pipeline(TASK, model=model, processor=processor, device="cpu", **{"num_beams": 12, "top_k": 4, **options})


@pytest.fixture(scope="module")
def recommender():
    return make()


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (DeprecationWarning, FutureWarning):  # of libraries about each other
            warnings.filterwarnings("ignore", category=other)
        yield


def items(answer):
    return [each["item"] for each in answer]


def assert_same(answers, others):
    """But for rounding: lists and streams are computed with packed experts."""
    for answer, other in zip(answers, others, strict=True):
        assert items(answer) == items(other)
        assert [each["score"] for each in answer] == close([each["score"] for each in other])


def reference(histories, session_length=1, top_k=4, num_beams=12, **kwargs):
    """Sessions and scores by `recommend()`, history by history."""
    found = []
    for history in histories:
        out = MODEL.recommend(
            **PROCESSOR([history]),
            session_length=session_length,
            num_beams=num_beams,
            num_return_sequences=top_k,
            return_dict_in_generate=True,
            **kwargs,
        )
        pairs = zip(PROCESSOR.batch_decode(out), out.sequences_scores.tolist(), strict=True)
        found.append([(session, score) for session, score in pairs if session])
    return found


def assert_answers(answers, wanted):
    assert len(answers) == len(wanted)
    for answer, found in zip(answers, wanted, strict=True):
        sessions = [[one["item"] for one in each["items"]] if "items" in each else [each["item"]] for each in answer]
        assert sessions == [session for session, _ in found]
        assert [each["score"] for each in answer] == close([score for _, score in found])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("session_length", [1, 2])
def test_it_answers_as_recommend_does(recommender, batch_size, session_length):
    answers = recommender(HISTORIES, batch_size=batch_size, session_length=session_length)
    assert_answers(answers, reference(HISTORIES, session_length, exclude_seen=True))


def test_one_history_in_every_form(recommender):
    (wanted,) = recommender([HISTORIES[0]])
    assert set(wanted[0]) == {"item", "score"}
    forms = [tuple(HISTORIES[0]), np.array(HISTORIES[0]), {"history": HISTORIES[0], "user_id": 3}]
    for history in (HISTORIES[0], *forms):
        assert_same([recommender(history), recommender([history, HISTORIES[1]])[0]], [wanted, wanted])
    assert recommender([]) == []


@pytest.mark.parametrize("batch_size", [1, 2])
def test_streams(recommender, batch_size):
    wanted = recommender(HISTORIES)
    rows = datasets.Dataset.from_dict({"history": HISTORIES, "user_id": range(5)})
    pulled = []

    def generator():
        for history in HISTORIES:
            pulled.append(history)
            yield history

    streams = [generator(), rows, rows.to_iterable_dataset(), KeyDataset(rows, "history"), map(list, HISTORIES)]
    for stream in streams:
        answers = recommender(stream, batch_size=batch_size)
        assert not isinstance(answers, list)
        if stream is streams[0]:
            next_answer = next(answers)
            assert len(pulled) <= batch_size + 1  # transformers looks at the first one beforehand
            answers = [next_answer, *answers]
        assert_same(answers, wanted)
    assert list(recommender(iter([]))) == list(recommender(KeyDataset(rows.select([]), "history"))) == []


def test_workers_read_a_dataset(recommender):
    rows = KeyDataset(datasets.Dataset.from_dict({"history": [*HISTORIES[:2], ["m1", "zz"]]}), "history")
    with pytest.warns(UserWarning, match="left out 1 items that"):  # counted across processes
        answers = list(recommender(rows, num_workers=1))
    assert [items(answer) for answer in answers[:2]] == [items(answer) for answer in recommender(HISTORIES[:2])]


def test_exclude_and_allow(recommender):
    everything = recommender(["m1"], top_k=40, num_beams=40, exclude_seen=False)
    assert sorted(items(everything)) == sorted(CATALOGUE.item_ids)
    assert "m1" not in items(recommender(["m1"], top_k=40, num_beams=40))
    best = items(everything)[0]
    assert best not in items(recommender(["m1"], exclude=[best], exclude_seen=False))
    assert set(items(recommender(["m1", "m2"], allow=["m2", "m3", "m4"], top_k=12))) == {"m3", "m4"}
    assert items(recommender(["m1"], allow=["m3", "m4"], exclude=["m3"])) == ["m4"]
    batch = [
        {"history": ["m1"], "allow": ["m3", "m4"]},
        {"history": ["m2"], "exclude": [best], "allow": None},
        ["m1"],
    ]
    answers = recommender(batch, batch_size=3, top_k=40, num_beams=40, exclude=["m4"])
    assert items(answers[0]) == ["m3"]
    assert set(items(answers[1])) == set(CATALOGUE.item_ids) - {"m2", "m4", best}
    assert set(items(answers[2])) == set(CATALOGUE.item_ids) - {"m1", "m4"}


def test_options_of_the_pipeline_yield_to_those_of_a_call():
    recommender = make(top_k=2, exclude=["m4"], exclude_seen=False, items={"m4": "Alien"})
    assert len(recommender(["m1"])) == 2
    assert len(recommender(["m1"], top_k=3)) == 3
    assert "m4" not in items(recommender(["m1"], top_k=40, num_beams=40))
    assert "m4" in items(recommender(["m1"], top_k=40, num_beams=40, exclude=[]))
    with pytest.raises(ValueError, match="top_k=2 exceeds num_beams=1; raise num_beams"):
        recommender(["m1"], num_beams=1)
    for option in ("top_k", "num_beams", "session_length", "max_history"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1; got 0"):
            recommender(["m1"], **{option: 0})
    with pytest.raises(ValueError, match=r'unknown must be "skip" or "error"'):
        recommender(["m1"], unknown="ignore")


def test_titles_and_other_fields(recommender):
    frame = pd.DataFrame({"item_id": ["m3", "m4"], "title": ["Heat", None], "year": [1995, 1979]})
    wanted = {"m3": {"title": "Heat", "year": 1995}, "m4": {"year": 1979}}
    tables = [wanted, frame, datasets.Dataset.from_pandas(frame), frame.to_dict("list"), frame.to_dict("records")]
    for table in tables:
        answer = recommender(["m1"], allow=["m3", "m4", "m5"], items=table)
        assert {each["item"]: {k: v for k, v in each.items() if k not in ("item", "score")} for each in answer} == {
            **wanted,
            "m5": {},
        }
    titles = frame.set_index("item_id")["title"]
    (session, *_) = recommender(["m1"], allow=["m3", "m4"], items=titles, session_length=2)
    assert sorted(session["items"], key=lambda each: each["item"]) == [
        {"item": "m3", "title": "Heat"},
        {"item": "m4"},
    ]
    bad = {
        "none of 1 ids is in the catalogue of 40 items, e.g. 'x9'": {"x9": "Heat"},
        r'items must be a mapping, or a table with a column "item_id"': [{"id": "m3"}],
        "items has a field 'score', which answers have themselves; rename it": {"m3": {"score": 3}},
        "items must be a mapping, or a table .*; got 5": 5,
        "none of 1 ids is in the catalogue .* 'title'; a table needs a column": frame[["title"]],
    }
    for message, table in bad.items():
        with pytest.raises(ValueError, match=message):
            recommender(["m1"], items=table)
    with pytest.raises(TypeError, match="items: item ids of this catalogue are of type str; got 3"):
        recommender(["m1"], items={3: "Heat"})


def test_integer_ids_and_numpy_values_come_out_as_python_ones():
    catalogue = ItemCatalogue(range(100, 140), CATALOGUE.codes, CATALOGUE.codebook_sizes)
    model, processor = make_model(catalogue), OneRecProcessor.from_catalogue(catalogue)
    table = {"item_id": np.arange(100, 140), "year": np.arange(1940, 1980)}
    recommender = make(model, processor, items=table)
    wanted = recommender([101, 102])
    for history in (np.array([101, 102]), torch.tensor([101, 102])):
        assert_same([recommender(history)], [wanted])
    assert_same(recommender(torch.tensor([[101, 102], [103, 104]]))[:1], [wanted])
    assert {type(value) for value in wanted[0].values()} == {int, float}
    assert wanted[0]["year"] == wanted[0]["item"] + 1840


@pytest.mark.parametrize("batch_size", [1, 3])
def test_unknown_items_and_empty_histories_are_counted(recommender, batch_size):
    histories = [["m1", "zz", "m2"], [], ["zz", "yy"], ["m5"], {"history": ["m5"], "exclude": ["zz"]}]
    message = "^left out 4 items that are not in the catalogue; 2 of 5 histories hold no known item: an empty answer$"
    for form in (histories, iter(histories)):
        with pytest.warns(UserWarning, match=message) as caught:
            answers = list(recommender(form, batch_size=batch_size))
        assert len(caught) == 1
        assert [items(answer) for answer in answers] == [
            items(answer) for answer in (recommender(["m1", "m2"]), [], [], *2 * [recommender(["m5"])])
        ]
    with pytest.warns(UserWarning, match="left out 1 of 3 items of allow: not in the catalogue"):
        assert len(recommender(["m1"], allow=(x for x in ["zz", "m2", "m3"]))) == 2


def test_unknown_items_and_empty_histories_as_errors():
    recommender = make(unknown="error")
    with pytest.raises(KeyError, match="history number 1: 2 of 3 items are not in"):
        recommender([["m1"], ["m1", "zz", "yy"]])
    with pytest.raises(KeyError, match="exclude of the history: 1 of 1 items"):
        recommender({"history": ["m1"], "exclude": ["zz"]})
    with pytest.raises(KeyError, match="allow: 1 of 1 items"):
        recommender(["m1"], allow=["zz"])
    with pytest.raises(ValueError, match="history number 1 is empty: there is nothing to read"):
        list(recommender(iter([["m1"], []])))


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("m1", ValueError, r'the history must be a list of item ids, e.g. \["m17", "m4"\]; got \'m1\''),
        (7, ValueError, "the history must be a list of item ids"),
        ([1, 2], TypeError, "the history: item ids of this catalogue are of type str; got 1"),
        ([["m1"], [1]], TypeError, "history number 1: item ids of this catalogue are of type str; got 1"),
        ([["m1"], "m2"], ValueError, "history number 1 must be a list of item ids"),
        (
            [["m1"], ["m2", None]],
            TypeError,
            "history number 1: item ids must be all integers or all strings; got None",
        ),
        ([[1.0, 2.0]], TypeError, "history number 0: item ids must be all integers or all strings; got float"),
        ([{"items": ["m1"]}], ValueError, "history number 0 must be a list of item ids.*; got None"),
        ([{"history": ["m1"], "allow": "m2"}], ValueError, "allow of history number 0 must be a list of item ids"),
    ],
)
def test_wrong_types_get_one_clear_message(recommender, bad, error, message):
    with pytest.raises(error, match=message):
        recommender(bad)


def test_nothing_left_to_recommend_is_an_empty_answer(recommender):
    seen_all = CATALOGUE.item_ids[::-1]
    with pytest.warns(
        UserWarning, match="1 of 2 histories leave nothing to recommend: an empty answer; read only the latest items"
    ):
        answers = recommender([seen_all, ["m1"]], batch_size=2)
    assert [len(answer) for answer in answers] == [0, 4]
    with pytest.warns(UserWarning, match="1 of 1 histories leave nothing"):
        assert recommender(["m1"], allow=["m2", "m3"], session_length=3) == []
    with pytest.warns(UserWarning, match="1 of 1 histories leave nothing"):
        assert recommender(["m1"], allow=[]) == []


@pytest.mark.parametrize("max_history", [10, None])
def test_a_history_of_100_000_items_is_cut_with_a_note(max_history):
    processor = OneRecProcessor.from_catalogue(CATALOGUE, max_history=max_history)
    model = make_model(CATALOGUE, max_position_embeddings=48)  # 12 items of 4 tokens
    recommender = make(model, processor)
    long = ["m1", "m39", *["m2", "m3", "m4", "m5", "m6", "m7"] * 16_667]
    with pytest.warns(UserWarning, match="^read only the latest items of 1 of 2 histories, which are longer"):
        answers = recommender([long, ["m1"]], batch_size=2, top_k=40, num_beams=40)
    assert not {"m1", "m2", "m39"} & set(items(answers[0]))  # seen, though not read
    latest = recommender(long[-(max_history or 12) :], exclude=["m1", "m39"], top_k=40, num_beams=40)
    assert items(answers[0]) == items(latest)


def test_retired_items_are_read_and_not_recommended():
    catalogue = CATALOGUE.retire(["m1", "m2"])
    model, processor = make_model(CATALOGUE), OneRecProcessor.from_catalogue(catalogue)
    with pytest.raises(ValueError, match=r"the model has ItemCatalogue\(40.*, the processor has ItemCatalogue\(40"):
        make(model, processor)
    model.set_catalogue(catalogue)
    answer = make(model, processor, exclude_seen=False)(["m1", "m3"], top_k=40, num_beams=40)
    assert sorted(items(answer)) == sorted(set(CATALOGUE.item_ids) - {"m1", "m2"})
    processor.set_catalogue(None)
    with pytest.raises(ValueError, match="the processor has no item catalogue"):
        make(model, processor)


def test_saved_and_loaded_with_task_and_folder(recommender, tmp_path):
    recommender.save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu", num_beams=12, top_k=4)  # no trust_remote_code
    assert type(loaded) is GenerativeRecommendationPipeline
    assert_same(loaded(HISTORIES), recommender(HISTORIES))
    assert loaded.processor.max_history == 10
    assert not hasattr(loaded.model.config, "custom_pipelines")


def test_a_model_with_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    make().save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    answers = make(adapted.eval())(HISTORIES)
    assert answers != make()(HISTORIES)
    loaded = pipeline(TASK, model=str(tmp_path / "adapter"), device="cpu", num_beams=12, top_k=4)
    assert_same(loaded(HISTORIES), answers)


def test_it_is_registered_once_and_quietly():
    onerec_hf.register_auto_classes()
    assert PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] is GenerativeRecommendationPipeline
    code = (
        f"import onerec_hf; onerec_hf.register_auto_classes(); from transformers import pipeline; pipeline({TASK!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is already registered" not in done.stderr
    assert done.stderr.count("Error") == 1, done.stderr  # there is no default model
