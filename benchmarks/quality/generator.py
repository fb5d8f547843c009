"""
What the generator is for (docs/explanation/generator.md): sessions against lists of single items, the decoder's weight beside the item head, items that
join the catalogue after the training, and large catalogues.

    python benchmarks/quality/generator.py --data_dir ../shared/data/amazon_beauty --models FOLDER [FOLDER ...] --work FOLDER \\
        --json benchmarks/results/generator.json

--models are OneRecs with an item head that `onerec-hf train` saved (part `weight`); the other parts train small ones of their own with the recipe, once,
into --work. With --parts the rows of other parts stay in the file of --json. Parts and their rows:

  sessions  the next five items of users: `sessions/WAY/recall_of_five`, `different` (1 - cosine of content, mean over pairs inside a list of five),
            `categories`, `repeats` (items of the history where they are not left out); three sessions: `sessions/diversity-D/different_items` (share, mean
            over pairs), `pairs_above_60`, `loss_second`, `loss_third` (nats), `recall_of_five` of all three; `time_over_off`
  weight    `weight/SHARE/ndcg@10`: SHARE is the decoder's weight over the sum of both; 0 ranks by the head alone, without a decoder. Validation users
  cold      `cold/new|old/head|decoder|both/recall@10`: the next item is one that no model was trained with, or another one
  split     `split/COPIES/head|decoder|both/ndcg@10`: every item split into copies
  size      `size/ITEMS/WAY/cpu_ms` per user and `peak_mib` of `recommend()`, 8 users x 50 beams, random weights in the recipe's size
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/generator.py`

from benchmarks.harness import (
    RECIPES,
    cpu_seconds,
    dataset_options,
    finish,
    interleaved,
    one_thread,
    parser,
    peak_gib,
    ratio_row,
    say,
    train_options,
)
from benchmarks.quality import generator_models as models

PARTS = ("sessions", "weight", "cold", "split", "size")
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0)
SHARES = (0.0, 0.03, 0.1, 0.25, 0.5, 0.75, 1.0)
COPIES = {"1": 1, "8": 8}
SIZES = {"12k": 12_101, "100k": 100_000, "1m": 1_000_000}


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.add_argument("--models", nargs="+", default=[], help="OneRecs with an item head, trained on the data set")
    options.add_argument("--work", help="folder of the models that are trained here; a temporary one by default")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--users", type=int, default=2000)
    return options.parse_args()


class Setting:
    """The data set, the recipe, and what the options say."""

    def __init__(self, options, work: str):
        from benchmarks.quality.runs import parsed
        from onerec_hf.workflows import load_in_memory

        self.config = train_options(options, RECIPES / "amazon_beauty_items.yaml")
        self.small = {**models.SMALL, **(models.QUICK if options.quick else {})}
        self.full = {**models.FULL, **(models.QUICK if options.quick else {})}
        self.data = load_in_memory(parsed(self.config, {})[0])
        self.quick, self.users, self.work = options.quick, 40 if options.quick else options.users, Path(work)
        self.folders = options.models
        if not self.folders and "weight" in options.parts:
            self.folders = [str(self.work / "single")]
            models.train_onerec(self.data, self.config, {**self.small, "session_length": 1}, self.folders[0])


def main() -> None:
    options = arguments()
    one_thread()
    run = {"sessions": session_rows, "weight": weight_rows, "cold": cold_rows, "split": split_rows, "size": size_rows}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        setting = Setting(options, options.work or scratch)
        for part in options.parts:
            rows += run[part](setting)
    if options.json and Path(options.json).exists():
        others = json.loads(Path(options.json).read_text(encoding="utf-8"))["rows"]
        rows += [each for each in others if part_of(each) not in options.parts]
    rows.sort(key=lambda each: PARTS.index(part_of(each)))
    finish(rows, options.json, users=setting.users, protocol=setting.data.split.description)


def part_of(row: dict[str, Any]) -> str:
    """The part that made a row."""
    return row["name"].split("/", 1)[0]


def row(name: str, value: float, unit: str, **more) -> dict[str, Any]:
    from onerec_hf.evaluation.results import result_row

    say(f"{name} {value:.4f}")
    return result_row(name, float(value), unit, **more)


def session_rows(setting: Setting) -> list[dict[str, Any]]:
    held = models.hold_out_last(setting.data, 5, setting.users)
    # As the preset auto trains sessions: the decoder reads a tenth of them, the head counts as much as the codes of one item.
    settings = {**setting.full, "session_length": 5, "session_share": 0.1, "item_head_loss_weight": 5.0}
    folder = str(setting.work / "sessions")
    model, processor = models.train_onerec(held.data, setting.config, settings, folder, content=True)
    sasrec = models.train_sasrec(held.data, setting.data.max_history, setting.quick)
    index, item_ids = model.catalogue.indices, setting.data.item_ids
    targets = np.array([index(items) for items in held.targets])
    histories = held.histories

    def by_sasrec(seen: bool, k: int = 5):
        rows = [np.searchsorted(item_ids, history) for history in histories]
        return np.asarray(index(item_ids[sasrec.rank(rows, k, not seen).ravel()].tolist())).reshape(-1, k)

    def generated(way: str, seen: bool, count: int = 1, **more):
        return models.sessions(model, processor, histories, count, not seen, **models.WAYS[way], **more)

    ways = {
        "session": lambda seen: generated("decoder", seen)[0][:, 0],
        "session_guided": lambda seen: generated("both", seen)[0][:, 0],
        "list_head": lambda seen: models.ranking(model, processor, histories, 5, not seen, **models.WAYS["head"]),
        "list_sasrec": by_sasrec,
    }
    content = _Content(setting.data.items, model.catalogue)
    rows = []
    for name, way in ways.items():
        found = way(False)
        rows.append(row(f"sessions/{name}/recall_of_five", _recall(found, targets), "share"))
        vectors = content.vectors[found]
        cosines = [(vectors[:, i] * vectors[:, j]).sum(-1).mean() for i, j in combinations(range(5), 2)]
        rows.append(row(f"sessions/{name}/different", 1 - float(np.mean(cosines)), "1 - cosine"))
        categories = [len(set(content.categories[items])) for items in found]
        rows.append(row(f"sessions/{name}/categories", float(np.mean(categories)), "of five"))
        seen = [np.isin(items, index(history)).mean() for items, history in zip(way(True), histories, strict=True)]
        rows.append(row(f"sessions/{name}/repeats", float(np.mean(seen)), "share"))
    vectors = content.vectors[targets]
    cosines = [(vectors[:, i] * vectors[:, j]).sum(-1).mean() for i, j in combinations(range(5), 2)]
    rows.append(row("sessions/true/different", 1 - float(np.mean(cosines)), "1 - cosine"))
    categories = float(np.mean([len(set(content.categories[items])) for items in targets]))
    rows.append(row("sessions/true/categories", categories, "of five"))
    ranked = models.ranking(model, processor, histories, 15, **models.WAYS["head"])
    rows.append(row("sessions/list_head_15/recall_of_five", _recall(ranked, targets), "share"))
    rows.append(row("sessions/list_sasrec_15/recall_of_five", _recall(by_sasrec(False, 15), targets), "share"))
    for guided, way in (("", "decoder"), ("guided-", "both")):
        for strength in STRENGTHS:
            name = f"sessions/{guided}diversity-{strength:g}"
            found, scores = generated(way, False, 3, diversity=strength)
            pairs = np.stack([_different(found[:, i], found[:, j]) for i, j in combinations(range(3), 2)], axis=1)
            rows.append(row(f"{name}/different_items", pairs.mean(), "share", spread=_spread(pairs.mean(0))))
            rows.append(row(f"{name}/pairs_above_60", (pairs > 0.599).mean(), "share"))
            rows.append(row(f"{name}/loss_second", (scores[:, 0] - scores[:, 1]).mean(), "nats"))
            rows.append(row(f"{name}/loss_third", (scores[:, 0] - scores[:, 2]).mean(), "nats"))
            rows.append(row(f"{name}/recall_of_five", _recall(found.reshape(len(found), -1), targets), "share"))
    inputs = processor(histories[:8])

    def three(diversity: float):
        return lambda: model.recommend(
            **inputs, session_length=5, num_beams=50, num_return_sequences=3, diversity=diversity
        )

    cpu, _ = interleaved({"on": three(1.0), "off": three(0.0)}, 2 if setting.quick else 9)
    return [*rows, ratio_row("sessions/diversity_time_over_off", cpu, "on", "off")]


def _spread(values) -> list[float]:
    return [float(min(values)), float(max(values))]


def _recall(found: np.ndarray, targets: np.ndarray) -> float:
    """Share of the targets among the items found, the mean over users."""
    return float((found[:, :, None] == targets[:, None]).any(1).mean())


def _different(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(users,) share of the items of one session that the other lacks."""
    return 1 - (one[:, :, None] == other[:, None]).any(2).mean(1)


