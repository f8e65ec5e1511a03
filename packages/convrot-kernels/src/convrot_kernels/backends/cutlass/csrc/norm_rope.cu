// What attention reads: RMSNorm of every head of q and k, then the rotary embedding, from the output of one projection.
//
// A token's columns are q, k and, where v is asked for, v: `heads` heads of d columns each. Of the joint sequence the
// first tokens come from `text`, with norms of their own, the others from `image`; without text there is just one.
// One block a token. A head is read by d / 8 lanes, eight columns each, so that a row is one 16-byte access a lane and
// the mean square a few shuffles; a lane turns pairs of its own columns, with cos and sin loaded once for all heads.
// fp32 throughout, each step rounded, as in reference.py; only the order of the sum of squares differs.
//
// FLUX's q and k, 4608 tokens, on an H200: 36.7 us, as Triton's kernel takes. Lost: 256 threads a token (41.6 to 44.5), three
// or six rows under way (38.0 to 39.9).
#include "eight.cuh"

namespace convrot {
namespace {

constexpr int kThreads = 128, kAtOnce = 2, kBlocks = 8;  // threads, rows of a lane under way, blocks an SM

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
};

// one head's eight columns of a lane
template <class X, int kLanes>
__device__ __forceinline__ Eight<X> turned(Problem const& p, Eight<X> const& raw, bool is_q,
                                           float const (&q_weight)[kColumns], float const (&k_weight)[kColumns],
                                           float const (&cos)[kColumns], float const (&sin)[kColumns]) {
  float v[kColumns], squares = 0.f;
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
  return pack<X>(v);
}

template <class X, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks) norm_rope(Problem const p) {
  constexpr int kGroups = kThreads / kLanes;
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
      Eight<X> out = raw[i];
      if (__any_sync(~0u, part < 2)) {
        out = turned<X, kLanes>(p, raw[i], part == 0, q_weight, k_weight, cos, sin);
        if (part == 2) out = raw[i];
      }
      if (row < rows)
        store_eight(static_cast<X*>(p.out[part]) + target + int64_t(row - part * p.heads) * p.d, out);
    }
  }
}

template <class X>
int launch(Problem const& p, int64_t blocks, cudaStream_t stream) {
  auto const run = [&](auto* kernel) {
    kernel<<<unsigned(blocks), kThreads, 0, stream>>>(p);
    return cuda_status(cudaGetLastError());
  };
  switch (p.d) {
    case 16:
      return run(norm_rope<X, 2>);
    case 32:
      return run(norm_rope<X, 4>);
    case 64:
      return run(norm_rope<X, 8>);
    case 128:
      return run(norm_rope<X, 16>);
    case 256:
      return run(norm_rope<X, 32>);
    default:
      return kUnknownShape;
  }
}

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
                  eps};
  auto const at = static_cast<cudaStream_t>(stream);
  return dtype == kBFloat16  ? launch<__nv_bfloat16>(p, blocks, at)
         : dtype == kFloat16 ? launch<__half>(p, blocks, at)
                             : launch<float>(p, blocks, at);
}
