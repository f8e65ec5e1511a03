// A 16-bit low-rank term beside a quantized product: low = values down^T, later out += gate * alpha * low up^T.
//
// Both are bound by memory: x is read once, out once and written once. The products are m16n8k16 on tensor cores, whose
// order of K is free: a lane's fragments are its eight (or four) values of a row as one load brought them, of both
// operands alike. low_rank_down: a block has 16 or 32 rows; its warps share K out among themselves and add up in a
// fixed order. What a quantizer's prologue does to x happens between the load and the product, in registers, with its
// arithmetic, while the next values are on their way; LayerNorm reads its rows once before. low_rank_up: a warp has 32
// columns, whose order is free as well: each lane writes eight neighbours; up stays in registers.
//
// H200, bf16, 4608 rows, us: 16 ranks of K = 3072 12 (a copy of x 15), with LayerNorm + modulate 23, with GELU of
// K = 12288 62, of [x | gelu(y)] 74 (what quantizes that takes as long); up to 21504 columns 117, as Triton's. 48 ranks
// 19, modulated 34; 64 ranks 28 and 48, Triton's kernel 22 and 45; 512 rows, 48 ranks, modulated 14. Lost: gain and
// shift read when they are needed, behind a question for their dtype (31, of 48 ranks 43, of 512 rows 30), two blocks
// an SM (GELUs 64 and 87), LayerNorm's moments in a launch of their own (32 of 16 ranks, 50 of 48), a block of 16 rows
// for 48 ranks of many rows (26, not 19), 64 rows of low_rank_up a block (128).
#include "eight.cuh"

namespace convrot {
namespace {

// those of rotate_quantize.cu; kModulateAlike: vectors of the values' dtype, the same ones for all rows of a block
enum Prologue : int { kNone = 0, kGelu = 1, kModulate = 2, kCatGelu = 4, kModulateAlike = 5 };

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostTerms = 4;
constexpr int kHeld = 16;  // loads of a lane for one row whose moments are taken, where they are held: K up to 4096
constexpr int kFewRows = 1024;
constexpr int kWide = 32;  // columns of a warp of low_rank_up

template <bool kHalf>
__device__ __forceinline__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  if constexpr (kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ float together(float const (&v)[kColumns]) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// stays in the cache: read again soon, by this block or by others
template <class X>
__device__ __forceinline__ Eight<X> load_kept(X const* at) {
  uint4 const v = __ldg(reinterpret_cast<uint4 const*>(at));
  return {{v.x, v.y}, {v.z, v.w}};
}

// low = values down^T

struct Down {
  void const *x, *y;
  int64_t x_stride, y_stride;
  int seam;                   // columns of x in cat_gelu
  void const *scale, *shift;  // of modulate, one row per rows_per_vector rows of x
  int scale_dtype, shift_dtype, rows_per_vector;
  int64_t vector_stride;
  float eps, inverse_k;
  void const* down[kMostTerms];  // each (r, k)
  int ranks, r;                  // of all terms, of each
  void* low;                     // (rows, ranks)
  int rows, k;
};

template <class In, int kPrologue, int kTiles, int kBands>
struct DownBlock {
  static constexpr int kRows = 16 * kBands;
  static constexpr bool kAlike = kPrologue == kModulateAlike, kModulated = kAlike || kPrologue == kModulate;
  static constexpr bool kAhead = !kModulated || (kAlike && kBands == 1);  // x is in the cache after LayerNorm
  static constexpr int kParts = kTiles > 2 || kAlike ? 1 : 2, kChunk = 32 * kParts;  // columns a warp reads at once
  using Values = Eight<In>[kParts][kBands][2];
  using Vectors = Eight<In>[kParts][2];  // gain and shift, where all rows have the same
  Down const& p;
  int const lane, warp, group, quad;

  __device__ int row_at(int of_block) const { return min(int(blockIdx.x) * kRows + of_block, p.rows - 1); }
  __device__ In const* x_of(int row) const { return static_cast<In const*>(p.x) + row * p.x_stride; }

  // visit(value, i) of all of a row's that are this lane's, i below kColumns: sums that do not wait for one another
  template <class Visit>
  __device__ void each_of_row(In const* x, Visit visit) const {
#pragma unroll 4
    for (int column = lane * kColumns; column < p.k; column += 32 * kColumns) {
      float v[kColumns];
      unpack<In>(load_kept(x + column), v);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) visit(v[i], i);
    }
  }
  template <class Visit>
  __device__ void each_held(Eight<In> const (&held)[kHeld], Visit visit) const {
#pragma unroll
    for (int load = 0; load < kHeld; ++load) {
      if ((load * 32 + lane) * kColumns >= p.k) continue;
      float v[kColumns];
      unpack<In>(held[load], v);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) visit(v[i], i);
    }
  }
  // all of a warp; in two passes, damped where squares leave fp32
  template <class Each>
  __device__ Moments moments(Each each) const {
    float damp = 1.f;
    while (true) {
      float sums[kColumns] = {}, squares[kColumns] = {};
      each([&](float v, int i) { sums[i] = fmaf(v, damp, sums[i]); });
      float const mean = warp_sum(together(sums)) * p.inverse_k;
      each([&](float v, int i) {
        float const off = fmaf(v, damp, -mean);
        squares[i] = fmaf(off, off, squares[i]);
      });
      float const variance = warp_sum(together(squares)) * p.inverse_k;
      if (isfinite(variance) || damp != 1.f) {
        float const inverse = rsqrtf(variance + p.eps * damp);
        return {damp * inverse, -mean * inverse};
      }
      damp = kTiny;
    }
  }
  __device__ Moments moments_of(In const* x) const {
    if (p.k > kHeld * 32 * kColumns) return moments([&](auto visit) { each_of_row(x, visit); });
    Eight<In> held[kHeld];
#pragma unroll
    for (int load = 0; load < kHeld; ++load) {
      int const column = (load * 32 + lane) * kColumns;
      held[load] = column < p.k ? load_kept(x + column) : Eight<In>{};
    }
    return moments([&](auto visit) { each_held(held, visit); });
  }