class _Content:
    """Content vectors and categories in the order of the catalogue."""

    def __init__(self, items, catalogue):
        self.vectors = models.content_of(items, catalogue.item_ids)
        self.categories = items.select(np.asarray(catalogue.item_ids)).frame["categories"].to_numpy()


def weight_rows(setting: Setting) -> list[dict[str, Any]]:
    """All --models; values are means over them."""
    from onerec_hf import OneRecForConditionalGeneration, OneRecProcessor

    examples = setting.data.validation.shuffle(seed=0).select(range(setting.users)).with_format(None)[:]
    measured: dict[tuple[float, str], list[float]] = {}
    for folder in setting.folders:
        loaded: Any = OneRecForConditionalGeneration.from_pretrained(folder)
        model, processor = loaded.eval(), OneRecProcessor.from_pretrained(folder)
        targets = model.catalogue.indices([items[-1] for items in examples["session"]])[:, None]
        for share in SHARES:
            before = cpu_seconds()
            given: dict[str, Any] = {"decoder_weight": share, "item_score_weight": 1 - share}
            ranked = models.ranking(model, processor, examples["history"], **given)
            milliseconds = 1000 * (cpu_seconds() - before) / setting.users
            for name, value in {**_metrics(ranked, targets), "cpu_ms": milliseconds}.items():
                measured.setdefault((share, name), []).append(value)
            say(f"{folder} {share}: {measured[share, 'ndcg@10'][-1]:.4f}")
    units = {"cpu_ms": "ms"}
    return [
        row(f"weight/{share:g}/{name}", statistics.mean(values), units.get(name, "share"), spread=_spread(values))
        for (share, name), values in measured.items()
    ]


