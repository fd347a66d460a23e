// select_topk_ring.h - parts of tiles on their way into shared memory while earlier ones are judged.
//
// A lane copies the loads of its part itself, asynchronously (cp.async, sm_80 and later), each to a
// place of its own, and reads back what it copied, so a wait for its own group of copies is all the
// order that the ring needs: no barrier, and no lane waits for another. As soon as a stage has been
// read into registers the copies of the tile kStages further on are started into it; they are under
// way while the tile in registers is judged:
//
//     stage        0         1                      0                         1
//     copies   [tile 0]  [tile 1]   read 0, then [tile 2]   read 1, then [tile 3]   ...
//     judged                            tile 0                  tile 1
//
// Places lie so that a warp's are consecutive: copy i of thread t is 16 (i * threads + t) bytes into
// the stage. A part that is not whole, or not aligned, is not copied but read element by element
// when its turn comes; its group is empty.
#pragma once

#include "select_topk_load.h"

namespace piece_ops::cuda {

// Copies of a lane for one tile, at most: 128 bytes of each input.
template <TopkInput kInput>
constexpr int kCopies = kInput == TopkInput::kHash  ? 0
                        : kInput == TopkInput::kTwo ? 16
                                                    : 8;
// One tile of one float32 input is 16 KiB, two of them are on their way; of two inputs, or of
// float64, one tile is 32 KiB.
template <TopkInput kInput>
constexpr int kStages = kInput == TopkInput::kOne ? 2 : 1;
template <TopkInput kInput>
constexpr int kStageBytes = kCopies<kInput> * kTileThreads<ScoreOf<kInput>> * 16;
template <TopkInput kInput>
constexpr int kRingBytes = kStages<kInput> * kStageBytes<kInput>;

// This lane's places in one stage, of one input: 16 bytes each, a warp's side by side.
template <int kThreads>
struct StagePlaces {
  static constexpr int kApart = 16 * kThreads;
  unsigned char* first;

  PIECE_OPS_DEVICE uint4 get(std::integral_constant<int, 16>, int i, const void*) const {
    return load_shared_16(first + i * kApart);
  }
  PIECE_OPS_DEVICE uint2 get(std::integral_constant<int, 8>, int i, const void*) const {
    return load_shared_8(first + i * kApart);
  }
  template <int V>
  PIECE_OPS_DEVICE void start_copies(const void* data, int32_t dtype, int64_t begin,
                                     int lane) const {
    each_load<V>(data, dtype, begin, lane, [this](auto bytes, int i, const void* p) {
      __pipeline_memcpy_async(first + i * kApart, p, decltype(bytes)::value);
    });
  }
  PIECE_OPS_DEVICE StagePlaces second() const { return {first + 8 * kApart}; }
};

// A warp's part of a tile, in one register: which tensor's, and whether it is whole and aligned.
struct Part {
  uint32_t code;

  PIECE_OPS_DEVICE Part() : code(0) {}
  PIECE_OPS_DEVICE Part(int32_t tensor, bool is_whole)
      : code(static_cast<uint32_t>(tensor) << 1 | static_cast<uint32_t>(is_whole)) {}
  PIECE_OPS_DEVICE int64_t tensor() const { return code >> 1; }
  PIECE_OPS_DEVICE bool is_whole() const { return code & 1u; }
};

// The element in the first slot of this warp's part of a dense tile.
template <class T>
PIECE_OPS_DEVICE int64_t part_begin(const TopkRow& row, int64_t tile) {
  return (tile - row.dense_tile) * kTileSlots - row.pad +
         static_cast<int>(threadIdx.x) / kWarp * kPartSlots<T>;
}

// Walks over tiles blockIdx.x, blockIdx.x + gridDim.x, ...
template <TopkInput kInput>
class Ring {
  using T = ScoreOf<kInput>;
  using Places = StagePlaces<kTileThreads<T>>;

 public:
  PIECE_OPS_DEVICE Ring(const TopkTable& table, unsigned char* shared) : shared_(shared) {
    int64_t tile = blockIdx.x;
    look_up_tensor(table, tile);
#pragma unroll
    for (int s = 0; s < kStages<kInput>; ++s) {
      int64_t begin = 0;
      parts_[s] = look_up(table, tile, &begin);
      start(table, parts_[s], begin);
      tile += gridDim.x;
      look_up_tensor(table, tile);
    }
  }

