"""Griffe extension for the reference: our docstrings, which follow transformers' habits, as mkdocstrings reads them."""

from __future__ import annotations

import re
from typing import Any

import griffe


def readable(text: str) -> str:
    """
    A docstring whose examples are code blocks and whose references are code.

    Example:
        >>> readable("Makes a [`Session`], see [`~onerec_hf.data.windows`].\\n\\nExample:\\n    >>> 1 + 1\\n    2")
        'Makes a `Session`, see `onerec_hf.data.windows`.\\n\\nExamples:\\n    >>> 1 + 1\\n    2'
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return re.sub(r"\[`~?([\w.]+)`\](?![\[(])", r"`\1`", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
