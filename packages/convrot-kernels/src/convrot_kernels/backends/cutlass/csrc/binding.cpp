// The ops of `convrot` on one device type without a line of Python, through torch's stable C functions (target 2.10):
// one build serves every torch from 2.10 on, and every Python. Plain C++17, no CUDA header.
//
// A call whose key is known goes straight to the kernel: allocate, ask for the stream, call the C function. Any other
// call, a wrong one included, goes to the op of the same name in `convrot_python`: the Python implementation, which
// checks, picks the kernel and, if it launched nothing else and handed the operands over as they lie, teaches it here.
//
// The key holds everything that those checks and that choice depend on: op, device, shapes, dtypes, options. What may
// differ between two calls of one key (strides, alignment, clip, eps, the agreement of the operands) is looked at here,
// at every call: `read` says no, and Python takes the call. Nothing here raises or explains: that is Python's part.
#include <array>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#define CONVROT_EXPORT extern "C" __attribute__((visibility("default")))
#ifndef CONVROT_KEY
#define CONVROT_KEY CUDA
#endif
#define CONVROT_TEXT_(name) #name
#define CONVROT_TEXT(name) CONVROT_TEXT_(name)

namespace {

constexpr int kMaxDim = 8;
constexpr size_t kMaxEntries = 4096;  // some 1 MB; a program with more shapes than this starts over
constexpr int64_t kAlignment = 16;    // bytes: one vector load, and what a tensor map needs

// the first three are those of abi.h, kInt8 is the GEMV's code for activations of one byte
enum Dtype : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kInt8 = 3,
  kUInt8 = 4,
  kFp8 = 5,  // e4m3: of results alone
  kOther = 6,
  kAbsent = 7
};

// the kernels' signatures: gemv.cu, sm90_gemm.cuh and sm80_gemm.cuh, rotate_quantize.cu, norm_rope.cu, low_rank.cu
using Gemm = int (*)(void const* weight, void const* x, void const* a_scale, void const* b_scale, void const* bias,
                     int bias_dtype, void const* gate, int gate_dtype, void const* residual, int64_t residual_stride,
                     void* out, int64_t out_stride, int m, int n, int k, int device, int sm_count, void* stream);
using Gemv = int (*)(void const* weight, int format, void const* x, int x_dtype, void const* a_scale,
                     void const* b_scale, void const* bias, int bias_dtype, void const* gate, int gate_dtype,
                     void const* residual, int64_t residual_stride, void* out, int out_dtype, int64_t out_stride, int m,
                     int n, int k, void* stream);
using Quantizer = int (*)(void const* x, int64_t x_stride, void const* y, int64_t y_stride, int seam, void const* scale,
                          int scale_dtype, void const* shift, int shift_dtype, int64_t vector_stride,
                          int rows_per_vector, float eps, void* codes, void* row_scale, int rows, int k, int group,
                          int bits, int packed, int prologue, float clip, void* stream);
using Attended = int (*)(void const* text, int64_t text_stride_b, int64_t text_stride_s, void const* image,
                         int64_t image_stride_b, int64_t image_stride_s, int dtype, void const* text_q_weight,
                         void const* text_k_weight, void const* q_weight, void const* k_weight, int weight_dtype,
                         void const* cos, void const* sin, void* q, void* k, void* v, int batch, int text_tokens,
                         int image_tokens, int heads, int d, float eps, void* stream);
using AttendedFp8 = int (*)(void const* text, int64_t text_stride_b, int64_t text_stride_s, void const* image,
                            int64_t image_stride_b, int64_t image_stride_s, int dtype, void const* text_q_weight,
                            void const* text_k_weight, void const* q_weight, void const* k_weight, int weight_dtype,
                            void const* cos, void const* sin, void* q, void* k, void* v, void* v_scale, void* most,
                            int batch, int text_tokens, int image_tokens, int heads, int d, float eps, void* stream);
using Downward = int (*)(void const* x, int64_t x_stride, void const* y, int64_t y_stride, int seam, void const* scale,
                         int scale_dtype, void const* shift, int shift_dtype, int64_t vector_stride,
                         int rows_per_vector, float eps, void const* down0, void const* down1, void const* down2,
                         void const* down3, int terms, int r, void* low, int rows, int k, int prologue, int dtype,
                         void* stream);
using Upward = int (*)(void* out, int64_t out_stride, void const* low, int64_t low_stride, void const* up0,
                       void const* up1, void const* up2, void const* up3, int n0, int n1, int n2, int n3, int column0,
                       int column1, int column2, int column3, float alpha0, float alpha1, float alpha2, float alpha3,
                       int terms, int r, void const* gate, int gate_dtype, int64_t gate_stride, int rows_per_gate,
                       int rows, int dtype, void* stream);

// what has been learned

using Key = std::array<int64_t, 13>;

struct Hash {
  size_t operator()(Key const& key) const {
    uint64_t hash = 14695981039346656037ull;
    for (int64_t value : key) hash = (hash ^ uint64_t(value)) * 1099511628211ull;
    return hash ^ hash >> 32;
  }
};

enum Kind : int { kGemm = 0, kGemv = 1, kQuantizer = 2, kNormRope = 3, kLowRankDown = 4, kLowRankUp = 5, kNormRopeFp8 = 6 };

struct Kernel {
  void* function;
  int kind;
  int detail;  // a GEMM's number of multiprocessors, a GEMV's weight format
};