  __device__ Four<In> modulated(Four<In> raw, Moments const& m, float4 gain, float4 shift) const {
    float4 const v = each(widen<In>(raw), [&](float e) { return fmaf(e, m.scale, m.offset); });
    return convrot::narrow<In>(make_float4(fmaf(v.x, 1.f + gain.x, shift.x), fmaf(v.y, 1.f + gain.y, shift.y),
                                           fmaf(v.z, 1.f + gain.z, shift.z), fmaf(v.w, 1.f + gain.w, shift.w)));
  }
  __device__ int64_t vector_of(int row) const {
    return p.vector_stride ? row / p.rows_per_vector * p.vector_stride : 0;
  }
  __device__ void modulate(Eight<In>& raw, Moments const& m, float const (&gain)[kColumns],
                           float const (&shift)[kColumns]) const {
    raw.first = modulated(raw.first, m, {gain[0], gain[1], gain[2], gain[3]}, {shift[0], shift[1], shift[2], shift[3]});
    raw.second =
        modulated(raw.second, m, {gain[4], gain[5], gain[6], gain[7]}, {shift[4], shift[5], shift[6], shift[7]});
  }
  __device__ void vectors(int64_t at, float (&gain)[kColumns], float (&shift)[kColumns]) const {
    load_any(p.scale, p.scale_dtype, at, gain);
    load_any(p.shift, p.shift_dtype, at, shift);
  }

