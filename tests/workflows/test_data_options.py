"""The data options travel with the model: saved, taken where the user gives none, and the difference is said where he does."""

import json
import shutil

import pytest

from onerec_hf.data import ExampleSettings, PositiveFeedback, prepare_log
from onerec_hf.workflows import DataSettings, align, evaluate, load_dataset, train
from onerec_hf.workflows.data_options import DATA_OPTIONS_NAME, differences, options_to_take, read_data_options
from tests.cli.commands import onerec, rated_rows, refused, succeeded
from tests.workflows.conftest import TINY, frame, options_of

GIVEN = {
    "positive": ["rating>=2"],
    "min_item_interactions": 2,
    "session_length": 3,
    "max_history": 7,
    "stride": 2,
    "ties": "shuffle",
}
SAVED = {
    "dataset": None,
    "user_column": "who",
    "item_column": "what",
    "timestamp_column": "timestamp",
    **GIVEN,
    "ties_seed": 0,
    "holdout": "last",
    "validation_start": None,
    "test_start": None,
    "exclude_seen": False,
}


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
    """A table with a rating and names of its own, as a file."""
    path = tmp_path_factory.mktemp("rated") / "rated.csv"
    frame(rated_rows()).rename(columns={"user_id": "who", "item_id": "what"}).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def trained(rated, tmp_path_factory):
    """The folder of a model that was trained with other options than the defaults."""
    folder = tmp_path_factory.mktemp("trained") / "mine"
    columns = {"user_column": "who", "item_column": "what"}
    settings = {**columns, **GIVEN, **TINY, "eval_exclude_seen": False}
    succeeded(onerec("train", "--interactions", rated, *options_of(settings), "--output_dir", folder))
    return folder


def metrics_of(folder):
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["name"]: pytest.approx(row["value"], abs=1e-9) for row in rows if row["name"] != "seconds"}


def test_they_are_saved_beside_the_model(trained):
    assert json.loads((trained / DATA_OPTIONS_NAME).read_text()) == SAVED
    assert read_data_options("--model", trained) == SAVED
    card = (trained / "README.md").read_text()
    assert "--positive 'rating>=2' --min_item_interactions 2 --session_length 3 --max_history 7 --stride 2" in card


def test_evaluate_takes_them_and_says_where_the_users_differ(trained, rated, tmp_path):
    file = tmp_path / "rows.json"
    command = ["evaluate", "--model", trained, "--interactions", rated]
    done = succeeded(onerec(*command, "--json", file))
    results = json.loads(file.read_text())
    assert {row["name"]: row["value"] for row in results["rows"]} == metrics_of(trained)
    assert results["protocol"] == json.loads((trained / "results.json").read_text())["protocol"]
    assert "rating >= 2" in results["protocol"]
    assert "the model was trained with" not in done.err
    assert "other_data_options" not in results
    other = succeeded(onerec(*command, "--min_item_interactions", 3, "--stride", 1, "--json", file))
    (line,) = [line for line in other.err.splitlines() if "the model was trained with" in line]
    assert line == "--min_item_interactions 3: the model was trained with 2; --stride 1: the model was trained with 2"
    assert json.loads(file.read_text())["other_data_options"] == line
    seen = succeeded(onerec(*command, "--exclude_seen", "true", "--json", file))
    assert "--exclude_seen true: the model was trained with false" in seen.err
    assert json.loads(file.read_text())["rows"] != results["rows"]
    assert seen.out != done.out


def test_python_takes_single_options_one_by_one_and_objects_whole(trained, rated, capsys):
    """A settings object gives all options; a loaded data set has its own."""
    table = frame(rated_rows()).rename(columns={"user_id": "who", "item_id": "what"})
    wanted = metrics_of(trained)
    assert evaluate(load_dataset(interactions=table, model=str(trained)), model=str(trained)).metrics == wanted
    assert evaluate(interactions=rated, model=str(trained)).metrics == wanted
    assert "the model was trained with" not in capsys.readouterr().err
    whole = DataSettings(interactions=rated, user_column="who", item_column="what", positive=["rating >= 2.0"])
    for data in (whole, load_dataset(whole)):
        evaluate(data, model=str(trained))
        assert (
            "--min_item_interactions 5: the model was trained with 2; --session_length 5: the model was trained with 3; "
            "--max_history 50: the model was trained with 7; --stride 1: the model was trained with 2; --ties file: the model was trained with shuffle\n"
        ) in capsys.readouterr().err


def test_training_goes_on_with_them(trained, rated, tmp_path):
    folder = tmp_path / "further"
    command = ["--model", trained, "--interactions", rated, *options_of(TINY)]
    done = succeeded(onerec("train", *command, "--output_dir", folder))
    assert json.loads((folder / DATA_OPTIONS_NAME).read_text()) == SAVED
    assert "seen items included" in (folder / "README.md").read_text()
    assert "the model was trained with" not in done.err
    done = succeeded(
        onerec("train", *command, "--stride", 1, "--eval_exclude_seen", "true", "--output_dir", tmp_path / "b")
    )
    assert "--stride 1: the model was trained with 2" in done.err
    assert json.loads((tmp_path / "b" / DATA_OPTIONS_NAME).read_text()) == SAVED | {"stride": 1, "exclude_seen": True}


