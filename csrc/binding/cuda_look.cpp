// cuda_look.cpp - what the CUDA backend checks of lists of tensors, read in one pass.
//
// A Look holds of every tensor its address, elements, dtype, dimensions, device and whether it is
// contiguous: everything that the checks of piece_ops/_schema.py depend on. Lists with an equal Look
// need no second check, and have the same table. Read through the C functions that torch.Tensor
// offers as __dlpack_c_exchange_api__ (DLPack 1.3; torch 2.10 and later), without linking torch:
// some 30 ns a tensor, where checks and keys in Python take 1 to 1.5 us.
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <vector>

#include "bind.h"
#include "piece_ops/ops/device.h"
#include "views.h"

namespace py = pybind11;

namespace piece_ops::binding {

namespace {

// ---- dlpack.h, as far as it is used --------------------------------------------------------------

struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major;
  uint32_t minor;
  void* previous;
  void* allocator;
  void* from_object;
  void* to_object;
  // Borrows: the numbers are the tensor's own. -1: not a tensor in memory, a Python error is set.
  int (*borrow)(void* object, DLTensor* out);
  void* current_stream;
};

constexpr const char* kCapsuleName = "dlpack_exchange_api";

// ---- one tensor ----------------------------------------------------------------------------------

constexpr int64_t kWordsOfTensor = 3;

int64_t elements(const DLTensor& x) {
  int64_t n = 1;
  for (int d = 0; d < x.ndim; ++d) n *= x.shape[d];
  return n;
}

bool is_contiguous(const DLTensor& x, int64_t n) {
  if (n == 0 || x.strides == nullptr) return true;
  int64_t wanted = 1;
  for (int d = x.ndim - 1; d >= 0; --d) {
    if (x.shape[d] != 1 && x.strides[d] != wanted) return false;
    wanted *= x.shape[d];
  }
  return true;
}

void write_words(const DLTensor& x, int64_t* words) {
  const int64_t n = elements(x);
  words[0] = static_cast<int64_t>(reinterpret_cast<intptr_t>(x.data)) +
             static_cast<int64_t>(x.byte_offset);
  words[1] = n;
  // lanes are 1 in every torch tensor; at most 64 dimensions, 128 devices.
  words[2] = static_cast<int64_t>(is_contiguous(x, n)) << 62 | int64_t{x.device_type & 0xff} << 48 |
             int64_t{x.device_id & 0xffff} << 32 | int64_t{x.ndim & 0xff} << 16 |
             int64_t{x.code} << 8 | int64_t{x.bits};
}

// ---- lists ---------------------------------------------------------------------------------------

class Look {
 public:
  Look() = default;
  Look(const Look&) = delete;
  Look& operator=(const Look&) = delete;
  ~Look() {
    for (PyObject* reference : references_) Py_DECREF(reference);
  }

  // Null: something in there is not a dense tensor in memory.
  static std::unique_ptr<Look> at(const py::capsule& capsule, const py::tuple& lists) {
    const auto* api =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), kCapsuleName));
    if (api == nullptr) throw py::error_already_set();
    if (api->major != 1 || api->borrow == nullptr) return nullptr;
    auto look = std::make_unique<Look>();
    uint64_t hash = 0;
    for (const py::handle list : lists) {
      const Items items(list);
      const size_t begin = look->words_.size();
      look->words_.resize(begin + 1 + kWordsOfTensor * items.count);
      look->words_[begin] = static_cast<int64_t>(items.count);
      for (size_t t = 0; t < items.count; ++t) {
        DLTensor x;
        if (api->borrow(items.at[t], &x) != 0) {
          PyErr_Clear();
          return nullptr;
        }
        int64_t* const words = look->words_.data() + begin + 1 + kWordsOfTensor * t;
        write_words(x, words);
        hash = hash * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(words[0]);  // addresses do
      }
    }
    look->hash_ = static_cast<int64_t>(hash >> 2);  // not negative, as Python would have it
    return look;
  }

  int64_t hash() const { return hash_; }
  bool equals(const Look& other) const { return words_ == other.words_; }

  // From now on these tensors are known one by one, as long as they live.
  void remember(const py::tuple& lists) {
    for (PyObject* reference : references_) Py_DECREF(reference);
    references_.clear();
    for (const py::handle list : lists) {
      const Items items(list);
      for (size_t t = 0; t < items.count; ++t) {
        PyObject* reference = PyWeakref_NewRef(items.at[t], nullptr);
        if (reference == nullptr) throw py::error_already_set();
        references_.push_back(reference);
      }
    }
  }
  bool knows(const py::tuple& lists) const {
    size_t r = 0;
    for (const py::handle list : lists) {
      const Items items(list);
      if (references_.size() - r < items.count) return false;
      for (size_t t = 0; t < items.count; ++t) {
        if (!is_of(references_[r++], items.at[t])) return false;
      }
    }
    return r == references_.size();
  }

 private:
  // A list or tuple; what it holds is borrowed.
  struct Items {
    explicit Items(py::handle list)
        : kept(
              py::reinterpret_steal<py::object>(PySequence_Fast(list.ptr(), "a list of tensors"))) {
      if (!kept) throw py::error_already_set();
      count = static_cast<size_t>(PySequence_Fast_GET_SIZE(kept.ptr()));
      at = PySequence_Fast_ITEMS(kept.ptr());
    }
    py::object kept;
    size_t count;
    PyObject** at;
  };

  static bool is_of(PyObject* reference, PyObject* object) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* target = nullptr;
    if (PyWeakref_GetRef(reference, &target) < 0) throw py::error_already_set();
    Py_XDECREF(target);
    return target == object;
#else
    return PyWeakref_GET_OBJECT(reference) == object;
#endif
  }

  std::vector<int64_t> words_;  // of each list: its length, then kWordsOfTensor for each tensor
  int64_t hash_ = 0;
  std::vector<PyObject*> references_;  // weak
};

// A few words of the device's memory, once the stream has come so far.
py::list read_words(int64_t address, int64_t count, int device, uint64_t stream) {
  std::vector<int64_t> words(static_cast<size_t>(count));
  {
    const py::gil_scoped_release unlocked;
    cuda::read_words(cuda_context(device, stream), reinterpret_cast<const int64_t*>(address), count,
                     words.data());
  }
  py::list numbers(words.size());
  for (size_t i = 0; i < words.size(); ++i) {
    PyList_SET_ITEM(numbers.ptr(), static_cast<Py_ssize_t>(i), PyLong_FromLongLong(words[i]));
  }
  return numbers;
}

}  // namespace

void bind_cuda_look(py::module_& m) {
  py::class_<Look>(m, "CudaLook", py::module_local())
      .def("__hash__", &Look::hash)
      .def("__eq__", &Look::equals)
      .def("remember", &Look::remember)
      .def("knows", &Look::knows);
  m.def("cuda_look", &Look::at);
  m.def("cuda_read_words", &read_words);
}

}  // namespace piece_ops::binding
