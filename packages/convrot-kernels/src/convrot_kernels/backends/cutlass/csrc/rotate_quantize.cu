// Prologue, rotation, row scale and codes in one pass over x: (M, K) -> codes (M, K) or packed (M, K/2), scale (M).
//
// A panel of 256 columns is a matrix X (16 x 16), and its rotation is L X H16. Both factors are tensor-core products
// chained in registers. The columns of the first are permuted so that a lane's B fragment is four consecutive x as they
// were loaded, its C fragment is the B fragment of the second, and the result is again four consecutive columns a lane:
// no shuffle and no shared memory but for the row maximum. L depends on the group: H16 (256), I4 (x) H4 (64), I16 (16);
// for 1024, H4 over the four panels of a warp follows in fp32. All three L depend on row ^ column alone, so a fragment
// repeats: a3 = a0, a2 = a1.
//
// x is exact in its own type, the fp32 between the factors is split: bf16 high + low (4 bits, groups from 256 on), tf32
// high + low (8 bits or small groups: fewer sums average the error), three bf16 terms and a true division (fp32 x).
// Lost on an H200: butterflies with a transpose in shared memory, one bf16 term, interleaved panels, guards everywhere.
// One block a row, one warp per 1024 columns, all in registers up to K = 16384; beyond, the warps loop twice over the
// row.
#include "launch.cuh"
#include "rotation.cuh"

#ifndef CONVROT_INPUT
#error "compile once per input type: -DCONVROT_INPUT=bf16, fp16 or fp32"
#endif

namespace convrot {
namespace {

enum Prologue : int { kNone = 0, kGelu = 1, kModulate = 2, kSiluMul = 3, kCatGelu = 4 };
enum Mode : int { kFull, kGuarded, kStream };  // kFull: no column of a run lies outside the row

constexpr int kPanels = 4;                    // of a run, which one warp does at a time
constexpr int kRun = kPanels * 256;           // columns
constexpr int kMaxWarps = 16;                 // 512 threads: two blocks an SM at 64 registers
constexpr float kRoundHalfEven = 12582912.f;  // 1.5 * 2^23: the low byte of the sum is the rounded code
constexpr float kDamp = 0x1p-16f;             // second try of a row whose sums left fp32 on the way

struct Problem {
  void const *x, *y;           // y: silu_mul's factor, or what cat_gelu appends
  int64_t x_stride, y_stride;  // elements between rows
  int seam;                    // columns of x in cat_gelu
  void const *scale, *shift;   // of modulate, one row per rows_per_vector rows of x
  int scale_dtype, shift_dtype, rows_per_vector;
  int64_t vector_stride;
  float eps;
  void* codes;
  float* row_scale;
  int k, group;
  bool packed, clamp;
  float qmax, inverse_qmax, clip;  // an inverse is rounded to nearest
  float inverse_k;
};

template <class In, int kPrologue, bool kPrecise, int kMode>
__device__ __noinline__ void repeat_damped(Problem const& p, float (&shared)[6][32], int runs, Moments m);

template <int kDistance>
__device__ __forceinline__ void add_across(float& a, float& b) {
  a += __shfl_xor_sync(~0u, a, kDistance), b += __shfl_xor_sync(~0u, b, kDistance);
}

template <class In, int kPrologue, bool kPrecise, int kMode>
struct Row {
  using Values = Four<In>[kPanels][2];
  static constexpr bool kFp32 = std::is_same_v<In, float>, kHalf = std::is_same_v<In, __half>;

  Problem const& p;
  float (&shared)[6][32];  // one line a reduction: a line is written again only after another one's barrier
  int const lane, warp, warps;
  int64_t const row;
  uint4 const factors;

  __device__ int column(int run, int panel, int half) const {
    return run * kRun + panel * 256 + half * 128 + (lane >> 2) * 16 + (lane & 3) * 4;
  }
  __device__ bool inside(int column) const { return kMode == kFull || column < p.k; }
  __device__ bool appended(int column) const {
    // a warp-uniform question where the seam falls between runs
    return kPrologue == kCatGelu && (kMode == kFull ? (column & ~(kRun - 1)) : column) >= p.seam;
  }

