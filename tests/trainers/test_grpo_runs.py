"""Policy optimisation of OneRec-V2 models, and how a run is cut: accumulated batches, several steps per rollout, bfloat16."""

import math

import pytest
import torch

from onerec_hf.trainers.faults import batch_examples
from onerec_hf.trainers.rollouts import roll_out
from tests.rounding import BACKWARD, assert_close, close, distance
from tests.trainers.grpo import (
    PROCESSOR,
    by_hand,
    examples,
    make_lazy,
    make_trainer,
    rollouts_of,
    weights_of,
)

CODES = [1, 2, 3, 5, 6, 7]  # of two items; BOS is given


# -- OneRec-V2 -------------------------------------------------------------------------------------------------------------------------
def make_clear():
    """A lazy decoder whose choices are clear."""
    return make_lazy(initializer_range=0.3).eval()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_of_a_lazy_decoder_are_those_that_sessions_were_drawn_with(tmp_path, temperature):
    trainer = make_trainer(tmp_path, model=make_clear(), temperature=temperature, num_iterations=2)
    batch, rows = rollouts_of(trainer), examples(2)
    drawn = trainer.model.recommend(
        **PROCESSOR(rows["history"][:]),
        num_beams=8,
        num_return_sequences=8,
        exclude=rows["history"][:],
        do_sample=True,
        temperature=temperature,
        generator=[trainer._random(group, history, "train") for group, history in enumerate(rows["history"])],
        return_dict_in_generate=True,
    )
    assert torch.equal(batch["completion_ids"].flatten(0, 1), drawn.sequences)
    old = batch["old_per_token_logps"]
    assert_close(old.flatten(0, 1).sum(1), drawn.sampling_scores)
    for group, row in enumerate(rows):
        for slot, session in enumerate(PROCESSOR.batch_decode(batch["completion_ids"][group])):
            assert_close(old[group, slot, CODES], by_hand(make_clear(), row["history"], session, temperature).detach())


def test_a_lazy_decoder_draws_freely_from_the_codes_of_a_level(tmp_path):
    model, history = make_clear(), ["m1", "m2"]
    generators = [torch.Generator().manual_seed(0)]
    tokens = roll_out(model, PROCESSOR, [history], 4000, generators, "sample", session_length=1, constrained=False)
    codes = tokens[:, 1:] - torch.tensor(model.config.level_offsets)
    assert int(codes.min()) >= 0
    assert int(codes.max()) <= 3
    first, counts = codes[:, 0].unique(return_counts=True)
    common = first[counts.argmax()]
    following = codes[codes[:, 0] == common, 1]
    decoder = torch.tensor([[1, int(common) + model.config.level_offsets[0]]])
    with torch.no_grad():
        logits = model(**PROCESSOR([history]), decoder_input_ids=decoder).logits[0, -1]
    wanted = logits[model.config.level_offsets[1] :][:4].softmax(-1)
    got = torch.bincount(following, minlength=4) / len(following)
    assert bool(((got - wanted).abs() <= 5 * (wanted * (1 - wanted) / len(following)).sqrt() + 1e-6).all())
    free = {"constrained": False, "rollouts": "sample", "rollout_length": 1, "num_iterations": 2}
    batch = rollouts_of(make_trainer(tmp_path, model=make_clear(), **free))
    legal = 0
    for group, row in enumerate(examples(2)):
        for slot, session in enumerate(PROCESSOR.batch_decode(batch["completion_ids"][group])):
            if session != [None]:
                old = batch["old_per_token_logps"][group, slot, [1, 2, 3]]
                assert_close(old, by_hand(make_clear(), row["history"], session, constrained=False).detach())
                legal += 1
    assert legal


def test_a_step_of_a_lazy_decoder_lowers_the_loss_of_its_rollouts(tmp_path):
    settings = {"num_iterations": 2, "max_steps": 2, "ntp_weight": 0.0, "optim": "sgd", "learning_rate": 0.05}
    trainer = make_trainer(tmp_path, model=make_clear(), lr_scheduler_type="constant", **settings)
    trainer.train()
    first, second = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert second < first - 1e-3


