// Products with few rows, and every product that no GEMM variant fits: out (M, N) = epilogue(x (M, K) . weight (N,
// K)^T).
//
// A warp takes tiles of 16 weight rows and eight tokens, m16n8 on tensor cores, so that 8 tokens cost what one costs and
// the kernel is bound by reading the weight. The warps of a block split K; their sums meet in shared memory in a fixed
// order (two runs are bit-identical). Weight formats: nibbles in the order of layouts.py (a fragment is the 8 bytes of
// a lane), packed row-major nibbles, int8. x: int8 codes (exact int32 sums) or bf16, fp16, fp32 values (fp32 sums: the
// products are exact, fp32 x is split into three bf16 terms). The K order inside a step is permuted, alike in both
// operands, so that each lane uses the bytes as they were loaded.
// K % 32 == 0, rows contiguous and 16-byte aligned: the launcher pads.
//
// Weights that meet one x, wherever they lie, share a launch: FLUX.1-dev's 76 modulations in 522 us, one by one in 806.
// N = 18432, K = 3072, M = 1 on an H200: codes 9.8 us, bf16 values 12.5 us, torch.matmul 30.5 us. Lost there: a ring of
// asynchronous copies (14.0, 18.2), x as int8 digits with one exponent a row (12.8 for values, 20.8 at M = 8), one tile a
// warp (11.0, 14.3), unbiased nibbles (9.5, 13.1). Taking the 24 of a nibble (gemv_fragments.cuh) off at the end, as 24
// times the sum of x, gives 12.0 and an error of 24 |x| where the code is 0: too much beside an outlier.
#include "gemv_fragments.cuh"

namespace convrot {
namespace {

constexpr int kMostStaged = 60 << 10;  // bytes of x: two blocks an SM, also with the 99 KB of sm_86

// acc += one step of a chunk times the x that its columns meet
template <Format kFormat, class X, class Sum>
__device__ __forceinline__ void accumulate(Nibbles<std::is_same_v<X, __half>> const& to16, Chunk<kFormat> const& weight,
                                           int step, XFragment<X> const& x, Sum (&acc)[4]) {
  uint32_t a[4];
  if constexpr (std::is_same_v<X, int8_t>) {
    fragments(weight, step, a);
    mma(acc, a, x.words.x, x.words.y);
  } else {
    constexpr bool kHalf = std::is_same_v<X, __half>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      fragments16<kHalf>(to16, weight, step, half, a);
#pragma unroll
      for (int term = XFragment<X>::kTerms - 1; term >= 0; --term) {
        uint32_t const b0 = half ? x.words[term].z : x.words[term].x, b1 = half ? x.words[term].w : x.words[term].y;
        mma<kHalf>(acc, a, b0, b1);
        if (kFormat != kBytes) mma<kHalf>(acc, to16.minus, b0, b1);  // at once, so that no sum grows beyond a step's
      }
    }
  }
}

// ((sum * a_scale) * b_scale) + bias, then residual + gate * y: each step rounded to fp32, one rounding at the end.
// Loads and arithmetic apart, so that the loads can be long under way.
struct Finish {
  float a_scale, b_scale, bias, gate, residual;
  bool inside;

