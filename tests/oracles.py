"""What the operations must compute, as NumPy loops that share no code with ilajax.

The convolution follows the paper's algorithms 1 and 2 line by line. Loops run in float64: on small
integers they are exact, and so is the float32 arithmetic that they are compared with. `dense_conv`
is a second oracle, `jax.lax.conv_general_dilated`, run on the CPU whatever the default device is.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

# --- Reading the data types ----------------------------------------------------------------------


def read(array):
    """An array as NumPy float64 or int64."""
    array = np.asarray(array)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


def segments(x):
    """x as a table [B][C] of lists of (slot, key, value) without padding."""
    sites = math.prod(x.spatial_shape)
    values = read(x.values)
    keys = np.broadcast_to(read(x.keys), values.shape)
    return [
        [
            [
                (s, int(k), float(v))
                for s, (k, v) in enumerate(zip(ks, vs, strict=True))
                if k != sites
            ]
            for ks, vs in zip(sample_keys, sample_values, strict=True)
        ]
        for sample_keys, sample_values in zip(keys, values, strict=True)
    ]


def weights(kernel):
    """The live weights as (slot, tap, ic, oc, value)."""
    *window, cin, cout = kernel.shape
    taps = math.prod(window)
    found = []
    for slot, (key, value) in enumerate(
        zip(read(kernel.keys).tolist(), read(kernel.values).tolist(), strict=True)
    ):
        if key != taps * cin * cout:
            oc, rest = divmod(key, cin * taps)
            ic, tap = divmod(rest, taps)
            found.append((slot, tap, ic, oc, value))
    return found


def filters(kernel):
    """The live weights as a table [oc][ic] of lists of (slot, tap, value), as algorithm 1 reads them."""
    *_, cin, cout = kernel.shape
    table = [[[] for _ in range(cin)] for _ in range(cout)]
    for slot, tap, ic, oc, value in weights(kernel):
        table[oc][ic].append((slot, tap, value))
    return table


def dense(x):
    """[B, *S, C] in float64, an entry at a time."""
    grid = np.zeros((x.values.shape[0], x.values.shape[1], math.prod(x.spatial_shape)))
    for b, sample in enumerate(segments(x)):
        for c, entries in enumerate(sample):
            for _, key, value in entries:
                grid[b, c, key] = value
    return np.moveaxis(grid, 1, 2).reshape(x.shape)


def dense_kernel(kernel):
    """[*window, Cin, Cout] in float64, a weight at a time."""
    *window, cin, cout = kernel.shape
    full = np.zeros((math.prod(window), cin, cout))
    for _, tap, ic, oc, value in weights(kernel):
        full[tap, ic, oc] = value
    return full.reshape(kernel.shape)


# --- Windows -------------------------------------------------------------------------------------


class Geometry:
    """Output shape and `get update id` of a convolution, by the definition of XLA's padding."""

    def __init__(self, grid, window, strides=1, padding="SAME", dilation=1):
        rank = len(grid)
        self.grid, self.window = tuple(grid), tuple(window)
        self.strides = (strides,) * rank if isinstance(strides, int) else tuple(strides)
        self.dilation = (dilation,) * rank if isinstance(dilation, int) else tuple(dilation)
        extent = [(w - 1) * d + 1 for w, d in zip(self.window, self.dilation, strict=True)]
        if padding == "SAME":
            out = [-(-s // t) for s, t in zip(self.grid, self.strides, strict=True)]
            total = [
                max((o - 1) * t + e - s, 0)
                for o, t, e, s in zip(out, self.strides, extent, self.grid, strict=True)
            ]
            self.pads = [(p // 2, p - p // 2) for p in total]
        elif padding == "VALID":
            self.pads = [(0, 0)] * rank
        else:
            self.pads = list(padding)
        self.shape = tuple(
            (s + low + high - e) // t + 1
            for s, (low, high), e, t in zip(self.grid, self.pads, extent, self.strides, strict=True)
        )
        self.sites = math.prod(self.shape)

    @functools.cache  # noqa: B019  (a geometry lives as long as its test)
    def update_id(self, key, tap):
        """The output key that the entry at `key` updates through `tap`, or None."""
        position = np.unravel_index(key, self.grid)
        offset = np.unravel_index(tap, self.window)
        updated = []
        for p, t, s, d, (low, _), size in zip(
            position, offset, self.strides, self.dilation, self.pads, self.shape, strict=True
        ):
            steps, rest = divmod(int(p) + low - int(t) * d, s)
            if rest or not 0 <= steps < size:
                return None
            updated.append(steps)
        return int(np.ravel_multi_index(updated, self.shape))


class Transposed:
    """A geometry the other way round: from the grid that a convolution writes to the one that it reads.

    Output site p of the convolution reads site o through tap t; here p updates o through the mirrored tap.
    """

    def __init__(self, geometry):
        self.of = geometry
        self.grid, self.shape, self.window = geometry.shape, geometry.grid, geometry.window
        self.sites = math.prod(self.shape)

    @functools.cache  # noqa: B019
    def update_id(self, key, tap):
        position = np.array(np.unravel_index(key, self.grid))
        mirrored = np.array(self.window) - 1 - np.unravel_index(tap, self.window)
        low = np.array([low for low, _ in self.of.pads])
        read = position * self.of.strides + mirrored * self.of.dilation - low
        if (read < 0).any() or (read >= self.shape).any():
            return None
        return int(np.ravel_multi_index(tuple(read), self.shape))


# --- Selection -----------------------------------------------------------------------------------


def select(keys, values, capacity, mode):
    """Indices of the `capacity` best, by ascending key. NaN first; of equal ranks the lower key."""
    rank = {"value": lambda v: v, "positive": lambda v: v, "magnitude": abs}[mode]
    candidates = [i for i, v in enumerate(values) if mode != "positive" or v > 0 or math.isnan(v)]

    def order(i):
        nan = math.isnan(values[i])
        return (0, 0.0, keys[i]) if nan else (1, -rank(values[i]), keys[i])

    best = sorted(candidates, key=order)[:capacity]
    return sorted(best, key=lambda i: keys[i]), len(candidates)


def pack(kept, capacity, sites, dtype):
    """Lists of (key, value) [B][C] as padded arrays keys, values."""
    batch, channels = len(kept), len(kept[0])
    keys = np.full((batch, channels, capacity), sites, np.int32)
    values = np.zeros((batch, channels, capacity), dtype)
    for b, c in itertools.product(range(batch), range(channels)):
        for slot, (key, value) in enumerate(kept[b][c]):
            keys[b, c, slot], values[b, c, slot] = key, value
    return keys, values


def k_select(x, capacity, mode="value"):
    """keys, values of the selection among stored entries, zeros too."""
    kept = []
    for sample in segments(x):
        kept.append([])
        for entries in sample:
            chosen, _ = select([e[1] for e in entries], [e[2] for e in entries], capacity, mode)
            kept[-1].append([entries[i][1:] for i in chosen])
    return pack(kept, capacity, math.prod(x.spatial_shape), x.values.dtype)


def k_select_backward(x, kept_keys, cotangent):
    """Cotangent of x.values: what was kept receives its own, all else 0."""
    sites = math.prod(x.spatial_shape)
    gradient = np.zeros(x.values.shape)
    for b, sample in enumerate(segments(x)):
        for c, entries in enumerate(sample):
            sent = {
                k: g
                for k, g in zip(read(kept_keys)[b, c], read(cotangent)[b, c], strict=True)
                if k != sites
            }
            for slot, key, _ in entries:
                gradient[b, c, slot] = sent.get(key, 0.0)
    return gradient


def passed(values, mode):
    """What a selection of sites lets pass of values."""
    return np.where(values <= 0, 0, values) if mode == "positive" else values


@np.errstate(over="ignore", invalid="ignore")
def select_sites(sites, p, capacity):
    """The `capacity` best sites of vectors p[C, sites]: lists of (key, value) [C], and how many candidates.

    Squares are summed in float32, and all that are smaller than its normal numbers rank alike.
    """
    found = [int(s) for s in sites if (p[:, s] != 0).any()]
    scores = {s: np.square(p[:, s].astype(np.float32)).sum(dtype=np.float32) for s in found}
    scores = {s: max(score, np.finfo(np.float32).tiny, key=float) for s, score in scores.items()}
    best, _ = select(found, [float(scores[s]) for s in found], capacity, "value")
    return [[(found[i], row[found[i]]) for i in best] for row in p], len(found)


def conv_by_site(x, kernel, bias, geometry, capacity, mode):
    """keys [B, 1, capacity], values [B, Cout, capacity] of the strongest sites, candidates [B, 1]."""
    every_site = np.arange(geometry.sites)
    keys = np.broadcast_to(every_site, (x.values.shape[0], 1, geometry.sites))
    p = passed(read(conv_at(x, kernel, bias, geometry, keys)[0]), mode)
    kept, counts = zip(*(select_sites(every_site, each, capacity) for each in p), strict=True)
    keys, values = pack(kept, capacity, geometry.sites, x.values.dtype)
    return keys[:, :1], values, np.array(counts, np.int32)[:, None]


# --- Algorithm 1 and algorithm 2 -----------------------------------------------------------------


def responses(x, kernel, geometry):
    """Algorithm 1, lines 1 to 9: the dense buffers [B, Cout, sites]. A zero factor adds nothing."""
    data, filter_ = segments(x), filters(kernel)
    buffers = np.zeros((len(data), len(filter_), geometry.sites))
    for b in range(len(data)):
        for oc in range(len(filter_)):
            buffer = buffers[b, oc]
            for ic in range(len(data[b])):
                for _, id_, val in data[b][ic]:
                    for _, f_id, f_val in filter_[oc][ic]:
                        uid = geometry.update_id(id_, f_id)
                        if uid is not None and val != 0 and f_val != 0:
                            buffer[uid] += val * f_val
    return buffers


def conv(x, kernel, bias, geometry, capacity, mode):
    """Algorithm 1: keys, values, responses. Values are rounded once, after the bias."""
    buffers = responses(x, kernel, geometry)
    bias = np.zeros(buffers.shape[1]) if bias is None else read(bias)
    kept, counts = [], np.zeros(buffers.shape[:2], np.int32)
    for b in range(buffers.shape[0]):
        kept.append([])
        for oc in range(buffers.shape[1]):
            ids = np.flatnonzero(buffers[b, oc])
            with np.errstate(over="ignore"):
                stored = (buffers[b, oc, ids] + bias[oc]).astype(np.float32).astype(x.values.dtype)
            stored = stored.astype(np.float64).tolist()
            chosen, counts[b, oc] = select(ids.tolist(), stored, capacity, mode)
            kept[-1].append([(ids[i], stored[i]) for i in chosen])
    return *pack(kept, capacity, geometry.sites, x.values.dtype), counts


def conv_backward(x, kernel, geometry, output_keys, cotangent):
    """Algorithm 2: bp_data [B, C, K], bp_filter [N] and the bias's cotangent [Cout]."""
    data, filter_ = segments(x), filters(kernel)
    bp_data = np.zeros(x.values.shape)
    bp_filter = np.zeros(kernel.values.shape)
    bp_bias = np.zeros(len(filter_))
    for b in range(len(data)):
        for oc in range(len(filter_)):
            buffer = np.zeros(geometry.sites)
            for key, g in zip(read(output_keys)[b, oc], read(cotangent)[b, oc], strict=True):
                if key != geometry.sites:
                    buffer[key] = g
                    bp_bias[oc] += g
            for ic in range(len(data[b])):
                for slot, id_, val in data[b][ic]:
                    for f_slot, f_id, f_val in filter_[oc][ic]:
                        uid = geometry.update_id(id_, f_id)
                        g = 0.0 if uid is None else buffer[uid]
                        if g != 0 and f_val != 0:
                            bp_data[b, ic, slot] += g * f_val
                        if g != 0 and val != 0:
                            bp_filter[f_slot] += g * val
    return bp_data, bp_filter, bp_bias


def conv_at(x, kernel, bias, geometry, keys):
    """Values [B, Cout, K] of the responses at `keys` [B, 1 or Cout, K], and how many are not zero.

    Zero responses do not get the bias.
    """
    buffers = responses(x, kernel, geometry)
    bias = np.zeros(buffers.shape[1]) if bias is None else read(bias)
    keys = np.broadcast_to(read(keys), (*buffers.shape[:2], keys.shape[2]))
    values, counts = np.zeros(keys.shape), np.zeros(keys.shape[:2], np.int32)
    for b, oc, slot in np.ndindex(keys.shape):
        r = buffers[b, oc, keys[b, oc, slot]] if keys[b, oc, slot] < geometry.sites else 0.0
        values[b, oc, slot] = r + bias[oc] if r != 0 else 0.0
        counts[b, oc] += r != 0
    return values.astype(np.float32).astype(x.values.dtype), counts


def submanifold(x, kernel, bias, geometry):
    """Values [B, Cout, K] of the responses at the input's own sites."""
    return conv_at(x, kernel, bias, geometry, x.keys)[0]


@np.errstate(invalid="ignore")
def submanifold_products(x, kernel, geometry, cotangent):
    """Responses [B, Cout, K] without a bias, and the gradients of values, weights and bias.

    From matrix products, for more channels than loops over entries have time for.
    """
    keys = read(x.keys)[:, 0]
    stored = keys < geometry.sites
    values, g = (np.where(stored[:, None], read(a), 0) for a in (x.values, cotangent))
    filter_ = dense_kernel(kernel).reshape(-1, *kernel.shape[-2:])
    result, x_bar, w_bar = np.zeros(g.shape), np.zeros(values.shape), np.zeros(filter_.shape)
    low = np.array([low for low, _ in geometry.pads])
    for b in range(len(keys)):
        places = np.stack(np.unravel_index(keys[b][stored[b]], geometry.grid), axis=1)
        slots = np.full(geometry.grid, -1)
        slots[tuple(places.T)] = np.arange(len(places))
        for tap, w in enumerate(filter_):
            seen = (
                places + np.unravel_index(tap, geometry.window) * np.array(geometry.dilation) - low
            )
            inside = ((seen >= 0) & (seen < geometry.grid)).all(axis=1)
            found = np.where(inside, slots[tuple(np.where(inside[:, None], seen, 0).T)], -1)
            to, from_ = np.flatnonzero(found >= 0), found[found >= 0]
            result[b][:, to] += product(w.T, values[b][:, from_])
            x_bar[b][:, from_] += product(w, g[b][:, to])
            w_bar[tap] += product(values[b][:, from_], g[b][:, to].T)
    weights_bar = np.zeros(kernel.values.shape)
    for slot, tap, ic, oc, _ in weights(kernel):
        weights_bar[slot] = w_bar[tap, ic, oc]
    return result, (x_bar, weights_bar, g.sum((0, 2)))


def product(a, b):
    """a @ b, where a zero adds nothing, not even against infinity or NaN."""
    if np.isfinite(a).all() and np.isfinite(b).all():
        return a @ b
    return np.where((a[:, :, None] == 0) | (b == 0), 0, a[:, :, None] * b).sum(axis=1)


# --- Dense convolution ---------------------------------------------------------------------------


def dense_conv(x, w, geometry):
    """`lax.conv_general_dilated` of [B, *S, Cin] with [*window, Cin, Cout], float32 on the CPU."""
    rank = x.ndim - 2
    axes = tuple(range(1, rank + 1))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, rank + 1, *axes), (rank + 1, rank, *range(rank)), (0, rank + 1, *axes)
    )
    return jax.lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.pads,
        rhs_dilation=geometry.dilation,
        dimension_numbers=numbers,
        precision=jax.lax.Precision.HIGHEST,
    )


def on_cpu(f, *arrays):
    """f of float32 copies of the arrays, on the CPU, as NumPy."""
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = [jnp.asarray(np.asarray(a, np.float32)) for a in arrays]
        return jax.tree.map(np.asarray, f(*arrays))


# --- Checks --------------------------------------------------------------------------------------


def assert_invariants(x, *, capacity=None):
    """The contract of a SparseTensor, checked without `validate()`, and then with it."""
    keys, values = read(x.keys), read(x.values)
    sites = math.prod(x.spatial_shape)
    assert x.keys.dtype == np.int32
    assert keys.shape in (values.shape, (values.shape[0], 1, values.shape[2]))
    if capacity is not None:
        assert values.shape[2] == capacity
    for segment in keys.reshape(-1, keys.shape[2]):
        stored = segment[segment != sites]
        assert (segment[: stored.size] == stored).all(), "padding stands before a stored entry"
        assert ((stored >= 0) & (stored < sites)).all(), "a key lies outside the grid"
        assert (np.diff(stored) > 0).all(), "keys do not ascend strictly"
    padding = np.broadcast_to(keys == sites, values.shape)
    assert (values[padding] == 0).all(), "padding holds a value other than 0"
    x.validate()


def assert_tensor(x, keys, values, *, tolerance=0.0):
    """x has exactly these keys, and these values (NaN equals NaN)."""
    assert_invariants(x, capacity=keys.shape[2])
    np.testing.assert_array_equal(np.broadcast_to(read(x.keys), keys.shape), read(keys))
    assert_close(x.values, values, tolerance)


def assert_close(got, want, tolerance=0.0):
    """Equal within `tolerance` of the largest magnitude expected; shapes too."""
    got, want = read(got), read(want)
    assert got.shape == want.shape
    if tolerance:
        finite = want[np.isfinite(want)]
        scale = np.abs(finite).max() if finite.size else 0.0
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(scale, 1e-6))
    else:
        np.testing.assert_array_equal(got, want)