def test_resume_of_a_lazy_decoder_equals_no_interruption(tmp_path):
    settings = {"max_steps": 3, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path / "whole", model=make_clear(), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", model=make_clear(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))  # in the middle of a rollout
    assert distance(weights_of(make_clear()), weights_of(whole.model)) > 1e-3
    for name, value in weights_of(whole.model).items():
        assert torch.equal(weights_of(resumed.model)[name], value), name


# -- how a run is cut ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="ecpo"),
        pytest.param(
            {"loss_type": "gbpo", "importance_sampling_level": "sequence", "beta": 0.1},
            id="gbpo",
            marks=pytest.mark.slow,
        ),
        pytest.param({"loss_type": "dapo"}, id="dapo", marks=pytest.mark.slow),
    ],
)
def test_accumulated_batches_step_as_one_large_batch(tmp_path, settings):
    cuts = [
        {"per_device_train_batch_size": 16, "ntp_batch_size": 4},
        {"per_device_train_batch_size": 8, "ntp_batch_size": 2, "gradient_accumulation_steps": 2},
        # Groups of 16 that two batches share.
        {"per_device_train_batch_size": 4, "ntp_batch_size": 1, "gradient_accumulation_steps": 4},
    ]
    found = []
    for cut in cuts:
        trainer = make_trainer(tmp_path, max_steps=2, optim="sgd", learning_rate=0.05, **settings, **cut)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append((weights_of(trainer.model), [entry[name] for entry in logged for name in ("loss", "loss/ntp")]))
    start = make_trainer(tmp_path).model
    assert len(found[0][1]) == 4
    for weights, logged in found[1:]:
        assert_close(weights, found[0][0], 2 * BACKWARD)  # of two rollouts
        assert logged == close(found[0][1], 2 * BACKWARD)
    assert distance(weights_of(start), found[0][0]) > 1e-2


def test_steps_of_one_rollout_share_its_sessions_and_their_first_probabilities(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=3, max_steps=3, learning_rate=1e-2, ntp_weight=0.0)
    seen, compute = [], trainer._compute_loss

    def spy(model, inputs):
        seen.append({name: value.clone() for name, value in inputs.items()})
        loss = compute(model, inputs)
        seen[-1]["now"] = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            *(
                torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], -1).flatten(0, 1)
                for name in ("ids", "mask")
            ),
            inputs["completion_ids"].shape[-1],
        )[0].detach()
        return loss

    trainer._compute_loss = spy
    trainer.train()
    assert len(seen) == 3
    first = make_trainer(tmp_path).model
    for old, row in zip(seen[0]["old_per_token_logps"].flatten(0, 1), batch_examples(seen[0], PROCESSOR), strict=True):
        assert_close(old[CODES], by_hand(first, row["history"], row["session"]).detach())
    order = [each["completion_ids"].flatten(1).tolist() for each in seen]
    for later in (1, 2):
        for mine, sessions in enumerate(order[later]):
            theirs = order[0].index(sessions)
            for name in ("old_per_token_logps", "advantages"):
                assert torch.equal(seen[later][name][mine], seen[0][name][theirs])
    moved = [(each["now"] - each["old_per_token_logps"].flatten(0, 1)).abs().max().item() for each in seen]
    assert moved[0] == pytest.approx(0, abs=1e-5)
    assert min(moved[1:]) > 1e-3


def test_bfloat16_trains_on_a_cpu(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, num_iterations=2, max_steps=4)
    before = weights_of(trainer.model)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(math.isfinite(entry[name]) for entry in logged for name in ("loss", "loss/ntp", "grad_norm"))
    after = weights_of(trainer.model)
    assert all(value.dtype == torch.float32 for value in after.values() if value.is_floating_point())
    assert distance(before, after) > 1e-3
