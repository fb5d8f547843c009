"""`onerec-hf export`: a trained generator as two ONNX graphs, compared with the model before they are kept."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onerec_hf.cli.arguments import parse
from onerec_hf.workflows.artefact import load_model, load_processor
from onerec_hf.workflows.distributed import say
from onerec_hf.workflows.run_folder import check_folder, own_folder
from onerec_hf.workflows.settings import OutputSettings

if TYPE_CHECKING:
    import torch

    from onerec_hf.modeling.processing_onerec import OneRecProcessor

TOLERANCE = 1e-3  # of logits, float32 in both


@dataclass
class ExportArguments(OutputSettings):
    """The model to export and the output folder."""

    model: str = field(default="", metadata={"help": "Saved OneRec model: folder or Hub id."})
    output_dir: str = field(default="onerec-onnx", metadata={"help": "Folder for the graphs and the processor."})


def main(argv: list[str]) -> None:
    (args,) = parse((ExportArguments,), argv, "export", required=["--model"])
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError('the export needs onnx, onnxscript and onnxruntime: pip install "onerec-hf[onnx]"') from None
    with (
        own_folder(args.output_dir),
        tempfile.TemporaryDirectory(dir=Path(args.output_dir).absolute().parent) as scratch,
    ):
        folder = check_folder(args.output_dir, args.overwrite)
        processor, model = load_processor("--model", args.model), load_model("--model", args.model)
        differences = export_onnx(model, processor, Path(scratch))
        for path in Path(scratch).iterdir():
            shutil.move(path, folder / path.name)
    for name, difference in differences.items():
        print(f"{name}.onnx: largest difference from the model in onnxruntime {difference:.1e}")
    say(f"saved to {folder}; the catalogue's constraint is not part of the graphs (docs/reference/cli.md#export)")


def export_onnx(model, processor: OneRecProcessor, folder: Path) -> dict[str, float]:
    """
    Writes `encoder.onnx` (`input_ids`, `attention_mask`, and `feature_ids` of a model with features, to `encoder_hidden_states`), `decoder.onnx` (`decoder_input_ids`, the sequence written so far,
    `encoder_hidden_states`, `attention_mask` to `logits` of every position), each with its weights beside it, and the processor with its catalogue.
    With an item head that scores items, `encoder.onnx` has a second output `item_log_probs` (users, items), in the order of the catalogue.
    Numbers of users, history tokens and session tokens are free. Through transformers' ONNX exporter.

    Returns:
        Per graph the largest difference from the model's float32 outputs, on sizes that it was not traced with.

    Raises:
        ValueError: OneRec-V2, or a graph that computes something else.
    """
    if model.config.model_type == "onerec_v2":
        raise ValueError(
            "the model is a OneRec-V2, whose heads depend on a token's place: export writes graphs of OneRec only"
        )
    if model.config.lifelong is not None:
        raise ValueError("the model has a lifelong pathway: export writes graphs of models without one only")
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model = model.eval().float().cpu()
    model.set_experts_implementation("batched_mm")  # the one that has an ONNX form for any number of tokens
    assert processor.catalogue is not None
    items = processor.catalogue.ids(range(min(5, len(processor.catalogue))))
    traced = processor([items[:2], items[:1]], sessions=[items[:2], items[:1]])
    other = processor([items[:3], items[:1], items[:2]], sessions=[items[:1], items[:2], items[:3]])
    auto, differences = torch.export.Dim.AUTO, {}
    for name, graph in (("encoder", encoder_graph(model)), ("decoder", decoder_graph(model))):
        inputs, checked = (_inputs(model, name, batch) for batch in (traced, other))
        shapes = {key: {0: auto, 1: auto} for key in inputs}
        with warnings.catch_warnings(), errors_only("torch.onnx", "transformers", "onnxscript"):
            warnings.simplefilter("ignore")
            exported: Any = OnnxExporter().export(graph.eval(), inputs, config=OnnxConfig(dynamic_shapes=shapes))  # type: ignore[arg-type]
            with torch.no_grad():
                wanted = graph(**checked)
            found = dict(zip(wanted, map(torch.as_tensor, exported(**checked).values()), strict=True))
        differences[name] = max(_difference(found[key], wanted[key]) for key in wanted)
        if not differences[name] < TOLERANCE:
            raise ValueError(f"{name}.onnx differs from the model by {differences[name]:.1e}: it is not kept")
        OnnxExporter.save_program(exported.program, folder / f"{name}.onnx")
    processor.save_pretrained(folder, include_code=False)
    return differences


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    finite = wanted.isfinite()
    return float((found - wanted)[finite].abs().max()) if bool((found.isfinite() == finite).all()) else float("inf")


def _inputs(model, name: str, batch) -> dict[str, torch.Tensor]:
    import torch

    names = ("input_ids", "attention_mask", "feature_ids")
    encoder = {name: batch[name] for name in names if name in batch}
    if name == "encoder":
        return encoder
    with torch.no_grad():
        states = model.get_encoder()(**encoder).last_hidden_state
    return {
        "decoder_input_ids": batch["decoder_input_ids"],
        "encoder_hidden_states": states,
        "attention_mask": batch["attention_mask"],
    }


@contextlib.contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Only errors of these loggers: the exporter's libraries log their progress and missing optional packages."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    try:
        for logger in levels:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def encoder_graph(model) -> Any:
    """The encoder as a module whose outputs have names."""
    import torch

    from onerec_hf.modeling.feature_embedding import positive_places
    from onerec_hf.modeling.item_head import history_states
    from onerec_hf.modeling.layers_onerec import at_places

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.scorer = model.get_encoder(), None
            if model.config.item_head is not None and model.config.item_head.loss_weight:
                trie = model.catalogue.trie
                self.scorer, self.leaves = model.item_scorer(trie), trie.index_to_leaf

        def forward(self, input_ids, attention_mask, feature_ids=None):
            states = self.encoder(input_ids, attention_mask, feature_ids=feature_ids).last_hidden_state
            out = {"encoder_hidden_states": states}
            if self.scorer is not None:
                mask = at_places(attention_mask, model.config.encoder_stride)
                rows = None
                if self.scorer.evidence is not None:
                    rows = self.encoder.item_head.history_rows(input_ids)
                    rows = rows * positive_places(model.config.features, feature_ids)
                scores = self.scorer.log_probs(history_states(out["encoder_hidden_states"], mask), rows)
                scores = scores[:, self.leaves.clamp(min=0)]
                out["item_log_probs"] = scores.masked_fill(self.leaves < 0, float("-inf"))  # retired items
            return out

    return Encoder()


def decoder_graph(model) -> Any:
    """A decoder step without a cache: the sequence so far to the logits of every position."""
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, decoder_input_ids, encoder_hidden_states, attention_mask):
            out = self.model(
                encoder_outputs=(encoder_hidden_states,),
                attention_mask=attention_mask,
                decoder_input_ids=decoder_input_ids,
                use_cache=False,
            )
            return {"logits": out.logits}

    return Decoder()
