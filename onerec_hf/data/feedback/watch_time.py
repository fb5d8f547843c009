"""Watch time as a duration-aware label in [0, 1]: the rank among impressions of videos of similar duration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onerec_hf.data.columns import DataError


@dataclass(frozen=True, eq=False)
class WatchTimeScale:
    """
    The rank of a play time among training impressions of videos of similar duration.

    The paper (arXiv 2502.18965, section 3.3) does not say how session watch time becomes a label. Here, as in OneRec-V2's duration-aware reward
    (arXiv 2508.20900), a video of d seconds falls into the bucket `floor(log_base(d))`, and a play time t gets its mid-rank among the training
    impressions of that bucket: the share of shorter play times plus half the share of equal ones. The mean over training impressions is 1/2 by
    construction. Unknown durations (0) form a separate bucket, durations below one second use the bucket of one second, and an
    unseen bucket uses the nearest one.

    Args:
        base: ratio of the longest to the shortest duration of a bucket.
        buckets: (B,) int64 bucket numbers of the training data, sorted; unknown durations have -1.
        play_times: the sorted float64 training play times of each bucket.

    Example:
        >>> scale = WatchTimeScale.fit(play_ms=[0, 2000, 2000, 9000, 50_000], duration_ms=[10_000] * 4 + [60_000])
        >>> scale(play_ms=[0, 2000, 5000, 60_000], duration_ms=[10_000] * 4).tolist()
        [0.125, 0.5, 0.75, 1.0]
    """

    base: float
    buckets: np.ndarray
    play_times: list[np.ndarray]

    @classmethod
    def fit(cls, play_ms, duration_ms, base: float = 2.0) -> WatchTimeScale:
        """
        Fits the scale on training impressions.

        Args:
            play_ms, duration_ms: (N,) milliseconds, finite and not negative.

        Raises:
            DataError: no rows, or values that are negative or not finite (with their number and the first).
        """
        if base <= 1:
            raise ValueError(f"base must be larger than 1; got {base}")
        play, duration = milliseconds(play_ms, "play time"), milliseconds(duration_ms, "duration")
        if not len(play):
            raise DataError("watch time: no training impressions to rank play times among. Change the split.")
        bucket = duration_bucket(duration, base)
        buckets = np.unique(bucket)
        return cls(base, buckets, [np.sort(play[bucket == number]) for number in buckets])

    def __call__(self, play_ms, duration_ms) -> np.ndarray:
        """(N,) float64 in [0, 1]. Raises the errors of `fit`."""
        play, duration = milliseconds(play_ms, "play time"), milliseconds(duration_ms, "duration")
        bucket = duration_bucket(duration, self.base)
        nearest = np.abs(bucket[:, None] - self.buckets).argmin(1)
        rank = np.empty(len(play))
        for number in np.unique(nearest):
            times, here = self.play_times[number], nearest == number
            below, upto = (np.searchsorted(times, play[here], side) for side in ("left", "right"))
            rank[here] = (below + upto) / (2 * len(times))
        return rank


def duration_bucket(duration_ms: np.ndarray, base: float) -> np.ndarray:
    """(N,) int64 bucket of each duration, -1 where it is unknown."""
    seconds = np.maximum(duration_ms / 1000, 1.0)
    return np.where(duration_ms > 0, np.floor(np.log(seconds) / np.log(base) + 1e-9), -1).astype(np.int64)


def milliseconds(values, what: str) -> np.ndarray:
    """
    (N,) float64.

    Raises:
        DataError: values that are negative or not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    bad = ~(np.isfinite(values) & (values >= 0))
    if bad.any():
        raise DataError(
            f"watch time: {bad.sum():,} of {len(values):,} values of {what} are negative or not finite (first: row {int(bad.argmax())}, "
            f"{values[bad.argmax()].item()!r}). Drop these rows, or set an unknown duration to 0."
        )
    return values