// never destroyed: a thread may still call an op while the process ends
auto& kernels = *new std::unordered_map<Key, Kernel, Hash>;
auto& kernels_lock = *new std::shared_mutex;

bool find(Key const& key, Kernel& kernel) {
  std::shared_lock lock(kernels_lock);
  auto const found = kernels.find(key);
  if (found == kernels.end()) return false;
  kernel = found->second;
  return true;
}

// a call that Python serves; Python answers through it
struct Lesson {
  Key const* key = nullptr;  // null where nothing can be learned
  int launches = 1;
  bool failed = false;
  std::string message;
};
thread_local Lesson* lesson = nullptr;

using StreamOf = AOTITorchError (*)(int32_t device, void** stream);
StreamOf stream_of = nullptr;            // null: a device without streams
int64_t const* named_backends = nullptr;  // use_backend blocks in force, in any thread

// arguments: borrowed from the stack, which owns them until `release` or the dispatcher takes them

struct Tensor {
  char* data = nullptr;
  int dtype = kAbsent;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;
  int32_t device_type = 0, device = 0;

  bool there() const { return dtype != kAbsent; }
  bool is_float() const { return dtype <= kBFloat16; }
  bool is_codes() const { return dtype == kInt8 || dtype == kUInt8; }
  int64_t element_size() const { return dtype == kFloat32 ? 4 : dtype <= kBFloat16 ? 2 : 1; }
  int64_t last() const { return sizes[dim - 1]; }
  int64_t columns() const { return last() * (dtype == kUInt8 ? 2 : 1); }
  bool aligned(int64_t bytes) const { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }
  bool on_the_device_of(Tensor const& other) const {
    return !there() || (device_type == other.device_type && device == other.device);
  }
};

template <class T>
T value(StableIValue from) {
  T result;
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && sizeof(T) <= sizeof(from));
  std::memcpy(&result, &from, sizeof(T));
  return result;
}

template <class T>
StableIValue boxed(T from) {
  StableIValue result = 0;
  std::memcpy(&result, &from, sizeof(T));
  return result;
}

struct Types {
  int32_t float32 = aoti_torch_dtype_float32(), float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16(), int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8();
  int32_t fp8 = aoti_torch_dtype_float8_e4m3fn();

  int ours(int32_t torchs) const {
    return torchs == bfloat16  ? kBFloat16
           : torchs == float16 ? kFloat16
           : torchs == float32 ? kFloat32
           : torchs == int8    ? kInt8
           : torchs == uint8   ? kUInt8
                               : kOther;
  }
  int32_t torchs(int ours) const {
    int32_t const all[] = {float32, float16, bfloat16, int8, uint8, fp8};
    return all[ours];
  }
};
Types const& types() {
  static Types const all;
  return all;
}

Tensor tensor(StableIValue from) {
  auto const handle = value<AtenTensorHandle>(from);
  Tensor t;
  int32_t dtype = 0;
  void* data = nullptr;
  bool const known = aoti_torch_get_dtype(handle, &dtype) == 0 && aoti_torch_get_data_ptr(handle, &data) == 0 &&
                     aoti_torch_get_dim(handle, &t.dim) == 0 && aoti_torch_get_sizes(handle, &t.sizes) == 0 &&
                     aoti_torch_get_strides(handle, &t.strides) == 0 &&
                     aoti_torch_get_device_type(handle, &t.device_type) == 0 &&
                     aoti_torch_get_device_index(handle, &t.device) == 0;
  t.data = static_cast<char*>(data);
  t.dtype = known ? types().ours(dtype) : kOther;
  return t;
}

Tensor optional_tensor(StableIValue from) {
  auto const inner = value<StableIValue*>(from);
  return inner ? tensor(*inner) : Tensor();
}

// of a list: how many there are, -1 where they cannot be asked, and up to kMostTerms of them, borrowed
constexpr int kMostTerms = 4;

template <class T>
int64_t listed(StableIValue from, T (&into)[kMostTerms], T (*read)(StableIValue)) {
  auto const list = value<StableListHandle>(from);
  size_t size = 0;
  if (torch_list_size(list, &size) != 0) return -1;
  for (size_t i = 0; i < size && i < kMostTerms; ++i) {
    StableIValue item;
    if (torch_list_get_item(list, i, &item) != 0) return -1;
    into[i] = read(item);
  }
  return int64_t(size);
}

// of a str: rules and layouts are known by name, and names are Python's
int64_t digest(StableIValue from) {
  char const* text = nullptr;
  size_t length = 0;
  auto const handle = value<StringHandle>(from);
  if (torch_string_c_str(handle, &text) != 0 || torch_string_length(handle, &length) != 0) return 0;
  uint64_t hash = 14695981039346656037ull;
  for (size_t i = 0; i < length; ++i) hash = (hash ^ uint8_t(text[i])) * 1099511628211ull;
  return int64_t(hash);
}

