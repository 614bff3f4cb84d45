// The micro-kernel, and the packing of its operands.
//
//     C[M, N] (+)= A[M, K] B[K, N]        C fp32; A and B of one operand type
//
// Where the processor multiplies pairs of bf16 (AVX512-BF16), the operand type of bf16 matrices is a pair of neighbours
// along K, and K counts in pairs; everywhere else it is fp32, and bf16 is widened while it is packed. Left operands are
// read one value at a time, with any two strides; right ones W values at a time: [K][N] with N padded to W.
//
//     pack_row       one row along K               -> a row of a left operand
//     pack_across    rows are steps of K           -> a right operand, or a transposed left one (strides 1 and its width)
//     pack_along     rows are columns of C         -> a right operand: the transpose
//
// All sums of one element of C run over K in order, whatever M and N are: a row's result does not depend on what else is
// in the block.
#pragma once
#include "simd.h"

namespace MOE_LEVEL {
namespace {

#if defined(__AVX512BF16__)
typedef uint32_t pair;
template <class T> struct Operand { typedef float type; typedef float row; static constexpr int step = 1; };
template <> struct Operand<bf16> { typedef pair type; typedef bf16 row; static constexpr int step = 2; };
#else
template <class T> struct Operand { typedef float type; typedef float row; static constexpr int step = 1; };
#endif
// row: what rows of a left operand are stored as; a row of n values, padded to W, is n / step operands.
template <class T> using Op = typename Operand<T>::type;
template <class T> using Row = typename Operand<T>::row;
template <class T> inline int64_t steps(int64_t k) { return (k + Operand<T>::step - 1) / Operand<T>::step; }

inline V fused(V c, float a, const float* b) { return a * load(b) + c; }
#if defined(__AVX512BF16__)
inline V fused(V c, pair a, const pair* b) {
  return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// ------------------------------------------------------------------------------------------------------ micro-kernel

struct Target {
  float* c;
  int64_t ldc;
  const int64_t* at;  // where rows start instead of i * ldc, or null
  bool add;
  float* row(int64_t i) const { return c + (at ? at[i] : i * ldc); }
};

template <int MR, int NV, class O>
inline __attribute__((always_inline)) void tile(
    int64_t k, const O* a, int64_t rs, int64_t cs, const O* b, int64_t ldb, const Target& t, int64_t i0, int64_t j0) {
  V c[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) c[i][j] = t.add ? load(t.row(i0 + i) + j0 + W * j) : V{};
  for (; k > 0; k--) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) c[i][j] = fused(c[i][j], a[i * rs], b + W * j);
    a += cs;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store(t.row(i0 + i) + j0 + W * j, c[i][j]);
}

template <int MR, int NV, class O>
inline void last_rows(
    int64_t m, int64_t k, const O* a, int64_t rs, int64_t cs, const O* b, int64_t ldb, const Target& t, int64_t i0,
    int64_t j0) {
  if constexpr (MR > 0) {
    if (m == MR)
      tile<MR, NV>(k, a, rs, cs, b, ldb, t, i0, j0);
    else
      last_rows<MR - 1, NV>(m, k, a, rs, cs, b, ldb, t, i0, j0);
  }
}

// Tiles fill the registers: MR * NV sums, NV values of B and one of A.
constexpr int rows_of_tile(int nv) { return REGISTERS == 32 ? (nv == 4 ? 6 : nv == 3 ? 8 : 12) : (nv == 2 ? 6 : 12); }
constexpr int WIDEST = REGISTERS == 32 ? 4 : 2;

template <int NV, class O>
__attribute__((noinline)) void panel(
    int64_t m, int64_t k, const O* a, int64_t rs, int64_t cs, const O* b, int64_t ldb, const Target& t, int64_t j0) {
  constexpr int MR = rows_of_tile(NV);
  int64_t i = 0;
  for (; i + MR <= m; i += MR) {
    if (t.at)  // scattered rows are what no processor guesses
      for (int64_t r = i + MR; r < least(i + 2 * MR, m); r++)
        for (int j = 0; j < NV; j++) __builtin_prefetch(t.row(r) + j0 + W * j, 1);
    tile<MR, NV>(k, a + i * rs, rs, cs, b, ldb, t, i, j0);
  }
  if (i < m) last_rows<MR - 1, NV>(m - i, k, a + i * rs, rs, cs, b, ldb, t, i, j0);
}

// n is a multiple of W. K goes in blocks, so that a panel of B stays in the second cache.
template <class O>
void gemm(int64_t m, int64_t n, int64_t k, const O* a, int64_t rs, int64_t cs, const O* b, int64_t ldb, Target t) {
  constexpr int64_t BLOCK = 1024;
  if (k <= 0) {
    if (!t.add)
      for (int64_t i = 0; i < m; i++) memset(t.row(i), 0, n * sizeof(float));
    return;
  }
  for (; k > 0; k -= BLOCK, a += BLOCK * cs, b += BLOCK * ldb, t.add = true) {
    int64_t depth = least(k, BLOCK), j = 0;
    for (; j + WIDEST * W <= n; j += WIDEST * W) panel<WIDEST>(m, depth, a, rs, cs, b + j, ldb, t, j);
    int64_t rest = (n - j) / W;
    if constexpr (WIDEST == 4) {
      if (rest == 3) panel<3>(m, depth, a, rs, cs, b + j, ldb, t, j);
      if (rest == 2) panel<2>(m, depth, a, rs, cs, b + j, ldb, t, j);
    }
    if (rest == 1) panel<1>(m, depth, a, rs, cs, b + j, ldb, t, j);
  }
}
template <class O>
inline void gemm(int64_t m, int64_t n, int64_t k, const O* a, int64_t rs, int64_t cs, const O* b, int64_t ldb, float* c,
                 int64_t ldc, bool add = false) {
  gemm(m, n, k, a, rs, cs, b, ldb, Target{c, ldc, nullptr, add});
}

// ----------------------------------------------------------------------------------------------------------- packing

// n values, zeros up to a multiple of W.
template <class R, class S>
inline void pack_row(const S* source, int64_t n, R* row) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(row + i, load(source + i));
  if (i < n) store(row + i, load(source + i, n - i));
}
inline void pack_row(const bf16* source, int64_t n, bf16* row) {
  memcpy(row, source, n * 2);
  for (int64_t i = n; i < padded(n); i++) row[i].bits = 0;
}

// row(i) points at row i of k rows of n values; out [fill or steps(k)][ldo] with ldo >= padded(n). Zeros where no row is.
template <class F>
inline void pack_across(int64_t k, int64_t n, F row, float* out, int64_t ldo, int64_t fill = 0) {
  int64_t p = 0;
  for (; p < k; p++) {
    auto a = row(p);
    int64_t j = 0;
    for (; j + W <= n; j += W) store(out + p * ldo + j, load(a + j));
    if (j < n) store(out + p * ldo + j, load(a + j, n - j));
  }
  for (; p < fill; p++) memset(out + p * ldo, 0, padded(n) * sizeof(float));
}
#if defined(__AVX512BF16__)
inline U low(V x) { return (U)_mm512_cvtepu16_epi32((__m256i)narrow(x)); }
inline U low(const float* p) { return low(load(p)); }
inline U low(const bf16* p) { return widen(&p->bits); }

template <class F>
inline void pack_across(int64_t k, int64_t n, F row, pair* out, int64_t ldo, int64_t fill = 0) {
  int64_t p = 0;
  for (; 2 * p < k; p++) {
    auto a = row(2 * p), b = 2 * p + 1 < k ? row(2 * p + 1) : nullptr;
    for (int64_t j = 0; j < n; j += W) {
      U even, odd = {};
      if (j + W <= n) {
        even = low(a + j);
        if (b) odd = low(b + j);
      } else {
        even = low(load(a + j, n - j));
        if (b) odd = low(load(b + j, n - j));
      }
      store((float*)(out + p * ldo + j), (V)(even | odd << 16));
    }
  }
  for (; p < fill; p++) memset(out + p * ldo, 0, padded(n) * sizeof(pair));
}
#endif

// row(j) points at row j of n rows of k values; out [steps(k)][ldo] with ldo >= padded(n), zeros for absent rows.
template <class F>
inline void pack_along(int64_t n, int64_t k, F row, float* out, int64_t ldo) {
  for (int64_t j = 0; j < n; j += W)
    for (int64_t p = 0; p < k; p += W) {
      V block[W];
      for (int i = 0; i < W; i++) block[i] = j + i < n ? load(row(j + i) + p, k - p) : V{};
      if (p + W <= k) {
        store_transposed(block, out + p * ldo + j, ldo);
      } else {
        float rest[W * W];
        store_transposed(block, rest, W);
        for (int64_t c = 0; p + c < k; c++) store(out + (p + c) * ldo + j, load(rest + c * W));
      }
    }
}
#if defined(__AVX512BF16__)
template <class F>
inline void pack_along(int64_t n, int64_t k, F row, pair* out, int64_t ldo) {
  for (int64_t j = 0; j < n; j += W)
    for (int64_t p = 0; p < k; p += 2 * W) {
      V block[W];
      for (int i = 0; i < W; i++) {
        if (j + i >= n) {
          block[i] = V{};
        } else if (p + 2 * W <= k) {
          block[i] = *(const Vany*)(row(j + i) + p);
          if (j + W + i < n) __builtin_prefetch(row(j + W + i) + p);
        } else {
          bf16 rest[2 * W] = {};
          memcpy(rest, row(j + i) + p, (k - p) * 2);
          block[i] = *(const Vany*)rest;
        }
      }
      if (p + 2 * W <= k) {
        store_transposed(block, (float*)(out + p / 2 * ldo + j), ldo);
      } else {
        float rest[W * W];
        store_transposed(block, rest, W);
        for (int64_t c = 0; p + 2 * c < k; c++) store((float*)(out + (p / 2 + c) * ldo + j), load(rest + c * W));
      }
    }
}
#endif

}  // namespace
}  // namespace MOE_LEVEL