  __device__ float block_sum(float v, int line) const {
    v = warp_sum(v);
    if (warps == 1) return v;
    if (lane == 0) shared[line][warp] = v;
    __syncthreads();
    return warp_sum(lane < warps ? shared[line][lane] : 0.f);
  }
  __device__ float block_max(float v, int line) const {  // of non-negative values and NaN: ordered like their bits
    uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(v));
    if (warps == 1) return __uint_as_float(bits);
    if (lane == 0) shared[line][warp] = __uint_as_float(bits);
    __syncthreads();
    return __uint_as_float(__reduce_max_sync(~0u, lane < warps ? __float_as_uint(shared[line][lane]) : 0u));
  }

  template <class Function>
  __device__ void each_piece(int run, Function f) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const at = column(run, panel, half);
        if (inside(at)) f(panel, half, at);
      }
    }
  }

  __device__ void load(int run, Values& raw) const {
    auto const* x = static_cast<In const*>(p.x) + row * p.x_stride;
    auto const* y = static_cast<In const*>(p.y) + row * p.y_stride - p.seam;
    if constexpr (kMode != kFull) {
#pragma unroll
      for (int i = 0; i < kPanels * 2; ++i) raw[i / 2][i % 2] = Four<In>{};
    }
    each_piece(run,
               [&](int panel, int half, int at) { raw[panel][half] = load_four<In>((appended(at) ? y : x) + at); });
  }

  template <class Visit>  // visit(f): f(value) for every piece of this warp
  __device__ Moments moments(Visit visit) const {
    float variance;
    Moments m = measure<false>(visit, variance);
    if (!isfinite(variance)) m = measure<true>(visit, variance);
    return m;
  }
  template <bool kDamped, class Visit>
  __device__ Moments measure(Visit visit, float& variance) const {
    constexpr float damp = kDamped ? kTiny : 1.f;
    float sum = 0.f, squares = 0.f;
    visit([&](float4 v) {
      if constexpr (kDamped) v = each(v, [&](float e) { return e * damp; });
      sum += (v.x + v.y) + (v.z + v.w);
    });
    float const mean = block_sum(sum, 0) * p.inverse_k;
    visit([&](float4 v) {
      v = each(v, [&](float e) { return kDamped ? fmaf(e, damp, -mean) : e - mean; });
      squares = fmaf(v.x, v.x, squares), squares = fmaf(v.y, v.y, squares);
      squares = fmaf(v.z, v.z, squares), squares = fmaf(v.w, v.w, squares);
    });
    variance = block_sum(squares, 1) * p.inverse_k;
    float const inverse = rsqrtf(variance + p.eps * damp);
    return {damp * inverse, -mean * inverse};
  }
  __device__ Moments moments_of(Values const& raw, int run) const {
    return moments([&](auto f) { each_piece(run, [&](int panel, int half, int) { f(widen<In>(raw[panel][half])); }); });
  }
  using Wide = float4[kPanels][2];
  // Every warp holds as many values as the next: its own mean (a product with ones: the sum is fp32) and the squares
  // about it, then those of the warps. One barrier for what takes `measure` two, and as good as two passes over the row.
  // `centred` is x less the warp's mean; returns its moments, `m` are those of x.
  __device__ Moments measure_full(Values const& raw, Wide& centred, Moments& m) const {
    constexpr uint32_t kOnes = kHalf ? 0x3C003C00u : 0x3F803F80u;
    float sums[2][4] = {};  // two chains
#pragma unroll
    for (int i = 0; i < kPanels * 2; ++i) mma<kHalf>(sums[i % 2], kOnes, kOnes, raw[i / 2][i % 2].x, raw[i / 2][i % 2].y);
    float own = (sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]), squares = 0.f;
    own += __shfl_xor_sync(~0u, own, 1);
    own = (own + __shfl_xor_sync(~0u, own, 2)) * (1.f / kRun);
