// Which slots a window reads for an output site, where supports are given; see cuda_calls.cuh.

#pragma once

#include "xla_kernels/common/axes.cuh"

namespace ilajax {
namespace {

// The window of a call, whose input may be spread apart.
template <int R>
struct Reach : Axes<R> {
  Divisor apart[R];
  bool spread = false;

  explicit Reach(const Window& w) : Axes<R>(w) {
    for (int a = 0; a < w.rank; ++a) {
      apart[R - w.rank + a] = Divisor(w.input_dilation[a]);
      spread |= w.input_dilation[a] != 1;
    }
  }

  // Where a tap at offset 0 reads for an output site.
  __device__ __forceinline__ void Origin(uint32_t site, int32_t (&p)[R]) const {
    this->Unravel(site, this->output_size, p);
#pragma unroll
    for (int a = 0; a < R; ++a) p[a] = p[a] * this->stride[a] - this->low[a];
  }

  // The key of the input's site that lies `offset` from there; -1 if there is none.
  __device__ __forceinline__ int32_t Key(const int32_t (&origin)[R],
                                         const int32_t (&offset)[R]) const {
    bool inside = true;
    int32_t p[R];
#pragma unroll
    for (int a = 0; a < R; ++a) {
      p[a] = origin[a] + offset[a];
      if (spread) {
        const uint32_t at = apart[a].Quotient(static_cast<uint32_t>(p[a]) & 0x7fffffff);
        inside &= p[a] >= 0 && at * apart[a].value == static_cast<uint32_t>(p[a]);
        p[a] = static_cast<int32_t>(at);
      }
      inside &= static_cast<uint32_t>(p[a]) < static_cast<uint32_t>(this->input[a]);
    }
    return inside ? static_cast<int32_t>(this->InputKey(p)) : -1;
  }
};

// How far a tap is from the first one along each axis.
template <int R>
struct TapOffset {
  int32_t along[R];

  __device__ __forceinline__ TapOffset(const Reach<R>& reach, uint32_t tap) {
    Reach<R>::Unravel(tap, reach.window_size, along);
#pragma unroll
    for (int a = 0; a < R; ++a) along[a] *= reach.dilation[a];
  }

  // To the next tap.
  __device__ __forceinline__ void Step(const Reach<R>& reach) {
    bool carry = true;
#pragma unroll
    for (int a = R - 1; a >= 0; --a) {
      const bool last = along[a] == (reach.window[a] - 1) * reach.dilation[a];
      if (carry) along[a] = last ? 0 : along[a] + reach.dilation[a];
      carry = carry && last;
    }
  }
};

// The sites that a window reads, of one sample.
struct Sites {
  const int32_t* keys;
  int64_t slots;
};

// Finds slots by their keys, which ascend: from where the last key is, or would be, the next one is
// no more slots away than keys. So that of the next tap of a row costs one probe.
struct SlotSearch {
  const int32_t* keys;
  int32_t slots;
  int32_t key = 0, slot = 0;  // the first slot whose key is not below `key`,
  bool found = false;         // and whether it is `key`
  bool begun = false;

  // `own`: a slot with this key, where one is known, else -1.
  __device__ __forceinline__ SlotSearch(const Sites& in, int32_t site, int64_t own)
      : keys(in.keys), slots(static_cast<int32_t>(in.slots)) {
    if (own < 0) return;
    key = site, slot = static_cast<int32_t>(own);
    found = begun = true;
  }

  // The slot of a key; -1 if there is none, or for a key below 0.
  __device__ __forceinline__ int32_t Find(int32_t next) {
    if (next < 0) return -1;
    if (begun && next - key == 1) {
      slot += found ? 1 : 0;
    } else {
      int32_t first = 0, count = slots;
      if (begun) {
        const int32_t distance = next - key;
        first = max(slot + min(distance, 0), 0);
        count = distance < 0 ? slot - first : min(distance, slots - slot);
      }
      while (count > 0) {
        const int32_t half = count / 2;
        const bool below = keys[first + half] < next;
        first = below ? first + half + 1 : first;
        count = below ? count - half - 1 : half;
      }
      slot = first;
    }
    key = next;
    begun = true;
    found = slot < slots && keys[slot] == next;
    return found ? slot : -1;
  }
};

// An output site, and its slot where the output's sites are the input's, else -1.
struct Place {
  int32_t site;
  int64_t own_slot;

  // That of slot i; beyond the last a site outside the grid.
  __device__ Place(const Sites& out, bool own, int64_t i)
      : site(i < out.slots ? out.keys[i] : -1), own_slot(own ? i : -1) {}
  __device__ explicit Place(int32_t key) : site(key), own_slot(-1) {}

  __device__ bool InGrid(int64_t sites) const { return site >= 0 && site < sites; }
};

// The slot of the site that a tap reads for an output site; -1 if there is none.
template <int R>
__device__ __forceinline__ int32_t Neighbour(const Reach<R>& reach, int64_t sites, const Sites& in,
                                             const Place& out, const TapOffset<R>& tap) {
  const bool inside = out.InGrid(sites);
  int32_t origin[R];
  reach.Origin(inside ? out.site : 0, origin);
  const int32_t key = inside ? reach.Key(origin, tap.along) : -1;
  return SlotSearch(in, out.site, out.own_slot).Find(key);
}

}  // namespace
}  // namespace ilajax