  // The part that is read next.
  PIECE_OPS_DEVICE Part part() const { return parts_[0]; }

  // Inputs of this tile's part, whose tensor has loads of V elements, or, of a part that is not
  // whole, its scores; bit j of the result: x[j] exists. Starts the copies that take the place of
  // what is read.
  template <int V>
  PIECE_OPS_DEVICE uint32_t read(const TopkTable& table, const TopkFormula& formula, int64_t tile,
                                 T (&x)[kPerLane<T>], float (&second)[kSeconds<kInput>]) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const Part part = parts_[0];
    const TopkRow& row = table.rows[part.tensor()];
    // The look-ups for the new copies, before the wait for the old ones.
    const int64_t ahead = tile + kStages<kInput> * int64_t{gridDim.x};
    int64_t begin = 0;
    const Part next = look_up(table, ahead, &begin);
    uint32_t valid = kAllOfPart<T>;
    if constexpr (kInput != TopkInput::kHash) {
      __pipeline_wait_prior(kStages<kInput> - 1);  // this tile's copies are there
      fence_compiler();
      if (part.is_whole()) load_inputs<kInput, V>(row, 0, lane, places(), x, second);
    }
    if (!part.is_whole()) {
      valid = load_elements_of_part<kInput, V>(row, formula, part_begin<T>(row, tile), lane, x);
    }
    start(table, next, begin);  // into the places just read: a copy comes after the reads before it
    look_up_tensor(table, ahead + gridDim.x);
#pragma unroll
    for (int s = 0; s + 1 < kStages<kInput>; ++s) parts_[s] = parts_[s + 1];
    parts_[kStages<kInput> - 1] = next;
    return valid;
  }

 private:
  // Of the tile that is looked up next, so early that nothing waits for it.
  PIECE_OPS_DEVICE void look_up_tensor(const TopkTable& table, int64_t tile) {
    if (tile < table.tiles) next_tensor_ = table.tile_tensors[tile];
  }

  // A tile's part, and the element in its first slot.
  PIECE_OPS_DEVICE Part look_up(const TopkTable& table, int64_t tile, int64_t* begin) {
    if (tile >= table.tiles) return {};
    bool is_whole = false;
    if constexpr (kInput != TopkInput::kHash) {
      const TopkRow& row = table.rows[next_tensor_];
      *begin = part_begin<T>(row, tile);
      is_whole = is_whole_part<kInput>(row, *begin);
    }
    return {next_tensor_, is_whole};
  }

  // One group of copies, empty where there is nothing to copy; then it is the next stage's turn.
  PIECE_OPS_DEVICE void start(const TopkTable& table, Part part, int64_t begin) {
    if constexpr (kInput != TopkInput::kHash) {
      if (part.is_whole()) {
        const Places to = places();
        const TopkRow& row = table.rows[part.tensor()];
        const int lane = static_cast<int>(threadIdx.x) % kWarp;
        with_width<kInput>(row, [&](auto width) {
          constexpr int V = decltype(width)::value;
          to.template start_copies<V>(row.first, first_dtype<kInput, V>(row), begin, lane);
          if constexpr (kInput == TopkInput::kTwo) {
            to.second().template start_copies<V>(row.second, row.second_dtype, begin, lane);
          }
        });
      }
      __pipeline_commit();
      if constexpr (kStages<kInput> > 1) {
        stage_ += kStageBytes<kInput>;
        if (stage_ == kRingBytes<kInput>) stage_ = 0;
      }
    }
  }

  PIECE_OPS_DEVICE Places places() const { return {shared_ + stage_ + threadIdx.x * 16}; }

  // __pipeline_wait_prior does not keep nvcc from moving loads in front of it.
  PIECE_OPS_DEVICE static void fence_compiler() { asm volatile("" ::: "memory"); }

  unsigned char* shared_;
  Part parts_[kStages<kInput>];
  int32_t next_tensor_ = 0;  // of the tile after those in parts_, looked up a tile ago
  int stage_ = 0;            // whose turn it is: where it begins
};

}  // namespace piece_ops::cuda
