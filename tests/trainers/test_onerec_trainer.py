"""OneRecTrainer: it learns, accumulates, resumes, balances, stops and judges as it says."""

import copy
import signal

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoProcessor, Trainer, TrainerCallback

from onerec_hf import OneRecProcessor
from onerec_hf.data.collators import OneRecDataCollator
from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments, RouterBalanceCallback
from tests.conftest import make_catalogue, make_model
from tests.rounding import distance

CATALOGUE = make_catalogue(30, (4, 4, 4))
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=5)


def examples(count=64, seed=0):
    """Item i is followed by i+1, i+2: something to learn. Sessions of unequal length."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, 20, count)
    lengths = rng.integers(1, 6, count)
    return Dataset.from_dict(
        {
            "user_id": list(range(count)),
            "history": [[f"m{(s + j) % 30}" for j in range(n)] for s, n in zip(starts, lengths, strict=True)],
            "session": [
                [f"m{(s + n + j) % 30}" for j in range(1 + s % 2)] for s, n in zip(starts, lengths, strict=True)
            ],
        }
    )


def arguments(folder, **settings):
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_num_beams": 10,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return OneRecTrainingArguments(str(folder), **{**defaults, **settings})


def make_trainer(folder, model=None, callbacks=None, **settings):
    model = make_model(CATALOGUE, initializer_range=0.05) if model is None else model
    return OneRecTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=examples(),
        eval_dataset=examples(20, seed=1),
        processing_class=PROCESSOR,
        callbacks=callbacks,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_it_learns_the_next_item(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=150, learning_rate=3e-3)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    untrained = trainer.evaluate(examples())
    trainer.train()
    trained = trainer.evaluate(examples())
    assert [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])] == []
    assert trained["eval_loss"] < 0.5 * untrained["eval_loss"]
    assert trained["eval_recall@5"] > 0.7 > 0.5 > untrained["eval_recall@5"]
    assert trained["eval_invalid_id_rate"] == 0


def test_histories_of_like_length_share_a_batch(tmp_path):
    padding = {}
    for strategy in ("random", "group_by_length"):
        loader = make_trainer(tmp_path, train_sampling_strategy=strategy).get_train_dataloader()
        masks = [batch["attention_mask"] for batch in loader]
        assert sum(len(mask) for mask in masks) == 64
        padding[strategy] = sum(int((1 - mask).sum()) for mask in masks)
    assert padding["group_by_length"] < 0.6 * padding["random"]
    grouped = make_trainer(tmp_path, train_sampling_strategy="group_by_length").evaluate()
    assert grouped["eval_recall@5"] == make_trainer(tmp_path).evaluate()["eval_recall@5"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_checkpointing_keep_the_trajectory(tmp_path, checkpointing):
    """Batches of 8 = 4 x 2: token counts differ between micro-batches, num_items_in_batch makes them equal."""
    whole = make_trainer(tmp_path)
    parts = make_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        activation_checkpointing=checkpointing,
    )
    whole.train(), parts.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=2e-4)
    start = make_model(CATALOGUE, initializer_range=0.05).state_dict()
    assert distance(parts.model.state_dict(), whole.model.state_dict()) < 1e-2 * distance(
        start, whole.model.state_dict()
    )


def test_label_smoothing_is_of_the_whole_loss(tmp_path):
    """Trainer's own smoother would see the code tokens alone: item vectors would learn from what the encoder reads only."""
    model = make_model(CATALOGUE, item_head={"num_items": 30})
    trainer = make_trainer(tmp_path, model, label_smoothing_factor=0.1, max_steps=1, per_device_train_batch_size=64)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        wanted, plain = (float(model(**batch, smoothing=value).loss) for value in (0.1, 0.0))
    before = model.model.encoder.item_head.vectors.weight.detach().clone()
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(plain, rel=1e-3)
    after = model.model.encoder.item_head.vectors.weight
    assert (after != before)[1:].any(-1).all()  # the item loss names each of them


def test_session_weights_weigh_the_loss_of_training_alone(tmp_path):
    model = make_model(CATALOGUE)
    sizes = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 64}
    trainer = make_trainer(tmp_path, model, session_loss_weights=[3, 1], max_steps=1, **sizes)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        weighted, plain = (float(model(**batch, session_weights=value).loss) for value in ([3, 1], None))
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(plain, rel=1e-4)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(weighted, rel=1e-4)
    assert weighted != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("weights", [[], [2, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]], ids=str)
def test_session_weights_that_cannot_weigh_are_refused(weights):
    with pytest.raises(ValueError, match="must be a number for each item of a session"):
        OneRecTrainingArguments("out", session_loss_weights=weights, report_to="none")