  // eight columns of rows `first` and `first + 8`, as they lie in memory
  __device__ void fetch(int column, int first, Eight<In> (&raw)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int const row = row_at(first + i * 8);
      if (column >= p.k) raw[i] = {};
      else if (kModulated) raw[i] = load_kept(x_of(row) + column);
      else if (kPrologue == kCatGelu && column >= p.seam)
        raw[i] = load_eight(static_cast<In const*>(p.y) + row * p.y_stride + column - p.seam);
      else raw[i] = load_eight(x_of(row) + column);
    }
  }
  __device__ void fetch_vectors(int chunk, Vectors& to) const {
    int64_t const vector = vector_of(row_at(0));
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      int const column = chunk + part * 32 + quad * kColumns;
      if (column >= p.k) continue;
      to[part][0] = load_kept(static_cast<In const*>(p.scale) + vector + column);
      to[part][1] = load_kept(static_cast<In const*>(p.shift) + vector + column);
    }
  }
  // and as the product reads them
  __device__ void prepare(int column, int first, Eight<In> (&raw)[2], Eight<In> const (&alike)[2],
                          Moments const* of_rows) const {
    if (column >= p.k || (kPrologue == kCatGelu && column < p.seam)) return;
    if constexpr (kPrologue == kGelu || kPrologue == kCatGelu) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v[kColumns];
        unpack<In>(raw[i], v);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) v[j] = gelu<false>(v[j]);
        raw[i] = pack<In>(v);
      }
    }
    if constexpr (kAlike) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Moments const m = of_rows[first + i * 8];
        raw[i].first = modulated(raw[i].first, m, widen<In>(alike[0].first), widen<In>(alike[1].first));
        raw[i].second = modulated(raw[i].second, m, widen<In>(alike[0].second), widen<In>(alike[1].second));
      }
    }
    if constexpr (kPrologue == kModulate) {
      float gain[kColumns], shift[kColumns];
      int64_t const one = vector_of(row_at(first)), other = vector_of(row_at(first + 8));
      vectors(one + column, gain, shift);
      modulate(raw[0], of_rows[first], gain, shift);
      if (other != one) vectors(other + column, gain, shift);
      modulate(raw[1], of_rows[first + 8], gain, shift);
    }
  }

  __device__ In const* down_of(int rank) const {  // null beyond the last
    int const term = rank / p.r;
    void const* const matrix = term == 0 ? p.down[0] : term == 1 ? p.down[1] : term == 2 ? p.down[2] : p.down[3];
    return rank < p.ranks ? static_cast<In const*>(matrix) + int64_t(rank - term * p.r) * p.k : nullptr;
  }

  __device__ void accumulate(float (&sums)[kBands][kTiles][4], int first_rank, Moments const* of_rows) const {
    In const* down[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) down[tile] = down_of(first_rank + tile * 8 + group);
    Values x, next;
    Vectors alike = {}, next_alike = {};
    if (kAhead) fetch_chunk(warp * kChunk, x);
    if (kAlike) fetch_vectors(warp * kChunk, alike);
#pragma unroll 1
    for (int chunk = warp * kChunk; chunk < p.k; chunk += kWarps * kChunk) {
      Eight<In> d[kParts][kTiles];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        int const column = chunk + part * 32 + quad * kColumns;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          d[part][tile] = down[tile] && column < p.k ? load_kept(down[tile] + column) : Eight<In>{};
      }
      if (kAhead) fetch_chunk(chunk + kWarps * kChunk, next);  // while this one is worked on
      else fetch_chunk(chunk, x);
      if (kAlike) fetch_vectors(chunk + kWarps * kChunk, next_alike);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int band = 0; band < kBands; ++band) {
          prepare(chunk + part * 32 + quad * kColumns, band * 16 + group, x[part][band], alike[part], of_rows);
          Eight<In> const &a = x[part][band][0], &b = x[part][band][1];
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            constexpr bool kHalf = std::is_same_v<In, __half>;
            Eight<In> const& c = d[part][tile];
            float(&to)[4] = sums[band][tile];
            multiply_add<kHalf>(to, a.first.x, b.first.x, a.first.y, b.first.y, c.first.x, c.first.y);
            multiply_add<kHalf>(to, a.second.x, b.second.x, a.second.y, b.second.y, c.second.x, c.second.y);
          }
          if (kAhead) x[part][band][0] = next[part][band][0], x[part][band][1] = next[part][band][1];
        }
        if (kAlike) alike[part][0] = next_alike[part][0], alike[part][1] = next_alike[part][1];
      }
    }
  }
  __device__ void fetch_chunk(int chunk, Values& x) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int band = 0; band < kBands; ++band)
        fetch(chunk + part * 32 + quad * kColumns, band * 16 + group, x[part][band]);
    }
  }

  __device__ void write(float const (&sums)[kBands][kTiles][4], int first_rank) const {
#pragma unroll
    for (int i = 0; i < kBands * kTiles * 4; ++i) {
      int const band = i / 4 / kTiles, tile = i / 4 % kTiles;
      int const row = int(blockIdx.x) * kRows + band * 16 + group + i % 4 / 2 * 8;
      int const rank = first_rank + tile * 8 + quad * 2 + i % 2;
      if (row < p.rows && rank < p.ranks)
        store_from_float(p.low, dtype_of<In>, int64_t(row) * p.ranks + rank, sums[band][tile][i % 4]);
    }
  }
};

