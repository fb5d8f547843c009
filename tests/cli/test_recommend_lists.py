"""`onerec-hf recommend` for the users of a table, with given candidates, an allow list, and for similar items."""

import json

import pandas as pd
import pytest
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from tests.cli.commands import NUM_ITEMS, interaction_rows, onerec, refused, succeeded
from tests.rounding import close

HISTORY = json.dumps({"user_id": "u0", "history": ["m1", "m2"]}) + "\n"


@pytest.fixture
def model(trained):
    return trained.folder


def recommend(model, *options, stdin=HISTORY):
    return onerec("recommend", "--model", model, *options, stdin=stdin)


def answers(done):
    return [json.loads(line) for line in succeeded(done).out.splitlines()]


def test_users_of_a_table_get_what_their_histories_get(model, data):
    found = answers(recommend(model, "--interactions", data.interactions, "--top_k", 3))
    rows = pd.DataFrame(interaction_rows()[1:], columns=["user_id", "item_id", "timestamp"])
    histories = {user: part.sort_values("timestamp")["item_id"].tolist() for user, part in rows.groupby("user_id")}
    assert [answer["user_id"] for answer in found] == sorted(histories)
    lines = "".join(json.dumps({"user_id": user, "history": histories[user]}) + "\n" for user in sorted(histories))
    assert found == answers(recommend(model, "--top_k", 3, stdin=lines))
    for answer in found:
        assert not set(answer["items"]) & set(histories[answer["user_id"]])
    named = answers(recommend(model, "--interactions", data.interactions, "--top_k", 3, "--users", "u7", "u2"))
    by_user = {answer["user_id"]: answer for answer in found}
    assert named == [by_user["u7"], by_user["u2"]]
    refused(recommend(model, "--interactions", data.interactions, "--users", "u7", "nobody"), "--users nobody")
    refused(recommend(model, "--users", "u7"), "--users goes with --interactions")


def test_a_history_is_the_positive_rows_and_all_rows_are_left_out(model, tmp_path):
    rows = [(1, "m1", 5, 10), (1, "m2", 1, 20), (1, "m3", 5, 30), (1, "new", 5, 40), (2, "m4", 1, 10)]
    pd.DataFrame(rows, columns=["user", "item_id", "rating", "timestamp"]).to_csv(tmp_path / "log.csv", index=False)
    options = ["--interactions", tmp_path / "log.csv", "--user_column", "user", "--positive", "rating>=4"]
    done = recommend(model, *options, "--top_k", NUM_ITEMS)
    first, second = answers(done)
    assert (first["user_id"], second["user_id"]) == (1, 2)
    assert set(first["items"]) == {f"m{i}" for i in range(NUM_ITEMS)} - {"m1", "m2", "m3"}
    assert second["items"] == []
    assert "left out 1 items that are not in the catalogue; 1 of 2 histories hold no known item" in done.err
    line = json.dumps({"history": ["m1", "m3"], "exclude": ["m2"]}) + "\n"
    assert answers(recommend(model, "--top_k", NUM_ITEMS, stdin=line))[0]["scores"] == first["scores"]
    refused(recommend(model, *options, "--unknown", "error"), "1 of 3 items are not in the catalogue")


