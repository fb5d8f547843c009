"""Families: every file of the package is read, its settings exist, and mistakes in one are reported."""

from dataclasses import fields

import optuna
import pytest

from onerec_hf.workflows.compare import load_families

ONE = "title: One\nkind: sequential\n"


def known(kind: str) -> set[str]:
    from onerec_hf.baselines import SequentialConfig
    from onerec_hf.trainers import OneRecTrainingArguments, SequentialTrainingArguments
    from onerec_hf.workflows import ModelSettings, SemanticIDSettings, TrainSettings

    kinds = {
        "ranking": (),
        "sequential": (SequentialConfig, SequentialTrainingArguments),
        "onerec": (SemanticIDSettings, ModelSettings, TrainSettings, OneRecTrainingArguments),
    }
    more = {
        "ranking": {"model", "num_neighbors", "shrinkage", "last_n"},
        "sequential": {"features", "evidence"},
        "onerec": set(),
    }
    return {field.name for each in kinds[kind] for field in fields(each)} | more[kind]


@pytest.mark.parametrize("family", load_families(), ids=lambda family: family.name)
def test_settings_exist_and_the_first_trial_is_of_the_space(family):
    drawn = set()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if first := family.first_params():
        assert set(first) == set(family.space)
        study.enqueue_trial(first)
    for number in range(20):
        params = study.ask(family.distributions()).params
        assert number or not first or params == first
        drawn |= set(family.drawn(params))
    assert set(family.settings) | drawn <= known(family.kind)


def test_a_family_extends_another():
    sasrec, text = load_families(["sasrec", "sasrec_text"])
    assert (text.space, text.first, text.kind) == (sasrec.space, sasrec.first, sasrec.kind)
    assert text.settings == {**sasrec.settings, "features": "content"}
    assert text.needs_content
    assert not sasrec.needs_content


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "a family is a mapping"),
        ("title: [", "no YAML"),
        (ONE + "sets: {}\n", "unknown key 'sets'"),
        ("kind: sequential\n", "key 'title' is missing"),
        (ONE.replace("sequential", "tree"), "unknown kind 'tree'. Use one of: ranking, sequential, onerec"),
        (ONE + "settings: [1]\n", "settings must be a mapping"),
        (ONE + "extends: other\n", "No such file or directory: other.yaml"),
        (ONE + "extends: mine\n", "extends mine, which extends this family"),
        (ONE + "space: {learning_rate: 0.1}\n", "space of learning_rate"),
        (ONE + "space: {learning_rate: {low: 1, high: 0}}\n", "space of learning_rate"),
        (ONE + "space: {learning_rate: []}\n", "space of learning_rate"),
        (ONE + "space: {dropout_rate: [0.1]}\nfirst: {dropout_rate: 0.2}\n", "first value 0.2 of dropout_rate"),
        (
            ONE + "space: {dropout_rate: {low: 0, high: 1}}\nfirst: {dropout_rate: 2}\n",
            "first value 2 of dropout_rate",
        ),
        (ONE + "first: {dropout_rate: 0.2}\n", "first sets 'dropout_rate', which is not in the space"),
    ],
)
def test_mistakes_name_the_file(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_families(["mine"], tmp_path)
    assert str(tmp_path / "mine.yaml") in str(error.value)
