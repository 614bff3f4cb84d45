// Products of few rows with matrices that are read where they lie, once and in order: what decoding is made of.
//
//     along     C[M, N] = A[M, K] B[N, K]^T      rows of B lie along K: weights of a Linear, cached keys
//     across    C[M, N] = A[M, K] B[K, N]        rows of B are steps of K: cached values
//
// A's rows are Row<T>, zeros up to ahead<T>(K). Up to seven rows meet each row of B as it streams past, and the lanes of
// their sums are added up at the end: no packed copy could be read faster than memory gives it. More rows become the
// right operand of a micro-kernel, with B's as its left one.
#pragma once
#include "gemm.h"
#include "scratch.h"

namespace MOE_LEVEL {
namespace {

// ------------------------------------------------------------------------------------------------- vectors along K

// Values of one vector along K: pairs of bf16 where the processor multiplies them, else fp32.
template <class T> constexpr int64_t lanes() { return W * Operand<T>::step; }
template <class T> inline int64_t ahead(int64_t n) { return (n + lanes<T>() - 1) / lanes<T>() * lanes<T>(); }

inline V along_k(const float* p) { return load(p); }
inline V dot(V c, V a, V b) { return a * b + c; }
#if defined(__AVX512BF16__)
inline __m512bh along_k(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh along_k(const bf16* p, int64_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}
inline V dot(V c, __m512bh a, __m512bh b) { return (V)_mm512_dpbf16_ps((__m512)c, a, b); }
#else
inline V along_k(const bf16* p) { return load(p); }
inline V along_k(const bf16* p, int64_t n) { return load(p, n); }
#endif
inline V along_k(const float* p, int64_t n) {
#if defined(__AVX512F__)
  return (V)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
  return load(p, n);
#endif
}

// Lane i of the result is the sum over the lanes of v[i].
inline V sums_of_lanes(const V* v) {
#if defined(__AVX512F__)
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; i++) {
    __m512 x = (__m512)v[2 * i], y = (__m512)v[2 * i + 1];
    a[i] = _mm512_unpacklo_ps(x, y) + _mm512_unpackhi_ps(x, y);
  }
  for (int i = 0; i < 4; i++) {
    __m512d x = (__m512d)a[2 * i], y = (__m512d)a[2 * i + 1];
    b[i] = (__m512)_mm512_unpacklo_pd(x, y) + (__m512)_mm512_unpackhi_pd(x, y);
  }
  for (int i = 0; i < 2; i++)
    c[i] = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd);
  return (V)(_mm512_shuffle_f32x4(c[0], c[1], 0x88) + _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#elif defined(__AVX__)
  __m256 a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = _mm256_hadd_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
  for (int i = 0; i < 2; i++) b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
  return (V)(_mm256_permute2f128_ps(b[0], b[1], 0x20) + _mm256_permute2f128_ps(b[0], b[1], 0x31));
#else
  float columns[W * W];
  store_transposed(v, columns, W);
  V s = load(columns);
  for (int i = 1; i < W; i++) s += load(columns + i * W);
  return s;
#endif
}

// ------------------------------------------------------------------------------------------------------ operands

template <class T>
struct Rows {
  const Row<T>* x;
  int64_t ld;
  const int64_t* at = nullptr;  // where rows start instead of i * ld
  const Row<T>* operator()(int64_t i) const { return x + (at ? at[i] : i * ld); }
};

// Where results go, whole vectors at a time: rows have room for padded(N), unless `exact`.
struct Sink {
  float* c;
  int64_t ld;
  bool add = false;
  const int64_t* at = nullptr;
  const float* gate = nullptr;  // a factor for each row
  bool exact = false;
  void put(int64_t i, int64_t j, V v, int64_t n) const {
    float* p = c + (at ? at[i] : i * ld) + j;
    if (gate) v *= gate[i];
    if (exact && n < W) return store(p, add ? v + load(p, n) : v, n);
    store(p, add ? v + load(p) : v);
  }
};

// Towards the second cache: where reading is about to jump, or to leave the order that the processor sees coming.
inline void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i, 0, 2);
}