  __device__ Finish(Product const& p, int row, int token) : inside(row < p.n && token < p.m) {
    a_scale = inside && p.a_scale ? p.a_scale[token] : 1.f;
    b_scale = inside ? p.b_scale[row] : 1.f;
    bias = inside && p.bias ? load_as_float(p.bias, p.bias_dtype, row) : -0.f;
    gate = inside && p.gate ? load_as_float(p.gate, p.gate_dtype, row) : 1.f;
    residual = inside && p.residual ? load_as_float(p.residual, p.out_dtype, token * p.residual_stride + row) : -0.f;
  }
  __device__ void operator()(Product const& p, float sum, int row, int token) const {
    float const y = __fadd_rn(__fmul_rn(__fmul_rn(sum, a_scale), b_scale), bias);
    if (inside) store_from_float(p.out, p.out_dtype, token * p.out_stride + row, __fadd_rn(__fmul_rn(gate, y), residual));
  }
};

// fragments of x in shared memory: every step of every chunk, every token, four lanes each; and one of zeros
template <Format kFormat>
__host__ __device__ int staged_fragments(Product const& p) {
  int const chunks = (p.k + Chunk<kFormat>::kColumns - 1) / Chunk<kFormat>::kColumns;
  return chunks * Chunk<kFormat>::kSteps * p.m * 4 + 1;
}

// kGroups groups of eight tokens. x of a single group stands in shared memory, fragment by fragment: every warp of a
// block reads all of it. x of more is read where it is. `block`: which tiles of the weight.
template <Format kFormat, class X, int kGroups, int kWarps>
__device__ __forceinline__ void multiply(Product const& p, int block) {
  using Weight = Chunk<kFormat>;
  using Sum = std::conditional_t<std::is_same_v<X, int8_t>, int, float>;
  constexpr bool kStaged = kGroups == 1;
  constexpr int kSteps = Weight::kSteps, kAhead = Weight::kAhead + (kWarps == 4), kTiles = kStaged ? Weight::kTiles : 1;
  constexpr int kOutputs = kTiles * kGroups * 128;
  extern __shared__ uint4 dynamic[];
  __shared__ Sum sums[kWarps][kOutputs];
  auto* const staged = reinterpret_cast<XFragment<X>*>(dynamic);
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5, tile0 = block * kTiles;
  int const chunks = (p.k + Weight::kColumns - 1) / Weight::kColumns;

  typename Weight::Place const places[2] = {{p, tile0, lane}, {p, tile0 + kTiles - 1, lane}};
  Weight weight[2][kAhead][kTiles];  // one half is used while the other is under way
  auto const load = [&](Weight (&to)[kAhead][kTiles], int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) places[tile].load(to[i][tile], first + i * kWarps, lane);
    }
  };
  load(weight[0], warp);

  // output `index` of the tiles: register i of a lane is row lane / 4 + 8 (i / 2), token 2 (lane % 4) + i % 2
  auto const row_of = [&](int index) {
    return (tile0 + (index >> 7) / kGroups) * kRows + (index >> 4 & 7) + 8 * (index >> 1 & 1);
  };
  auto const token_of = [&](int index) {
    return (blockIdx.y * kGroups + (index >> 7) % kGroups) * 8 + 2 * (index >> 2 & 3) + (index & 1);
  };
  Finish const early(p, row_of(threadIdx.x), token_of(threadIdx.x));  // of the first round of outputs, mostly the only

  auto const load_x = [&](int token, int chunk, int step, int quad) {
    int const column = Weight::column(chunk, step, quad);
    XFragment<X> x{};
    if (token < p.m && column < p.k) {
      x.template load<kFormat>(static_cast<X const*>(p.x) + int64_t(token) * p.k + column);
    }
    return x;
  };
  int const zeros = staged_fragments<kFormat>(p) - 1;
  if constexpr (kStaged) {
    constexpr int kAtOnce = sizeof(XFragment<X>) > 16 ? 1 : 4;  // loads before the first store waits for them
    for (int token = 0; token < p.m; ++token) {
      for (int first = threadIdx.x; first < chunks * kSteps * 4; first += kAtOnce * kWarps * 32) {
        XFragment<X> x[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          int const index = first + i * kWarps * 32, step = index / 4;
          x[i] = load_x(token, step / kSteps, step % kSteps, index % 4);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          int const index = first + i * kWarps * 32;
          if (index < chunks * kSteps * 4) staged[(index / 4 * p.m + token) * 4 + index % 4] = x[i];
        }
      }
    }
    if (threadIdx.x == 0) staged[zeros] = XFragment<X>{};
    __syncthreads();
  }
  // lanes of tokens that are not there, and chunks beyond the last, read the zeros
  bool const mine = (lane >> 2) < p.m;
  auto const x_of = [&](int chunk, int step, int group) {
    if constexpr (kStaged) {
      int const at = ((chunk * kSteps + step) * p.m + (lane >> 2)) * 4 + (lane & 3);
      return staged[mine && chunk < chunks ? at : zeros];
    } else {
      return load_x((blockIdx.y * kGroups + group) * 8 + (lane >> 2), chunk, step, lane & 3);
    }
  };
  Nibbles<std::is_same_v<X, __half>> const to16(p);
  Sum acc[2][kTiles][kGroups][4] = {};  // two chains: a product waits for the one before it in its chain
  auto const use = [&](Weight const (&from)[kAhead][kTiles], int first) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          XFragment<X> const x = x_of(first + i * kWarps, step, group);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            accumulate<kFormat>(to16, from[i][tile], step, x, acc[(i + step) % 2][tile][group]);
        }
      }
    }
  };
