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

// What a lane loads at once: one chunk of K for its weight rows g and g + 8, g = lane / 4. Nothing is predicated: beyond
// the matrix it loads the last row or column again, whose products go nowhere or meet x = 0.
template <Format kFormat>
struct Chunk {
  uint4 low, high;  // rows g and g + 8
  static constexpr int kColumns = kFormat == kPacked ? 128 : 64;
  static constexpr int kSteps = kFormat == kPacked ? 4 : 2;
  static constexpr int kTiles = 1, kAhead = 2;  // of a warp: 16-row tiles, chunks under way while as many are used

  // a lane's place in the rows of one tile, and how it moves with the chunk
  struct Place {
    uint8_t const *first, *second;
    int bytes;
    __device__ Place(Product const& p, int tile, int lane) : bytes(kFormat == kPacked ? p.k / 2 : p.k) {
      auto const* rows = static_cast<uint8_t const*>(p.weight);
      int const g = tile * kRows + (lane >> 2);
      first = rows + int64_t(min(g, p.n - 1)) * bytes, second = rows + int64_t(min(g + 8, p.n - 1)) * bytes;
    }
    __device__ void load(Chunk& to, int chunk, int lane) const {
      int const at = min(chunk * 64 + (lane & 3) * 16, bytes - 16);
      to.low = __ldcs(reinterpret_cast<uint4 const*>(first + at));
      to.high = __ldcs(reinterpret_cast<uint4 const*>(second + at));
    }
  };
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
  static constexpr int kTiles = 2, kAhead = 3;

  struct Place {
    uint2 const* first;
    uint32_t last;  // chunk
    __device__ Place(Product const& p, int tile, int lane) : last(p.k / kColumns - 1) {
      first = static_cast<uint2 const*>(p.weight) + int64_t(min(tile, p.n / kRows - 1)) * (p.k / kColumns) * 32 + lane;
    }
    __device__ void load(Chunk& to, int chunk, int) const {  // volatile: ahead of the products, where it stands
      asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                   : "=r"(to.both.x), "=r"(to.both.y)
                   : "l"(first + min(uint32_t(chunk), last) * 32u));
    }
  };
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

// From nibbles to 16-bit floats. Nibbles i and i + 4 of a word become a pair: v ^ 8 in the top of the mantissa of 16, that
// is 24 + v. Taking 24 off costs an instruction a pair; a product of -24 with the same x costs one a tile.
// The constants depend on the arguments as far as a compiler can see: and-xor is one instruction only where one of its
// two constants is in a register, and a tensor core takes an operand from registers.
template <bool kHalf>
struct Nibbles {
  uint32_t mask, minus[4];

  __device__ explicit Nibbles(Product const& p) {
    uint32_t const zeros[4] = {uint32_t(p.m) >> 31, uint32_t(p.n) >> 31, uint32_t(p.k) >> 31, uint32_t(p.out_dtype) >> 31};
    mask = (0x000F000Fu << kPlace) + zeros[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) minus[i] = (kHalf ? 0xCE00CE00u : 0xC1C0C1C0u) + zeros[i];
  }
  __device__ uint32_t pair(uint32_t w, int i) const {
    int const up = kPlace - 4 * i;
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;"  // (a & b) ^ c
        : "=r"(out)
        : "r"(up >= 0 ? w << up : w >> -up), "r"(mask), "r"((kHalf ? 0x4C004C00u : 0x41804180u) | 0x00080008u << kPlace));
    return out;
  }

 private:
  static constexpr int kPlace = kHalf ? 6 : 3;  // of the mantissa's highest four bits
};

// Bytes i and i + 1 of w, exact in both types.
template <bool kHalf>
__device__ __forceinline__ uint32_t byte_pair(uint32_t w, int i) {
  float const a = float(int8_t(w >> (8 * i))), b = float(int8_t(w >> (8 * i + 8)));
  if constexpr (kHalf) return bits(__floats2half2_rn(a, b));
  else return bits(__floats2bfloat162_rn(a, b));
}

// 16-bit fragments: a step of 32 columns is two tiles of 16, `half` says which
template <bool kHalf>
__device__ __forceinline__ void fragments16(Nibbles<kHalf> const& to, Chunk<kReordered> const& c, int, int half,
                                            uint32_t (&a)[4]) {
  uint32_t const w = half ? c.both.y : c.both.x;
  a[0] = to.pair(w, 0), a[1] = to.pair(w, 1), a[2] = to.pair(w, 2), a[3] = to.pair(w, 3);
}
template <bool kHalf>
__device__ __forceinline__ void fragments16(Nibbles<kHalf> const& to, Chunk<kPacked> const& c, int step, int half,
                                            uint32_t (&a)[4]) {
  uint32_t const g = word(c.low, step), h = word(c.high, step);
  a[0] = to.pair(g, 2 * half), a[1] = to.pair(h, 2 * half);
  a[2] = to.pair(g, 2 * half + 1), a[3] = to.pair(h, 2 * half + 1);
}
template <bool kHalf>
__device__ __forceinline__ void fragments16(Nibbles<kHalf> const&, Chunk<kBytes> const& c, int step, int half,
                                            uint32_t (&a)[4]) {
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
