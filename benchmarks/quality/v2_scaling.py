"""
Loss over FLOPs of OneRec-V2's lazy decoder and of an encoder-decoder of as many layers, at several widths, with a fitted curve: the form of the scaling
figure of arXiv 2508.20900, at sizes for a CPU.

    python benchmarks/quality/v2_scaling.py --dataset amazon-beauty --data_dir ../shared/data/amazon_beauty \\
        --json benchmarks/results/v2_scaling.json --plot docs/images/v2_scaling.png

Models, data and loss are those of `benchmarks/quality/v2.py`; all train for the same steps, with a learning rate that falls with the root of the
width. Rows `KIND-WIDTH/loss` and `/flops` (of a target with a full history, forward and backward pass), and of the curve
loss = floor + scale * (GFLOP of the training) ^ -exponent `KIND/floor`, `KIND/scale`, `KIND/exponent` and `KIND/error` (root mean square, nats). With as
many parameters as three, five sizes leave two degrees of freedom: the curve describes them and extrapolates little.
"""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `python benchmarks/quality/v2_scaling.py`

from benchmarks.harness import dataset_options, finish, one_thread, parser, say
from benchmarks.quality.v2 import KINDS, loaded, trained

BATCH, AT_WIDTH = 128, 64
LABELS = {"encoder_decoder": "encoder-decoder", "lazy": "lazy decoder"}


def arguments():
    options = parser(__doc__)
    dataset_options(options)
    options.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192])
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--steps", type=int, default=600, help=f"of {BATCH} examples")
    options.add_argument("--learning_rate", type=float, default=3e-3, help=f"at width {AT_WIDTH}")
    options.add_argument("--users", type=int, default=4000, help="validation users")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--plot", help="file for the figure")
    return options.parse_args()


def main() -> None:
    options = arguments()
    one_thread()
    if options.quick:
        options.widths, options.steps, options.users = [16, 32, 48, 64], 3, 50
    from onerec_hf.evaluation.results import result_row

    data, processor, users = loaded(options)
    rate, rows, points = options.learning_rate, [], {kind: [] for kind in KINDS}
    for width in options.widths:
        options.width, options.learning_rate = width, rate * math.sqrt(AT_WIDTH / width)
        for kind in KINDS:
            runs = [trained(kind, options, data, processor, users, seed) for seed in options.seeds]
            say(f"{kind}-{width}: {runs}")
            for metric, unit in {"loss": "nats", "flops": "FLOP"}.items():
                values = [run[metric] for run in runs]
                name = f"{kind}-{width}/{metric}"
                rows.append(result_row(name, statistics.mean(values), unit, spread=[min(values), max(values)]))
            loss = statistics.mean(run["loss"] for run in runs)
            points[kind].append((runs[0]["flops"] * options.steps * BATCH / 1e9, loss))
    curves = {kind: fitted(np.array(found)) for kind, found in points.items()}
    for kind, curve in curves.items():
        rows += [
            result_row(f"{kind}/{name}", value, "nats" if name != "exponent" else "") for name, value in curve.items()
        ]
    if options.plot:
        plot(points, curves, Path(options.plot))
    finish(rows, options.json, steps=options.steps, layers=options.layers, seeds=options.seeds, learning_rate=rate)


def fitted(points: np.ndarray) -> dict[str, float]:
    """
    floor, scale and exponent of loss = floor + scale * GFLOP ^ -exponent by least squares, and the root mean square error.

    Args:
        points: (sizes, 2) GFLOP and loss.
    """
    compute, losses = points.T
    best: dict[str, float] = {"error": math.inf}
    for exponent in np.geomspace(0.02, 2, 200):  # for an exponent the curve is linear in the other two
        terms = np.stack([np.ones_like(compute), compute**-exponent], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(terms, losses, rcond=None)
        error = float(np.sqrt(np.mean((terms @ [floor, scale] - losses) ** 2)))
        if error < best["error"]:
            best = {"floor": float(floor), "scale": float(scale), "exponent": float(exponent), "error": error}
    return best


def plot(points: dict[str, list[tuple[float, float]]], curves: dict[str, dict[str, float]], path: Path) -> None:
    """Loss over the FLOPs of a training: a point for each size, and the curves."""
    import matplotlib.pyplot as plt

    made, axis = plt.subplots(figsize=(5, 3.4))
    for kind, found in points.items():
        compute, losses = np.array(found).T
        (drawn,) = axis.plot(compute * 1e9, losses, "o", label=LABELS[kind])
        curve, along = curves[kind], np.geomspace(compute.min(), compute.max(), 100)
        fit = curve["floor"] + curve["scale"] * along ** -curve["exponent"]
        axis.plot(along * 1e9, fit, color=drawn.get_color(), linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("FLOPs of the training")
    axis.set_ylabel("loss of a code of the next item, nats")
    axis.legend()
    made.tight_layout()
    made.savefig(path, dpi=120)
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