#pragma unroll
    for (int i = 0; i < kPanels * 2; ++i) {
      float4 const v = each(widen<In>(raw[i / 2][i % 2]), [&](float e) { return e - own; });
      squares = fmaf(v.x, v.x, squares), squares = fmaf(v.y, v.y, squares);
      squares = fmaf(v.z, v.z, squares), squares = fmaf(v.w, v.w, squares);
      centred[i / 2][i % 2] = v;
    }
    squares = warp_sum(squares);
    float mean = own;
    if (warps > 1) {
      if (lane == 0) shared[4][warp] = own, shared[5][warp] = squares;
      __syncthreads();
      // about the first warp's mean, so that both sums go at once; lanes repeat what the first 4 or 16 hold
      int const other = lane & (warps > 4 ? kMaxWarps - 1 : 3);
      bool const there = other < warps;
      float const first = shared[4][0];
      float off = there ? shared[4][other] - first : 0.f;
      squares = fmaf(off * float(kRun), off, there ? shared[5][other] : 0.f);
      if (warps > 4) add_across<8>(off, squares), add_across<4>(off, squares);
      add_across<2>(off, squares), add_across<1>(off, squares);
      float const moved = off * (p.inverse_k * kRun);
      squares = fmaf(moved * float(-p.k), moved, squares);
      mean = first + moved;
    }
    float const inverse = rsqrtf(fmaf(squares, p.inverse_k, p.eps));
    m = {inverse, -mean * inverse};
    return {inverse, (own - mean) * inverse};
  }
  __device__ Moments moments_of_row(int runs) const {
    return moments([&](auto f) {
#pragma unroll 1
      for (int run = warp; run < runs; run += warps) {
        Values raw;
        load(run, raw);
        each_piece(run, [&](int panel, int half, int) { f(widen<In>(raw[panel][half])); });
      }
    });
  }

  __device__ float4 vector_four(void const* vector, int dtype, int64_t at) const {
    if (dtype == kBFloat16)
      return widen<__nv_bfloat16>(
          __ldg(reinterpret_cast<uint2 const*>(static_cast<__nv_bfloat16 const*>(vector) + at)));
    if (dtype == kFloat16)
      return widen<__half>(__ldg(reinterpret_cast<uint2 const*>(static_cast<__half const*>(vector) + at)));
    return __ldg(reinterpret_cast<float4 const*>(static_cast<float const*>(vector) + at));
  }

  __device__ void prologue(int run, Values& raw, Moments const& m) const {
    if constexpr (kPrologue == kGelu || kPrologue == kCatGelu) {
      each_piece(run, [&](int panel, int half, int at) {
        if (kPrologue == kGelu || appended(at))
          raw[panel][half] = narrow<In>(each(widen<In>(raw[panel][half]), gelu<kPrecise>));
      });
    }
    if constexpr (kPrologue == kSiluMul) {
      auto const* y = static_cast<In const*>(p.y) + row * p.y_stride;
      each_piece(run, [&](int panel, int half, int at) {
        float4 const gate = each(widen<In>(raw[panel][half]), silu<kPrecise>);
        float4 const v = widen<In>(load_four<In>(y + at));
        raw[panel][half] = narrow<In>(make_float4(gate.x * v.x, gate.y * v.y, gate.z * v.z, gate.w * v.w));
      });
    }
    if constexpr (kPrologue == kModulate) {
      modulate(run, raw, m, [&](int panel, int half) { return widen<In>(raw[panel][half]); });
    }
  }
  // raw = (value * m.scale + m.offset) * (1 + gain) + shift, rounded once
  template <class Value>
  __device__ void modulate(int run, Values& raw, Moments const& m, Value value) const {
    // asked once a run, not once a value; the streamed mode is bound by other things
    bool const same = p.scale_dtype == dtype_of<In> && p.shift_dtype == dtype_of<In>;
    if (kMode != kStream && same) modulate<true>(run, raw, m, value);
    else modulate<false>(run, raw, m, value);
  }
  template <bool kSameDtype, class Value>
  __device__ void modulate(int run, Values& raw, Moments const& m, Value value) const {
    int64_t const vector = p.vector_stride ? int(row) / p.rows_per_vector * p.vector_stride : 0;
    each_piece(run, [&](int panel, int half, int at) {
      float4 const gain = vector_four(p.scale, kSameDtype ? dtype_of<In> : p.scale_dtype, vector + at);
      float4 const shift = vector_four(p.shift, kSameDtype ? dtype_of<In> : p.shift_dtype, vector + at);
      float4 const v = each(value(panel, half), [&](float e) { return fmaf(e, m.scale, m.offset); });
      raw[panel][half] = narrow<In>(make_float4(fmaf(v.x, 1.f + gain.x, shift.x), fmaf(v.y, 1.f + gain.y, shift.y),
                                                fmaf(v.z, 1.f + gain.z, shift.z), fmaf(v.w, 1.f + gain.w, shift.w)));
    });
  }
  // LayerNorm and all of a row in registers; returns the moments of x
  __device__ Moments standardize_and_modulate(Values& raw) const {
    if constexpr (kMode == kFull) {
      Wide centred;
      Moments m;
      Moments const of_centred = measure_full(raw, centred, m);
      if (isfinite(m.scale) && m.scale > 0.f) {  // else squares have left fp32, or the row is broken
        modulate(warp, raw, of_centred, [&](int panel, int half) { return centred[panel][half]; });
        return m;
      }
      load(warp, raw);  // rather than kept in registers
    }
    Moments const m = moments_of(raw, warp);
    prologue(warp, raw, m);
    return m;
  }

  // c (columns of X H16, row of X) += H16 . X^T for half a panel
  __device__ void first_factor(float (&c)[4], Four<In> v, uint32_t a0, uint32_t a1, float damp) const {
    if constexpr (kFp32) multiply_split<3>(c, a0, a1, v.x * damp, v.y * damp, v.z * damp, v.w * damp);
    else mma<kHalf>(c, a0, a1, v.x, v.y);
  }

  // raw -> y: per panel, columns 4t .. 4t + 3 of row g, then of row g + 8; -> the largest magnitude
  __device__ float rotate(Values const& raw, float (&y)[kPanels][8], float damp) const {
    uint32_t a0 = factors.x, a1 = factors.y;
    uint32_t const r0 = factors.z, r1 = factors.w;
    if (!kFp32 && !kHalf && damp != 1.f) {  // the damping of bf16 sits in the factor: 2^-18 for 2^-2
      a0 = (a0 & 0x80008000u) | 0x36803680u, a1 = (a1 & 0x80008000u) | 0x36803680u;
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      float c0[4] = {}, c1[4] = {};
      first_factor(c0, raw[panel][0], a0, a1, damp);
      first_factor(c1, raw[panel][1], a0, a1, damp);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        float d[4] = {};
        if constexpr (kFp32) multiply_split<3>(d, r0, r1, c0[2 * u], c0[2 * u + 1], c1[2 * u], c1[2 * u + 1]);
        else if constexpr (kPrecise) multiply_tf32(d, r0, r1, c0[2 * u], c0[2 * u + 1], c1[2 * u], c1[2 * u + 1]);
        else multiply_split<2>(d, r0, r1, c0[2 * u], c0[2 * u + 1], c1[2 * u], c1[2 * u + 1]);
        y[panel][2 * u] = d[0], y[panel][2 * u + 1] = d[1], y[panel][4 + 2 * u] = d[2], y[panel][5 + 2 * u] = d[3];
      }
    }
    if (p.group == 1024) {
#pragma unroll
      for (int i = 0; i < 8; ++i) hadamard4(y[0][i], y[1][i], y[2][i], y[3][i]);
    }
    float largest = 0.f;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = max_abs(largest, y[panel][i]);
    }
    return largest;
  }

  struct Step {
    float size, inverse;
    uint32_t keep;  // 0 for a row of zero codes
  };
  template <bool kClamp>
  __device__ uint32_t code(float v, Step const& step) const {
    if constexpr (kFp32) {
      v = __fdiv_rn(v, step.size);
      if (kClamp) v = fminf(fmaxf(v, -p.qmax), p.qmax);
      return __float_as_uint(v + kRoundHalfEven);
    } else {
      if constexpr (!kPrecise) {
        if (!kClamp) return __float_as_uint(fmaf(v, step.inverse, kRoundHalfEven));
        // where in -qmax .. qmax: saturation to 0 .. 1 is free, a minimum and a maximum are not
        float share;
        asm("fma.rn.sat.f32 %0, %1, %2, 0f3F000000;" : "=f"(share) : "f"(v), "f"(step.inverse * (0.5f * p.inverse_qmax)));
        return __float_as_uint(fmaf(share, 2.f * p.qmax, kRoundHalfEven - p.qmax));
      }
      // fine codes and small groups of 16-bit values meet ties, which a reciprocal alone misses: v / size (Markstein)
      float quotient = v * step.inverse;
      quotient = fmaf(fmaf(-quotient, step.size, v), step.inverse, quotient);
      if (kClamp) quotient = fminf(fmaxf(quotient, -p.qmax), p.qmax);
      return __float_as_uint(quotient + kRoundHalfEven);
    }
  }
  template <bool kClamp, bool kPacked>
  __device__ void store(int run, float const (&y)[kPanels][8], Step const& step) const {
    int64_t const first = row * p.k;
    each_piece(run, [&](int panel, int half, int at) {
      float const* v = y[panel] + 4 * half;
      uint32_t four =
          __byte_perm(__byte_perm(code<kClamp>(v[0], step), code<kClamp>(v[1], step), 0x0040),
                      __byte_perm(code<kClamp>(v[2], step), code<kClamp>(v[3], step), 0x0040), 0x5410) &
          step.keep;
      if (kPacked) {
        four &= 0x0F0F0F0Fu, four |= four >> 4;
        *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(p.codes) + (first + at) / 2) =
            uint16_t(__byte_perm(four, 0, 0x4420));
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.codes) + first + at) = four;
      }
    });
  }
  // asked once a run, not once a value
  __device__ void store(int run, float const (&y)[kPanels][8], Step const& step) const {
    if (p.clamp) p.packed ? store<true, true>(run, y, step) : store<true, false>(run, y, step);
    else p.packed ? store<false, true>(run, y, step) : store<false, false>(run, y, step);
  }

  // rounds the row's maximum to its scale, and writes that
  __device__ Step step_of(float reach, float damp) const {
    float const exact = reach * (1.f / damp);  // inf where the row leaves fp32
    bool const finite = isfinite(exact);
    // reach * clip / qmax as IEEE rounds it (Markstein): a division takes four times as long
    float const clipped = exact * p.clip, near = clipped * p.inverse_qmax;
    float const scale = fmaxf(fmaf(fmaf(-near, p.qmax, clipped), p.inverse_qmax, near), 1e-10f);
    if (threadIdx.x == 0) p.row_scale[row] = finite ? scale : __int_as_float(0x7FC00000);
    float inverse;
    if constexpr (kPrecise) inverse = __frcp_rn(scale * damp);
    else asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scale * damp));
    return {scale * damp, inverse, finite ? ~0u : 0u};
  }

  // the two halves of a row that does not stay in registers
  __device__ float reach_of_row(int runs, Moments const& m, float damp, int line) const {
    Values raw;
    float y[kPanels][8], largest = 0.f;
#pragma unroll 1
    for (int run = warp; run < runs; run += warps) {
      load(run, raw);
      prologue(run, raw, m);
      largest = max_abs(largest, rotate(raw, y, damp));
    }
    return block_max(largest, line);
  }
  __device__ void write_row(int runs, Moments const& m, float damp, Step const& step) const {
    Values raw;
    float y[kPanels][8];
#pragma unroll 1
    for (int run = warp; run < runs; run += warps) {
      load(run, raw);
      prologue(run, raw, m);
      rotate(raw, y, damp);
      store(run, y, step);
    }
  }
  __device__ void run_all(int runs) const {
    Moments m{};
    if constexpr (kMode == kStream) {
      if constexpr (kPrologue == kModulate) m = moments_of_row(runs);
      float const reach = reach_of_row(runs, m, 1.f, 2);
      if (!isfinite(reach)) return repeat_damped<In, kPrologue, kPrecise, kMode>(p, shared, runs, m);
      write_row(runs, m, 1.f, step_of(reach, 1.f));
    } else {
      Values raw;
      float y[kPanels][8];
      load(warp, raw);
      if constexpr (kPrologue == kModulate) m = standardize_and_modulate(raw);
      else prologue(warp, raw, m);
      float const reach = block_max(rotate(raw, y, 1.f), 2);
      if (!isfinite(reach)) return repeat_damped<In, kPrologue, kPrecise, kMode>(p, shared, runs, m);
      Step step = step_of(reach, 1.f);
      step.keep = ~0u;  // known here: one instruction less for four codes
      store(warp, y, step);
    }
  }
};

