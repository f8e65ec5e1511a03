// The library's own questions and answers: which ABI it speaks and what an error code means.
#include "abi.h"

CONVROT_EXPORT int convrot_abi_version() { return CONVROT_ABI; }

CONVROT_EXPORT char const* convrot_source_key() { return CONVROT_SOURCE_KEY; }

CONVROT_EXPORT char const* convrot_error(int code) {
  static char const* const sentences[] = {
      "no error",
      "CUTLASS cannot run this shape: an extent, a row stride or a pointer is not aligned as the kernel needs",
      "CUTLASS asks for a workspace, which none of these kernels should",
      "CUTLASS could not set the kernel up: the driver refused a tensor map or the shared memory",
      "the kernel was called with a shape or an option that it has no code for",
  };
  if (code >= convrot::kCudaError) return cudaGetErrorString(cudaError_t(code - convrot::kCudaError));
  return code >= 0 && code < int(sizeof(sentences) / sizeof(*sentences)) ? sentences[code] : "an unknown error code";
}
