// What attention reads: RMSNorm of every head of q and k, then the rotary embedding, from the output of one projection.
// For attention in 8 bits (attention_fp8) all three as e4m3, and what it gives widened again.
//
// A token's columns are q, k and, where v is asked for, v: `heads` heads of d columns each. Of the joint sequence the
// first tokens come from `text`, with norms of their own, the others from `image`; without text there is just one.
// One block a token. A head is read by d / 8 lanes, eight columns each, so that a row is one 16-byte access a lane and
// the mean square a few shuffles; a lane turns pairs of its own columns, with cos and sin loaded once for all heads.
// fp32 throughout, each step rounded, as in reference.py; only the order of the sum of squares differs.
//
// FLUX's q and k, 4608 tokens, on an H200: 36.7 us, as Triton's kernel takes. Lost: 256 threads a token (41.6 to 44.5), three
// or six rows under way (38.0 to 39.9).
//
// In e4m3, q and k are in range after RMSNorm, but v needs the scale of its sample, which is known when all of it was read.
// The first launch leaves the largest value of every kTokens tokens; the second finds the largest of those in every block
// and rounds v, part of which is in the cache by then: 12 and 16 us, and the norms' 33 (24 heads of 128, 4608 tokens).
// Lost: four or eight tokens a block (of 1536 tokens 24 and 34 us for all three, not 21), the maxima by the norms' launch
// (45 and 21). What attention gives is widened in 11 us.
#include "eight.cuh"
#include "launch.cuh"

#include <cuda_fp8.h>

namespace convrot {
namespace {

constexpr int kThreads = 128, kAtOnce = 2, kBlocks = 8;  // threads, rows of a lane under way, blocks an SM
constexpr int kTokens = 2;                               // of a block that reads v alone

struct Stream {
  void const* x;
  int64_t stride_b, stride_s;  // elements
  void const *q_weight, *k_weight;
};

struct Problem {
  Stream text, image;
  int weight_dtype, text_tokens, tokens, heads, d, parts;
  float const *cos, *sin;
  void* out[3];
  float inverse_d, eps;
  float *most, *v_scale;  // e4m3: the largest magnitude of every kTokens tokens' v; every sample's scale
};

constexpr float kFp8Max = 448.f, kScaleFloor = 1e-10f;  // as in reference.py

// four at a time; beyond 448 is 448
__device__ __forceinline__ uint32_t fp8_four(float const* v) {
  uint32_t const low = __nv_cvt_float2_to_fp8x2(make_float2(v[0], v[1]), __NV_SATFINITE, __NV_E4M3),
                 high = __nv_cvt_float2_to_fp8x2(make_float2(v[2], v[3]), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}
__device__ __forceinline__ void store_fp8(void* out, int64_t at, float const (&v)[kColumns]) {
  *reinterpret_cast<uint2*>(static_cast<uint8_t*>(out) + at) = make_uint2(fp8_four(v), fp8_four(v + 4));
}

// one head's eight columns of a lane, not rounded yet
template <class X, int kLanes>
__device__ __forceinline__ void turn(Problem const& p, Eight<X> const& raw, bool is_q, float const (&q_weight)[kColumns],
                                     float const (&k_weight)[kColumns], float const (&cos)[kColumns],
                                     float const (&sin)[kColumns], float (&v)[kColumns]) {
  float squares = 0.f;
  unpack<X>(raw, v);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) squares += v[i] * v[i];
#pragma unroll
  for (int across = kLanes / 2; across; across /= 2) squares += __shfl_xor_sync(~0u, squares, across);
  float const inverse = rsqrtf(squares * p.inverse_d + p.eps);
#pragma unroll
  for (int i = 0; i < kColumns; ++i) v[i] = v[i] * inverse * (is_q ? q_weight[i] : k_weight[i]);
  unpack<X>(pack<X>(v), v);
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    float const even = v[i], odd = v[i + 1];
    v[i] = even * cos[i] - odd * sin[i], v[i + 1] = odd * cos[i + 1] + even * sin[i + 1];
  }
}

template <class X, int kLanes, bool kFp8>
__global__ void __launch_bounds__(kThreads, kBlocks) norm_rope(Problem const p) {
  constexpr int kGroups = kThreads / kLanes;
  start_next();
  wait_for_previous();
  int const group = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kColumns;
  int const b = blockIdx.x / p.tokens, s = blockIdx.x % p.tokens;
  bool const is_text = s < p.text_tokens;
  Stream const& from = is_text ? p.text : p.image;
  auto const* x = static_cast<X const*>(from.x) + b * from.stride_b +
                  (is_text ? s : s - p.text_tokens) * from.stride_s + column;
  int64_t const target = int64_t(blockIdx.x) * p.heads * p.d + column;
  int const rows = p.parts * p.heads;
  float cos[kColumns], sin[kColumns], q_weight[kColumns], k_weight[kColumns];
  load_floats(p.cos + int64_t(s) * p.d + column, cos);
  load_floats(p.sin + int64_t(s) * p.d + column, sin);
  load_any(from.q_weight, p.weight_dtype, column, q_weight);
  load_any(from.k_weight, p.weight_dtype, column, k_weight);
  // every lane of a warp takes part in the shuffles: rows beyond the last are read again and not written
  for (int first = group; first - group < rows; first += kAtOnce * kGroups) {
    Eight<X> raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) raw[i] = load_eight(x + int64_t(min(first + i * kGroups, rows - 1)) * p.d);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      int const row = first + i * kGroups, part = min(row, rows - 1) / p.heads;
      int64_t const at = target + int64_t(row - part * p.heads) * p.d;
      if constexpr (kFp8) {
        float v[kColumns];
        turn<X, kLanes>(p, raw[i], part == 0, q_weight, k_weight, cos, sin, v);
        if (row < rows) store_fp8(p.out[part], at, v);
      } else {
        Eight<X> out = raw[i];
        if (__any_sync(~0u, part < 2)) {
          float v[kColumns];
          turn<X, kLanes>(p, raw[i], part == 0, q_weight, k_weight, cos, sin, v);
          out = part == 2 ? raw[i] : pack<X>(v);
        }
        if (row < rows) store_eight(static_cast<X*>(p.out[part]) + at, out);
      }
    }
  }
}

