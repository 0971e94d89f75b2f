"""Loops over the numbers of a minibatch that PyTorch would make a dozen passes over (CPU, float32).

Each computes values and gradients at once and writes them where it is told. What they compute is
defined in `likelihoods` and `sparse`; tests hold both equal. They are compiled at the first call
and kept on disk, as every package that uses numba does.
"""

# Loops write to few arrays each, without branches: the compiler then uses vector instructions.

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import intrinsic
from threadpoolctl import ThreadpoolController
from torch import Tensor

PART: dict[str, Any] = {
    "error_model": "numpy",  # a division by 0 is infinite
    "fastmath": {"contract", "nsz", "arcp", "afn"},  # all but another order of operations
}
OPTIONS = {
    **PART, "parallel": True, "cache": True,
    "nogil": True,  # threads ask for the GIL at their first `np.dot`, and the caller waits for them
}  # fmt: skip

_one_at_a_time = threading.Lock()  # some of numba's threading layers need it


@cache
def _blas() -> ThreadpoolController:
    """Return what sets how many threads numba's `np.dot` has of its own."""
    import scipy.linalg.cython_blas  # noqa: F401 (what it calls; to be found it must be loaded)

    return ThreadpoolController().select(user_api="blas")


f32, i32, u32 = np.float32, np.int32, np.uint32


def run(kernel: Callable[..., None], *arguments: Any) -> None:
    """Call a kernel on tensors, which it may write to, with as many threads as PyTorch has."""
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = torch.get_num_threads()
    multiplies = kernel is scaled_bernoulli
    # The limit is set where it is made, and remembers the one before it: inside the lock.
    with _one_at_a_time, _blas().limit(limits=1) if multiplies else nullcontext():
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        kernel(*arrays)
        if torch.get_num_threads() != threads:  # numba sets it when it starts its own
            torch.set_num_threads(threads)


# -- elementary functions, of single precision ----------------------------------------------------


@intrinsic
def _as_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@intrinsic
def _as_bits(context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@njit(inline="always", error_model="numpy")
def _exp(x):
    """Return e^x for x at most 0, cut off at -87, by Cephes' polynomial: relative error 1e-7."""
    x = f32(-87.0) if x < f32(-87.0) else x  # `max` would lose what is not a number
    shifted = x * f32(1.44269504) + f32(1.5 * 2**23)  # its last bits are a whole number
    k = shifted - f32(1.5 * 2**23)
    rest = x - k * f32(0.693359375) + k * f32(2.12194440e-4)
    p = f32(1.9875691500e-4) * rest + f32(1.3981999507e-3)
    p = p * rest + f32(8.3334519073e-3)
    p = p * rest + f32(4.1665795894e-2)
    p = p * rest + f32(1.6666665459e-1)
    p = p * rest + f32(5.0000001201e-1)
    power = _as_float((_as_bits(shifted) << i32(23)) + i32(0x3F800000))
    return (p * rest * rest + rest + f32(1)) * power


@njit(inline="always", error_model="numpy")
def _log(x):
    """Return log x of a normal number above 0, by Cephes' polynomial: relative error 1e-7."""
    bits = _as_bits(x)
    exponent = (bits - i32(0x3F3504F3)) >> i32(23)
    m = _as_float(bits - (exponent << i32(23))) - f32(1)
    p = f32(7.0376836292e-2) * m + f32(-1.1514610310e-1)
    p = p * m + f32(1.1676998740e-1)
    p = p * m + f32(-1.2420140846e-1)
    p = p * m + f32(1.4249322787e-1)
    p = p * m + f32(-1.6668057665e-1)
    p = p * m + f32(2.0000714765e-1)
    p = p * m + f32(-2.4999993993e-1)
    p = p * m + f32(3.3333331174e-1)
    square, k = m * m, f32(exponent)
    tail = p * m * square + k * f32(-2.12194440e-4) - f32(0.5) * square
    return m + tail + k * f32(0.693359375)


@njit(inline="always", error_model="numpy")
def _log1p(x):
    """Return log(1 + x) for x > -1, exact where x is small."""
    y = f32(1) + x
    return _log(y) + (x - (y - f32(1))) / y


@njit(fastmath=True, error_model="numpy")
def _sum(values):
    total = 0.0
    for start in range(0, values.size, 4096):  # in double precision from here on
        some, part = values[start : start + 4096], f32(0)
        for i in range(some.size):  # a view's size: with other bounds there are no vectors
            part += some[i]
        total += part
    return total


@njit(fastmath=True, error_model="numpy")
def _dot(values, weights):
    total = f32(0)
    for i in range(values.size):
        total += values[i] * weights[i]
    return total


@njit(**PART)
def _largest(values):
    lanes, largest = np.full(64, f32(-np.inf)), f32(-np.inf)
    for start in range(0, values.size - 63, 64):
        some = values[start : start + 64]
        for i in range(64):  # a vector of largest ones; one alone would be slow
            lanes[i] = some[i] if some[i] > lanes[i] else lanes[i]
    for value in lanes:
        largest = value if value > largest else largest
    for value in values[values.size - values.size % 64 :]:
        largest = value if value > largest else largest
    return largest


# -- binomial coefficients ------------------------------------------------------------------------


@njit(error_model="numpy")
def _log_gamma(y):
    """Return log Gamma(y) for y > 0 by Stirling's series, up to 8 steps up, in double precision."""
    rising = 1.0
    while y < 8:
        rising *= y
        y += 1
    inverse = 1 / y
    square = inverse * inverse
    series = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    return (y - 0.5) * math.log(y) - y + 0.5 * math.log(2 * math.pi) + series - math.log(rising)


@njit(error_model="numpy")
def _digamma(y):
    """Return the derivative of log Gamma at y > 0, in double precision."""
    below = 0.0
    while y < 8:
        below += 1 / y
        y += 1
    inverse = 1 / y
    square = inverse * inverse
    series = square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square / 240)))
    return math.log(y) - 0.5 * inverse - series - below


