"""What all cards share: templates, text that cannot become markup, and the names of things that a card points to."""

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
    Fills a template and writes it as `folder/README.md`; a card that fails leaves the old one.

    Args:
        template: a file of `templates/`, without its suffix.
        card_data: `huggingface_hub.CardData`, the front matter.
        facts: what the template names; one that it lacks is an error.
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
    A name as one line of Markdown text: nothing in it becomes markup, HTML or a table cell.

    Example:
        >>> plain_text("<b>my_films*")
        '&lt;b&gt;my\\\\_films\\\\*'
    """
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def fenced(text: str, language: str) -> str:
    """
    A code block that ends where it should, whatever backticks the text holds.

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
    A measured number with four decimals; a dash where there was nothing to measure.

    Example:
        >>> number(0.123456), number(float("nan")), number(None)
        ('0.1235', '-', '-')
    """
    return "-" if value is None or value != value else f"{value:.4f}"


def versions() -> str:
    """
    The packages that a card names, with their versions, in one line.

    Example:
        >>> "transformers 5." in versions()
        True
    """
    named = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    return ", ".join([*named, f"python {platform.python_version()}"])


def names(folder: str | os.PathLike, repo_id: str | None) -> dict[str, str]:
    """A card's heading, and the path or Hub id that its snippet loads."""
    if repo_id is None:
        return {"name": Path(folder).resolve().name, "path": str(folder)}
    return {"name": repo_id.split("/")[-1], "path": repo_id}


def hub_id(config: Any) -> str | None:
    """
    The Hub repository that a config was loaded from; None for a new one, one of a folder, and where the cache does not tell: a card names no
    repository that may not exist.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repo = config._name_or_path
    if not repo or os.path.exists(repo):
        return None
    try:
        return repo if isinstance(try_to_load_from_cache(repo, "config.json"), str) else None
    except HFValidationError:  # a folder that is gone
        return None


def origin(config: Any) -> str:
    """The Hub repository that a config was loaded from, or its folder's name; empty for a new one."""
    return hub_id(config) or Path(config._name_or_path or "").name
