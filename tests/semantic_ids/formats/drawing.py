"""Random catalogues, and what makes two of them equal."""

import numpy as np
from hypothesis import strategies as st

from onerec_hf.modeling.catalogue import ItemCatalogue


def same(first: ItemCatalogue, second: ItemCatalogue):
    assert second.item_ids == first.item_ids
    np.testing.assert_array_equal(second.codes, first.codes)
    assert second.hash == first.hash


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    flat = draw(st.lists(st.integers(0, int(np.prod(sizes)) - 1), min_size=1, max_size=12, unique=True))
    texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    ids = st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=len(flat), max_size=len(flat), unique=True),
        st.lists(texts, min_size=len(flat), max_size=len(flat), unique=True),
    )
    return ItemCatalogue(draw(ids), np.stack(np.unravel_index(flat, sizes), axis=1), sizes)
