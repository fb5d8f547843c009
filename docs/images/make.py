"""
The pictures of the documentation, drawn as SVG: `python docs/images/make.py` writes them into this folder.

Every picture has a light panel behind it, so that it reads the same on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif"
INK, MUTED, LINE = "#1f2937", "#5b6573", "#8a94a6"
PLAIN, BLUE, GREEN, AMBER, ROSE = "#ffffff", "#e0e7ff", "#d5f2e8", "#fdecc8", "#fde0e4"
EMPTY = "#eef1f5"
EDGE = {PLAIN: "#b6bfcd", BLUE: "#6172d6", GREEN: "#2f9a78", AMBER: "#c98a1e", ROSE: "#cf5a6c"}


class Picture:
    """Boxes, labels and arrows on a panel of the given size; `title` is the text for screen readers."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, size: int = 14, anchor: str = "middle", **style: str) -> None:
        attributes = {"fill": INK, **{name.replace("_", "-"): value for name, value in style.items()}}
        given = " ".join(f'{name}="{value}"' for name, value in attributes.items())
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" {given}>{escape(text)}</text>'
        )

    def note(self, x: float, y: float, text: str, anchor: str = "middle", size: int = 12) -> None:
        self.text(x, y, text, size, anchor, fill=MUTED)

    def rect(self, x: float, y: float, w: float, h: float, fill: str = PLAIN, radius: int = 8, dash: str = "") -> None:
        edge = EDGE.get(fill, LINE)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" fill="{fill}" stroke="{edge}"'
            f' stroke-width="1.4"{dashes}/>'
        )

    def box(
        self, x: float, y: float, w: float, h: float, lines: Sequence[str], fill: str = PLAIN, size: int = 14
    ) -> None:
        """A box whose first line is its name, in bold; the others are smaller."""
        self.rect(x, y, w, h, fill)
        step = size + 4
        top = y + h / 2 - step * (len(lines) - 1) / 2 + size * 0.35
        for number, line in enumerate(lines):
            if number:
                self.text(x + w / 2, top + number * step, line, size - 2, fill=MUTED)
            else:
                self.text(x + w / 2, top, line, size, font_weight="600")

    def line(self, *points: tuple[float, float], arrow: bool = True, dash: str = "", color: str = LINE) -> None:
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        extra = (' marker-end="url(#tip)"' if arrow else "") + (f' stroke-dasharray="{dash}"' if dash else "")
        self.parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6"{extra}/>')

    def tokens(self, x: float, y: float, texts: Sequence[str], fills: Sequence[str], w: float = 34) -> None:
        """A row of token cells."""
        for number, (text, fill) in enumerate(zip(texts, fills, strict=True)):
            self.rect(x + number * w, y, w - 3, 26, fill, radius=5)
            self.text(x + number * w + (w - 3) / 2, y + 17.5, text, 11)

    def svg(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
            f' height="{self.height}" role="img" font-family="{FONT}">\n'
            f"<title>{escape(self.title)}</title>\n"
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
            f' orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="{LINE}"/></marker></defs>\n'
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="12" fill="#f8fafc"'
            ' stroke="#d8dee8"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def overview() -> Picture:
    picture = Picture(900, 330, "From tables to recommended sessions, and the alignment loop")
    picture.box(24, 50, 150, 84, ["Your tables", "interactions", "items (optional)"])
    picture.box(224, 50, 170, 84, ["Semantic IDs", "balanced residual", "k-means, unique codes"], AMBER)
    picture.box(444, 50, 190, 84, ["OneRec", "encoder reads the history,", "MoE decoder writes codes"], BLUE)
    picture.box(684, 50, 190, 84, ["Session", "items of the catalogue,", "scores, titles"], GREEN)
    for x in (174, 394, 634):
        picture.line((x, 92), (x + 48, 92))
    picture.box(684, 186, 190, 62, ["Reward model", "scores whole sessions"], ROSE)
    picture.box(444, 186, 190, 62, ["DPO", "best and worst session"], ROSE)
    picture.line((779, 134), (779, 184))
    picture.line((684, 217), (636, 217))
    picture.line((539, 186), (539, 136))
    picture.note(552, 165, "iterative alignment", "start")
    picture.rect(24, 272, 850, 38, PLAIN, dash="5 4")
    picture.text(449, 296, "One folder = one Hub repository: weights, processor, catalogue, titles, model card", 14)
    return picture


def model() -> Picture:
    picture = Picture(900, 520, "OneRec: an encoder over the history and a decoder with experts that writes a session")
    item, other = [ROSE, AMBER, AMBER, AMBER], [ROSE, GREEN, GREEN, GREEN]
    # Encoder.
    picture.text(220, 34, "Encoder", 16, font_weight="600")
    picture.rect(60, 50, 320, 280, BLUE)
    picture.note(220, 72, "encoder_layers times")
    picture.box(90, 110, 260, 56, ["Feed-forward (SwiGLU)"])
    picture.box(90, 218, 260, 56, ["Self-attention", "fully visible, rotary positions"])
    picture.line((220, 218), (220, 168))
    picture.note(220, 318, "RMSNorm before every block")
    picture.line((220, 392), (220, 332))
    picture.tokens(70, 394, ["SEP", "a 5", "b 17", "c 2", "SEP", "a 5", "b 3", "c 9"], item + other, 38)
    picture.note(146, 440, "Toy Story")
    picture.note(298, 440, "Star Wars")
    picture.note(220, 462, "history, oldest item first")
    # Decoder.
    picture.text(650, 34, "Decoder", 16, font_weight="600")
    picture.rect(470, 50, 360, 280, BLUE)
    picture.note(650, 72, "decoder_layers times")
    picture.rect(500, 84, 300, 84)
    picture.text(650, 104, "Experts: 2 of 24 per token", 14, font_weight="600")
    for number in range(12):
        picture.rect(514 + number * 23, 116, 17, 17, GREEN if number in (3, 8) else PLAIN, radius=4)
    picture.note(650, 156, "router: softmax gate + balancing bias")
    picture.box(500, 192, 300, 46, ["Cross-attention", "to the encoded history"])
    picture.box(500, 262, 300, 46, ["Causal self-attention"])
    picture.line((650, 262), (650, 240))
    picture.line((650, 192), (650, 170))
    picture.line((650, 392), (650, 332))
    picture.line((380, 215), (498, 215))
    picture.note(425, 206, "keys, values")
    picture.tokens(500, 394, ["BOS", "a 5", "b 17", "c 8", "BOS", "a 1", "b 4", "c 0"], item + other, 38)
    picture.note(576, 440, "item 1 of the session")
    picture.note(728, 440, "item 2")
    picture.note(650, 462, "each position predicts the next code;")
    picture.note(650, 480, "the constraint leaves only codes of catalogue items")
    picture.note(220, 500, "one item = a separator and its codes, coarse to fine")
    return picture


def semantic_ids() -> Picture:
    picture = Picture(900, 400, "Semantic IDs as a tree: items are leaves, codes are branches")
    picture.text(24, 52, "all items", 13, "start", fill=MUTED)
    picture.text(24, 142, "level 1", 13, "start", fill=MUTED)
    picture.text(24, 232, "level 2", 13, "start", fill=MUTED)
    picture.text(24, 322, "level 3 = item", 13, "start", fill=MUTED)
    picture.box(455, 30, 120, 36, ["catalogue"])
    level1 = [(230, "<a_0>"), (515, "<a_1>"), (780, "<a_2>")]
    level2 = [
        (165, 0, "<b_0>"),
        (290, 0, "<b_1>"),
        (440, 1, "<b_0>"),
        (590, 1, "<b_2>"),
        (720, 2, "<b_0>"),
        (835, 2, "<b_3>"),
    ]
    chosen1, chosen2 = 1, 3
    for number, (x, name) in enumerate(level1):
        picked = number == chosen1
        picture.line((515, 66), (x, 118), arrow=False, color=EDGE[BLUE] if picked else LINE)
        picture.box(x - 38, 118, 76, 34, [name], BLUE if picked else PLAIN, 13)
    for number, (x, parent, name) in enumerate(level2):
        picked = number == chosen2
        picture.line((level1[parent][0], 152), (x, 208), arrow=False, color=EDGE[BLUE] if picked else LINE)
        picture.box(x - 38, 208, 76, 34, [name], BLUE if picked else PLAIN, 13)
    leaves = [
        (405, 2, "<c_1>", "Alien"),
        (475, 2, "<c_4>", "Brazil"),
        (555, 3, "<c_0>", "Star Wars"),
        (640, 3, "<c_2>", "Empire"),
    ]
    for x, parent, name, title in leaves:
        picked = title == "Empire"
        picture.line((level2[parent][0], 242), (x, 298), arrow=False, color=EDGE[BLUE] if picked else LINE)
        picture.box(x - 32, 298, 64, 32, [name], GREEN if picked else PLAIN, 12)
        picture.note(x, 348, title)
    for x, parent in ((150, 0), (180, 0), (275, 1), (305, 1), (705, 4), (735, 4), (820, 5), (850, 5)):
        picture.line((level2[parent][0], 242), (x, 296), arrow=False)
        picture.rect(x - 9, 296, 18, 18, PLAIN, radius=4)
    picture.note(
        450,
        382,
        "<a_1><b_2><c_2> names one item. Sibling items are similar; every level-1 code holds equally many items.",
    )
    return picture


def alignment() -> Picture:
    picture = Picture(900, 380, "Iterative preference alignment")
    picture.box(30, 40, 180, 70, ["Histories", "of the training data"])
    picture.box(270, 40, 200, 70, ["Generator", "the policy"], BLUE)
    picture.box(540, 40, 330, 70, ["Candidate sessions", "N per history, by beam search or sampling"], GREEN)
    picture.box(620, 160, 250, 70, ["Reward model", "watch time, views, likes, ..."], ROSE)
    picture.box(330, 160, 230, 70, ["Pairs", "chosen = best, rejected = worst"], AMBER)
    picture.box(30, 160, 240, 70, ["Loss", "next tokens + λ · DPO on a share r"], PLAIN)
    picture.line((210, 75), (268, 75))
    picture.line((470, 75), (538, 75))
    picture.line((745, 110), (745, 158))
    picture.line((620, 195), (562, 195))
    picture.line((330, 195), (272, 195))
    picture.line((150, 160), (150, 135), (330, 135), (330, 112))
    picture.note(240, 129, "gradient step")
    picture.box(270, 280, 290, 60, ["Reference = last snapshot", "renewed at every iteration"], PLAIN)
    picture.line((268, 310), (110, 310), (110, 232))
    picture.note(180, 302, "log-ratio")
    picture.box(620, 280, 250, 60, ["Held-out reward model", "held out, only evaluates"], PLAIN)
    picture.line((872, 75), (886, 75), (886, 310), (872, 310), dash="5 4")
    return picture


def request() -> Picture:
    picture = Picture(900, 400, "The path of a request, the same for pipeline, command line, server and demo")
    entries = ["pipeline(...)", "onerec-hf recommend", "onerec-hf serve", "onerec-hf demo"]
    for number, name in enumerate(entries):
        picture.box(24, 36 + number * 56, 180, 42, [name], size=13)
        picture.line((204, 57 + number * 56), (258, 57 + number * 56))
    picture.box(
        260,
        36,
        190,
        210,
        [
            "Request",
            "history, newest items kept",
            "unknown ids: skip or error",
            "exclude, allow",
            "top_k, session length",
        ],
        AMBER,
    )
    picture.line((450, 81), (498, 81))
    picture.box(500, 36, 160, 90, ["Processor", "item ids to tokens"], PLAIN)
    picture.box(500, 156, 160, 90, ["Encoder", "once per history"], BLUE)
    picture.line((580, 126), (580, 154))
    picture.line((660, 201), (706, 201))
    picture.box(708, 156, 168, 90, ["Beam search", "decoder, code by code"], BLUE)
    picture.box(708, 36, 168, 90, ["Constraint", "trie of the catalogue,", "minus excluded items"], GREEN)
    picture.line((792, 126), (792, 154))
    picture.line((792, 246), (792, 294))
    picture.box(500, 296, 376, 74, ["Answer", "items or sessions, log-probabilities, titles"], GREEN)
    picture.line((500, 333), (114, 333), (114, 250))
    picture.note(305, 326, "back to the caller")
    return picture


def rooms() -> Picture:
    picture = Picture(900, 400, "The rooms of the library; imports point downwards only")
    layers: list[tuple[str, list[tuple[str, str]], str]] = [
        ("command line", [("cli", "parse, call, print")], PLAIN),
        ("steps", [("workflows", "table to artefact, in Python")], PLAIN),
        ("training", [("trainers", "NTP, reward, DPO"), ("hub_cards", "cards of artefacts")], AMBER),
        ("measuring", [("evaluation", "metrics, full ranking"), ("baselines", "SASRec, HSTU, kNN, ...")], ROSE),
        (
            "parts",
            [
                ("data", "tables to examples"),
                ("semantic_ids", "embeddings to codes"),
                ("planning", "memory, FLOPs"),
                ("serving", "HTTP"),
            ],
            GREEN,
        ),
        ("model", [("modeling", "config, model, processor, catalogue, generation: travels to the Hub")], BLUE),
    ]
    for row, (label, rooms_of_layer, fill) in enumerate(layers):
        y = 24 + row * 61
        picture.note(20, y + 27, label, "start")
        width = (760 - 14 * (len(rooms_of_layer) - 1)) / len(rooms_of_layer)
        for column, (name, what) in enumerate(rooms_of_layer):
            picture.box(116 + column * (width + 14), y, width, 44, [name, what], fill, 13)
        if row:
            picture.line((496, y - 16), (496, y - 2))
    return picture


def data() -> Picture:
    picture = Picture(900, 330, "One user's items become training windows, a validation target and a test target")
    names = [f"i{number}" for number in range(1, 10)]
    picture.note(24, 56, "user's items", "start")
    fills = [BLUE] * 7 + [AMBER, ROSE]
    picture.tokens(170, 38, names, fills, 64)
    picture.note(394, 86, "training")
    picture.note(649, 86, "validation")
    picture.note(713, 86, "test")
    rows = [("window 1", 1, 3), ("window 2", 2, 3), ("window 3", 3, 3)]
    for number, (label, history, session) in enumerate(rows):
        y = 112 + number * 40
        picture.note(24, y + 18, label, "start")
        picture.tokens(170, y, names[:history], [PLAIN] * history, 64)
        picture.tokens(170 + history * 64, y, names[history : history + session], [GREEN] * session, 64)
    picture.note(24, 250, "test example", "start")
    picture.tokens(170, 232, names[:8], [PLAIN] * 8, 64)
    picture.tokens(170 + 8 * 64, 232, names[8:], [ROSE], 64)
    picture.rect(170, 286, 16, 16, PLAIN, radius=4)
    picture.note(194, 299, "history: input of the encoder", "start")
    picture.rect(430, 286, 16, 16, GREEN, radius=4)
    picture.note(454, 299, "session: target of the decoder", "start")
    return picture


def packing() -> Picture:
    picture = Picture(900, 280, "Three ways to feed the same targets: padded windows, packed windows, prefixes")
    picture.text(24, 40, "windows, padded", 13, "start", font_weight="600")
    for row, history in enumerate((1, 2, 3, 4)):
        y = 54 + row * 30
        picture.tokens(24, y, [f"i{n + 1}" for n in range(history)], [PLAIN] * history, 34)
        picture.tokens(24 + history * 34, y, [f"i{history + 1}"], [GREEN], 34)
        picture.tokens(24 + (history + 1) * 34, y, ["·"] * (4 - history), [EMPTY] * (4 - history), 34)
    picture.text(250, 40, "windows, packed", 13, "start", font_weight="600")
    x = 250
    for row, part in enumerate(((1, 2), (3,), (4,))):
        x = 250
        for history in part:
            picture.tokens(x, 54 + row * 30, [f"i{n + 1}" for n in range(history)], [PLAIN] * history, 34)
            picture.tokens(x + history * 34, 54 + row * 30, [f"i{history + 1}"], [GREEN], 34)
            x += (history + 1) * 34 + 8
    picture.text(560, 40, "prefixes, causal encoder", 13, "start", font_weight="600")
    picture.tokens(560, 54, ["i1", "i2", "i3", "i4"], [PLAIN] * 4, 60)
    for number in range(4):
        picture.tokens(560 + number * 60, 112, [f"i{number + 2}"], [GREEN], 60)
        picture.line((588 + number * 60, 82), (588 + number * 60, 110))
    picture.note(24, 205, "one row per target", "start")
    picture.note(250, 205, "no padding; examples do not see", "start")
    picture.note(250, 222, "each other", "start")
    picture.note(560, 205, "one history serves all its targets; target k sees", "start")
    picture.note(560, 222, "the first k items only", "start")
    picture.rect(24, 238, 16, 16, PLAIN, radius=4)
    picture.note(48, 251, "encoder input", "start")
    picture.rect(170, 238, 16, 16, GREEN, radius=4)
    picture.note(194, 251, "target", "start")
    picture.rect(270, 238, 16, 16, EMPTY, radius=4)
    picture.note(294, 251, "padding", "start")
    return picture


def shards() -> Picture:
    picture = Picture(900, 280, "Preparing a log beyond memory: buckets of users, shards of examples, streams")
    picture.box(24, 84, 140, 90, ["Log", "Parquet, CSV, ...", "any size"])
    for number in range(3):
        picture.box(230, 30 + number * 74, 150, 56, [f"bucket {number + 1}", "users by hash of id"], AMBER, 13)
        picture.line((164, 129), (228, 58 + number * 74))
    for number in range(3):
        picture.box(450, 30 + number * 74, 170, 56, [f"train shard {number + 1}", "examples, shuffled"], GREEN, 13)
    for left in range(3):
        for right in range(3):
            picture.line((380, 58 + left * 74), (448, 58 + right * 74))
    for number, name in enumerate(("rank 0, worker 0", "rank 0, worker 1", "rank 1, worker 0")):
        picture.box(700, 30 + number * 74, 176, 56, [name, "streams its shards"], BLUE, 13)
        picture.line((620, 58 + number * 74), (698, 58 + number * 74))
    picture.note(305, 262, "in memory: one bucket at a time")
    picture.note(788, 262, "in memory: a shuffle buffer")
    return picture


def strategies() -> Picture:
    picture = Picture(900, 322, "What each GPU holds under DDP, FSDP, FSDP with expert parallelism, and HSDP")
    names = ["ddp", "fsdp", "fsdp+ep", "hsdp"]
    notes = [
        ("all weights, gradients,", "optimizer on every GPU"),
        ("a slice of everything;", "layers gathered when used"),
        ("a slice of everything;", "tokens travel to the experts"),
        ("slices inside a machine;", "machines are replicas"),
    ]
    for column, (name, lines) in enumerate(zip(names, notes, strict=True)):
        x = 24 + column * 218
        picture.text(x + 98, 40, name, 15, font_weight="600")
        for gpu in range(4):
            left, top = x + (gpu % 2) * 102, 58 + (gpu // 2) * 82
            picture.rect(left, top, 94, 72)
            picture.note(left + 47, top + 14, f"GPU {gpu}", size=10)
            for part in range(4):
                held = {"ddp": True, "hsdp": part // 2 == gpu % 2}.get(name, part == gpu)
                picture.rect(left + 7 + part * 20.5, top + 22, 19, 20, BLUE if held else EMPTY, radius=3)
                picture.rect(left + 7 + part * 20.5, top + 45, 19, 20, GREEN if held else EMPTY, radius=3)
        for number, line in enumerate(lines):
            picture.note(x + 98, 240 + number * 18, line)
    picture.rect(24, 284, 16, 16, BLUE, radius=4)
    picture.note(48, 297, "attention, embeddings, encoder", "start")
    picture.rect(260, 284, 16, 16, GREEN, radius=4)
    picture.note(284, 297, "experts", "start")
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "overview": overview,
    "model": model,
    "semantic-ids": semantic_ids,
    "alignment": alignment,
    "request": request,
    "rooms": rooms,
    "data": data,
    "packing": packing,
    "shards": shards,
    "strategies": strategies,
}


def main() -> None:
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