// an SM has three where 80 registers are enough: the 288 of 4608 rows at once
template <int kPrologue, int kTiles>
constexpr int down_blocks = kTiles == 2 && kPrologue != kModulate ? 3 : 2;

template <class In, int kPrologue, int kTiles, int kBands>
__global__ void __launch_bounds__(kThreads, down_blocks<kPrologue, kTiles>)
    low_rank_down(__grid_constant__ Down const p) {
  using Block = DownBlock<In, kPrologue, kTiles, kBands>;
  constexpr int kSums = kBands * kTiles * 4;
  __shared__ Moments of_rows[Block::kRows];
  __shared__ float shared[kWarps / 2][kSums][32];
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first_rank = blockIdx.y * kTiles * 8;
  Block const block{p, lane, warp, lane >> 2, lane & 3};
  if constexpr (Block::kModulated) {
    for (int row = warp; row < Block::kRows; row += kWarps) {
      Moments const found = block.moments_of(block.x_of(block.row_at(row)));
      if (lane == 0) of_rows[row] = found;
    }
    __syncthreads();
  }
  float sums[kBands][kTiles][4] = {};
  block.accumulate(sums, first_rank, of_rows);
  float* const flat = &sums[0][0][0];
#pragma unroll
  for (int half = kWarps / 2; half; half /= 2) {
    if (warp >= half && warp < 2 * half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) shared[warp - half][i][lane] = flat[i];
    }
    __syncthreads();
    if (warp < half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) flat[i] += shared[warp][i][lane];
    }
    __syncthreads();
  }
  if (warp == 0) block.write(sums, first_rank);
}

template <class In, int kPrologue, int kTiles, int kBands>
int launch_blocks(Down const& p, cudaStream_t stream) {
  constexpr int kRows = 16 * kBands, kRanks = 8 * kTiles;
  dim3 const grid((p.rows + kRows - 1) / kRows, (p.ranks + kRanks - 1) / kRanks);
  low_rank_down<In, kPrologue, kTiles, kBands><<<grid, kThreads, 0, stream>>>(p);
  return cuda_status(cudaGetLastError());
}

// every block reads all of down: where that is more than x, two bands of 16 rows share it, if there are rows enough
template <class In, int kPrologue, int kTiles>
int launch_tiles(Down const& p, cudaStream_t stream) {
  if (p.rows > kFewRows) return launch_blocks<In, kPrologue, kTiles, 2>(p, stream);
  return launch_blocks<In, kPrologue, kTiles, 1>(p, stream);
}

// 48 at once are q, k and v of rank 16; of 64 two blocks take 32 each
template <class In, int kPrologue>
int launch_down(Down const& p, cudaStream_t stream) {
  if (p.ranks <= 16) return launch_blocks<In, kPrologue, 2, 1>(p, stream);
  return p.ranks > 32 && p.ranks <= 48 ? launch_tiles<In, kPrologue, 6>(p, stream)
                                       : launch_tiles<In, kPrologue, 4>(p, stream);
}

template <class In>
bool alike(Down const& p) {
  bool const same = p.scale_dtype == dtype_of<In> && p.shift_dtype == dtype_of<In>;
  return same && (p.vector_stride == 0 || p.rows_per_vector % 32 == 0);
}

template <class In>
int launch_down(Down const& p, int prologue, cudaStream_t stream) {
  switch (prologue) {
    case kNone:
      return launch_down<In, kNone>(p, stream);
    case kGelu:
      return launch_down<In, kGelu>(p, stream);
    case kModulate:
      return alike<In>(p) ? launch_down<In, kModulateAlike>(p, stream) : launch_down<In, kModulate>(p, stream);
    case kCatGelu:
      return launch_down<In, kCatGelu>(p, stream);
    default:
      return kUnknownShape;
  }
}

