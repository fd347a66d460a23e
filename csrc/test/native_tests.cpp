// native_tests.cpp - the ops without Python, against the plainest C++: what the sanitizers run.
//
// Cases are generated from fixed seeds; the first failure is printed and ends the program with 1.
// (The Python tests hold the contracts; this one is small and walks every code path.)
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "../cpu/isa.h"
#include "piece_ops/core/architectures.h"
#include "piece_ops/core/check.h"
#include "piece_ops/math/rounding.h"
#include "piece_ops/ops/accumulate_per_sample_squares.h"
#include "piece_ops/ops/accumulate_squares.h"
#include "piece_ops/ops/add_rounded.h"
#include "piece_ops/ops/gather.h"
#include "piece_ops/ops/sampled_weight_grad.h"
#include "piece_ops/ops/scatter.h"
#include "piece_ops/ops/select_topk.h"
#include "piece_ops/ops/sparse_adamw.h"
#include "piece_ops/ops/total.h"

namespace {

using namespace piece_ops;

int failures = 0;
int checks = 0;

void expect(bool holds, const char* what, int64_t a = 0, int64_t b = 0) {
  ++checks;
  if (holds) return;
  if (failures++ == 0) {
    std::printf("failed: %s (%lld, %lld)\n", what, static_cast<long long>(a),
                static_cast<long long>(b));
  }
}

std::vector<float> make_scores(int kind, int64_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> scores(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const float x = normal(random);
    switch (kind) {
      case 0:
        scores[i] = x * x;
        break;
      case 1:
        scores[i] = std::floor(x * 3.0f);
        break;
      case 2:
        scores[i] = 1.0f;
        break;
      case 3:
        scores[i] = i % 100 ? 0.0f : x;
        break;
      case 4:
        scores[i] = static_cast<float>(i);
        break;
      case 5:
        scores[i] = i > n - 50 ? 100.0f + x : x * 1e-40f;
        break;
      default:
        scores[i] = i % 7 == 0 ? std::numeric_limits<float>::infinity() : -x;
        break;
    }
  }
  return scores;
}

// All candidates in the selection's order, by a stable sort.
std::vector<int64_t> ranked(const std::vector<float>& scores,
                            const std::vector<int64_t>& excluded) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) {
    if (!std::binary_search(excluded.begin(), excluded.end(), i)) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  return order;
}

void test_select_topk_on(const std::vector<float>& scores) {
  const int64_t n = static_cast<int64_t>(scores.size());
  // Three tensors, the middle one empty.
  const int64_t cut = n / 3;
  const ConstView views[3] = {{scores.data(), cut, DType::kFloat32},
                              {nullptr, 0, DType::kFloat32},
                              {scores.data() + cut, n - cut, DType::kFloat32}};
  std::vector<int64_t> excluded;
  for (int64_t i = 5; i < cut; i += 97) excluded.push_back(i);
  const IndexView exclude[3] = {
      {excluded.data(), static_cast<int64_t>(excluded.size())}, {nullptr, 0}, {nullptr, 0}};
  const std::vector<int64_t> order = ranked(scores, excluded);
  const int64_t candidates = static_cast<int64_t>(order.size());
  for (const int64_t k : {int64_t{0}, int64_t{1}, n / 1000, n / 10, n / 2, candidates}) {
    if (k > candidates) continue;
    std::vector<int64_t> wanted(order.begin(), order.begin() + k);
    std::sort(wanted.begin(), wanted.end());
    for (int algorithm = 0; algorithm < kTopkAlgorithmCount; ++algorithm) {
      std::vector<int64_t> indices(static_cast<size_t>(k));
      int64_t counts[3];
      SelectTopkArgs args{};
      args.count = 3;
      args.first = views;
      args.exclude = exclude;
      args.k = k;
      args.algorithm = static_cast<TopkAlgorithm>(algorithm);
      args.indices = indices.data();
      args.counts = counts;
      Context context;
      context.threads = 1 + algorithm % 2;
      cpu::select_topk(context, args);
      for (int64_t s = counts[0]; s < k; ++s) indices[s] += cut;
      expect(indices == wanted, "select_topk", n, k);
    }
  }
}

