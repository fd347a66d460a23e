// select_topk_types.h - what the kernels of select_topk share: the table of tensors, the state of a
// search for the k-th largest key, the scratch, and the launchers. Manual: select_topk.cu.
//
//   tensor      elements 0 .. n-1; excluded positions; possibly a maximum for every 32 elements
//   tile        a run of slots of one tensor: 4096 (dense), or 32768 (sparse: maxima decide what is
//               read)
//   slot        one place of a tile; a dense tensor's first tile begins `pad` slots before its
//               first element, so that every 16-byte load of the tensor is aligned
//
//     address    |..pad..| 0 1 2 ...                 element = tile * slots - pad + slot
//     tiles      |<------- tile 0 ------->|<------- tile 1 ------->|
//
//   kept list   (key, slot) of what exceeds the bound: the tiles' shares lie in the order in which
//               blocks got to them, each share in rising slots; `Found` says where
#pragma once

#include "gpu.h"
#include "piece_ops/math/ordered_bits.h"
#include "piece_ops/math/score.h"
#include "piece_ops/ops/select_topk.h"

namespace piece_ops::cuda {

constexpr int kTileSlots = 4096;
constexpr int kSparseSlots = 32768;
constexpr int kChunk = 32;  // elements under one maximum
constexpr int kMaxBins = 4096;
constexpr int64_t kNothingWrong = 0x7f7f7f7f7f7f7f7f;  // the report of check_indices
constexpr int kGroupTiles = 256;  // tiles whose shares one block counts and copies out

// One tensor, in device memory.
struct TopkRow {
  const void* first;
  const void* second;
  const int64_t* exclude;
  const float* maxima;
  int64_t n;
  int64_t exclude_n;
  int64_t start;        // elements before it in its selection
  int64_t position;     // kRandom: the position of its first element in the caller's order
  int64_t dense_tile;   // its first tile, dense
  int64_t sparse_tile;  // and sparse
  int64_t k;            // a selection of its own (select_topk_small.cu): how many, or -1: not there
  int64_t out;          // and where its positions go
  int32_t first_dtype;
  int32_t second_dtype;
  int32_t pad;
  int32_t reserved;
};

// What a selection (or the search in the maxima) reads; by value to every kernel.
struct TopkTable {
  const TopkRow* rows;
  int64_t count;
  int64_t n;
  int64_t tiles;
  int64_t*
      exclude_starts;     // [tiles]: the first excluded entry at or after the tile's begin; or null
  int32_t* tile_tensors;  // [tiles]
  const int64_t* check;   // what check_indices said of the excluded positions; null: there are none
  int32_t slots;          // of a tile: kTileSlots or kSparseSlots

  // Excluded positions that are out of range or out of order: nothing may be looked up by them.
  PIECE_OPS_HD bool is_broken() const { return check != nullptr && *check != kNothingWrong; }
  PIECE_OPS_HD int64_t first_tile(int64_t tensor) const {
    if (tensor == count) return tiles;
    return slots == kTileSlots ? rows[tensor].dense_tile : rows[tensor].sparse_tile;
  }
  // The element in the tile's first slot; negative in a padded first tile.
  PIECE_OPS_HD int64_t tile_begin(int64_t tile, int64_t tensor) const {
    const int64_t pad = slots == kTileSlots ? rows[tensor].pad : 0;
    return (tile - first_tile(tensor)) * slots - pad;
  }
};

struct TopkFormula {
  Score score;
  float constant;
  uint64_t seed;
};

// The search for the rank-th largest of a set of keys, digit by digit from the top.
template <class K>
struct TopkSearch {
  K prefix;        // the digits found
  int32_t known;   // how many bits they are
  int32_t done;    // nothing more to find
  int64_t rank;    // how many of the keys with this prefix are wanted
  int64_t above;   // keys larger than all with this prefix
  int64_t inside;  // keys with this prefix

