// Products with few rows, and every product that no GEMM variant fits: out (M, N) = epilogue(x (M, K) . weight (N,
// K)^T).
//
// A warp takes 16 weight rows and eight tokens: that is one m16n8 tensor-core tile, so 8 tokens cost what one costs and
// the kernel is bound by reading the weight. The warps of a block split K; their sums meet in shared memory in a fixed
// order (two runs are bit-identical). Weight formats: nibbles in the order of layouts.py (a fragment is the 8 bytes of
// a lane), packed row-major nibbles, int8. x: int8 codes (exact int32 sums) or bf16, fp16, fp32 values (fp32 sums: the
// products are exact, fp32 x is split into three bf16 terms). The K order inside a step is permuted, alike in both
// operands, so that each lane uses the bytes as they were loaded.
// K % 32 == 0, rows contiguous and 16-byte aligned: the launcher pads. Before: dp4a, 9.1 us for N=18432, K=3072, M=1 on
// an H200; this one was not run on a GPU yet.
#include "gemv_fragments.cuh"

namespace convrot {
namespace {

constexpr int kMaxWarps = 8;  // a block's; they split K
constexpr int kUnroll = 4;    // chunks in flight: 32 or 128 bytes a lane

template <Format kFormat, class X, int kGroups, class Sum>
__device__ __forceinline__ void accumulate(Product const& p, Chunk<kFormat> const& weight, int chunk, int lane,
                                           Sum (&acc)[kGroups][4]) {
  constexpr bool kCodes = std::is_same_v<X, int8_t>, kHalf = std::is_same_v<X, __half>;
#pragma unroll
  for (int step = 0; step < Chunk<kFormat>::kSteps; ++step) {
    int const column = Chunk<kFormat>::column(chunk, step, lane);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      int const token = (blockIdx.y * kGroups + group) * 8 + (lane >> 2);
      bool const inside = token < p.m && column < p.k;
      X const* x = static_cast<X const*>(p.x) + int64_t(token) * p.k + column;
      uint32_t a[4];
      if constexpr (kCodes) {
        uint32_t b0 = 0, b1 = 0;
        if (inside) load_codes<kFormat>(x, b0, b1);
        fragments(weight, step, a);
        mma(acc[group], a, b0, b1);
      } else {
        constexpr int kTerms = std::is_same_v<X, float> ? 3 : 1;
        uint32_t pairs[kTerms][4] = {};
        if (inside) {
          if constexpr (kTerms == 3) load_terms<kFormat>(x, pairs);
          else load_pairs<kFormat>(x, pairs[0]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          fragments16<kHalf>(weight, step, half, a);
#pragma unroll
          for (int term = kTerms - 1; term >= 0; --term) {
            uint32_t b0, b1;
            x_fragment16<kFormat>(pairs[term], half, b0, b1);
            mma<kHalf>(acc[group], a, b0, b1);
          }
        }
      }
    }
  }
}

// ((sum * a_scale) * b_scale) + bias, then residual + gate * y: each step rounded to fp32, one rounding at the end
__device__ __forceinline__ void finish(Product const& p, float sum, int row, int token) {
  float y = p.a_scale ? __fmul_rn(sum, p.a_scale[token]) : sum;
  y = __fmul_rn(y, p.b_scale[row]);
  if (p.bias) y = __fadd_rn(y, load_as_float(p.bias, p.bias_dtype, row));
  if (p.gate) y = __fmul_rn(load_as_float(p.gate, p.gate_dtype, row), y);
  if (p.residual) y = __fadd_rn(load_as_float(p.residual, p.out_dtype, token * p.residual_stride + row), y);
  store_from_float(p.out, p.out_dtype, token * p.out_stride + row, y);
}

template <Format kFormat, class X, int kGroups>
__global__ void __launch_bounds__(kMaxWarps * 32) gemv(Product const p) {
  using Sum = std::conditional_t<std::is_same_v<X, int8_t>, int, float>;
  __shared__ Sum sums[kMaxWarps][kGroups * 128];
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, n0 = blockIdx.x * kRows;
  int const chunks = (p.k + Chunk<kFormat>::kColumns - 1) / Chunk<kFormat>::kColumns;
  Sum acc[kGroups][4] = {};
  for (int first = warp; first < chunks; first += warps * kUnroll) {
    Chunk<kFormat> weight[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * warps < chunks) weight[u].load(p, n0, first + u * warps, lane);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * warps < chunks) accumulate<kFormat, X>(p, weight[u], first + u * warps, lane, acc);
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[warp][(group * 32 + lane) * 4 + i] = acc[group][i];
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kGroups * 128; index += blockDim.x) {
    Sum total = sums[0][index];
    for (int w = 1; w < warps; ++w) total += sums[w][index];
    // the tile's layout: register i of a lane is row lane / 4 + 8 (i / 2), token 2 (lane % 4) + i % 2
    int const i = index & 3, from = (index >> 2) & 31, group = index >> 7;
    int const row = n0 + (from >> 2) + 8 * (i >> 1),
              token = (blockIdx.y * kGroups + group) * 8 + 2 * (from & 3) + (i & 1);
    if (row >= p.n || token >= p.m) continue;
    if constexpr (std::is_same_v<Sum, int>) finish(p, float(kFormat == kBytes ? total : total >> 4), row, token);
    else finish(p, total, row, token);
  }
}

template <Format kFormat, class X>
int launch(Product const& p, cudaStream_t stream) {
  int const tiles = (p.n + kRows - 1) / kRows;
  int const threads = tiles >= 1024 ? 128 : 256;  // enough blocks: longer runs of K a warp
  if (p.m <= 8) gemv<kFormat, X, 1><<<dim3(tiles, 1), threads, 0, stream>>>(p);
  else gemv<kFormat, X, 4><<<dim3(tiles, (p.m + 31) / 32), threads, 0, stream>>>(p);
  return cuda_status(cudaGetLastError());
}

template <Format kFormat>
int launch(Product const& p, int x_dtype, cudaStream_t stream) {
  switch (x_dtype) {
    case kFloat32:
      return launch<kFormat, float>(p, stream);
    case kFloat16:
      return launch<kFormat, __half>(p, stream);
    case kBFloat16:
      return launch<kFormat, __nv_bfloat16>(p, stream);
    default:
      return launch<kFormat, int8_t>(p, stream);
  }
}

// sixteen codes a thread: 8 bytes in, 16 out
__global__ void __launch_bounds__(256) unpack(uint2 const* packed, uint4* codes, int64_t pieces) {
  int64_t const piece = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  auto const widen = [](uint32_t w, uint32_t& first, uint32_t& second) {
    uint32_t const even = __vsub4((w & 0x0F0F0F0Fu) ^ 0x08080808u, 0x08080808u);
    uint32_t const odd = __vsub4(((w >> 4) & 0x0F0F0F0Fu) ^ 0x08080808u, 0x08080808u);
    first = __byte_perm(even, odd, 0x5140), second = __byte_perm(even, odd, 0x7362);
  };
  uint2 const w = __ldcs(packed + piece);
  uint4 out;
  widen(w.x, out.x, out.y);
  widen(w.y, out.z, out.w);
  codes[piece] = out;
}

}  // namespace
}  // namespace convrot

