// cuda.cpp - the CUDA ops for Python: addresses on the device, its index, and a stream.
//
// Each op has two functions: cuda_<op>_table makes a table of the tensors on the host, which Python
// writes into device memory of its own and may keep; cuda_<op> runs over it.
#include <pybind11/stl.h>

#include "bind.h"
#include "piece_ops/ops/accumulate_squares.h"
#include "piece_ops/ops/device.h"
#include "piece_ops/ops/gather.h"
#include "piece_ops/ops/sampled_weight_grad.h"
#include "piece_ops/ops/scatter.h"
#include "piece_ops/ops/sparse_adamw.h"
#include "piece_ops/ops/total.h"
#include "views.h"

namespace py = pybind11;

namespace piece_ops::binding {

namespace {

DeviceTable on_device(const Table& table, int64_t address) {
  return {reinterpret_cast<const int64_t*>(address), table.count, table.tiles};
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

Score checked_score(int score) {
  PIECE_OPS_CHECK(score >= 0 && score < kScoreCount, "piece_ops._C: unknown score ", score);
  return static_cast<Score>(score);
}

void bind_device(py::module_& m) {
  m.def("cuda_require_device", [](int device) {
    const py::gil_scoped_release unlocked;
    cuda::require_device(device);
  });
  // module_local: the emulation, in one process with this module, has its own.
  py::class_<Table>(m, "CudaTable", py::module_local())
      .def_property_readonly("n_bytes", [](const Table& table) { return 8 * table.words.size(); })
      .def_readonly("count", &Table::count)
      .def_readonly("tiles", &Table::tiles)
      .def("write",
           [](const Table& table, int64_t address, int device, uint64_t stream) {
             const py::gil_scoped_release unlocked;
             cuda::write_table(cuda_context(device, stream), table, pointer<int64_t>(address));
           })
      // (tensor, slot) of a report of cuda_check_indices; (-1, -1): no slot is wrong.
      .def("locate", [](const Table& table, int64_t report) {
        const cuda::Slot slot = cuda::locate_slot(table, report);
        return py::make_tuple(slot.tensor, slot.slot);
      });
  m.def("cuda_check_indices",
        [](const Table& table, int64_t address, int64_t report, int device, uint64_t stream) {
          const py::gil_scoped_release unlocked;
          cuda::check_indices(cuda_context(device, stream), on_device(table, address),
                              pointer<int64_t>(report));
        });
}

void bind_accumulate_squares(py::module_& m) {
  m.def(
      "cuda_accumulate_squares_table",
      [](const Ints& square_sums, const Ints& sums, const Ints& grads, const Ints& sizes,
         const Ints& dtypes, const Ints& maxima, int score, const Ints& second,
         const Ints& second_dtypes) {
        const auto views = make_views<ConstView>(grads, sizes, dtypes);
        const auto square_pointers = make_pointers(square_sums);
        const auto sum_pointers = make_pointers(sums);
        const auto maxima_pointers = make_pointers(maxima);
        const auto second_views = second.empty()
                                      ? std::vector<ConstView>{}
                                      : make_views<ConstView>(second, sizes, second_dtypes);
        for (const auto* pointers : {&square_pointers, &sum_pointers, &maxima_pointers}) {
          PIECE_OPS_CHECK(pointers->empty() || pointers->size() == views.size(),
                          "piece_ops._C: ", pointers->size(), " addresses for ", views.size(),
                          " gradients");
        }
        AccumulateSquaresArgs args{};
        args.count = static_cast<int64_t>(views.size());
        args.grads = views.data();
        args.square_sums = square_pointers.empty() ? nullptr : square_pointers.data();
        args.sums = sum_pointers.empty() ? nullptr : sum_pointers.data();
        cuda::ChunkMaxima chunk_maxima;
        chunk_maxima.maxima = maxima_pointers.empty() ? nullptr : maxima_pointers.data();
        chunk_maxima.score = checked_score(score);
        chunk_maxima.second = second_views.empty() ? nullptr : second_views.data();
        return cuda::make_table(args, chunk_maxima);
      },
      py::arg("square_sums"), py::arg("sums"), py::arg("grads"), py::arg("sizes"),
      py::arg("dtypes"), py::arg("maxima") = Ints{}, py::arg("score") = 0,
      py::arg("second") = Ints{}, py::arg("second_dtypes") = Ints{});
  m.def(
      "cuda_accumulate_squares",
      [](const Table& table, int64_t address, bool has_square_sums, bool has_sums, float weight,
         int64_t report, int64_t sticky, int device, uint64_t stream, bool has_maxima, int score,
         float constant) {
        cuda::ChunkMaxima maxima;
        float* present = nullptr;  // the addresses themselves stand in the table
        maxima.maxima = has_maxima ? &present : nullptr;
        maxima.score = checked_score(score);
        maxima.constant = constant;
        const py::gil_scoped_release unlocked;
        cuda::accumulate_squares(cuda_context(device, stream), on_device(table, address),
                                 has_square_sums, has_sums, weight, maxima,
                                 pointer<int64_t>(report), pointer<int64_t>(sticky));
      },
      py::arg("table"), py::arg("address"), py::arg("has_square_sums"), py::arg("has_sums"),
      py::arg("weight"), py::arg("report"), py::arg("sticky"), py::arg("device"), py::arg("stream"),
      py::arg("has_maxima") = false, py::arg("score") = 0, py::arg("constant") = 0.0f);
}

void bind_slots(py::module_& m) {
  m.def("cuda_sparse_adamw_table",
        [](const Ints& weights, const Ints& weight_sizes, const Ints& weight_dtypes,
           const Ints& indices, const Ints& index_sizes, const Ints& values, const Ints& grads,
           const Ints& grad_sizes, const Ints& grad_dtypes, const Ints& exp_avgs,
           const Ints& exp_avg_sqs) {
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
          return cuda::make_table(args);
        });
  m.def("cuda_sparse_adamw",
        [](const Table& table, int64_t address, double step, double lr, double beta1, double beta2,
           double eps, double weight_decay, int device, uint64_t stream) {
          const py::gil_scoped_release unlocked;
          cuda::sparse_adamw(cuda_context(device, stream), on_device(table, address),
                             make_adamw_factors(step, lr, beta1, beta2, eps, weight_decay));
        });
  m.def("cuda_gather_table",
        [](const Ints& sources, const Ints& source_sizes, const Ints& source_dtypes,
           const Ints& indices, const Ints& index_sizes, const Ints& values,
           const Ints& value_dtypes) {
          const auto source_views = make_views<ConstView>(sources, source_sizes, source_dtypes);
          const auto index_views = make_index_views(indices, index_sizes);
          const auto value_views = make_views<View>(values, index_sizes, value_dtypes);
          return cuda::make_table(GatherArgs{static_cast<int64_t>(source_views.size()),
                                             source_views.data(), index_views.data(),
                                             value_views.data()});
        });
  m.def("cuda_gather", [](const Table& table, int64_t address, int device, uint64_t stream) {
    const py::gil_scoped_release unlocked;
    cuda::gather(cuda_context(device, stream), on_device(table, address));
  });
  m.def("cuda_scatter_table",
        [](const Ints& targets, const Ints& target_sizes, const Ints& target_dtypes,
           const Ints& indices, const Ints& index_sizes, const Ints& values,
           const Ints& value_dtypes) {
          const auto target_views = make_views<View>(targets, target_sizes, target_dtypes);
          const auto index_views = make_index_views(indices, index_sizes);
          const auto value_views = make_views<ConstView>(values, index_sizes, value_dtypes);
          return cuda::make_table(ScatterArgs{static_cast<int64_t>(target_views.size()),
                                              target_views.data(), index_views.data(),
                                              value_views.data()});
        });
  m.def("cuda_scatter", [](const Table& table, int64_t address, int device, uint64_t stream) {
    const py::gil_scoped_release unlocked;
    cuda::scatter(cuda_context(device, stream), on_device(table, address));
  });
}

void bind_total(py::module_& m) {
  m.def("cuda_total_table", [](const Ints& tensors, const Ints& sizes, const Ints& dtypes) {
    const auto views = make_views<ConstView>(tensors, sizes, dtypes);
    return cuda::make_table(TotalArgs{static_cast<int64_t>(views.size()), views.data()});
  });
  m.def("cuda_total", [](const Table& table, int64_t address, int64_t tile_sums, int64_t result,
                         int device, uint64_t stream) {
    const py::gil_scoped_release unlocked;
    cuda::total(cuda_context(device, stream), on_device(table, address), pointer<double>(tile_sums),
                pointer<double>(result));
  });
}

void bind_sampled_weight_grad(py::module_& m) {
  m.def("cuda_sampled_weight_grad_table",
        [](const Ints& indices, const Ints& counts, const Ints& columns) {
          SampledWeightGradArgs args{};
          args.indices = make_index_views(indices, counts).at(0);
          args.grad_output.columns = columns.at(0);
          args.input.columns = columns.at(1);
          return cuda::make_table(args);
        });
  m.def("cuda_sampled_weight_grad_bytes", [](const Matrix& input, int64_t count) {
    SampledWeightGradArgs args{};
    args.input = make_matrix(input, 0);
    args.indices.n = count;
    return cuda::sampled_weight_grad_bytes(args);
  });
  m.def("cuda_sampled_weight_grad",
        [](const Matrix& grad_output, const Matrix& input, int64_t tokens, int64_t indices,
           int64_t count, int64_t values, int64_t scratch, int64_t blocks_at_once, int device,
           uint64_t stream) {
          const SampledWeightGradArgs args{make_matrix(grad_output, tokens),
                                           make_matrix(input, tokens),
                                           {pointer<const int64_t>(indices), count},
                                           pointer<float>(values)};
          const py::gil_scoped_release unlocked;
          cuda::sampled_weight_grad(cuda_context(device, stream), args, pointer<void>(scratch),
                                    blocks_at_once);
        });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.attr("cuda_architectures") = py::tuple(py::cast(cuda::built_architectures()));
  bind_device(m);
  bind_cuda_look(m);
  bind_accumulate_squares(m);
  bind_slots(m);
  bind_total(m);
  bind_sampled_weight_grad(m);
  bind_cuda_select_topk(m);
}

}  // namespace piece_ops::binding