// one letter an argument: t tensor, o optional tensor, d optional dtype, s str, l list of tensors, n list of numbers,
// v a value that owns nothing
void release(StableIValue* stack, char const* letters) {
  for (int i = 0; letters[i]; ++i) {
    if (letters[i] == 't') aoti_torch_delete_tensor_object(value<AtenTensorHandle>(stack[i]));
    if (letters[i] == 's') torch_delete_string(value<StringHandle>(stack[i]));
    if (letters[i] == 'l' || letters[i] == 'n') {
      auto const list = value<StableListHandle>(stack[i]);
      size_t size = 0;
      if (letters[i] == 'l') torch_list_size(list, &size);
      for (size_t item = 0; item < size; ++item) {
        StableIValue one;
        if (torch_list_get_item(list, item, &one) == 0) aoti_torch_delete_tensor_object(value<AtenTensorHandle>(one));
      }
      torch_delete_list(list);
    }
    if (letters[i] != 'o' && letters[i] != 'd') continue;
    auto const inner = value<StableIValue*>(stack[i]);
    if (inner && letters[i] == 'o') aoti_torch_delete_tensor_object(value<AtenTensorHandle>(*inner));
    delete inner;
  }
}

// shapes

bool same_sizes(int64_t const* left, int64_t const* right, int64_t count) {
  return std::memcmp(left, right, size_t(count) * sizeof(int64_t)) == 0;
}

bool contiguous(Tensor const& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim; i-- > 0; expected *= t.sizes[i]) {
    if (t.sizes[i] != 1 && t.strides[i] != expected) return false;
  }
  return true;
}

bool is_vector(Tensor const& t, int64_t size) { return t.dim == 1 && t.sizes[0] == size && contiguous(t); }

// (..., C) as (rows, C): elements of a row side by side, rows at one stride
struct Rows {
  int64_t count = 1, stride = 0;

  bool read(Tensor const& t) {
    if (t.dim < 1 || t.dim > kMaxDim || (t.last() != 1 && t.strides[t.dim - 1] != 1)) return false;
    for (int64_t i = t.dim - 1; i-- > 0;) {
      if (t.sizes[i] == 1) continue;
      if (count == 1) stride = t.strides[i];
      else if (t.strides[i] != stride * count) return false;
      count *= t.sizes[i];
    }
    if (count == 1) stride = t.last();
    return count > 0 && count <= INT_MAX && stride >= t.last();
  }
};

// (C,) once, or (B, C) for the samples of (B, ..., C)
bool per_sample(Tensor const& vector, Tensor const& of, int64_t columns, int64_t& samples) {
  bool const batched = vector.dim == 2;
  if (vector.dim < 1 || vector.dim > 2 || vector.last() != columns) return false;
  if (batched && (of.dim < 2 || vector.sizes[0] != of.sizes[0])) return false;
  samples = batched ? vector.sizes[0] : 1;
  return true;
}

// results

struct Result {
  AtenTensorHandle handle = nullptr;
  char* data = nullptr;

  // leading sizes of `like`, then `last` unless it is 0
  bool allocate(Tensor const& like, int64_t last, int dtype) {
    int64_t sizes[kMaxDim], strides[kMaxDim], dim = like.dim - 1, stride = 1;
    std::memcpy(sizes, like.sizes, size_t(dim) * sizeof(int64_t));
    if (last) sizes[dim++] = last;
    for (int64_t i = dim; i-- > 0; stride *= sizes[i]) strides[i] = stride;
    void* memory = nullptr;
    if (aoti_torch_empty_strided(dim, sizes, strides, types().torchs(dtype), like.device_type, like.device, &handle) ||
        aoti_torch_get_data_ptr(handle, &memory))
      return false;
    data = static_cast<char*>(memory);
    return true;
  }
  template <size_t dim>
  bool allocate(Tensor const& like, int64_t const (&sizes)[dim], int dtype) {
    int64_t strides[dim], stride = 1;
    for (size_t i = dim; i-- > 0; stride *= sizes[i]) strides[i] = stride;
    void* memory = nullptr;
    if (aoti_torch_empty_strided(dim, sizes, strides, types().torchs(dtype), like.device_type, like.device, &handle) ||
        aoti_torch_get_data_ptr(handle, &memory))
      return false;
    data = static_cast<char*>(memory);
    return true;
  }
  void drop() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
};

// the device of the operands, current while a kernel is launched
struct OnDevice {
  DeviceGuardHandle guard = nullptr;
  void* stream = nullptr;
  bool ready = true;

  explicit OnDevice(int32_t device) {
    if (!stream_of) return;
    int32_t current = -1;
    ready = aoti_torch_get_current_device_index(&current) == 0 &&
            (current == device || aoti_torch_create_device_guard(device, &guard) == 0) &&
            stream_of(device, &stream) == 0;
  }
  ~OnDevice() {
    if (guard) aoti_torch_delete_device_guard(guard);
  }
};

// the ops: `read` fills in the key and says whether the operands can be handed over as they lie, `launch` runs the kernel

enum Prologue : int { kNone, kGelu, kModulate, kSiluMul, kCatGelu };

template <Prologue prologue>
struct Quantize {
  static constexpr bool two_inputs = prologue == kSiluMul || prologue == kCatGelu, modulated = prologue == kModulate;
  static constexpr char const* letters = two_inputs ? "ttvvvsv" : modulated ? "tttvvvvsv" : "tvvvsv";
  Key key{};
  int launches = 1;
  Tensor x, y, scale, shift;
  Rows rows, more;
  double eps = 0, clip = 0;
  int64_t k = 0, seam = 0, group = 0, bits = 0, samples = 1, vector_stride = 0;
  bool packed = false;

  static bool loadable(Tensor const& t, Rows& rows) {  // four values at a time
    return t.is_float() && rows.read(t) && t.aligned(4 * t.element_size()) && rows.stride % 4 == 0;
  }

