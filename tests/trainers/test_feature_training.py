"""Trainers on examples with features: what they learn, packed as padded, evaluation, DPO pairs, and adapters."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from onerec_hf import OneRecProcessor
from onerec_hf.data.collators import OneRecDataCollator, PackedDataCollator, draw_sessions
from onerec_hf.data.packing import PackedDataset, example_sizes
from onerec_hf.trainers import (
    OneRecDPOConfig,
    OneRecDPOTrainer,
    OneRecTrainer,
    OneRecTrainingArguments,
    Seq2SeqDPOConfig,
    Seq2SeqDPOTrainer,
)
from tests.modeling.feature_models import CATALOGUE, PROCESSOR, SCHEMA, columns, make, random_examples
from tests.rounding import BACKWARD, assert_close, close

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


def windows(count=12, seed=0):
    rng = np.random.default_rng(seed)
    examples = columns(*random_examples(count, seed))
    return Dataset.from_list([{**each, "session": [f"m{rng.integers(40)}"]} for each in examples])


def prefixes(count=6):
    found = []
    for each in columns(*random_examples(count, seed=1)):
        lengths = sorted({1, len(each["history"])})
        found.append({**each, "sessions": [[f"m{length}"] for length in lengths], "history_lengths": lengths})
    return Dataset.from_list(found)


def train(folder, model, dataset, **settings):
    defaults = {"per_device_train_batch_size": 50, "max_steps": 1, "logging_steps": 1, "learning_rate": 1e-2}
    trainer = OneRecTrainer(
        model,
        OneRecTrainingArguments(str(folder), **{**defaults, **QUIET, "eval_num_beams": 10, **settings}),
        train_dataset=dataset,
        eval_dataset=windows(5, seed=9),
        processing_class=PROCESSOR,
    )
    trainer.train()
    return trainer


def test_sizes_count_the_place_of_the_user():
    dataset = windows()
    items, _, _ = example_sizes(dataset, 8, PROCESSOR.static_places)
    assert items.tolist() == [len(history) + 1 for history in dataset["history"]]
    packed = PackedDataset(dataset, 20, 8, static_places=1)
    collator = PackedDataCollator(PROCESSOR, False, packed.items, packed.slots, packed.session_items)
    batch = collator([packed[i] for i in range(len(packed))])  # everything fits
    assert batch["feature_ids"].shape == (len(packed), 20, SCHEMA.slots)
    used = (batch["segment_ids"][:, ::4] > 0).sum().item()
    assert used == items.sum() == round(packed.fill * 20 * len(packed))
    assert torch.equal(batch["feature_ids"].any(-1), batch["segment_ids"][:, ::4] > 0)


def test_packed_training_equals_padded_training(tmp_path):
    losses = [
        train(tmp_path, make(), windows(), packing=packing, packing_length=20, optim="sgd", max_grad_norm=0.0)
        for packing in (False, True)
    ]
    first, second = (trainer.model.state_dict() for trainer in losses)
    for name, value in first.items():
        assert_close(value, second[name], BACKWARD)
    table = first["model.encoder.features.table.weight"]
    assert not torch.equal(table, make().state_dict()["model.encoder.features.table.weight"])
    assert not table[0].any()


def test_prefixes_and_drawn_sessions_train(tmp_path):
    head = {"num_items": 40, "loss_weight": 1.0}
    model = make(encoder_is_causal=True, item_head=head)
    trainer = train(tmp_path, model, prefixes(), packing=True, packing_length=20, session_share=0.5, max_steps=2)
    assert np.isfinite(trainer.state.log_history[0]["loss"])
    batch = PackedDataCollator(PROCESSOR, True)([{"examples": list(prefixes())}])
    drawn = draw_sessions(batch, 0.5)
    assert torch.equal(drawn["feature_ids"], batch["feature_ids"])


def test_evaluation_ranks_with_features(tmp_path):
    trainer = train(tmp_path, make(), windows(), max_steps=1)
    dataset = windows(5, seed=9)
    batch = OneRecDataCollator(PROCESSOR, with_seen=True)(list(dataset))
    out = trainer.model.recommend(
        batch["input_ids"],
        batch["attention_mask"],
        feature_ids=batch["feature_ids"],
        session_length=1,
        num_beams=10,
        num_return_sequences=10,
        exclude=batch["exclude"],
    )
    ranked = PROCESSOR.item_indices(out).view(5, 10)
    targets = torch.from_numpy(CATALOGUE.indices([session[0] for session in dataset["session"]]))
    recall = (ranked == targets[:, None]).any(1).double().mean().item()
    assert trainer.evaluate()["eval_recall@10"] == pytest.approx(recall)


def test_the_table_learns_what_users_need():
    """Users of two cities choose different items, and nothing else tells them apart."""
    torch.manual_seed(0)
    schema_users = [{"city": ("Rome", "Paris")[i % 2]} for i in range(64)]
    examples = columns([["m1"]] * 64, schema_users)
    examples = [{**each, "session": [("m2", "m3")[i % 2]]} for i, each in enumerate(examples)]
    model = make(dropout_rate=0.0).train()
    batch = OneRecDataCollator(PROCESSOR)(examples)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    model.eval()
    inputs = PROCESSOR([["m1"], ["m1"], ["m1"]], users=[{"city": "Rome"}, {"city": "Paris"}, None])
    first = PROCESSOR.batch_decode(model.recommend(**inputs, session_length=1, num_beams=4))
    assert first[:2] == [["m2"], ["m3"]]


def test_a_trainer_refuses_a_processor_with_other_features(tmp_path):
    plain = OneRecProcessor.from_catalogue(CATALOGUE, 8)
    with pytest.raises(ValueError, match="different features"):
        OneRecTrainer(make(), OneRecTrainingArguments(str(tmp_path), **QUIET), windows(), processing_class=plain)


def pairs(count=8):
    rng = np.random.default_rng(5)
    examples = columns(*random_examples(count, seed=5))
    picked = [rng.choice(40, 2, replace=False) for _ in range(count)]
    return Dataset.from_list(
        [{**each, "chosen": [f"m{a}"], "rejected": [f"m{b}"]} for each, (a, b) in zip(examples, picked, strict=True)]
    )


def dpo(folder, model, dataset, **settings):
    args = Seq2SeqDPOConfig(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        **QUIET,
        **settings,
    )
    return Seq2SeqDPOTrainer(
        model, args=args, train_dataset=dataset, eval_dataset=dataset.select(range(3)), processing_class=PROCESSOR
    )


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo_reads_features(tmp_path, precompute):
    trainer = dpo(tmp_path, make(), pairs(), precompute_ref_log_probs=precompute)
    batch = trainer.data_collator(list(pairs()))
    with torch.no_grad():
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    model = make()
    for place, example in enumerate(pairs()):
        given = {name: [example[name]] for name in ("user_features", "history_features")}
        for side, found in (("chosen", chosen), ("rejected", rejected)):
            inputs = PROCESSOR([example["history"]], [example[side]], **given)
            with torch.no_grad():
                out = model(**inputs)
            codes = int((inputs["labels"] != -100).sum())
            assert found[place].item() == close(-out.loss.item() * codes)
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_onerec_dpo_draws_pairs_with_features(tmp_path):
    def likes(histories, sessions):
        return [sum(int(item[1:]) for item in session) for session in sessions]

    args = OneRecDPOConfig(
        str(tmp_path), per_device_train_batch_size=6, num_train_epochs=1, dpo_ratio=0.5, num_candidates=6, **QUIET
    )
    dataset = windows(12)
    trainer = OneRecDPOTrainer(make(), likes, args=args, train_dataset=dataset, processing_class=PROCESSOR)
    trainer.begin_iteration(0)
    assert len(trainer.pairs)
    for pair in trainer.pairs:
        example = dataset[pair["row"]]
        assert pair["history_features"] == example["history_features"]
        inputs = PROCESSOR(
            [example["history"]],
            user_features=[example["user_features"]],
            history_features=[example["history_features"]],
        )
        out = trainer.model.recommend(
            **inputs, num_beams=6, num_return_sequences=6, exclude=[example["history"]],
            session_length=args.candidate_length,
        )  # fmt: skip
        assert pair["chosen"] == max(PROCESSOR.batch_decode(out), key=lambda session: likes([[]], [session])[0])
    trainer.train()
    offline = OneRecDPOTrainer(
        make(),
        args=args,
        train_dataset=pairs(6).add_column("session", [["m1"]] * 6),
        processing_class=PROCESSOR,
    )
    offline.train()


def test_lora_adapts_a_model_with_features():
    model = make()
    inputs = PROCESSOR([["m1", "m2"]], [["m3"]], users=[{"age": 30}])
    wanted = model(**inputs).logits
    targets = ["q_proj", "v_proj", "user.0", "item.2", "features.table"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    assert_close(adapted(**inputs).logits, wanted)
    adapted(**inputs).loss.backward()
    grads = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert any("features.table.lora" in name for name in grads)
    sessions = adapted.recommend(**PROCESSOR([["m1"]], users=[{"age": 30}]), num_beams=4)
    assert PROCESSOR.batch_decode(sessions)[0]
