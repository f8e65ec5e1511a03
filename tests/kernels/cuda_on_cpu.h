// As much of CUDA as csrc/low_rank.cu and gemv.cu ask for, on a CPU: a fiber a thread, one block after the other. Lanes of a warp meet
// where they exchange something, the threads of a block where they synchronize; who never comes is found out.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::isfinite;
using std::min;

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return 0; }
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int) { return 0; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  return std::memcpy(&value, &bits, 4), value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  return std::memcpy(&bits, &value, 4), bits;
}
inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  uint64_t const both = x | uint64_t(y) << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return out;
}
inline uint32_t __vsub4(uint32_t a, uint32_t b) {
  uint32_t out = 0;
  for (int i = 0; i < 32; i += 8) out |= uint32_t(uint8_t((a >> i) - (b >> i))) << i;
  return out;
}

struct __nv_bfloat16 { uint16_t bits; };
struct __half { _Float16 value; };
struct __half2 { __half x, y; };
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t const bits = __float_as_uint(v);
  if (v != v) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline __nv_bfloat16 __float2bfloat16_rz(float v) { return {uint16_t(__float_as_uint(v) >> 16)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
inline float2 __half22float2(__half2 v) { return {float(v.x.value), float(v.y.value)}; }

namespace on_cpu {

constexpr int kLanes = 32, kStack = 1 << 16, kPatience = 1 << 20;

struct Meeting {
  int arrived = 0;
  long generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting block;
inline ucontext_t scheduler;
inline int current = 0;
inline long waits = 0;
inline std::function<void()> body;
inline dim3 block_at(0, 0, 0);
inline uint32_t exchanged[64][kLanes][10];

inline void meet(Meeting& meeting, int expected) {
  long const mine = meeting.generation;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0, ++meeting.generation, waits = 0;
    return;
  }
  while (meeting.generation == mine) {
    if (++waits > kPatience) std::fprintf(stderr, "a thread never comes\n"), std::abort();
    swapcontext(&fibers[current].context, &scheduler);
  }
}
inline int warp() { return current / kLanes; }
inline int lane() { return current % kLanes; }
inline void meet_warp() { meet(warps[warp()], kLanes); }

inline void run_fiber() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}

// what a block's threads share beyond its variables
template <class T>
T* dynamic_shared() {
  static uint4 memory[128 << 10 >> 4];
  return reinterpret_cast<T*>(memory);
}

inline void launch(dim3 grid, int threads, std::function<void()> kernel) {
  body = std::move(kernel);
  for (block_at.y = 0; block_at.y < grid.y; ++block_at.y) {
    for (block_at.x = 0; block_at.x < grid.x; ++block_at.x) {
      if (int(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
      warps.assign(threads / kLanes, {}), block = {};
      for (Fiber& fiber : fibers) {
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = kStack;
        makecontext(&fiber.context, run_fiber, 0);
      }
      for (bool some = true; some;) {
        some = false;
        for (current = 0; current < threads; ++current) {
          if (fibers[current].done) continue;
          some = true;
          swapcontext(&scheduler, &fibers[current].context);
        }
      }
    }
  }
}

inline uint32_t pair_of(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }
inline uint16_t half_bits(float v) {
  _Float16 const half = _Float16(v);
  uint16_t bits;
  return std::memcpy(&bits, &half, 2), bits;
}
inline float of_half(uint16_t bits) {
  _Float16 half;
  return std::memcpy(&half, &bits, 2), float(half);
}

// what the asm statements say, output operands first
inline void cvt_rn_bf16x2_f32(uint32_t& to, float high, float low) {
  to = pair_of(__float2bfloat16_rn(low).bits, __float2bfloat16_rn(high).bits);
}
inline void cvt_rn_f16x2_f32(uint32_t& to, float high, float low) { to = pair_of(half_bits(low), half_bits(high)); }
inline void ex2_approx_ftz_f32(float& to, float v) { to = std::exp2(v); }
inline void rcp_approx_ftz_f32(float& to, float v) { to = 1.f / v; }
template <class T>
void ld_global_nc_L1__no_allocate_v4_u32(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, T const* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) std::fprintf(stderr, "not aligned\n"), std::abort();
  uint4 v;
  std::memcpy(&v, at, 16), x = v.x, y = v.y, z = v.z, w = v.w;
}

inline void lop3_b32(uint32_t& to, uint32_t a, uint32_t b, uint32_t c) { to = (a & b) ^ c; }  // 0x6A
template <class T>
void ld_global_nc_L1__no_allocate_v2_u32(uint32_t& x, uint32_t& y, T const* at) {
  if (reinterpret_cast<uintptr_t>(at) % 8) std::fprintf(stderr, "not aligned\n"), std::abort();
  uint2 v;
  std::memcpy(&v, at, 8), x = v.x, y = v.y;
}

// m16n8k32 of bytes: as below, four a word
inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(int& d0, int& d1, int& d2, int& d3, uint32_t a0, uint32_t a1,
                                                            uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  auto& mine = exchanged[warp()];
  uint32_t const all[] = {a0, a1, a2, a3, b0, b1};
  std::copy(all, all + 6, mine[lane()]);
  meet_warp();
  int const g = lane() / 4, t = lane() % 4;
  int* const d[] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    int const row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k) {
      uint32_t const a = mine[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], b = mine[column * 4 + k % 16 / 4][4 + k / 16];
      *d[i] += int(int8_t(a >> 8 * (k % 4))) * int8_t(b >> 8 * (k % 4));
    }
  }
  meet_warp();
}

// m16n8k16: lane 4g + t holds rows g and g + 8 of A, column g of B, columns 2t and 2t + 1 of C
template <bool kHalf>
void mma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
         uint32_t b1) {
  auto& mine = exchanged[warp()];
  uint32_t const all[] = {a0, a1, a2, a3, b0, b1};
  std::copy(all, all + 6, mine[lane()]);
  meet_warp();
  auto const value = [](uint32_t word, int half) {
    uint16_t const bits = half ? word >> 16 : word & 0xFFFF;
    return kHalf ? of_half(bits) : __uint_as_float(uint32_t(bits) << 16);
  };
  int const g = lane() / 4, t = lane() % 4;
  float* const d[] = {&d0, &d1, &d2, &d3};
  for (int i = 0; i < 4; ++i) {
    int const row = g + i / 2 * 8, column = 2 * t + i % 2;
    double sum = *d[i];
    for (int k = 0; k < 16; ++k) {
      uint32_t const a = mine[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], b = mine[column * 4 + k % 8 / 2][4 + k / 8];
      sum += double(value(a, k % 2)) * value(b, k % 2);
    }
    *d[i] = float(sum);
  }
  meet_warp();
}
template <class... T>
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(T&&... operands) { mma<true>(operands...); }
template <class... T>
void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(T&&... operands) { mma<false>(operands...); }

struct Index {
  struct { operator unsigned() const { return current; } } x;
};
struct BlockSize {
  struct { operator unsigned() const { return unsigned(fibers.size()); } } x;
};
struct BlockIndex {
  struct { operator unsigned() const { return block_at.x; } } x;
  struct { operator unsigned() const { return block_at.y; } } y;
};

}  // namespace on_cpu

static on_cpu::Index threadIdx;
static on_cpu::BlockIndex blockIdx;
static on_cpu::BlockSize blockDim;

inline void __syncthreads() { on_cpu::meet(on_cpu::block, int(on_cpu::fibers.size())); }
inline float __shfl_xor_sync(uint32_t, float v, int mask) {
  auto& mine = on_cpu::exchanged[on_cpu::warp()];
  mine[on_cpu::lane()][0] = __float_as_uint(v);
  on_cpu::meet_warp();
  float const other = __uint_as_float(mine[on_cpu::lane() ^ mask][0]);
  on_cpu::meet_warp();
  return other;
}
template <class T>
T __ldg(T const* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T)) std::fprintf(stderr, "not aligned\n"), std::abort();
  return *at;
}
template <class T>
T __ldcs(T const* at) { return __ldg(at); }