  bool read_second() {
    int64_t const same = prologue == kCatGelu ? x.dim - 1 : x.dim;
    seam = prologue == kCatGelu ? x.last() : 0;
    return y.dtype == x.dtype && y.dim == x.dim && same_sizes(x.sizes, y.sizes, same) && y.on_the_device_of(x) &&
           loadable(y, more);
  }

  bool read_vectors() {
    if (!scale.is_float() || !shift.is_float() || !per_sample(scale, x, k, samples)) return false;
    if (shift.dim != scale.dim || !same_sizes(scale.sizes, shift.sizes, scale.dim)) return false;
    vector_stride = scale.dim == 2 ? scale.strides[0] : k;
    if (scale.dim == 2 && shift.strides[0] != vector_stride) return false;
    return scale.strides[scale.dim - 1] == 1 && shift.strides[shift.dim - 1] == 1 && vector_stride % 4 == 0 &&
           scale.aligned(4 * scale.element_size()) && shift.aligned(4 * shift.element_size()) &&
           scale.on_the_device_of(x) && shift.on_the_device_of(x);
  }

  bool read(StableIValue const* stack) {
    StableIValue const* next = stack;
    x = tensor(*next++);
    if (two_inputs) y = tensor(*next++);
    if (modulated) scale = tensor(*next++), shift = tensor(*next++), eps = value<double>(*next++);
    group = value<int64_t>(*next++), bits = value<int64_t>(*next++), packed = value<bool>(*next++);
    int64_t const rule = digest(*next++);
    clip = value<double>(*next++);
    if (!loadable(x, rows) || !(clip > 0 && clip <= 1) || (modulated && !(eps > 0))) return false;
    k = x.last();
    if ((two_inputs && !read_second()) || (modulated && !read_vectors())) return false;
    if (prologue == kCatGelu) k += y.last();
    key = {16 + prologue, x.device, x.dtype, scale.dtype, shift.dtype, rows.count, k, seam, group, bits, packed, rule,
           samples};
    return k <= INT_MAX;
  }

  bool launch(Kernel const& kernel, StableIValue* stack) {
    Result codes, row_scale;
    OnDevice const on(x.device);
    bool const done =
        kernel.kind == kQuantizer && on.ready && codes.allocate(x, packed ? k / 2 : k, packed ? kUInt8 : kInt8) &&
        row_scale.allocate(x, 0, kFloat32) &&
        reinterpret_cast<Quantizer>(kernel.function)(
            x.data, rows.stride, y.data, more.stride, int(seam), scale.data, modulated ? scale.dtype : 0, shift.data,
            modulated ? shift.dtype : 0, samples > 1 ? vector_stride : 0, int(rows.count / samples), float(eps),
            codes.data, row_scale.data, int(rows.count), int(k), int(group), int(bits), packed, prologue, float(clip),
            on.stream) == 0;
    if (!done) return codes.drop(), row_scale.drop(), false;
    release(stack, letters);
    stack[0] = boxed(codes.handle), stack[1] = boxed(row_scale.handle);
    return true;
  }
};

enum Form : int { kReturned, kWritten, kGated };

template <Form form>
struct Product {
  static constexpr char const* letters = form == kWritten ? "tttooos" : form == kGated ? "ttoootts" : "ttooods";
  Key key{};
  int launches = 1;
  Tensor a, b, a_scale, b_scale, bias, gate, residual, out;
  Rows out_rows, residual_rows;
  int64_t m = 0, n = 0, k = 0;
  int out_dtype = kOther;

  bool like_the_result(Tensor const& t, Rows& rows) const {
    return t.is_float() && t.dim == a.dim && same_sizes(t.sizes, a.sizes, a.dim - 1) && t.last() == n &&
           t.on_the_device_of(a) && rows.read(t);
  }

  bool read_scales() const {
    bool const scaled = a.is_float() ? !a_scale.there()
                                     : a_scale.dtype == kFloat32 && a_scale.dim == a.dim - 1 &&
                                           same_sizes(a_scale.sizes, a.sizes, a_scale.dim) && contiguous(a_scale);
    return scaled && b_scale.dtype == kFloat32 && is_vector(b_scale, n) &&
           (!bias.there() || (bias.is_float() && is_vector(bias, n))) && a_scale.on_the_device_of(a) &&
           b_scale.on_the_device_of(a) && bias.on_the_device_of(a);
  }

  bool read_output(StableIValue const* next) {
    if (form == kWritten) return out_dtype = out.dtype, like_the_result(out, out_rows);
    if (form == kGated) {
      int64_t samples = 1;
      out_dtype = residual.dtype;
      bool const fits = like_the_result(residual, residual_rows) && gate.is_float() && contiguous(gate) &&
                        gate.on_the_device_of(a) && per_sample(gate, residual, n, samples);
      return launches = int(samples), fits;
    }
    auto const asked = value<StableIValue*>(*next);
    out_dtype = asked ? types().ours(value<int32_t>(*asked)) : a.is_float() ? a.dtype : int(kBFloat16);
    return out_dtype <= kBFloat16;
  }

