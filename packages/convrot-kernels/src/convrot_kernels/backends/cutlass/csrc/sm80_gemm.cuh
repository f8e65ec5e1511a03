// GEMM around CUTLASS 2.x: out (M, N) = epilogue(x (M, K) . weight (N, K)^T) with mma.sync. Serves s4 x s4 on 8.0 to
// 8.9 (native there, emulated 20 times slower from 9.0 on: never built for those) and s8 x s8 wherever mma.sync has it.
//
// bias and gate are fp32 here (a broadcast of the 2.x epilogue has one type). They and residual may be null: bias and
// residual are then -0.0f and gate 1.0f, which change no bit of y.
#pragma once
#include "abi.h"

// the order matters: visitors.hpp uses what gemm_universal.h declares
#include "cutlass/cutlass.h"
#include "cutlass/gemm/device/gemm_universal.h"

#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"

namespace convrot {

// VisitorAuxLoad reads from its pointer even where that is null
template <class... Options>
struct OptionalAuxLoad : cutlass::epilogue::threadblock::VisitorAuxLoad<Options...> {
  using Base = cutlass::epilogue::threadblock::VisitorAuxLoad<Options...>;
  using Base::Base;

  template <class Callbacks>
  struct Optional : Callbacks {
    bool present;

    CUTLASS_DEVICE void begin_step(int step) {
      if (present) Callbacks::begin_step(step);
    }
    template <class Accumulator, int kSize>
    CUTLASS_DEVICE auto visit(int iteration, int row, int column, int fragment,
                              cutlass::Array<Accumulator, kSize> const& acc) {
      auto loaded = Callbacks::visit(iteration, row, column, fragment, acc);
      if (!present) loaded.fill(typename decltype(loaded)::Element(-0.f));
      return loaded;
    }
  };

  template <class Shape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, Shape shape) {
    auto callbacks = Base::get_callbacks(tile, thread, shape);
    return Optional<decltype(callbacks)>{callbacks, this->params_ptr->ptr_aux != nullptr};
  }
};

// fp32 output never comes here: its rows need other alignments, and the GEMV serves it
struct Call {
  void const *weight, *x, *a_scale, *b_scale, *bias, *gate, *residual;
  void* out;
  int64_t residual_stride, out_stride;
  int bias_dtype, gate_dtype, m, n, k;
};

template <class Kernel, class Tree, class Operand, class Output>
int run_sm80(Call const& c, cudaStream_t stream) {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  if ((c.bias && c.bias_dtype != kFloat32) || (c.gate && c.gate_dtype != kFloat32)) return kUnknownShape;
  if (c.out_stride % 8 != 0 || (c.residual && c.residual_stride % 8 != 0)) return kCannotImplement;
  auto const vector = [](void const* values) { return static_cast<float*>(const_cast<void*>(values)); };
  typename Tree::Arguments epilogue{
      {{static_cast<Output*>(const_cast<void*>(c.residual)), Output(0), {c.residual_stride, cute::_1{}, cute::_0{}}},
       {{vector(c.gate), 1.f, {}},
        {{{{}, {vector(c.a_scale), 0.f, {}}, {}}, {vector(c.b_scale), 0.f, {}}, {}}, {vector(c.bias), -0.f, {}}, {}},
        {}},
       {}},
      {static_cast<Output*>(c.out), {c.out_stride, cute::_1{}, cute::_0{}}}};
  typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {c.m, c.n, c.k}, 1, epilogue,
                                     static_cast<Operand*>(const_cast<void*>(c.x)),
                                     static_cast<Operand*>(const_cast<void*>(c.weight)), nullptr, nullptr,
                                     int64_t(c.m) * c.k, int64_t(c.n) * c.k, 0, 0, c.k, c.k, 0, 0);
  if (Gemm::can_implement(arguments) != cutlass::Status::kSuccess) return kCannotImplement;
  if (Gemm::get_workspace_size(arguments) != 0) return kNeedsWorkspace;
  Gemm gemm;
  if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) return kInitialize;
  if (gemm.run(stream) == cutlass::Status::kSuccess) return kOk;
  int const status = cuda_status(cudaGetLastError());
  return status == kOk ? int(kInitialize) : status;
}

}  // namespace convrot

// the signature of sm90_gemm.cuh; device and sm_count are not needed
#define CONVROT_GEMM(name, ...)                                                                                     \
  CONVROT_EXPORT int name(void const* weight, void const* x, void const* a_scale, void const* b_scale,              \
                          void const* bias, int bias_dtype, void const* gate, int gate_dtype, void const* residual, \
                          int64_t residual_stride, void* out, int64_t out_stride, int m, int n, int k, int, int,    \
                          void* stream) {                                                                           \
    convrot::Call const call{weight,          x,          a_scale,    b_scale,    bias, gate, residual, out,        \
                             residual_stride, out_stride, bias_dtype, gate_dtype, m,    n,    k};                   \
    return __VA_ARGS__(call, static_cast<cudaStream_t>(stream));                                                    \
  }
