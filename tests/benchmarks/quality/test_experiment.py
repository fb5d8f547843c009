"""Experiments: every YAML file is read, its settings exist, and mistakes in one are reported."""

from dataclasses import fields

import pytest
import yaml

from benchmarks.harness import RECIPES
from benchmarks.quality.experiment import load, names

ONEREC = "description: a\nkind: onerec\nrecipe: movielens.yaml\nsettings: {}\n"


def options_of_train() -> set[str]:
    from onerec_hf.trainers import OneRecTrainingArguments
    from onerec_hf.workflows import DataSettings, ModelSettings, SemanticIDSettings, TrainSettings

    kinds = (DataSettings, SemanticIDSettings, ModelSettings, TrainSettings, OneRecTrainingArguments)
    return {field.name for kind in kinds for field in fields(kind)}


def options_of_sequence_models() -> set[str]:
    from onerec_hf.baselines import SequentialConfig
    from onerec_hf.trainers import SequentialTrainingArguments

    return {field.name for kind in (SequentialConfig, SequentialTrainingArguments) for field in fields(kind)}


@pytest.mark.parametrize("name", names())
def test_every_experiment_is_read(name):
    experiment = load(name)
    assert (RECIPES / experiment.recipe).is_file()
    assert experiment.description
    if experiment.kind == "onerec":
        assert set(experiment.settings) <= options_of_train()
    elif experiment.kind == "sequential":
        assert set(experiment.settings) - {"features"} <= options_of_sequence_models()


def test_an_experiment_extends_another():
    small, kmeans = load("small"), load("small_kmeans")
    assert kmeans.settings == {**small.settings, "quantizer": "kmeans"}
    assert (kmeans.kind, kmeans.recipe) == (small.kind, small.recipe)


def test_the_tuned_onerec_is_its_recipe():
    recipe = yaml.safe_load((RECIPES / "amazon_beauty_items.yaml").read_text())
    settings = dict(load("onerec").settings)
    assert settings.pop("embedding") == "given+behaviour"  # what the recipe's default is for this data
    assert recipe.items() >= settings.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "is a mapping with a description"),
        ("kind: onerec\n", "is a mapping with a description"),
        (ONEREC + "sets: {}\n", "unknown key 'sets'"),
        (ONEREC.replace("onerec", "one_rec"), "unknown kind 'one_rec'. Use one of: ranking, sequential, onerec"),
        (ONEREC.replace("recipe: movielens.yaml\n", ""), "key 'recipe' is missing"),
        ("description: a\nextends: nothing\n", "has no experiment 'nothing'"),
    ],
)
def test_mistakes_name_the_file(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load("mine", tmp_path)
    assert str(tmp_path) in str(error.value)
