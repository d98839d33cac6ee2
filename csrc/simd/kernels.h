// The serial inner loops, one table for each instruction set they were compiled for.
//
// Legend: B rows of the batch · D features · T float or double
//   dots (rows, B)   class-major tile w_j·xn_b, `rows` classes; overwritten by their exponentials
//   inv  (rows,)     1 / max(|w_j|, eps)
#pragma once

#include <cstdint>

namespace expface {

template <typename T>
struct Kernels {
  // inv[j] = 1 / max(|w_j|, eps), squares summed in double. w (rows, dim), contiguous.
  void (*inverse_norms)(const T* w, int64_t rows, int64_t dim, T* inv);

  // best[b] = max(best[b], max_j dots[j][b]·inv[j]); never picks a NaN.
  void (*column_max)(const T* dots, int64_t rows, int64_t batch, const T* inv, T* best);

  // The same, and arg[b] = first + j of the first class that reaches the maximum.
  void (*column_argmax)(const T* dots, int64_t rows, int64_t batch, const T* inv, int64_t first, T* best,
                        int64_t* arg);

  // dots[j][b] = e·inv[j] with e = 2^(scale_log2·dots[j][b]·inv[j] − shift[b]); sums[b] += e.
  // scratch (batch,): holds T sums of at most SUM_ROWS classes before they enter the double sums.
  void (*exponentials)(T* dots, int64_t rows, int64_t batch, const T* inv, T scale_log2, const T* shift,
                       T* scratch, double* sums);

  // acc_j = factor·(acc_j − (acc_j·wn_j)·wn_j), in place; 0 where |w_j| is below eps. acc, w (rows, dim).
  void (*project)(T* acc, const T* w, int64_t rows, int64_t dim, const T* inv, T factor);
};

struct KernelTable {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;

  template <typename T>
  const Kernels<T>& of() const;
};
template <>
inline const Kernels<float>& KernelTable::of<float>() const { return f32; }
template <>
inline const Kernels<double>& KernelTable::of<double>() const { return f64; }

extern const KernelTable table_base;
#ifdef EXPFACE_X86_64
extern const KernelTable table_v3;
extern const KernelTable table_v4;
#endif

}  // namespace expface
