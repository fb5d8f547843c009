"""`onerec-hf recommend`: JSON lines in, JSON lines out, and lines that cannot be answered."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from tests.cli.commands import NUM_ITEMS, onerec, refused, succeeded
from tests.rounding import close

REQUESTS = [
    {"user_id": "é-1", "history": ["m1", "m2"], "note": {"a": [1]}},
    {"user_id": 2, "history": ["m39"]},
    ["m3", "m4", "m5"],
    {"user_id": 4, "history": [f"m{i}" for i in range(30)]},
    {"user_id": 5, "history": ["m7", "m7"]},
]
HISTORIES = [request if isinstance(request, list) else request["history"] for request in REQUESTS]
OPTIONS = ["--top_k", 4, "--num_beams", 8]


def lines(requests):
    return "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests)


def answers(done):
    return [json.loads(line) for line in succeeded(done).out.splitlines()]


def ask(model, *options, stdin):
    return onerec("recommend", "--model", model, *OPTIONS, *options, stdin=stdin)


@pytest.fixture
def model(trained):
    return trained.folder


def test_answers_come_in_order_with_what_the_request_said(model):
    found = answers(ask(model, "--batch_size", 2, stdin=lines(REQUESTS)))
    assert [answer.get("user_id") for answer in found] == ["é-1", 2, None, 4, 5]
    assert found[0]["note"] == {"a": [1]}
    assert found[2].keys() == {"items", "scores", "fields"}
    for history, answer in zip(HISTORIES, found, strict=True):
        assert "history" not in answer
        assert len(answer["items"]) == len(answer["scores"]) == 4
        assert answer["scores"] == sorted(answer["scores"], reverse=True)
        assert len(set(answer["items"])) == 4
        assert not set(answer["items"]) & set(history)


def test_it_answers_as_the_library_does(model):
    """One user at a time through the Auto classes: batches, padding and files change nothing."""
    found = answers(ask(model, stdin=lines(REQUESTS)))
    processor = AutoProcessor.from_pretrained(model)
    generator = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    for history, answer in zip(HISTORIES, found, strict=True):
        out = generator.recommend(
            **processor([history]),
            session_length=1,
            num_beams=8,
            num_return_sequences=4,
            exclude=[history],
            return_dict_in_generate=True,
        )
        assert answer["items"] == [item for (item,) in processor.batch_decode(out)]
        assert answer["scores"] == close(out.sequences_scores.tolist())


def test_a_file_does_as_well_as_stdin(model, tmp_path):
    wanted = ask(model, stdin=lines(REQUESTS)).out
    file = tmp_path / "histories.jsonl"
    file.write_text(lines(REQUESTS), encoding="utf-8")
    assert succeeded(ask(model, "--histories", file, stdin="nothing that is read")).out == wanted
    file.write_text(lines(REQUESTS).replace("\n", "\r\n\r\n"), encoding="utf-8-sig")  # as Windows writes it
    assert succeeded(ask(model, "--histories", file, stdin="")).out == wanted
    assert "é-1" in wanted


def test_sessions_hold_distinct_unseen_items(model):
    found = answers(ask(model, "--session_length", 3, stdin=lines(REQUESTS)))
    for history, answer in zip(HISTORIES, found, strict=True):
        assert "items" not in answer
        assert len({tuple(session) for session in answer["sessions"]}) == 4
        for session in answer["sessions"]:
            assert len(set(session)) == 3
            assert not set(session) & set(history)


@pytest.mark.parametrize("option", [["--no_exclude_seen"], ["--exclude_seen", "false"]])
def test_seen_items_come_back_when_asked_for(model, option):
    history = [f"m{i}" for i in range(NUM_ITEMS)]
    everything = ["--top_k", NUM_ITEMS, "--num_beams", NUM_ITEMS]
    (answer,) = answers(ask(model, *everything, *option, stdin=lines([history])))
    assert sorted(answer["items"]) == sorted(history)


def test_where_less_is_left_than_was_asked_for_less_comes(model):
    history = [f"m{i}" for i in range(NUM_ITEMS - 3)]
    (answer,) = answers(ask(model, "--top_k", 9, stdin=lines([history])))
    assert sorted(answer["items"]) == ["m37", "m38", "m39"]
    assert len(answer["scores"]) == 3


def test_skipping_unknown_items_is_counted(model):
    requests = [["m1", "new", "m2"], {"user_id": 8, "history": ["new", "newer"]}, [], ["m3"]]
    done = ask(model, "--unknown", "skip", stdin=lines(requests))
    first, second, third, fourth = answers(done)
    assert second == {"user_id": 8, "items": [], "scores": [], "fields": []}
    assert third == {"items": [], "scores": [], "fields": []}
    assert [first, fourth] == answers(ask(model, stdin=lines([["m1", "m2"], ["m3"]])))
    assert done.err.splitlines()[-1] == (
        "left out 3 items that are not in the catalogue; 2 of 4 histories hold no known item: an empty answer"
    )
    sessions = ask(model, "--unknown", "skip", "--session_length", 2, stdin=lines([["new"]]))
    assert answers(sessions) == [{"sessions": [], "scores": [], "fields": []}]


def test_no_request_no_answer(model):
    assert answers(ask(model, stdin="\n \n")) == []


BAD_LINES = [
    (
        '["m1", "new", "newer"]',
        ["2 of 3 items are not in the catalogue of 40 items", "['new', 'newer']", "--unknown skip"],
    ),
    ("[]", ["history is empty", "--unknown skip"]),
    ('{"user_id": 3, "history": []}', ["history is empty", "for an empty answer"]),
    ("m1, m2", ["is no JSON", "'m1, m2'"]),
    ('["m1"', ["is no JSON"]),
    ('"m1"', ["holds no history", '{"history": [...]}']),
    ('{"user_id": 3, "items": ["m1"]}', ["holds no history", '{"history": [...]}']),
    ('{"history": "m1"}', ["holds no history"]),
    ("[1]", ["of type str", "got 1"]),
    ('["m1", 2]', ["all integers or all strings", "int, str"]),
    ('[["m1"]]', ["all integers or all strings", "list"]),
    ("[null]", ["all integers or all strings", "NoneType"]),
    ("[99999999999999999999]", ["line 3: "]),
    (json.dumps([f"m{i}" for i in range(NUM_ITEMS)]), ["leave 0 of 40 items", "--no_exclude_seen"]),
]


@pytest.mark.parametrize(("line", "named"), BAD_LINES)
def test_a_line_that_cannot_be_answered(model, line, named):
    """Its number is told, and nothing of its batch is answered."""
    refused(ask(model, stdin=f'["m1"]\n\n{line}\n["m2"]\n'), "line 3", *named)


def test_answers_before_a_bad_line_stay(model):
    done = ask(model, "--batch_size", 1, stdin='["m1"]\nnonsense\n')
    assert done.status == 2
    assert "line 2 is no JSON" in done.message
    assert len(done.out.splitlines()) == 1


def test_histories_that_are_not_utf8(model, tmp_path):
    file = tmp_path / "latin1.jsonl"
    file.write_bytes('["é"]\n'.encode("latin-1"))
    refused(ask(model, "--histories", file, stdin=""), "not UTF-8")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--top_k", 0], ["--top_k", "at least 1; got 0"]),
        (["--num_beams", -1], ["--num_beams", "at least 1; got -1"]),
        (["--batch_size", 0], ["--batch_size", "at least 1; got 0"]),
        (["--session_length", 0], ["--session_length", "at least 1; got 0"]),
        (["--session_length", 41], ["--session_length 41", "only 40 items"]),
        (["--unknown", "ignore"], ["--unknown", '"skip" or "error"', "'ignore'"]),
        (["--histories", "/no/such.jsonl"], ["--histories /no/such.jsonl", "no such file"]),
    ],
)
def test_options(model, options, named):
    refused(ask(model, *options, stdin='["m1"]\n'), *named)


def test_it_wants_a_model(semantic_ids):
    refused(onerec("recommend"), "--model")
    refused(ask(semantic_ids.folder, stdin=""), f"--model {semantic_ids.folder}", "holds no model")


def test_a_reader_that_goes_away_is_no_error(model, tmp_path):
    """`onerec-hf recommend ... | head -1`, in a process of its own as people run it."""
    requests = tmp_path / "many.jsonl"
    requests.write_text('["m1"]\n' * 3000)
    program = Path(sys.executable).with_name("onerec-hf")
    command = [program, "recommend", "--model", model, "--histories", requests, "--batch_size", "1"]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert json.loads(process.stdout.readline())["items"]
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_bfloat16_answers_about_the_same_and_says_so(model):
    done = ask(model, "--dtype", "bfloat16", stdin=lines(REQUESTS))
    assert "--dtype bfloat16: the model computes in bfloat16" in done.err
    for low, wide in zip(answers(done), answers(ask(model, stdin=lines(REQUESTS))), strict=True):
        assert len(set(low["items"]) & set(wide["items"])) >= 3
        assert low["scores"] != wide["scores"]
        assert low["scores"] == pytest.approx(wide["scores"], rel=0.05)


def test_an_unknown_dtype_is_refused(model):
    refused(ask(model, "--dtype", "int4", stdin=""), "--dtype int4: choose auto, float32 or bfloat16")


def test_bfloat16_is_for_generators(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "onerec_popularity"}')
    refused(ask(tmp_path, "--dtype", "bfloat16", stdin=""), "--dtype bfloat16 is for OneRec generators")
