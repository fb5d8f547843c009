"""Item vectors of low rank in blocks by popularity: the full matrix by hand, counts, scores, growth, saving, ONNX, wrong sizes."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor
from onerec_hf.cli.export import export_onnx
from onerec_hf.modeling.configuration_item_head import ItemHeadConfig, item_blocks
from onerec_hf.modeling.low_rank import LowRankVectors
from onerec_hf.planning.parameters import count_parameters
from tests.conftest import make_catalogue, make_model
from tests.rounding import assert_close

COUNTS = (np.arange(40) * 7) % 23  # with ties
_PLAIN = make_catalogue()
CATALOGUE = ItemCatalogue(_PLAIN.item_ids, _PLAIN.codes, _PLAIN.codebook_sizes, popularity=COUNTS)
PROCESSOR = OneRecProcessor.from_catalogue(CATALOGUE, max_history=8)
HISTORIES, SESSIONS = [["m1", "m2", "m3"], ["m5"]], [["m4", "m6"], ["m7"]]


def make(catalogue=CATALOGUE, **head):
    return make_model(catalogue, item_head={"num_items": len(CATALOGUE), "rank": 3, **head})


def head_of(model):
    return model.get_encoder().item_head


def by_hand(model, catalogue=CATALOGUE):
    """(items, 32) vectors in the order of the catalogue: the first block's as they are, the others times their block's projection."""
    vectors = head_of(model).vectors
    wanted = []
    for block, table in enumerate(vectors.tables):
        rows = table.detach().numpy()
        wanted.append(rows if block == 0 else rows @ vectors.projections[block - 1].detach().numpy())
    by_popularity = sorted(range(len(COUNTS)), key=lambda item: (-COUNTS[item], item))
    by_popularity += range(len(COUNTS), len(catalogue))
    full = np.empty((len(catalogue), 32), dtype=np.float32)
    full[by_popularity] = np.concatenate(wanted)
    return torch.from_numpy(full)


def rows_of(model, catalogue=CATALOGUE):
    return head_of(model).rows_of(torch.tensor(catalogue.codes, dtype=torch.long))


def test_vectors_are_the_product_of_their_block():
    model = make()
    vectors, rows = head_of(model).vectors, rows_of(model)
    assert vectors.blocks == [(1, 32), (7, 8), (32, 3)]
    assert [tuple(table.shape) for table in vectors.tables] == vectors.blocks
    assert_close(vectors(rows), by_hand(model))
    assert_close(vectors.table()[rows], by_hand(model))
    assert not vectors.table()[0].any()
    assert not vectors(torch.zeros(2, 3, dtype=torch.long)).any()
    # The most popular item has the vector of full rank, the others of lower ones.
    assert torch.equal(vectors(rows[[int(COUNTS.argmax())]])[0], vectors.tables[0][0])
    assert np.linalg.matrix_rank(by_hand(model)[COUNTS.argsort(kind="stable")[:30]].numpy(), tol=1e-4) == 3


def test_they_are_as_large_as_full_vectors():
    sizes = {"codebook_sizes": [40, 50], "hidden_size": 64, "num_attention_heads": 4, "initializer_range": 0.02}
    model = OneRecForConditionalGeneration(OneRecConfig(**sizes, item_head={"num_items": 2000, "rank": 8}))
    for table, (begin, end) in [(head_of(model).vectors.table(), part) for part in ((1, 95), (95, 476), (476, 2001))]:
        assert 0.015 < float(table[begin:end].detach().std()) < 0.027


@pytest.mark.parametrize(("rank", "fewer"), [(8, 6.9), (16, 5.2)])
def test_a_million_items_have_a_fourth_of_the_parameters(rank, fewer):
    sizes = {"codebook_sizes": [256] * 3, "hidden_size": 128, "num_attention_heads": 4}
    without = count_parameters(OneRecConfig(**sizes))
    full, low = (
        count_parameters(OneRecConfig(**sizes, item_head={"num_items": 1_000_000, **head})) - without
        for head in ({}, {"rank": rank})
    )
    assert full == 1_000_001 * 128
    assert full / low > fewer > 4


@pytest.mark.parametrize("more", [{}, {"score_codes": True}, {"content_dim": 4}], ids=["vectors", "codes", "content"])
def test_item_scores_are_those_of_the_full_matrix(more):
    """A model whose full vectors are the products scores, reads and generates alike."""
    model, full = make(**more), make(**more, rank=None)
    head, state = head_of(full), {name: value for name, value in model.state_dict().items() if ".vectors." not in name}
    content = torch.randn(40, 4, generator=torch.manual_seed(0))
    if "content_dim" in more:
        head_of(model).set_content(torch.tensor(CATALOGUE.codes, dtype=torch.long), content)
        state = {name: value for name, value in model.state_dict().items() if ".vectors." not in name}
    full.load_state_dict(state, strict=False)
    head.vectors.weight.data[rows_of(full)] = by_hand(model)
    batch = PROCESSOR(HISTORIES, SESSIONS)
    wanted, found = full(**batch), model(**batch)
    assert_close(found.loss, wanted.loss)
    assert_close(found.logits, wanted.logits)
    many = {"num_beams": 40, "num_return_sequences": 40, "session_length": 1, "item_score_weight": 2.0}
    ranked = [each.recommend(**PROCESSOR(HISTORIES), **many, return_dict_in_generate=True) for each in (model, full)]
    assert_close(ranked[0].sequences_scores, ranked[1].sequences_scores)
    scored = [head_of(each).output_vectors(each.get_encoder().embed_tokens) for each in (model, full)]
    assert_close(*scored)


def test_everything_learns_and_hidden_items_are_hidden():
    model = make(dropout=0.5).train()
    model(**PROCESSOR(HISTORIES, SESSIONS)).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert all(table.grad.any(-1).all() for table in head_of(model).vectors.tables)  # the softmax is over all items
    shown = head_of(model)(PROCESSOR([[f"m{i}" for i in range(8)]] * 200)["input_ids"])[:, ::4].any(-1)
    assert 0.45 < float(shown.float().mean()) < 0.55


def test_items_that_join_extend_the_last_block(tmp_path):
    model = make(content_dim=4)
    content = torch.randn(43, 4, generator=torch.manual_seed(0))
    head_of(model).set_content(torch.tensor(CATALOGUE.codes, dtype=torch.long), content[:40])
    before = by_hand(model)
    free = [code for code in np.ndindex(4, 5, 6) if code not in set(map(tuple, CATALOGUE.codes.tolist()))][:3]
    grown = CATALOGUE.add(["n0", "n1", "n2"], codes=free)
    model.set_catalogue(grown, dict(zip(["n0", "n1", "n2"], content[40:], strict=True)))
    vectors, rows = head_of(model).vectors, rows_of(model, grown)
    assert vectors.blocks == [(1, 32), (7, 8), (35, 3)]
    assert_close(vectors(rows)[:40], before)
    assert not vectors(rows)[40:].any()
    assert_close(vectors.table()[rows], by_hand(model, grown))
    model.save_pretrained(tmp_path)
    again = OneRecForConditionalGeneration.from_pretrained(tmp_path).eval()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["item_head"]["rank"], saved["item_head"]["blocks"]) == (3, [1, 7, 35])
    assert saved["format_version"] == 3  # of earlier code, which knows no rank
    assert torch.equal(head_of(again).vectors.table(), vectors.table())
    assert torch.equal(head_of(again).vectors.place, vectors.place)
    model.train()(**OneRecProcessor.from_catalogue(grown)([["n1"]], [["n0"]])).loss.backward()
    assert vectors.tables[-1].grad[32:].any(-1).all()  # of zeros, they learn


def test_a_saved_model_is_the_same(tmp_path):
    model = make(score_codes=True)
    model.save_pretrained(tmp_path)
    again = OneRecForConditionalGeneration.from_pretrained(tmp_path).eval()
    names = [name for name in load_file(tmp_path / "model.safetensors") if ".vectors." in name]
    assert sorted(name.split("vectors.")[1] for name in names) == [
        *("place", "projections.0", "projections.1", "tables.0", "tables.1", "tables.2")
    ]
    batch = PROCESSOR(HISTORIES, SESSIONS)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.num_parameters() == count_parameters(again.config)


def test_a_head_without_rank_is_saved_as_before(tmp_path):
    make(rank=None).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"rank", "blocks"} & saved["item_head"].keys()
    assert saved["format_version"] == 2
    assert "model.encoder.item_head.vectors.weight" in load_file(tmp_path / "model.safetensors")


@pytest.mark.slow
def test_the_graphs_score_alike(tmp_path):
    model = make(score_codes=True)
    export_onnx(model, PROCESSOR, tmp_path)
    batch = PROCESSOR(HISTORIES)
    inputs = {name: batch[name].numpy() for name in ("input_ids", "attention_mask")}
    _, scores = onnxruntime.InferenceSession(tmp_path / "encoder.onnx").run(None, inputs)
    everything = {"session_length": 1, "num_beams": 40, "num_return_sequences": 40, "item_score_weight": 1e6}
    rows = PROCESSOR.item_indices(model.recommend(**batch, **everything)).view(2, 40)
    assert torch.equal(torch.tensor(scores).argsort(descending=True), rows)


def test_bfloat16_scores_are_made_in_float32():
    vectors = LowRankVectors([(2, 8), (6, 2)])
    vectors.initialize(1.0)
    low = vectors.to(torch.bfloat16)
    assert low.table().dtype == torch.bfloat16
    exact = low.tables[1].float() @ low.projections[0].float()
    assert_close(low.table(torch.float32)[3:], exact)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 32}, "rank=32 must be below hidden_size=32"),
        ({"blocks": [40]}, "blocks need a rank"),
        ({"rank": 3, "blocks": [20, 20]}, r"3 blocks of ranks \[32, 8, 3\]"),
        ({"rank": 3, "blocks": [20, 10, 5]}, "must be positive and sum to num_items=40"),
        ({"rank": 3, "blocks": [40, 1, -1]}, "must be positive and sum to num_items=40"),
        ({"rank": 3, "num_items": 2}, "num_items=2 and blocks=None do not fit"),
    ],
)
def test_sizes_that_do_not_fit(head, message):
    with pytest.raises(Exception, match=message):
        OneRecConfig(
            codebook_sizes=[4, 5, 6], hidden_size=32, num_attention_heads=4, item_head={"num_items": 40, **head}
        )


def test_blocks_are_chosen_and_given():
    assert item_blocks(ItemHeadConfig(num_items=5, rank=3), 32) == [(1, 32), (1, 8), (3, 3)]
    assert item_blocks(ItemHeadConfig(num_items=5, rank=3, blocks=[2, 2, 1]), 32) == [(2, 32), (2, 8), (1, 3)]


def test_a_catalogue_without_popularity_is_refused():
    with pytest.raises(ValueError, match=r"item_head\.rank orders items by popularity, which the catalogue lacks"):
        make(_PLAIN)


def test_vectors_stay_with_their_items_when_others_become_popular():
    """A catalogue of the same codes whose popularity changed, as an update leaves it, is set again."""
    model = make()
    rows = rows_of(model)
    before = head_of(model).vectors(rows)
    model.config.catalogue_hash = None
    model.set_catalogue(CATALOGUE.with_popularity(COUNTS[::-1].copy()))
    assert torch.equal(head_of(model).vectors(rows_of(model)), before)
