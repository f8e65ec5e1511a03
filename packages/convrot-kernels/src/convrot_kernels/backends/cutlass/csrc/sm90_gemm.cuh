// Hopper GEMM around CUTLASS 3.x: out (M, N) = epilogue(x (M, K) . weight (N, K)^T). The kernel computes out^T = W X^T,
// so its rows are N (weight, scale, bias, gate: one value a row) and its columns are M (tokens, a_scale).
//
// Packed int4 weights are the A operand of wgmma and come from registers: shared memory holds nibbles, and each thread
// widens its own fragment. Two things make that free. (1) x16: a nibble in the high half of a byte is the int8 16 * v,
// so one shift and two masks give eight values, and the epilogue takes the exact 1/16. (2) The nibbles lie in memory
// in the order in which a thread needs them (layouts.py), so a fragment is one 8-byte load.
//
// bias, gate and residual may be null: bias and residual are then -0.0f and gate 1.0f, which change no bit of y.
#pragma once
#define CUTLASS_ENABLE_GDC_FOR_SM90 1  // launch.cuh's two calls, in CUTLASS's kernel
#include "launch.cuh"
#include "sm90_epilogue.cuh"

#include <array>
#include <atomic>
#include <cstring>
#include <memory>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace cutlass {

// memory order 0 4 1 5 2 6 3 7: even nibbles are values 0..3, odd ones 4..7
template <>
struct LayoutAwareConvertImpl<int4b_t, int8_t,
                              cute::Layout<cute::Shape<cute::_4, cute::_2>, cute::Stride<cute::_2, cute::_1>>,
                              cute::Layout<cute::_8>> {
  template <class In, class Out, class InLayout, class OutLayout>
  CUTLASS_DEVICE static void convert(cute::Tensor<In, InLayout> const& packed, cute::Tensor<Out, OutLayout>& wide) {
    auto&& nibbles = cute::recast<uint32_t>(packed)(0);
    auto&& bytes = cute::recast<AlignedArray<uint32_t, 2, 8>>(wide)(0);
    bytes[0] = (nibbles << 4) & 0xF0F0F0F0u;
    bytes[1] = nibbles & 0xF0F0F0F0u;
  }
};

}  // namespace cutlass

