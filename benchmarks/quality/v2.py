"""
The loss of OneRec-V2's lazy decoder against that of an encoder-decoder of as many layers (half of them in the encoder), trained on the same targets
for the same steps: the losses of table 2 of arXiv 2508.20900, at a size for a CPU.

    python benchmarks/quality/v2.py --dataset amazon-beauty --data_dir ../shared/data/amazon_beauty --steps 600 \\
        --add benchmarks/results/v2.json --json benchmarks/results/v2.json

Both are dense, read one position per history item, and train on windows with one target. `loss` is nats per code of a validation user's next item,
each code scored among those of its level; mean over users, then over seeds. Rows: `KIND/loss`, `KIND/flops` (forward and backward pass of a target
with a full history, as `plan` computes them), `KIND/cpu_seconds` of the training, and `lazy_loss_minus_encoder_decoder`, the difference of the
losses (spread: the smallest and the largest difference of a seed). With `--equal_flops` also `lazy_equal_flops/...`: a lazy decoder that trains
for as many FLOPs, in more steps.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/v2.py`

from benchmarks.harness import cpu_seconds, dataset_options, finish, one_thread, parser, say, train_options

KINDS = ("encoder_decoder", "lazy")
EQUAL = "lazy_equal_flops"


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.add_argument("--width", type=int, default=64)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--steps", type=int, default=1000, help="of 128 examples")
    options.add_argument("--learning_rate", type=float, default=3e-3)
    options.add_argument("--users", type=int, default=4000, help="validation users")
    options.add_argument("--equal_flops", action="store_true", help="train a lazy one for the other's FLOPs, too")
    options.add_argument("--add", help="file of benchmarks/speed/v2.py, whose rows are written, too")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return options.parse_args()


def make(kind: str, codebook_sizes: list[int], width: int, layers: int):
    """An untrained model of a kind."""
    from onerec_hf import (
        OneRecConfig,
        OneRecForConditionalGeneration,
        OneRecV2Config,
        OneRecV2ForConditionalGeneration,
    )

    shared: dict[str, Any] = {
        "codebook_sizes": codebook_sizes,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": max(1, width // 16),
        "num_experts": 1,
        "session_length": 1,
        "encoder_pools_items": True,
        "decoder_scales_embeddings": True,  # without it most of the loss is that of the second and third code
    }
    if kind == "lazy":
        return OneRecV2ForConditionalGeneration(OneRecV2Config(decoder_layers=layers, **shared))
    config = OneRecConfig(
        encoder_layers=layers // 2, decoder_layers=layers // 2, encoder_scales_embeddings=True, **shared
    )
    return OneRecForConditionalGeneration(config)


def loaded(options) -> tuple[Any, Any, Any]:
    """The data on windows of one target, the processor of its semantic IDs, and a sample of validation users."""
    from benchmarks.quality.runs import parsed, with_windows
    from onerec_hf.modeling.processing_onerec import OneRecProcessor
    from onerec_hf.workflows import load_in_memory
    from onerec_hf.workflows.semantic_ids import fit_catalogue

    shared: dict[str, Any] = {"session_length": 1, **({"kmeans_iterations": 4} if options.quick else {})}
    data_args, id_args, *_ = parsed(train_options(options), shared)
    data = with_windows(load_in_memory(data_args), data_args, "windows")
    catalogue = fit_catalogue(data, id_args).catalogue
    processor = OneRecProcessor.from_catalogue(catalogue, max_history=data_args.max_history)
    users = data.split.validation.shuffle(seed=0).select(range(options.users))
    return data, processor, users


def code_loss(model, processor, examples) -> float:
    """Nats per code, among the codes of its level."""
    import torch

    total, codes, model = 0.0, 0, model.eval()
    for start in range(0, len(examples), 256):
        some = examples.with_format(None)[start : start + 256]
        batch = processor(some["history"], sessions=some["session"])
        with torch.no_grad():
            logits = model(**batch).logits
        for level, (offset, size) in enumerate(
            zip(model.config.level_offsets, model.config.codebook_sizes, strict=True)
        ):
            scores = logits[:, level, offset : offset + size].float().log_softmax(-1)
            total -= float(scores.gather(-1, batch["labels"][:, level, None] - offset).sum())
            codes += len(scores)
    return total / codes


def trained(kind: str, options, data, processor, users, seed: int, steps: int | None = None) -> dict[str, float]:
    """The loss of one training, and its CPU seconds; `options.steps` long unless `steps` are given."""
    from transformers import set_seed

    from onerec_hf.planning import Batch
    from onerec_hf.planning.compute import step_flops
    from onerec_hf.trainers import OneRecTrainer, OneRecTrainingArguments

    steps = options.steps if steps is None else steps
    set_seed(seed)
    model = make(kind, processor.catalogue.codebook_sizes, options.width, options.layers)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        args = OneRecTrainingArguments(
            scratch,
            max_steps=steps,
            per_device_train_batch_size=128,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, steps // 4),
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        )
        trainer = OneRecTrainer(model, args, train_dataset=data.split.train, processing_class=processor)
        before = cpu_seconds()
        trainer.train()
        seconds = cpu_seconds() - before
    history = processor.max_history or 1
    flops = step_flops(model.config, Batch(users=1, history=history, session=1))
    return {"loss": code_loss(model, processor, users), "cpu_seconds": seconds, "flops": flops}


def main() -> None:
    options = arguments()
    one_thread()
    if options.quick:
        options.width, options.steps, options.users, options.seeds = 16, 5, 50, [0]
    from onerec_hf.evaluation.results import result_row

    data, processor, users = loaded(options)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed in options.seeds:
        for kind in KINDS:
            runs[kind].append(trained(kind, options, data, processor, users, seed))
            say(f"{kind}, seed {seed}: {runs[kind][-1]}")
        if options.equal_flops:
            other, lazy = (runs[kind][-1]["flops"] for kind in KINDS)
            steps = int(options.steps * other / lazy)
            runs.setdefault(EQUAL, []).append(trained("lazy", options, data, processor, users, seed, steps))
            say(f"{EQUAL}, {steps} steps, seed {seed}: {runs[EQUAL][-1]}")
    rows = []
    for kind, found in runs.items():
        for metric, unit in {"loss": "nats", "flops": "FLOP", "cpu_seconds": "s"}.items():
            values = [run[metric] for run in found]
            rows.append(
                result_row(f"{kind}/{metric}", statistics.mean(values), unit, spread=[min(values), max(values)])
            )
    differences = [lazy["loss"] - other["loss"] for other, lazy in zip(*(runs[kind] for kind in KINDS), strict=True)]
    mean, spread = statistics.mean(differences), [min(differences), max(differences)]
    rows.append(result_row("lazy_loss_minus_encoder_decoder", mean, "nats", against="encoder_decoder", spread=spread))
    others: dict[str, Any] = {}
    if options.add:
        kept = json.loads(Path(options.add).read_text())
        rows = [row for row in kept["rows"] if row["name"] not in {mine["name"] for mine in rows}] + rows
        others = {name: value for name, value in kept.items() if name in ("width", "layers")}
    mine = {name: getattr(options, name) for name in ("steps", "width", "layers", "seeds")}
    finish(rows, options.json, **others, loss=mine)


if __name__ == "__main__":
    main()
