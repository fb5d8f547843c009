"""A table to a saved model in Python: in memory and prepared, the folder that the command writes."""

import json
import signal

import datasets
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoProcessor

from onerec_hf.data import ExampleSettings, prepare_log
from onerec_hf.trainers import OneRecTrainer
from onerec_hf.workflows import (
    DataSettings,
    InMemoryDataset,
    RunComplete,
    ShardedDataset,
    evaluate,
    fit_semantic_ids,
    load_dataset,
    ranking_table,
    train,
)
from tests.cli.commands import codes, contents, onerec, succeeded
from tests.workflows.conftest import TINY, options_of


def parameters(folder):
    return dict(AutoModelForSeq2SeqLM.from_pretrained(folder).named_parameters())


def rows_of(folder):
    return [row for row in json.loads((folder / "results.json").read_text())["rows"] if row["name"] != "seconds"]


@pytest.fixture(scope="module")
def trained(tables, tmp_path_factory):
    folder = tmp_path_factory.mktemp("python") / "mine"
    return train(load_dataset(**tables), output_dir=folder, **TINY)


@pytest.fixture(scope="module")
def commanded(files, tmp_path_factory):
    """The folder and the output of the command with the same tables and settings."""
    folder = tmp_path_factory.mktemp("command") / "mine"
    data = ["--interactions", files["interactions"], "--items", files["items"]]
    return folder, succeeded(onerec("train", *data, *options_of(TINY), "--output_dir", folder))


def assert_same_artefact(first, second):
    assert contents(first).keys() == contents(second).keys()
    assert codes(first) == codes(second)
    assert rows_of(first) == rows_of(second)
    mine, theirs = parameters(first), parameters(second)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_tables_in_memory_give_the_artefact_of_the_command(trained, commanded):
    folder, done = commanded
    assert_same_artefact(trained.folder, folder)
    assert ranking_table(trained.rows) == done.out.split("\n\n")[0]


def test_the_result_holds_metrics_model_and_processor(trained):
    assert trained.metrics.keys() >= {"onerec/recall@10", "popularity/ndcg@5", "item_knn/mrr@10", "invalid_id_rate"}
    saved = {row["name"]: row["value"] for row in rows_of(trained.folder)}
    assert {name: value for name, value in trained.metrics.items() if name != "seconds"} == saved
    histories = [["m1", "m2"], ["m9"]]
    loaded, processor = (kind.from_pretrained(trained.folder) for kind in (AutoModelForSeq2SeqLM, AutoProcessor))
    wanted = loaded.eval().recommend(**processor(histories), num_beams=8)
    assert torch.equal(trained.model.eval().recommend(**trained.processor(histories), num_beams=8), wanted)
    results = json.loads((trained.folder / "results.json").read_text())
    assert (results["dataset"], results["seed"]) == ("interactions", 42)
    card = (trained.folder / "README.md").read_text()
    assert "Read from tables in memory." in card
    assert "onerec-hf train" not in card


def test_datasets_and_settings_objects_are_the_same_data(tables, files, trained):
    sets = {name: datasets.Dataset.from_pandas(table) for name, table in tables.items()}
    for dataset in (load_dataset(**sets), load_dataset(DataSettings(**files))):
        assert isinstance(dataset, InMemoryDataset)
        assert dataset.test[:] == load_dataset(**tables).test[:]
        assert dataset.items is not None
        assert evaluate(dataset, model=str(trained.folder)).metrics == {
            name: pytest.approx(value, abs=1e-9) for name, value in trained.metrics.items() if name != "seconds"
        }


@pytest.fixture(scope="module")
def prepared(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "ready"
    prepare_log(files["interactions"], folder, settings=ExampleSettings(), num_shards=4, rows_per_bucket=60)
    return str(folder)


def test_prepared_data_gives_the_artefact_of_the_command(prepared, files, trained, tmp_path):
    dataset = load_dataset(prepared=prepared, items=files["items"])
    assert isinstance(dataset, ShardedDataset)
    assert (dataset.session_length, dataset.max_history, dataset.test is dataset.test) == (5, 50, True)
    result = train(dataset, output_dir=tmp_path / "python", **TINY)
    data = ["--prepared", prepared, "--items", files["items"]]
    succeeded(onerec("train", *data, *options_of(TINY), "--output_dir", tmp_path / "command"))
    assert_same_artefact(tmp_path / "python", tmp_path / "command")
    assert codes(result.folder) == codes(trained.folder)
    in_memory = load_dataset(**files)
    assert dataset.counts()["training examples"] == in_memory.counts()["training examples"]
    assert dataset.item_ids.tolist() == in_memory.item_ids.tolist()
    baselines = [name for name in result.metrics if name.startswith(("popularity/", "item_knn/"))]
    assert [result.metrics[name] for name in baselines] == pytest.approx([trained.metrics[name] for name in baselines])


def test_prefixes_are_for_tables_in_memory(prepared, tmp_path):
    causal = {**TINY, "train_on": "prefixes", "encoder_is_causal": True}
    with pytest.raises(ValueError, match="--train_on goes with --interactions"):
        train(load_dataset(prepared=prepared), output_dir=tmp_path / "out", **causal)
    assert not (tmp_path / "out").exists()


def test_fitted_semantic_ids_are_those_of_the_training(tables, trained, tmp_path):
    dataset = load_dataset(**tables)
    fitted = fit_semantic_ids(dataset, output_dir=str(tmp_path / "ids"), codebook_sizes=[8, 8, 8])
    assert fitted.catalogue.hash == codes(trained.folder)[0]
    assert contents(tmp_path / "ids").keys() >= {"catalogue.safetensors", "codebooks.safetensors", "semantic_ids.json"}
    settings = {name: value for name, value in TINY.items() if name != "codebook_sizes"}
    train(dataset, semantic_ids=str(tmp_path / "ids"), output_dir=tmp_path / "out", **settings)
    assert rows_of(tmp_path / "out") == rows_of(trained.folder)


def test_a_killed_run_resumes_by_the_same_call(tables, trained, tmp_path, monkeypatch):
    dataset = load_dataset(**tables)
    call = {"output_dir": tmp_path / "out", "save_strategy": "steps", "save_steps": 1, **TINY}
    step, count = OneRecTrainer.training_step, iter(range(1, 100))

    class Killed(BaseException):
        pass

    def training_step(self, *args, **kwargs):
        if next(count) == 3:
            raise Killed
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(OneRecTrainer, "training_step", training_step)
        with pytest.raises(Killed):
            train(dataset, **call)
    with pytest.raises(FileExistsError, match="contains an unfinished run"):
        train(dataset, **call)
    train(dataset, resume_from_checkpoint="last", **call)
    assert_same_artefact(tmp_path / "out", trained.folder)
    with pytest.raises(RunComplete, match="holds a complete run: nothing is left to do"):
        train(dataset, resume_from_checkpoint="last", **call)


def test_ctrl_c_says_how_to_resume_in_python(tables, tmp_path, monkeypatch):
    step = OneRecTrainer.training_step

    def training_step(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(OneRecTrainer, "training_step", step)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(OneRecTrainer, "training_step", training_step)
    with pytest.raises(
        KeyboardInterrupt, match='checkpoint-1 is kept; resume with the same call and resume_from_checkpoint="last"'
    ):
        train(load_dataset(**tables), output_dir=tmp_path / "out", **TINY)
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-1" / "config.json").is_file()