def test_resume_equals_no_interruption(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    dropout = {"initializer_range": 0.05, "dropout_rate": 0.1}
    whole = make_trainer(tmp_path / "a", make_model(CATALOGUE, **dropout), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "b", make_model(CATALOGUE, seed=9, **dropout), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]
    for first, second in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(first, second)


def test_checkpoints_are_whole_artefacts(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    model, processor = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor([["m1", "m2"]])
    assert processor.max_history == 5
    assert torch.equal(model.recommend(**inputs), trainer.model.eval().recommend(**inputs))


def test_router_balance_is_counted_over_accumulation_and_logged(tmp_path):
    seen = []

    class Spy(RouterBalanceCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(self._tokens.clone())
            super().on_pre_optimizer_step(args, state, control, **kwargs)

    model = make_model(CATALOGUE)
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = make_trainer(tmp_path, model, router_bias_update_rate=0.01, **steps)
    trainer.add_callback(Spy)
    trainer.train()
    batches = list(trainer.get_train_dataloader())
    assert len(seen) == 2
    for counts in seen:
        assert counts.shape == (2, 4)
        assert counts[0].sum() == counts[1].sum()  # every layer routes every token
    # Two callbacks move the same bias: each step by 0 or +-0.02 per expert.
    bias = model.model.decoder.layers[0].mlp.gate.e_score_correction_bias
    assert bias.any()
    assert len(batches) == 32
    logged = [entry["router/max_violation"] for entry in trainer.state.log_history if "router/max_violation" in entry]
    assert len(logged) == 2
    assert all(value >= 0 for value in logged)


def test_loss_free_balancing_evens_out_a_lopsided_router(tmp_path):
    def violations(rate):
        model = make_model(CATALOGUE, initializer_range=0.05)
        for layer in model.model.decoder.layers:  # two experts that everything prefers
            layer.mlp.gate.weight.data[:2] *= 20
        trainer = make_trainer(
            tmp_path,
            model,
            max_steps=60,
            learning_rate=1e-4,
            per_device_train_batch_size=32,
            router_bias_update_rate=rate,
        )
        trainer.train()
        return [e["router/max_violation"] for e in trainer.state.log_history if "router/max_violation" in e]

    free, balanced = violations(0.0), violations(0.005)
    assert free[0] == balanced[0]
    assert np.mean(balanced[-10:]) < 0.8 * np.mean(free[-10:])


def test_balancing_works_in_a_plain_trainer(tmp_path):
    model = make_model(CATALOGUE)
    trainer = Trainer(
        model,
        arguments(tmp_path, predict_with_generate=False, remove_unused_columns=False),
        train_dataset=examples(),
        data_collator=OneRecDataCollator(PROCESSOR),
        callbacks=[RouterBalanceCallback()],
    )
    trainer.train()
    assert model.model.decoder.layers[0].mlp.gate.e_score_correction_bias.any()


def test_a_dense_decoder_trains_too(tmp_path):
    trainer = make_trainer(tmp_path, make_model(CATALOGUE, num_experts=1), max_steps=2)
    trainer.train()
    assert not any("router/max_violation" in entry for entry in trainer.state.log_history)


def test_evaluation_equals_ranking_one_user_at_a_time(tmp_path):
    trainer = make_trainer(tmp_path, eval_top_k=[1, 5], eval_num_beams=30)
    dataset = examples(20, seed=1).map(lambda row: {"session": row["session"][:1]})
    metrics = trainer.evaluate(dataset)
    hits = []
    for row in dataset:
        sequences = trainer.model.recommend(
            **PROCESSOR([row["history"]]),
            session_length=1,
            num_beams=30,
            num_return_sequences=5,
            exclude=[row["history"]],
        )
        hits.append([session == row["session"] for session in PROCESSOR.batch_decode(sequences)])
    assert metrics["eval_recall@1"] == pytest.approx(np.mean([row[0] for row in hits]))
    assert metrics["eval_recall@5"] == pytest.approx(np.mean([any(row) for row in hits]))


def test_whole_history_is_left_out_not_only_what_the_encoder_reads():
    collator = OneRecDataCollator(PROCESSOR, with_seen=True)
    batch = collator([{"history": [f"m{i}" for i in range(9)], "session": ["m20"]}])
    assert batch["input_ids"].shape == (1, 5 * 4)
    assert batch["exclude"].tolist() == [list(range(9))]


class PressCtrlC(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    trainer = make_trainer(tmp_path / "a", callbacks=[PressCtrlC()])
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped at step 3; resume it with resume_from_checkpoint=.*checkpoint-3"
    ):
        trainer.train()
    assert signal.getsignal(signal.SIGINT) is before
    whole, resumed = make_trainer(tmp_path / "b"), make_trainer(tmp_path / "c")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]


def test_starts_from_a_path(tmp_path):
    model = make_model(CATALOGUE)
    model.save_pretrained(tmp_path / "model")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "model"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.model.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="needs processing_class"):
        OneRecTrainer(make_model(CATALOGUE), arguments(tmp_path))
    other = OneRecProcessor.from_catalogue(make_catalogue(30, (4, 4, 4), seed=7))
    with pytest.raises(ValueError, match="was trained with the catalogue"):
        OneRecTrainer(make_model(CATALOGUE), arguments(tmp_path), processing_class=other)
    with pytest.raises(ValueError, match="eval_num_beams=3 cannot rank the top 10"):
        arguments(tmp_path, eval_num_beams=3)
    with pytest.raises(ValueError, match="eval_top_k"):
        arguments(tmp_path, eval_top_k=[0])
    assert copy.deepcopy(CATALOGUE) is CATALOGUE


def test_a_damaged_checkpoint_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=6).train()
    weights = tmp_path / "checkpoint-6" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"model\.safetensors|[Hh]eader|[Ii]ncomplete"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint-6")


def test_a_frozen_router_keeps_its_bias(tmp_path):
    """With LoRA on attention an adapter is all that is saved; what it was trained beside must not have moved."""
    from peft import LoraConfig, get_peft_model

    base = make_model(CATALOGUE, initializer_range=0.05)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], r=4))
    before = {name: value.clone() for name, value in base.state_dict().items() if "lora" not in name}
    trainer = make_trainer(tmp_path, model=model, router_bias_update_rate=0.05)
    trainer.train()
    after = base.state_dict()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
    assert any(bool(value.any()) for name, value in after.items() if "lora_B" in name)


def test_persistent_workers_evaluate_what_they_are_given(tmp_path):
    trainer = make_trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    few, many = examples(8, seed=2), examples(24, seed=3)
    counts = [len(trainer.predict(data).predictions) for data in (few, many)]
    again = [trainer.evaluate(data)["eval_loss"] for data in (few, many, few)]
    assert counts == [8, 24]
    assert again[0] == again[2] != again[1]
