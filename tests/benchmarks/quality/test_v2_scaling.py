"""benchmarks/quality/v2_scaling.py finds the curve that points lie on."""

import numpy as np
import pytest

from benchmarks.quality.v2_scaling import fitted

COMPUTE = np.geomspace(10, 10_000, 6)


def test_the_curve_of_exact_points():
    found = fitted(np.stack([COMPUTE, 3.5 + 4 * COMPUTE**-0.4], axis=1))
    # The grid of exponents is 2.3 % fine.
    assert found["exponent"] == pytest.approx(0.4, rel=0.012)
    assert found["floor"] == pytest.approx(3.5, abs=0.02)
    assert found["scale"] == pytest.approx(4, rel=0.03)
    assert found["error"] < 0.003


def test_the_error_is_that_of_the_noise():
    noise = np.random.default_rng(0).normal(scale=0.05, size=6)
    found = fitted(np.stack([COMPUTE, 3.5 + 4 * COMPUTE**-0.4 + noise], axis=1))
    curve = found["floor"] + found["scale"] * COMPUTE ** -found["exponent"]
    assert found["error"] == pytest.approx(np.sqrt(np.mean((curve - (3.5 + 4 * COMPUTE**-0.4 + noise)) ** 2)))
    assert found["error"] < np.sqrt(np.mean(noise**2))