@njit(error_model="numpy")
def _log_choose(x, r):
    """Return log of Gamma(x + r) / (Gamma(r) x!) and its derivative by r, in double precision."""
    x, r = np.float64(x), np.float64(r)  # `float` would keep them single
    if x <= 8 and x == math.floor(x):
        rising, by_r, factorial = 1.0, 0.0, 1.0  # r (r + 1) ... (r + x - 1) over x!
        for k in range(int(x)):
            by_r = by_r * (r + k) + rising
            rising *= r + k
            factorial *= k + 1
        return math.log(rising / factorial), by_r / rising
    value = _log_gamma(x + r) - _log_gamma(r) - _log_gamma(x + 1)
    return value, _digamma(x + r) - _digamma(r)


@njit(**OPTIONS)
def log_choose(x, r, value, by_r):
    """Write log-binomial coefficients of x and r and their derivatives by r; all of one shape."""
    for i in prange(x.size):
        value[i], by_r[i] = _log_choose(x[i], r[i])


# -- likelihoods ----------------------------------------------------------------------------------


@njit(**OPTIONS)
def negative_binomial(starts, columns, counts, r, odds, gate, value, by_r, by_odds, by_gate):
    """Write the log-probability of every cell under a negative binomial, and its gradients.

    Args:
        starts: (b + 1,) where the entries of each cell start.
        columns: (n,) the feature of every entry.
        counts: (n,) its count, not 0.
        r: (b, P) or (1, P) total counts.
        odds: (b, P) of success.
        gate: (b, P) logit of an extra zero, or None.
        value: (b,) written to.
        by_r: (b, P) written to, as are by_odds and, with a gate, by_gate.
        by_odds: see by_r.
        by_gate: see by_r; None without a gate.
    """
    n, width = odds.shape
    for i in prange(n):
        zero, kept, less = np.empty(width, f32), np.empty(width, f32), np.empty(width, f32)
        row, o = (r[i] if r.shape[0] > 1 else r[0]), odds[i]
        for j in range(width):
            by_r[i, j] = -_log1p(o[j])
        for j in range(width):
            by_odds[i, j] = -row[j] / (f32(1) + o[j])
        for j in range(width):
            zero[j] = row[j] * by_r[i, j]
        if gate is not None:
            # A 0 is an extra one or, with the chance `kept`, one of the negative binomial.
            g = gate[i]
            for j in range(width):
                less[j] = _exp(-abs(g[j] - zero[j]))
            for j in range(width):
                share = less[j] / (f32(1) + less[j])
                kept[j] = share if g[j] > zero[j] else f32(1) - share
                zero[j] = g[j] if g[j] > zero[j] else zero[j]
            for j in range(width):
                zero[j] += _log1p(less[j])
            for j in range(width):
                by_r[i, j] *= kept[j]
            for j in range(width):
                by_odds[i, j] *= kept[j]
            for j in range(width):
                less[j] = _exp(-abs(g[j]))
            for j in range(width):
                share = less[j] / (f32(1) + less[j])
                by_gate[i, j] = (share if g[j] > f32(0) else f32(1) - share) - kept[j]
                zero[j] -= g[j] if g[j] > f32(0) else f32(0)
            for j in range(width):
                zero[j] -= _log1p(less[j])
        gain = 0.0
        for e in range(starts[i], starts[i + 1]):  # in place of what was written for a 0
            j, x = columns[e], counts[e]
            log1p = _log1p(o[j])
            choose, slope = _log_choose(x, row[j])
            gain += choose + x * (_log(o[j]) - log1p) - row[j] * log1p - zero[j]
            by_r[i, j] = slope - log1p
            by_odds[i, j] = (x / o[j] - row[j]) / (f32(1) + o[j])
            if gate is not None:
                small = _exp(-abs(g[j]))
                share = small / (f32(1) + small)
                by_gate[i, j] = share - f32(1) if g[j] > f32(0) else -share
                gain -= max(g[j], f32(0)) + _log1p(small)
        value[i] = gain + _sum(zero)