def test_a_user_who_has_seen_everything_costs_no_other_user_the_answer(model, tmp_path):
    rows = [("whale", f"m{i}", i) for i in range(NUM_ITEMS)] + [("u1", "m4", 1)]
    pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).to_csv(tmp_path / "log.csv", index=False)
    done = recommend(model, "--interactions", tmp_path / "log.csv", "--top_k", 2)
    assert [(answer["user_id"], len(answer["items"])) for answer in answers(done)] == [("u1", 2), ("whale", 0)]
    assert "1 of 2 histories leave nothing to recommend" in done.err


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "jsonl"])
def test_answers_are_written_as_a_table(model, data, tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    options = ["--interactions", data.interactions, "--top_k", 3, "--users", "u1", "u2"]
    wanted = answers(recommend(model, *options))
    done = succeeded(recommend(model, *options, "--output_file", path))
    assert done.out == ""
    if suffix == "jsonl":
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == wanted
        return
    readers = {"csv": pd.read_csv, "tsv": lambda path: pd.read_csv(path, sep="\t"), "parquet": pd.read_parquet}
    table = readers[suffix](path)
    assert table.columns.tolist()[:4] == ["user_id", "rank", "item_id", "score"]
    assert table["user_id"].tolist() == ["u1"] * 3 + ["u2"] * 3
    assert table["item_id"].tolist() == [item for answer in wanted for item in answer["items"]]
    assert table["title"].tolist() == [fields["title"] for answer in wanted for fields in answer["fields"]]
    refused(recommend(model, "--output_file", tmp_path / "out.xlsx"), "--output_file", ".csv")


def test_candidates_are_ranked_exactly_all_of_them(model, tmp_path):
    ids = ["m9", "m2", "m30", "m17", "m21"]
    (tmp_path / "ids.txt").write_text("\n".join(ids) + "\n")
    pd.DataFrame({"item_id": ids}).to_parquet(tmp_path / "ids.parquet")
    (answer,) = answers(recommend(model, "--candidates", tmp_path / "ids.txt", "--top_k", 1))
    assert set(answer["items"]) == set(ids)  # m2 of the history too
    assert answer["scores"] == sorted(answer["scores"], reverse=True)
    assert answers(recommend(model, "--candidates", tmp_path / "ids.parquet")) == [answer]
    line = json.dumps({"history": ["m1", "m2"], "candidates": ids}) + "\n"
    assert answers(recommend(model, stdin=line))[0]["scores"] == answer["scores"]
    processor = AutoProcessor.from_pretrained(model)
    batch = processor([["m1", "m2"]] * 5, sessions=[[item] for item in answer["items"]])
    logits = AutoModelForSeq2SeqLM.from_pretrained(model).eval()(**batch).logits.log_softmax(-1)
    wanted = logits.gather(-1, batch["labels"][..., None])[..., 0].sum(1)
    assert answer["scores"] == close([round(score, 4) for score in wanted.tolist()], terms=4096)


def test_candidates_by_user(model, data, tmp_path):
    rows = [("u1", "m5"), ("u1", "m6"), ("u2", "m7")]
    pd.DataFrame(rows, columns=["user_id", "item_id"]).to_csv(tmp_path / "pairs.csv", index=False)
    options = ["--interactions", data.interactions, "--candidates", tmp_path / "pairs.csv"]
    found = answers(recommend(model, *options, "--users", "u1", "u2"))
    assert [set(answer["items"]) for answer in found] == [{"m5", "m6"}, {"m7"}]
    refused(recommend(model, *options, "--users", "u3"), "--candidates has no row of user 'u3'")


def test_candidates_that_cannot_be_ranked(model, tmp_path):
    (tmp_path / "ids.txt").write_text("m1\nx9\n")
    refused(recommend(model, "--candidates", tmp_path / "ids.txt"), "--candidates: 1 of 2 items")
    done = succeeded(recommend(model, "--candidates", tmp_path / "ids.txt", "--unknown", "skip"))
    assert "left out 1 of 2 items" in done.err
    refused(recommend(model, "--candidates", tmp_path / "absent.txt"), "no such file")
    refused(recommend(model, "--candidates", tmp_path / "ids.txt", "--allow", "m1"), "pass one of them")
    refused(recommend(model, "--candidates", tmp_path / "ids.txt", "--session_length", 2), "single items")


def test_one_allow_list_for_all_histories(model, tmp_path):
    stdin = HISTORY + json.dumps(["m5"]) + "\n" + json.dumps({"history": ["m5"], "allow": ["m30"]}) + "\n"
    found = answers(recommend(model, "--allow", "m1", "m7", "m8", stdin=stdin))
    assert [set(answer["items"]) for answer in found] == [{"m7", "m8"}, {"m1", "m7", "m8"}, {"m30"}]
    (tmp_path / "stock.txt").write_text("m1\nm7\nm8\n")
    assert answers(recommend(model, "--allow", tmp_path / "stock.txt", stdin=stdin)) == found
    refused(recommend(model, "--allow", "x1", "--unknown", "skip"), "none of 1 items is in the catalogue")


def test_similar_items(model):
    done = recommend(model, "--similar_to", "m3", "m30", "--top_k", 4)
    first, second = answers(done)
    assert (first["similar_to"], second["similar_to"]) == ("m3", "m30")
    assert len(first["items"]) == 4
    assert "m3" not in first["items"]
    assert first["scores"] == sorted(first["scores"], reverse=True)
    assert first["fields"][0]["title"].split()[1] == "lamp"
    everything = answers(recommend(model, "--similar_to", "m3", "--top_k", 100))[0]
    assert len(everything["items"]) == NUM_ITEMS - 1
    refused(recommend(model, "--similar_to", "x3"), "--similar_to: 1 of 1 items")
    refused(recommend(model, "--similar_to", "m3", "--interactions", "log.csv"), "pass one of them")
    refused(recommend(model, "--similar_to", "m3", "--allow", "m1"), "leave out --candidates and --allow")
