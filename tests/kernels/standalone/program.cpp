// The kernels without PyTorch and Python: on plain memory, with threads of the standard library.
//
//   kernels CASES RESULTS     run every case on every instruction set of this CPU
//   kernels race|overrun      a fault that the thread or the address sanitizer must report
//
// PyTorch's stable interface is a set of C functions. Those that the kernels use are written here, so
// that the very sources of the extension become a program that any sanitizer sees all of, and that
// can be built for, and emulated on, another processor. Each tensor is a piece of memory of exactly
// its size; threads are created and joined for each loop, and share nothing else. What CASES and
// RESULTS hold: build.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common.h"

using torch::headeronly::ScalarType;

// ---------------------------------------------------------------------------------------------
// Tensors

namespace {

struct Memory {
  explicit Memory(size_t bytes) : start(static_cast<unsigned char*>(std::malloc(bytes))) {
    if (start == nullptr) throw std::bad_alloc();
    std::memset(start, 0xff, bytes);  // NaN: no kernel gets by with leaving it
  }
  ~Memory() { std::free(start); }
  Memory(const Memory&) = delete;
  unsigned char* start;
};

size_t bytes_of(int32_t dtype) {
  switch (static_cast<ScalarType>(dtype)) {
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    default:
      throw std::runtime_error("kernels: no such dtype");
  }
}

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes) n *= size;
  return n;
}

}  // namespace

struct AtenTensorOpaque {
  int32_t dtype = 0;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
  std::shared_ptr<Memory> memory;

  void* data() const {
    return memory->start + static_cast<size_t>(offset) * bytes_of(dtype);
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
};

namespace {

AtenTensorHandle empty(std::vector<int64_t> sizes, int32_t dtype) {
  auto t = std::make_unique<AtenTensorOpaque>();
  t->dtype = dtype;
  t->strides.resize(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    t->strides[d] = stride;
  }
  t->memory = std::make_shared<Memory>(static_cast<size_t>(product(sizes)) * bytes_of(dtype));
  t->sizes = std::move(sizes);
  return t.release();
}

AtenTensorHandle contiguous(const AtenTensorOpaque& from) {
  AtenTensorHandle to = empty(from.sizes, from.dtype);
  const size_t width = bytes_of(from.dtype), rank = from.sizes.size();
  std::vector<int64_t> at(rank, 0);
  auto* out = static_cast<unsigned char*>(to->data());
  for (int64_t i = 0; i < product(from.sizes); ++i, out += width) {
    int64_t offset = 0;
    for (size_t d = 0; d < rank; ++d) offset += at[d] * from.strides[d];
    std::memcpy(out, static_cast<unsigned char*>(from.data()) + offset * int64_t(width), width);
    for (size_t d = rank; d-- > 0 && ++at[d] == from.sizes[d];) at[d] = 0;
  }
  return to;
}

// The library: what was registered
struct Op {
  std::string schema;
  void (*run)(StableIValue*, uint64_t, uint64_t) = nullptr;
};
std::map<std::string, Op>& ops() {
  static std::map<std::string, Op> all;
  return all;
}

constexpr int64_t kThreads = 3;

}  // namespace

struct StableListOpaque {
  std::vector<StableIValue> items;
};

// ---------------------------------------------------------------------------------------------
// PyTorch's C functions. Errors become codes, as in PyTorch; it prints what they were.

#define GIVES(name, ...) AOTITorchError name(__VA_ARGS__)
#define BEGIN try {
#define END                                       \
  return AOTI_TORCH_SUCCESS;                      \
  }                                               \
  catch (const std::exception& error) {           \
    std::fprintf(stderr, "kernels: %s\n", error.what()); \
    return AOTI_TORCH_FAILURE;                    \
  }

