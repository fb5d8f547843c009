"""Every file that onerec_hf parses, as something to damage: valid seeds, the damage that its format invites, and the call that reads it."""

from __future__ import annotations

from benchmarks.robustness.data_parsers import DATA_PARSERS
from benchmarks.robustness.fuzzing import Parser
from benchmarks.robustness.model_parsers import MODEL_PARSERS
from benchmarks.robustness.semantic_id_parsers import SEMANTIC_ID_PARSERS

PARSERS: dict[str, Parser] = {parser.name: parser for parser in (*DATA_PARSERS, *SEMANTIC_ID_PARSERS, *MODEL_PARSERS)}
