"""A run is resumed with the options that it was started with: others are refused, or taken, said and recorded."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from onerec_hf.workflows import load_dataset, train
from onerec_hf.workflows.resuming import RunRecord
from onerec_hf.workflows.run_folder import UNFINISHED_RUN
from tests.workflows.conftest import TINY

_CALL = {**TINY, "max_steps": 4, "save_steps": 2, "seed": 3, "learning_rate": 0.01, "keep_checkpoints": True}


@pytest.fixture(scope="module")
def whole(tables, tmp_path_factory):
    """The folder of an uninterrupted run, with its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(load_dataset(**tables), output_dir=folder, **_CALL)
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """What a kill after the first checkpoint leaves."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-4", "results.json"))
    (folder / "model.safetensors").unlink()
    (folder / UNFINISHED_RUN).write_text('{"command": null}')
    return folder


def resume(data, folder, **options):
    return train(data, output_dir=folder, resume_from_checkpoint="last", **options)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"hidden_size": 32}, "--hidden_size 32, not 16"),
        ({"codebook_sizes": [4, 4, 4]}, "--codebook_sizes 4 4 4, not 8 8 8"),
        ({"learning_rate": 0.5}, "--learning_rate 0.5, not 0.01"),
        ({"weight_decay": 0.5}, "--weight_decay 0.5, not 0.0"),  # a default of the first call
        ({"seed": 4, "num_experts": 4}, "--num_experts 4, not 2, --seed 4, not 3"),
        ({"preset": "auto"}, "--preset auto, not paper"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_other_options_are_refused_by_name(tables, stopped, other, named):
    before = sorted(path.relative_to(stopped) for path in stopped.rglob("*"))
    call = {**_CALL, **other}
    with pytest.raises(ValueError, match=re.escape(named)):
        resume(load_dataset(**tables), stopped, **dict(sorted(call.items())))
    assert sorted(path.relative_to(stopped) for path in stopped.rglob("*")) == before


def test_other_data_are_refused(tables, stopped):
    with pytest.raises(ValueError, match=re.escape("(--max_history 7, not 50)")):
        resume(load_dataset(**tables, max_history=7), stopped, **_CALL)
    with pytest.raises(ValueError, match=re.escape("--session_length 2, not 5")):
        resume(load_dataset(**tables, session_length=2), stopped, **_CALL)
    swapped = tables["interactions"].copy()
    swapped.loc[[0, 1], "item_id"] = swapped.loc[[1, 0], "item_id"].to_numpy()
    with pytest.raises(ValueError, match="the run was started with other interactions"):
        resume(load_dataset(interactions=swapped, items=tables["items"]), stopped, **_CALL)


def test_options_that_are_left_out_are_those_of_the_run(tables, whole, stopped):
    resume(load_dataset(**tables), stopped)
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert "resumed_with" not in json.loads((stopped / "results.json").read_text())


def test_what_may_change_is_said_and_recorded(tables, stopped, capsys):
    result = resume(load_dataset(**tables), stopped, **{**_CALL, "max_steps": 5, "per_device_train_batch_size": 4})
    said = "resumed with other options: --max_steps 5, not 4, --per_device_train_batch_size 4, not 8"
    assert said in capsys.readouterr().err
    assert result.trainer.state.global_step == 5
    changes = [{"step": 2, "options": {"max_steps": [4, 5], "per_device_train_batch_size": [8, 4]}}]
    assert json.loads((stopped / "results.json").read_text())["resumed_with"] == changes


def test_a_run_does_not_end_before_its_checkpoint(tables, stopped):
    for shorter, asked in (({"max_steps": 1}, "--max_steps 1"), ({"max_steps": -1, "num_train_epochs": 0.01}, "0.01")):
        with pytest.raises(ValueError, match=f"{asked}: the checkpoint .*checkpoint-2 is at step 2 already"):
            resume(load_dataset(**tables), stopped, **{**_CALL, **shorter})


def test_a_checkpoint_of_the_last_step_is_not_trained_further(tables, whole, tmp_path):
    """A run that was killed in its evaluation."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("results.json"))
    (folder / UNFINISHED_RUN).write_text('{"command": null}')
    result = resume(load_dataset(**tables), folder, **_CALL)
    assert result.trainer.state.global_step == 4
    first, second = (load_file(path / "model.safetensors") for path in (whole, folder))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_checkpoint_without_a_record_tells_the_sizes_of_its_model(tables, stopped):
    path = stopped / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunRecordCallback"]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=re.escape("(--hidden_size 32, not 16)")):
        resume(load_dataset(**tables), stopped, **{**_CALL, "hidden_size": 32})
    resume(load_dataset(**tables), stopped, **_CALL)


def test_what_an_earlier_version_did_not_choose_keeps_its_default(tables, tmp_path):
    folder = tmp_path / "run"
    call = {
        "preset": "auto",
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "save_total_limit": 2,
        "baselines": False,
    }
    train(load_dataset(**tables), output_dir=folder, keep_checkpoints=True, report_to="none", **call)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    for name in ("results.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / UNFINISHED_RUN).write_text('{"command": null}')
    path = folder / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    record = state["stateful_callbacks"]["RunRecordCallback"]["args"]["record"]
    assert record["options"].pop("average_weights") is True
    record["chosen"].remove("average_weights")
    path.write_text(json.dumps(state))
    result = resume(load_dataset(**tables), folder, report_to="none", keep_checkpoints=True, **call)
    assert result.trainer.state.global_step == 4
    assert not result.trainer.args.average_weights


def test_data_without_the_features_of_the_run_are_other_data(tmp_path):
    TrainerState().save_to_json(str(tmp_path / "trainer_state.json"))
    data = {"stride": 1, "history_feedback": "all", "user_features": ["age"]}
    record = RunRecord.of({}, {}, data)
    record.check(tmp_path, {}, data, ())
    with pytest.raises(ValueError, match="--history_feedback none, not all"):
        record.check(tmp_path, {}, {"stride": 1, "user_features": ["age"]}, ())
    with pytest.raises(ValueError, match="--user_features none, not age"):
        record.check(tmp_path, {}, {"stride": 1, "history_feedback": "all"}, ())