extern "C" {

#define DTYPE(name, type) \
  int32_t aoti_torch_dtype_##name() { return static_cast<int32_t>(ScalarType::type); }
DTYPE(uint8, Byte)
DTYPE(uint16, UInt16)
DTYPE(uint32, UInt32)
DTYPE(uint64, UInt64)
DTYPE(int8, Char)
DTYPE(int16, Short)
DTYPE(int32, Int)
DTYPE(int64, Long)
DTYPE(float16, Half)
DTYPE(float32, Float)
DTYPE(float64, Double)
DTYPE(bfloat16, BFloat16)
DTYPE(bool, Bool)
DTYPE(complex32, ComplexHalf)
DTYPE(complex64, ComplexFloat)
DTYPE(complex128, ComplexDouble)
DTYPE(float8_e4m3fn, Float8_e4m3fn)
DTYPE(float8_e4m3fnuz, Float8_e4m3fnuz)
DTYPE(float8_e5m2, Float8_e5m2)
DTYPE(float8_e5m2fnuz, Float8_e5m2fnuz)

#define CODE(name, value) \
  int32_t aoti_torch_##name() { return value; }
CODE(device_type_cpu, 0)
CODE(device_type_cuda, 1)
CODE(device_type_xpu, 12)
CODE(device_type_mps, 13)
CODE(device_type_meta, 14)
CODE(device_type_privateuse1, 20)
CODE(layout_strided, 0)
CODE(layout_sparse_coo, 1)
CODE(layout_sparse_csr, 2)
CODE(layout__mkldnn, 3)
CODE(layout_sparse_csc, 4)
CODE(layout_sparse_bsr, 5)
CODE(layout_sparse_bsc, 6)
CODE(layout_jagged, 7)
CODE(memory_format_contiguous_format, 0)
CODE(memory_format_preserve_format, 1)
CODE(memory_format_channels_last, 2)
CODE(memory_format_channels_last_3d, 3)

uint64_t aoti_torch_abi_version() { return TORCH_ABI_VERSION; }

GIVES(aoti_torch_new_uninitialized_tensor, AtenTensorHandle* ret) {
  BEGIN *ret = new AtenTensorOpaque;
  END
}
GIVES(aoti_torch_new_tensor_handle, AtenTensorHandle from, AtenTensorHandle* ret) {
  BEGIN *ret = new AtenTensorOpaque(*from);
  END
}
GIVES(aoti_torch_delete_tensor_object, AtenTensorHandle t) {
  delete t;
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_is_defined, AtenTensorHandle t, bool* ret) {
  *ret = t->memory != nullptr;
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_get_device_type, AtenTensorHandle, int32_t* ret) {
  *ret = aoti_torch_device_type_cpu();
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_get_dtype, AtenTensorHandle t, int32_t* ret) {
  *ret = t->dtype;
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_get_dim, AtenTensorHandle t, int64_t* ret) {
  *ret = static_cast<int64_t>(t->sizes.size());
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_get_numel, AtenTensorHandle t, int64_t* ret) {
  *ret = product(t->sizes);
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_get_sizes, AtenTensorHandle t, int64_t** ret) {
  *ret = t->sizes.data();
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_get_strides, AtenTensorHandle t, int64_t** ret) {
  *ret = t->strides.data();
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_get_size, AtenTensorHandle t, int64_t d, int64_t* ret) {
  BEGIN *ret = t->sizes.at(static_cast<size_t>(d));
  END
}
GIVES(aoti_torch_get_stride, AtenTensorHandle t, int64_t d, int64_t* ret) {
  BEGIN *ret = t->strides.at(static_cast<size_t>(d));
  END
}
GIVES(aoti_torch_is_contiguous, AtenTensorHandle t, bool* ret) {
  *ret = t->is_contiguous();
  return AOTI_TORCH_SUCCESS;
}
GIVES(torch_get_mutable_data_ptr, AtenTensorHandle t, void** ret) {
  *ret = t->data();
  return AOTI_TORCH_SUCCESS;
}
GIVES(torch_get_const_data_ptr, AtenTensorHandle t, const void** ret) {
  *ret = t->data();
  return AOTI_TORCH_SUCCESS;
}

GIVES(torch_new_list_reserve_size, size_t size, StableListHandle* ret) {
  BEGIN *ret = new StableListOpaque;
  (*ret)->items.reserve(size);
  END
}
GIVES(torch_list_push_back, StableListHandle list, StableIValue item) {
  BEGIN list->items.push_back(item);
  END
}
GIVES(torch_delete_list, StableListHandle list) {
  delete list;
  return AOTI_TORCH_SUCCESS;
}

GIVES(
    aoti_torch_empty_strided, int64_t rank, const int64_t* sizes, const int64_t*, int32_t dtype, int32_t,
    int32_t, AtenTensorHandle* to) {
  BEGIN * to = empty({sizes, sizes + rank}, dtype);
  END
}

// Takes what is on the stack and leaves the result there.
GIVES(torch_call_dispatcher, const char* op, const char*, StableIValue* stack, uint64_t) {
  BEGIN const std::unique_ptr<AtenTensorOpaque> self(reinterpret_cast<AtenTensorHandle>(stack[0]));
  AtenTensorHandle result = nullptr;
  if (std::strcmp(op, "aten::contiguous") == 0) {
    result = self->is_contiguous() ? new AtenTensorOpaque(*self) : contiguous(*self);
  } else if (std::strcmp(op, "aten::zero_") == 0 && self->is_contiguous()) {
    std::memset(self->data(), 0, static_cast<size_t>(product(self->sizes)) * bytes_of(self->dtype));
    result = new AtenTensorOpaque(*self);
  } else {
    throw std::runtime_error(std::string("program.cpp lacks ") + op);
  }
  stack[0] = reinterpret_cast<StableIValue>(result);
  END
}

GIVES(torch_get_num_threads, uint32_t* ret) {
  *ret = kThreads;
  return AOTI_TORCH_SUCCESS;
}

GIVES(
    torch_parallel_for, int64_t begin, int64_t end, int64_t, ParallelFunc function, void* context) {
  BEGIN const int64_t parts = std::clamp<int64_t>(end - begin, 0, kThreads);
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  std::atomic<int64_t> missing{parts};  // one that came first could do the work of all
  for (int64_t part = 0; part < parts; ++part) {
    threads.emplace_back([=, &errors, &missing] {
      missing.fetch_sub(1, std::memory_order_relaxed);
      for (int64_t i = 1; missing.load(std::memory_order_relaxed) > 0; ++i) {
        if (i % 4096 == 0) std::this_thread::yield();
      }
      try {
        const int64_t size = end - begin;
        function(begin + size * part / parts, begin + size * (part + 1) / parts, context);
      } catch (...) {
        errors[static_cast<size_t>(part)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  END
}

GIVES(aoti_torch_library_init_fragment, const char*, const char*, uint32_t, TorchLibraryHandle* ret) {
  *ret = nullptr;
  return AOTI_TORCH_SUCCESS;
}
GIVES(
    aoti_torch_library_init_impl, const char*, const char*, const char*, uint32_t,
    TorchLibraryHandle* ret) {
  *ret = nullptr;
  return AOTI_TORCH_SUCCESS;
}
GIVES(aoti_torch_library_def, TorchLibraryHandle, const char* schema) {
  BEGIN const std::string text = schema;
  ops()[text.substr(0, text.find('('))].schema = text;
  END
}
GIVES(
    torch_library_impl, TorchLibraryHandle, const char* name,
    void (*function)(StableIValue*, uint64_t, uint64_t), uint64_t) {
  BEGIN ops().at(name).run = function;
  END
}
GIVES(aoti_torch_delete_library_object, TorchLibraryHandle) { return AOTI_TORCH_SUCCESS; }

}  // extern "C"

// ---------------------------------------------------------------------------------------------
// Cases in, results out

namespace {

class File {
 public:
  File(const char* path, const char* mode) : file_(std::fopen(path, mode)) {
    if (file_ == nullptr) throw std::runtime_error(std::string("cannot open ") + path);
  }
  ~File() { std::fclose(file_); }
  File(const File&) = delete;
  void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, file_) != bytes) throw std::runtime_error("cases end early");
  }
  int64_t number() {
    int64_t n = 0;
    read(&n, sizeof n);
    return n;
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> all(static_cast<size_t>(number()));
    for (int64_t& n : all) n = number();
    return all;
  }
  std::string text() {
    std::string s(static_cast<size_t>(number()), ' ');
    read(s.data(), s.size());
    return s;
  }
  void write(const void* from, size_t bytes) {
    if (std::fwrite(from, 1, bytes, file_) != bytes) throw std::runtime_error("cannot write");
  }
  void put(int64_t n) { write(&n, sizeof n); }
  void put(const std::string& s) {
    put(static_cast<int64_t>(s.size()));
    write(s.data(), s.size());
  }

 private:
  std::FILE* file_;
};

enum Kind : int64_t { kNone = 0, kTensor = 1, kFloat = 2, kInteger = 3 };

struct Argument {
  Kind kind = kNone;
  int64_t bits = 0;  // of a number
  AtenTensorOpaque tensor;
};

Argument read_argument(File& in) {
  Argument a;
  a.kind = static_cast<Kind>(in.number());
  if (a.kind == kTensor) {
    a.tensor.dtype = static_cast<int32_t>(in.number());
    a.tensor.sizes = in.numbers();
    a.tensor.strides = in.numbers();
    a.tensor.offset = in.number();
    const auto bytes = static_cast<size_t>(in.number());
    a.tensor.memory = std::make_shared<Memory>(bytes);
    in.read(a.tensor.memory->start, bytes);
  } else if (a.kind != kNone) {
    a.bits = in.number();
  }
  return a;
}

// Types of a schema "name(Tensor x, Tensor? bias, int dilation) -> (Tensor, Tensor)"
std::vector<std::string> argument_types(const std::string& schema) {
  std::vector<std::string> types;
  const size_t end = schema.find(") ->");
  for (size_t at = schema.find('(') + 1; at < end;) {
    types.push_back(schema.substr(at, schema.find(' ', at) - at));
    at = std::min(end, schema.find(", ", at)) + 2;
  }
  return types;
}
uint64_t result_count(const std::string& schema) {
  const std::string results = schema.substr(schema.find("->"));
  return 1 + static_cast<uint64_t>(std::count(results.begin(), results.end(), ','));
}

// The results, each of them owned by the caller.
std::vector<std::unique_ptr<AtenTensorOpaque>> run(
    const Op& op, const std::vector<Argument>& arguments) {
  const auto types = argument_types(op.schema);
  if (types.size() != arguments.size()) throw std::runtime_error("not that many arguments");
  const uint64_t results = result_count(op.schema);
  std::vector<StableIValue> stack(std::max<size_t>(types.size(), results));
  for (size_t i = 0; i < types.size(); ++i) {
    const Argument& a = arguments[i];
    StableIValue value = static_cast<StableIValue>(a.bits);
    if (a.kind == kTensor) value = reinterpret_cast<StableIValue>(new AtenTensorOpaque(a.tensor));
    if (types[i].back() == '?') {
      value = a.kind == kNone ? 0 : reinterpret_cast<StableIValue>(new StableIValue(value));
    }
    stack[i] = value;
  }
  op.run(stack.data(), types.size(), results);
  std::vector<std::unique_ptr<AtenTensorOpaque>> found;
  for (uint64_t i = 0; i < results; ++i) {
    found.emplace_back(reinterpret_cast<AtenTensorHandle>(stack[i]));
  }
  return found;
}

void run_all(const char* cases, const char* results) {
  File out(results, "wb");
  out.put(static_cast<int64_t>(mfmjt::best_isa()) + 1);
  for (int level = 0; level <= static_cast<int>(mfmjt::best_isa()); ++level) {
    mfmjt::limit_isa(level);
    File in(cases, "rb");
    for (int64_t left = in.number(); left > 0; --left) {
      const std::string name = in.text();
      std::vector<Argument> arguments(static_cast<size_t>(in.number()));
      for (Argument& a : arguments) a = read_argument(in);
      try {
        const auto found = run(ops().at(name), arguments);
        out.put(static_cast<int64_t>(found.size()));
        for (const auto& t : found) {
          if (!t->is_contiguous()) throw std::runtime_error("a result is not contiguous");
          out.put(int64_t{t->dtype});
          out.put(static_cast<int64_t>(t->sizes.size()));
          for (const int64_t size : t->sizes) out.put(size);
          const size_t bytes = static_cast<size_t>(product(t->sizes)) * bytes_of(t->dtype);
          out.put(static_cast<int64_t>(bytes));
          out.write(t->data(), bytes);
        }
      } catch (const std::exception& error) {
        out.put(int64_t{-1});
        out.put(std::string(error.what()));
      }
    }
  }
}

void race() {
  int64_t sum = 0;
  mfmjt::parallel_for(3000000, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum += i;
  });
  std::printf("%ld\n", static_cast<long>(sum));
}

void overrun() {
  const std::unique_ptr<AtenTensorOpaque> t(empty({5}, aoti_torch_dtype_bfloat16()));
  const volatile mfmjt::Word* words = mfmjt::words(static_cast<mfmjt::bf16*>(t->data()));
  std::printf("%u\n", static_cast<unsigned>(words[2]));  // the last half of it is not there
}

}  // namespace

int main(int count, char** given) {
  const std::string what = count > 1 ? given[1] : "";
  try {
    if (what == "race") {
      race();
    } else if (what == "overrun") {
      overrun();
    } else if (count == 3) {
      run_all(given[1], given[2]);
    } else {
      throw std::runtime_error("usage: kernels CASES RESULTS");
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernels: %s\n", error.what());
    return 2;
  }
  return 0;
}