template <class In, int kPrologue, bool kPrecise, int kMode>
__device__ Row<In, kPrologue, kPrecise, kMode> row_of_block(Problem const& p, float (&shared)[6][32]) {
  int const lane = threadIdx.x & 31;
  uint4 const factors = fragments_of<std::is_same_v<In, __half>>(p.group, lane);
  return {p, shared, lane, int(threadIdx.x >> 5), int(blockDim.x >> 5), int64_t(blockIdx.x), factors};
}

// a row with inf or NaN, or one whose sums left fp32 on the way: rare, so out of line and with nothing kept from before
template <class In, int kPrologue, bool kPrecise, int kMode>
__device__ __noinline__ void repeat_damped(Problem const& p, float (&shared)[6][32], int runs, Moments m) {
  auto const row = row_of_block<In, kPrologue, kPrecise, kMode>(p, shared);
  row.write_row(runs, m, kDamp, row.step_of(row.reach_of_row(runs, m, kDamp, 3), kDamp));
}

// two blocks of kMaxWarps an SM, three of 12 warps (K = 12288) where 56 registers are enough; fp32 and streams need more
template <class In, int kPrologue, bool kPrecise, int kMode>
constexpr int registers = (sizeof(In) == 4 || kMode == kStream)                       ? 128
                          : (kMode == kFull && kPrologue < kModulate && !kPrecise) ? 56
                                                                                      : 64;

