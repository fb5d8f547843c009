"""Training with short-term and positive pathways: packed as padded, sizes, prefixes refused, preferences, and `train` from tables."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from onerec_hf import ItemCatalogue, OneRecProcessor
from onerec_hf.data.collators import OneRecDataCollator, PackedDataCollator
from onerec_hf.data.packing import PackedDataset, example_sizes
from onerec_hf.trainers import (
    OneRecGRPOConfig,
    OneRecGRPOTrainer,
    OneRecTrainer,
    OneRecTrainingArguments,
    Seq2SeqDPOConfig,
    Seq2SeqDPOTrainer,
)
from onerec_hf.workflows import chosen_settings, load_in_memory
from onerec_hf.workflows.settings import sizes_of_pathways
from tests.modeling.test_pathways import PATHWAYS, PROCESSOR, SCHEMA, make
from tests.rounding import BACKWARD, assert_close

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def windows(count=12, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        history = [
            {"item": f"m{rng.integers(40)}", "positive": bool(rng.random() < 0.5)} for _ in range(rng.integers(1, 12))
        ]
        history[0]["positive"] = True
        rows.append(
            {
                "history": [entry["item"] for entry in history],
                "history_positive": [entry["positive"] for entry in history],
                "history_features": SCHEMA.encode_interactions(history).flatten().tolist(),
                "user_features": SCHEMA.encode_users([{"age": int(rng.integers(60))}])[0].tolist(),
                "session": [f"m{rng.integers(40)}"],
            }
        )
    return Dataset.from_list(rows)


def test_sizes_are_those_of_both_pathways():
    dataset = windows(40)
    items, _, _ = example_sizes(dataset, PROCESSOR.max_history, PROCESSOR.static_places, PATHWAYS)
    batch = OneRecDataCollator(PROCESSOR)(dataset.to_list())
    assert items.tolist() == (batch["attention_mask"].sum(1) // 4).tolist()


def test_packed_training_equals_padded_training(tmp_path):
    trained = []
    for packing in (False, True):
        model = make(item_head={"num_items": 40, "loss_weight": 1.0}, encoder_is_causal=True)
        arguments = OneRecTrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=50, learning_rate=1e-2, optim="sgd",
            max_grad_norm=0.0, packing=packing, packing_length=20, **QUIET,
        )  # fmt: skip
        OneRecTrainer(model, arguments, train_dataset=windows(), processing_class=PROCESSOR).train()
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        assert_close(value, trained[1][name], BACKWARD)
    weight = "model.encoder.features.short_term.0.weight"
    assert not torch.equal(trained[0][weight], make().state_dict()[weight])


def test_prefixes_are_refused():
    prefix = {**windows(1)[0], "sessions": [["m1"], ["m2"]], "history_lengths": [1, 2]}
    prefix["history"] = prefix["history"] * 2
    with pytest.raises(ValueError, match="train on windows"):
        PackedDataCollator(PROCESSOR, encoder_is_causal=True)([prefix])
    with pytest.raises(ValueError, match="train on windows"):
        PackedDataset(Dataset.from_list([prefix]), 64, 8, pathways=PATHWAYS)


def test_dpo_takes_a_step(tmp_path):
    pairs = windows(4).rename_column("session", "chosen").add_column("rejected", [["m1"]] * 4)
    arguments = Seq2SeqDPOConfig(str(tmp_path), max_steps=1, learning_rate=1e-2, logging_steps=1, **QUIET)
    trainer = Seq2SeqDPOTrainer(make(), args=arguments, train_dataset=pairs, processing_class=PROCESSOR)
    trainer.train()
    assert np.isfinite(trainer.state.log_history[0]["loss"])


def test_policy_optimisation_is_refused(tmp_path):
    args = OneRecGRPOConfig(str(tmp_path), per_device_train_batch_size=8, num_generations=4, **QUIET)
    with pytest.raises(ValueError, match="OneRecGRPOTrainer does not read pathways"):
        OneRecGRPOTrainer(make(), len, args, windows(), processing_class=PROCESSOR)


def table(users=30):
    rng = np.random.default_rng(0)
    rows = [
        (user, int(rng.integers(12)), time, int(rng.random() < 0.4 or time < 3))
        for user in range(users)
        for time in range(20)
    ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "like"])


def test_the_data_chooses_windows_that_hold_the_pathways():
    options = {"interactions": table(), "positive": ["like>=1"], "history_feedback": "all", "min_item_interactions": 1}
    pathways = ["short_term=5", "positive=4"]
    chosen = {row.option: row.value for row in chosen_settings(pathways=pathways, **options)}
    assert (chosen["train_on"], chosen["max_history"], chosen["packing_length"]) == ("windows", 10, 64)
    plain = {row.option: row.value for row in chosen_settings(**options)}
    assert plain["train_on"] == "prefixes"
    with pytest.raises(ValueError, match="--pathways: prefixes share one reading"):
        chosen_settings(pathways=pathways, train_on="prefixes", **options)
    with pytest.raises(ValueError, match="--pathways short_term: write short_term=20 positive=256"):
        sizes_of_pathways(["short_term"])
    with pytest.raises(ValueError, match="each of short_term, positive"):
        sizes_of_pathways(["short=5", "positive=4"])


def test_histories_of_a_table_become_pathways():
    """From a table to the model's input: the latest interactions of any feedback, then the latest that were liked."""
    from onerec_hf.workflows.artefact import new_model
    from onerec_hf.workflows.features import set_features
    from onerec_hf.workflows.settings import ModelSettings

    rows = table()
    data = load_in_memory(
        interactions=rows,
        positive=["like>=1"],
        history_feedback="all",
        min_item_interactions=1,
        session_length=1,
        max_history=50,
    )
    codes = np.stack(np.unravel_index(np.arange(len(data.item_ids)), (4, 5, 6)), axis=1)
    catalogue = ItemCatalogue(data.item_ids.tolist(), codes, (4, 5, 6))
    processor = OneRecProcessor.from_catalogue(catalogue, max_history=50, pathways=PATHWAYS)
    set_features(processor, data)
    example = data.test[0]
    of_user = rows[rows["user_id"] == example["user_id"]]
    last = of_user[of_user["like"] == 1].index[-1]
    before = of_user.loc[: last - 1]
    wanted = [*before["item_id"].tail(2), *before[before["like"] == 1]["item_id"].tail(3)]
    batch = OneRecDataCollator(processor)([example])
    read = catalogue.indices_of_codes(
        batch["input_ids"].unflatten(1, (-1, 4))[..., 1:] - torch.tensor(processor.tokenizer.level_offsets)
    )
    assert catalogue.ids(read[0].numpy()) == wanted
    settings = ModelSettings(hidden_size=16, pathways=["short_term=2", "positive=3"], num_experts=1)
    assert new_model(settings, processor, 1).config.features.pathways == PATHWAYS
    processor.features = None
    with pytest.raises(ValueError, match="--pathways needs --history_feedback all"):
        new_model(settings, processor, 1)
