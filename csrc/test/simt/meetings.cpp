// meetings.cpp - where threads meet: the barriers of a block, the operations of a warp, tickets.
#include <algorithm>

#include "machine.h"

namespace simt {

namespace {

// The lanes of the mask are all there: what each of them gets.
void conclude(Warp& warp, Meeting& meeting, Thread* lanes) {
  (void)warp;
  uint64_t ballot = 0;
  uint64_t sum = 0;
  uint64_t all_or = 0;
  uint64_t all_and = ~uint64_t{0};
  uint64_t most = 0;
  uint64_t least = ~uint64_t{0};
  const WarpOp op = machine.current->op;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(meeting.mask >> lane & 1u)) continue;
    const uint64_t value = lanes[lane].value;
    ballot |= (value ? uint64_t{1} : 0) << lane;
    sum += value;
    all_or |= value;
    all_and &= value;
    most = std::max(most, value);
    least = std::min(least, value);
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!(meeting.mask >> lane & 1u)) continue;
    Thread& thread = lanes[lane];
    if (thread.op != op) {
      stop("simt: lanes of one warp meet in different operations: " + where(thread.site) + " and " +
           where(machine.current->site));
    }
    switch (op) {
      case WarpOp::kSync:
        break;
      case WarpOp::kShuffle:
        if (!(meeting.mask >> (thread.source & 31) & 1u)) {
          stop("simt: lane " + std::to_string(lane) + " shuffles from lane " +
               std::to_string(thread.source) + ", which is not in the mask; " + where(thread.site));
        }
        thread.result = lanes[thread.source & 31].value;
        break;
      case WarpOp::kBallot:
        thread.result = ballot;
        break;
      case WarpOp::kAny:
        thread.result = ballot != 0;
        break;
      case WarpOp::kAll:
        thread.result = ballot == meeting.mask;
        break;
      case WarpOp::kMatch:
        thread.result = 0;
        for (int other = 0; other < 32; ++other) {
          if ((meeting.mask >> other & 1u) && lanes[other].value == thread.value) {
            thread.result |= uint64_t{1} << other;
          }
        }
        break;
      case WarpOp::kAdd:
        thread.result = sum;
        break;
      case WarpOp::kMax:
        thread.result = most;
        break;
      case WarpOp::kMin:
        thread.result = least;
        break;
      case WarpOp::kOr:
        thread.result = all_or;
        break;
      case WarpOp::kAnd:
        thread.result = all_and;
        break;
    }
  }
}

}  // namespace

int lane() { return machine.current->number & 31; }

int sync_threads(Barrier kind, int predicate, const char* file, int line) {
  Machine& m = machine;
  if (kind == Barrier::kPlain && is_skipped(file, line)) return 0;
  const Place site{"__syncthreads", file, line};
  if (m.current->owes_fence) stop("simt: no fence after a ticket, before " + where(site));
  m.current->fenced = false;
  const int half = m.barrier_generation & 1;
  if (m.arrived == 0) {
    m.barrier_kind = kind;
  } else if (m.barrier_kind != kind) {
    stop("simt: different kinds of barrier meet; one is " + where(site));
  }
  tsan_release(&m.barrier_order[half]);
  m.sum += predicate;
  if (++m.arrived < m.n) {
    m.barrier_waiting.push_back(m.current);
    wait(site);
  } else {
    m.barrier_result[half] = kind == Barrier::kAnd  ? m.sum == m.n
                             : kind == Barrier::kOr ? m.sum != 0
                                                    : m.sum;
    ++m.barrier_generation;
    m.arrived = 0;
    m.sum = 0;
    for (Thread* thread : m.barrier_waiting) release(thread);
    m.barrier_waiting.clear();
  }
  tsan_acquire(&m.barrier_order[half]);
  return m.barrier_result[half];
}

void come_to_ticket() { ++machine.at_ticket; }

void fence() {
  machine.current->fenced = true;
  machine.current->owes_fence = false;
}

void check_ticket() {
  Machine& m = machine;
  if (m.at_ticket != m.n) {
    stop("simt: a ticket is drawn when " + std::to_string(m.at_ticket) + " of " +
         std::to_string(m.n) + " threads have come to it");
  }
  if (!m.current->fenced) stop("simt: a ticket is drawn without a fence since the last barrier");
  m.current->owes_fence = true;
  m.at_ticket = 0;
}

uint64_t meet_warp(WarpOp op, unsigned mask, uint64_t value, int source, const char* what,
                   const char* file, int line) {
  Machine& m = machine;
  if (op == WarpOp::kSync && is_skipped(file, line)) return 0;
  Thread* me = m.current;
  const int my_lane = me->number & 31;
  const int first = me->number & ~31;
  const Place site{what, file, line};
  if (!(mask >> my_lane & 1u)) {
    stop("simt: lane " + std::to_string(my_lane) + " is not in its own mask; " + where(site));
  }
  const int lanes = std::min(32, m.n - first);
  const unsigned existing = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
  if (mask & ~existing) {
    stop("simt: the mask names lanes that this block does not have; " + where(site));
  }
  Warp& warp = m.warps[static_cast<size_t>(first / 32)];
  Meeting* meeting = nullptr;
  for (auto& known : warp.meetings) {
    if (known->mask == mask) meeting = known.get();
  }
  if (meeting == nullptr) {
    warp.meetings.push_back(std::make_unique<Meeting>());
    meeting = warp.meetings.back().get();
    meeting->mask = mask;
  }
  const int half = meeting->generation & 1;
  if (op == WarpOp::kSync) tsan_release(&meeting->order[half]);
  me->op = op;
  me->mask = mask;
  me->value = value;
  me->source = source;
  me->site = site;
  meeting->arrived |= 1u << my_lane;
  if (meeting->arrived != mask) {
    wait(site);
  } else {
    Thread* lane_threads = &m.threads[static_cast<size_t>(first)];
    conclude(warp, *meeting, lane_threads);
    meeting->arrived = 0;
    ++meeting->generation;
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1u) && lane != my_lane) release(&lane_threads[lane]);
    }
    me->site = Place{};
  }
  if (op == WarpOp::kSync) tsan_acquire(&meeting->order[half]);
  return me->result;
}

}  // namespace simt
