"""session_share: the decoder trains on a share of the sessions, the item head on all of them, and their balance stays."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from onerec_hf.data import PackedDataCollator
from onerec_hf.data.collators import draw_sessions
from tests.conftest import make_model
from tests.ranks import torchrun
from tests.rounding import BACKWARD, assert_close, close
from tests.trainers.test_packed_training import CATALOGUE, PREFIXES, PROCESSOR, WINDOWS, losses, make_trainer

LEVELS, WEIGHT = 3, 0.7
DECODER = ("decoder_input_ids", "decoder_attention_mask", "labels")


def model_with_head(**config):
    head = {"num_items": len(CATALOGUE), "loss_weight": WEIGHT}
    return make_model(CATALOGUE, encoder_is_causal=True, item_head=head, **config)


def packed_batch(rows=4):
    return PackedDataCollator(PROCESSOR, encoder_is_causal=True)([PREFIXES[i] for i in range(rows)])


def loss_by_hand(model, batches):
    """Mean cross-entropy of the drawn code tokens, and levels * cross-entropy of all first items by the code tokens of all sessions."""
    codes = items = code_tokens = all_code_tokens = 0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "segment_ids", "history_ranges", *DECODER[:2])}
        out = model(**inputs)
        codes += F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        code_tokens += (batch["labels"] != -100).sum()
        ends = batch["item_ranges"][..., 1] - 1
        states = out.encoder_last_hidden_state[torch.arange(len(ends))[:, None], ends].flatten(0, 1)
        head = model.model.encoder.item_head
        rows = head.rows(batch["item_targets"][:, :LEVELS])
        items += LEVELS * F.cross_entropy(
            (states @ head.vectors.weight[1:].T)[rows > 0], rows[rows > 0] - 1, reduction="sum"
        )
        all_code_tokens += (batch["item_targets"] != -100).sum()
    return codes / code_tokens + WEIGHT * items / all_code_tokens


def test_each_session_is_drawn_with_the_probability_of_the_share():
    batch, generator = packed_batch(), torch.Generator().manual_seed(0)
    pairs = list(zip(batch["history_ranges"].flatten(0, 1).tolist(), batch["labels"].tolist(), strict=True))
    drawn_slots = -(-batch["history_ranges"].shape[1] * 3 // 10)
    times, repeats = dict.fromkeys(range(len(pairs)), 0), 2000
    for _ in range(repeats):
        drawn = draw_sessions(batch, 0.3, generator)
        assert drawn["history_ranges"].shape == (4, drawn_slots, 2)
        assert drawn["item_targets"] is batch["labels"]
        assert drawn["input_ids"] is batch["input_ids"]
        rows = drawn["decoder_input_ids"].view(4, drawn_slots, -1)
        for row in range(4):
            for slot in range(drawn_slots):
                label = drawn["labels"][row * drawn_slots + slot].tolist()
                if label[0] == -100:
                    assert drawn["history_ranges"][row, slot].tolist() == [0, 1]
                    assert not drawn["decoder_attention_mask"][row * drawn_slots + slot].any()
                    assert not rows[row, slot].any()
                    continue
                first = row * batch["history_ranges"].shape[1]
                place = pairs.index((drawn["history_ranges"][row, slot].tolist(), label), first)
                times[place] += 1
                assert torch.equal(rows[row, slot], batch["decoder_input_ids"][place])
    filled = [place for place, (_, label) in enumerate(pairs) if label[0] != -100]
    assert all(times[place] == 0 for place in times if place not in filled)
    # 2000 draws: 5 standard deviations are 5 * sqrt(.3 * .7 / 2000) = .05
    assert all(abs(times[place] / repeats - 0.3) < 0.05 for place in filled)


def test_a_batch_always_has_a_session():
    batch = packed_batch(1)
    for seed in range(50):
        assert (draw_sessions(batch, 1e-6, torch.Generator().manual_seed(seed))["labels"] != -100).any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}],
    ids=["one batch", "accumulated"],
)
def test_the_loss_by_hand(tmp_path, monkeypatch, settings):
    batches = []
    monkeypatch.setattr(
        "onerec_hf.trainers.onerec_trainer.draw_sessions",
        lambda *args: batches.append(draw_sessions(*args)) or batches[-1],
    )
    trainer = make_trainer(tmp_path, PREFIXES, model_with_head(), packing=True, session_share=0.4, **settings)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert len(batches) == settings.get("gradient_accumulation_steps", 1)
    assert sum(int((b["labels"] != -100).sum()) for b in batches) < 0.6 * sum(
        int((b["item_targets"] != -100).sum()) for b in batches
    )
    model = model_with_head()
    model.load_state_dict(before)
    wanted = loss_by_hand(model, batches)
    assert losses(trainer)[0] == close(float(wanted.detach()), terms=BACKWARD)
    wanted.backward()
    with torch.no_grad():
        for value in model.parameters():
            value -= 1e-2 * value.grad
    trained = dict(trainer.model.named_parameters())
    assert_close(
        {name: value.detach() for name, value in model.named_parameters()},
        {n: v.detach() for n, v in trained.items()},
        terms=BACKWARD,
    )


def test_the_mean_over_draws_is_the_loss_of_all_sessions():
    """Sessions of one length, so that the mean of the drawn sessions' means is the mean of all."""
    from onerec_hf.data import prefix_examples
    from tests.trainers.test_packed_training import SEQUENCES

    prefixes = prefix_examples(SEQUENCES, session_length=1, max_history=6)
    batch = PackedDataCollator(PROCESSOR, encoder_is_causal=True)(list(prefixes))
    model, generator = model_with_head(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        wanted = float(model(**batch).loss)
        found = torch.stack([model(**draw_sessions(batch, 0.5, generator)).loss for _ in range(200)])
    assert abs(float(found.mean()) - wanted) < 4 * float(found.std()) / 200**0.5


def test_without_an_item_head_sessions_are_dropped(tmp_path):
    plain = make_model(CATALOGUE, encoder_is_causal=True)
    trainer = make_trainer(tmp_path, PREFIXES, plain, packing=True, session_share=0.4)
    samples, counted = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    (drawn,) = samples
    assert int(counted) == int((drawn["labels"] != -100).sum()) < int((drawn["item_targets"] != -100).sum())
    fewer = {name: drawn[name] for name in ("input_ids", "segment_ids", "history_ranges", *DECODER)}
    assert trainer.compute_loss(plain, drawn, num_items_in_batch=counted) == plain(**fewer).loss


def test_a_share_of_one_leaves_the_batch_as_it_is(tmp_path):
    trainer = make_trainer(tmp_path, PREFIXES, model_with_head(), packing=True)
    ((batch,), _) = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    wanted = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in batch.items())


