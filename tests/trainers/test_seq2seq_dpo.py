"""Seq2SeqDPOTrainer on T5, Bart and OneRec: scores and losses by hand, and that training does what TRL's options say."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from onerec_hf.trainers import Seq2SeqDPOTrainer
from tests.conftest import make_model
from tests.ranks import torchrun
from tests.rounding import BACKWARD, assert_close, close
from tests.trainers.preference_runs import (
    ALL_LOSSES,
    CATALOGUE,
    MAKERS,
    PROCESSOR,
    TOKENIZER,
    arguments,
    assert_same,
    by_hand,
    losses,
    make_bart,
    make_t5,
    make_trainer,
    pairs_for,
    state_of,
    text_pairs,
)


@pytest.mark.parametrize("kind", MAKERS)
def test_scores_equal_rows_by_themselves(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind)
    other = MAKERS[kind]()
    rows = list(pairs_for(kind))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    for which, got in (("chosen", chosen), ("rejected", rejected)):
        wanted = [by_hand(other, kind, row, which)[0] for row in rows]
        assert got.tolist() == close(wanted)
    assert chosen.std() > 0.1


def test_scores_of_an_encoder_that_pools_items(tmp_path):
    model = make_model(CATALOGUE, encoder_pools_items=True)
    trainer = make_trainer(tmp_path, "onerec", model=model)
    rows = list(pairs_for("onerec"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    chosen, _ = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    other = make_model(CATALOGUE, encoder_pools_items=True)
    assert chosen.tolist() == close([by_hand(other, "onerec", row, "chosen")[0] for row in rows])
    before = state_of(model)
    trainer.train()
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


@pytest.mark.parametrize("kind", MAKERS)
def test_sigmoid_and_ipo_equal_hand_values(tmp_path, kind):
    policy, reference = MAKERS[kind](), MAKERS[kind]()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    wanted = {"sigmoid": [], "ipo": []}
    for row in pairs_for(kind):
        (win, win_length), (lose, lose_length) = (
            by_hand(policy, kind, row, "chosen"),
            by_hand(policy, kind, row, "rejected"),
        )
        d_w, d_l = (
            win - by_hand(reference, kind, row, "chosen")[0],
            lose - by_hand(reference, kind, row, "rejected")[0],
        )
        wanted["sigmoid"].append(math.log1p(math.exp(-0.3 * (d_w - d_l))))
        wanted["ipo"].append((d_w / win_length - d_l / lose_length - 1 / 0.6) ** 2)
    for loss_type, values in wanted.items():
        trainer = make_trainer(
            tmp_path, kind, copy.deepcopy(policy), ref_model=MAKERS[kind](), loss_type=loss_type, beta=0.3
        )
        got = trainer.evaluate(pairs_for(kind))["eval_loss"]
        assert got == close(sum(values) / len(values))


@pytest.mark.parametrize("kind", MAKERS)
def test_training_moves_the_policy_and_nothing_else(tmp_path, kind):
    trainer = make_trainer(tmp_path, kind, max_steps=30, learning_rate=3e-3)
    before, reference = state_of(trainer.model), state_of(trainer.ref_model)
    trainer.train()
    moved = [name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])]
    assert all("layer_norm" in name or "k_proj.bias" in name or "embed_positions" in name for name in moved), moved
    assert_same(state_of(trainer.ref_model), reference)
    assert losses(trainer)[0] == close(math.log(2))  # policy == reference: dropout is off
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0]
    source = trainer.data_collator([trainer.train_dataset[0]])
    generated = trainer.model.generate(
        input_ids=source["encoder_input_ids"], attention_mask=source["encoder_attention_mask"], max_new_tokens=4
    )
    assert generated.shape[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_every_loss_type_runs(tmp_path, kind):
    for loss_type in [*ALL_LOSSES, "cdpo", "cpo", "simpo", "s_dpo"]:
        smoothing = {"label_smoothing": 0.1} if loss_type in ("exo_pair", "robust", "cdpo") else {}
        trainer = make_trainer(tmp_path, kind, loss_type=loss_type, max_steps=1, **smoothing)
        before = state_of(trainer.model)
        trainer.train()
        assert math.isfinite(losses(trainer)[0]), loss_type
        assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        assert math.isfinite(trainer.evaluate(pairs_for(kind, 3))["eval_loss"])


def test_dropout_is_off_wherever_it_stands(tmp_path):
    for kind in ("t5", "bart"):
        kept = make_trainer(tmp_path, kind, disable_dropout=False)
        batch = kept.data_collator([kept.train_dataset[i] for i in range(4)])
        off = make_trainer(tmp_path, kind)
        with torch.no_grad():
            wanted = off.compute_loss(off.model.eval(), batch)
            assert off.compute_loss(off.model.train(), batch) == wanted
            assert kept.compute_loss(kept.model.train(), batch) != wanted


def test_item_vectors_are_not_hidden_without_dropout(tmp_path):
    head = {"num_items": len(CATALOGUE), "dropout": 0.5}
    trainer = make_trainer(tmp_path, "onerec", model=make_model(CATALOGUE, item_head=head))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        wanted = trainer.compute_loss(trainer.model.eval(), batch)
        assert trainer.compute_loss(trainer.model.train(), batch) == wanted


@pytest.mark.parametrize(
    "settings",
    [{"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}, {"activation_checkpointing": True}],
)
@pytest.mark.parametrize("kind", MAKERS)
def test_accumulation_and_checkpointing_keep_the_trajectory(tmp_path, kind, settings):
    common = {"per_device_train_batch_size": 8, "optim": "sgd"}
    whole, parts = make_trainer(tmp_path, kind, **common), make_trainer(tmp_path, kind, **{**common, **settings})
    whole.train(), parts.train()
    assert losses(parts) == close(losses(whole), terms=3 * BACKWARD)
    assert_close(state_of(parts.model), state_of(whole.model), terms=3 * BACKWARD)


@pytest.mark.parametrize(
    "settings", [{}, {"precompute_ref_log_probs": True}, {"sync_ref_model": True, "ref_model_sync_steps": 2}]
)
def test_resume_equals_no_interruption(tmp_path, settings):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, **settings}
    whole = make_trainer(tmp_path / "a", **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "b", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert_same(state_of(resumed.model), state_of(whole.model))


@pytest.mark.parametrize("kind", MAKERS)
def test_precomputed_reference_is_the_reference(tmp_path, kind):
    live, stored = make_trainer(tmp_path, kind), make_trainer(tmp_path, kind, precompute_ref_log_probs=True)
    assert stored.ref_model is None
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(stored.train_dataset.column_names)
    live.train(), stored.train()
    assert losses(stored) == close(losses(live))
    assert stored.evaluate()["eval_loss"] == close(live.evaluate()["eval_loss"])
    again = make_trainer(tmp_path, kind, train_dataset=stored.train_dataset, precompute_ref_log_probs=True)
    assert again.train_dataset["ref_chosen_logps"][:] == stored.train_dataset["ref_chosen_logps"][:]


def test_tr_dpo_mixes_the_reference(tmp_path):
    trainer = make_trainer(tmp_path, sync_ref_model=True, ref_model_sync_steps=3, ref_model_mixup_alpha=0.25)
    before = state_of(trainer.ref_model)
    trainer.train()
    for name, parameter in trainer.ref_model.named_parameters():
        mixed = 0.75 * before[name] + 0.25 * trainer.model.state_dict()[name]
        assert_close(parameter, mixed, terms=3)


LORA = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"], "onerec": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("kind", MAKERS)
def test_lora_reference_is_the_model_without_adapter(tmp_path, kind, task_type):
    base = state_of(MAKERS[kind]())
    trainer = make_trainer(
        tmp_path,
        kind,
        peft_config=LoraConfig(r=4, target_modules=LORA[kind], task_type=task_type),
        activation_checkpointing=True,
        max_steps=5,
    )
    assert trainer.ref_model is None
    trainer.train()
    assert losses(trainer)[0] == close(math.log(2))
    assert losses(trainer)[-1] != losses(trainer)[0]
    after = {
        name.replace(".base_layer", ""): value for name, value in trainer.model.get_base_model().state_dict().items()
    }
    assert_same({name: after[name] for name in base}, base)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    got = trainer.compute_ref_log_probs(trainer.model, batch)[0].tolist()
    assert got == close([by_hand(MAKERS[kind](), kind, row, "chosen")[0] for row in pairs_for(kind)])


def test_a_trained_adapter_is_its_own_reference(tmp_path):
    model = get_peft_model(make_bart(), LoraConfig(r=4, target_modules=LORA["bart"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    wanted = [by_hand(model, "bart", row, "chosen")[0] for row in text_pairs()]
    trainer = make_trainer(tmp_path, "bart", model)
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    assert trainer.compute_ref_log_probs(trainer.model, batch)[0].tolist() == close(wanted)


def test_router_balance_stays_and_no_auxiliary_loss_creeps_in(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(CATALOGUE), max_steps=5)
    bias = {name: value.clone() for name, value in trainer.model.named_buffers() if "e_score" in name}
    trainer.train()
    assert bias
    assert_same({name: value for name, value in trainer.model.named_buffers() if "e_score" in name}, bias)
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)
    asked = make_trainer(tmp_path, router_aux_loss_coef=0.1, max_steps=1)
    asked.train()
    assert asked.state.log_history[0]["aux_loss"] > 1
    assert losses(asked)[0] == close(math.log(2) + 0.1 * asked.state.log_history[0]["aux_loss"])


@pytest.mark.parametrize("kind", MAKERS)
def test_bf16_and_compute_metrics(tmp_path, kind):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"rows": len(prediction.label_ids)}

    trainer = Seq2SeqDPOTrainer(
        MAKERS[kind](),
        args=arguments(tmp_path, bf16=True),
        train_dataset=pairs_for(kind),
        eval_dataset=pairs_for(kind, 4),
        processing_class=PROCESSOR if kind == "onerec" else TOKENIZER,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=2e-2)
    assert trainer.evaluate()["eval_rows"] == 8
    logits = seen[0][0][0] if isinstance(seen[0][0], tuple) else seen[0][0]
    assert logits.shape[:2] == seen[0][1].shape


def test_two_trainers_of_one_model(tmp_path):
    """The second one's reference is a copy of the trained model, not of the first trainer's forward."""
    model = make_t5()
    make_trainer(tmp_path, "t5", model).train()
    second = make_trainer(tmp_path, "t5", model)
    wanted = [by_hand(copy.deepcopy(model), "t5", row, "chosen")[0] for row in text_pairs()]
    second.train()
    batch = second.data_collator([second.train_dataset[i] for i in range(8)])
    assert second.compute_ref_log_probs(second.ref_model, batch)[0].tolist() == close(wanted)


RANKS = """
import json
import sys
from safetensors.torch import save_file
from onerec_hf.workflows.distributed import leave
from tests.trainers.preference_runs import make_trainer

