"""What the whole suite shares: no hub, quiet libraries, a tiny catalogue and model."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are tiny: on a busy machine a second thread that waits for a core costs a hundred times what it gains.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import transformers

import onerec_hf
from onerec_hf import ItemCatalogue, OneRecConfig, OneRecForConditionalGeneration, OneRecProcessor

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def make_catalogue(num_items: int = 40, codebook_sizes=(4, 5, 6), seed: int = 0) -> ItemCatalogue:
    """Random distinct semantic IDs for the items "m0", "m1", ..."""
    rng = np.random.default_rng(seed)
    flat = rng.choice(int(np.prod(codebook_sizes)), num_items, replace=False)
    codes = np.stack(np.unravel_index(flat, codebook_sizes), axis=1)
    return ItemCatalogue([f"m{i}" for i in range(num_items)], codes, codebook_sizes)


def make_model(catalogue: ItemCatalogue, seed: int = 0, **config) -> OneRecForConditionalGeneration:
    """A tiny generator in eval mode, with weights large enough that its choices are clear."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 4,
        "initializer_range": 0.2,
        "session_length": 2,
        "dropout_rate": 0.0,
    }
    torch.manual_seed(seed)
    model = OneRecForConditionalGeneration(
        OneRecConfig(codebook_sizes=catalogue.codebook_sizes, **{**settings, **config})
    )
    model.set_catalogue(catalogue)
    return model.eval()


@pytest.fixture(scope="session")
def data_folder():
    """The folder of real data sets."""
    folder = Path(os.environ.get("ONEREC_HF_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent (set ONEREC_HF_DATA)")
    return folder


@pytest.fixture
def catalogue() -> ItemCatalogue:
    return make_catalogue()


@pytest.fixture
def processor(catalogue) -> OneRecProcessor:
    return OneRecProcessor.from_catalogue(catalogue, max_history=10)


@pytest.fixture
def model(catalogue) -> OneRecForConditionalGeneration:
    return make_model(catalogue)


@pytest.fixture
def batch(processor):
    """Two users, histories of unequal length, sessions of unequal length."""
    return processor([["m1", "m2", "m3"], ["m5"]], sessions=[["m4", "m6"], ["m7"]])


assert onerec_hf.__version__
