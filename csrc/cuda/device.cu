// device.cu - is there a GPU for this build, tables onto the device, and the check of positions.
//
// Tables   The words travel as kernel arguments (4 KB or 32 KB a launch): no pinned buffer to keep
//          alive, no implicit synchronisation, and a captured graph holds its own copy. 10,000
//          tensors with 4 columns are 60,000 words, 15 launches, once.
// Indices  Each position is read once (and once more as its successor's neighbour, from L1), in
//          tiles of 1024: 8 bytes a slot, 16 us for 8 M on an H200 (predicted). The first wrong one
//          wins by an atomic minimum, so the report does not depend on timing.
#include <limits>

#include "piece_ops/core/architectures.h"
#include "piece_ops/ops/device.h"
#include "slots.h"
#include "tiles.h"

#if !defined(PIECE_OPS_CUDA_ARCHITECTURES)
#define PIECE_OPS_CUDA_ARCHITECTURES "emulated"
#endif

namespace piece_ops::cuda {

namespace {

// ---- kernels ------------------------------------------------------------------------------------

template <int kCount>
struct Words {
  int64_t word[kCount];
};
constexpr int kFewWords = 500;    // 4 KB
constexpr int kManyWords = 4000;  // 32 KB, what CUDA 12.1 and later take

template <int kCount>
__global__ void write_words_kernel(Words<kCount> words, int64_t n, int64_t* to) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) to[i] = words.word[i];
}

__global__ void __launch_bounds__(kThreads, 6)
    check_indices_kernel(DeviceTable table, unsigned long long* report) {
  for_each_tile(table, kSlotTile, [&](const Tile& tile) {
    const int64_t* indices = table_pointer<const int64_t>(table, kIndices, tile.tensor);
    const int64_t bound = table_word(table, kBound, tile.tensor);
    for (int64_t s = lane_of_warp(); s < tile.n; s += kWarp) {
      const int64_t at = tile.begin + s;
      const int64_t i = indices[at];
      const int64_t previous = at == 0 ? -1 : indices[at - 1];
      if (i < 0 || i >= bound || i <= previous) {
        atomicMin(report, static_cast<unsigned long long>(tile.number * kSlotTile + s));
      }
    }
  });
}

// ---- host ---------------------------------------------------------------------------------------

template <int kCount>
int64_t write_some(const Context& context, const Table& table, int64_t done, int64_t* to) {
  Words<kCount> words;
  const int64_t left = static_cast<int64_t>(table.words.size()) - done;
  const int64_t n = std::min<int64_t>(left, kCount);
  std::copy_n(table.words.data() + done, n, words.word);
  launch(write_words_kernel<kCount>, 1, 512, 0, stream_of(context), words, n, to + done);
  return n;
}

bool is_emulated() { return std::string(PIECE_OPS_CUDA_ARCHITECTURES) == "emulated"; }

}  // namespace

std::vector<std::string> built_architectures() {
  std::vector<std::string> names;
  for (const Architecture& built : parse_architectures(PIECE_OPS_CUDA_ARCHITECTURES)) {
    names.push_back(built.name());
  }
  if (is_emulated()) names.emplace_back("emulated");
  return names;
}

void require_device(int device) {
  int count = 0;  // left alone when the call fails
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    (void)cudaGetLastError();
    fail(ErrorKind::kCuda, "piece_ops: a CUDA op needs an NVIDIA GPU and its driver, got ",
         cudaGetErrorName(error), " (", static_cast<int>(error), "): ",
         error == cudaErrorNoDevice
             ? "the driver sees no GPU (see nvidia-smi, CUDA_VISIBLE_DEVICES)"
             : "no driver, or one older than this build's CUDA runtime");
  }
  PIECE_OPS_CUDA_CHECK(error);
  PIECE_OPS_CHECK(device >= 0 && device < count, "piece_ops: the CUDA device must be in 0..",
                  count - 1, ", got ", device);
  int major = 0;
  int minor = 0;
  PIECE_OPS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  PIECE_OPS_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  const int capability = 10 * major + minor;
  if (!is_emulated() &&
      !any_runs_on(parse_architectures(PIECE_OPS_CUDA_ARCHITECTURES), capability)) {
    std::string names;
    for (const std::string& name : built_architectures()) names += " " + name;
    fail(ErrorKind::kCuda, "piece_ops: this build has CUDA code for", names, ", but device ",
         device, " is sm_", capability,
         "; build with CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=", capability);
  }
}

void write_table(const Context& context, const Table& table, int64_t* words) {
  use_device(context);
  const int64_t n = static_cast<int64_t>(table.words.size());
  for (int64_t done = 0; done < n;) {
    done += n - done <= kFewWords ? write_some<kFewWords>(context, table, done, words)
                                  : write_some<kManyWords>(context, table, done, words);
  }
}

void read_words(const Context& context, const int64_t* from, int64_t count, int64_t* to) {
  use_device(context);
  PIECE_OPS_CUDA_CHECK(cudaMemcpyAsync(to, from, static_cast<size_t>(count) * sizeof(int64_t),
                                       cudaMemcpyDeviceToHost, stream_of(context)));
  PIECE_OPS_CUDA_CHECK(cudaStreamSynchronize(stream_of(context)));
}

void check_indices(const Context& context, const DeviceTable& table, int64_t* report) {
  use_device(context);
  // 0x7f in each byte: above every slot number there is.
  PIECE_OPS_CUDA_CHECK(cudaMemsetAsync(report, 0x7f, sizeof(int64_t), stream_of(context)));
  launch_over_tiles(check_indices_kernel, context, table,
                    reinterpret_cast<unsigned long long*>(report));
}

Slot locate_slot(const Table& table, int64_t report) {
  const int64_t tile = report / kSlotTile;
  if (tile >= table.tiles) return {-1, -1};
  const auto begin = table.words.begin();
  const int64_t t = std::upper_bound(begin, begin + table.count + 1, tile) - begin - 1;
  return {t, (tile - begin[t]) * kSlotTile + report % kSlotTile};
}

}  // namespace piece_ops::cuda
