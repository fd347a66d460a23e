// module.cpp - piece_ops._C: the ops for Python, over addresses and sizes.
//
// The only folder that knows pybind11. Python checks shapes, dtypes and devices (piece_ops/
// _schema.py) and owns every buffer; here lists of addresses become views, the lock of the
// interpreter is released, and errors become Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../cpu/isa.h"
#include "bind.h"
#include "piece_ops/core/check.h"
#include "piece_ops/ops/accumulate_per_sample_squares.h"
#include "piece_ops/ops/accumulate_squares.h"
#include "piece_ops/ops/add_rounded.h"
#include "piece_ops/ops/gather.h"
#include "piece_ops/ops/sampled_weight_grad.h"
#include "piece_ops/ops/scatter.h"
#include "piece_ops/ops/select_topk.h"
#include "piece_ops/ops/sparse_adamw.h"
#include "piece_ops/ops/total.h"
#include "views.h"

namespace py = pybind11;

namespace {

using namespace piece_ops;
using namespace piece_ops::binding;
Context cpu_context(int threads) {
  Context context;
  context.threads = threads;
  return context;
}

py::tuple accumulate_squares(const Ints& square_sums, const Ints& sums, const Ints& grads,
                             const Ints& sizes, const Ints& dtypes, float weight, int threads) {
  const auto views = make_views<ConstView>(grads, sizes, dtypes);
  const auto square_pointers = make_pointers(square_sums);
  const auto sum_pointers = make_pointers(sums);
  AccumulateSquaresArgs args{};
  args.count = static_cast<int64_t>(views.size());
  args.grads = views.data();
  args.square_sums = square_pointers.empty() ? nullptr : square_pointers.data();
  args.sums = sum_pointers.empty() ? nullptr : sum_pointers.data();
  args.weight = weight;
  NonFinite bad;
  {
    const py::gil_scoped_release unlocked;
    bad = cpu::accumulate_squares(cpu_context(threads), args);
  }
  return py::make_tuple(bad.tensor, bad.count);
}

// A matrix is address, features, stride and dtype; scales and accumulators may be 0. Returns which
// factor is not finite (-1: none), its count, and whether an accumulator is not finite afterwards.
py::tuple accumulate_per_sample_squares(int64_t square_sums, const Ints& grad_output,
                                        const Ints& input, int64_t offsets, int64_t samples,
                                        int64_t sums, int64_t scales, int threads) {
  const auto matrix = [](const Ints& x) {
    PIECE_OPS_CHECK(x.size() == 4 && x[3] >= 0 && x[3] < kDTypeCount,
                    "piece_ops._C: a matrix is address, features, stride and dtype");
    return TokenMatrix{reinterpret_cast<const void*>(x[0]), x[1], x[2], static_cast<DType>(x[3])};
  };
  AccumulatePerSampleSquaresArgs args{};
  args.grad_output = matrix(grad_output);
  args.input = matrix(input);
  args.samples = samples;
  args.offsets = reinterpret_cast<const int64_t*>(offsets);
  args.scales = reinterpret_cast<const float*>(scales);
  args.square_sums = reinterpret_cast<float*>(square_sums);
  args.sums = reinterpret_cast<float*>(sums);
  bool overflowed = false;
  args.overflowed = &overflowed;
  NonFinite bad;
  {
    const py::gil_scoped_release unlocked;
    bad = cpu::accumulate_per_sample_squares(cpu_context(threads), args);
  }
  return py::make_tuple(bad.tensor, bad.count, overflowed);
}

// One k: over all tensors; else one for each, and so many thresholds (float64) and ties_kept
// (int64) are written. Returns tensor and count of a NaN that is not allowed (tensor -1: none).
py::tuple select_topk(const Ints& first, const Ints& sizes, const Ints& first_dtypes,
                      const Ints& second, const Ints& second_dtypes, const Ints& exclude,
                      const Ints& exclude_sizes, const Ints& ks, bool by_tensor, int score,
                      float constant, uint64_t seed, bool nan_is_lowest, int algorithm, int threads,
                      int64_t indices, int64_t counts, int64_t thresholds, int64_t ties_kept) {
  const auto first_views = make_views<ConstView>(first, sizes, first_dtypes);
  const auto second_views = second.empty() ? std::vector<ConstView>{}
                                           : make_views<ConstView>(second, sizes, second_dtypes);
  const auto exclude_views = make_index_views(exclude, exclude_sizes);
  const int64_t count = static_cast<int64_t>(first_views.size());
  PIECE_OPS_CHECK(score >= 0 && score < kScoreCount, "piece_ops._C: unknown score ", score);
  PIECE_OPS_CHECK(algorithm >= 0 && algorithm < kTopkAlgorithmCount,
                  "piece_ops._C: unknown algorithm ", algorithm);
  PIECE_OPS_CHECK(static_cast<int64_t>(ks.size()) == (by_tensor ? count : 1),
                  "piece_ops._C: wrong number of ks");
  SelectTopkArgs args{};
  args.count = count;
  args.first = first_views.data();
  args.second = second_views.empty() ? nullptr : second_views.data();
  args.exclude = exclude_views.empty() ? nullptr : exclude_views.data();
  args.score = static_cast<Score>(score);
  PIECE_OPS_CHECK(args.second || !score_needs_second(args.score) || count == 0,
                  "piece_ops._C: the score needs a second statistic");
  args.constant = constant;
  args.seed = seed;
  args.nan_is_lowest = nan_is_lowest;
  args.algorithm = static_cast<TopkAlgorithm>(algorithm);
  args.indices = reinterpret_cast<int64_t*>(indices);
  args.counts = reinterpret_cast<int64_t*>(counts);

  int64_t nan_tensor = -1;
  int64_t nan_count = 0;
  {
    const py::gil_scoped_release unlocked;
    for (size_t scope = 0; scope < ks.size(); ++scope) {
      args.k = ks[scope];
      const int64_t before = static_cast<int64_t>(scope);
      SelectTopkArgs own = args;
      if (by_tensor) {
        own.count = 1;
        own.first_number = before;
        own.first += before;
        if (own.second) own.second += before;
        if (own.exclude) own.exclude += before;
        own.counts += before;
      }
      const SelectTopkResult result = cpu::select_topk(cpu_context(threads), own);
      if (result.nan_tensor >= 0) {
        nan_tensor = by_tensor ? before : result.nan_tensor;
        nan_count = result.nan_count;
        break;
      }
      reinterpret_cast<double*>(thresholds)[scope] = result.threshold;
      reinterpret_cast<int64_t*>(ties_kept)[scope] = result.ties_kept;
      args.indices += args.k;
      if (by_tensor) args.first_position += first_views[scope].n;
    }
  }
  return py::make_tuple(nan_tensor, nan_count);
}

void sparse_adamw(const Ints& weights, const Ints& weight_sizes, const Ints& weight_dtypes,
                  const Ints& indices, const Ints& index_sizes, const Ints& values,
                  const Ints& grads, const Ints& grad_sizes, const Ints& grad_dtypes,
                  const Ints& exp_avgs, const Ints& exp_avg_sqs, double step, double lr,
                  double beta1, double beta2, double eps, double weight_decay, int threads) {
  const auto weight_views = make_views<View>(weights, weight_sizes, weight_dtypes);
  const auto index_views = make_index_views(indices, index_sizes);
  const auto grad_views = make_views<ConstView>(grads, grad_sizes, grad_dtypes);
  const auto value_pointers = make_pointers(values);
  const auto exp_avg_pointers = make_pointers(exp_avgs);
  const auto exp_avg_sq_pointers = make_pointers(exp_avg_sqs);
  SparseAdamwArgs args{};
  args.count = static_cast<int64_t>(weight_views.size());
  args.weights = weight_views.data();
  args.indices = index_views.data();
  args.values = value_pointers.data();
  args.grads = grad_views.data();
  args.exp_avgs = exp_avg_pointers.data();
  args.exp_avg_sqs = exp_avg_sq_pointers.data();
  args.factors = make_adamw_factors(step, lr, beta1, beta2, eps, weight_decay);
  const py::gil_scoped_release unlocked;
  cpu::sparse_adamw(cpu_context(threads), args);
}

void gather(const Ints& sources, const Ints& source_sizes, const Ints& source_dtypes,
            const Ints& indices, const Ints& index_sizes, const Ints& values,
            const Ints& value_dtypes, int threads) {
  const auto source_views = make_views<ConstView>(sources, source_sizes, source_dtypes);
  const auto index_views = make_index_views(indices, index_sizes);
  const auto value_views = make_views<View>(values, index_sizes, value_dtypes);
  GatherArgs args{static_cast<int64_t>(source_views.size()), source_views.data(),
                  index_views.data(), value_views.data()};
  const py::gil_scoped_release unlocked;
  cpu::gather(cpu_context(threads), args);
}

void scatter(const Ints& targets, const Ints& target_sizes, const Ints& target_dtypes,
             const Ints& indices, const Ints& index_sizes, const Ints& values,
             const Ints& value_dtypes, int threads) {
  const auto target_views = make_views<View>(targets, target_sizes, target_dtypes);
  const auto index_views = make_index_views(indices, index_sizes);
  const auto value_views = make_views<ConstView>(values, index_sizes, value_dtypes);
  ScatterArgs args{static_cast<int64_t>(target_views.size()), target_views.data(),
                   index_views.data(), value_views.data()};
  const py::gil_scoped_release unlocked;
  cpu::scatter(cpu_context(threads), args);
}

// A scatter that is kept: views and checked indices. Python keeps what the addresses point to.
struct KeptScatter {
  std::vector<View> targets;
  std::vector<IndexView> indices;
  std::vector<ConstView> values;

