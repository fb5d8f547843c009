"""Numbers as a report shows them."""

from __future__ import annotations

import numpy as np

from onerec_hf.workflows.verdict import Difference


def number(value: float) -> str:
    """
    A share, as tables show it.

    Example:
        >>> number(0.07264), number(-0.0019), number(1.0)
        ('.0726', '-.0019', '1.0000')
    """
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.4f}"


def signed(difference: Difference) -> str:
    """
    A difference and its standard error.

    Example:
        >>> signed(Difference(0.0026, 0.0011, 500)), signed(Difference(-0.0019, 0.0007, 500))
        ('+.0026 ± .0011', '-.0019 ± .0007')
    """
    return f"{'' if difference.mean < 0 else '+'}{number(difference.mean)} ± {number(difference.error)}"


def spread(values: list[float]) -> str:
    """
    Mean and standard deviation over seeds.

    Example:
        >>> spread([0.07, 0.08]), spread([0.07])
        ('.0750 ± .0071', '.0700')
    """
    return number(float(np.mean(values))) + (f" ± {number(float(np.std(values, ddof=1)))}" if len(values) > 1 else "")


def duration(seconds: float) -> str:
    """
    A time for people.

    Example:
        >>> duration(0.25), duration(42), duration(300), duration(9000)
        ('0.2 s', '42 s', '5.0 min', '2.5 h')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