@njit(**OPTIONS)
def multinomial(starts, columns, counts, logits, value, by_logits):
    """Write the log-probability of every cell under a multinomial, and its gradient.

    Args:
        starts: (b + 1,) where the entries of each cell start.
        columns: (n,) the feature of every entry.
        counts: (n,) its count, not 0.
        logits: (b, P), of the shares before the softmax.
        value: (b,) written to.
        by_logits: (b, P) written to.
    """
    n, width = logits.shape
    for i in prange(n):
        largest = _largest(logits[i])
        for j in range(width):
            by_logits[i, j] = _exp(logits[i, j] - largest)
        total, depth, gain = _sum(by_logits[i]), 0.0, 0.0
        for e in range(starts[i], starts[i + 1]):
            depth += counts[e]
            gain += counts[e] * (logits[i, columns[e]] - largest)
        factor = f32(-depth / total)
        for j in range(width):
            by_logits[i, j] *= factor
        for e in range(starts[i], starts[i + 1]):
            by_logits[i, columns[e]] += counts[e]
        value[i] = gain - depth * math.log(total)


@njit(inline="always", error_model="numpy")
def _chance(logit, less, gap, smallest):
    """Return w (1 - c), 1 / w, 1 - sigmoid(logit) and c / (1 - c), by one division.

    c is sigmoid(logit) (1 - gap), with 1 - c at least `smallest`; w is 1 + less, of which
    `less` is exp(-|logit|). Nothing is lost where c is close to 1: there is no difference of
    close numbers.
    """
    whole = f32(1) + less
    above = logit > f32(0)
    part, other = (f32(1), less) if above else (less, f32(1))
    rest = other + part * gap
    rest = smallest * whole if rest < smallest * whole else rest
    inverse = f32(1) / (whole * rest)
    by_whole = rest * inverse
    return rest, by_whole, other * by_whole, part * (f32(1) - gap) * (whole * inverse)


@njit(inline="always", error_model="numpy")
def _either(gap, other_gap):
    """Return 1 - (1 - gap) (1 - other_gap), exact where both are small."""
    return gap + (f32(1) - gap) * other_gap


