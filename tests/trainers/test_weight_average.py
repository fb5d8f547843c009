"""The average of a training's weights: its value, where a training uses it, and going on from a checkpoint."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from onerec_hf.trainers import OneRecTrainingArguments, WeightAverage, newest_checkpoint
from onerec_hf.trainers.weight_average import LATEST_NAME
from tests.trainers import test_sequential_trainer as sequential
from tests.trainers.test_onerec_trainer import PROCESSOR, examples, losses, make_trainer

SAVING = {"average_weights": True, "save_strategy": "steps", "save_steps": 2}


class Steps(TrainerCallback):
    """The weights of each step, as a copy."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append({name: each.detach().clone() for name, each in model.named_parameters()})


def weights_of(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def by_hand(steps):
    """Step t counts as the share of t^8's discrete form (equation of Shamir and Zhang, section 4)."""
    found = {name: each.double() for name, each in steps[0].items()}
    for number, latest in enumerate(steps[1:], start=2):
        share = 9 / (number + 8)
        found = {name: (1 - share) * found[name] + share * latest[name].double() for name in found}
    return found


def is_near(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-6, msg=name)


def test_later_steps_count_more_whatever_the_length():
    """Of constant speed: 100 or 1,000 steps, the average is a tenth of the way behind the last."""
    model = nn.Linear(1, 1, bias=False)
    for length in (100, 1000):
        average = WeightAverage(model)
        for step in range(1, length + 1):
            nn.init.constant_(model.weight, step / length)
            average.update()
        with average.swapped():
            assert model.weight.item() == pytest.approx(0.9, abs=0.01)
        assert model.weight.item() == 1


def test_bfloat16_weights_have_an_average_of_float32():
    """Small shares would be rounded away."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1)
    average = WeightAverage(model, steps=3000)
    nn.init.constant_(model.weight, 2)
    for _ in range(200):
        average.update()
    assert average._average["weight"].item() == pytest.approx(2 - np.prod([1 - 9 / (8 + 3001 + n) for n in range(200)]), rel=1e-4)  # fmt: skip


def test_training_evaluates_saves_and_keeps_the_average(tmp_path):
    steps, seen = Steps(), {}
    trainer = make_trainer(tmp_path, callbacks=[steps], eval_strategy="steps", eval_steps=2, **SAVING)
    loop = trainer.evaluation_loop

    def evaluation_loop(*args, **kwargs):
        seen[trainer.state.global_step] = weights_of(trainer.model)
        return loop(*args, **kwargs)

    trainer.evaluation_loop = evaluation_loop
    trainer.train()
    for step in (2, 4, 6):
        is_near(seen[step], by_hand(steps.weights[:step]))
        saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        latest = load_file(tmp_path / f"checkpoint-{step}" / LATEST_NAME)
        assert all(torch.equal(saved[name], value) for name, value in seen[step].items() if name in saved)
        assert all(torch.equal(latest[name], value) for name, value in steps.weights[step - 1].items())
    is_near(weights_of(trainer.model), by_hand(steps.weights))
    trainer.evaluate()  # after the training the model is what it is
    is_near(seen[6], weights_of(trainer.model))


def test_training_itself_is_unchanged(tmp_path):
    """The average is beside the training: losses are those without, and the model is another."""
    plain, averaged = (
        make_trainer(tmp_path / str(on), average_weights=on, eval_strategy="steps", eval_steps=2)
        for on in (False, True)
    )
    plain.train(), averaged.train()
    assert losses(averaged) == losses(plain)
    assert not torch.equal(averaged.model.lm_head.weight, plain.model.lm_head.weight)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_training_equals_one_without_interruption(tmp_path, adapter):
    def make(folder):
        trainer = make_trainer(folder, **SAVING, eval_strategy="steps", eval_steps=2)
        if not adapter:
            return trainer
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_2_SEQ_LM")
        return type(trainer)(
            trainer.model, trainer.args, train_dataset=examples(), eval_dataset=examples(20, seed=1),
            processing_class=PROCESSOR, peft_config=lora,
        )  # fmt: skip

    torch.manual_seed(3)
    whole = make(tmp_path)
    whole.train()
    torch.manual_seed(3)
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    found, expected = weights_of(resumed.model), weights_of(whole.model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_best_checkpoint_is_not_replaced_by_the_last_average(tmp_path):
    best = {"metric_for_best_model": "loss", "load_best_model_at_end": True, "greater_is_better": True}
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, **best, **SAVING)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")  # where the loss was highest
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in weights_of(trainer.model).items() if name in saved)


def test_going_on_from_a_checkpoint_without_an_average(tmp_path):
    """Its average begins with the steps that follow."""
    make_trainer(tmp_path, **{**SAVING, "average_weights": False}, max_steps=4).train()
    steps = Steps()
    trainer = make_trainer(tmp_path, callbacks=[steps], **SAVING)
    trainer.train(resume_from_checkpoint=True)
    is_near(weights_of(trainer.model), by_hand(steps.weights))


def test_the_next_training_begins_anew(tmp_path):
    """Also after one that failed."""

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("no disk")

    trainer = make_trainer(tmp_path, average_weights=True)
    trainer.add_callback(failing := Fails())
    with pytest.raises(RuntimeError, match="no disk"):
        trainer.train()
    trainer.remove_callback(failing)
    trainer.add_callback(steps := Steps())
    trainer.train()
    is_near(weights_of(trainer.model), by_hand(steps.weights))


def test_a_training_that_failed_leaves_one_model(tmp_path):
    """What is evaluated afterwards is what would be saved."""
    trainer = make_trainer(tmp_path, average_weights=True)
    step, calls = trainer.training_step, []

    def training_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no memory")
        return step(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.train()
    seen, loop = [], trainer.evaluation_loop

    def evaluation_loop(*args, **kwargs):
        seen.append(weights_of(trainer.model))
        return loop(*args, **kwargs)

    trainer.evaluation_loop, before = evaluation_loop, weights_of(trainer.model)
    trainer.evaluate()
    assert all(torch.equal(seen[0][name], value) for name, value in before.items())


def test_callbacks_at_the_end_see_the_average(tmp_path):
    class Last(Steps):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            self.last = weights_of(model)

    steps = Last()
    make_trainer(tmp_path, callbacks=[steps], average_weights=True).train()
    is_near(steps.last, by_hand(steps.weights))


def test_a_second_try_with_smaller_batches_goes_on_from_the_checkpoint(tmp_path):
    """accelerate calls the loop again on a model that the first try has changed."""
    make_trainer(tmp_path, **SAVING, max_steps=4).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    trainer = make_trainer(tmp_path, **SAVING, auto_find_batch_size=True)
    trainer._load_from_checkpoint(checkpoint)
    trainer.create_optimizer_and_scheduler(6)
    saved, latest = (load_file(tmp_path / "checkpoint-4" / name) for name in ("model.safetensors", LATEST_NAME))
    for _ in range(2):
        trainer._load_optimizer_and_scheduler(checkpoint)
        assert all(torch.equal(weights_of(trainer.model)[name], value) for name, value in latest.items())
        with trainer._averaged():
            averaged = weights_of(trainer.model)
        assert all(torch.equal(averaged[name], value) for name, value in saved.items() if name in averaged)


def test_without_the_option_the_latest_weights_train_on(tmp_path):
    """A checkpoint's own weights are the average, and its optimizer is that of the latest ones."""
    off = {**SAVING, "average_weights": False, "lr_scheduler_type": "constant"}
    whole = make_trainer(tmp_path, **off)
    whole.train()
    make_trainer(tmp_path / "averaged", **{**off, "average_weights": True}, max_steps=4).train()
    resumed = make_trainer(tmp_path / "averaged", **off)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    found = weights_of(resumed.model)
    assert all(torch.equal(found[name], value) for name, value in weights_of(whole.model).items())


def test_the_option_may_be_set_later(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[steps := Steps()])
    trainer.args.average_weights = True
    trainer.train()
    is_near(weights_of(trainer.model), by_hand(steps.weights))


def test_narrow_weights_keep_their_average_in_checkpoints(tmp_path):
    model = nn.Linear(3, 2).to(torch.bfloat16)
    average = WeightAverage(model)
    for _ in range(3):
        nn.init.normal_(model.weight)
        average.update()
    with average.swapped():
        average.save(tmp_path)
    loaded = WeightAverage.load(again := nn.Linear(3, 2).to(torch.bfloat16), tmp_path)
    assert all(torch.equal(loaded._average[name], value) for name, value in average._average.items())
    assert torch.equal(again.weight, model.weight)


def test_weights_of_another_model_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="holds weights of another model: resume from a checkpoint of this training"):
        WeightAverage.load(other, newest_checkpoint(tmp_path))


def test_sequence_models_have_it_too(tmp_path):
    steps = Steps()
    args = sequential.arguments(
        tmp_path, average_weights=True, num_train_epochs=3, eval_strategy="no", save_strategy="no"
    )
    trainer = sequential.SequentialTrainer(sequential.make(), args, [np.arange(30)] * 4, callbacks=[steps])
    trainer.train()
    is_near(weights_of(trainer.model), by_hand(steps.weights))


def test_it_is_off_by_default(tmp_path):
    assert not OneRecTrainingArguments(str(tmp_path)).average_weights