def test_an_alignment_takes_and_keeps_them(trained, rated, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pair = {"history": ["m1", "m2"], "chosen": ["m3", "m4", "m6"], "rejected": ["m7", "m8", "m9"]}
    pairs.write_text("\n".join([json.dumps(pair)] * 4))
    options = {
        "max_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
    }
    result = align(
        interactions=rated, model=str(trained), preferences=str(pairs), output_dir=tmp_path / "out", **options
    )
    assert json.loads((tmp_path / "out" / DATA_OPTIONS_NAME).read_text()) == SAVED
    before = {name: value for name, value in metrics_of(trained).items() if name.startswith("onerec/")}
    assert {name: result.metrics[f"before/{name}"] for name in before} == before


def test_recommend_takes_what_applies(trained, tmp_path):
    """Seen items stay, and the items table is read by the column that the model was trained with."""
    histories = tmp_path / "histories.jsonl"
    histories.write_text('["m1", "m2", "m3", "m4"]\n')
    items = tmp_path / "items.csv"
    items.write_text("what,title\n" + "".join(f"m{i},lamp {i}\n" for i in range(40)))
    command = ["recommend", "--model", trained, "--histories", histories, "--top_k", 30, "--items", items]
    answer = json.loads(succeeded(onerec(*command)).out)
    assert {"m1", "m2", "m3", "m4"} & set(answer["items"])
    assert answer["fields"][0]["title"] == f"lamp {answer['items'][0][1:]}"
    excluded = json.loads(succeeded(onerec(*command, "--exclude_seen", "true")).out)
    assert not {"m1", "m2", "m3", "m4"} & set(excluded["items"])
    refused(onerec(*command, "--item_column", "item_id"), "item_id")


def test_a_prepared_folder_has_its_own(trained, rated, tmp_path, capsys):
    """Its options are compared, and saved with a model that is trained on it."""
    columns = {"user_column": "who", "item_column": "what", "positive": PositiveFeedback({"rating": 2})}
    prepare_log(rated, tmp_path / "ready", **columns, settings=ExampleSettings(2, 3, 7, 1))
    data = load_dataset(prepared=str(tmp_path / "ready"), model=str(trained))
    assert data.options == {name: value for name, value in SAVED.items() if name != "exclude_seen"} | {
        "stride": 1,
        "ties": "file",
    }
    evaluate(data, model=str(trained))
    assert (
        "--stride 1: the model was trained with 2; --ties file: the model was trained with shuffle"
        in capsys.readouterr().err
    )


def test_a_named_data_set_is_taken_too():
    trained = {"dataset": "movielens", "positive": ["rating>=4"], "max_history": 10, "exclude_seen": True}
    assert options_to_take({}, trained) == {"dataset": "movielens", "positive": ["rating>=4"], "max_history": 10}
    assert options_to_take({"data_dir": "x", "max_history": 20}, trained).keys() == {"dataset", "positive"}
    assert "dataset" not in options_to_take({"interactions": "x.csv"}, trained)
    assert differences({"dataset": None}, trained) == ""
    assert differences({"dataset": "kuairand-pure"}, trained).startswith("--dataset kuairand-pure: the model was")


def test_a_model_of_an_earlier_version_has_none(trained, rated, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    (old / DATA_OPTIONS_NAME).unlink()
    command = ["evaluate", "--model", old, "--interactions", rated]
    refused(onerec(*command), "column 'user_id'")
    given = {"user_column": "who", "item_column": "what", **GIVEN, "exclude_seen": False}
    done = succeeded(onerec(*command, *options_of(given)))
    assert done.out == succeeded(onerec("evaluate", "--model", trained, "--interactions", rated)).out


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"stride": "2"}', '{"positive": "rating>=2"}', '{"positive": [4]}', '{"max_history": null}'],
)
def test_a_damaged_file_is_one_error(trained, rated, tmp_path, content):
    bad = tmp_path / "bad"
    shutil.copytree(trained, bad)
    (bad / DATA_OPTIONS_NAME).write_text(content)
    refused(onerec("evaluate", "--model", bad, "--interactions", rated), f"--model {bad}", DATA_OPTIONS_NAME, "again")


def test_options_of_a_later_version_are_left_out(tmp_path):
    (tmp_path / DATA_OPTIONS_NAME).write_text('{"stride": 2, "sampling": {"of": "a later version"}}')
    assert read_data_options("--model", tmp_path) == {"stride": 2}


def test_a_killed_run_goes_on_with_the_checkpoint_alone(rated, tmp_path, monkeypatch):
    from onerec_hf.trainers import OneRecTrainer

    folder, step, count = tmp_path / "out", OneRecTrainer.training_step, iter(range(1, 100))

    class Killed(BaseException):
        pass

    def training_step(self, *args, **kwargs):
        if next(count) == 2:
            raise Killed
        return step(self, *args, **kwargs)

    given = {"user_column": "who", "item_column": "what", **GIVEN}
    with monkeypatch.context() as patch:
        patch.setattr(OneRecTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            train(load_dataset(interactions=rated, **given), output_dir=folder, save_steps=1, **TINY)
    done = onerec(
        "train", "--interactions", rated, *options_of(TINY), "--resume_from_checkpoint", "last", "--output_dir", folder
    )
    succeeded(done)
    assert json.loads((folder / DATA_OPTIONS_NAME).read_text()) == SAVED | {"exclude_seen": True}