template <class In, int kPrologue, bool kPrecise, int kMode>
__global__ void __maxnreg__((registers<In, kPrologue, kPrecise, kMode>))
    rotate_quantize(__grid_constant__ Problem const p, int runs) {
  __shared__ float shared[6][32];
  start_next();
  auto const row = row_of_block<In, kPrologue, kPrecise, kMode>(p, shared);
  wait_for_previous();
  row.run_all(runs);
}

template <class In, int kPrologue, bool kPrecise>
int launch(Problem const& p, int rows, cudaStream_t stream) {
  int const runs = (p.k + kRun - 1) / kRun, threads = 32 * (runs < kMaxWarps ? runs : kMaxWarps);
  bool const whole = sizeof(In) == 2 && p.k % kRun == 0 && p.seam % kRun == 0;
  auto const run = [&](auto* kernel) { return launch_early(kernel, rows, threads, stream, p, runs); };
  if (runs > kMaxWarps) return run(rotate_quantize<In, kPrologue, kPrecise, kStream>);
  if (whole) return run(rotate_quantize<In, kPrologue, kPrecise, sizeof(In) == 2 ? kFull : kGuarded>);
  return run(rotate_quantize<In, kPrologue, kPrecise, kGuarded>);
}

template <class In, int kPrologue>
int launch(Problem const& p, int rows, bool precise, cudaStream_t stream) {
  if constexpr (sizeof(In) == 4) return launch<In, kPrologue, true>(p, rows, stream);
  else return precise ? launch<In, kPrologue, true>(p, rows, stream) : launch<In, kPrologue, false>(p, rows, stream);
}