void test_select_topk() {
  std::mt19937 random(1);
  for (const int64_t n : {1, 63, 64, 65, 1000, 1025, 40000, 70001}) {
    for (int kind = 0; kind < 7; ++kind) test_select_topk_on(make_scores(kind, n, random));
  }
}

void test_narrow_types() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const uint16_t half = static_cast<uint16_t>(h);
    const float from_bf16 = bf16_to_float(half);
    const float from_fp16 = fp16_to_float(half);
    if (!std::isnan(from_bf16)) expect(float_to_bf16(from_bf16) == half, "bf16 round trip", h);
    if (!std::isnan(from_fp16)) expect(float_to_fp16(from_fp16) == half, "fp16 round trip", h);
  }
}

void test_updates() {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  const int64_t n = 100003;
  std::vector<float> weight(n), grad(n), square_sums(n), sums(n);
  for (int64_t i = 0; i < n; ++i) weight[i] = grad[i] = normal(random);
  std::vector<int64_t> index;
  for (int64_t i = 3; i < n; i += 7) index.push_back(i);
  const int64_t k = static_cast<int64_t>(index.size());
  const IndexView indices{index.data(), k};
  Context context;
  context.threads = 2;

  const ConstView grads{grad.data(), n, DType::kFloat32};
  float* square_pointer = square_sums.data();
  float* sum_pointer = sums.data();
  cpu::accumulate_squares(context, {1, &grads, &square_pointer, &sum_pointer, 0.5f});
  for (int64_t i = 0; i < n; ++i) {
    expect(square_sums[i] == 0.5f * (grad[i] * grad[i]) && sums[i] == 0.5f * grad[i],
           "accumulate_squares", i);
  }

  std::vector<float> values(k), m(k), v(k);
  const ConstView source{weight.data(), n, DType::kFloat32};
  const View gathered{values.data(), k, DType::kFloat32};
  cpu::gather(context, {1, &source, &indices, &gathered});
  for (int64_t s = 0; s < k; ++s) expect(values[s] == weight[index[s]], "gather", s);

  const std::vector<float> before = weight;
  float *value_pointer = values.data(), *m_pointer = m.data(), *v_pointer = v.data();
  const View target{weight.data(), n, DType::kFloat32};
  SparseAdamwArgs step{
      1,      &target,    &indices,   &value_pointer,
      &grads, &m_pointer, &v_pointer, make_adamw_factors(1, 0.1, 0.9, 0.999, 1e-8, 0)};
  cpu::sparse_adamw(context, step);
  for (int64_t i = 0, s = 0; i < n; ++i) {
    if (s < k && index[s] == i) {
      expect(weight[i] == values[s++], "sparse_adamw writes the master", i);
    } else {
      expect(weight[i] == before[i], "sparse_adamw leaves the rest", i);
    }
  }

  std::vector<uint16_t> half(n, 0x1234);
  const View half_target{half.data(), n, DType::kBFloat16};
  const ConstView masters{values.data(), k, DType::kFloat32};
  cpu::scatter(context, {1, &half_target, &indices, &masters});
  for (int64_t s = 0; s < k; ++s) {
    expect(half[index[s]] == float_to_bf16(values[s]), "scatter", s);
  }

  // Two lists in one pass: the second over the first, nothing beside them; other threads too.
  std::vector<int64_t> other;
  for (int64_t i = 0; i < n; i += 3) other.push_back(i);
  std::vector<uint16_t> ones(k, 1), twos(other.size(), 2);
  const IndexView second_indices{other.data(), static_cast<int64_t>(other.size())};
  const ConstView first_values{ones.data(), k, DType::kBFloat16};
  const ConstView second_values{twos.data(), second_indices.n, DType::kBFloat16};
  std::vector<uint16_t> want(n, 7);
  for (const int64_t i : index) want[i] = 1;
  for (const int64_t i : other) want[i] = 2;
  std::fill(half.begin(), half.end(), uint16_t{7});
  cpu::scatter_two(context, {1, &half_target, &indices, &first_values},
                   {1, &half_target, &second_indices, &second_values});
  for (int64_t i = 0; i < n; ++i) expect(half[i] == want[i], "scatter_two", i);

  const double one = cpu::total(context, {1, &grads});
  context.threads = 1;
  expect(cpu::total(context, {1, &grads}) == one, "total does not depend on threads");

  std::vector<uint16_t> rounded(n, float_to_bf16(1.0f));
  const int64_t begin = (int64_t{1} << 32) - n / 2;  // positions pass 2^32
  for (const int threads : {1, 3}) {
    context.threads = threads;
    std::fill(rounded.begin(), rounded.end(), float_to_bf16(1.0f));
    const AddRoundedArgs args{n, rounded.data(), grad.data(), 5, begin};
    expect(!cpu::add_rounded(context, args), "add_rounded sees finite sums");
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t at = static_cast<uint64_t>(begin + i);
      const uint32_t key = 5 ^ hash_32(static_cast<uint32_t>(at >> 32));
      const uint32_t bits = hash_32(static_cast<uint32_t>(at) ^ key);
      expect(rounded[i] == float_to_bf16_at_random(1.0f + grad[i], bits), "add_rounded", i);
    }
  }
  context.threads = 1;

  index.back() = n;
  bool thrown = false;
  try {
    cpu::scatter(context, {1, &half_target, &indices, &masters});
  } catch (const Error&) {
    thrown = true;
  }
  expect(thrown, "a position out of range is refused");
}