  bool read(StableIValue const* stack) {
    StableIValue const* next = stack;
    if (form == kWritten) out = tensor(*next++);
    a = tensor(*next++), b = tensor(*next++), a_scale = optional_tensor(*next++), b_scale = optional_tensor(*next++);
    bias = optional_tensor(*next++);
    if (form == kGated) gate = tensor(*next++), residual = tensor(*next++);
    if (!(a.is_float() || a.is_codes()) || !b.is_codes() || a.dim < 1 || a.dim > kMaxDim || b.dim != 2) return false;
    n = b.sizes[0], k = b.columns(), m = 1;
    for (int64_t i = 0; i + 1 < a.dim; ++i) m *= a.sizes[i];
    if (a.columns() != k || m < 1 || n < 1 || m > INT_MAX || n > INT_MAX || k > INT_MAX) return false;
    if (!contiguous(a) || !contiguous(b) || !a.aligned(kAlignment) || !b.aligned(kAlignment)) return false;
    if (!b.on_the_device_of(a) || !read_scales() || !read_output(next)) return false;
    int64_t const layout = digest(form == kReturned ? next[1] : *next);
    key = {residual.there(), a.device, a.dtype, b.dtype, m / launches, n, k, bias.dtype, gate.dtype, out_dtype, layout,
           launches};
    return true;
  }

  bool addressable(char const* data, int64_t stride, int64_t size) const {
    return reinterpret_cast<uintptr_t>(data) % kAlignment == 0 && stride * size % kAlignment == 0;
  }

  // one launch: the rows of one sample
  bool run(Kernel const& kernel, char* target, int64_t stride, int sample, void* at) const {
    int64_t const rows = m / launches, first = rows * sample, size = out_dtype == kFloat32 ? 4 : 2;
    int64_t const residual_stride = residual.there() ? residual_rows.stride : 0;
    char const* const x = a.data + first * a.last() * a.element_size();
    char const* const scale = a_scale.there() ? a_scale.data + first * 4 : nullptr;
    char const* const gates = gate.there() ? gate.data + sample * n * gate.element_size() : nullptr;
    char const* const rest = residual.there() ? residual.data + first * residual_stride * size : nullptr;
    int const bias_dtype = bias.there() ? bias.dtype : 0, gate_dtype = gate.there() ? gate.dtype : 0;
    target += first * stride * size;
    if (kernel.kind == kGemv)
      return reinterpret_cast<Gemv>(kernel.function)(
                 b.data, kernel.detail, x, a.dtype, scale, b_scale.data, bias.data, bias_dtype, gates, gate_dtype, rest,
                 residual_stride, target, out_dtype, stride, int(rows), int(n), int(k), at) == 0;
    return kernel.kind == kGemm && addressable(target, stride, size) && addressable(rest, residual_stride, size) &&
           reinterpret_cast<Gemm>(kernel.function)(
               b.data, x, scale, b_scale.data, bias.data, bias_dtype, gates, gate_dtype, rest, residual_stride, target,
               stride, int(rows), int(n), int(k), a.device, kernel.detail, at) == 0;
  }

  bool launch(Kernel const& kernel, StableIValue* stack) {
    Result made;
    OnDevice const on(a.device);
    bool done = on.ready && (form == kWritten || made.allocate(a, n, out_dtype));
    char* const target = form == kWritten ? out.data : made.data;
    int64_t const stride = form == kWritten ? out_rows.stride : n;
    for (int sample = 0; done && sample < launches; ++sample) done = run(kernel, target, stride, sample, on.stream);
    if (!done) return made.drop(), false;
    release(stack, letters);
    if (form != kWritten) stack[0] = boxed(made.handle);
    return true;
  }
};

// norm_rope, or with a text stream before it norm_rope_joint; both in e4m3
template <bool joint, bool fp8>
struct NormRope {
  static constexpr char const* letters = joint ? "ttttttttv" : "tttttv";
  static constexpr int parts = joint || fp8 ? 3 : 2;
  Key key{};
  int launches = 1;
  Tensor text, image, text_q_weight, text_k_weight, q_weight, k_weight, cos, sin;
  double eps = 0;
  int64_t d = 0, heads = 0, text_tokens = 0, tokens = 0;

  // one 16-byte load a lane
  bool loadable(Tensor const& x) const {
    bool fits = x.is_float() && x.dim == 3 && x.dtype == image.dtype && x.sizes[0] == image.sizes[0] &&
                x.last() == parts * heads * d && x.strides[2] == 1 && x.aligned(kAlignment) && x.on_the_device_of(image);
    for (int i = 0; i < 2; ++i)
      fits = fits && x.sizes[i] > 0 && (x.sizes[i] == 1 || x.strides[i] * x.element_size() % kAlignment == 0);
    return fits;
  }
  bool is_weight(Tensor const& t) const {
    return t.dtype == q_weight.dtype && is_vector(t, d) && t.aligned(kAlignment) && t.on_the_device_of(image);
  }
  bool is_table(Tensor const& t) const {
    return t.dtype == kFloat32 && t.dim == 2 && t.sizes[0] == tokens && t.sizes[1] == d && contiguous(t) &&
           t.aligned(kAlignment) && t.on_the_device_of(image);
  }

