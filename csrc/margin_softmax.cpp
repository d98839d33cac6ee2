#include "margin_softmax.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "parallel.h"
#include "simd/kernels.h"

namespace expface {
namespace {

constexpr double LOG2_E = 1.442695040888963407359924681001892137;
constexpr int64_t MIN_ELEMENTS = 1 << 15;  // below this a second thread costs more than it brings

std::vector<const KernelTable*> runnable_tables() {
  std::vector<const KernelTable*> tables{&table_base};
#ifdef EXPFACE_X86_64
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v3) tables.push_back(&table_v3);
  if (v4) tables.push_back(&table_v4);
#endif
  return tables;
}

const KernelTable*& chosen_table() {
  static const KernelTable* table = runnable_tables().back();
  return table;
}

int useful_threads(int64_t elements, int threads) { return elements < MIN_ELEMENTS ? 1 : threads; }

template <typename T>
void mask_targets(T* dots, int64_t rows, int64_t batch, const int64_t* local_labels) {
  for (int64_t b = 0; b < batch; ++b)
    if (local_labels[b] >= 0 && local_labels[b] < rows)
      dots[local_labels[b] * batch + b] = -std::numeric_limits<T>::infinity();
}

// dots → 2^(exponent − shift)·inv on all threads; returns each thread's sums (threads, B).
template <typename T>
std::vector<double> exponentials(T* dots, int64_t rows, int64_t batch, const T* inv, double scale,
                                 const T* shift, int threads) {
  std::vector<double> sums(threads * batch, 0.0);
  std::vector<T> scratch(threads * batch);
  const auto& kernels = chosen_table()->of<T>();
  const T scale_log2 = static_cast<T>(scale * LOG2_E);
  parallel_for(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    kernels.exponentials(dots + begin * batch, end - begin, batch, inv + begin, scale_log2, shift,
                         scratch.data() + thread * batch, sums.data() + thread * batch);
  });
  return sums;
}

// best (threads, B) and, where asked for, arg (threads, B): each thread's largest cosine and its class.
template <typename T>
void column_maxima(const T* dots, int64_t rows, int64_t batch, const T* inv, int threads, std::vector<T>& best,
                   std::vector<int64_t>* arg) {
  const auto& kernels = chosen_table()->of<T>();
  parallel_for(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    const T* first = dots + begin * batch;
    T* mine = best.data() + thread * batch;
    if (arg)
      kernels.column_argmax(first, end - begin, batch, inv + begin, begin, mine, arg->data() + thread * batch);
    else
      kernels.column_max(first, end - begin, batch, inv + begin, mine);
  });
}

}  // namespace

template <typename T>
void inverse_norms(const T* w, int64_t rows, int64_t dim, T* inv, int threads) {
  const auto& kernels = chosen_table()->of<T>();
  parallel_for(rows, useful_threads(rows * dim, threads), [&](int64_t begin, int64_t end, int) {
    kernels.inverse_norms(w + begin * dim, end - begin, dim, inv + begin);
  });
}

template <typename T>
void forward_tile(T* dots, int64_t rows, int64_t batch, const T* inv, double scale, const int64_t* local_labels,
                  T* tile_max, double* tile_sum, int64_t* hardest, int threads) {
  threads = useful_threads(rows * batch, threads);
  mask_targets(dots, rows, batch, local_labels);

  constexpr T NONE = -std::numeric_limits<T>::infinity();
  std::vector<T> best(threads * batch, NONE);
  std::vector<int64_t> arg(hardest ? threads * batch : 0, -1);
  column_maxima(dots, rows, batch, inv, threads, best, hardest ? &arg : nullptr);

  const T scale_log2 = static_cast<T>(scale * LOG2_E);
  std::vector<T> shift(batch);
  for (int64_t b = 0; b < batch; ++b) {
    int winner = 0;  // threads hold rising classes, so the first of equals is the lowest class
    for (int t = 1; t < threads; ++t)
      if (best[t * batch + b] > best[winner * batch + b]) winner = t;
    const T cosine = best[winner * batch + b];
    tile_max[b] = cosine == NONE ? NONE : scale_log2 * cosine;
    shift[b] = cosine == NONE ? T(0) : tile_max[b];
    if (hardest) hardest[b] = arg[winner * batch + b];
  }

  const auto sums = exponentials(dots, rows, batch, inv, scale, shift.data(), threads);
  for (int64_t b = 0; b < batch; ++b) {
    tile_sum[b] = 0.0;
    for (int t = 0; t < threads; ++t) tile_sum[b] += sums[t * batch + b];
  }
}

template <typename T>
void backward_tile(T* dots, int64_t rows, int64_t batch, const T* inv, double scale,
                   const int64_t* local_labels, const T* shift, int threads) {
  mask_targets(dots, rows, batch, local_labels);
  exponentials(dots, rows, batch, inv, scale, shift, useful_threads(rows * batch, threads));
}

template <typename T>
void project(T* acc, const T* w, int64_t rows, int64_t dim, const T* inv, double factor, int threads) {
  const auto& kernels = chosen_table()->of<T>();
  parallel_for(rows, useful_threads(rows * dim, threads), [&](int64_t begin, int64_t end, int) {
    kernels.project(acc + begin * dim, w + begin * dim, end - begin, dim, inv + begin, static_cast<T>(factor));
  });
}

#define EXPFACE_INSTANTIATE(T)                                                                              \
  template void inverse_norms<T>(const T*, int64_t, int64_t, T*, int);                                      \
  template void forward_tile<T>(T*, int64_t, int64_t, const T*, double, const int64_t*, T*, double*,        \
                                int64_t*, int);                                                             \
  template void backward_tile<T>(T*, int64_t, int64_t, const T*, double, const int64_t*, const T*, int);    \
  template void project<T>(T*, const T*, int64_t, int64_t, const T*, double, int);
EXPFACE_INSTANTIATE(float)
EXPFACE_INSTANTIATE(double)
#undef EXPFACE_INSTANTIATE

std::string instruction_set() { return chosen_table()->name; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const auto* table : runnable_tables()) names.emplace_back(table->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  for (const auto* table : runnable_tables())
    if (name == table->name) {
      chosen_table() = table;
      return;
    }
  throw std::invalid_argument("instruction set must be one of instruction_sets(), got '" + name + "'");
}

}  // namespace expface