def _metrics(ranked: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    from onerec_hf.evaluation.metrics import ndcg_at_k, recall_at_k

    return {"recall@10": float(recall_at_k(ranked, targets, 10)), "ndcg@10": float(ndcg_at_k(ranked, targets, 10))}


def by_each_way(model, processor, histories, **more) -> dict[str, np.ndarray]:
    """(users, 10) rankings by the head alone, the decoder alone, and both."""
    return {name: models.ranking(model, processor, histories, **way, **more) for name, way in models.WAYS.items()}


def cold_rows(setting: Setting) -> list[dict[str, Any]]:
    import torch

    from onerec_hf.semantic_ids import extend_catalogue
    from onerec_hf.semantic_ids.quantizer import Quantizer

    assert setting.data.items is not None
    new_users, old_users, new = models.hold_out_items(setting.data, 0.05, setting.users)
    folder = setting.work / "cold"
    # New items have no behaviour: the semantic IDs are of the contents alone.
    settings = {**setting.full, "session_length": 1, "embedding": "given", "item_head_content": "true"}
    model, processor = models.train_onerec(new_users.data, setting.config, settings, str(folder), content=True)
    quantizer = Quantizer.load(f"{folder}-quantizer.safetensors")
    vectors = np.asarray(setting.data.items.select(new).embeddings, dtype=np.float32)
    catalogue = extend_catalogue(model.catalogue, quantizer, new, vectors)
    content = models.content_of(setting.data.items, new.tolist())
    model.set_catalogue(catalogue, content=dict(zip(new.tolist(), torch.from_numpy(content), strict=True)))
    processor.set_catalogue(catalogue)
    rows = []
    for name, users in (("new", new_users), ("old", old_users)):
        targets = catalogue.indices([items[0] for items in users.targets])[:, None]
        for way, ranked in by_each_way(model, processor, users.histories).items():
            recall = _metrics(ranked, targets)["recall@10"]
            rows.append(row(f"cold/{name}/{way}/recall@10", recall, "share"))
            if name == "new":
                share = (ranked >= len(catalogue) - len(new)).mean()
                rows.append(row(f"cold/new/{way}/new_items", share, "share"))
    chance = 10 / len(new)
    targets = catalogue.indices([items[0] for items in new_users.targets])[:, None]
    for way, ranked in by_each_way(model, processor, new_users.histories, allow=[new.tolist()]).items():
        recall = _metrics(ranked, targets)["recall@10"]
        rows.append(row(f"cold/new_only/{way}/recall@10", recall, "share", against=f"chance {chance:.3f}"))
    return rows


def split_rows(setting: Setting) -> list[dict[str, Any]]:
    from onerec_hf import ItemCatalogue

    base = models.train_onerec(
        *(
            setting.data,
            setting.config,
            {**setting.small, "session_length": 1, "max_steps": 1},
            str(setting.work / "ids"),
        )
    )[0].catalogue
    rows = []
    for name, copies in COPIES.items():
        data = models.split_items(setting.data, copies)
        held = models.hold_out_last(data, 1, setting.users)
        codes = np.repeat(base.codes[base.indices(setting.data.item_ids.tolist())], copies, axis=0)
        sizes = list(base.codebook_sizes)
        if copies > 1:
            codes = np.column_stack([codes, np.tile(np.arange(copies), len(codes) // copies)])
            sizes.append(copies)
        catalogue = ItemCatalogue(data.item_ids.tolist(), codes, sizes)
        settings = {**setting.small, "session_length": 1}
        before = cpu_seconds()
        model, processor = models.train_onerec(
            held.data, setting.config, settings, str(setting.work / f"split{copies}"), catalogue
        )
        rows.append(row(f"split/{name}/train_cpu", cpu_seconds() - before, "s"))
        targets = model.catalogue.indices([items[0] for items in held.targets])[:, None]
        for way, ranked in by_each_way(model, processor, held.histories).items():
            for metric, value in _metrics(ranked, targets).items():
                rows.append(row(f"split/{name}/{way}/{metric}", value, "share"))
    return rows


def size_rows(setting: Setting) -> list[dict[str, Any]]:
    """Each cell in a process of its own."""
    rows, context = [], multiprocessing.get_context("spawn")
    for name, items in SIZES.items():
        with context.Pool(1) as pool:
            measured = pool.apply(measure_size, (items // 100 if setting.quick else items, setting.quick))
        for way, (milliseconds, mebibytes) in measured.items():
            rows.append(
                row(f"size/{name}/{way}/cpu_ms", statistics.median(milliseconds), "ms", spread=_spread(milliseconds))
            )
            rows.append(row(f"size/{name}/{way}/peak_mib", mebibytes, "MiB"))
    return rows


def measure_size(items: int, quick: bool) -> dict[str, tuple[list[float], float]]:
    """Per way of ranking, CPU milliseconds of a user, and the memory of a request above that of the model."""
    one_thread()
    import torch

    from benchmarks.speed.constraint import random_codes
    from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor

    config = OneRecConfig(
        codebook_sizes=[256] * 3, hidden_size=128, intermediate_size=256, encoder_layers=2, decoder_layers=1, num_experts=1,
        encoder_is_causal=True, encoder_attention="pointwise", encoder_pools_items=True, encoder_scales_embeddings=True,
        item_head={"num_items": items, "score_codes": True}, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OneRecForConditionalGeneration(config).eval()
    catalogue = ItemCatalogue(np.arange(items), random_codes(items, 256), [256] * 3)
    model.set_catalogue(catalogue)
    processor = OneRecProcessor.from_catalogue(catalogue)
    histories = np.random.default_rng(1).integers(0, items, (8, 20)).tolist()
    inputs: Any = processor(histories)

    def requests(way: dict[str, Any]):
        return lambda: model.recommend(**inputs, session_length=1, num_beams=50, num_return_sequences=10, **way)

    ways = {name: requests(way) for name, way in models.WAYS.items()}
    peaks = {}
    for name, way in ways.items():
        way()  # builds the trie, which stays
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_gib()
        way()
        peaks[name] = 1024 * (peak_gib() - before)
    cpu, _ = interleaved(ways, 2 if quick else 7)
    return {name: ([1000 * seconds / len(histories) for seconds in cpu[name]], peaks[name]) for name in ways}


if __name__ == "__main__":
    main()