constexpr int64_t AHEAD = 4096;  // a page: the processor's own reading ahead ends at a page
constexpr int64_t STRIP = 48, MOST = 4 * W;  // of a product with more: rows of B and of A at a time

// What a thread needs for products with more than a few rows.
template <class T>
struct FewRoom {
  Op<T>* a;   // [K steps, MOST]
  Row<T>* b;  // [STRIP, K], where B cannot be read where it lies
  float* c;   // [STRIP, MOST]
  FewRoom(Cut& cut, int64_t k) {
    a = cut.take<Op<T>>(steps<T>(k) * MOST);
    b = cut.take<Row<T>>(STRIP * ahead<T>(k));
    c = cut.take<float>(STRIP * MOST);
  }
};

// ---------------------------------------------------------------------------------------------------------- dots

// Rows of B one after the other, so that memory is read in order: 1.5-2 times faster than several at a time (measured).
template <int M, class T>
__attribute__((noinline)) void dots(const Rows<T>& a, const T* b, int64_t ldb, int64_t n, int64_t k, const Sink& out) {
  constexpr int64_t L = lanes<T>();
  const Row<T>* x[M];
  for (int i = 0; i < M; i++) x[i] = a(i);
  for (int64_t j = 0; j < n; j += W, b += W * ldb) {
    V s[M][W];
    const int rows = (int)least(W, n - j);
    for (int r = rows; r < W; r++)
      for (int i = 0; i < M; i++) s[i][r] = V{};
    for (int r = 0; r < rows; r++) {
      const T* row = b + r * ldb;
      __builtin_prefetch((const char*)row + AHEAD, 0, 2);
      V even[M] = {}, odd[M] = {};
      int64_t p = 0;
      for (; p + 2 * L <= k; p += 2 * L) {
        const auto w0 = along_k(row + p), w1 = along_k(row + p + L);
        for (int i = 0; i < M; i++) {
          even[i] = dot(even[i], w0, along_k(x[i] + p));
          odd[i] = dot(odd[i], w1, along_k(x[i] + p + L));
        }
      }
      if (p + L <= k) {
        const auto w = along_k(row + p);
        for (int i = 0; i < M; i++) even[i] = dot(even[i], w, along_k(x[i] + p));
        p += L;
      }
      if (p < k) {
        const auto w = along_k(row + p, k - p);
        for (int i = 0; i < M; i++) odd[i] = dot(odd[i], w, along_k(x[i] + p));
      }
      for (int i = 0; i < M; i++) s[i][r] = even[i] + odd[i];
    }
    for (int i = 0; i < M; i++) out.put(i, j, sums_of_lanes(s[i]), n - j);
  }
}

// -------------------------------------------------------------------------------------------------------- turned

// Half a vector of sums: up to so many rows of A cost half, and lie half as far apart.
#if defined(__AVX512F__)
typedef float Half __attribute__((vector_size(2 * W)));
typedef Half HalfAny __attribute__((aligned(4), may_alias));
inline Half fused(Half c, float a, const float* b) { return a * *(const HalfAny*)b + c; }
inline void store(float* p, Half x) { *(HalfAny*)p = x; }
#else
typedef V Half;
#endif
#if defined(__AVX512BF16__)
inline Half fused(Half c, pair a, const pair* b) {
  const __m256i right = _mm256_loadu_si256((const __m256i*)b);
  return (Half)_mm256_dpbf16_ps((__m256)c, (__m256bh)_mm256_set1_epi32(a), (__m256bh)right);
}
#endif
constexpr int64_t HALF = sizeof(Half) / 4;

inline int64_t width_of(int64_t m) { return m <= HALF ? HALF : padded(m); }

