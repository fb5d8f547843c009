"""The demo: a history goes in, generated sessions come out as lists, with what their semantic IDs share with the history."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration
    from onerec_hf.modeling.processing_onerec import OneRecProcessor

MAX_CHOICES = 20_000

_STYLE = """
<style>
.onerec-session {border: 1px solid #8884; border-radius: 8px; padding: 8px 14px; margin-bottom: 10px}
.onerec-session li {margin: 4px 0}
.onerec-score {opacity: .7}
.onerec-code {font-family: monospace; border-radius: 4px; padding: 1px 5px; background: #8882}
.onerec-shared {background: #2a78; font-weight: bold}
.onerec-like {opacity: .7; font-size: 90%}
</style>
"""


@dataclass(frozen=True)
class GeneratedItem:
    """
    Args:
        item_id: as the catalogue has it.
        title: what is shown for it.
        codes: its semantic ID.
        shared: how many of its first codes it shares with the item of the history that is most like it.
        like: title of that item; None where no code is shared.
    """

    item_id: Any
    title: str
    codes: list[int]
    shared: int
    like: str | None


class Recommender:
    """
    A model, its processor and titles, as the demo asks them.

    Args:
        model, processor: as loaded from one folder.
        titles: item id -> title; ids are shown where there is none.

    Example:
        >>> recommender = Recommender(model, processor, {"m17": "Alien"})  # doctest: +SKIP
        >>> recommender.sessions(["m17"], num_beams=8, session_length=3, count=1)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: OneRecForConditionalGeneration,
        processor: OneRecProcessor,
        titles: Mapping[Any, str] | None = None,
    ):
        self.model, self.processor, self.titles = model.eval(), processor, dict(titles or {})
        assert processor.catalogue is not None
        self.catalogue = processor.catalogue

    def title(self, item_id: Any) -> str:
        return str(self.titles.get(item_id, item_id))

    def choices(self) -> list[tuple[str, str]]:
        """(label, id as text), by label, of the items, or of the most popular 20,000; two items of one title are told apart by their ids."""
        popularity = self.catalogue.popularity
        rows = np.arange(len(self.catalogue)) if popularity is None else np.argsort(-popularity, kind="stable")
        rows = rows[:MAX_CHOICES]
        ids = self.catalogue.ids(rows)
        labels = [self.title(item) for item in ids]
        labels = [
            label if label == str(item) else f"{label}  ({item})" for label, item in zip(labels, ids, strict=True)
        ]
        return sorted(zip(labels, map(str, ids), strict=True))

    def ids_of(self, texts: Sequence[str]) -> list:
        """
        Item ids from what was picked or typed.

        Raises:
            ValueError: an item that the catalogue lacks, by name.
        """
        texts = [text.strip() for text in texts if text.strip()]
        integers = self.catalogue.id_type == "int"
        unknown = [text for text in texts if integers and not text.lstrip("-").isdigit()]
        ids: list = [] if unknown else [int(text) if integers else text for text in texts]
        if ids:
            rows = self.catalogue.rows(ids, unknown="mask")
            unknown = [text for text, row in zip(texts, rows, strict=True) if row < 0]
        if unknown:
            raise ValueError(
                f"not in this model's catalogue of {len(self.catalogue):,} items: {', '.join(unknown[:5])}"
            )
        return ids

    def sessions(
        self, history: list, num_beams: int, session_length: int, count: int, exclude_seen: bool = True
    ) -> list[tuple[float, list[GeneratedItem]]]:
        """
        The most probable sessions, best first: log-probability and items.

        Raises:
            ValueError: an empty history.
        """
        if not history:
            raise ValueError("pick or type at least one item: the model continues a history")
        beams = max(num_beams, count)
        out: Any = self.model.recommend(
            **self.processor([history]),
            num_beams=beams,
            num_return_sequences=count,
            session_length=session_length,
            exclude=[history] if exclude_seen else None,
            return_dict_in_generate=True,
        )
        read = history if self.processor.max_history is None else history[-self.processor.max_history :]
        codes = self.catalogue.codes[self.catalogue.rows(read)]
        return [
            (score, [self._item(item, read, codes) for item in session])
            for session, score in zip(
                self.processor.batch_decode(out.sequences), out.sequences_scores.tolist(), strict=True
            )
            if session
        ]

    def _item(self, item_id: Any, history: list, history_codes: np.ndarray) -> GeneratedItem:
        codes = np.asarray(self.catalogue.codes[self.catalogue.rows([item_id])[0]])
        shared = (np.asarray(history_codes) == codes).cumprod(1).sum(1)
        nearest = int(shared.argmax())
        like = self.title(history[nearest]) if shared[nearest] else None
        return GeneratedItem(item_id, self.title(item_id), codes.tolist(), int(shared[nearest]), like)


def render(sessions: list[tuple[float, list[GeneratedItem]]]) -> str:
    """
    Sessions as HTML; whatever stands in a title or an id is text.

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
            rows.append(f"<li>{name}<br>{codes}{like}</li>")
        parts.append(
            f'<div class="onerec-session"><b>Session {place}</b> <span class="onerec-score">log-probability {score:.2f}</span>'
            f"<ol>{''.join(rows)}</ol></div>"
        )
    return "".join(parts) if sessions else f"{_STYLE}<p>No legal session is left: loosen the settings.</p>"


def build_app(recommender: Recommender, examples: Sequence[Sequence] = (), name: str = "OneRec") -> Any:
    """
    The Gradio app.

    Args:
        recommender: answers.
        examples: histories of item ids to pick from.
        name: heading, taken as text.

    Returns:
        `gradio.Blocks`; `.launch()` serves it.
    """
    import gradio

    def answer(picked: list[str], typed: str, beams: float, length: float, count: float, exclude: bool) -> str:
        try:
            history = recommender.ids_of([*(picked or []), *(typed or "").replace("\n", ",").split(",")])
            return render(recommender.sessions(history, int(beams), int(length), int(count), exclude))
        except ValueError as error:
            return f'<p role="alert">{html.escape(str(error))}</p>'

    choices = recommender.choices()
    with gradio.Blocks(title=name) as app:
        gradio.HTML(
            f"<h1>{html.escape(name)}</h1><p>{len(recommender.catalogue):,} items. Pick or type a history, oldest first.</p>"
        )
        with gradio.Row():
            with gradio.Column():
                picked = gradio.Dropdown(choices, multiselect=True, label="History", elem_id="history")
                typed = gradio.Textbox(label="or item ids, separated by commas", elem_id="typed")
                beams = gradio.Slider(1, 128, value=32, step=1, label="Beams", elem_id="beams")
                length = gradio.Slider(1, 10, value=5, step=1, label="Items of a session", elem_id="length")
                count = gradio.Slider(1, 5, value=3, step=1, label="Sessions", elem_id="count")
                exclude = gradio.Checkbox(True, label="Leave out the history's items", elem_id="exclude")
                button = gradio.Button("Recommend", variant="primary", elem_id="recommend")
            sessions = gradio.HTML(label="Sessions", elem_id="sessions")
        inputs = [picked, typed, beams, length, count, exclude]
        button.click(answer, inputs, sessions)
        typed.submit(answer, inputs, sessions)
        if examples:
            known = {value for _, value in choices}
            rows = [[[str(item) for item in history if str(item) in known]] for history in examples]
            gradio.Examples([row for row in rows if row[0]], [picked], label="Histories to try")
    return app