namespace convrot {
using namespace cute;

// nibble offset of weight (n, k) in its block of 16 x 32: 64 (n % 8) + n / 8 + 2 (k % 4) + 16 (k / 4 % 4) + 8 (k / 16)
using NibbleOrder = Layout<Shape<Shape<_8, _2>, Shape<_4, _4, _2>>, Stride<Stride<_64, _1>, Stride<_2, _16, _8>>>;
using WeightStride = cutlass::detail::TagToStrideB_t<cutlass::layout::ColumnMajor>;
using BlockOrder = Step<_2, _1, _3>;  // blocks along K are neighbours
using NibbleLayout = decltype(tile_to_shape(NibbleOrder{}, Layout<Shape<int, int, int>, WeightStride>{}, BlockOrder{}));

// The builder gives an epilogue with a C operand no delayed store and a shared buffer for C and D. C is rare here:
// keep the order of stores of a kernel without it, and give C two buffers of its own.
template <class Builder>
struct WithDelayedStore;
template <int kStagesC, int kStagesD, int kFragment, bool kReuse, bool kDelay, class... Rest>
struct WithDelayedStore<cutlass::epilogue::collective::CollectiveEpilogue<
    cutlass::epilogue::Sm90TmaWarpSpecialized<kStagesC, kStagesD, kFragment, kReuse, kDelay>, Rest...>> {
  using type = cutlass::epilogue::collective::CollectiveEpilogue<
      cutlass::epilogue::Sm90TmaWarpSpecialized<2, kStagesD, kFragment, false, true>, Rest...>;
};

// Launch

// zeroed before use, so that it can be compared by bytes
struct Call {
  void const *weight, *x, *a_scale, *b_scale, *bias, *gate, *residual;
  void* out;
  int64_t residual_stride, out_stride;
  int bias_dtype, gate_dtype, m, n, k, device, sm_count;
};

// Descriptors cost about 20 us to encode, so the last calls keep theirs: a layer whose buffers come back to the same
// addresses (allocator, graph) pays once. One table a thread, no lock.
template <class Gemm, class MakeArguments>
int launch(Call const& call, MakeArguments make_arguments, cudaStream_t stream) {
  constexpr int kEntries = 64;
  struct Entry {
    Call call;
    bool filled;
    typename Gemm::Params params;
  };
  static thread_local std::unique_ptr<std::array<Entry, kEntries>> entries;
  static std::atomic<uint64_t> ready{0};  // devices whose shared memory limit is raised; further ones ask every time
  if (!entries) {
    entries.reset(new std::array<Entry, kEntries>);
    for (auto& entry : *entries) entry.filled = false;
  }
  uint64_t hash = 1469598103934665603ull;
  uint64_t words[sizeof(Call) / 8];
  static_assert(sizeof(Call) % 8 == 0, "hashed as whole words");
  std::memcpy(words, &call, sizeof(Call));
  for (uint64_t word : words) hash = (hash ^ word) * 1099511628211ull;
  Entry& entry = (*entries)[(hash >> 32) % kEntries];
  if (!entry.filled || std::memcmp(&entry.call, &call, sizeof(Call)) != 0) {
    auto arguments = make_arguments(call);
    if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return kCannotImplement;
    if (Gemm::get_workspace_size(arguments) != 0) return kNeedsWorkspace;
    entry.params = Gemm::GemmKernel::to_underlying_arguments(arguments, nullptr);
    std::memcpy(&entry.call, &call, sizeof(Call));  // padding too
    entry.filled = true;
  }
  uint64_t const bit = call.device < 64 ? uint64_t(1) << call.device : 0;
  if (!(ready.load(std::memory_order_relaxed) & bit) || bit == 0) {
    int const status = cuda_status(cudaFuncSetAttribute(cutlass::device_kernel<typename Gemm::GemmKernel>,
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        Gemm::GemmKernel::SharedStorageSize));
    if (status != kOk) return status;
    ready.fetch_or(bit);
  }
  if (Gemm::run(entry.params, stream, nullptr, starts_early()) == cutlass::Status::kSuccess) return kOk;
  int const status = cuda_status(cudaGetLastError());
  return status == kOk ? int(kInitialize) : status;
}

template <class Kernel, class Weight, class Output, bool kReordered>
int run_sm90(Call const& call, cudaStream_t stream) {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  return launch<Gemm>(
      call,
      [](Call const& c) {
        auto weight_layout = [&] {
          if constexpr (kReordered) return tile_to_shape(NibbleOrder{}, make_shape(c.n, c.k, 1), BlockOrder{});
          else return cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, make_shape(c.n, c.k, 1));
        }();
        auto const x_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(c.m, c.k, 1));
        auto out_stride = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(c.n, c.m, 1));
        auto residual_stride = out_stride;
        get<1>(out_stride) = c.out_stride;
        get<1>(residual_stride) = c.residual ? c.residual_stride : c.out_stride;
        auto const* source =
            static_cast<Output const*>(c.residual ? c.residual : c.out);  // a tensor map needs an address
        typename Kernel::EpilogueArguments epilogue{
            {{c.residual != nullptr},
             {{c.gate, c.gate_dtype, 1.f},
              {{{{}, {static_cast<float const*>(c.a_scale)}, {}}, {c.b_scale, kFloat32, 1.f}, {}},
               {c.bias, c.bias_dtype, -0.f},
               {}},
              {}},
             {}},
            source,
            residual_stride,
            static_cast<Output*>(c.out),
            out_stride};
        typename Gemm::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {c.n, c.m, c.k, 1},
            {static_cast<Weight const*>(c.weight), weight_layout, static_cast<int8_t const*>(c.x), x_stride},
            epilogue};
        arguments.hw_info.device_id = c.device;
        arguments.hw_info.sm_count = c.sm_count;
        arguments.scheduler.max_swizzle_size = 1;  // 8 pads the grid and costs up to 2x
        return arguments;
      },
      stream);
}

}  // namespace convrot

#define CONVROT_GEMM(name, ...)                                                                                     \
  CONVROT_EXPORT int name(void const* weight, void const* x, void const* a_scale, void const* b_scale,              \
                          void const* bias, int bias_dtype, void const* gate, int gate_dtype, void const* residual, \
                          int64_t residual_stride, void* out, int64_t out_stride, int m, int n, int k, int device,  \
                          int sm_count, void* stream) {                                                             \
    convrot::Call call;                                                                                             \
    std::memset(&call, 0, sizeof(call));                                                                            \
    call.weight = weight, call.x = x, call.a_scale = a_scale, call.b_scale = b_scale, call.bias = bias;             \
    call.gate = gate, call.residual = residual, call.out = out, call.residual_stride = residual_stride;             \
    call.out_stride = out_stride, call.bias_dtype = bias_dtype, call.gate_dtype = gate_dtype;                       \
    call.m = m, call.n = n, call.k = k, call.device = device, call.sm_count = sm_count;                             \
    return __VA_ARGS__(call, static_cast<cudaStream_t>(stream));                                                    \
  }