// v alone: eight columns of kTokens tokens a thread
template <class X>
struct OfV {
  Problem const& p;
  int const b = blockIdx.y, first = blockIdx.x * kTokens, width = p.heads * p.d;

  // visit(column, values)
  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    for (int column = threadIdx.x * kColumns; column < width; column += kThreads * kColumns) {
      Eight<X> raw[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        int const s = min(first + i, p.tokens - 1);  // beyond the last: that again
        bool const is_text = s < p.text_tokens;
        Stream const& from = is_text ? p.text : p.image;
        raw[i] = load_eight(static_cast<X const*>(from.x) + b * from.stride_b +
                            (is_text ? s : s - p.text_tokens) * from.stride_s + 2 * width + column);
      }
      visit(column, raw);
    }
  }
};

// the largest of a block's, to all of its threads
__device__ __forceinline__ float block_max(float most) {
  __shared__ float of_warps[kThreads / 32];
#pragma unroll
  for (int across = 16; across; across /= 2) most = max_abs(most, __shfl_xor_sync(~0u, most, across));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) most = max_abs(most, of_warps[warp]);
  return most;
}

template <class X>
__global__ void __launch_bounds__(kThreads) largest_v(Problem const p) {
  float most = 0.f;
  start_next();
  wait_for_previous();
  OfV<X>{p}.each([&](int, Eight<X> const (&raw)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      float v[kColumns];
      unpack<X>(raw[i], v);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) most = max_abs(most, v[c]);
    }
  });
  most = block_max(most);
  if (threadIdx.x == 0) p.most[blockIdx.y * gridDim.x + blockIdx.x] = most;
}

