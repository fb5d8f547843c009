"""OneRecConfig: computed ids and sizes, and what it refuses."""

import pytest

from onerec_hf import OneRecConfig


def test_token_ids_follow_the_special_tokens_level_by_level():
    config = OneRecConfig(codebook_sizes=[3, 5, 7], hidden_size=8, num_attention_heads=2)
    assert config.level_offsets == [4, 7, 12]
    assert config.vocab_size == 64  # 4 + 15, rounded up to a multiple of 64
    assert OneRecConfig(codebook_sizes=[256] * 3).vocab_size == 832


def test_paper_defaults():
    config = OneRecConfig()
    assert (config.num_experts, config.num_experts_per_tok, config.session_length) == (24, 2, 5)
    assert config.moe_intermediate_size == config.intermediate_size
    assert not config.norm_topk_prob


def test_round_trip(tmp_path):
    config = OneRecConfig(codebook_sizes=[8, 8], session_length=3, catalogue_hash="abc")
    config.save_pretrained(tmp_path)
    assert OneRecConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook_sizes": []}, "codebook_sizes"),
        ({"codebook_sizes": [4, 0]}, "codebook_sizes"),
        ({"codebook_sizes": [100], "vocab_size": 64}, "cannot hold"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "must be even"),
    ],
)
def test_refuses(settings, words):
    with pytest.raises(Exception, match=words):
        OneRecConfig(**settings)
