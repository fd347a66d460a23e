// device.h - what every CUDA op needs besides itself: the device, its tables, the indices' check.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "piece_ops/core/context.h"
#include "piece_ops/core/table.h"

namespace piece_ops::cuda {

// What the fat binary holds: "sm_80", ... machine code; "compute_120" PTX for later chips.
std::vector<std::string> built_architectures();

// Throws, saying what is missing, if there is no GPU or none of these fits the device.
void require_device(int device);

// Copies the table's words to device memory of the same size; the host's copy may go at once, and
// the write can be captured into a graph, since the words travel as kernel arguments.
void write_table(const Context& context, const Table& table, int64_t* words);

// Waits for the stream and copies a few words of the device's memory to the host.
void read_words(const Context& context, const int64_t* from, int64_t count, int64_t* to);

// Tables of gather, scatter and sparse_adamw only. report, on the device: where the first position
// stands that is out of range or not above its predecessor; INT64_MAX: all are right.
void check_indices(const Context& context, const DeviceTable& table, int64_t* report);

// The tensor and slot that such a report means.
struct Slot {
  int64_t tensor;
  int64_t slot;
};
Slot locate_slot(const Table& table, int64_t report);

}  // namespace piece_ops::cuda