// v / v_scale
template <class X>
__global__ void __launch_bounds__(kThreads) quantize_v(Problem const p) {
  float most = 0.f;
  start_next();
  wait_for_previous();
  for (int i = threadIdx.x; i < gridDim.x; i += kThreads) most = max_abs(most, p.most[blockIdx.y * gridDim.x + i]);
  most = block_max(most) * (1.f / kFp8Max);
  float const scale = most < kScaleFloor ? kScaleFloor : most, inverse = __frcp_rn(scale);  // NaN stays
  OfV<X> const of_v{p};
  if (blockIdx.x == 0 && threadIdx.x == 0) p.v_scale[of_v.b] = scale;
  of_v.each([&](int column, Eight<X> const (&raw)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      int const s = of_v.first + i;
      if (s >= p.tokens) break;
      float v[kColumns];
      unpack<X>(raw[i], v);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) v[c] *= inverse;
      store_fp8(p.out[2], (int64_t(of_v.b) * p.tokens + s) * of_v.width + column, v);
    }
  });
}

// e4m3 times its sample's scale; kColumns values a thread
template <class X>
__global__ void __launch_bounds__(kThreads) widen_fp8(uint8_t const* x, float const* scale, X* out, int64_t sample) {
  int64_t const at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kColumns, b = blockIdx.y;
  start_next();
  wait_for_previous();
  if (at >= sample) return;
  uint2 const raw = __ldg(reinterpret_cast<uint2 const*>(x + b * sample + at));
  float const by = scale[b];
  float v[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    uint32_t const four = i < 4 ? raw.x : raw.y;
    __half2_raw const pair = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(four >> (i % 4 * 8)), __NV_E4M3);
    float2 const wide = __half22float2(__half2(pair));
    v[i] = wide.x * by, v[i + 1] = wide.y * by;
  }
  store_eight(out + b * sample + at, pack<X>(v));
}

template <class X, bool kFp8>
int launch(Problem const& p, int64_t blocks, cudaStream_t stream) {
  auto const run = [&](auto* kernel) { return launch_early(kernel, unsigned(blocks), kThreads, stream, p); };
  switch (p.d) {
    case 16:
      return run(norm_rope<X, 2, kFp8>);
    case 32:
      return run(norm_rope<X, 4, kFp8>);
    case 64:
      return run(norm_rope<X, 8, kFp8>);
    case 128:
      return run(norm_rope<X, 16, kFp8>);
    case 256:
      return run(norm_rope<X, 32, kFp8>);
    default:
      return kUnknownShape;
  }
}

template <class X>
int launch_fp8(Problem const& p, int batch, cudaStream_t stream) {
  dim3 const grid(unsigned((p.tokens + kTokens - 1) / kTokens), unsigned(batch));
  if (int const failed = launch_early(largest_v<X>, grid, kThreads, stream, p)) return failed;
  if (int const failed = launch_early(quantize_v<X>, grid, kThreads, stream, p)) return failed;
  return launch<X, true>(p, int64_t(batch) * p.tokens, stream);
}

template <class X>
int launch_widen(void const* x, float const* scale, void* out, int batch, int64_t sample, cudaStream_t stream) {
  int64_t const blocks = (sample / kColumns + kThreads - 1) / kThreads;
  if (sample % kColumns || blocks > INT32_MAX) return kUnknownShape;
  return launch_early(widen_fp8<X>, dim3(unsigned(blocks), unsigned(batch)), kThreads, stream,
                      static_cast<uint8_t const*>(x), scale, static_cast<X*>(out), sample);
}

constexpr int kMostSamples = 65535;  // blocks along y

}  // namespace
}  // namespace convrot