  bool read(StableIValue const* stack) {
    StableIValue const* next = stack;
    if (joint) text = tensor(*next++);
    image = tensor(*next++);
    if (joint) text_q_weight = tensor(*next++), text_k_weight = tensor(*next++);
    q_weight = tensor(*next++), k_weight = tensor(*next++), cos = tensor(*next++), sin = tensor(*next++);
    eps = value<double>(*next);
    if (!q_weight.is_float() || q_weight.dim != 1 || image.dim != 3 || !(eps > 0)) return false;
    d = q_weight.sizes[0];
    if (d < 16 || image.last() % (parts * d)) return false;
    heads = image.last() / (parts * d), text_tokens = joint ? text.sizes[1] : 0;
    if (joint && (text.dim != 3 || !loadable(text) || !is_weight(text_q_weight) || !is_weight(text_k_weight))) return false;
    tokens = text_tokens + image.sizes[1];
    if (!loadable(image) || !is_weight(q_weight) || !is_weight(k_weight) || !is_table(cos) || !is_table(sin)) return false;
    key = {32 + joint + 2 * fp8, image.device, image.dtype, q_weight.dtype, image.sizes[0], text_tokens, tokens, heads, d};
    return image.sizes[0] * tokens <= INT_MAX;
  }

  // what stands before and after the results in the arguments
  template <class Function, class... Results>
  bool call(void* function, OnDevice const& on, Results... results) const {
    return reinterpret_cast<Function>(function)(
               text.data, joint ? text.strides[0] : 0, joint ? text.strides[1] : 0, image.data, image.strides[0],
               image.strides[1], image.dtype, text_q_weight.data, text_k_weight.data, q_weight.data, k_weight.data,
               q_weight.dtype, cos.data, sin.data, results..., int(image.sizes[0]), int(text_tokens),
               int(image.sizes[1]), int(heads), int(d), float(eps), on.stream) == 0;
  }

  bool launch(Kernel const& kernel, StableIValue* stack) {
    constexpr int kScale = parts, kMost = parts + 1;  // in e4m3: v's scale, and room for the largest of each token
    Result made[fp8 ? parts + 2 : parts];
    OnDevice const on(image.device);
    int64_t const sizes[4] = {image.sizes[0], tokens, heads, d};
    bool done = kernel.kind == (fp8 ? kNormRopeFp8 : kNormRope) && on.ready;
    for (int i = 0; i < parts; ++i) done = done && made[i].allocate(image, sizes, fp8 ? kFp8 : image.dtype);
    if constexpr (fp8) {
      int64_t const samples[1] = {sizes[0]}, rows[2] = {sizes[0], tokens};
      done = done && made[kScale].allocate(image, samples, kFloat32) && made[kMost].allocate(image, rows, kFloat32);
      done = done && call<AttendedFp8>(kernel.function, on, static_cast<void*>(made[0].data),
                                       static_cast<void*>(made[1].data), static_cast<void*>(made[2].data),
                                       static_cast<void*>(made[kScale].data), static_cast<void*>(made[kMost].data));
    } else {
      void* const third = joint ? made[parts - 1].data : nullptr;
      done = done && call<Attended>(kernel.function, on, static_cast<void*>(made[0].data),
                                    static_cast<void*>(made[1].data), third);
    }
    if (!done) {
      for (Result& one : made) one.drop();
      return false;
    }
    release(stack, letters);
    if constexpr (fp8) made[kMost].drop();
    for (int i = 0; i < parts + fp8; ++i) stack[i] = boxed(made[i].handle);
    return true;
  }
};

// up to kMostTerms matrices of one dtype, all with r rows or all with r columns
struct Terms {
  Tensor matrix[kMostTerms];
  int64_t count = 0, r = 0;

  bool read(StableIValue from, Tensor const& like, int axis, int64_t alignment) {
    count = listed<Tensor>(from, matrix, tensor);
    if (count < 1 || count > kMostTerms || matrix[0].dim != 2) return false;
    r = matrix[0].sizes[axis];
    for (int64_t i = 0; i < count; ++i) {
      Tensor const& one = matrix[i];
      if (one.dtype != like.dtype || one.dim != 2 || one.sizes[axis] != r || !contiguous(one) ||
          !one.aligned(alignment) || !one.on_the_device_of(like))
        return false;
    }
    return r > 0;
  }
};

bool is_half(Tensor const& t) { return t.dtype == kFloat16 || t.dtype == kBFloat16; }

// (B, C) or (C,): columns side by side, eight at a time
struct Vectors {
  int64_t samples = 1, stride = 0;

  bool read(Tensor const& vector, Tensor const& of, int64_t columns) {
    if (!vector.is_float() || !per_sample(vector, of, columns, samples) || !vector.on_the_device_of(of)) return false;
    int64_t const apart = vector.dim == 2 ? vector.strides[0] : 0;
    stride = samples > 1 ? apart : 0;
    return vector.strides[vector.dim - 1] == 1 && vector.aligned(8 * vector.element_size()) && apart % 8 == 0;
  }
};

struct LowRankDown {
  static constexpr char const* letters = "tlooovv";
  Key key{};
  int launches = 1;
  Tensor x, y, scale, shift;
  Terms down;
  Rows rows, more;
  Vectors gain, offset;
  double eps = 0;
  int64_t k = 0, seam = 0;
  int prologue = kNone;

  static bool loadable(Tensor const& t, Rows& rows) {
    return is_half(t) && rows.read(t) && t.aligned(kAlignment) && rows.stride % 8 == 0 && t.last() % 8 == 0;
  }

