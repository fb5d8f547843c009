"""Settings objects and single options of a workflow, and what is wrong with them."""

import pytest

from onerec_hf.trainers import OneRecTrainingArguments
from onerec_hf.workflows import (
    AlignSettings,
    DataSettings,
    ModelSettings,
    SemanticIDSettings,
    TrainSettings,
    align,
    evaluate,
    fit_semantic_ids,
    load_dataset,
    train,
    train_reward,
)
from onerec_hf.workflows.settings import gather


def test_options_go_to_the_settings_that_have_them():
    given = ModelSettings(hidden_size=64, decoder_layers=3)
    ids, model = gather((SemanticIDSettings, ModelSettings), [given], {"hidden_size": 32, "quantizer": "kmeans"})
    assert (ids.quantizer, model.hidden_size, model.decoder_layers) == ("kmeans", 32, 3)
    assert given.hidden_size == 64  # the caller's object stays


def test_settings_of_another_workflow_are_refused(tables):
    with pytest.raises(
        TypeError, match="AlignSettings does not fit here: pass at most one each of SemanticIDSettings"
    ):
        train(DataSettings(), AlignSettings(), output_dir="out")
    with pytest.raises(TypeError, match="ModelSettings does not fit here"):
        train(DataSettings(), ModelSettings(), ModelSettings(), output_dir="out")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda data: train(data, output_dir="out", hiden_size=3),
            "unknown option 'hiden_size' .did you mean 'hidden_size'",
        ),
        (lambda data: train(data, max_history=9), "option 'max_history' is of the data: pass it to load_dataset"),
        (lambda data: train(max_histroy=9), "unknown option 'max_histroy'"),
        (lambda data: train_reward(data), "output_dir is missing"),
        (lambda data: align(data, model="x"), "output_dir is missing"),
        (lambda data: evaluate(data, model="x", beams=3), "unknown option 'beams'"),
        (lambda data: fit_semantic_ids(data, output="x"), "unknown option 'output' .did you mean 'output_dir'"),
        (lambda data: load_dataset(interaction="x"), "unknown option 'interaction'"),
    ],
)
def test_unknown_and_missing_options(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=message):
        call(DataSettings())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass either --dataset .a named source. or --interactions"),
        ({"interactions": "x.csv", "dataset": "movielens"}, "pass either --dataset"),
        ({"dataset": "movielens", "items": "x.csv"}, "--items goes with --interactions"),
        ({"interactions": "x.csv", "embeddings": "x.npy"}, "--embeddings goes with --items"),
        ({"interactions": "x.csv", "stride": 0}, "--stride must be at least 1; got 0"),
        ({"interactions": "x.csv", "eval_users": 3}, "--eval_users goes with --prepared"),
        ({"interactions": "x.csv", "prepared": "x"}, "pass --prepared, --interactions or --dataset; one of them"),
        ({"interactions": "absent.csv"}, "absent.csv: no such file"),
    ],
    ids=str,
)
def test_data_settings_that_contradict_each_other(options, message):
    for call in (lambda: load_dataset(**options), lambda: load_dataset(DataSettings(**options))):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "x", "semantic_ids": "y"}, "pass --model, .* or --semantic_ids for a new model; not both"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience needs --eval_strategy"),
        ({"train_on": "prefixes"}, "--train_on prefixes needs --encoder_is_causal"),
        ({"train_on": "pairs"}, "--train_on pairs: choose windows or prefixes"),
        ({"hidden_size": 16, "num_attention_heads": 3}, "model options: .*head_dim=5 must be even"),
        ({"item_score_weight": 2.0}, "--item_score_weight 2 needs item scores"),
        ({"fsdp_size": 2}, "--fsdp_size 2: .* start it with torchrun"),
    ],
    ids=str,
)
def test_train_has_the_errors_of_the_command(tables, tmp_path, options, message):
    dataset = load_dataset(**tables)
    with pytest.raises(ValueError, match=message):
        train(dataset, output_dir=tmp_path / "out", preset="paper", codebook_sizes=[8, 8, 8], use_cpu=True, **options)
    assert not (tmp_path / "out").exists()


def test_arguments_of_the_caller_stay_as_they_are(tables, tmp_path):
    args = OneRecTrainingArguments(
        str(tmp_path / "out"), resume_from_checkpoint="last", use_cpu=True, report_to="none"
    )
    with pytest.raises(ValueError, match="--codebook_sizes must hold positive numbers"):
        train(load_dataset(**tables), args, SemanticIDSettings(codebook_sizes=[0]), TrainSettings())
    assert args.resume_from_checkpoint == "last"
    assert args.output_dir == str(tmp_path / "out")