using bf16 = __nv_bfloat16;
using fp16 = __half;
using fp32 = float;

}  // namespace
}  // namespace convrot

#define CONVROT_JOIN2(a, b) a##b
#define CONVROT_JOIN(a, b) CONVROT_JOIN2(a, b)

// strides in elements; rows of x and y 8-byte (fp32: 16-byte) aligned; scale and shift null unless prologue is modulate
CONVROT_EXPORT int CONVROT_JOIN(convrot_rotate_quantize_,
                                CONVROT_INPUT)(void const* x, int64_t x_stride, void const* y, int64_t y_stride,
                                               int seam, void const* scale, int scale_dtype, void const* shift,
                                               int shift_dtype, int64_t vector_stride, int rows_per_vector, float eps,
                                               void* codes, void* row_scale, int rows, int k, int group, int bits,
                                               int packed, int prologue, float clip, void* stream) {
  using namespace convrot;
  using In = CONVROT_INPUT;
  bool const known = group == 16 || group == 64 || group == 256 || group == 1024;
  if (rows < 1 || k < 16 || !known || k % group != 0 || seam % 16 != 0 || rows_per_vector < 1) return kUnknownShape;
  if ((bits != 4 && bits != 8) || (packed && bits != 4)) return kUnknownShape;
  Problem const p{x,
                  y,
                  x_stride,
                  y_stride,
                  seam,
                  scale,
                  shift,
                  scale_dtype,
                  shift_dtype,
                  rows_per_vector,
                  vector_stride,
                  eps,
                  codes,
                  static_cast<float*>(row_scale),
                  k,
                  group,
                  packed != 0,
                  clip < 1.f,
                  bits == 4 ? 7.f : 127.f,
                  bits == 4 ? 1.f / 7.f : 1.f / 127.f,
                  clip,
                  1.f / float(k)};
  bool const precise = bits == 8 || group < 256 || k > kRun * kMaxWarps;  // streamed rows wait for memory anyway
  auto const at = static_cast<cudaStream_t>(stream);
  switch (prologue) {
    case kNone:
      return launch<In, kNone>(p, rows, precise, at);
    case kGelu:
      return launch<In, kGelu>(p, rows, precise, at);
    case kModulate:
      return launch<In, kModulate>(p, rows, precise, at);
    case kSiluMul:
      return launch<In, kSiluMul>(p, rows, precise, at);
    case kCatGelu:
      return launch<In, kCatGelu>(p, rows, precise, at);
    default:
      return kUnknownShape;
  }
}
