"""What a model keeps to embed items that come later: the same vectors as in the fit, saved without pickles, and room for their codes."""

import numpy as np
import pytest
import scipy.sparse

from onerec_hf.semantic_ids import CrowdedPrefixError, combine_embeddings, extend_catalogue, fit_semantic_ids
from onerec_hf.semantic_ids.alignment import AlignmentMap, align_embeddings
from onerec_hf.semantic_ids.embeddings import TextEncoder, text_embeddings
from onerec_hf.semantic_ids.item_encoder import ItemEncoder

TEXTS = [
    f"{colour} {thing} {i}"
    for i, colour in enumerate(["red", "blue", "green"])
    for thing in ("lamp", "chair", "table")
]


def test_texts_are_embedded_as_in_the_fit():
    vectors, encoder = TextEncoder.fit(TEXTS, dim=6)
    assert np.array_equal(vectors, text_embeddings(TEXTS, dim=6))
    assert np.abs(encoder.encode(TEXTS) - vectors).max() < 1e-4
    assert not encoder.encode(["unknown words"]).any()


def test_it_keeps_the_terms_of_most_texts(monkeypatch):
    monkeypatch.setattr("onerec_hf.semantic_ids.embeddings.MOST_TERMS", 3)
    encoder = TextEncoder.fit(["lamp red", "lamp blue", "lamp chair", "chair green"], dim=3)[1]
    assert len(encoder.terms) == 3
    assert {"lamp", "chair"} <= set(encoder.terms)


def test_a_saved_encoder_gives_the_same_vectors(tmp_path):
    of_texts, text = TextEncoder.fit(TEXTS, dim=6)
    pairs = np.array([[0, 1], [2, 3]])
    alignment = AlignmentMap.fit(of_texts, pairs, dim=4, hidden_size=8, steps=3, batch_size=4)
    assert np.array_equal(
        alignment(of_texts), align_embeddings(of_texts, pairs, dim=4, hidden_size=8, steps=3, batch_size=4)
    )
    encoder = ItemEncoder([("text", 6, 1.0), ("aligned text", 4, 0.5), ("behaviour", 3, 2.0)], text, alignment)
    encoder.save(tmp_path / "encoder.safetensors")
    again = ItemEncoder.load(tmp_path / "encoder.safetensors")
    wanted = combine_embeddings([of_texts, alignment(of_texts), np.zeros((9, 3))], [1.0, 0.5, 2.0])
    assert np.abs(encoder.encode(TEXTS) - wanted).max() < 1e-3
    assert np.abs(again.encode(TEXTS) - wanted).max() < 3e-3  # vectors of terms are saved in half precision
    assert again.parts == encoder.parts


def test_given_embeddings_are_checked(tmp_path):
    axes = np.eye(5, dtype=np.float32)[:, :2]
    ItemEncoder([("given", 2, 1.0)], axes=axes).save(tmp_path / "encoder.safetensors")
    encoder = ItemEncoder.load(tmp_path / "encoder.safetensors")
    assert encoder.encode(given=np.array([[3.0, 4.0, 0, 0, 0]])).tolist() == [pytest.approx([0.6, 0.8])]
    with pytest.raises(ValueError, match="need embeddings"):
        encoder.encode(["a text"])
    with pytest.raises(ValueError, match=r"shape \(1, 4\).*have 5 columns"):
        encoder.encode(given=np.zeros((1, 4)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-8],
        lambda data: b"",
        lambda data: data.replace(b"onerec-item-encoder", b"onerec-item-encodex"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = tmp_path / "encoder.safetensors"
    ItemEncoder([("text", 2, 1.0)], TextEncoder.fit(TEXTS, dim=2)[1]).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"encoder\.safetensors"):
        ItemEncoder.load(path)


def test_behaviour_of_a_new_item_is_that_of_the_items_beside_it():
    encoder = ItemEncoder([("given", 2, 1.0), ("behaviour", 2, 0.5)])
    known = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=np.float32)
    vectors = encoder.encode(given=np.array([[1.0, 0], [1, 0], [0, 0]]))
    together = scipy.sparse.csr_matrix(np.array([[0, 0], [0, 2], [0, 0]]))
    found = encoder.with_behaviour(vectors, known, together)
    assert found[:, 2:].tolist() == [[0.5, 0], [0, 0.5], [0, 0]]


def test_a_full_prefix_spills_into_its_neighbour():
    vectors = np.concatenate([np.zeros((4, 1)), np.full((3, 1), 10.0)]) + np.arange(7)[:, None] * 0.1
    fitted = fit_semantic_ids(range(7), vectors, [2, 4], method="balanced")
    of_first = fitted.catalogue.codes[0, 0]
    full = int((fitted.catalogue.codes[:, 0] == of_first).sum()) == 4
    assert full
    grown = extend_catalogue(fitted.catalogue, fitted.quantizer, [7], np.array([[0.05]]))
    assert grown.codes[7, 0] != of_first
    assert np.array_equal(grown.codes[:7], fitted.catalogue.codes)


def test_many_new_items_fill_every_free_code():
    random = np.random.default_rng(0)
    fitted = fit_semantic_ids(range(20), random.normal(size=(20, 3)), [3, 3, 4])
    grown = extend_catalogue(fitted.catalogue, fitted.quantizer, range(20, 36), np.zeros((16, 3)) + 0.01)
    assert len(np.unique(grown.codes, axis=0)) == 36
    with pytest.raises(CrowdedPrefixError, match="no free code is left"):
        extend_catalogue(grown, fitted.quantizer, [36], np.zeros((1, 3)))


def test_items_of_equal_codes_get_the_next_number():
    vectors = np.array([[0.0], [0.1], [5.0], [9.0], [9.1]])
    fitted = fit_semantic_ids(range(5), vectors, [2], on_collision="extra-digit")
    assert fitted.catalogue.codebook_sizes == [2, 3]
    new = np.array([[0.0], [9.0]])
    grown = extend_catalogue(fitted.catalogue, fitted.quantizer, [5], new[:1])
    assert np.array_equal(grown.codes[:5], fitted.catalogue.codes)
    assert len(np.unique(grown.codes, axis=0)) == 6
    assert grown.codes[5, 0] in (0, 1)
    with pytest.raises(CrowdedPrefixError, match="no free code is left"):
        extend_catalogue(grown, fitted.quantizer, [6], new[1:])