  ScatterArgs args() const {
    return {static_cast<int64_t>(targets.size()), targets.data(), indices.data(), values.data()};
  }
};

KeptScatter keep_scatter(const Ints& targets, const Ints& target_sizes, const Ints& dtypes,
                         const Ints& indices, const Ints& index_sizes, const Ints& values) {
  KeptScatter kept{make_views<View>(targets, target_sizes, dtypes),
                   make_index_views(indices, index_sizes),
                   make_views<ConstView>(values, index_sizes, dtypes)};
  PIECE_OPS_CHECK(kept.indices.size() == kept.targets.size(), "piece_ops._C: ", kept.indices.size(),
                  " lists of indices for ", kept.targets.size(), " targets");
  cpu::check_scatter(kept.args());
  return kept;
}

void scatter_two(const KeptScatter& first, const KeptScatter& second, int threads) {
  PIECE_OPS_CHECK(first.targets.size() == second.targets.size(),
                  "piece_ops._C: ", first.targets.size(), " targets, but ", second.targets.size());
  for (size_t t = 0; t < first.targets.size(); ++t)
    PIECE_OPS_CHECK(first.targets[t].data == second.targets[t].data &&
                        first.targets[t].n == second.targets[t].n &&
                        first.targets[t].dtype == second.targets[t].dtype,
                    "piece_ops._C: other targets at ", t);
  const py::gil_scoped_release unlocked;
  cpu::scatter_two(cpu_context(threads), first.args(), second.args());
}

double total(const Ints& tensors, const Ints& sizes, const Ints& dtypes, int threads) {
  const auto views = make_views<ConstView>(tensors, sizes, dtypes);
  TotalArgs args{static_cast<int64_t>(views.size()), views.data()};
  const py::gil_scoped_release unlocked;
  return cpu::total(cpu_context(threads), args);
}

bool add_rounded(int64_t target, int64_t value, int64_t n, uint32_t key, int64_t begin,
                 int threads) {
  const AddRoundedArgs args{n, reinterpret_cast<uint16_t*>(target),
                            reinterpret_cast<const float*>(value), key, begin};
  const py::gil_scoped_release unlocked;
  return cpu::add_rounded(cpu_context(threads), args);
}

void sampled_weight_grad(const Matrix& grad_output, const Matrix& input, int64_t tokens,
                         int64_t indices, int64_t count, int64_t values, int threads) {
  SampledWeightGradArgs args{make_matrix(grad_output, tokens),
                             make_matrix(input, tokens),
                             {reinterpret_cast<const int64_t*>(indices), count},
                             reinterpret_cast<float*>(values)};
  const py::gil_scoped_release unlocked;
  cpu::sampled_weight_grad(cpu_context(threads), args);
}

// Reads the bytes once with the live instruction set: the floor of the benchmarks.
uint64_t read_bandwidth_probe(int64_t address, int64_t n_bytes, int threads) {
  const py::gil_scoped_release unlocked;
  const int64_t chunk = int64_t{1} << 18;
  const int64_t chunks = (n_bytes + chunk - 1) / chunk;
  const auto* bytes = reinterpret_cast<const char*>(address);
  const cpu::Bodies& bodies = *cpu::active_isa().bodies;
  uint64_t folded = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : folded)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t begin = c * chunk;
    folded ^= bodies.read(bytes + begin, n_bytes - begin < chunk ? n_bytes - begin : chunk);
  }
  return folded;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  translate_errors();
  m.attr("version") = PIECE_OPS_VERSION;
#if defined(PIECE_OPS_WITH_CUDA)
  bind_cuda(m);
#else
  m.attr("cuda_architectures") = py::tuple();
#endif
  m.def("active_isa", [] { return cpu::active_isa().name; });
  m.def("supported_isas", [] {
    std::vector<std::string> names;
    for (const cpu::Isa& isa : cpu::supported_isas()) names.emplace_back(isa.name);
    return names;
  });
  m.def("accumulate_squares", &accumulate_squares);
  m.def("accumulate_per_sample_squares", &accumulate_per_sample_squares);
  m.def("select_topk", &select_topk);
  m.def("sparse_adamw", &sparse_adamw);
  m.def("gather", &gather);
  m.def("scatter", &scatter);
  py::class_<KeptScatter>(m, "KeptScatter").def(py::init(&keep_scatter));
  m.def("scatter_two", &scatter_two);
  m.def("total", &total);
  m.def("sampled_weight_grad", &sampled_weight_grad);
  m.def("add_rounded", &add_rounded);
  m.def("read_bandwidth_probe", &read_bandwidth_probe);
}
