"""SASRec, HSTU, GRU4Rec and ACVAE: losses by hand, padding, causality, features, ranking, files."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from onerec_hf.baselines import PopularityBaseline, SequentialConfig, SequentialRecommender
from onerec_hf.baselines.next_items import draw_negatives, pad_left

ARCHITECTURES = ("sasrec", "hstu", "gru4rec", "acvae")
IDS = [f"m{i}" for i in range(12)]


def make(architecture="sasrec", ids=IDS, features=None, **config) -> SequentialRecommender:
    """A small model in eval mode, with weights large enough that its scores differ clearly."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "max_history": 6, "dropout_rate": 0.0, "initializer_range": 0.5, **config}
    return SequentialRecommender.from_items(ids, features, architecture=architecture, **settings).eval()


def batch(*rows):
    return pad_left([np.asarray(row) for row in rows])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_one_by_hand(architecture, smoothing):
    model = make(architecture)
    ids = batch([3, 1, 4, 8], [5, 9])
    labels = torch.tensor([[2, -100, 9, 7], [-100, -100, 10, 1]])
    output = model(ids, labels=labels, label_smoothing=smoothing)
    expected = []
    for user, place in (labels != -100).nonzero().tolist():
        scores = (model.item_vectors() @ output.last_hidden_state[user, place]).double()
        log_p = (scores.exp() / scores.exp().sum()).log()
        expected.append(-(1 - smoothing) * log_p[labels[user, place] - 1] - smoothing * log_p.mean())
    torch.testing.assert_close(output.loss.double(), torch.stack(expected).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_binary_cross_entropy_is_the_one_by_hand(architecture):
    model = make(architecture, ids=IDS[:5], loss="bce")
    ids, labels = batch([3, 1, 4], [0, 2]), torch.tensor([[2, 5, 1], [-100, 3, 5]])
    states = model.encode(ids)
    seen = torch.tensor([[1, 2, 4, 5], [1, 2, 3, 5]])  # one item is left for each user: 2 and 3 as indices
    expected = []
    for user, place in (labels != -100).nonzero().tolist():
        vectors, state = model.item_vectors(), states[user, place]
        right, wrong = vectors[labels[user, place] - 1] @ state, vectors[(2, 3)[user]] @ state
        expected.append(-right.sigmoid().log() - (1 - wrong.sigmoid()).log())
    output = model(ids, labels=labels, seen_ids=seen)
    torch.testing.assert_close(output.loss, torch.stack(expected).mean(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r'label_smoothing=0\.1 needs loss="ce"'):
        model(ids, labels=labels, label_smoothing=0.1)


def test_negatives_are_all_items_but_the_seen():
    seen, rows = torch.tensor([[0, 2, 5], [4, 4, 1]]), torch.tensor([0, 1]).repeat(400)
    torch.manual_seed(0)
    drawn = draw_negatives(seen, rows, 6)
    assert set(drawn[rows == 0].tolist()) == {1, 3, 4, 6}
    assert set(drawn[rows == 1].tolist()) == {2, 3, 5, 6}
    with pytest.raises(ValueError, match="a user has seen all 3"):
        draw_negatives(torch.tensor([[1, 1, 2, 3]]), torch.tensor([0]), 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture):
    model, alone = make(architecture), batch([3, 1, 4, 8])
    beside = batch([3, 1, 4, 8], [7, 2, 9, 5, 6, 0])
    expected = model.encode(alone)[0]
    torch.testing.assert_close(model.encode(beside)[0, -4:], expected, rtol=1e-4, atol=1e-5)
    model.item_embedding.weight.data[0] = 100.0  # whatever the padding's vector
    torch.testing.assert_close(model.encode(beside)[0, -4:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_later_item_does_not_change_an_earlier_state(architecture):
    model = make(architecture)
    first, second = model.encode(batch([3, 1, 4, 8], [5, 2, 0, 9])), model.encode(batch([3, 1, 4, 0], [5, 2, 0, 7]))
    torch.testing.assert_close(first[:, :-1], second[:, :-1], rtol=0, atol=0)
    assert not torch.allclose(first[:, -1], second[:, -1])
    changed = model.encode(batch([6, 1, 4, 8], [5, 2, 0, 9]))
    assert not torch.allclose(first[0, -1], changed[0, -1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_items_of_the_same_features_are_read_and_scored_alike(architecture):
    described = np.random.default_rng(0).normal(size=(6, 3)).repeat(2, axis=0)  # items 0 and 1 alike, 2 and 3, ...
    model = make(architecture, features=described)
    torch.nn.init.zeros_(model.item_embedding.weight)  # only features tell items apart
    scores = model(batch([0, 2, 4], [1, 3, 5])).logits
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[:, 0::2], scores[:, 1::2])
    assert scores[0].std() > 0
    expected = torch.from_numpy(described - described.mean(0)).float()
    expected = expected / expected.abs().sum(1).mean() @ model.feature_proj.weight.T
    torch.testing.assert_close(model.item_vectors(), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "ids", [IDS, list(range(100, 112)), ["é", "日本", *IDS[:10]]], ids=["text", "numbers", "unicode"]
)
@pytest.mark.parametrize("described", [False, True])
def test_a_saved_model_ranks_as_before(architecture, ids, described, tmp_path):
    features = np.random.default_rng(1).normal(size=(12, 4)) if described else None
    model = make(architecture, ids=ids, features=features)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is SequentialRecommender
    assert loaded.items.item_ids == ids
    histories = [ids[:3], ids[4:5], ids]
    assert loaded.recommend(histories, exclude_seen=False) == model.recommend(histories, exclude_seen=False)
    assert AutoConfig.from_pretrained(tmp_path).architecture == architecture


def test_the_ranking_is_by_score_without_what_is_left_out():
    model = make()
    histories = [["m3", "m1"], ["m5"]]
    scores = model(batch([3, 1], [5])).logits
    everything = [[IDS[i] for i in row] for row in scores.argsort(dim=1, descending=True).tolist()]
    found = model.recommend(histories, top_k=12, exclude_seen=False)
    assert [[item for item, _ in user] for user in found] == everything
    np.testing.assert_allclose(
        [score for _, score in found[0]], scores[0].sort(descending=True).values.tolist(), rtol=1e-5
    )
    found = model.recommend(histories, top_k=12, exclude=["m0", "unheard"], batch_size=1)
    kept = [
        [item for item in user if item not in {"m0", *seen}] for user, seen in zip(everything, histories, strict=True)
    ]
    assert [[item for item, _ in user] for user in found] == kept
    found = model.recommend(histories, allow=["m3", "m7", "m5"], top_k=5)
    assert [sorted(item for item, _ in user) for user in found] == [["m5", "m7"], ["m3", "m7"]]
    model.train()
    ranked = model.rank([np.array([3, 1]), np.array([5])], 14)
    assert model.training
    assert ranked[:, :10].tolist() == [
        [IDS.index(i) for i in user if i not in seen][:10] for user, seen in zip(everything, histories, strict=True)
    ]
    assert (ranked[:, 11:] == -1).all()
    # The interface of the other baselines.
    others = PopularityBaseline().fit([[3, 1], [5]], 12).recommend([np.array([3, 1]), np.array([5])], 14)
    assert others.shape == ranked.shape
    assert others.dtype == ranked.dtype


def test_old_items_of_a_long_history_are_left_out_too():
    model = make(max_history=3)
    ranked = model.rank([np.arange(9)], 12)
    assert sorted(ranked[0, :3].tolist()) == [9, 10, 11]
    np.testing.assert_array_equal(ranked, model.rank([np.array([0, 1, 2, 3, 4, 5, 6, 7, 8])], 12))
    np.testing.assert_array_equal(
        model.rank([np.arange(9)], 12, exclude_seen=False), model.rank([np.array([6, 7, 8])], 12, exclude_seen=False)
    )


def test_bad_requests_are_refused_in_one_sentence():
    model = make()
    with pytest.raises(
        KeyError, match=r"histories\[1\]: 1 of 2 item ids are not among the model's 12 items, e.g. \['x'\]"
    ):
        model.recommend([["m1"], ["m2", "x"]], unknown="error")
    assert model.recommend([["m2", "x"]]) == model.recommend([["m2"]])
    with pytest.raises(ValueError, match=r"histories\[1\] holds no item of the model's catalogue"):
        model.recommend([["m1"], ["x"]])
    with pytest.raises(ValueError, match=r"histories\[0\] holds no item"):
        model.rank([np.array([], dtype=int)], 1)
    with pytest.raises(TypeError, match=r"histories\[0\]: the model's item ids are of type str; got 7"):
        model.recommend([[7]])
    with pytest.raises(ValueError, match="allow holds no item"):
        model.recommend([["m1"]], allow=["x"])
    with pytest.raises(ValueError, match="top_k must be at least 1; got 0"):
        model.recommend([["m1"]], top_k=0)
    with pytest.raises(ValueError, match='unknown must be "skip" or "error"'):
        model.recommend([["m1"]], unknown="mask")
    with pytest.raises(ValueError, match="item indices must lie between 0 and 11; got 4 to 12"):
        model.rank([np.array([4, 12])], 1)
    with pytest.raises(ValueError, match="7 positions and max_history is 6"):
        model(batch(range(7)))
    bare = SequentialRecommender(SequentialConfig(num_items=12, hidden_size=16))
    with pytest.raises(ValueError, match="this model has no item ids"):
        bare.recommend([["m1"]])


def test_bad_items_and_features_are_refused():
    model = SequentialRecommender(SequentialConfig(num_items=3, item_feature_dim=2, hidden_size=16))
    with pytest.raises(ValueError, match="the model has num_items=3, and item_ids has 2 ids"):
        model.set_items(["a", "b"])
    with pytest.raises(ValueError, match=r"item_ids: 1 ids repeat, e\.g\. 'a'"):
        model.set_items(["a", "b", "a"])
    with pytest.raises(ValueError, match="item_ids is empty"):
        model.set_items([])
    with pytest.raises(TypeError, match="all integers or all strings"):
        model.set_items(["a", "b", 3])
    with pytest.raises(
        ValueError, match=r"features: expected shape \(3, 2\) \(num_items, item_feature_dim\); got \(3, 4\)"
    ):
        model.set_items(["a", "b", "c"], np.zeros((3, 4)))
    with pytest.raises(ValueError, match="features: 1 rows hold NaN or infinity \\(first: item 'b'\\)"):
        model.set_items(["a", "b", "c"], np.array([[1, 2], [3, np.nan], [5, 6]]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"architecture": "bert4rec"}, "architecture must be one of sasrec, hstu, gru4rec, acvae; got 'bert4rec'"),
        ({"loss": "bpr"}, 'loss must be "ce" or "bce"'),
        ({"hidden_size": 15}, "hidden_size=15 must be a multiple of num_attention_heads=2"),
        ({"max_history": 0}, "max_history=0 must lie between"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 must lie between"),
        ({"item_feature_dim": -1}, "item_feature_dim=-1"),
        ({"latent_size": 0}, "latent_size=0 must lie between"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0 must be a number from 0 on"),
        ({"contrast_weight": float("nan")}, "contrast_weight=nan must be a number from 0 on"),
    ],
)
def test_bad_configurations_are_refused(setting, message):
    with pytest.raises(Exception, match=message):
        SequentialConfig(**setting)


def test_damaged_folders_are_refused(tmp_path):
    make().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "positions" not in name}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of the weights are .* \(first: encoder.positions.weight\)"):
        AutoModel.from_pretrained(tmp_path)
    save_file({**tensors, "item_keys": torch.full_like(tensors["item_keys"], 255)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=str(tmp_path)):
        AutoModel.from_pretrained(tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="safetensors only"):
        AutoModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        AutoModel.from_pretrained(tmp_path)


def test_the_logits_are_of_the_last_position():
    model = make()
    output = model(batch([3, 1], [5]))
    torch.testing.assert_close(output.logits, F.linear(output.last_hidden_state[:, -1], model.item_vectors()))
