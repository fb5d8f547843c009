"""Facts about the experts for cards: active parameters, and the load of each expert in training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from onerec_hf.modeling.files import replacing
from onerec_hf.modeling.layers_onerec import OneRecSparseMoeBlock

if TYPE_CHECKING:
    from onerec_hf.modeling.modeling_onerec import OneRecForConditionalGeneration

EXPERT_LOAD_NAME = "expert_load.png"


def parameter_counts(model: OneRecForConditionalGeneration) -> tuple[int, int]:
    """
    Total parameters, and active parameters per token (only the routed experts of each layer).

    Example:
        >>> from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
        >>> sizes = dict(codebook_sizes=[4, 4], hidden_size=8, moe_intermediate_size=2, encoder_layers=1, decoder_layers=1)
        >>> total, active = parameter_counts(OneRecForConditionalGeneration(OneRecConfig(num_experts=4, **sizes)))
        >>> total - active == 2 * 3 * 8 * 2  # two of four experts are inactive, three matrices of 8 x 2 each
        True
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(
        parameter.numel()
        for block in model.modules()
        if isinstance(block, OneRecSparseMoeBlock)
        for parameter in block.experts.parameters()
    )
    share = model.config.num_experts_per_tok / model.config.num_experts if experts else 1.0
    return total, total - round(experts * (1 - share))


def load_over_mean(tokens_per_expert: Any) -> np.ndarray:
    """
    (layers, experts) float64 load of each expert, relative to the mean of its layer.

    Example:
        >>> load_over_mean([[30, 10], [20, 20]]).tolist()
        [[1.5, 0.5], [1.0, 1.0]]
    """
    counts = np.asarray(tokens_per_expert, dtype=np.float64)
    return counts / counts.mean(1, keepdims=True)


def plot_expert_load(tokens_per_expert: Any, path: str | os.PathLike) -> bool:
    """
    Plots the relative load of every expert as a PNG, one panel per decoder layer.

    Returns:
        False, without writing a file, if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    load = load_over_mean(tokens_per_expert)
    figure = Figure(figsize=(6, 1 + 1.1 * len(load)), layout="constrained")
    for layer, axes in enumerate(figure.subplots(len(load), 1, sharex=True, squeeze=False)[:, 0]):
        axes.bar(range(load.shape[1]), load[layer])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.axes[0].set_title("expert load relative to the layer's mean", fontsize=9)
    figure.axes[-1].set_xlabel("expert", fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True
