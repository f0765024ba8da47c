"""Steady state of a simulation of finite length: its start, its existence and the error of its statistics.

All series are in order of arrival with one value per request. Consecutive requests share a queue, so their values are
correlated: n requests carry less information than n independent values.
"""

import math

import numpy as np
import numpy.typing as npt

from tandem.placement.workload.requests import Floats

Interval = tuple[float, float]

BATCHES = 20
"""Of consecutive requests, the means of which are nearly independent."""
_T_95 = 2.093  # Student's t, 97.5 %, with 19 degrees of freedom: the variance comes from 20 batch means
_MSER_BATCH = 5
_DRIFT_T = 4.0
_DRIFT_GROWTH = 0.25


def warm_up_length(series: Floats) -> int:
    """How many leading values to leave out, by MSER-5 (White, 1997): of the cuts between means of five values, the cut
    that minimises the standard error of the remaining mean. At most half of the series."""
    count = len(series) // _MSER_BATCH
    if count < 4:
        return 0
    means = series[: count * _MSER_BATCH].reshape(count, _MSER_BATCH).mean(axis=1)
    left = np.arange(count, 0, -1)
    sums = np.cumsum(means[::-1])[::-1]
    squares = np.cumsum((means * means)[::-1])[::-1]
    error = np.maximum(0.0, squares / left - (sums / left) ** 2) / left
    return int(np.argmin(error[: count // 2 + 1])) * _MSER_BATCH


def share_interval(hits: npt.NDArray[np.bool_], series: Floats, level: float) -> Interval:
    """95 % interval of the share of `hits` in steady state: Wilson's interval (1927) for a number of independent
    requests, the effective sample size.

    The effective sample size does not depend on `hits`, so more misses never raise an end of the interval, and it is as
    honest for no miss as for many. `series` is what `hits` was derived from: one latency of each request. Its slowest
    requests, the share 1 - `level` of them, stand for misses, as in the estimation of a quantile from correlated values
    (Heidelberger and Lewis, 1984). They come in bursts, with the queue. How much that widens the interval is measured
    by the variance of 20 batch means (Conway, 1963).
    """
    if len(hits) == 0:
        return 0.0, 1.0
    return _wilson(float(hits.mean()), len(hits) / _correlation_factor(_slowest(series, level)))


def difference_interval(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Interval:
    """95 % interval of the share of hits in `first` minus that in `second`, for two runs of the same requests. (-1, 1)
    for fewer than 40 requests."""
    if len(first) < 2 * BATCHES:
        return -1.0, 1.0
    return mean_interval(first.astype(np.float64) - second)


def mean_interval(differences: Floats) -> Interval:
    """95 % interval of the mean of paired differences, in order of arrival, at least 40: Student's t over 20 batch
    means."""
    half = _T_95 * float(_batch_means(differences).std(ddof=1)) / math.sqrt(BATCHES)
    mean = float(differences.mean())
    return mean - half, mean + half


def jackknife_half_width(values: Floats) -> float:
    """Half of the 95 % interval of a statistic, from its values without one of 20 batches after the other."""
    assert len(values) == BATCHES
    return _T_95 * math.sqrt((BATCHES - 1) / BATCHES * float(((values - values.mean()) ** 2).sum()))


def is_drifting(series: Floats) -> bool:
    """Whether a series, in units of its limit, keeps growing: the straight line through the means of 20 batches rises
    by more than 0.25 over the run, the slope is significant (t > 4), and the line exceeds 1 at twice the length of the
    run."""
    if len(series) < 2 * BATCHES:
        return False
    means = _batch_means(series)
    x = np.arange(BATCHES) - (BATCHES - 1) / 2
    slope = float(x @ means / (x @ x))
    growth = slope * (BATCHES - 1)
    residual = means - means.mean() - slope * x
    slope_error = math.sqrt(float(residual @ residual) / (BATCHES - 2) / float(x @ x))
    ends_at = float(means.mean()) + 1.5 * growth
    return growth > _DRIFT_GROWTH and slope > _DRIFT_T * slope_error and ends_at > 1.0


def _slowest(series: Floats, level: float) -> Floats:
    """1 for the slowest requests, a share of 1 - `level` (5 to 50 %) or more if values are equal; 0 for the others."""
    threshold = np.quantile(series, min(max(level, 0.5), 0.95), method="higher")
    slowest: Floats = (series >= threshold).astype(np.float64)
    return slowest


def _batch_means(series: Floats) -> Floats:
    size = len(series) // BATCHES
    means: Floats = series[len(series) - size * BATCHES :].reshape(BATCHES, size).mean(axis=1)
    return means


def _correlation_factor(series: Floats) -> float:
    """Ratio of the variance of the mean to its variance for independent values; at least 1."""
    if len(series) < 2 * BATCHES:
        return 1.0
    variance = float(series.var())
    if variance == 0.0:
        return 1.0
    size = len(series) // BATCHES
    return min(len(series) / 2, max(1.0, size * float(_batch_means(series).var(ddof=1)) / variance))


def _wilson(share: float, independent: float) -> Interval:
    z2 = _T_95 * _T_95 / independent
    centre = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2 * z2 / 4) / (1 + z2)
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # `share` may differ by rounding
