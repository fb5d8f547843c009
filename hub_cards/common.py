"""Shared by all cards: templates, escaping of untrusted text, and names of repositories."""

from __future__ import annotations

import html
import importlib.metadata
import os
import platform
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from onerec_hf.modeling.files import replacing

_PACKAGES = ("onerec-hf", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "numpy")


def write_card(folder: str | os.PathLike, template: str, card_data: Any, **facts: Any) -> None:
    """
    Renders a template to `folder/README.md`. On errors an existing card is kept.

    Args:
        template: name of a file in `templates/`, without suffix.
        card_data: `huggingface_hub.CardData`, the front matter.
        facts: variables of the template; a missing one is an error.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"text": plain_text, "python": repr, "fenced": fenced, "number": number}
    card = environment.get_template(template).render(card_data=card_data.to_yaml(), versions=versions(), **facts)
    with replacing(Path(folder) / "README.md") as temporary:
        Path(temporary).write_text(card, encoding="utf-8")


def _template(name: str) -> str:
    return files("onerec_hf.hub_cards").joinpath(f"templates/{name}.md.jinja").read_text(encoding="utf-8")


def plain_text(value: object) -> str:
    """
    Escapes untrusted text to one line of Markdown: no markup, HTML or table cells.

    Example:
        >>> plain_text("<b>my_films*")
        '&lt;b&gt;my\\\\_films\\\\*'
    """
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def fenced(text: str, language: str) -> str:
    """
    A fenced code block that is safe for any backticks in the text.

    Example:
        >>> print(fenced("echo '```'", "sh"))
        ````sh
        echo '```'
        ````
    """
    fence = "`" * (1 + max([2, *(len(run) for run in re.findall("`+", text))]))
    return f"{fence}{language}\n{text}\n{fence}"


def number(value: float | None) -> str:
    """
    A number with four decimals; a dash for None and NaN.

    Example:
        >>> number(0.123456), number(float("nan")), number(None)
        ('0.1235', '-', '-')
    """
    return "-" if value is None or value != value else f"{value:.4f}"


def versions() -> str:
    """
    The versions of the main packages in one line.

    Example:
        >>> "transformers 5." in versions()
        True
    """
    named = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    return ", ".join([*named, f"python {platform.python_version()}"])


def names(folder: str | os.PathLike, repo_id: str | None) -> dict[str, str]:
    """The card's title, and the path or Hub id that its snippet loads."""
    if repo_id is None:
        return {"name": Path(folder).resolve().name, "path": str(folder)}
    return {"name": repo_id.split("/")[-1], "path": repo_id}


def hub_id(config: Any) -> str | None:
    """
    The Hub repository that a config was loaded from. None for new configs, folders, and ids that the cache does not confirm, since a card must
    not name a repository that may not exist.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo = config._name_or_path
    if not repo or os.path.exists(repo):
        return None
    try:
        return repo if isinstance(try_to_load_from_cache(repo, "config.json"), str) else None
    except HFValidationError:  # a deleted folder
        return None


def origin(config: Any) -> str:
    """The Hub repository or folder name that a config was loaded from; empty for a new config."""
    return hub_id(config) or Path(config._name_or_path or "").name
