// rotate_quantize.cu's arithmetic: four values at a time between memory and fp32, the activations of the prologues, the
// entries of H16 and L, and the tensor-core products that keep fp32's accuracy by splitting an operand.
#pragma once
#include "abi.h"

#include <type_traits>

namespace convrot {
namespace {

// four consecutive values as they lie in memory
template <class In>
struct Raw {
  using type = uint2;
};
template <>
struct Raw<float> {
  using type = float4;
};
template <class In>
using Four = typename Raw<In>::type;

template <class In>
constexpr int dtype_of = std::is_same_v<In, float> ? kFloat32 : std::is_same_v<In, __half> ? kFloat16 : kBFloat16;

template <class In>
__device__ __forceinline__ Four<In> load_four(In const* at) {
  if constexpr (sizeof(In) == 4) {
    return __ldg(reinterpret_cast<float4 const*>(at));
  } else {
    uint2 v;  // read once: keep it out of L1
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
  }
}

template <class In>
__device__ __forceinline__ float4 widen(Four<In> v) {
  if constexpr (std::is_same_v<In, float>) {
    return v;
  } else if constexpr (std::is_same_v<In, __half>) {
    float2 const a = __half22float2(*reinterpret_cast<__half2 const*>(&v.x)),
                 b = __half22float2(*reinterpret_cast<__half2 const*>(&v.y));
    return make_float4(a.x, a.y, b.x, b.y);
  } else {
    return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xFFFF0000u), __uint_as_float(v.y << 16),
                       __uint_as_float(v.y & 0xFFFF0000u));
  }
}

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint32_t fp16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// the one rounding after a prologue
template <class In>
__device__ __forceinline__ Four<In> narrow(float4 v) {
  if constexpr (std::is_same_v<In, float>) return v;
  else if constexpr (std::is_same_v<In, __half>) return make_uint2(fp16_pair(v.x, v.y), fp16_pair(v.z, v.w));
  else return make_uint2(bf16_pair(v.x, v.y), bf16_pair(v.z, v.w));
}

template <class Function>
__device__ __forceinline__ float4 each(float4 v, Function f) {
  return make_float4(f(v.x), f(v.y), f(v.z), f(v.w));
}

constexpr float kLog2E = 1.4426950408889634f;

// x / (1 + 2^z); off by some 1e-7, which only 16-bit inputs and 4-bit codes hide
__device__ __forceinline__ float over_one_plus_exp2(float x, float z) {
  float e, r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(z));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + e));
  return x * r;
}
template <bool kPrecise>
__device__ __forceinline__ float silu(float x) {
  if constexpr (kPrecise) return __fdiv_rn(x, 1.f + expf(-x));
  else return over_one_plus_exp2(x, x * -kLog2E);
}
// tanh gelu: x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
template <bool kPrecise>
__device__ __forceinline__ float gelu(float x) {
  constexpr float kLinear = 1.5957691216057308f, kCubic = 0.0713548162726f;
  if constexpr (kPrecise) return __fdiv_rn(x, 1.f + expf(-x * fmaf(x * x, kCubic, kLinear)));
  else return over_one_plus_exp2(x, x * fmaf(x * x, -kLog2E * kCubic, -kLog2E * kLinear));
}

// LayerNorm: x -> x * scale + offset
struct Moments {
  float scale, offset;
};
constexpr float kTiny = 0x1p-80f;  // its factor where squares leave fp32; as reference.py does

__device__ __forceinline__ float max_abs(float best, float v) {  // NaN wins
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(best), "f"(fabsf(v)));
  return out;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// H16[r][c] = -1/4 where exactly one of the two base-4 digits of r ^ c is 3: the sign bit of a 16-bit float
constexpr uint32_t sign16(int x) { return (((x & (x >> 1)) ^ ((x >> 2) & (x >> 3))) & 1) << 15; }
// entry of L at row ^ column = x, in bf16
constexpr uint32_t left_entry(int x, int group) {
  if (group >= 256) return 0x3E80u | sign16(x);                       // +-1/4
  if (group == 64) return x < 4 ? (x == 3 ? 0xBF00u : 0x3F00u) : 0u;  // +-1/2 in the blocks of the diagonal
  return x == 0 ? 0x3F80u : 0u;
}
// index of a fragment -> column of X: a lane t holds columns 4t .. 4t + 3
constexpr int permuted(int m) { return ((m & 7) >> 1) * 4 + (m & 1) + ((m >> 3) << 1); }