  bool read(StableIValue const* stack) {
    x = tensor(stack[0]), y = optional_tensor(stack[2]), scale = optional_tensor(stack[3]);
    shift = optional_tensor(stack[4]), eps = value<double>(stack[5]);
    bool const gelu = value<bool>(stack[6]), modulated = scale.there() || shift.there();
    if (!loadable(x, rows) || gelu + y.there() + modulated > 1) return false;
    prologue = gelu ? kGelu : y.there() ? kCatGelu : modulated ? kModulate : kNone;
    seam = x.last(), k = seam;
    if (y.there()) {
      if (y.dtype != x.dtype || y.dim != x.dim || !same_sizes(x.sizes, y.sizes, x.dim - 1)) return false;
      if (!y.on_the_device_of(x) || !loadable(y, more)) return false;
      k += y.last();
    }
    if (modulated) {
      if (!(eps > 0) || !scale.there() || !shift.there() || shift.dim != scale.dim) return false;
      if (!gain.read(scale, x, k) || !offset.read(shift, x, k) || gain.stride != offset.stride) return false;
    }
    if (k > INT_MAX || !down.read(stack[1], x, 0, kAlignment)) return false;
    for (int64_t i = 0; i < down.count; ++i) {
      if (down.matrix[i].sizes[1] != k) return false;
    }
    key = {64, x.device, x.dtype, scale.dtype, shift.dtype, prologue, down.count, down.r};
    return down.count * down.r <= INT_MAX;
  }

  bool launch(Kernel const& kernel, StableIValue* stack) {
    Result low;
    OnDevice const on(x.device);
    Tensor const* const d = down.matrix;
    bool const done =
        kernel.kind == kLowRankDown && on.ready && low.allocate(x, down.count * down.r, x.dtype) &&
        reinterpret_cast<Downward>(kernel.function)(
            x.data, rows.stride, y.data, more.stride, int(seam), scale.data, scale.there() ? scale.dtype : 0,
            shift.data, shift.there() ? shift.dtype : 0, gain.stride, int(rows.count / gain.samples), float(eps),
            d[0].data, d[1].data, d[2].data, d[3].data, int(down.count), int(down.r), low.data, int(rows.count), int(k),
            prologue, x.dtype, on.stream) == 0;
    if (!done) return low.drop(), false;
    release(stack, letters);
    stack[0] = boxed(low.handle);
    return true;
  }
};

struct LowRankUp {
  static constexpr char const* letters = "ttlnno";
  Key key{};
  int launches = 1;
  Tensor out, low, gate;
  Terms up;
  Rows out_rows, low_rows;
  Vectors gates;
  int64_t columns[kMostTerms] = {};
  double alpha[kMostTerms] = {};

  // the terms lie beside one another, in the order of their columns
  bool read_columns(StableIValue const* stack) {
    if (listed<int64_t>(stack[3], columns, value<int64_t>) != up.count) return false;
    if (listed<double>(stack[4], alpha, value<double>) != up.count) return false;
    int64_t end = 0;
    for (int64_t i = 0; i < up.count; ++i) {
      int64_t const n = up.matrix[i].sizes[0];
      if (n < 1 || n % 8 || columns[i] % 8 || columns[i] < end || n > out.last() - columns[i]) return false;
      end = columns[i] + n;
    }
    return true;
  }

  bool read(StableIValue const* stack) {
    out = tensor(stack[0]), low = tensor(stack[1]), gate = optional_tensor(stack[5]);
    if (!is_half(out) || low.dtype != out.dtype || low.dim != out.dim || !low.on_the_device_of(out)) return false;
    if (!out_rows.read(out) || !out.aligned(kAlignment) || out_rows.stride % 8 || out.last() > INT_MAX) return false;
    if (!same_sizes(out.sizes, low.sizes, out.dim - 1) || !low_rows.read(low) || !low.aligned(8)) return false;
    if (low_rows.stride % 4 || !up.read(stack[2], out, 1, 8) || up.r % 4 || up.r > 64) return false;
    if (low.last() != up.count * up.r || !read_columns(stack)) return false;
    if (gate.there() && !gates.read(gate, out, out.last())) return false;
    key = {65, out.device, out.dtype, gate.dtype, up.count, up.r};
    return true;
  }

  bool launch(Kernel const& kernel, StableIValue* stack) {
    OnDevice const on(out.device);
    Tensor const* const u = up.matrix;
    int n[kMostTerms], column[kMostTerms];
    for (int i = 0; i < kMostTerms; ++i) {
      bool const there = i < up.count;
      n[i] = there ? int(u[i].sizes[0]) : 0, column[i] = there ? int(columns[i]) : 0;
    }
    bool const done =
        kernel.kind == kLowRankUp && on.ready &&
        reinterpret_cast<Upward>(kernel.function)(
            out.data, out_rows.stride, low.data, low_rows.stride, u[0].data, u[1].data, u[2].data, u[3].data, n[0],
            n[1], n[2], n[3], column[0], column[1], column[2], column[3], float(alpha[0]), float(alpha[1]),
            float(alpha[2]), float(alpha[3]), int(up.count), int(up.r), gate.data, gate.there() ? gate.dtype : 0,
            gates.stride, int(out_rows.count / gates.samples), int(out_rows.count), out.dtype, on.stream) == 0;
    if (!done) return false;
    release(stack, letters);
    return true;
  }
};

// a call: here if it can be, else in Python

