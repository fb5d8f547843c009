"""Terms of a text for TF-IDF: words and word pairs, and in scripts without spaces between words n-grams of characters."""

from __future__ import annotations

import itertools
import re
import unicodedata

import regex

# Marks (Devanagari vowels, Thai tones, combining accents) and joiners belong to the word around them.
_WORD = regex.compile(r"[\w\p{M}\p{N}\u200c\u200d]+")
# Scripts without spaces between words. A Han character is a word or a part of one, kana are syllables; the others are letters.
_CHINESE_JAPANESE = regex.compile(r"[\p{Han}々〇\p{Hiragana}\p{Katakana}ー]+")
_HAN = regex.compile(r"[\p{Han}々〇]")
_LETTERS = regex.compile(r"(?:[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]\p{M}*)+")
_WITHOUT_SPACES = regex.compile(
    r"[\p{Han}々〇\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\uff00-\uffef]"
)
_ASCII = re.compile(r"\w+", re.ASCII)


def terms(text: str) -> list[str]:
    """
    The terms of a text, in lower case: words of two or more characters and pairs of neighbouring words; in Chinese, Japanese, Thai, Lao, Khmer,
    Burmese and Tibetan n-grams of characters. A text with nothing else has its single characters.

    Example:
        >>> terms("Red lipstick")
        ['red', 'lipstick', 'red lipstick']
        >>> terms("红色 LED")
        ['led', '红', '色', '红色']
        >>> terms("7"), terms("...")
        (['7'], [])
    """
    text = text.lower()
    characters: list[str] = []
    if not text.isascii() and _WITHOUT_SPACES.search(text):
        text = unicodedata.normalize("NFKC", text)  # characters of half and full width
        for run in _CHINESE_JAPANESE.findall(text):
            characters += _HAN.findall(run) if len(run) > 1 else []
            characters += _grams(list(run), (2,))
        for run in _LETTERS.findall(text):
            characters += _grams(regex.findall(r"\X", run), (3, 4))
        text = _WITHOUT_SPACES.sub(" ", text)
    found = _ASCII.findall(text) if text.isascii() else _WORD.findall(text)
    words = [word for word in found if len(word) > 1]
    pairs = [f"{first} {second}" for first, second in itertools.pairwise(words)]
    return [*words, *pairs, *characters] or found


def _grams(characters: list[str], sizes: tuple[int, ...]) -> list[str]:
    """n-grams of characters; a run shorter than all sizes is one."""
    found = (
        "".join(characters[start : start + size]) for size in sizes for start in range(len(characters) - size + 1)
    )
    return list(found) or ["".join(characters)]