#pragma unroll 1
  for (int first = warp; first < chunks; first += 2 * kAhead * kWarps) {
    load(weight[1], first + kAhead * kWarps);
    use(weight[0], first);
    load(weight[0], first + 2 * kAhead * kWarps);
    use(weight[1], first + kAhead * kWarps);
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[warp][((tile * kGroups + group) * 32 + lane) * 4 + i] = acc[0][tile][group][i] + acc[1][tile][group][i];
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < kOutputs; index += kWarps * 32) {
    Sum total = sums[0][index];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += sums[w][index];
    if constexpr (std::is_same_v<Sum, int> && kFormat != kBytes) total >>= 4;
    int const row = row_of(index), token = token_of(index);
    if (index == int(threadIdx.x)) early(p, float(total), row, token);
    else Finish(p, row, token)(p, float(total), row, token);
  }
}

constexpr int blocks_per_sm(int groups, int warps) { return groups > 1 ? 1 : warps == 4 ? 5 : 3; }

template <Format kFormat, class X, int kGroups, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm(kGroups, kWarps)) gemv(Product const p) {
  multiply<kFormat, X, kGroups, kWarps>(p, blockIdx.x);
}

// Weights of one K that meet the same x, in one launch: their blocks follow one another. By value, so that a CUDA graph
// keeps it.
constexpr int kMostJoined = 64;

struct Member {
  void const* weight;
  float const* b_scale;
  void const* bias;
  void* out;  // its first column
  int n, first;  // block
};
struct Joined {
  Product shared;  // what Member lacks
  int count;
  Member members[kMostJoined];
};
static_assert(sizeof(Joined) <= 4096, "what a kernel takes as arguments on every GPU");

template <Format kFormat, class X, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm(1, kWarps)) gemv_joined(__grid_constant__ Joined const joined) {
  int at = 0, beyond = joined.count;  // the member whose blocks this one is of lies in [at, beyond)
  while (beyond - at > 1) {
    int const middle = (at + beyond) / 2;
    if (joined.members[middle].first <= int(blockIdx.x)) at = middle;
    else beyond = middle;
  }
  Member const& mine = joined.members[at];
  Product p = joined.shared;
  p.weight = mine.weight, p.b_scale = mine.b_scale, p.bias = mine.bias, p.out = mine.out, p.n = mine.n;
  multiply<kFormat, X, 1, kWarps>(p, int(blockIdx.x) - mine.first);
}