// takes the arguments from the stack and leaves the results there
void ask_python(char const* op, char const* letters, StableIValue* stack, uint64_t outputs, Lesson& mine) {
  // a str goes as the address of its text: of one that is handed over, torch 2.10 to 2.13 lose a copy
  StringHandle text = nullptr;
  for (int i = 0; letters[i]; ++i) {
    char const* characters = nullptr;
    if (letters[i] != 's') continue;
    text = value<StringHandle>(stack[i]);
    torch_string_c_str(text, &characters);
    stack[i] = boxed(reinterpret_cast<int64_t>(characters));
  }
  Lesson* const outer = lesson;  // Python may call an op of ours in turn
  lesson = &mine;
  AOTITorchError const status = torch_call_dispatcher(op, "", stack, TORCH_TARGET_VERSION);
  lesson = outer;
  torch_delete_string(text);  // every op has one
  if (!mine.failed && status == 0) return;
  for (uint64_t i = 0; status == 0 && i < outputs; ++i)
    aoti_torch_delete_tensor_object(value<AtenTensorHandle>(stack[i]));
  // the type of an exception does not pass the C functions: `original` in binding.py puts Python's own in this one's place
  throw std::runtime_error(mine.failed ? mine.message : std::string(op) + " cannot be called");
}

template <class Call, char const* op>
void serve(StableIValue* stack, uint64_t, uint64_t outputs) {
  Call call;
  Kernel kernel;
  bool const readable = __atomic_load_n(named_backends, __ATOMIC_RELAXED) == 0 && call.read(stack);
  if (readable && find(call.key, kernel) && call.launch(kernel, stack)) return;
  // a kernel that answers with an error code is run by Python once more, for the sentence
  Lesson mine;
  mine.launches = call.launches;
  if (readable) mine.key = &call.key;
  ask_python(op, Call::letters, stack, outputs, mine);
}

template <class Call, char const* op>
bool add(TorchLibraryHandle library) {
  char const* const name = std::strrchr(op, ':') + 1;
  return torch_library_impl(library, name, serve<Call, op>, TORCH_TARGET_VERSION) == 0;
}

constexpr char kRotateQuantize[] = "convrot_python::rotate_quantize";
constexpr char kRotateQuantizeGelu[] = "convrot_python::rotate_quantize_gelu";
constexpr char kRotateQuantizeModulate[] = "convrot_python::rotate_quantize_modulate";
constexpr char kRotateQuantizeSiluMul[] = "convrot_python::rotate_quantize_silu_mul";
constexpr char kRotateQuantizeCatGelu[] = "convrot_python::rotate_quantize_cat_gelu";
constexpr char kNormRopeAlone[] = "convrot_python::norm_rope";
constexpr char kNormRopeJoint[] = "convrot_python::norm_rope_joint";
constexpr char kNormRopeInFp8[] = "convrot_python::norm_rope_fp8";
constexpr char kNormRopeJointInFp8[] = "convrot_python::norm_rope_joint_fp8";
constexpr char kLowRankDownOp[] = "convrot_python::low_rank_down";
constexpr char kLowRankUpOp[] = "convrot_python::low_rank_up";
constexpr char kScaledMm[] = "convrot_python::scaled_mm";
constexpr char kScaledMmOut[] = "convrot_python::scaled_mm_out";
constexpr char kScaledMmGateResidual[] = "convrot_python::scaled_mm_gate_residual";

}  // namespace

// what binding.py calls

// once in a process; 0, or 1 where torch refuses
CONVROT_EXPORT int convrot_register(void* stream, int64_t const* named) {
  stream_of = reinterpret_cast<StreamOf>(stream), named_backends = named;
  TorchLibraryHandle library = nullptr;  // deleting it would take the ops back
  bool const done =
      aoti_torch_library_init_impl("convrot", CONVROT_TEXT(CONVROT_KEY), __FILE__, __LINE__, &library) == 0 &&
      add<Quantize<kNone>, kRotateQuantize>(library) && add<Quantize<kGelu>, kRotateQuantizeGelu>(library) &&
      add<Quantize<kModulate>, kRotateQuantizeModulate>(library) &&
      add<Quantize<kSiluMul>, kRotateQuantizeSiluMul>(library) &&
      add<Quantize<kCatGelu>, kRotateQuantizeCatGelu>(library) && add<NormRope<false, false>, kNormRopeAlone>(library) &&
      add<NormRope<true, false>, kNormRopeJoint>(library) && add<NormRope<false, true>, kNormRopeInFp8>(library) &&
      add<NormRope<true, true>, kNormRopeJointInFp8>(library) && add<LowRankDown, kLowRankDownOp>(library) &&
      add<LowRankUp, kLowRankUpOp>(library) && add<Product<kReturned>, kScaledMm>(library) &&
      add<Product<kWritten>, kScaledMmOut>(library) && add<Product<kGated>, kScaledMmGateResidual>(library);
  return done ? 0 : 1;
}

// of the call that Python is serving in this thread: the kernel that it launched, and how often
CONVROT_EXPORT void convrot_learn(void* function, int kind, int detail, int launches) {
  if (!lesson || !lesson->key || lesson->launches != launches) return;
  std::unique_lock lock(kernels_lock);
  if (kernels.size() >= kMaxEntries) kernels.clear();
  kernels[*lesson->key] = Kernel{function, kind, detail};
}

// of the call that Python is serving in this thread: it raised
CONVROT_EXPORT void convrot_fail(char const* message) {
  if (lesson) lesson->failed = true, lesson->message = message;
}

CONVROT_EXPORT void convrot_forget() {
  std::unique_lock lock(kernels_lock);
  kernels.clear();
}