// text (batch, text_tokens, parts * heads * d) or null, image (batch, image_tokens, ...), of one dtype, columns adjacent,
// pointers, the weights' too, and strides multiples of 16 bytes; cos, sin (tokens, d); q, k and, for three parts, v (batch, tokens, heads, d)
CONVROT_EXPORT int convrot_norm_rope(void const* text, int64_t text_stride_b, int64_t text_stride_s, void const* image,
                                     int64_t image_stride_b, int64_t image_stride_s, int dtype,
                                     void const* text_q_weight, void const* text_k_weight, void const* q_weight,
                                     void const* k_weight, int weight_dtype, void const* cos, void const* sin, void* q,
                                     void* k, void* v, int batch, int text_tokens, int image_tokens, int heads, int d,
                                     float eps, void* stream) {
  using namespace convrot;
  int64_t const tokens = int64_t(text_tokens) + image_tokens, blocks = tokens * batch;
  if (batch < 1 || tokens < 1 || heads < 1 || blocks > INT32_MAX) return kUnknownShape;
  Problem const p{{text, text_stride_b, text_stride_s, text_q_weight, text_k_weight},
                  {image, image_stride_b, image_stride_s, q_weight, k_weight},
                  weight_dtype,
                  text_tokens,
                  int(tokens),
                  heads,
                  d,
                  v ? 3 : 2,
                  static_cast<float const*>(cos),
                  static_cast<float const*>(sin),
                  {q, k, v},
                  1.f / float(d),
                  eps,
                  nullptr,
                  nullptr};
  auto const at = static_cast<cudaStream_t>(stream);
  return dtype == kBFloat16  ? launch<__nv_bfloat16, false>(p, blocks, at)
         : dtype == kFloat16 ? launch<__half, false>(p, blocks, at)
                             : launch<float, false>(p, blocks, at);
}

// the same of three parts in e4m3; v_scale fp32 (batch,); most: room for fp32 (batch, tokens / kTokens, rounded up)
CONVROT_EXPORT int convrot_norm_rope_fp8(void const* text, int64_t text_stride_b, int64_t text_stride_s,
                                         void const* image, int64_t image_stride_b, int64_t image_stride_s, int dtype,
                                         void const* text_q_weight, void const* text_k_weight, void const* q_weight,
                                         void const* k_weight, int weight_dtype, void const* cos, void const* sin,
                                         void* q, void* k, void* v, void* v_scale, void* most, int batch,
                                         int text_tokens, int image_tokens, int heads, int d, float eps, void* stream) {
  using namespace convrot;
  int64_t const tokens = int64_t(text_tokens) + image_tokens;
  if (batch < 1 || batch > kMostSamples || tokens < 1 || heads < 1 || tokens * batch > INT32_MAX) return kUnknownShape;
  Problem const p{{text, text_stride_b, text_stride_s, text_q_weight, text_k_weight},
                  {image, image_stride_b, image_stride_s, q_weight, k_weight},
                  weight_dtype,
                  text_tokens,
                  int(tokens),
                  heads,
                  d,
                  2,  // of the norms
                  static_cast<float const*>(cos),
                  static_cast<float const*>(sin),
                  {q, k, v},
                  1.f / float(d),
                  eps,
                  static_cast<float*>(most),
                  static_cast<float*>(v_scale)};
  auto const at = static_cast<cudaStream_t>(stream);
  return dtype == kBFloat16  ? launch_fp8<__nv_bfloat16>(p, batch, at)
         : dtype == kFloat16 ? launch_fp8<__half>(p, batch, at)
                             : launch_fp8<float>(p, batch, at);
}

// x e4m3 (batch, sample), scale fp32 (batch,) -> out (batch, sample), sample a multiple of 8, pointers of 16 bytes
CONVROT_EXPORT int convrot_widen_fp8(void const* x, void const* scale, void* out, int dtype, int batch, int64_t sample,
                                     void* stream) {
  using namespace convrot;
  if (batch < 1 || batch > kMostSamples || sample < 1) return kUnknownShape;
  auto const* by = static_cast<float const*>(scale);
  auto const at = static_cast<cudaStream_t>(stream);
  return dtype == kBFloat16  ? launch_widen<__nv_bfloat16>(x, by, out, batch, sample, at)
         : dtype == kFloat16 ? launch_widen<__half>(x, by, out, batch, sample, at)
                             : launch_widen<float>(x, by, out, batch, sample, at);
}