template <class Kernel>
int allow_shared(Kernel* kernel, int bytes) {
  if (bytes <= 32 << 10) return kOk;  // beside the sums in the 48 KB that need no asking
  return cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

template <Format kFormat, class X, int kGroups, int kWarps>
int launch(Product const& p, int bytes, cudaStream_t stream) {
  constexpr auto* kernel = gemv<kFormat, X, kGroups, kWarps>;
  if (int const status = allow_shared(kernel, bytes); status != kOk) return status;
  int const rows = kRows * (kGroups == 1 ? Chunk<kFormat>::kTiles : 1), tokens = 8 * kGroups;
  kernel<<<dim3((p.n + rows - 1) / rows, (p.m + tokens - 1) / tokens), kWarps * 32, bytes, stream>>>(p);
  return cuda_status(cudaGetLastError());
}

// blocks of half the warps then, so that all of N = 18432 are on an H200 at once
bool has_many_rows(int n) { return n >= 12288; }

// 0 where x is read where it is
template <Format kFormat, class X>
int staged_bytes(Product const& p) {
  int const bytes = staged_fragments<kFormat>(p) * int(sizeof(XFragment<X>));
  return p.m > 8 || bytes > kMostStaged ? 0 : bytes;
}

template <Format kFormat, class X>
int launch(Product const& p, cudaStream_t stream) {
  int const bytes = staged_bytes<kFormat, X>(p);
  if (bytes == 0) return launch<kFormat, X, 4, 8>(p, 0, stream);
  return has_many_rows(p.n) ? launch<kFormat, X, 1, 4>(p, bytes, stream) : launch<kFormat, X, 1, 8>(p, bytes, stream);
}

template <Format kFormat, class X, int kWarps>
int launch(Joined const& joined, int blocks, int bytes, cudaStream_t stream) {
  constexpr auto* kernel = gemv_joined<kFormat, X, kWarps>;
  if (int const status = allow_shared(kernel, bytes); status != kOk) return status;
  kernel<<<blocks, kWarps * 32, bytes, stream>>>(joined);
  return cuda_status(cudaGetLastError());
}

// members that all have many rows, or all have few
template <Format kFormat, class X>
int launch(Joined& joined, cudaStream_t stream) {
  Product p = joined.shared;
  int const bytes = staged_bytes<kFormat, X>(p);
  if (bytes == 0) {  // long enough each
    int status = kOk;
    for (int i = 0; i < joined.count && status == kOk; ++i) {
      Member const& mine = joined.members[i];
      p.weight = mine.weight, p.b_scale = mine.b_scale, p.bias = mine.bias, p.out = mine.out, p.n = mine.n;
      status = launch<kFormat, X>(p, stream);
    }
    return status;
  }
  constexpr int rows = kRows * Chunk<kFormat>::kTiles;
  int blocks = 0;
  for (int i = 0; i < joined.count; ++i) {
    joined.members[i].first = blocks;
    blocks += (joined.members[i].n + rows - 1) / rows;
  }
  return has_many_rows(joined.members[0].n) ? launch<kFormat, X, 4>(joined, blocks, bytes, stream)
                                            : launch<kFormat, X, 8>(joined, blocks, bytes, stream);
}

template <Format kFormat, class Arguments>
int launch(Arguments& p, int x_dtype, cudaStream_t stream) {
  switch (x_dtype) {
    case kFloat32:
      return launch<kFormat, float>(p, stream);
    case kFloat16:
      return launch<kFormat, __half>(p, stream);
    case kBFloat16:
      return launch<kFormat, __nv_bfloat16>(p, stream);
    default:
      return launch<kFormat, int8_t>(p, stream);
  }
}

template <class Arguments>
int launch(Arguments& p, int format, int x_dtype, cudaStream_t stream) {
  switch (format) {
    case kReordered:
      return launch<kReordered>(p, x_dtype, stream);
    case kPacked:
      return launch<kPacked>(p, x_dtype, stream);
    case kBytes:
      return launch<kBytes>(p, x_dtype, stream);
    default:
      return kUnknownShape;
  }
}

bool fits(int format, int m, int n, int k) {
  return m >= 1 && n >= 1 && k >= 32 && k % 32 == 0 && m <= 65535 * 32 && (format != kReordered || n % kRows == 0);
}

// sixteen codes a thread: 8 bytes in, 16 out
__global__ void __launch_bounds__(256) unpack(uint2 const* packed, uint4* codes, int64_t pieces) {
  int64_t const piece = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (piece >= pieces) return;
  auto const widen = [](uint32_t w, uint32_t& first, uint32_t& second) {
    uint32_t const even = __vsub4((w & 0x0F0F0F0Fu) ^ 0x08080808u, 0x08080808u);
    uint32_t const odd = __vsub4(((w >> 4) & 0x0F0F0F0Fu) ^ 0x08080808u, 0x08080808u);
    first = __byte_perm(even, odd, 0x5140), second = __byte_perm(even, odd, 0x7362);
  };
  uint2 const w = __ldcs(packed + piece);
  uint4 out;
  widen(w.x, out.x, out.y);
  widen(w.y, out.z, out.w);
  codes[piece] = out;
}

}  // namespace
}  // namespace convrot

