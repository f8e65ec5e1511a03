// Eight consecutive values of a row, one 16-byte access of 16-bit values: between memory, registers and fp32.
#pragma once
#include "rotation.cuh"

namespace convrot {
namespace {

constexpr int kColumns = 8;

// eight columns as they lie in memory
template <class X>
struct Eight {
  Four<X> first, second;
};

template <class X>
__device__ __forceinline__ Eight<X> load_eight(X const* at) {
  if constexpr (sizeof(X) == 4) {
    return {load_four(at), load_four(at + 4)};
  } else {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return {{v.x, v.y}, {v.z, v.w}};
  }
}

template <class X>
__device__ __forceinline__ void store_eight(X* at, Eight<X> v) {
  if constexpr (sizeof(X) == 4) {
    reinterpret_cast<float4*>(at)[0] = v.first, reinterpret_cast<float4*>(at)[1] = v.second;
  } else {
    *reinterpret_cast<uint4*>(at) = make_uint4(v.first.x, v.first.y, v.second.x, v.second.y);
  }
}

template <class X>
__device__ __forceinline__ void unpack(Eight<X> const& from, float (&to)[kColumns]) {
  float4 const a = widen<X>(from.first), b = widen<X>(from.second);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

template <class X>
__device__ __forceinline__ Four<X> narrow(float a, float b, float c, float d) {
  if constexpr (sizeof(X) == 4) return make_float4(a, b, c, d);
  else if constexpr (std::is_same_v<X, __half>) return make_uint2(fp16_pair(a, b), fp16_pair(c, d));
  else return make_uint2(bf16_pair(a, b), bf16_pair(c, d));
}
template <class X>
__device__ __forceinline__ Eight<X> pack(float const (&v)[kColumns]) {
  return {narrow<X>(v[0], v[1], v[2], v[3]), narrow<X>(v[4], v[5], v[6], v[7])};
}

__device__ __forceinline__ void load_floats(float const* at, float (&to)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kColumns; i += 4) {
    float4 const v = __ldg(reinterpret_cast<float4 const*>(at + i));
    to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
  }
}

// of a vector of any dtype
__device__ __forceinline__ void load_any(void const* at, int dtype, int64_t column, float (&to)[kColumns]) {
  if (dtype == kFloat32) {
    load_floats(static_cast<float const*>(at) + column, to);
  } else {
    uint4 const v = __ldg(reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(at) + column));
    if (dtype == kFloat16) unpack<__half>({{v.x, v.y}, {v.z, v.w}}, to);
    else unpack<__nv_bfloat16>({{v.x, v.y}, {v.z, v.w}}, to);
  }
}

}  // namespace
}  // namespace convrot