def test_evaluations_have_all_sessions(tmp_path):
    """Also in the middle of a training: the loss of the evaluated batch is the model's."""
    found = []
    for share in (1.0, 0.4):
        trainer = make_trainer(
            tmp_path, PREFIXES, model_with_head(), packing=True, session_share=share, per_device_eval_batch_size=3
        )
        found.append(trainer.evaluate(WINDOWS)["eval_loss"])
    assert found[0] == found[1]


def test_draws_change_with_the_step_and_not_with_a_resume(tmp_path):
    settings = {
        "packing": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "session_share": 0.5,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    dropout = {"dropout_rate": 0.1}
    whole = make_trainer(tmp_path / "a", PREFIXES, model_with_head(**dropout), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "b", PREFIXES, model_with_head(seed=5, **dropout), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed)[3:] == losses(whole)[3:]
    assert_close(resumed.model.state_dict(), whole.model.state_dict(), terms=0)
    batch = packed_batch()

    def drawn(trainer, step):
        trainer.state.global_step = step
        return trainer._draw_sessions()(batch)["labels"].tolist()

    assert drawn(whole, 1) == drawn(resumed, 1) != drawn(whole, 2)


def test_what_has_no_sessions_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"session_share=0\.5 needs packed rows or prefixes.* set packing=True"):
        make_trainer(tmp_path, WINDOWS, session_share=0.5)
    for share in (0, 1.5, -1):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            make_trainer(tmp_path, PREFIXES, session_share=share)


RANKS = """
import sys
import torch
import onerec_hf.trainers.onerec_trainer as module
from onerec_hf.workflows.distributed import leave
from tests.trainers.test_packed_training import PREFIXES, make_trainer
from tests.trainers.test_session_share import model_with_head

folder, draw, batches = sys.argv[1], module.draw_sessions, []
module.draw_sessions = lambda *args: batches.append(draw(*args)) or batches[-1]
trainer = make_trainer(
    folder, PREFIXES, model_with_head(), packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=2, session_share=0.5
)
trainer.train()
torch.save(batches, f"{folder}/batches-{trainer.args.process_index}.pt")
if trainer.is_world_process_zero():
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(f"{folder}/trained")
del trainer
leave()
"""


@pytest.mark.slow
def test_two_ranks_take_the_step_by_hand(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    batches = [batch for rank in (0, 1) for batch in torch.load(tmp_path / f"batches-{rank}.pt")]
    assert len(batches) == 4
    assert not torch.equal(batches[0]["labels"], batches[2]["labels"])
    model = model_with_head()
    loss_by_hand(model, batches).backward()
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    with torch.no_grad():
        stepped = {name: value - 1e-2 * value.grad for name, value in model.named_parameters()}
    assert_close(
        {name: trained[name] for name in stepped if name in trained},
        {name: value for name, value in stepped.items() if name in trained},
        terms=BACKWARD,
    )
