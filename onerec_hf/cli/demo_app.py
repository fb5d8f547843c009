"""The demo page: a history in, generated sessions out as lists, with the codes that their semantic IDs share with the history."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.modeling.requests import Recommender, Request, RequestError, known_indices

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

MAX_CHOICES = 20_000
#: The history's column and the sessions' stand beside each other where both have this width, and below each other on a phone.
_COLUMN = 240
# Gradio's page is 32 pixels wider than a small phone's, and a title of one long word wider than that.
_PAGE = """
<style>
.gradio-container {max-width: 1600px !important; min-width: 0 !important}
#history, #sessions, .gradio-container h1, .gradio-container button {overflow-wrap: anywhere}
.gradio-container main, .gradio-container .row {min-width: 0 !important}
@media (max-width: 480px) {.gradio-container main {padding: 8px !important}}
</style>
"""

_STYLE = """
<style>
.onerec-session {border: 1px solid #8884; border-radius: 8px; padding: 8px 14px; margin-bottom: 10px; overflow-wrap: anywhere}
.onerec-session ol {padding-left: 1.4em}
.onerec-session li {margin: 4px 0}
.onerec-score {opacity: .7}
.onerec-code {font-family: monospace; border-radius: 4px; padding: 1px 5px; background: #8882; display: inline-block}
.onerec-shared {background: #2a78; font-weight: bold}
.onerec-fields, .onerec-like {opacity: .7; font-size: 90%}
</style>
"""


@dataclass(frozen=True)
class GeneratedItem:
    """
    Args:
        item_id: as the catalogue has it.
        title: its title, or its id.
        codes: its semantic ID.
        shared: how many of its first codes it shares with the most similar item of the history.
        like: title of that item; None where no code is shared.
        fields: its other fields.
    """

    item_id: Any
    title: str
    codes: list[int]
    shared: int
    like: str | None
    fields: dict[str, Any] = field(default_factory=dict)


class DemoRecommender:
    """
    Sessions with titles and semantic IDs, for the page.

    Args:
        model, processor: as loaded from one folder.
        items: fields by item id.
        title_column: the field with the name of an item; items without one show their id.

    Example:
        >>> recommender = DemoRecommender(model, processor, {"m17": {"title": "Alien"}})  # doctest: +SKIP
        >>> recommender.sessions(["m17"], num_beams=8, session_length=3, count=1)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: OneRecForConditionalGeneration,
        processor: OneRecProcessor,
        items: Mapping[Any, Mapping] | None = None,
        title_column: str = "title",
    ):
        self.recommender = Recommender(model.eval(), processor, items or {})
        self.catalogue, self.title_column = self.recommender.catalogue, title_column

    def title(self, item_id: Any) -> str:
        return str(self._fields(item_id).get(self.title_column, item_id))

    def _fields(self, item_id: Any) -> Mapping:
        assert self.recommender.items is not None
        return self.recommender.items.get(item_id, {})

    def choices(self) -> list[tuple[str, str]]:
        """(label, id as text), by label, of the items, or of the most popular 20,000; items with equal titles are distinguished by their ids."""
        popularity = self.catalogue.popularity
        rows = np.arange(len(self.catalogue)) if popularity is None else np.argsort(-popularity, kind="stable")
        rows = rows[:MAX_CHOICES]
        ids = self.catalogue.ids(rows)
        labels = [self.title(item) for item in ids]
        labels = [
            label if label == str(item) else f"{label}  ({item})" for label, item in zip(labels, ids, strict=True)
        ]
        return sorted(zip(labels, map(str, ids), strict=True))

    def examples(self, count: int = 3, length: int = 3) -> list[list]:
        """
        Histories to begin with: popular items that begin with the same code, so that each history is of one kind.

        Returns:
            Up to `count` lists of `length` ids; fewer in a small catalogue.
        """
        popularity = self.catalogue.popularity
        order = np.arange(len(self.catalogue)) if popularity is None else np.argsort(-popularity, kind="stable")
        order = order[self.catalogue.active[order]]
        kinds: dict[int, list[int]] = {}
        for row in order[:MAX_CHOICES]:
            kinds.setdefault(int(self.catalogue.codes[row, 0]), []).append(int(row))
        found = [rows[:length] for rows in kinds.values() if len(rows) >= length][:count]
        return [self.catalogue.ids(rows) for rows in found or [order[:length].tolist()]]

    @cached_property
    def _titles(self) -> dict[str, list]:
        """Ids by title in small letters, the most popular first."""
        popularity = self.catalogue.popularity
        order = np.arange(len(self.catalogue)) if popularity is None else np.argsort(-popularity, kind="stable")
        found: dict[str, list] = {}
        for item in self.catalogue.ids(order):
            found.setdefault(self.title(item).casefold(), []).append(item)
        return found

    def typed(self, text: str) -> list:
        """
        Item ids of a text: ids or titles, separated by commas, semicolons or lines. Titles may hold commas, and their case does not matter; the
        beginning of a title is enough where only one begins so.

        Raises:
            ValueError: items that the catalogue does not hold, or beginnings of several titles, which are named.
        """
        found = []
        for line in re.split(r"[;\n]", text):
            parts = [part for part in line.split(",") if part.strip()]
            while parts:
                tried = [",".join(parts[:size]).strip() for size in range(len(parts), 0, -1)]
                item = next((item for part in tried if (item := self._named(part)) is not None), None)
                if item is None:
                    item = self._beginning(tried)
                used = len(parts) - tried.index(item[1])
                found.append(item[0])
                parts = parts[used:]
        return found

    def _named(self, text: str) -> tuple[Any, str] | None:
        """The item with this id or title, and the text; None if there is none."""
        item = int(text) if self.catalogue.id_type == "int" and text.removeprefix("-").isdecimal() else text
        if self.catalogue.id_type == "int" and isinstance(item, str):
            known = False
        else:
            known = bool((self.catalogue.indices([item], unknown="mask") >= 0).all())
        if known:
            return item, text
        titled = self._titles.get(text.casefold())
        return None if titled is None else (titled[0], text)

    def _beginning(self, tried: list[str]) -> tuple[Any, str]:
        """
        The item whose title begins with one of the texts, the longest first, and that text.

        Raises:
            ValueError: none, or several.
        """
        for text in tried:
            begin = [title for title in self._titles if title.startswith(text.casefold())]
            if len(begin) == 1:
                return self._titles[begin[0]][0], text
            if begin:
                shown = ", ".join(self.title(self._titles[title][0]) for title in begin[:4])
                more = f" and {len(begin) - 4:,} more" if len(begin) > 4 else ""
                raise ValueError(
                    f"{len(begin):,} titles begin with {text!r}: {shown}{more}. Type more of it, or an id."
                )
        raise ValueError(
            f"{tried[-1]!r} is neither an id nor the beginning of a title among {len(self.catalogue):,} items."
        )

    def ids_of(self, texts: Sequence[str]) -> list:
        """
        Item ids of picked texts.

        Raises:
            ValueError: items that the catalogue does not hold.
        """
        texts = [text.strip() for text in texts if text.strip()]
        integers = self.catalogue.id_type == "int"
        ids = [int(text) if integers and text.removeprefix("-").isdecimal() else text for text in texts]
        try:
            known_indices(self.catalogue, ids, "the history", unknown="error")
        except RequestError as error:
            raise ValueError(error.reason) from None
        return ids

    def sessions(
        self,
        history: list,
        num_beams: int,
        session_length: int,
        count: int,
        exclude_seen: bool = True,
        diversity: float = 0.0,
        user: Mapping[str, Any] | None = None,
    ) -> list[tuple[float, list[GeneratedItem]]]:
        """
        The most probable sessions, or with `diversity` sessions that share few items, best first: log-probability and items.

        Args:
            user: values of the user's features, for a model that reads them.

        Raises:
            ValueError: an empty history, or values of the wrong type.
        """
        if not history:
            raise ValueError("pick or type at least one item: the model continues a history")
        request = Request(
            history,
            top_k=count,
            num_beams=max(num_beams, count),
            session_length=session_length,
            exclude_seen=exclude_seen,
            diversity=diversity,
            unknown="error",
            user=user,
        )
        (answer,) = self.recommender.recommend([request])
        read = answer.request.history
        codes = self.catalogue.codes[self.catalogue.indices(read)]
        return [
            (score, [self._item(item, read, codes) for item in session])
            for session, score in zip(answer.sessions, answer.scores, strict=True)
        ]

    def user_columns(self) -> list[str]:
        """Names of the user features that the model reads."""
        schema = self.recommender.schema
        return [] if schema is None else [feature.name for feature in schema.user]

    @staticmethod
    def user_of(text: str) -> dict[str, Any] | None:
        """
        Values of user features of a JSON object; None of an empty text.

        Raises:
            ValueError: no JSON object.

        Example:
            >>> DemoRecommender.user_of('{"age": 31}'), DemoRecommender.user_of(" ")
            ({'age': 31}, None)
        """
        if not text.strip():
            return None
        try:
            user = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            user = None
        if not isinstance(user, dict):
            raise ValueError('the user is no JSON object: write it as {"age": 31}, or leave it empty')
        return user

    def _item(self, item_id: Any, history: list, history_codes: np.ndarray) -> GeneratedItem:
        codes = np.asarray(self.catalogue.codes[self.catalogue.indices([item_id])[0]])
        shared = (np.asarray(history_codes) == codes).cumprod(1).sum(1)
        nearest = int(shared.argmax())
        like = self.title(history[nearest]) if shared[nearest] else None
        others = {name: value for name, value in self._fields(item_id).items() if name != self.title_column}
        return GeneratedItem(item_id, self.title(item_id), codes.tolist(), int(shared[nearest]), like, others)


def render(sessions: list[tuple[float, list[GeneratedItem]]]) -> str:
    """
    Sessions as HTML. Titles, ids and fields are escaped.

    Example:
        >>> item = GeneratedItem("m1", "<b>Alien</b>", [3, 1], 1, "Aliens & Co")
        >>> "&lt;b&gt;Alien&lt;/b&gt;" in render([(-1.5, [item])])
        True
    """
    parts = [_STYLE]
    for place, (score, items) in enumerate(sessions, start=1):
        rows = []
        for item in items:
            codes = " ".join(
                f'<span class="onerec-code{" onerec-shared" if level < item.shared else ""}">{code}</span>'
                for level, code in enumerate(item.codes)
            )
            like = (
                "" if item.like is None else f' <span class="onerec-like">begins like {html.escape(item.like)}</span>'
            )
            name = html.escape(item.title)
            if item.title != str(item.item_id):
                name += f" <small>{html.escape(str(item.item_id))}</small>"
            fields = html.escape(", ".join(f"{field}: {value}" for field, value in item.fields.items()))
            fields = f'<br><span class="onerec-fields">{fields}</span>' if fields else ""
            rows.append(f"<li>{name}{fields}<br>{codes}{like}</li>")
        parts.append(
            f'<div class="onerec-session"><b>Session {place}</b> <span class="onerec-score">log-probability {score:.2f}</span>'
            f"<ol>{''.join(rows)}</ol></div>"
        )
    return "".join(parts) if sessions else f"{_STYLE}<p>No legal session is left: relax the settings.</p>"


def build_app(recommender: DemoRecommender, examples: Sequence[Sequence] = (), name: str = "OneRec") -> Any:
    """
    The Gradio app.

    Args:
        recommender: answers.
        examples: histories of item ids to pick from, the first of them filled in; by default those of the recommender.
        name: heading, taken as text.

    Returns:
        `gradio.Blocks`; `.launch()` serves it.
    """
    import gradio

    def answer(
        picked: list[str],
        typed: str,
        beams: float,
        length: float,
        count: float,
        diversity: float,
        exclude: bool,
        user: str = "",
    ) -> str:
        try:
            history = recommender.typed(typed or "") or recommender.ids_of(picked or [])
            of_user = recommender.user_of(user or "")
            return render(
                recommender.sessions(history, int(beams), int(length), int(count), exclude, diversity, of_user)
            )
        except ValueError as error:
            return f'<p role="alert">{html.escape(str(error))}</p>'

    choices = recommender.choices()
    known = {value for _, value in choices}
    histories = [
        [str(item) for item in history if str(item) in known] for history in examples or recommender.examples()
    ]
    histories = [history for history in histories if history]
    with gradio.Blocks(title=name) as app:
        gradio.HTML(
            f"{_PAGE}<h1>{html.escape(name)}</h1><p>{len(recommender.catalogue):,} items. Pick or type a history, oldest first.</p>"
        )
        with gradio.Row():
            with gradio.Column(min_width=_COLUMN):
                picked = gradio.Dropdown(
                    choices,
                    value=histories[0] if histories else None,
                    multiselect=True,
                    label="History",
                    elem_id="history",
                )
                typed = gradio.Textbox(label="or type titles or ids, separated by commas", elem_id="typed")
                beams = gradio.Slider(1, 128, value=32, step=1, label="Beams", elem_id="beams")
                length = gradio.Slider(1, 10, value=5, step=1, label="Items of a session", elem_id="length")
                count = gradio.Slider(1, 5, value=3, step=1, label="Sessions", elem_id="count")
                diversity = gradio.Slider(
                    0, 1, value=0, step=0.05, label="Diversity of the sessions", elem_id="diversity"
                )
                exclude = gradio.Checkbox(True, label="Leave out the history's items", elem_id="exclude")
                asked = [f'"{name}": ...' for name in recommender.user_columns()]
                user = gradio.Textbox(label=f"User, as {{{', '.join(asked)}}}", elem_id="user") if asked else None
                button = gradio.Button("Recommend", variant="primary", elem_id="recommend")
            with gradio.Column(min_width=_COLUMN):
                sessions = gradio.HTML(label="Sessions", elem_id="sessions")
        inputs = [picked, typed, beams, length, count, diversity, exclude, *([] if user is None else [user])]
        button.click(answer, inputs, sessions)
        typed.submit(answer, inputs, sessions)
        app.load(answer, inputs, sessions)  # the page opens with the sessions of its first history
        if len(histories) > 1:
            titled = [", ".join(recommender.title(item) for item in recommender.ids_of(row)) for row in histories]
            gradio.Examples([[row] for row in histories], [picked], label="Histories to try", example_labels=titled)
    return app
