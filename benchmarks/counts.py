"""What has to happen in a convolution, counted on its actual operands: products, sites, bytes.

These are floors of the problem, the same for every implementation: nothing here knows how the kernels
work.
"""

import dataclasses

import numpy as np

import ilajax
from benchmarks.peers import Layer
from ilajax.geometry import conv_window


@dataclasses.dataclass(frozen=True)
class Counts:
    """The work of one call of a layer.

    Attributes:
      entries: stored values of the input.
      weights: live ones.
      forward_products: pairs of an entry and a live weight that meet in an output site: with support="input"
        one of the input's own.
      backward_products: twice the pairs that meet in a kept output, once for the gradient of the entry and
        once for that of the weight; 0 in a layer that is not differentiated.
      sites: output sites of all samples in which any pair meets.
      candidates: responses that the selection sees, over samples and output channels.
      kept: outputs that are stored.
      bytes_read: entries (key and value), live weights (key and value) and the bias; backward, which is a
        call of its own, entries and weights once more, and a key and a cotangent for each kept output.
      bytes_written: all slots of the output, key and value, and the numbers of candidates; backward the
        gradients of all slots of the input, of the weights and of the bias. Keys of a shared support
        count once for all channels, and with support="input" none is written.
    """

    entries: int
    weights: int
    forward_products: int
    backward_products: int
    sites: int
    candidates: int
    kept: int
    bytes_read: int
    bytes_written: int

    @property
    def products(self) -> int:
        """Multiply-adds that must happen."""
        return self.forward_products + self.backward_products

    @property
    def bytes(self) -> int:
        """Bytes that must move."""
        return self.bytes_read + self.bytes_written

    def record(self) -> dict[str, int]:
        """For JSON, with the sums."""
        return dataclasses.asdict(self) | {"products": self.products, "bytes": self.bytes}


def count(layer: Layer) -> Counts:
    """Counts a layer's work; the selection's part comes from its own output."""
    x, output = layer.x, layer.output
    stored = np.asarray(x.keys) < x.sites
    features = output.features
    kept = np.broadcast_to(np.asarray(features.keys) < features.sites, features.values.shape)
    forward, backward, sites = count_products(layer)
    read, written = count_bytes(layer, int(kept.sum()))
    return Counts(
        entries=int(np.broadcast_to(stored, x.values.shape).sum()),
        weights=int(layer.kernel.count),
        forward_products=forward,
        backward_products=backward,
        sites=sites,
        candidates=int(output.responses.sum()),
        kept=int(kept.sum()),
        bytes_read=read,
        bytes_written=written,
    )


def live_weights(kernel: ilajax.SparseKernel) -> np.ndarray:
    """Which weights are live, bool[taps, Cin, Cout]."""
    keys = np.asarray(kernel.keys)
    live = np.zeros(kernel.size, bool)
    live[keys[keys < kernel.size]] = True
    return live.reshape(kernel.out_channels, kernel.in_channels, kernel.taps).transpose(2, 1, 0)


def count_products(layer: Layer) -> tuple[int, int, int]:
    """Forward products, backward products, and output sites in which a product falls."""
    x, live = layer.x, live_weights(layer.kernel)
    window = conv_window(x.spatial_shape, layer.kernel.window_shape)
    keys = np.asarray(x.keys)
    batch, row = x.batch_size, window.output_sites + 1  # the last place stands for outside
    sample = row * np.arange(batch)[:, None, None]
    own = layer.support == "input"
    allowed = _marks(keys, sample, batch * row) if own else np.ones(batch * row, bool)
    allowed[row - 1 :: row] = False
    touched = np.zeros(batch * row, bool)
    kept = _kept(layer, row) if layer.backward else None

    forward, pairs = 0, 0
    for tap in range(window.taps):
        weights = live[tap].sum(axis=1)  # [Cin]
        # A shared support reaches the same sites from every channel.
        reached = np.asarray(window.output_keys(keys, tap)) + sample
        for channel in np.flatnonzero(weights):
            seen = reached[:, channel if keys.shape[1] > 1 else 0]
            seen = seen[allowed[seen]]
            forward += int(weights[channel]) * seen.size
            touched[seen] = True
            if kept is not None:
                pairs += int(kept[seen].sum(axis=0) @ live[tap, channel])
    return forward, 2 * pairs, int(touched.sum())


def count_bytes(layer: Layer, kept: int) -> tuple[int, int]:
    """Bytes that a layer's operands and results have: read, written.

    Args:
      layer: the layer.
      kept: stored outputs.
    """
    x, kernel, features = layer.x, layer.kernel, layer.output.features
    key, value = x.keys.dtype.itemsize, x.values.dtype.itemsize
    stored = np.asarray(x.keys) < x.sites
    entries = np.broadcast_to(stored, x.values.shape).sum()
    own = layer.support == "input"
    weights = (key + kernel.values.dtype.itemsize) * int(kernel.count)
    operands = key * int(stored.sum()) + value * int(entries) + weights
    read = operands + layer.bias.nbytes
    written = value * features.values.size + layer.output.responses.nbytes
    written += 0 if own else key * features.keys.size
    if layer.backward:
        read += operands + value * kept + (0 if own else key * kept)
        written += value * x.values.size + kernel.values.nbytes + layer.bias.nbytes
    return read, written


def _marks(keys: np.ndarray, sample: np.ndarray, size: int) -> np.ndarray:
    marks = np.zeros(size, bool)
    marks[keys + sample] = True
    return marks


def _kept(layer: Layer, row: int) -> np.ndarray:
    """Which outputs are stored, bool[B * row, Cout]."""
    features = layer.output.features
    keys = np.broadcast_to(np.asarray(features.keys), features.values.shape)
    batch, channels, _ = keys.shape
    kept = np.zeros((batch, row, channels), bool)
    kept[np.arange(batch)[:, None, None], keys, np.arange(channels)[:, None]] = True
    kept[:, row - 1] = False
    return kept.reshape(batch * row, channels)