// out += gate * alpha * low up^T

struct Term {
  void const* up;  // (n, r)
  int n, column;   // the first one in out
  float alpha;
  int tile;  // of the grid, the first one
};

struct Up {
  void* out;
  int64_t out_stride;
  void const* low;  // a term's ranks after those of the one before it
  int64_t low_stride;
  Term terms[kMostTerms];
  int count, r;
  void const* gate;  // or null
  int gate_dtype, rows_per_gate;
  int64_t gate_stride;
  int rows;
};

template <class In>
__device__ __forceinline__ Four<In> load_rank_four(In const* at, bool inside) {
  return inside ? __ldg(reinterpret_cast<uint2 const*>(at)) : uint2{};
}

// of 16 rows, in a block: few, so that more blocks are under way, and while one waits for out another writes
template <int kSteps>
constexpr int bands = kSteps == 1 ? 2 : 4;

template <class In, int kSteps>
__global__ void __launch_bounds__(kThreads, kSteps == 1 ? 4 : 2) low_rank_up(__grid_constant__ Up const p) {
  constexpr int kBands = bands<kSteps>;
  int const lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, quad = lane & 3;
  Term term = p.terms[0];
  int index = 0;
#pragma unroll
  for (int i = 1; i < kMostTerms; ++i) {
    if (i < p.count && int(blockIdx.y) >= p.terms[i].tile) term = p.terms[i], index = i;
  }
  int const first = ((int(blockIdx.y) - term.tile) * kWarps + warp) * kWide;
  if (first >= term.n) return;
  int const column = first + quad * kColumns, top = blockIdx.x * kBands * 16;
  bool const inside = column < term.n;
  auto* const out = static_cast<In*>(p.out) + term.column + column;
  auto const* const low = static_cast<In const*>(p.low) + index * p.r;

  Eight<In> old[kBands][2];
#pragma unroll
  for (int i = 0; i < 2 * kBands; ++i) {
    int const row = top + i / 2 * 16 + i % 2 * 8 + group;
    old[i / 2][i % 2] = {};
    if (inside && row < p.rows) {
      uint4 const v = *reinterpret_cast<uint4 const*>(out + row * p.out_stride);
      old[i / 2][i % 2] = {{v.x, v.y}, {v.z, v.w}};
    }
  }
  Four<In> up[4][kSteps];
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    int const n = first + (group >> 1) * kColumns + tile * 2 + (group & 1);
    auto const* const row = static_cast<In const*>(term.up) + int64_t(n) * p.r;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      up[tile][step] = load_rank_four(row + step * 16 + quad * 4, n < term.n && step * 16 + quad * 4 < p.r);
  }
  float gate[kColumns];
  int64_t gated = -1;  // where it was read
#pragma unroll
  for (int band = 0; band < kBands; ++band) {
    int const row = top + band * 16 + group;
    if (top + band * 16 >= p.rows) break;
    float sums[4][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      int const rank = step * 16 + quad * 4;
      Four<In> const a = load_rank_four(low + row * p.low_stride + rank, rank < p.r && row < p.rows);
      Four<In> const b = load_rank_four(low + (row + 8) * p.low_stride + rank, rank < p.r && row + 8 < p.rows);
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)
        multiply_add<std::is_same_v<In, __half>>(sums[tile], a.x, b.x, a.y, b.y, up[tile][step].x, up[tile][step].y);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const at = row + half * 8;
      if (!inside || at >= p.rows) continue;
      if (p.gate) {
        int64_t const from = (p.gate_stride ? at / p.rows_per_gate * p.gate_stride : 0) + term.column + column;
        if (from != gated) load_any(p.gate, p.gate_dtype, from, gate), gated = from;
      }
      float v[kColumns];
      unpack<In>(old[band][half], v);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        float const sum = sums[i / 2][half * 2 + i % 2] * term.alpha;
        v[i] += p.gate ? sum * gate[i] : sum;
      }
      store_eight(out + at * p.out_stride, pack<In>(v));
    }
  }
}

