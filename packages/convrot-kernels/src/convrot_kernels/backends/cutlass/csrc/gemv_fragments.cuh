// gemv.cu's operands: from memory to tensor-core fragments, per weight format and x type. The order of K inside a step
// is whatever the weight's bytes give; the loads of x follow it.
#pragma once
#include "abi.h"

#include <type_traits>

namespace convrot {
namespace {

enum Format : int { kReordered = 0, kPacked = 1, kBytes = 2 };

constexpr int kRows = 16;     // weight rows of a warp, and of a block

struct Product {
  void const* weight;
  void const* x;
  float const* a_scale;  // null for values
  float const* b_scale;
  void const *bias, *gate, *residual;
  void* out;
  int64_t residual_stride, out_stride;
  int bias_dtype, gate_dtype, out_dtype, m, n, k;
};

// Asynchronous copy of 8 or 16 bytes into shared memory; zeros where not `inside`. Many in flight cost no register.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, void const* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(uint32_t(__cvta_generic_to_shared(to))),
               "l"(from), "n"(kBytes), "r"(inside ? kBytes : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void await_copies() {  // orders them before this thread's reads alone
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What a lane copies at once: one chunk of K for its weight rows g and g + 8, g = lane / 4.
template <Format kFormat>
struct Chunk {
  uint4 low, high;  // rows g and g + 8
  static constexpr int kColumns = kFormat == kPacked ? 128 : 64;
  static constexpr int kSteps = kFormat == kPacked ? 4 : 2;
  __device__ void copy(Product const& p, int n0, int chunk, int lane) {
    int const bytes = kFormat == kPacked ? p.k / 2 : p.k;
    int const at = chunk * 64 + (lane & 3) * 16, g = n0 + (lane >> 2);
    bool const inside = at < bytes;
    auto const* rows = static_cast<uint8_t const*>(p.weight);
    bool const first = inside && g < p.n, second = inside && g + 8 < p.n;
    copy_async<16>(&low, rows + (first ? int64_t(g) * bytes + at : 0), first);
    copy_async<16>(&high, rows + (second ? int64_t(g + 8) * bytes + at : 0), second);
  }
  // column of the first of the eight x that a lane needs in `step`; the second four follow
  static __device__ int column(int chunk, int step, int lane) {
    return chunk * kColumns + (lane & 3) * (kColumns / 4) + step * 8;
  }
  static constexpr int kSecond = 4;
};

template <>
struct Chunk<kReordered> {
  uint2 both;  // low nibbles: row g, high nibbles: row g + 8
  static constexpr int kColumns = 32;
  static constexpr int kSteps = 1;
  __device__ void copy(Product const& p, int n0, int chunk, int lane) {
    int64_t const at = (int64_t(chunk) * (p.n / kRows) + n0 / kRows) * 32 + lane;
    copy_async<8>(&both, static_cast<uint2 const*>(p.weight) + at, true);
  }
  static __device__ int column(int chunk, int, int lane) { return chunk * kColumns + (lane & 3) * 4; }
  static constexpr int kSecond = 16;
};

__device__ __forceinline__ uint32_t word(uint4 const& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}
// a nibble in the high half of a byte is the int8 16 * v
__device__ __forceinline__ uint32_t even16(uint32_t w) { return (w << 4) & 0xF0F0F0F0u; }
__device__ __forceinline__ uint32_t odd16(uint32_t w) { return w & 0xF0F0F0F0u; }

// int8 fragments of one step: rows g and g + 8 of the first 16 columns, then of the last 16
__device__ __forceinline__ void fragments(Chunk<kReordered> const& c, int, uint32_t (&a)[4]) {
  a[0] = even16(c.both.x), a[1] = odd16(c.both.x), a[2] = even16(c.both.y), a[3] = odd16(c.both.y);
}
__device__ __forceinline__ void fragments(Chunk<kPacked> const& c, int step, uint32_t (&a)[4]) {
  uint32_t const g = word(c.low, step), h = word(c.high, step);
  a[0] = even16(g), a[1] = even16(h), a[2] = odd16(g), a[3] = odd16(h);
}
__device__ __forceinline__ void fragments(Chunk<kBytes> const& c, int step, uint32_t (&a)[4]) {
  a[0] = word(c.low, 2 * step), a[1] = word(c.high, 2 * step), a[2] = word(c.low, 2 * step + 1),
  a[3] = word(c.high, 2 * step + 1);
}

__device__ __forceinline__ void mma(int (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <bool kHalf>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ uint32_t bits(__nv_bfloat162 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ uint32_t bits(__half2 v) { return *reinterpret_cast<uint32_t*>(&v); }

// Nibbles i and i + 4 of w as a pair of 16-bit floats: v ^ 8 in the mantissa of 128 (bf16) or 1024 (fp16), minus that
// + 8.
template <bool kHalf>
__device__ __forceinline__ uint32_t nibble_pair(uint32_t w, int i) {
  uint32_t const masked = (w >> (4 * i)) & 0x000F000Fu;
  if constexpr (kHalf) {
    uint32_t const biased = masked ^ 0x64086408u;
    return bits(__hsub2(*reinterpret_cast<__half2 const*>(&biased), __float2half2_rn(1032.f)));
  } else {
    uint32_t const biased = masked ^ 0x43084308u;
    return bits(__hsub2(*reinterpret_cast<__nv_bfloat162 const*>(&biased), __float2bfloat162_rn(136.f)));
  }
}
// Bytes i and i + 1 of w, exact in both types.
template <bool kHalf>
__device__ __forceinline__ uint32_t byte_pair(uint32_t w, int i) {
  float const a = float(int8_t(w >> (8 * i))), b = float(int8_t(w >> (8 * i + 8)));
  if constexpr (kHalf) return bits(__floats2half2_rn(a, b));
  else return bits(__floats2bfloat162_rn(a, b));
}

// 16-bit fragments: a step of 32 columns is two tiles of 16, `half` says which
template <bool kHalf>
__device__ __forceinline__ void fragments16(Chunk<kReordered> const& c, int, int half, uint32_t (&a)[4]) {
  uint32_t const w = half ? c.both.y : c.both.x;
  a[0] = nibble_pair<kHalf>(w, 0), a[1] = nibble_pair<kHalf>(w, 1), a[2] = nibble_pair<kHalf>(w, 2),
  a[3] = nibble_pair<kHalf>(w, 3);
}
template <bool kHalf>
__device__ __forceinline__ void fragments16(Chunk<kPacked> const& c, int step, int half, uint32_t (&a)[4]) {
  uint32_t const g = word(c.low, step), h = word(c.high, step);
  a[0] = nibble_pair<kHalf>(g, 2 * half), a[1] = nibble_pair<kHalf>(h, 2 * half);
  a[2] = nibble_pair<kHalf>(g, 2 * half + 1), a[3] = nibble_pair<kHalf>(h, 2 * half + 1);
}
template <bool kHalf>
__device__ __forceinline__ void fragments16(Chunk<kBytes> const& c, int step, int half, uint32_t (&a)[4]) {
  uint32_t const g = word(c.low, 2 * step + half), h = word(c.high, 2 * step + half);
  a[0] = byte_pair<kHalf>(g, 0), a[1] = byte_pair<kHalf>(h, 0), a[2] = byte_pair<kHalf>(g, 2),
  a[3] = byte_pair<kHalf>(h, 2);
}

__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

// The x that one lane needs in one step: eight columns of one token, in the column order of the weight's fragments.
template <class X>
struct XFragment {  // 16-bit values, or the three terms of fp32: words of tile 0, then of tile 1
  static constexpr int kTerms = std::is_same_v<X, float> ? 3 : 1;
  uint4 words[kTerms];

  template <Format kFormat>
  __device__ void load(X const* x) {
    uint32_t pairs[kTerms][4];  // (x0 x1) (x2 x3), then those of the second four columns
    if constexpr (kTerms == 3) {
      load_terms<kFormat>(x, pairs);
    } else {
      uint2 const first = *reinterpret_cast<uint2 const*>(x);
      uint2 const second = *reinterpret_cast<uint2 const*>(x + Chunk<kFormat>::kSecond);
      pairs[0][0] = first.x, pairs[0][1] = first.y, pairs[0][2] = second.x, pairs[0][3] = second.y;
    }
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      uint32_t const(&v)[4] = pairs[term];
      if constexpr (kFormat == kBytes) {
        words[term] = make_uint4(v[0], v[1], v[2], v[3]);
      } else {  // nibbles i and i + 4 of a word are neighbours
        constexpr bool kPaired = kFormat == kReordered;
        uint32_t const a = v[0], b = kPaired ? v[1] : v[2], c = kPaired ? v[2] : v[1], d = v[3];
        words[term] = make_uint4(low_halves(a, b), high_halves(a, b), low_halves(c, d), high_halves(c, d));
      }
    }
  }

 private:
  // fp32 = high + middle + low in bf16, exactly; an infinite or NaN x has no lower terms
  template <Format kFormat>
  static __device__ void load_terms(float const* x, uint32_t (&terms)[kTerms][4]) {
    float4 const first = *reinterpret_cast<float4 const*>(x);
    float4 const second = *reinterpret_cast<float4 const*>(x + Chunk<kFormat>::kSecond);
    float rest[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        __nv_bfloat162 const pair =
            term == 0 ? __nv_bfloat162(__float2bfloat16_rz(rest[2 * i]), __float2bfloat16_rz(rest[2 * i + 1]))
                      : __floats2bfloat162_rn(rest[2 * i], rest[2 * i + 1]);
        terms[term][i] = bits(pair);
        rest[2 * i] = isfinite(rest[2 * i]) ? rest[2 * i] - __low2float(pair) : 0.f;
        rest[2 * i + 1] = isfinite(rest[2 * i + 1]) ? rest[2 * i + 1] - __high2float(pair) : 0.f;
      }
    }
  }
};

template <>
struct XFragment<int8_t> {
  uint2 words;

  template <Format kFormat>
  __device__ void load(int8_t const* x) {
    if constexpr (kFormat == kReordered) {
      words.x = *reinterpret_cast<uint32_t const*>(x), words.y = *reinterpret_cast<uint32_t const*>(x + 16);
    } else {
      words = *reinterpret_cast<uint2 const*>(x);
      if (kFormat == kPacked) {
        words = make_uint2(__byte_perm(words.x, words.y, 0x6420), __byte_perm(words.x, words.y, 0x7531));
      }
    }
  }
};

}  // namespace
}  // namespace convrot
