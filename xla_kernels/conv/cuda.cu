// Direct sparse convolution with k-selection on the GPU, and its gradient.
//
// Forward, five launches where float32 responses may have to be cut to the capacity, four with
// 16-bit values, three where nothing can be cut (and these once a chunk of the batch, where the
// workspace is short):
//
//   1 PrepareKernel   the input as a site map (site_map.cuh), the filters as dense vectors, zeroed
//                     counters
//   2 TileKernel      kRespond: a block takes a tile of consecutive output sites of one item and up
//                     to 8 output channels. It dilates the map's bitmap, 32 sites of a row at a
//                     time, into a bitmap of the sites in reach. Then a thread has a site and sums
//                     its responses in registers, tap by tap and channel by channel, all threads of
//                     a warp at the same weights. Ranks go to a histogram of their 11 highest
//                     bits in shared memory, then to that of the segment; the last block of a
//                     segment finds the digit at which the capacity cuts.
//   3 TileKernel      kRefine, once or twice: the next digits, among candidates that share the
//                     first.
//   4 TileKernel      kEmit: counts what a tile keeps, adds up the tiles before it, writes in key
//                     order.
//
// The responses of 2 are kept in a pool as far as it goes (the channels of each site in reach) and
// computed again by 3 and 4 where it has not, with the same bits. So memory is bounded by the
// workspace, and traffic is the input, the output, and the pool: written once, read twice or more.
// No grid is ever allocated but the map: two bits a site.
//
// Backward, three launches: PrepareKernel makes the site map of the kept outputs' cotangents; then
// GradientKernel has a thread for each stored input, which looks up the cotangents that it reaches
// tap by tap, sums its own gradient in a register and those of the weights over the warp;
// FinishKernel adds the partial sums of weights and bias in their order.
//
// All sums have a fixed order, and what integer atomics count does not depend on theirs. Results
// repeat; but of entries or weights that share a key, which breaks their contract, any one wins.

#include "xla_kernels/conv/cuda_backward.cuh"
#include "xla_kernels/conv/cuda_forward.cuh"

ILAJAX_CUDA_TARGET(ConvFwd, ConvForward);
ILAJAX_CUDA_TARGET(ConvBwd, ConvBackward);
