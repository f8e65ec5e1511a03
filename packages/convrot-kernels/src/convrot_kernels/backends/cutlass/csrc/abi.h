// What every unit of the library shares: dtype codes, error codes, the device half of a dtype switch.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CONVROT_EXPORT extern "C" __attribute__((visibility("default")))

namespace convrot {

// the numbers are part of the ABI: DTYPES of __init__.py
enum Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// below kCudaError: an index into the string table of abi.cu; from it on: kCudaError + cudaError_t
enum Error : int {
  kOk = 0,
  kCannotImplement = 1,
  kNeedsWorkspace = 2,
  kInitialize = 3,
  kUnknownShape = 4,
  kCudaError = 1000
};

inline int cuda_status(cudaError_t status) { return status == cudaSuccess ? kOk : kCudaError + int(status); }

__device__ __forceinline__ float load_as_float(void const* vector, int dtype, int64_t index) {
  if (dtype == kBFloat16) return __bfloat162float(static_cast<__nv_bfloat16 const*>(vector)[index]);
  if (dtype == kFloat16) return __half2float(static_cast<__half const*>(vector)[index]);
  return static_cast<float const*>(vector)[index];
}

__device__ __forceinline__ void store_from_float(void* out, int dtype, int64_t index, float value) {
  if (dtype == kBFloat16) static_cast<__nv_bfloat16*>(out)[index] = __float2bfloat16_rn(value);
  else if (dtype == kFloat16) static_cast<__half*>(out)[index] = __float2half_rn(value);
  else static_cast<float*>(out)[index] = value;
}

}  // namespace convrot
