// cuda_select_topk.cpp - select_topk on CUDA for Python: one object a call, which holds the views.
//
// Python owns every buffer and reads the reports; the object says how large they are and launches.
// A scope is one selection: all tensors together (scope 0), or each tensor by itself.
#include <pybind11/stl.h>

#include "bind.h"
#include "piece_ops/ops/select_topk.h"
#include "views.h"

namespace py = pybind11;

namespace piece_ops::binding {

namespace {

class SelectTopkCall {
 public:
  SelectTopkCall(const Ints& first, const Ints& sizes, const Ints& first_dtypes, const Ints& second,
                 const Ints& second_dtypes, const Ints& exclude, const Ints& exclude_sizes,
                 const Ints& maxima, Ints ks, bool by_tensor, int score, float constant,
                 uint64_t seed, bool nan_is_lowest, int algorithm)
      : first_(make_views<ConstView>(first, sizes, first_dtypes)),
        second_(second.empty() ? std::vector<ConstView>{}
                               : make_views<ConstView>(second, sizes, second_dtypes)),
        exclude_(make_index_views(exclude, exclude_sizes)),
        ks_(std::move(ks)),
        by_tensor_(by_tensor) {
    for (const float* address : make_pointers(maxima)) maxima_.push_back(address);
    const size_t count = first_.size();
    PIECE_OPS_CHECK(count > 0, "piece_ops._C: select_topk of no tensors");
    PIECE_OPS_CHECK(score >= 0 && score < kScoreCount, "piece_ops._C: unknown score ", score);
    PIECE_OPS_CHECK(algorithm >= 0 && algorithm < kTopkAlgorithmCount,
                    "piece_ops._C: unknown algorithm ", algorithm);
    PIECE_OPS_CHECK(ks_.size() == (by_tensor ? count : 1), "piece_ops._C: wrong number of ks");
    PIECE_OPS_CHECK(exclude_.empty() || exclude_.size() == count,
                    "piece_ops._C: wrong number of excluded lists");
    PIECE_OPS_CHECK(maxima_.empty() || (maxima_.size() == count && !by_tensor),
                    "piece_ops._C: maxima are for a selection over all tensors, one list each");
    args_.count = static_cast<int64_t>(count);
    args_.first = first_.data();
    args_.second = second_.empty() ? nullptr : second_.data();
    args_.exclude = exclude_.empty() ? nullptr : exclude_.data();
    args_.score = static_cast<Score>(score);
    PIECE_OPS_CHECK(args_.second || !score_needs_second(args_.score),
                    "piece_ops._C: the score needs a second statistic");
    args_.constant = constant;
    args_.seed = seed;
    args_.nan_is_lowest = nan_is_lowest;
    args_.algorithm = static_cast<TopkAlgorithm>(algorithm);
  }

  Table table() const {
    return by_tensor_ ? cuda::make_table_by_tensor(args_, ks_.data())
                      : cuda::make_table(args_, maxima());
  }
  Table exclude_table() const {
    PIECE_OPS_CHECK(args_.exclude != nullptr, "piece_ops._C: nothing is excluded");
    return cuda::make_exclude_table(args_);
  }

  // The scopes that launch() is for; small_launch() does all others at once, but for k = 0
  // (global).
  Ints large_scopes() const {
    Ints scopes;
    for (size_t s = 0; s < ks_.size(); ++s) {
      if (ks_[s] > 0 && (!by_tensor_ || first_[s].n > cuda::kSmallTopk)) {
        scopes.push_back(static_cast<int64_t>(s));
      }
    }
    return scopes;
  }

  Ints ways(int64_t scope) const {
    Ints numbers;
    for (const cuda::TopkWay way : cuda::topk_ways(scope_args(scope, 0, 0), maxima())) {
      numbers.push_back(static_cast<int64_t>(way));
    }
    return numbers;
  }
  int64_t scratch_bytes(int64_t scope, int way) const {
    return cuda::scratch_bytes(scope_args(scope, 0, 0), maxima(), checked_way(way));
  }