CONVROT_EXPORT int convrot_gemv(void const* weight, int format, void const* x, int x_dtype, void const* a_scale,
                                void const* b_scale, void const* bias, int bias_dtype, void const* gate, int gate_dtype,
                                void const* residual, int64_t residual_stride, void* out, int out_dtype,
                                int64_t out_stride, int m, int n, int k, void* stream) {
  using namespace convrot;
  if (!fits(format, m, n, k)) return kUnknownShape;
  Product const p{weight,
                  x,
                  static_cast<float const*>(a_scale),
                  static_cast<float const*>(b_scale),
                  bias,
                  gate,
                  residual,
                  out,
                  residual_stride,
                  out_stride,
                  bias_dtype,
                  gate_dtype,
                  out_dtype,
                  m,
                  n,
                  k};
  return launch(p, format, x_dtype, static_cast<cudaStream_t>(stream));
}

// `count` weights (n_i, K), each with its scale, and its bias or null: out (M, sum of n_i), one after the other
CONVROT_EXPORT int convrot_gemv_joined(int count, void const* const* weights, void const* const* b_scales,
                                       void const* const* biases, int const* ns, int format, void const* x, int x_dtype,
                                       void const* a_scale, int bias_dtype, void* out, int out_dtype, int64_t out_stride,
                                       int m, int k, void* stream) {
  using namespace convrot;
  if (count < 1) return kUnknownShape;
  for (int i = 0; i < count; ++i) {
    if (!fits(format, m, ns[i], k)) return kUnknownShape;
  }
  Joined joined{};
  Product& p = joined.shared;
  p.x = x, p.a_scale = static_cast<float const*>(a_scale), p.out_stride = out_stride;
  p.bias_dtype = bias_dtype, p.out_dtype = out_dtype, p.m = m, p.k = k;
  int status = kOk;
  auto const flush = [&] {
    if (joined.count > 0 && status == kOk) status = launch(joined, format, x_dtype, static_cast<cudaStream_t>(stream));
    joined.count = 0;
  };
  for (bool const many : {true, false}) {  // apart, so that each is summed as it is where it is multiplied alone
    auto* column = static_cast<char*>(out);
    for (int i = 0; i < count; ++i) {
      if (has_many_rows(ns[i]) == many) {
        auto const* b_scale = static_cast<float const*>(b_scales[i]);
        joined.members[joined.count++] = {weights[i], b_scale, biases[i], column, ns[i], 0};
        if (joined.count == kMostJoined) flush();
      }
      column += int64_t(ns[i]) * (out_dtype == kFloat32 ? 4 : 2);
    }
    flush();
  }
  return status;
}

// packed: `pieces` times 8 bytes, both 16-byte aligned
CONVROT_EXPORT int convrot_unpack(void const* packed, void* codes, int64_t pieces, void* stream) {
  if (pieces < 1) return convrot::kUnknownShape;
  convrot::unpack<<<unsigned((pieces + 255) / 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<uint2 const*>(packed), static_cast<uint4*>(codes), pieces);
  return convrot::cuda_status(cudaGetLastError());
}
