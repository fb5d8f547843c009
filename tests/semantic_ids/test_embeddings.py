"""Embeddings: co-occurrence against a plain loop, geometry that follows text and behaviour, fingerprints."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from onerec_hf.semantic_ids import (
    behaviour_embeddings,
    combine_embeddings,
    embedding_fingerprint,
    reduce_embeddings,
    sentence_embeddings,
    text_embeddings,
)
from onerec_hf.semantic_ids.embeddings import cooccurrence, positive_pmi
from onerec_hf.semantic_ids.terms import terms
from tests.rounding import REDUCTION, close

sequences = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(sequences, st.integers(1, 4))
def test_cooccurrence_equals_a_plain_loop(lists, window):
    wanted = np.zeros((8, 8))
    for items in lists:
        for i, first in enumerate(items):
            for distance in range(1, window + 1):
                if i + distance < len(items):
                    wanted[first, items[i + distance]] += 1 / distance
                    wanted[items[i + distance], first] += 1 / distance
    got = cooccurrence([np.array(items) for items in lists], 8, window).toarray()
    np.testing.assert_allclose(got, wanted)


@settings(max_examples=30, deadline=None)
@given(sequences)
def test_positive_pmi_equals_the_definition(lists):
    counts = cooccurrence([np.array(items) for items in lists], 8, 3)
    dense, wanted = counts.toarray(), np.zeros((8, 8))
    total, by_item = dense.sum(), dense.sum(1)
    for i, j in zip(*dense.nonzero(), strict=True):
        context = by_item[j] ** 0.75 / (by_item**0.75).sum()
        wanted[i, j] = max(0.0, np.log(dense[i, j] / total / (by_item[i] / total * context)))
    np.testing.assert_allclose(positive_pmi(counts).toarray(), wanted, atol=1e-9)  # logarithms of ratios about 1


def test_items_consumed_together_are_close():
    rng = np.random.default_rng(0)
    groups = [np.arange(10), np.arange(10, 20)]
    vectors = behaviour_embeddings([rng.permutation(group) for group in groups * 30], 21, dim=4)
    similar = vectors @ vectors.T
    assert similar[:10, :10].min() > similar[:10, 10:20].max()
    assert not vectors[20].any()
    assert np.linalg.norm(vectors[:20], axis=1) == close(np.ones(20))


LIKENESS = {
    "Chinese": ["红色口红持久", "红色口红哑光", "花园水管十米", "花园椅子", "厨房刀", "厨房锅", "蓝色口红", "花园灯"],
    "Japanese": ["赤い口紅ロング", "赤い口紅マット", "庭用ホース", "庭用椅子", "台所包丁", "台所鍋", "青い口紅", "庭用ランプ"],
    "Thai": ["ลิปสติกสีแดงติดทน", "ลิปสติกสีแดงแมตต์", "สายยางรดน้ำสวน", "เก้าอี้สวน", "มีดทำครัว", "หม้อครัว", "ลิปสติกสีฟ้า", "โคมไฟสวน"],
    "Hindi": ["लाल लिपस्टिक टिकाऊ", "लाल लिपस्टिक मैट", "बगीचे का पाइप", "बगीचे की कुर्सी", "रसोई चाकू", "रसोई बर्तन", "नीली लिपस्टिक", "बगीचे का दीपक"],
    "English": ["red lipstick lasting", "red lipstick matte", "garden hose", "garden chair", "kitchen knife", "kitchen pot", "blue lipstick", "garden lamp"],
}  # fmt: skip


@pytest.mark.parametrize("language", LIKENESS)
def test_like_titles_are_close_in_every_script(language):
    vectors = text_embeddings(LIKENESS[language], dim=8)
    assert vectors[0] @ vectors[1] > 0.4
    assert abs(vectors[0] @ vectors[2]) < 0.1


def test_terms_of_words_are_those_of_scikit_learn():
    texts = ["Heat (1995) | Action, Crime", "it's a 10 m HOSE!", "café crème", "8½ — Фильм", "x y zz", "한국어 제목"]
    analyze = TfidfVectorizer(ngram_range=(1, 2)).build_analyzer()
    assert [sorted(terms(text)) for text in texts] == [sorted(analyze(text)) for text in texts]


def test_words_of_marks_and_single_characters():
    assert terms("हिन्दी")[0] == "हिन्दी"  # vowel signs belong to the word
    assert terms("红色 LED") == ["led", "红", "色", "红色"]
    assert terms("ＬＥＤ灯") == terms("led灯")  # full width
    assert terms("红") == ["红"]
    assert terms("X") == ["x"]


@pytest.mark.parametrize(
    "texts", [["红 1 号", "蓝 2 号", "绿 3 号"], ["a", "b", "c"], ["same", "same"], ["x"], ["红", ""]], ids=str
)
def test_short_texts_have_vectors(texts):
    vectors = text_embeddings(texts, dim=8)
    assert len(vectors) == len(texts)
    assert np.isfinite(vectors).all()
    assert vectors.any()


def test_text_dimensions_never_exceed_what_there_is():
    assert text_embeddings(["red nail", "blue nail", ""], dim=64).shape == (3, 2)
    with pytest.raises(ValueError, match="none of 2 texts"):
        text_embeddings(["", ""])


def test_combine_weighs_parts_and_keeps_zero_rows():
    combined = combine_embeddings([np.array([[3.0, 4.0], [0, 0]]), np.array([[2.0], [5.0]])], [1, 2])
    assert combined == close(np.array([[0.6, 0.8, 2], [0, 0, 2]]), terms=REDUCTION)
    assert combined.dtype == np.float32


def test_fingerprint_names_data_and_recipe():
    vectors = np.arange(6, dtype=np.float32).reshape(2, 3)
    base = embedding_fingerprint(vectors, "a")
    assert base == embedding_fingerprint(vectors.copy(), "a")
    changed = vectors.copy()
    changed[1, 2] += 1e-3
    others = [(vectors, "b"), (changed, "a"), (vectors.reshape(3, 2), "a"), (vectors.astype(np.float64), "a")]
    assert len({base, *(embedding_fingerprint(*other) for other in others)}) == 5


def test_principal_components_keep_distances_that_matter():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 10)) + 5
    reduced = reduce_embeddings(plane, 2)
    wanted = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    np.testing.assert_allclose(np.linalg.norm(reduced[:, None] - reduced[None], axis=2), wanted, atol=1e-3)
    np.testing.assert_allclose(np.cov(reduce_embeddings(plane, 2, whiten=True).T), np.eye(2), atol=1e-3)
    assert reduce_embeddings(plane, 64).shape == (200, 10)


def test_sentence_transformers_read_texts(tmp_path):
    """A tiny language model with random weights, saved and loaded by its folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "lipstick", "hose"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "bert")
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path / "bert")
    word_model = Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[word_model, Pooling(16)]).save(str(tmp_path / "sentence"))
    vectors = sentence_embeddings(["red lipstick", "blue hose", " "], str(tmp_path / "sentence"))
    assert vectors.shape == (3, 16)
    assert np.linalg.norm(vectors, axis=1) == close(np.array([1, 1, 0]))
    assert not np.allclose(vectors[0], vectors[1])


def test_without_sentence_transformers_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"onerec-hf\[text\]"):
        sentence_embeddings(["red"], "any")


@pytest.mark.parametrize("texts", [["lamp", "lamp"], ["lamp"], ["red lamp"]])
def test_texts_with_one_word_or_one_item_have_embeddings(texts):
    vectors = text_embeddings(texts, 8)
    assert vectors.shape == (len(texts), 1)
    assert (vectors == 1).all()


def test_the_behaviour_of_one_item_is_nothing():
    assert behaviour_embeddings([np.array([0, 0, 0])], 1, 8).tolist() == [[0.0]]
