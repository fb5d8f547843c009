"""OneRecTokenizer: computed ids, both ways."""

import pytest
from transformers import AutoTokenizer

from onerec_hf import OneRecConfig, OneRecTokenizer


def test_every_id_has_a_token_and_back():
    tokenizer = OneRecTokenizer(codebook_sizes=[3, 2])
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(tokenizer.vocab_size)]
    assert tokens == ["<pad>", "<bos>", "<eos>", "<sep>", "<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>"]
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(9))
    assert len(tokenizer) == 9
    assert len(tokenizer.get_vocab()) == 9


def test_offsets_and_special_ids_equal_the_config():
    config, tokenizer = OneRecConfig(codebook_sizes=[7, 5, 3]), OneRecTokenizer([7, 5, 3])
    assert tokenizer.level_offsets == config.level_offsets
    for name in ("pad", "bos", "eos", "sep"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(config, f"{name}_token_id")


def test_text_and_specials():
    tokenizer = OneRecTokenizer([3, 2])
    assert tokenizer("<sep><a_2> <b_0>")["input_ids"] == [3, 6, 7]
    assert tokenizer.decode([1, 6, 7], skip_special_tokens=True) == "<a_2><b_0>"


@pytest.mark.parametrize("text", ["hello", "<a_0>x", "<a_9>", "<c_0>"])
def test_refuses(text):
    with pytest.raises(ValueError, match=r"semantic-ID tokens|outside codebooks"):
        OneRecTokenizer([3, 2])(text)


def test_round_trip(tmp_path):
    OneRecConfig(codebook_sizes=[3, 2]).save_pretrained(tmp_path)
    OneRecTokenizer([3, 2]).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is OneRecTokenizer
    assert loaded.codebook_sizes == [3, 2]
    assert loaded("<a_2><b_1>")["input_ids"] == [6, 8]