// Whole numbers, so that every order of additions gives the same sums.
void test_per_sample_squares() {
  std::mt19937 random(3);
  std::uniform_int_distribution<int> digit(-3, 3);
  const int64_t out = 109, in = 131, tokens = 700, stride = 140;
  const int64_t offsets[] = {0, 5, 5, 610, 611, tokens};
  const float scales[] = {1.0f, 3.0f, -2.0f, 0.5f, 1.0f};
  std::vector<float> grad(tokens * stride), input(tokens * stride);
  for (float& x : grad) x = static_cast<float>(digit(random));
  for (float& x : input) x = static_cast<float>(digit(random));
  std::vector<double> want_squares(out * in), want_sums(out * in);
  for (int n = 0; n < 5; ++n) {
    for (int64_t i = 0; i < out * in; ++i) {
      double g = 0;
      for (int64_t t = offsets[n]; t < offsets[n + 1]; ++t) {
        g += grad[t * stride + i / in] * input[t * stride + i % in];
      }
      want_squares[i] += scales[n] * g * scales[n] * g;
      want_sums[i] += scales[n] * g;
    }
  }
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const auto narrow = [&](const std::vector<float>& x) {
      std::vector<uint16_t> half(x.size());
      for (size_t i = 0; i < x.size(); ++i) {
        half[i] = dtype == DType::kBFloat16 ? float_to_bf16(x[i]) : float_to_fp16(x[i]);
      }
      return half;
    };
    const std::vector<uint16_t> half_grad = narrow(grad), half_input = narrow(input);
    const bool is_float = dtype == DType::kFloat32;
    std::vector<float> squares(out * in), sums(out * in);
    AccumulatePerSampleSquaresArgs args{};
    args.grad_output = {is_float ? static_cast<const void*>(grad.data()) : half_grad.data(), out,
                        stride, dtype};
    args.input = {is_float ? static_cast<const void*>(input.data()) : half_input.data(), in, stride,
                  dtype};
    args.samples = 5;
    args.offsets = offsets;
    args.scales = scales;
    args.square_sums = squares.data();
    args.sums = sums.data();
    Context context;
    context.threads = 2;
    const NonFinite bad = cpu::accumulate_per_sample_squares(context, args);
    expect(bad.tensor == -1, "accumulate_per_sample_squares: all is finite");
    for (int64_t i = 0; i < out * in; ++i) {
      expect(squares[i] == want_squares[i] && sums[i] == want_sums[i],
             "accumulate_per_sample_squares", i);
    }
  }
}

