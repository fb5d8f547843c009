"""Hook of the site: tables of all options from the parsers, the repository's address, and a build that fails on a broken link or picture."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

OPTIONS_PAGE = "reference/options.md"
SECOND_WORDS = {"semantic-ids": ("fit", "report")}


def on_config(config: Any) -> None:
    """Links the repository that the site is built from: `ONEREC_HF_REPOSITORY`, or the clone's origin if that is a web address."""
    address = os.environ.get("ONEREC_HF_REPOSITORY")
    if address is None:
        asked = subprocess.run(
            ["git", "remote", "get-url", "origin"],
            cwd=Path(config.config_file_path).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        address = asked.stdout.strip()
    if address.startswith(("http://", "https://")):
        config.repo_url = address.removesuffix(".git")


def on_files(files: Any, config: Any) -> None:
    """Adds the page of options."""
    files.append(File.generated(config, OPTIONS_PAGE, content=options_page()))


def on_post_build(config: Any) -> None:
    """Fails on links and pictures that lead nowhere."""
    if broken := broken_links(Path(config.site_dir)):
        raise PluginError(f"{len(broken)} broken links:\n" + "\n".join(f"  {page}: {link}" for page, link in broken))


def options_page() -> str:
    """Markdown: the options of every command with types and defaults."""
    from onerec_hf.cli.help import markdown
    from onerec_hf.cli.main import COMMANDS

    parts = [
        "# All options",
        "",
        "Made from the parsers. `--help` prints the same. `--config FILE.yaml` reads options from a file. Options of "
        "[`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) that are rarely needed "
        "are not listed; all of them are taken.",
    ]
    for command, about in COMMANDS.items():
        for words in [[command, second] for second in SECOND_WORDS.get(command, ())] or [[command]]:
            parts += ["", f"## {' '.join(words)}", "", f"{about[0].upper()}{about[1:]}.", "", markdown(groups(words))]
    return "\n".join(parts) + "\n"


def groups(words: list[str]) -> list[Any]:
    """The options of a command in groups, without the rarer ones of transformers."""
    from onerec_hf.cli.help import MORE, groups_of, trainer_groups

    found: list[Any] = []

    def capture(dataclasses: tuple[type, ...], *others: Any) -> None:
        found.extend(groups_of(dataclasses))
        raise SystemExit

    command = importlib.import_module(f"onerec_hf.cli.{words[0].replace('-', '_')}")
    if words == ["train"]:
        found = [*groups_of(command.KINDS), *trainer_groups()]
    else:
        with mock.patch("onerec_hf.cli.arguments.print_help", capture), contextlib.suppress(SystemExit):
            command.main([*words[1:], "--help"])
    return [group for group in found if group.title != MORE]


class _Page(HTMLParser):
    """Links and anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and (name == "id" or (tag, name) == ("a", "name")):
                self.anchors.add(value)


def broken_links(site: Path) -> list[tuple[str, str]]:
    """
    Links inside a built site to files or anchors that it does not hold: (page, link).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.html").write_text('<a href="b.html">b</a> <img src="c.png"> <a href="#top" id="top">a</a>')
        ...     broken_links(Path(folder))
        [('a.html', 'b.html'), ('a.html', 'c.png')]
    """
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path
            if parts.path:
                start = site if parts.path.startswith("/") else path.parent
                target = Path(os.path.normpath(start / unquote(parts.path).lstrip("/")))
            anchor = unquote(parts.fragment)
            lost = anchor and target in pages and anchor not in pages[target].anchors
            if not target.is_file() or lost:  # a folder opens as a listing where no server looks for its index
                broken.append((path.relative_to(site).as_posix(), link))
    return broken