template <class In>
int launch_up(Up const& p, int tiles, cudaStream_t stream) {
  cudaGetLastError();  // what another kernel's failure left would have this one launched twice
  auto const run = [&](auto* kernel, int rows) {
    kernel<<<dim3((p.rows + rows - 1) / rows, tiles), kThreads, 0, stream>>>(p);
    return cuda_status(cudaGetLastError());
  };
  if (p.r <= 16) return run(low_rank_up<In, 1>, 16 * bands<1>);
  return p.r <= 32 ? run(low_rank_up<In, 2>, 16 * bands<2>) : run(low_rank_up<In, 4>, 16 * bands<4>);
}

}  // namespace
}  // namespace convrot

// x, y and down of one 16-bit dtype; strides in elements; rows of x and y, down (r, k) and the vectors 16-byte aligned;
// k and seam multiples of 8; scale and shift null unless prologue is modulate; low (rows, terms * r)
CONVROT_EXPORT int convrot_low_rank_down(void const* x, int64_t x_stride, void const* y, int64_t y_stride, int seam,
                                         void const* scale, int scale_dtype, void const* shift, int shift_dtype,
                                         int64_t vector_stride, int rows_per_vector, float eps, void const* down0,
                                         void const* down1, void const* down2, void const* down3, int terms, int r,
                                         void* low, int rows, int k, int prologue, int dtype, void* stream) {
  using namespace convrot;
  if (rows < 1 || k < 8 || k % 8 || seam % 8 || terms < 1 || terms > kMostTerms || r < 1 || rows_per_vector < 1)
    return kUnknownShape;
  Down const p{x,
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
               1.f / float(k),
               {down0, down1, down2, down3},
               terms * r,
               r,
               low,
               rows,
               k};
  auto const at = static_cast<cudaStream_t>(stream);
  if (dtype == kBFloat16) return launch_down<__nv_bfloat16>(p, prologue, at);
  return dtype == kFloat16 ? launch_down<__half>(p, prologue, at) : kUnknownShape;
}

// out, low and up of one 16-bit dtype; up (n, r) and rows of low 8-byte aligned, r a multiple of 4, at most 64; n a
// multiple of 8, columns and rows of out 16-byte aligned, gate too (32 bytes of fp32), gate's columns those of out or
// null. Terms write to columns of their own.
CONVROT_EXPORT int convrot_low_rank_up(void* out, int64_t out_stride, void const* low, int64_t low_stride,
                                       void const* up0, void const* up1, void const* up2, void const* up3, int n0,
                                       int n1, int n2, int n3, int column0, int column1, int column2, int column3,
                                       float alpha0, float alpha1, float alpha2, float alpha3, int terms, int r,
                                       void const* gate, int gate_dtype, int64_t gate_stride, int rows_per_gate,
                                       int rows, int dtype, void* stream) {
  using namespace convrot;
  if (rows < 1 || terms < 1 || terms > kMostTerms || r < 4 || r > 64 || r % 4 || rows_per_gate < 1)
    return kUnknownShape;
  Up p{out,
       out_stride,
       low,
       low_stride,
       {{up0, n0, column0, alpha0, 0}, {up1, n1, column1, alpha1, 0}, {up2, n2, column2, alpha2, 0},
        {up3, n3, column3, alpha3, 0}},
       terms,
       r,
       gate,
       gate_dtype,
       rows_per_gate,
       gate_stride,
       rows};
  int tiles = 0;
  for (int i = 0; i < terms; ++i) {
    if (p.terms[i].n < 8 || p.terms[i].n % 8 || p.terms[i].column % 8) return kUnknownShape;
    p.terms[i].tile = tiles;
    tiles += (p.terms[i].n + kWarps * kWide - 1) / (kWarps * kWide);
  }
  auto const at = static_cast<cudaStream_t>(stream);
  if (dtype == kBFloat16) return launch_up<__nv_bfloat16>(p, tiles, at);
  return dtype == kFloat16 ? launch_up<__half>(p, tiles, at) : kUnknownShape;
}