// The fragments of both factors, a lane's own four words: the two that the first repeats, the two that the second does.
struct Fragments {
  uint4 lanes[32];
};
template <bool kHalf, int kGroup>
constexpr Fragments make_fragments() {
  Fragments table{};
  for (int lane = 0; lane < 32; ++lane) {
    int const g = lane >> 2, t = lane & 3, pg = permuted(g), pt = permuted(2 * t);
    uint32_t const quarters = (kHalf ? 0x3400u : 0x3E80u) * 0x10001u;
    table.lanes[lane].x = quarters | sign16(pg ^ pt) | sign16(pg ^ (pt + 1)) << 16;
    table.lanes[lane].y = quarters | sign16(pg ^ 2 ^ pt) | sign16(pg ^ 2 ^ (pt + 1)) << 16;
    table.lanes[lane].z = left_entry(g ^ (2 * t), kGroup) | left_entry(g ^ (2 * t + 1), kGroup) << 16;
    table.lanes[lane].w = left_entry(g ^ 8 ^ (2 * t), kGroup) | left_entry(g ^ 8 ^ (2 * t + 1), kGroup) << 16;
  }
  return table;
}
// a load where computing them took a tenth of the kernel's instructions
template <bool kHalf, int kGroup>
static __device__ constexpr Fragments kFragments = make_fragments<kHalf, kGroup>();

template <bool kHalf>
__device__ __forceinline__ uint4 fragments_of(int group, int lane) {
  Fragments const& table = group >= 256  ? kFragments<kHalf, 256>
                           : group == 64 ? kFragments<kHalf, 64>
                                         : kFragments<kHalf, 16>;
  return __ldg(table.lanes + lane);
}

template <bool kHalf>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%5,%4}, {%6,%7}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%5,%4}, {%6,%7}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
  }
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, float b0,
                                         float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ __forceinline__ float to_tf32(float v) { return __uint_as_float(__float_as_uint(v) & 0xFFFFE000u); }

template <int kTerms>
__device__ __forceinline__ void split(float a, float b, uint32_t (&terms)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = bf16_pair(a, b);
    a -= low_of(terms[i]), b -= high_of(terms[i]);
  }
}

// d = A2 . B, B given as fp32 pairs (b0, b1), (b2, b3) of the two halves of K; smallest terms first
template <int kTerms>
__device__ __forceinline__ void multiply_split(float (&d)[4], uint32_t r0, uint32_t r1, float b0, float b1, float b2,
                                               float b3) {
  uint32_t first[kTerms], second[kTerms];
  split<kTerms>(b0, b1, first);
  split<kTerms>(b2, b3, second);
#pragma unroll
  for (int i = kTerms - 1; i >= 0; --i) mma<false>(d, r0, r1, first[i], second[i]);
}
__device__ __forceinline__ void multiply_tf32(float (&d)[4], uint32_t r0, uint32_t r1, float b0, float b1, float b2,
                                              float b3) {
  uint32_t const t0 = r0 << 16, t1 = r1 << 16, t2 = r0 & 0xFFFF0000u, t3 = r1 & 0xFFFF0000u;  // the entries as fp32
  float const h0 = to_tf32(b0), h1 = to_tf32(b1), h2 = to_tf32(b2), h3 = to_tf32(b3);
  mma_tf32(d, t0, t1, t2, t3, b0 - h0, b1 - h1);
  mma_tf32(d, t1, t0, t3, t2, b2 - h2, b3 - h3);
  mma_tf32(d, t0, t1, t2, t3, h0, h1);
  mma_tf32(d, t1, t0, t3, t2, h2, h3);
}

// (a, b, c, d) -> H4 / 2 times it
__device__ __forceinline__ void hadamard4(float& a, float& b, float& c, float& d) {
  float const half = ((a + b) + (c + d)) * 0.5f, a1 = half - d, b1 = half - c, c1 = half - b;
  d = half - a, a = a1, b = b1, c = c1;
}

}  // namespace
}  // namespace convrot
