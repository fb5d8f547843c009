"""OneRecTrainer on packed rows and on prefixes: the same training as on windows, and clear refusals."""

import copy
import os
from collections import Counter
from unittest import mock

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import Trainer

from onerec_hf import OneRecProcessor
from onerec_hf.data import PackedDataCollator, UserSequences, prefix_examples, window_examples
from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments, RouterBalanceCallback
from tests.conftest import make_catalogue, make_model
from tests.ranks import torchrun
from tests.rounding import BACKWARD, assert_close, close

CATALOGUE = make_catalogue(30, (4, 4, 4))
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=6)
LENGTHS = [2, 3, 7, 5, 4, 2, 6, 7, 3, 5]
SEQUENCES = UserSequences.from_interactions(
    pd.DataFrame(
        [(user, f"m{(7 * user + step) % 30}", step) for user, n in enumerate(LENGTHS) for step in range(n)],
        columns=["user_id", "item_id", "timestamp"],
    )
)
WINDOWS = window_examples(SEQUENCES, session_length=2, max_history=6)
PREFIXES = prefix_examples(SEQUENCES, session_length=2, max_history=6)


def make_trainer(folder, train_dataset, model=None, **settings):
    defaults = {
        "per_device_train_batch_size": 100,  # all there is in one step
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_num_beams": 10,
        "packing_length": 8,
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    data_collator = settings.pop("data_collator", None)
    return OneRecTrainer(
        make_model(CATALOGUE, encoder_is_causal=True) if model is None else model,
        OneRecTrainingArguments(str(folder), **{**defaults, **settings}),
        train_dataset=train_dataset,
        eval_dataset=WINDOWS.select(range(9)),
        processing_class=PROCESSOR,
        data_collator=data_collator,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(first, second, steps=1):
    assert_close(second.state_dict(), first.state_dict(), terms=steps * BACKWARD)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("dataset", "settings"),
    [
        (WINDOWS, {"packing": True}),
        (PREFIXES, {"packing": True}),
        (PREFIXES, {}),
        (PREFIXES, {"packing": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
        (PREFIXES, {"packing": True, "activation_checkpointing": True}),
        (PREFIXES.to_iterable_dataset(), {"accelerator_config": {"dispatch_batches": False}}),
        (PREFIXES, {"pad_to_multiple_of": 4}),
        (WINDOWS, {"pad_to_multiple_of": 4}),
    ],
    ids=[
        "packed windows",
        "packed prefixes",
        "prefixes",
        "accumulated",
        "checkpointed",
        "streamed prefixes",
        "bucketed prefixes",
        "bucketed windows",
    ],
)
def test_a_step_equals_the_windows_step(tmp_path, dataset, settings, smoothing):
    windows = make_trainer(tmp_path, WINDOWS, label_smoothing_factor=smoothing)
    other = make_trainer(tmp_path, dataset, label_smoothing_factor=smoothing, **settings)
    before = copy.deepcopy(windows.model)
    windows.train(), other.train()
    if "gradient_accumulation_steps" in settings:
        assert 4 < len(other.train_dataset) <= 6  # three micro-batches of two rows hold them all
    assert losses(other) == close(losses(windows))
    assert_same_weights(windows.model, other.model)  # the routers' bias too: experts were counted alike
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), other.model.parameters(), strict=True))


def test_every_target_once_an_epoch(tmp_path):
    def targets(trainer):
        return Counter(
            tuple(label)
            for batch in trainer.get_train_dataloader()
            for label in batch["labels"].tolist()
            if label[0] != -100
        )

    wanted = targets(make_trainer(tmp_path, WINDOWS))
    assert wanted.total() == sum(n - 1 for n in LENGTHS)
    for dataset in (WINDOWS, PREFIXES):
        assert targets(make_trainer(tmp_path, dataset, packing=True, per_device_train_batch_size=2)) == wanted


