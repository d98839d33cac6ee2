// What the CPU backend does between its matrix products: raw pointers, no torch, no Python.
//
// Legend: B batch rows · D features · rows: classes of one tile · T float or double
//   dots (rows, B) class-major tile of w_j·xn_b · inv (rows,) 1/max(|w_j|, eps)
//   local_labels (B,) the row of the tile that holds the target, anything outside [0, rows) where none does
// Equation numbers are those of docs/math.md. `threads` ≥ 1; nothing here allocates more than O(threads·B).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace expface {

// inv[j] = 1/max(|w_j|, eps), eq. 1. w (rows, dim) contiguous.
template <typename T>
void inverse_norms(const T* w, int64_t rows, int64_t dim, T* inv, int threads);

// One tile of eq. 3: masks the target, takes each row's largest exponent `tile_max` (B,), in units of log 2
// and −inf where the tile holds no negative, and the sum `tile_sum` (B,) of 2^(exponent − tile_max).
// `dots` becomes 2^(exponent − tile_max)·inv. hardest (B,): index of the class of the maximum, −1 where none;
// not computed where it is null.
template <typename T>
void forward_tile(T* dots, int64_t rows, int64_t batch, const T* inv, double scale, const int64_t* local_labels,
                  T* tile_max, double* tile_sum, int64_t* hardest, int threads);

// Turns `dots` into 2^(exponent − shift)/|w_j|, 0 at the target: p_bj/|w_j| for shift (B,) = log2 l_b (eq. 9).
// shift must be finite.
template <typename T>
void backward_tile(T* dots, int64_t rows, int64_t batch, const T* inv, double scale,
                   const int64_t* local_labels, const T* shift, int threads);

// acc_j = factor·(acc_j − (acc_j·wn_j)·wn_j), in place (eq. 11). acc, w (rows, dim) contiguous.
template <typename T>
void project(T* acc, const T* w, int64_t rows, int64_t dim, const T* inv, double factor, int threads);

// Kernels chosen for this machine, the ones it could run, and a switch for tests and comparisons.
std::string instruction_set();
std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string& name);


}  // namespace expface