// One entry in the order that the op's header fixes.
float sampled_entry(const ConstMatrix& g, int64_t i, const std::vector<float>& x, int64_t j,
                    int64_t width) {
  const uint16_t* grads = static_cast<const uint16_t*>(g.data);
  float sum = 0.0f;
  for (int64_t first = 0; first < g.rows; first += kSampledBlock) {
    float lanes[kSampledLanes] = {};
    for (int64_t t = first; t < std::min(first + kSampledBlock, g.rows); ++t) {
      float& lane = lanes[t % kSampledLanes];
      lane = lane + bf16_to_float(grads[t * g.row_stride + i]) * x[t * width + j];
    }
    for (int64_t half = kSampledLanes / 2; half > 0; half /= 2) {
      for (int64_t l = 0; l < half; ++l) lanes[l] = lanes[l] + lanes[l + half];
    }
    sum = sum + lanes[0];
  }
  return sum;
}

void test_sampled_weight_grad() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (const int64_t tokens : {0, 1, 31, 256, 300}) {
    for (const int64_t out : {1, 15, 200}) {
      for (const int64_t width : {1, 16, 37, 38}) {
        // The matrices are exactly as large as they must be: a read past an end is an error.
        std::vector<uint16_t> grads(tokens ? (tokens - 1) * (out + 3) + out : 0);
        std::vector<float> x(tokens * width);
        std::vector<uint16_t> half(tokens * width);
        for (uint16_t& g : grads) g = float_to_bf16(normal(random));
        for (int64_t i = 0; i < tokens * width; ++i) {
          half[i] = float_to_bf16(normal(random));
          x[i] = bf16_to_float(half[i]);
        }
        const bool few = width == 38;  // indices, and both matrices of one dtype
        std::vector<int64_t> index;
        for (int64_t i = 0; i < out * width;
             i += 1 + static_cast<int64_t>(random() % (few ? 200 : 40))) {
          index.push_back(i);
        }
        std::vector<float> values(index.size(), -1.0f);
        const ConstMatrix g{grads.data(), tokens, out, out + 3, DType::kBFloat16};
        Context context;
        context.threads = 1 + static_cast<int>(out % 2);
        const ConstMatrix wide{x.data(), tokens, width, width, DType::kFloat32};
        const ConstMatrix narrow{half.data(), tokens, width, width, DType::kBFloat16};
        cpu::sampled_weight_grad(context, {g,
                                           few ? narrow : wide,
                                           {index.data(), static_cast<int64_t>(index.size())},
                                           values.data()});
        for (size_t s = 0; s < index.size(); ++s) {
          const float want = sampled_entry(g, index[s] / width, x, index[s] % width, width);
          expect(values[s] == want, "sampled_weight_grad", tokens, index[s]);
        }
      }
    }
  }
}

void test_architectures() {
  const auto fits = [](const char* list, int capability) {
    return any_runs_on(parse_architectures(list), capability);
  };
  const char* const shipped = "80-real;90-real;100-real;120";
  for (const int capability : {80, 86, 89, 90, 100, 103, 120, 121, 130}) {
    expect(fits(shipped, capability), "architectures: shipped", capability);
  }
  for (const int capability : {75, 70}) {
    expect(!fits(shipped, capability), "architectures: too old", capability);
  }
  expect(!fits("90-real", 100) && fits("90-virtual", 100), "architectures: PTX alone goes on");
  expect(!fits("86-real", 80), "architectures: an earlier minor version");
  expect(fits("90a-real", 90) && !fits("90a", 100), "architectures: 90a is 9.0 alone");
  expect(fits("100f", 103) && !fits("100f", 120), "architectures: 100f is 10.x");
  expect(!fits("native", 90) && !fits("", 90), "architectures: no number is nothing");
}

}  // namespace

int main() {
  try {
    std::printf("piece_ops native tests, %s\n", cpu::active_isa().name);
  } catch (const Error& error) {
    std::printf("skipped: %s\n", error.what());
    return 0;
  }
  test_architectures();
  test_select_topk();
  test_narrow_types();
  test_updates();
  test_sampled_weight_grad();
  test_per_sample_squares();
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures ? 1 : 0;
}
