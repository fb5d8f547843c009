"""What ends a training in the middle of a step: which batch it was, on which rank, what to change, and what stays."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from onerec_hf import OneRecProcessor
from onerec_hf.data.collators import OneRecDataCollator, PackedDataCollator
from onerec_hf.modeling.features import Feature, FeatureSchema
from onerec_hf.trainers import BatchOutOfMemoryError, NonFiniteError, newest_checkpoint
from onerec_hf.trainers.faults import batch_examples
from tests.modeling.test_lifelong import HISTORIES, made
from tests.trainers import preference_runs, test_onerec_dpo, test_reward_trainer
from tests.trainers.test_onerec_trainer import PROCESSOR, examples, make_trainer

ROOT = Path(__file__).resolve().parents[2]


class Poison:
    """A forward hook: the loss of every batch that has this history becomes `value`, its gradient stays what it was."""

    def __init__(self, history, value=math.nan):
        self.history, self.value = history, value

    def __call__(self, module, args, kwargs, output):
        found = any(example["history"] == self.history for example in batch_examples(kwargs, PROCESSOR))
        if module.training and found:
            output.loss = output.loss + self.value


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def poisoned(folder, value=math.nan, **settings):
    """A trainer whose 41st example has a loss of `value`."""
    trainer = make_trainer(folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    rows = trainer.train_dataset.to_list()
    rows[40]["history"] = ["m29", "m3", "m29"]
    trainer.train_dataset = type(trainer.train_dataset).from_list(rows)
    trainer.model.register_forward_hook(Poison(["m29", "m3", "m29"], value), with_kwargs=True)
    return trainer


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(tmp_path, value):
    trainer = poisoned(tmp_path, value, max_steps=8, save_strategy="steps", save_steps=1)
    assert trainer.args.logging_nan_inf_filter is False
    with pytest.raises(NonFiniteError, match=rf"stopped at step \d.* is {value}.*The newest checkpoint is") as caught:
        trainer.train()
    step = trainer.state.global_step  # which is done
    saved = lines(caught.value.path)
    assert caught.value.path.endswith(f"nonfinite-step-{step + 1}-rank-0.jsonl")
    assert len(saved) == 4  # one micro-batch of the two
    assert {line["micro_batch"] for line in saved} <= {1, 2}
    assert ["m29", "m3", "m29"] in [line["history"] for line in saved]
    rows = {(tuple(row["history"]), tuple(row["session"])) for row in trainer.train_dataset}
    assert {(tuple(line["history"]), tuple(line["session"])) for line in saved} <= rows
    if step:
        whole = make_trainer(tmp_path / "again")
        whole.train(resume_from_checkpoint=newest_checkpoint(tmp_path))
        state = trainer.model.state_dict()
        before = type(trainer.model).from_pretrained(tmp_path / f"checkpoint-{step}").state_dict()
        assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_a_gradient_that_is_no_number_names_all_of_the_step(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(NonFiniteError, match=r"the norm of its gradient nan.*There is no checkpoint yet") as caught:
        trainer.train()
    assert len(lines(caught.value.path)) == 8


def test_it_can_be_switched_off(tmp_path):
    trainer = poisoned(tmp_path, stop_at_nonfinite=False, max_steps=8)
    trainer.train()
    assert trainer.state.global_step == 8
    assert list(tmp_path.glob("nonfinite*")) == []


def test_nothing_changes_where_all_is_finite(tmp_path):
    weights = []
    for stops in (True, False):
        trainer = make_trainer(tmp_path / str(stops), stop_at_nonfinite=stops)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_other_trainers_stop_too(tmp_path):
    reward = test_reward_trainer.RewardTrainer(
        test_reward_trainer.make_model(),
        test_reward_trainer.arguments(tmp_path / "reward", max_steps=2),
        test_reward_trainer.synthetic(64, 1),
    )
    alignment = test_onerec_dpo.make_trainer(tmp_path / "alignment")
    pairs = preference_runs.make_trainer(tmp_path / "pairs", max_steps=2)
    text = preference_runs.make_trainer(tmp_path / "text", "t5", max_steps=2)
    columns = [
        {"history", "session"},
        {"history", "session"},
        {"history", "chosen", "rejected"},
        {"prompt_ids", "chosen_ids", "rejected_ids"},
    ]
    for trainer, names in zip((reward, alignment, pairs, text), columns, strict=True):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda grad: grad * math.nan)
        with pytest.raises(NonFiniteError) as caught:
            trainer.train()
        first = lines(caught.value.path)[0]
        assert names <= set(first), first
    rows = test_reward_trainer.synthetic(64, 1)
    saved = lines(tmp_path / "reward" / "nonfinite-step-1-rank-0.jsonl")
    known = [(row["history"], row["session"]) for row in rows]
    assert all((line["history"], line["session"]) in known for line in saved)


def test_examples_of_packed_rows():
    rows = examples(12).to_list()
    collator = PackedDataCollator(PROCESSOR, encoder_is_causal=False)
    batch = collator([{"examples": rows[:5]}, {"examples": rows[5:]}])
    found = batch_examples(batch, PROCESSOR)
    assert found == [{"history": row["history"][-5:], "session": row["session"]} for row in rows]


@pytest.mark.parametrize("reads", ["lifelong", "features"])
def test_examples_hold_items_alone_where_rows_begin_with_other_places(reads):
    _, processor = made()
    if reads == "features":
        schema = FeatureSchema(user=(Feature("age", edges=(30.0,)),))
        processor = OneRecProcessor.from_catalogue(processor.catalogue, max_history=4, features=schema)
    rows = [{"history": history, "session": [9], "user_features": [3]} for history in HISTORIES]
    batch = OneRecDataCollator(processor)(rows)
    assert batch_examples(batch, processor) == [{"history": history[-4:], "session": [9]} for history in HISTORIES]


class Greedy:
    """A forward hook that asks for more memory than there is, in training or in evaluation."""

    def __init__(self, training):
        self.training = training

    def __call__(self, module, args, output):
        if module.training == self.training:
            torch.empty(2**50)


def test_memory_that_does_not_suffice_names_the_batch_and_the_settings(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.register_forward_hook(Greedy(training=True))
    message = (
        r"out of memory at step 1, in training on a batch of input_ids \(8, \d+\), decoder_input_ids \(8, \d+\).*"
    )
    with pytest.raises(BatchOutOfMemoryError, match=message) as caught:
        trainer.train()
    for setting in (
        "per_device_train_batch_size (8)",
        "gradient_accumulation_steps (1)",
        "max_history",
        "activation_checkpointing",
    ):
        assert setting in str(caught.value)
    trainer = make_trainer(tmp_path)
    trainer.model.register_forward_hook(Greedy(training=False))
    with pytest.raises(
        BatchOutOfMemoryError, match=r"in evaluation.*per_device_eval_batch_size \(8\).*eval_num_beams"
    ):
        trainer.evaluate()


def test_an_evaluation_within_training_speaks_of_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.model.register_forward_hook(Greedy(training=False))
    with pytest.raises(MemoryError, match="in evaluation"):
        trainer.train()


@pytest.mark.slow
def test_the_batch_size_is_still_found_automatically(tmp_path):
    """accelerate halves the batch on the library's own error, before ours is made of it."""
    trainer = make_trainer(tmp_path, auto_find_batch_size=True)

    def greedy(module, args, kwargs, output):
        if kwargs["input_ids"].shape[0] > 4:
            torch.empty(2**50)

    trainer.model.register_forward_hook(greedy, with_kwargs=True)
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer._train_batch_size <= 4