CONVROT_EXPORT int convrot_gemv(void const* weight, int format, void const* x, int x_dtype, void const* a_scale,
                                void const* b_scale, void const* bias, int bias_dtype, void const* gate, int gate_dtype,
                                void const* residual, int64_t residual_stride, void* out, int out_dtype,
                                int64_t out_stride, int m, int n, int k, void* stream) {
  using namespace convrot;
  if (m < 1 || n < 1 || k < 32 || k % 32 != 0 || m > 65535 * 32) return kUnknownShape;
  Product const p{weight,
                  x,
                  static_cast<float const*>(a_scale),
                  static_cast<float const*>(b_scale),
                  bias,
                  gate,
                  residual,
                  out,
                  residual_stride,
                  out_stride,
                  bias_dtype,
                  gate_dtype,
                  out_dtype,
                  m,
                  n,
                  k};
  auto const at = static_cast<cudaStream_t>(stream);
  switch (format) {
    case kReordered:
      return n % kRows ? kUnknownShape : launch<kReordered>(p, x_dtype, at);
    case kPacked:
      return launch<kPacked>(p, x_dtype, at);
    case kBytes:
      return launch<kBytes>(p, x_dtype, at);
    default:
      return kUnknownShape;
  }
}

// packed: `pieces` times 8 bytes, both 16-byte aligned
CONVROT_EXPORT int convrot_unpack(void const* packed, void* codes, int64_t pieces, void* stream) {
  if (pieces < 1) return convrot::kUnknownShape;
  convrot::unpack<<<unsigned((pieces + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<uint2 const*>(packed), static_cast<uint4*>(codes), pieces);
  return convrot::cuda_status(cudaGetLastError());
}