// K in fours, so that the addresses of B's rows are made less often; rows further on are fetched, for so many at a time
// are not the order that the processor sees coming.
template <int R, class X, class O>
inline __attribute__((always_inline)) void narrow_tile(int64_t k, const O* b, int64_t rs, const O* a, float* c) {
  constexpr int64_t N = sizeof(X) / 4;
  const char* later = (const char*)(b + 4 * R * rs);
  X s[R] = {};
  int64_t p = 0;
  for (; p + 4 <= k; p += 4) {
    for (int64_t i = 0; i < (int64_t)(4 * R * sizeof(O)); i += 64)
      __builtin_prefetch(later + p * R * sizeof(O) + i, 0, 2);
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++)
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) s[i] = fused(s[i], b[i * rs + p + u], a + (p + u) * W);
  }
  for (; p < k; p++)
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) s[i] = fused(s[i], b[i * rs + p], a + p * W);
#pragma GCC unroll 16
  for (int i = 0; i < R; i++) store(c + i * N, s[i]);
}
template <class X, class O>
__attribute__((noinline)) void narrow(int64_t rows, int64_t k, const O* b, int64_t rs, const O* a, float* c) {
  constexpr int64_t N = sizeof(X) / 4;
  constexpr int R = REGISTERS == 32 ? 12 : 6;
  for (; rows >= R; rows -= R, b += R * rs, c += R * N) narrow_tile<R, X>(k, b, rs, a, c);
  for (; rows >= 4; rows -= 4, b += 4 * rs, c += 4 * N) narrow_tile<4, X>(k, b, rs, a, c);
  for (; rows > 0; rows--, b += rs, c += N) narrow_tile<1, X>(k, b, rs, a, c);
}

template <class T> inline bool lies_in_operands(const float*, int64_t, int64_t) { return true; }
template <class T> inline bool lies_in_operands(const bf16* b, int64_t ldb, int64_t k) {
  return sizeof(Row<T>) == 2 && k % 2 == 0 && ldb % 2 == 0 && (uintptr_t)b % 4 == 0;
}

// out [N][width_of(M)] = B A^T, for A [K steps][padded(M)] from pack_along.
template <class T>
void turned(int64_t m, const Op<T>* a, const T* b, int64_t ldb, int64_t n, int64_t k, float* out,
            const FewRoom<T>& room) {
  constexpr int64_t step = Operand<T>::step;
  const bool lies = lies_in_operands<T>(b, ldb, k);
  const int64_t width = ahead<T>(k), depth = steps<T>(k), ldo = width_of(m), strip = lies ? n : STRIP;
  for (; n > 0; n -= strip, b += strip * ldb, out += strip * ldo) {
    const int64_t rows = least(strip, n);
    if (!lies)
      for (int64_t j = 0; j < rows; j++) pack_row(b + j * ldb, k, room.b + j * width);
    const Op<T>* left = lies ? (const Op<T>*)b : (const Op<T>*)room.b;
    const int64_t rs = (lies ? ldb : width) / step;
    if (m <= HALF)
      narrow<Half>(rows, depth, left, rs, a, out);
    else if (m <= W)
      narrow<V>(rows, depth, left, rs, a, out);
    else
      gemm(rows, ldo, depth, left, rs, 1, a, ldo, out, ldo);
  }
}

// --------------------------------------------------------------------------------------------------------- along

template <class T>
void strips(int64_t m, const Rows<T>& a, const T* b, int64_t ldb, int64_t n, int64_t k, const Sink& out,
            const FewRoom<T>& room) {
  for (int64_t i0 = 0; i0 < m; i0 += MOST) {
    const int64_t rows = least(MOST, m - i0), width = width_of(rows);
    pack_along(rows, k, [&](int64_t i) { return a(i0 + i); }, room.a, padded(rows));
    for (int64_t j0 = 0; j0 < n; j0 += STRIP) {
      const int64_t strip = least(STRIP, n - j0);
      if (rows > W) fetch(b + (j0 + STRIP) * ldb, STRIP * ldb * sizeof(T));
      turned(rows, room.a, b + j0 * ldb, ldb, strip, k, room.c, room);
      for (int64_t j = 0; j < strip; j += W)
        for (int64_t i = 0; i < rows; i += W) {
          V block[W];
          float back[W * W];
          for (int r = 0; r < W; r++) block[r] = j + r < strip ? load(room.c + (j + r) * width + i, width) : V{};
          store_transposed(block, back, W);
          for (int r = 0; r < least(W, rows - i); r++) out.put(i0 + i + r, j0 + j, load(back + r * W), n - j0 - j);
        }
    }
  }
}