def test_resume_equals_no_interruption(tmp_path):
    settings = {"packing": True, "per_device_train_batch_size": 2, "max_steps": 5, "optim": "adamw_torch"}
    saving = {"save_strategy": "steps", "save_steps": 3, **settings}
    dropout = {"encoder_is_causal": True, "dropout_rate": 0.1}
    whole = make_trainer(tmp_path / "a", PREFIXES, make_model(CATALOGUE, **dropout), **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "b", PREFIXES, make_model(CATALOGUE, seed=5, **dropout), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert_same_weights(whole.model, resumed.model, steps=0)


def test_evaluation_stays_as_it_is(tmp_path):
    wanted = make_trainer(tmp_path, WINDOWS).evaluate()
    got = make_trainer(tmp_path, PREFIXES, packing=True).evaluate()
    assert {k: v for k, v in got.items() if "@" in k} == {k: v for k, v in wanted.items() if "@" in k}
    assert got["eval_loss"] == wanted["eval_loss"]
    assert make_trainer(tmp_path, None, packing=True).evaluate()["eval_loss"] == wanted["eval_loss"]


def test_a_plain_trainer_takes_prefixes(tmp_path):
    model = make_model(CATALOGUE, encoder_is_causal=True)
    wanted = make_trainer(tmp_path, PREFIXES)
    plain = Trainer(
        model,
        copy.deepcopy(wanted.args).__class__(
            str(tmp_path),
            **{name: getattr(wanted.args, name) for name in ("learning_rate", "optim", "max_grad_norm")},
            lr_scheduler_type="constant",
            per_device_train_batch_size=100,
            max_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            save_strategy="no",
        ),
        train_dataset=PREFIXES,
        data_collator=PackedDataCollator(PROCESSOR, encoder_is_causal=True),
        callbacks=[RouterBalanceCallback()],
    )
    wanted.train(), plain.train()
    assert_same_weights(wanted.model, model)


def test_what_cannot_be_packed_is_refused(tmp_path):
    visible = make_model(CATALOGUE, encoder_is_causal=False)
    for packing in (False, True):
        with pytest.raises(ValueError, match="training on prefixes needs a causal encoder"):
            make_trainer(tmp_path, PREFIXES, visible, packing=packing)
    with pytest.raises(ValueError, match="so train_sampling_strategy='group_by_length' does not apply"):
        make_trainer(tmp_path, WINDOWS, packing=True, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="prefixes from a stream do not support dispatched batches"):
        make_trainer(tmp_path, PREFIXES.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"needs a datasets\.Dataset"):
        make_trainer(tmp_path, WINDOWS.to_iterable_dataset(), packing=True)
    with pytest.raises(
        ValueError, match=r"an example has 6 history items, but a packed row holds 5; raise packing_length"
    ):
        make_trainer(tmp_path, WINDOWS, packing=True, packing_length=5)
    with pytest.raises(ValueError, match="omit data_collator"):
        make_trainer(tmp_path, WINDOWS, packing=True, data_collator=PackedDataCollator(PROCESSOR, True))
    with pytest.raises(ValueError, match="needs the columns history and session"):
        make_trainer(tmp_path, Dataset.from_dict({"text": ["a"]}), packing=True)
    with pytest.raises(ValueError, match="packing_length must be at least 1"):
        OneRecTrainingArguments(str(tmp_path), packing_length=0)


def test_group_by_length_takes_prefixes(tmp_path):
    trainer = make_trainer(
        tmp_path, PREFIXES, train_sampling_strategy="group_by_length", per_device_train_batch_size=3
    )
    trainer.train()
    assert losses(trainer)[0] > 0


@pytest.fixture
def accelerate_of_its_own():
    """`torch_compile` stays behind in environment variables and in accelerate's shared state: other trainers would compile too."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "settings"),
    [(PREFIXES, {"packing": True}), (WINDOWS, {"pad_to_multiple_of": 6, "dataloader_drop_last": True})],
    ids=["packed", "bucketed"],
)
def test_torch_compile_trains_without_recompiling(tmp_path, dataset, settings, accelerate_of_its_own):
    """Two epochs; the last batch of packed rows is incomplete."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, **settings}
    settings["per_device_train_batch_size"] = 2
    plain = make_trainer(tmp_path, dataset, **settings)
    plain.train()
    compiled = make_trainer(tmp_path, dataset, torch_compile=True, torch_compile_backend="aot_eager", **settings)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(losses(plain)) >= 4
    assert losses(compiled) == close(losses(plain), terms=len(losses(plain)) * BACKWARD)
    assert_same_weights(plain.model, compiled.accelerator.unwrap_model(compiled.model), steps=len(losses(plain)))


RANKS = """
import sys
from safetensors.torch import save_file
from onerec_hf.workflows.distributed import leave
from tests.trainers.test_packed_training import PREFIXES, make_trainer

folder, rows = sys.argv[1], int(sys.argv[2])
trainer = make_trainer(folder, PREFIXES, packing=True, per_device_train_batch_size=rows)
trainer.train()
if trainer.is_world_process_zero():
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, f"{folder}/weights.safetensors")
del trainer
leave()
"""


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(script, tmp_path, "2")
    assert done.returncode == 0, done.stderr[-3000:]
    alone = make_trainer(tmp_path, PREFIXES, packing=True, per_device_train_batch_size=4)
    alone.train()
    assert_close(load_file(tmp_path / "weights.safetensors"), alone.model.state_dict(), terms=BACKWARD)