  // check: the address of cuda_check_indices' report on exclude_table(), or 0.
  void launch(int64_t scope, int way, int64_t table, int64_t check, int64_t scratch,
              int64_t reports, int64_t indices, int64_t counts, int device, uint64_t stream) const {
    const int64_t row = by_tensor_ ? scope * cuda::topk_row_words() : 0;
    cuda::select_topk(cuda_context(device, stream), scope_args(scope, indices, counts), maxima(),
                      checked_way(way), reinterpret_cast<const int64_t*>(table) + row,
                      reinterpret_cast<const int64_t*>(check), reinterpret_cast<void*>(scratch),
                      reinterpret_cast<cuda::TopkReport*>(reports) + scope);
  }
  void small_launch(int64_t table, int64_t check, int64_t reports, int64_t indices, int64_t counts,
                    int device, uint64_t stream) const {
    PIECE_OPS_CHECK(by_tensor_, "piece_ops._C: small selections are those of single tensors");
    SelectTopkArgs args = args_;
    args.indices = reinterpret_cast<int64_t*>(indices);
    args.counts = reinterpret_cast<int64_t*>(counts);
    cuda::select_topk_small(
        cuda_context(device, stream), args, reinterpret_cast<const int64_t*>(table),
        reinterpret_cast<const int64_t*>(check), reinterpret_cast<cuda::TopkReport*>(reports));
  }

 private:
  static cuda::TopkWay checked_way(int way) {
    PIECE_OPS_CHECK(way >= 0 && way < cuda::kTopkWayCount, "piece_ops._C: unknown way ", way);
    return static_cast<cuda::TopkWay>(way);
  }
  const float* const* maxima() const { return maxima_.empty() ? nullptr : maxima_.data(); }

  SelectTopkArgs scope_args(int64_t scope, int64_t indices, int64_t counts) const {
    PIECE_OPS_CHECK(scope >= 0 && scope < static_cast<int64_t>(ks_.size()),
                    "piece_ops._C: unknown scope ", scope);
    SelectTopkArgs args = args_;
    args.k = ks_[static_cast<size_t>(scope)];
    args.indices = reinterpret_cast<int64_t*>(indices);
    args.counts = reinterpret_cast<int64_t*>(counts);
    if (!by_tensor_) return args;
    args.count = 1;
    args.first += scope;
    if (args.second) args.second += scope;
    if (args.exclude) args.exclude += scope;
    args.counts += scope;
    for (int64_t s = 0; s < scope; ++s) args.indices += ks_[static_cast<size_t>(s)];
    return args;
  }

  std::vector<ConstView> first_;
  std::vector<ConstView> second_;
  std::vector<IndexView> exclude_;
  std::vector<const float*> maxima_;
  Ints ks_;
  bool by_tensor_;
  SelectTopkArgs args_{};
};

}  // namespace

void bind_cuda_select_topk(py::module_& m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<SelectTopkCall>(m, "CudaSelectTopk", py::module_local())
      .def(py::init<const Ints&, const Ints&, const Ints&, const Ints&, const Ints&, const Ints&,
                    const Ints&, const Ints&, Ints, bool, int, float, uint64_t, bool, int>())
      .def("table", &SelectTopkCall::table)
      .def("exclude_table", &SelectTopkCall::exclude_table)
      .def("large_scopes", &SelectTopkCall::large_scopes)
      .def("ways", &SelectTopkCall::ways)
      .def("scratch_bytes", &SelectTopkCall::scratch_bytes)
      .def("launch", &SelectTopkCall::launch, Unlocked())
      .def("small_launch", &SelectTopkCall::small_launch, Unlocked());
  m.attr("SMALL_TOPK") = cuda::kSmallTopk;
  m.attr("TOPK_REPORT_WORDS") = sizeof(cuda::TopkReport) / sizeof(int64_t);
}

}  // namespace piece_ops::binding