# -- several ranks: each a process of its own, so that no launcher ends the others ---------------------
RANKS = """
import os, signal, sys
from transformers import TrainerCallback
from onerec_hf.workflows.distributed import leave
from tests.trainers.test_faults import Dies, poisoned
from tests.trainers.test_onerec_trainer import make_trainer

folder, what = sys.argv[1], sys.argv[2]
settings = {"save_strategy": "steps", "save_steps": 2, "ddp_timeout": 30, "optim": "sgd"}
if what == "poison":
    trainer = poisoned(folder, max_steps=6, **settings)
else:
    callbacks = [] if what == "resume" else [Dies(getattr(signal, what))]
    trainer = make_trainer(folder, callbacks=callbacks, per_device_train_batch_size=4, **settings)
trainer.train(resume_from_checkpoint=what == "resume")
if trainer.is_world_process_zero():
    trainer.model.save_pretrained(folder + "/final")
del trainer
leave()
"""


class Dies(TrainerCallback):
    """Rank 1 gets the signal at the beginning of the fifth step."""

    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 4:
            os.kill(os.getpid(), self.number)


def start_ranks(folder, what, port, launcher=()):
    script = folder / "ranks.py"
    script.write_text(RANKS)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    if launcher:
        return [
            subprocess.Popen(
                [sys.executable, *launcher, script, folder, what], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
            )
        ]
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, script, folder, what],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def free_port():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_hangs_ends_the_others_and_all_go_on(tmp_path, what):
    survivor, lost = start_ranks(tmp_path, what, free_port())
    try:
        deadline = time.monotonic() + 200
        while newest_checkpoint(tmp_path) != str(tmp_path / "checkpoint-4") and time.monotonic() < deadline:
            time.sleep(0.1)
        _, err = survivor.communicate(timeout=240)  # ddp_timeout is 30 seconds, and the machine may be busy
    finally:
        lost.kill()
        lost.communicate()
        survivor.kill()
    assert survivor.returncode not in (0, -signal.SIGKILL)
    assert (
        "LostRankError: rank 0 of 2: another rank died, or did not respond for 30 seconds (ddp_timeout), at step 4 of 6"
        in err
    )
    assert f"resume_from_checkpoint={str(tmp_path / 'checkpoint-4')!r}" in err
    for process in start_ranks(tmp_path, "resume", free_port()):
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-3000:]
    assert (tmp_path / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_one_rank_s_loss_stops_all_and_it_alone_names_examples(tmp_path):
    errors = []
    for process in start_ranks(tmp_path, "poison", free_port()):
        errors.append(process.communicate(timeout=200)[1])
        assert process.returncode != 0
    (path,) = tmp_path.glob("nonfinite-*.jsonl")
    rank = int(path.stem[-1])
    assert "NonFiniteError" in errors[rank]
    assert str(path) in errors[rank]
    assert "the loss is not finite on another rank, which saved its examples" in errors[1 - rank]
    assert len(lines(path)) == 4
    assert ["m29", "m3", "m29"] in [line["history"] for line in lines(path)]


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    (run,) = start_ranks(tmp_path, "SIGKILL", 0, launcher)
    _, err = run.communicate(timeout=200)
    assert run.returncode != 0
    assert "exitcode  : -9" in err  # its own words for the rank that was lost
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