@njit(**PART)
def _bernoulli_of_block(
    first, rows, logit, bias, log_column, log_row, gap, weights, smallest,
    by_bias, by_column, by_row, value,
):  # fmt: skip
    """Do what `scaled_bernoulli` does for some features whose logits, but for `bias`, are there.

    Args:
        first: (p + 1,) where the entries of each of them start.
        rows: as there.
        logit: (p, b), in whose place the gradient is written, without weights.
        bias: (p,).
        log_column: (p,).
        log_row: (b,).
        gap: (b,) 1 - exp(log_row).
        weights: as there.
        smallest: as there.
        by_bias: (p,) written to.
        by_column: (p,) written to.
        by_row: (b,) added to.
        value: (b,) added to.
    """
    width, n = logit.shape
    start, size = first[0], first[width] - first[0]
    gap_column = np.empty(width, f32)
    product, slope, less = np.ones(n, f32), np.empty(n, f32), np.empty(n, f32)
    # Of the entries:
    open_, small, gaps = np.empty(size, f32), np.empty(size, f32), np.empty(size, f32)
    gain, by_logit, more = np.empty(size, f32), np.empty(size, f32), np.empty(size, f32)
    for j in range(width):
        gap_column[j] = -math.expm1(log_column[j])
        for e in range(first[j], first[j + 1]):
            i, k = rows[e], e - start
            open_[k] = logit[j, i] + bias[j]
            gaps[k] = _either(gap[i], gap_column[j])
            gain[k] = log_row[i] + log_column[j]
    for j in range(width):  # as if all were closed
        h, shift, column = logit[j], bias[j], gap_column[j]
        for i in range(n):  # by itself: shorter chains of operations overlap
            less[i] = _exp(-abs(h[i] + shift))
        for i in range(n):
            either = _either(gap[i], column)
            rest, by_whole, other, odds = _chance(h[i] + shift, less[i], either, smallest)
            product[i] *= rest * by_whole
            slope[i] = -odds
            h[i] = -odds * other
        for i in range(n):
            by_row[i] += slope[i]
        by_bias[j], by_column[j] = _dot(h, weights), _dot(slope, weights)
        if j % 4 == 3 or j == width - 1:  # one logarithm for four, at least 2^-80
            for i in range(n):
                undefined = product[i] - product[i]  # 0, or not a number, which _log loses
                value[i] += _log(product[i]) + undefined
            product[:] = f32(1)
    for k in range(size):
        small[k] = _exp(-abs(open_[k]))
    for k in range(size):  # by how much an entry differs from that
        rest, _, other, odds = _chance(open_[k], small[k], gaps[k], smallest)
        gain[k] += min(open_[k], f32(0)) - _log(rest)  # log c - log(1 - c)
        by_logit[k] = other
        more[k] = f32(1) + odds
    for j in range(width):
        for e in range(first[j], first[j + 1]):
            i, k = rows[e], e - start
            value[i] += gain[k]
            by_row[i] += more[k]
            by_bias[j] += weights[i] * (by_logit[k] - logit[j, i])
            by_column[j] += weights[i] * more[k]
            logit[j, i] = by_logit[k]


