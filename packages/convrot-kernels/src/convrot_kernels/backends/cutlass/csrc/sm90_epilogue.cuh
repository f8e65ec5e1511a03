// Nodes of the Hopper epilogue that CUTLASS lacks: arithmetic rounded step by step, a broadcast of any dtype that may be
// absent, a C operand that may be absent. Each is a visitor of CUTLASS's epilogue fusion.
#pragma once
#include "abi.h"

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"

namespace convrot {
using namespace cute;
namespace fusion = cutlass::epilogue::fusion;
constexpr auto kNearest = cutlass::FloatRoundStyle::round_to_nearest;

template <bool kTimes16>
struct FirstScale {
  template <class Fragment>
  struct Function {
    CUTLASS_DEVICE Fragment operator()(Fragment const& acc, Fragment const& scale) const {
      Fragment out;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < Fragment::kElements; ++i) {
        out[i] = __fmul_rn(kTimes16 ? __fmul_rn(acc[i], 0.0625f) : acc[i], scale[i]);  // 1/16 is exact
      }
      return out;
    }
  };
};

template <class Fragment>
struct Multiply {
  CUTLASS_DEVICE Fragment operator()(Fragment const& left, Fragment const& right) const {
    Fragment out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) out[i] = __fmul_rn(left[i], right[i]);
    return out;
  }
};

template <class Fragment>
struct Add {
  CUTLASS_DEVICE Fragment operator()(Fragment const& left, Fragment const& right) const {
    Fragment out;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Fragment::kElements; ++i) out[i] = __fadd_rn(left[i], right[i]);
    return out;
  }
};

// One value per row of the kernel, from a vector whose dtype is known at run time; `absent` everywhere if it is null.
struct RowValues {
  struct SharedStorage {};
  struct Arguments {
    void const* vector = nullptr;
    int dtype = kFloat32;
    float absent = 0.f;
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(Problem const&, Arguments const&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(Problem const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE RowValues() {}
  CUTLASS_HOST_DEVICE RowValues(Params const& p, SharedStorage const&) : params(p) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(fusion::detail::ProducerLoadArgs<Args...> const&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  Params params;

  template <class Pattern, class Values, class Coordinates, class Residue>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Pattern pattern;  // only its strides are used: zero where two elements share a row
    Values values;
    Coordinates coordinates;
    Residue residue;
    int rows;
    Params const& params;

    CUTLASS_DEVICE Callbacks(Pattern pattern_, Values values_, Coordinates coordinates_, Residue residue_, int rows_,
                             Params const& params_)
        : pattern(pattern_),
          values(values_),
          coordinates(coordinates_),
          residue(residue_),
          rows(rows_),
          params(params_) {}

    CUTLASS_DEVICE void begin() {
      fill(values, params.absent);
      if (params.vector == nullptr) return;
      Tensor distinct = filter_zeros(values);
      Tensor where = filter_zeros(coordinates, pattern.stride());
      int const first = rows - get<0>(residue);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(distinct); ++i) {
        if (elem_less(where(i), residue)) {
          distinct(i) = load_as_float(params.vector, params.dtype, first + get<0>(where(i)));
        }
      }
    }

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<float, kSize> visit(cutlass::Array<Accumulator, kSize> const&, int epi_v, int epi_m,
                                                      int epi_n) {
      cutlass::Array<float, kSize> out;
      Tensor part = values(_, _, _, epi_m, epi_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) out[i] = part(epi_v * kSize + i);
      return out;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    auto [rows, columns, depth, batches] = args.problem_shape_mnkl;
    Tensor vector = make_tensor(make_gmem_ptr(static_cast<float const*>(nullptr)),
                                make_layout(make_shape(rows, columns, batches), make_stride(_1{}, _0{}, _0{})));
    Tensor pattern = fusion::sm90_partition_for_epilogue<kReferenceSource>(
        vector, args.tile_shape_mnk, args.tile_coord_mnkl, args.epi_tile, args.tiled_copy, args.thread_idx);
    Tensor values = make_tensor_like<float>(pattern);
    return Callbacks<decltype(pattern), decltype(values), decltype(args.tCcD), decltype(args.residue_tCcD)>(
        pattern, values, args.tCcD, args.residue_tCcD, int(rows), params);
  }
};

// The C operand, loaded by TMA only where there is one.
template <class Element>
struct OptionalSource {
  struct SharedStorage {};
  struct Arguments {
    bool present = false;
  };
  using Params = Arguments;

  template <class Problem>
  static constexpr Params to_underlying_arguments(Problem const&, Arguments const& arguments, void*) {
    return arguments;
  }
  template <class Problem>
  static bool can_implement(Problem const&, Arguments const&) {
    return true;
  }
  template <class Problem>
  static size_t get_workspace_size(Problem const&, Arguments const&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(Problem const&, Arguments const&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE OptionalSource() {}
  CUTLASS_HOST_DEVICE OptionalSource(Params const& p, SharedStorage const&) : params(p) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return params.present; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return params.present; }
  template <class... Args>
  CUTLASS_DEVICE auto get_producer_load_callbacks(fusion::detail::ProducerLoadArgs<Args...> const&) {
    return fusion::detail::EmptyProducerLoadCallbacks{};
  }

  Params params;

  template <class Source>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    Source const& source;
    bool present;
    CUTLASS_DEVICE Callbacks(Source const& source_, bool present_) : source(source_), present(present_) {}

    template <class Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<float, kSize> visit(cutlass::Array<Accumulator, kSize> const&, int epi_v, int, int) {
      using Stored = cutlass::Array<typename Source::value_type, kSize>;
      cutlass::Array<float, kSize> out;
      out.fill(-0.f);
      if (present)
        out =
            cutlass::NumericArrayConverter<float, typename Source::value_type, kSize>{}(recast<Stored>(source)(epi_v));
      return out;
    }
  };

  template <bool kReferenceSource, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::detail::ConsumerStoreArgs<Args...> const& args) {
    return Callbacks<cute::remove_cvref_t<decltype(args.tCrC)>>(args.tCrC, params.present);
  }
};

}  // namespace convrot
