"""
Equality up to rounding, for two computations of the same number that add in a different order.

Kernels differ between machines (AVX2, AVX-512, AMX; one thread or four; oneDNN or MKL), and so does the order in which they add.
A sum of n terms in floating point is off by at most n · ε/2 times the sum of its terms' magnitudes, whatever the order. Two such sums
differ by at most n · ε of that magnitude. An absolute tolerance ignores the magnitude: 5e-5 is 420 ε for a loss of 1 and 78 ε for a
gradient norm of 5.36. Tests therefore say how many additions one result has behind it (`terms`), and the tolerance is
`terms · ε · scale`, where `scale` is the largest magnitude among the compared numbers, because an entry close to zero is the
difference of terms as large as its neighbours. Pass `scale` where all of the results are smaller than what they were summed from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

# The tests' tiny models: sums of at most 64 terms (widths, vocabularies), about 16 of them one after another from embedding to loss.
FORWARD = 64 * 16
# The backward pass has a sum for each of the forward, over positions too.
BACKWARD = 2 * FORWARD
# bfloat16 sums in float32 and rounds what it stores: about once per product that follows another.
ROUNDED = 4
# One reduction over a small tensor: a mean, a norm, a dot product.
REDUCTION = 64


def close(wanted: Any, terms: int = FORWARD, scale: float | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """
    What compares equal to every number (list, dict, array) within the rounding of `terms` additions of `wanted`'s magnitude.

    Example:
        >>> 5.3601 == close(5.36), 5.364 == close(5.36)
        (True, False)
        >>> [1e-4, 10.0] == close([0.0, 10.0])  # zero is 10 - 10 here
        True
    """
    if scale is None:
        scale = _magnitude(list(wanted.values()) if isinstance(wanted, dict) else wanted)
    return pytest.approx(wanted, rel=0, abs=terms * torch.finfo(dtype).eps * scale, nan_ok=True)


def assert_close(
    got: torch.Tensor | list | dict[str, torch.Tensor],
    wanted: torch.Tensor | list | dict[str, torch.Tensor],
    terms: int = FORWARD,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    msg: str = "",
) -> None:
    """
    `torch.testing.assert_close` within the rounding of `terms` additions of `wanted`'s magnitude, in the coarser of both dtypes
    or in the `dtype` that was computed in.
    Of a dict of tensors (weights, gradients), the magnitude is the largest of all: some gradients are zero but for rounding.

    Example:
        >>> assert_close(torch.tensor([1e-4, 10.0]), torch.tensor([0.0, 10.0]))

    Raises:
        AssertionError: the tensors differ by more, or in shape, or the dicts in their names.
    """
    got, wanted = (value if isinstance(value, dict) else {msg: torch.as_tensor(value)} for value in (got, wanted))
    assert got.keys() == wanted.keys()
    if scale is None:
        scale = max(_magnitude(value.detach().double().cpu().numpy()) for value in wanted.values())
    for name, value in wanted.items():
        floats = [
            each for each in (dtype, got[name].dtype, value.dtype) if each is not None and each.is_floating_point
        ]
        atol = terms * max((torch.finfo(each).eps for each in floats), default=0.0) * scale
        torch.testing.assert_close(
            got[name].detach().double(),
            value.detach().double(),
            atol=atol,
            rtol=0,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """
    The Euclidean distance between two models' weights.

    Compares trainings with Adam: relative to the distance from the start. Adam divides each gradient by its own size, so that the
    rounding of a gradient close to zero can move one weight by a whole learning rate, and a tolerance for every weight means nothing.

    Example:
        >>> distance({"w": torch.zeros(2)}, {"w": torch.tensor([3.0, 4.0])})
        5.0

    Raises:
        AssertionError: the models have different weights.
    """
    assert one.keys() == other.keys()
    squares = [
        float((value.detach().double() - other[name].detach().double()).square().sum()) for name, value in one.items()
    ]
    return sum(squares) ** 0.5


def _magnitude(numbers: Any) -> float:
    magnitudes = np.abs(np.asarray(numbers, dtype=np.float64))
    return float(np.max(magnitudes, initial=0.0, where=np.isfinite(magnitudes)))