template <class T>
void along(int64_t m, const Rows<T>& a, const T* b, int64_t ldb, int64_t n, int64_t k, const Sink& out,
           const FewRoom<T>& room) {
  switch (m) {
    case 1: return dots<1>(a, b, ldb, n, k, out);
    case 2: return dots<2>(a, b, ldb, n, k, out);
    case 3: return dots<3>(a, b, ldb, n, k, out);
    case 4: return dots<4>(a, b, ldb, n, k, out);
    case 5: return dots<5>(a, b, ldb, n, k, out);
    case 6: return dots<6>(a, b, ldb, n, k, out);
    case 7: return dots<7>(a, b, ldb, n, k, out);
    default: return strips(m, a, b, ldb, n, k, out, room);
  }
}

// -------------------------------------------------------------------------------------------------------- across

// Operands of step p of K, of W columns from j on; `last`: so many of them are there.
inline V step_of(const float* b, int64_t ldb, int64_t p, int64_t, int64_t j, int64_t last) {
  return last < W ? load(b + p * ldb + j, last) : load(b + p * ldb + j);
}
inline V times(V c, float a, V b) { return a * b + c; }
#if defined(__AVX512BF16__)
inline U step_of(const bf16* b, int64_t ldb, int64_t p, int64_t k, int64_t j, int64_t last) {
  const bf16 *even = b + 2 * p * ldb + j, *odd = even + ldb;
  const bool pair = 2 * p + 1 < k;
  if (last < W) return low(load(even, last)) | (pair ? low(load(odd, last)) << 16 : U{});
  return low(even) | (pair ? low(odd) << 16 : U{});
}
inline V times(V c, pair a, U b) {
  return (V)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
}
#else
inline V step_of(const bf16* b, int64_t ldb, int64_t p, int64_t, int64_t j, int64_t last) {
  return last < W ? load(b + p * ldb + j, last) : load(b + p * ldb + j);
}
#endif

template <int M, int NV, class T>
inline __attribute__((always_inline)) void across_tile(const Op<T>* a, int64_t rs, int64_t cs, const T* b, int64_t ldb,
                                                       int64_t n, int64_t k, float* out, int64_t ldo, int64_t j) {
  V c[M][NV] = {};
  for (int64_t p = 0; p < steps<T>(k); p++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const auto step = step_of(b, ldb, p, k, j + W * v, NV == 1 ? n - j : W);
#pragma GCC unroll 8
      for (int i = 0; i < M; i++) c[i][v] = times(c[i][v], a[i * rs + p * cs], step);
    }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(out + i * ldo + j + W * v, c[i][v]);
}

template <int M, class T>
__attribute__((noinline)) void across_rows(const Op<T>* a, int64_t rs, int64_t cs, const T* b, int64_t ldb, int64_t n,
                                           int64_t k, float* out, int64_t ldo) {
  constexpr int NV = REGISTERS == 32 ? (M > 4 ? 2 : 4) : (M > 4 ? 1 : 2);
  int64_t j = 0;
  for (; j + NV * W <= n; j += NV * W) across_tile<M, NV>(a, rs, cs, b, ldb, n, k, out, ldo, j);
  for (; j < n; j += W) across_tile<M, 1>(a, rs, cs, b, ldb, n, k, out, ldo, j);
}

// out [M][ldo] with room for padded(N). A: operands with two strides, as in gemm.
template <class T>
void across(int64_t m, const Op<T>* a, int64_t rs, int64_t cs, const T* b, int64_t ldb, int64_t n, int64_t k,
            float* out, int64_t ldo) {
  for (; m >= 8; m -= 8, a += 8 * rs, out += 8 * ldo) across_rows<8>(a, rs, cs, b, ldb, n, k, out, ldo);
  for (; m >= 4; m -= 4, a += 4 * rs, out += 4 * ldo) across_rows<4>(a, rs, cs, b, ldb, n, k, out, ldo);
  if (m == 3) across_rows<3>(a, rs, cs, b, ldb, n, k, out, ldo);
  if (m == 2) across_rows<2>(a, rs, cs, b, ldb, n, k, out, ldo);
  if (m == 1) across_rows<1>(a, rs, cs, b, ldb, n, k, out, ldo);
}

}  // namespace
}  // namespace MOE_LEVEL
