"""The session reward model: its loss, what it must not depend on, its scores, and saving."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForSequenceClassification

from onerec_hf import OneRecForSessionReward, OneRecRewardConfig, RewardItems
from onerec_hf.modeling.modeling_onerec_reward import masked_bce, within_user_loss
from tests.rounding import assert_close

IDS = [f"m{i}" for i in range(12)]
HISTORIES = [["m1", "m2", "m3"], [], ["m4"], ["m1", "m2", "m3"]]
SESSIONS = [["m5", "m6"], ["m7"], ["m5", "m6", "m8"], ["m9", "m1"]]


def make_reward(seed: int = 0, **config) -> OneRecForSessionReward:
    """A tiny reward model in eval mode, its towers moved away from the base rates so that sessions differ."""
    torch.manual_seed(seed)
    settings = {
        "num_items": len(IDS),
        "item_feature_dim": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "tower_size": 8,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
        "base_rates": [0.5, 0.3, 0.01, 0.02],
    }
    model = OneRecForSessionReward(OneRecRewardConfig(**{**settings, **config}))
    features = np.random.default_rng(0).normal(size=(len(IDS), model.config.item_feature_dim))
    model.set_items(RewardItems(IDS), features)
    if model.config.statistics_dim:
        model.set_statistics(features[:, : model.config.statistics_dim])
    with torch.no_grad():
        for head in (*model.towers, model.p_score):
            if head is not None:
                head.out_proj.weight.normal_(0, 0.5)
    return model.eval()


@pytest.fixture
def reward():
    return make_reward()


@pytest.fixture
def inputs(reward):
    return reward.items.encode(HISTORIES, SESSIONS)


def test_loss_is_the_hand_computed_one(reward, inputs):
    labels = torch.tensor([[1, 0, -100, 0.25], [-100] * 4, [0, 1, 0, -100], [0.5, 0.5, 0.0, 1.0]])
    out = reward(**inputs, labels=labels)
    total = 0.0
    for row, answer in zip(out.logits.tolist(), labels.tolist(), strict=True):
        for logit, y in zip(row, answer, strict=True):
            if y >= 0:
                p = 1 / (1 + math.exp(-logit))
                total -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert out.loss.item() == pytest.approx(total / len(labels), rel=1e-5)


def test_missing_labels_give_no_gradient(reward, inputs):
    labels = torch.rand(4, 4)
    labels[:, 2] = -100
    reward(**inputs, labels=labels).loss.backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in reward.towers[2].parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in reward.towers[1].out_proj.parameters())


def test_a_batch_without_any_label_has_loss_zero():
    logits = torch.randn(3, 2, requires_grad=True)
    loss = masked_bce(logits, torch.full((3, 2), -100.0))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_permuting_a_batch_permutes_its_scores(attention, pooling):
    reward = make_reward(attn_implementation=attention, pooling=pooling)
    order = torch.tensor([2, 0, 3, 1])
    inputs = reward.items.encode(HISTORIES, SESSIONS)
    with torch.no_grad():
        scores = reward.score(**inputs)
        permuted = reward.score(**{name: value[order] for name, value in inputs.items()})
    assert scores.shape == (4,)
    assert len(set(scores.tolist())) == 4
    assert_close(permuted, scores[order])


@torch.no_grad()
def test_padding_does_not_matter(reward, inputs):
    wider = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in inputs.items()}
    assert_close(reward(**wider).logits, reward(**inputs).logits)
    garbage = dict(wider)  # whatever stands under a mask of 0 is not read
    garbage["input_ids"] = wider["input_ids"].masked_fill(wider["attention_mask"] == 0, 7)
    garbage["session_input_ids"] = wider["session_input_ids"].masked_fill(wider["session_attention_mask"] == 0, 7)
    assert_close(reward(**garbage).logits, reward(**inputs).logits)


@torch.no_grad()
def test_masks_may_be_left_out(reward, inputs):
    ids = {name: inputs[name] for name in ("input_ids", "session_input_ids")}
    assert_close(reward(**ids).logits, reward(**inputs).logits)


def test_a_session_is_scored_alone_as_in_a_batch(reward):
    together = reward.reward(HISTORIES, SESSIONS)
    alone = [reward.reward([h], [s])[0] for h, s in zip(HISTORIES, SESSIONS, strict=True)]
    chunked = reward.reward(HISTORIES, SESSIONS, batch_size=3)
    assert together == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(chunked, rel=1e-5)
    assert all(isinstance(value, float) for value in together)


@torch.no_grad()
def test_scores_depend_on_history_items_and_features(reward):
    one = reward.predict([["m1"]], [["m5", "m6"]])
    assert not torch.allclose(one, reward.predict([["m2"]], [["m5", "m6"]]))
    assert not torch.allclose(one, reward.predict([[]], [["m5", "m6"]]))
    assert not torch.allclose(one, reward.predict([["m1"]], [["m5", "m7"]]))
    reward.item_features[1 + IDS.index("m5")] += 5
    assert not torch.allclose(one, reward.predict([["m1"]], [["m5", "m6"]]))


def test_only_the_latest_items_of_a_history_are_read():
    reward = make_reward(max_history=2)
    assert reward.reward([["m7", "m1", "m2"]], [["m5"]]) == reward.reward([["m1", "m2"]], [["m5"]])


def test_fusion_by_hand(reward):
    p = torch.tensor([[0.4, 0.6, 0.02, 0.01], [0.5, 0.3, 0.01, 0.02]])
    lifts = (0.4 / 0.5 + 0.6 / 0.3 + 0.02 / 0.01 + 0.01 / 0.02) / 4
    assert reward.fuse(p).tolist() == pytest.approx([lifts, 1.0])
    assert reward.fuse(p, {"vtr": 3, "ltr": 1}).tolist() == pytest.approx([(3 * 2 + 0.5) / 4, 1.0])
    reward.config.score_fusion, reward.config.score_weights = "probability", {"swt": 2.0}
    assert reward.fuse(p).tolist() == pytest.approx([0.4, 0.5])
    with pytest.raises(ValueError, match=r"weights names \['watch'\]; the objectives are \['swt'"):
        reward.fuse(p, {"watch": 1})
    with pytest.raises(ValueError, match="sum to zero"):
        reward.fuse(p, {"swt": 1, "vtr": -1})


def test_weights_of_reward_are_those_of_fuse(reward):
    p = reward.predict(HISTORIES, SESSIONS)
    assert reward.reward(HISTORIES, SESSIONS, weights={"ltr": 1}) == pytest.approx((p[:, 3] / 0.02).tolist())


def test_an_untrained_model_predicts_the_base_rates():
    config = OneRecRewardConfig(num_items=12, objectives=["vtr", "wtr"], base_rates=[0.3, 0.001], hidden_size=16)
    model = OneRecForSessionReward(config)
    model.set_items(RewardItems(IDS))
    assert model.predict(HISTORIES, SESSIONS)[2].tolist() == pytest.approx([0.3, 0.001], rel=1e-5)
    assert model.training  # predict leaves the mode as it was


@pytest.mark.parametrize("dim", [3, 0])
def test_saving_and_loading_is_exact(dim, tmp_path):
    reward = make_reward(item_feature_dim=dim, score_weights={"swt": 1.0, "ltr": 2.0})
    reward.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is OneRecForSessionReward
    assert loaded.reward(HISTORIES, SESSIONS) == reward.reward(HISTORIES, SESSIONS)
    assert loaded.config.items_hash == reward.items.hash
    assert loaded.items.item_ids == IDS
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_labels == 4
    assert config.id2label == {0: "swt", 1: "vtr", 2: "wtr", 3: "ltr"}
    assert torch.equal(loaded.item_features, reward.item_features)


def test_another_item_table_is_refused(reward):
    with pytest.raises(ValueError, match="are not those that the reward model was trained with"):
        reward.set_items(RewardItems(IDS[::-1]))
    with pytest.raises(ValueError, match="made for 12 items; the table has 11"):
        reward.set_items(RewardItems(IDS[1:]))
    features = np.zeros((12, 3))
    features[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"1 of 12 rows hold NaN or infinity \(first: item 'm4'\)"):
        reward.set_items(reward.items, features)
    with pytest.raises(ValueError, match=r"expected shape \(12, 3\)"):
        reward.set_items(reward.items, features[:, :2])


def test_bad_sessions_get_one_clear_error(reward):
    with pytest.raises(
        KeyError, match=r"1 of 2 session item ids are not among the 12 items of the reward model, e.g. \['x'\]"
    ):
        reward.reward([["m1"]], [["m2", "x"]])
    with pytest.raises(ValueError, match=r"1 of 2 sessions are empty \(first: number 1\)"):
        reward.reward([["m1"], ["m1"]], [["m2"], []])
    with pytest.raises(ValueError, match="2 histories but 1 sessions"):
        reward.reward([["m1"], ["m1"]], [["m2"]])
    with pytest.raises(TypeError, match="are of type str; got 5"):
        reward.reward([[5]], [["m2"]])
    with pytest.raises(ValueError, match="no item ids"):
        OneRecForSessionReward(OneRecRewardConfig(num_items=12)).reward([["m1"]], [["m2"]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_rates": [0.5]}, "base_rates must hold one number"),
        ({"base_rates": [0.5, 0.5, 0.0, 0.5]}, "leave it out"),
        ({"objectives": ["a", "a"], "base_rates": [0.5, 0.5]}, "distinct"),
        ({"score_weights": {"x": 1.0}}, r"score_weights names \['x'\]"),
        ({"score_fusion": "product"}, "score_fusion"),
        ({"pooling": "max"}, "pooling"),
        ({"statistics_dim": -1}, "statistics_dim"),
        ({"score_fusion": "p_score", "score_weights": {"swt": 2.0, "vtr": -1.0}}, "at least 0"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(StrictDataclassError) as caught:
        OneRecRewardConfig(**change)
    assert caught.match(message) or pytest.fail(str(caught.value))


@pytest.mark.parametrize("ids", [[5, -3, 2**40], ["é", "b", "0012"]])
def test_items_keep_their_ids_through_a_file(ids, tmp_path):
    items = RewardItems(ids)
    items.save(tmp_path / "items.safetensors")
    loaded = RewardItems.load(tmp_path / "items.safetensors")
    assert loaded.item_ids == ids
    assert loaded.hash == items.hash
    assert loaded.indices(ids[::-1]).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match="1 item ids repeat"):
        RewardItems([*ids, ids[0]])


@pytest.mark.parametrize("config", [{}, {"score_fusion": "p_score", "statistics_dim": 2}])
def test_gradients_reach_every_parameter(config, inputs):
    reward = make_reward(**config).train()
    reward(**inputs, labels=torch.rand(4, 4)).loss.backward()
    assert [name for name, p in reward.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_pairs_within_users_by_hand():
    logits = torch.tensor([[0.5, 1.0], [-0.2, 0.0], [0.1, 3.0], [0.0, 0.0]], requires_grad=True)
    labels = torch.tensor([[0.2, 1.0], [0.6, -100.0], [0.2, 0.0], [1.0, 1.0]])
    users = torch.tensor([4, 4, 4, 9])  # the last one has no other session
    pairs = [(1, 0, 0), (1, 2, 0), (0, 2, 1)]  # better, worse, objective; missing labels and ties are no pairs
    values = logits.detach()
    total = sum(
        (labels[i, k] - labels[j, k]).item() * math.log1p(math.exp(values[j, k] - values[i, k])) / 2
        for i, j, k in pairs
    )
    loss = within_user_loss(logits, labels, users)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    loss.backward()
    assert logits.grad[3].abs().max() == 0
    assert logits.grad[1, 0] < 0 < logits.grad[0, 0]  # up for the better session, down for the worse
    assert within_user_loss(logits, labels, torch.arange(4)).item() == 0


def p_score_model(**config) -> OneRecForSessionReward:
    return make_reward(score_fusion="p_score", score_weights={"swt": 1.0, "vtr": 3.0}, **config)


def test_the_p_score_is_trained_on_the_weighted_sum_of_objectives():
    reward = p_score_model()
    inputs = reward.items.encode(HISTORIES, SESSIONS)
    labels = torch.tensor([[1.0, 0.0, -100, 0.25], [0.5, 1.0, 0, 0], [-100, 1.0, 0, 0], [0.0, 0.5, 0, 1.0]])
    out = reward(**inputs, labels=labels)
    total = 0.0
    for row in (0, 1, 3):  # row 2 lacks an objective with a weight
        p = out.p_score_logits[row].sigmoid().item()
        for weight, y in zip((0.25, 0.75), labels[row, :2].tolist(), strict=True):
            total -= weight * (y * math.log(p) + (1 - y) * math.log(1 - p))
    towers = masked_bce(out.logits, labels).item()
    assert out.loss.item() == pytest.approx(towers + total / 4, rel=1e-5)


@torch.no_grad()
def test_labels_of_the_p_score_may_be_integers():
    reward = p_score_model()
    inputs, labels = reward.items.encode(HISTORIES, SESSIONS), torch.tensor([[1, 0, 1, 0]] * 4)
    assert_close(reward(**inputs, labels=labels).loss, reward(**inputs, labels=labels.float()).loss)


@torch.no_grad()
def test_alignment_gets_the_p_score_and_the_fusion_stays():
    reward = p_score_model()
    inputs = reward.items.encode(HISTORIES, SESSIONS)
    scores = reward(**inputs).p_score_logits.sigmoid()
    assert reward.reward(HISTORIES, SESSIONS) == pytest.approx(scores.tolist(), rel=1e-5)
    assert_close(reward.score(**inputs), scores)
    weights = {"vtr": 1.0, "ltr": 2.0}
    fused = make_reward(score_weights=weights).fuse(reward.predict(HISTORIES, SESSIONS))
    assert reward.reward(HISTORIES, SESSIONS, weights) == pytest.approx(fused.tolist(), rel=1e-5)
    reward.p_score.out_proj.weight.zero_()  # untrained: the weighted base rate
    assert reward.reward(HISTORIES, SESSIONS) == pytest.approx([0.25 * 0.5 + 0.75 * 0.3] * 4, rel=1e-5)


@torch.no_grad()
def test_statistics_are_read_replaced_and_saved(tmp_path):
    reward = p_score_model(statistics_dim=2)
    before = reward.reward(HISTORIES, SESSIONS)
    later = np.random.default_rng(5).normal(size=(len(IDS), 2))
    reward.set_statistics(later)
    after = reward.reward(HISTORIES, SESSIONS)
    assert all(one != other for one, other in zip(before, after, strict=True))
    reward.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.reward(HISTORIES, SESSIONS) == after
    assert_close(loaded.item_statistics[1:], torch.tensor(later, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"item statistics: expected shape \(12, 2\) \(items, statistics_dim\)"):
        reward.set_statistics(later[:3])
    later[3, 1] = np.inf
    with pytest.raises(ValueError, match=r"item statistics: 1 of 12 rows hold NaN or infinity \(first: item 'm3'\)"):
        reward.set_statistics(later)
    with pytest.raises(ValueError, match=r"no statistics \(statistics_dim=0\)"):
        make_reward().set_statistics(later)


@torch.no_grad()
def test_mean_statistics_of_a_session_move_its_logits():
    reward = p_score_model(statistics_dim=2)
    inputs = reward.items.encode(HISTORIES, SESSIONS)
    before = reward(**inputs)
    weight = torch.linspace(-0.2, 0.3, 10).reshape(5, 2)  # four objectives and the P-Score
    reward.statistics_wide.weight.copy_(weight)
    after = reward(**inputs)
    for row, session in enumerate(SESSIONS):
        mean = torch.stack([reward.item_statistics[1 + IDS.index(item)] for item in session]).mean(0)
        moved = torch.cat(
            [after.logits[row] - before.logits[row], (after.p_score_logits - before.p_score_logits)[row, None]]
        )
        assert_close(moved, 10 * weight @ mean, scale=10.0)


def test_a_model_saved_before_statistics_and_p_score_loads_as_it_was(reward, tmp_path):
    reward.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["statistics_dim"]
    path.write_text(json.dumps(config))
    loaded, found = OneRecForSessionReward.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert loaded.reward(HISTORIES, SESSIONS) == reward.reward(HISTORIES, SESSIONS)
    assert not [name for name in loaded.state_dict() if "statistics" in name or "p_score" in name]