@njit(**OPTIONS)
def scaled_bernoulli(
    first, rows, h, log_row, weights, weighted, weight, bias, log_column, smallest, size,
    by_h, by_row, by_weight, by_bias, by_column, value,
):  # fmt: skip
    """Write the log-probability of every cell under a Bernoulli, and its gradients.

    Feature j of cell i is open with probability sigmoid(logit) exp(log_row + log_column), its logit
    being h weight^T + bias. Every thread has its own features and takes some of them at a time
    through all that is to be done, so that their logits stay in its cache.

    Args:
        first: (P + 1,) where the entries of each feature start: in which cells it is open.
        rows: (n,) the cell of every entry.
        h: (b, H).
        log_row: (b,) at most 0.
        weights: (b,) of the cells in the gradients by features.
        weighted: (b, H) h times `weights`.
        weight: (P, H).
        bias: (P,).
        log_column: (P,) at most 0.
        smallest: float32, of the chance of a 0, so that it has a logarithm.
        size: features at a time.
        by_h: (parts, b, H) added to, without weights, the sums over some features each.
        by_row: (parts, b) added to, as by_h.
        by_weight: (P, H) written to.
        by_bias: (P,) written to.
        by_column: (P,) written to.
        value: (parts, b) added to, as by_h.
    """
    width, parts = weight.shape[0], value.shape[0]
    gap = -np.expm1(log_row)  # 1 less the factor of every cell
    for part in prange(parts):
        logits, more = np.empty((size, h.shape[0]), f32), np.empty_like(h)
        end = (part + 1) * width // parts
        for start in range(part * width // parts, end, size):
            stop = min(start + size, end)
            logit, own = logits[: stop - start], weight[start:stop]
            np.dot(own, h.T, logit)
            _bernoulli_of_block(
                first[start : stop + 1], rows, logit, bias[start:stop], log_column[start:stop],
                log_row, gap, weights, smallest, by_bias[start:stop], by_column[start:stop],
                by_row[part], value[part],
            )  # fmt: skip
            np.dot(logit.T, own, more)
            by_h[part] += more
            np.dot(logit, weighted, by_weight[start:stop])


# -- entries --------------------------------------------------------------------------------------


@njit(**OPTIONS)
def sort_by_column(starts, columns, values, place, first, rows, factors):
    """Write the entries of CSR x column after column, in each by rows.

    Args:
        starts: (b + 1,) where the entries of each row of x start.
        columns: (n,) the column of every entry.
        values: (n,) its value.
        place: (parts, P) zeros, which it counts in.
        first: (P + 1,) written to: where the entries of each column start.
        rows: (n,) written to, as factors: row and value of every entry.
        factors: see rows.
    """
    n, (parts, width) = starts.size - 1, place.shape
    for part in prange(parts):
        for e in range(starts[part * n // parts], starts[(part + 1) * n // parts]):
            place[part, columns[e]] += i32(1)
    total = i32(0)
    for j in range(width):
        first[j] = total
        for part in range(parts):
            total, place[part, j] = total + place[part, j], total
    first[width] = total
    for part in prange(parts):
        own = place[part]
        for i in range(part * n // parts, (part + 1) * n // parts):
            for e in range(starts[i], starts[i + 1]):
                j = columns[e]
                rows[own[j]], factors[own[j]] = i, values[e]
                own[j] += i32(1)


@njit(**OPTIONS)
def product(first, rows, values, right, sums):
    """Write x right for x sorted by column, in parts to be added: `right` is read once, in order.

    Args:
        first: (P + 1,) where the entries of each column of x start.
        rows: (n,) the row of every entry.
        values: (n,) its value.
        right: (P, H).
        sums: (parts, b, H) written to: what some columns each make of it.
    """
    n, parts = rows.size, sums.shape[0]
    for part in prange(parts):
        out = sums[part]
        out[:] = f32(0)
        start, end = part * n // parts, (part + 1) * n // parts
        for j in range(np.searchsorted(first, start), np.searchsorted(first, end)):
            row = right[j]
            for e in range(first[j], first[j + 1]):
                own, factor = out[rows[e]], values[e]
                for h in range(row.size):
                    own[h] += factor * row[h]


# -- noise ----------------------------------------------------------------------------------------


@njit(**OPTIONS)
def dropout(seed, level, scale, mask):
    """Write `scale`, or 0 where 32 hashed bits of seed and place are below `level`.

    Args:
        seed: any uint32; the same one drops the same places.
        level: uint32.
        scale: float32.
        mask: (n,) written to.
    """
    for i in prange(mask.size):
        # lowbias32, by Christopher Wellons; numba would go on with 64 bits.
        bits = u32(u32(i) * u32(0x9E3779B1) + seed)
        bits = u32((bits ^ (bits >> u32(16))) * u32(0x7FEB352D))
        bits = u32((bits ^ (bits >> u32(15))) * u32(0x846CA68B))
        bits = bits ^ (bits >> u32(16))
        mask[i] = scale if bits >= level else f32(0)