folder, kind, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
trainer = make_trainer(folder, kind, per_device_train_batch_size=2, optim="sgd", **settings)
trainer.train()
trainer.evaluate()
if "save_steps" in settings:  # once more, from the checkpoint
    trainer = make_trainer(folder, kind, per_device_train_batch_size=2, optim="sgd", **settings)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{settings['save_steps']}")
if trainer.is_world_process_zero():
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    save_file({name: value.clone() for name, value in state.items()}, f"{folder}/weights.safetensors")
del trainer
leave()
"""
PRECOMPUTED = {"precompute_ref_log_probs": True}
SYNCHRONIZED = {"sync_ref_model": True, "ref_model_sync_steps": 1}
RESUMED = {"save_strategy": "steps", "save_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("onerec", PRECOMPUTED),
        ("onerec", SYNCHRONIZED | RESUMED),
        ("t5", PRECOMPUTED | {"activation_checkpointing": True}),
        ("bart", {}),
    ],
    ids=["onerec precomputed", "onerec resumed", "t5 precomputed", "bart"],
)
def test_two_ranks_take_the_steps_of_one(tmp_path, kind, settings):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(script, tmp_path, kind, json.dumps(settings))
    assert done.returncode == 0, done.stderr[-3000:]
    alone = make_trainer(tmp_path / "alone", kind, per_device_train_batch_size=4, optim="sgd", **settings)
    alone.train()
    assert_close(load_file(tmp_path / "weights.safetensors"), state_of(alone.model), terms=3 * BACKWARD)
