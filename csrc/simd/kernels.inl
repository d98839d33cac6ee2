// The one source of the vector kernels. A file that includes it defines EXPFACE_TABLE and
// EXPFACE_TABLE_NAME and is compiled for one instruction set (setup.py). Plain loops over fixed lanes, which
// every compiler vectorises without being allowed to reorder a sum (-ffast-math breaks the exponential).
//
// Nothing of the C++ library: an inline function of its, compiled here for AVX-512 and kept by the linker
// for everyone, would crash older machines. For the same reason all of this is in an unnamed namespace.

#include <math.h>
#include <string.h>

#include "simd/kernels.h"

namespace expface {
namespace {

constexpr double NORM_EPS = 1e-12;
constexpr double LN2 = 0.693147180559945309417232121458176568;
constexpr int64_t SUM_ROWS = 1024;  // classes that one T sum may run over

template <typename T>
struct Float;
template <>
struct Float<float> {
  using Int = int32_t;
  static constexpr int MANTISSA = 23, BIAS = 127, DEGREE = 7, LANES = 16;
  static constexpr float ROUND = 12582912.0f;  // 1.5·2^23: adding it rounds to a whole number
};
template <>
struct Float<double> {
  using Int = int64_t;
  static constexpr int MANTISSA = 52, BIAS = 1023, DEGREE = 13, LANES = 8;
  static constexpr double ROUND = 6755399441055744.0;  // 1.5·2^52
};

// ln2^k / k!, the Taylor coefficients of 2^f; |f| ≤ 1/2 leaves 5e-9 (float) and 5e-18 (double).
template <typename T, int K>
struct Coefficient {
  static constexpr double value = Coefficient<T, K - 1>::value * LN2 / K;
};
template <typename T>
struct Coefficient<T, 0> {
  static constexpr double value = 1.0;
};

template <typename T, int K>
struct Horner {
  static inline T eval(T f) {
    return Horner<T, K + 1>::eval(f) * f + static_cast<T>(Coefficient<T, K>::value);
  }
};
template <>
struct Horner<float, Float<float>::DEGREE> {
  static inline float eval(float) {
    return static_cast<float>(Coefficient<float, Float<float>::DEGREE>::value);
  }
};
template <>
struct Horner<double, Float<double>::DEGREE> {
  static inline double eval(double) { return Coefficient<double, Float<double>::DEGREE>::value; }
};

// 2^z for z up to the largest exponent; 0 below the smallest normal number, NaN for NaN.
template <typename T>
inline T exp2_flushed(T z) {
  using Int = typename Float<T>::Int;
  const T round = Float<T>::ROUND;
  const T whole_shifted = z + round;
  const T fraction = z - (whole_shifted - round);
  Int bits, zero_bits;
  memcpy(&bits, &whole_shifted, sizeof bits);
  memcpy(&zero_bits, &round, sizeof zero_bits);
  const Int power_bits = (bits - zero_bits + Float<T>::BIAS) << Float<T>::MANTISSA;
  T power;
  memcpy(&power, &power_bits, sizeof power);
  const T value = Horner<T, 0>::eval(fraction) * power;
  return z < static_cast<T>(1 - Float<T>::BIAS) ? static_cast<T>(0) : value;
}

// Σ a_d·b_d in Acc, over independent lanes.
template <typename Acc, typename T>
inline Acc dot(const T* a, const T* b, int64_t dim) {
  constexpr int L = Float<T>::LANES;
  Acc lanes[L] = {};
  int64_t d = 0;
  for (; d + L <= dim; d += L)
    for (int k = 0; k < L; ++k) lanes[k] += static_cast<Acc>(a[d + k]) * static_cast<Acc>(b[d + k]);
  Acc total = 0;
  for (; d < dim; ++d) total += static_cast<Acc>(a[d]) * static_cast<Acc>(b[d]);
  for (int k = 0; k < L; ++k) total += lanes[k];
  return total;
}

template <typename T>
void inverse_norms(const T* w, int64_t rows, int64_t dim, T* inv) {
  for (int64_t j = 0; j < rows; ++j) {
    const double norm = sqrt(dot<double>(w + j * dim, w + j * dim, dim));
    inv[j] = static_cast<T>(1.0 / (norm < NORM_EPS ? NORM_EPS : norm));
  }
}

template <typename T>
void column_max(const T* dots, int64_t rows, int64_t batch, const T* inv, T* __restrict best) {
  for (int64_t j = 0; j < rows; ++j) {
    const T* row = dots + j * batch;
    const T scale = inv[j];
    for (int64_t b = 0; b < batch; ++b) {
      const T value = row[b] * scale;
      best[b] = value > best[b] ? value : best[b];
    }
  }
}

template <typename T>
void column_argmax(const T* dots, int64_t rows, int64_t batch, const T* inv, int64_t first, T* __restrict best,
                   int64_t* __restrict arg) {
  for (int64_t j = 0; j < rows; ++j) {
    const T* row = dots + j * batch;
    const T scale = inv[j];
    for (int64_t b = 0; b < batch; ++b) {
      const T value = row[b] * scale;
      const bool higher = value > best[b];
      best[b] = higher ? value : best[b];
      arg[b] = higher ? first + j : arg[b];
    }
  }
}

template <typename T>
void exponentials(T* __restrict dots, int64_t rows, int64_t batch, const T* inv, T scale_log2,
                  const T* __restrict shift, T* __restrict scratch, double* __restrict sums) {
  for (int64_t start = 0; start < rows; start += SUM_ROWS) {
    const int64_t stop = start + SUM_ROWS < rows ? start + SUM_ROWS : rows;
    for (int64_t b = 0; b < batch; ++b) scratch[b] = 0;
    for (int64_t j = start; j < stop; ++j) {
      T* __restrict row = dots + j * batch;
      const T inverse = inv[j], to_exponent = scale_log2 * inverse;
      for (int64_t b = 0; b < batch; ++b) {
        const T e = exp2_flushed<T>(row[b] * to_exponent - shift[b]);
        scratch[b] += e;
        row[b] = e * inverse;
      }
    }
    for (int64_t b = 0; b < batch; ++b) sums[b] += static_cast<double>(scratch[b]);
  }
}

template <typename T>
void project(T* __restrict acc, const T* __restrict w, int64_t rows, int64_t dim, const T* inv, T factor) {
  for (int64_t j = 0; j < rows; ++j) {
    T* __restrict a = acc + j * dim;
    const T* __restrict v = w + j * dim;
    const bool dead = inv[j] >= static_cast<T>(1.0 / NORM_EPS);
    const T along = dot<T>(a, v, dim) * inv[j] * inv[j];
    for (int64_t d = 0; d < dim; ++d) {
      const T value = factor * (a[d] - along * v[d]);
      a[d] = dead ? static_cast<T>(0) : value;
    }
  }
}

template <typename T>
constexpr Kernels<T> kernels() {
  return {inverse_norms<T>, column_max<T>, column_argmax<T>, exponentials<T>, project<T>};
}

}  // namespace

const KernelTable EXPFACE_TABLE = {EXPFACE_TABLE_NAME, kernels<float>(), kernels<double>()};

}  // namespace expface