  // The smallest key with this prefix.
  PIECE_OPS_HD K bound() const {
    return known == 0 ? K{0} : static_cast<K>(prefix << (static_cast<int>(sizeof(K)) * 8 - known));
  }
};

// What the blocks of one selection tell the kernels after them; prepare sets it.
struct TopkState {
  unsigned long long kept;       // keys above the bound
  unsigned long long ties;       // keys equal to it
  unsigned long long first_nan;  // table.count - the first tensor with NaN; 0: none
  int64_t quota;                 // ties at the threshold that are selected
  int64_t status;                // of TopkReport
  unsigned ticket;               // of the kernel that runs (is_last_block)
  unsigned reserved;
  unsigned long long histogram[kMaxBins];  // of the digit that is looked for
};

// Where the filter put the share of each tile, and what becomes of it.
template <class K>
struct TopkFound {
  TopkSearch<K>* threshold;  // the search among the kept; verify sets it out
  K* keys;                   // [room]
  uint16_t* slots;           // [room]
  int64_t* starts;           // [tiles]: in keys and slots
  uint32_t* counts;          // [tiles]: kept << 16 | ties at the bound
  uint32_t* chosen;          // [tiles]: above the threshold << 16 | equal to it
  int64_t* outs;             // [tiles]: where the tile's positions go
  uint32_t* shares;          // [tiles]: how many of its ties are selected
  int64_t* group_above;      // [groups]
  int64_t* group_ties;       // [groups]
  unsigned long long* nans;  // [tensors]; null: NaN ranks lowest
  TopkState* state;
  int64_t room;
  int64_t k;
  int32_t store;  // 0: a dense selection keeps nothing
};

// The k-th largest is exact digit after digit; 32-bit and 64-bit keys.
PIECE_OPS_HD constexpr int digit_count(size_t key_bytes) { return key_bytes == 4 ? 3 : 6; }
PIECE_OPS_HD constexpr int digit_bits(size_t key_bytes, int digit) {
  return digit == 0 || (key_bytes == 8 && digit == 1) ? 12 : 10;
}

// A sample of one element of each stratum, at a hashed place (as csrc/cpu/topk_bound.h does; any
// sample gives the same selection).
struct TopkStrata {
  int64_t length;
  int64_t count;
  uint64_t salt;  // another one, other places
};

// ---- launchers, one file each -------------------------------------------------------------------

// How the scores come about; the kernels are compiled for each.
enum class TopkInput { kOne, kTwo, kHash, kDouble };

struct TopkLaunch {
  cudaStream_t stream;
  int multiprocessors;
  TopkInput input;
  TopkFormula formula;
};

// select_topk_bound.cu
// Both tables (maxima: one without tiles, if there is none), the state, and the bound's search.
template <class K>
void launch_prepare(const TopkLaunch& to, const TopkTable& table, const TopkTable& maxima,
                    const TopkFound<K>& found, TopkSearch<K>* bound, int64_t rank);
// Draws the sample and finds its rank-th largest.
template <class K>
void launch_search_sample(const TopkLaunch& to, const TopkTable& table, TopkStrata strata, K* keys,
                          TopkSearch<K>* search, TopkState* state);
// The rank-th largest of keys[0 .. min(*count or limit, limit)), from this digit on.
template <class K>
void launch_search_list(const TopkLaunch& to, const K* keys, const unsigned long long* count,
                        int64_t limit, int first_digit, TopkSearch<K>* search, TopkState* state);
// The digits of the rank-th largest of all scores, until no more than `enough` share the prefix.
template <class K>
void launch_search_scores(const TopkLaunch& to, const TopkTable& table, TopkSearch<K>* search,
                          TopkState* state, int64_t enough);

// select_topk_filter.cu, select_topk_sparse.cu: each verifies what it found (select_topk_verify.h)
template <class K>
void launch_filter(const TopkLaunch& to, const TopkTable& table, const TopkSearch<K>* bound,
                   const TopkFound<K>& found);
void launch_sparse_filter(const TopkLaunch& to, const TopkTable& table,
                          const TopkSearch<uint32_t>* bound, const TopkFound<uint32_t>& found);

// select_topk_emit.cu
template <class K>
void launch_emit(const TopkLaunch& to, const TopkTable& table, const TopkSearch<K>* bound,
                 const TopkFound<K>& found, int64_t* indices, int64_t* counts, TopkReport* report);

// select_topk_small.cu
void launch_small(const TopkLaunch& to, const TopkRow* rows, int64_t count, const int64_t* check,
                  bool nan_is_lowest, int64_t* indices, int64_t* counts, TopkReport* reports);

}  // namespace piece_ops::cuda
