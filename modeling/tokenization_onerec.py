"""Semantic-ID tokenizer: ids are computed from codebook sizes, there is no vocabulary file."""

import re

from transformers.tokenization_python import PreTrainedTokenizer

# The base class makes a dictionary of all tokens where a tokenizer_config.json adds some: more would take minutes and all memory.
MOST_CODES = 2**22
_TOKEN = re.compile(r"<([a-z])_(\d+)>|<(?:pad|bos|eos|sep)>")


class OneRecTokenizer(PreTrainedTokenizer):
    r"""
    Tokens `<a_5>`, `<b_17>`, ...: the letter is the level, the number the code. Ids follow four special tokens, level by level, as
    [`OneRecConfig`] describes. It exists so that Trainer, TRL and pipelines find the tokenizer they expect; items go in and out
    through [`OneRecProcessor`].

    Args:
        codebook_sizes (`list[int]`): codes per level, at most 26 levels and 4,194,304 codes.

    Raises:
        ValueError: sizes beyond that, a text that is no sequence of semantic-ID tokens, or a code outside its codebook.

    Example:
        >>> from onerec_hf import OneRecTokenizer
        >>> tokenizer = OneRecTokenizer(codebook_sizes=[4, 4])
        >>> tokenizer("<a_1><b_3>")["input_ids"], tokenizer.decode([5, 11])
        ([5, 11], '<a_1><b_3>')
    """

    model_input_names = ["input_ids", "attention_mask"]
    vocab_files_names = {}

    def __init__(
        self,
        codebook_sizes=(256, 256, 256),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        sep_token="<sep>",
        **kwargs,
    ):
        self.codebook_sizes = [int(size) for size in codebook_sizes]
        if any(size < 1 for size in self.codebook_sizes) or sum(self.codebook_sizes) > MOST_CODES:
            raise ValueError(
                f"codebook_sizes must hold positive sizes, of {MOST_CODES:,} codes at most together; got {self.codebook_sizes!s:.200}"
            )
        if not 1 <= len(self.codebook_sizes) <= 26:
            raise ValueError(f"1 to 26 levels have a letter; got {len(self.codebook_sizes)}")
        self._special = [str(token) for token in (pad_token, bos_token, eos_token, sep_token)]
        self.level_offsets = [
            len(self._special) + sum(self.codebook_sizes[:level]) for level in range(len(self.codebook_sizes))
        ]
        kwargs.setdefault("special_tokens_pattern", "none")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            codebook_sizes=self.codebook_sizes,  # into init_kwargs, hence tokenizer_config.json
            pad_token=pad_token,
            bos_token=bos_token,
            eos_token=eos_token,
            sep_token=sep_token,
            **kwargs,
        )
        ids = [self.pad_token_id, self.bos_token_id, self.eos_token_id, self.sep_token_id]
        if ids != [0, 1, 2, 3]:  # a tokenizer_config.json can say otherwise
            raise ValueError(f"the special tokens have the ids 0 to 3; got {ids!s:.80}")

    @property
    def vocab_size(self) -> int:
        """Special tokens and codes (the model rounds its table up to a multiple of 64)."""
        return len(self._special) + sum(self.codebook_sizes)

    def get_vocab(self) -> dict[str, int]:
        return {
            self._convert_id_to_token(index): index for index in range(self.vocab_size)
        } | self._added_tokens_encoder

    def _update_total_vocab_size(self):  # the base class builds the whole vocabulary to count it
        self.total_vocab_size = self.vocab_size + sum(index >= self.vocab_size for index in self._added_tokens_decoder)

    def _tokenize(self, text, **kwargs):
        tokens, end = [], 0
        for match in _TOKEN.finditer(text):
            if text[end : match.start()].strip():
                break
            tokens.append(match.group())
            end = match.end()
        if text[end:].strip():
            raise ValueError(f"not a sequence of semantic-ID tokens such as <a_5><b_17>: {text[end : end + 40]!r}")
        return tokens

    def _convert_token_to_id(self, token):
        if token in self._special:
            return self._special.index(token)
        match = _TOKEN.fullmatch(token)
        level, code = (ord(match[1]) - ord("a"), int(match[2])) if match and match[1] else (-1, -1)
        if not (0 <= level < len(self.codebook_sizes) and 0 <= code < self.codebook_sizes[level]):
            raise ValueError(f"{token!r} lies outside codebooks of {self.codebook_sizes}")
        return self.level_offsets[level] + code

    def _convert_id_to_token(self, index):
        if index < len(self._special):
            return self._special[index]
        for level, (offset, size) in enumerate(zip(self.level_offsets, self.codebook_sizes, strict=True)):
            if index < offset + size:
                return f"<{chr(ord('a') + level)}_{index - offset}>"
        raise ValueError(f"token id {index} lies outside a vocabulary of {self.vocab_size}")

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        return ()


__all__ = ["OneRecTokenizer"]
