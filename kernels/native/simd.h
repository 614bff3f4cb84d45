// Vectors of fp32 and bf16, the same source for every level: compilers' vector types, and intrinsics where AVX-512 has
// an instruction that they do not reach.
//
// One level is one set of compiler flags (build.py). Everything lives in an anonymous namespace inside the level's, so
// that no function compiled for one processor can be taken by the linker for another's. For the same reason nothing
// here uses the standard library's templates.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace MOE_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes of fp32
constexpr int REGISTERS = 32;
#elif defined(__AVX__)
constexpr int W = 8;
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int REGISTERS = 32;
#else
constexpr int W = 4;
constexpr int REGISTERS = 16;
#endif

struct bf16 {
  uint16_t bits;
};

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));
typedef V Vany __attribute__((aligned(2), may_alias));  // at any address
typedef H Hany __attribute__((aligned(2), may_alias));

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline V all(float x) { return x - V{}; }
inline V bits_of(I x) { return (V)x; }
#if defined(__AVX512F__)
inline V larger(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
inline V smaller(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline V larger(V a, V b) { return a > b ? a : b; }
inline V smaller(V a, V b) { return a < b ? a : b; }
#endif

inline float wide(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
inline float wide(float x) { return x; }

// Round to nearest, ties to even; NaN stays NaN.
inline H narrow(V x) {
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)x);
#else
  U u = (U)x;
  U r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  r = (x == x) ? r : U{} + 0x7fc0;
  return __builtin_convertvector((U)r, H);
#endif
}

// Compilers widen 16 numbers in two halves; the processor does it at once.
inline U widen(const uint16_t* p) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  return __builtin_convertvector(*(const Hany*)p, U);
#endif
}

inline V load(const float* p) { return *(const Vany*)p; }
inline V load(const bf16* p) { return (V)(widen(&p->bits) << 16); }
inline void store(float* p, V x) { *(Vany*)p = x; }
inline void store(bf16* p, V x) { *(Hany*)p = narrow(x); }

// The first n <= W of a row: loads fill up with zeros, stores leave what follows alone.
template <class T>
inline V load(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T buffer[W] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store(T* p, V x, int64_t n) {
  if (n >= W) return store(p, x);
  T buffer[W];
  store(buffer, x);
  memcpy(p, buffer, n * sizeof(T));
}

inline V root(V x) {
#if defined(__AVX512F__)
  return (V)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
  return (V)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < W; i++) x[i] = sqrtf(x[i]);
  return x;
#endif
}

// Asks for a row of n values that will be read soon, and that no processor guesses.
template <class T>
inline void prefetch(const T* p, int64_t n) {
  for (int64_t j = 0; j < n; j += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + j);
}

inline float sum(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s[W];
  store(s, x);
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
#endif
}
inline float largest(V x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < W; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// 2^x for x in [-126, 126], clamped outside; relative error below 3e-7. Adding 1.5 * 2^23 leaves the nearest integer in
// the low bits, which become the exponent; the rest, within half, goes through a polynomial.
inline V exp2(V x) {
  x = smaller(larger(x, all(-126.f)), all(126.f));
  const V magic = all(12582912.f);
  V shifted = x + magic;
  V f = x - (shifted - magic);
  V p = all(1.3333558e-3f);
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  return (V)((I)p + ((I)shifted << 23));
}
constexpr float LOG2E = 1.44269504f;
inline V sigmoid(V x) { return 1.f / (1.f + exp2(x * -LOG2E)); }

// Transposes W rows of W 32-bit lanes, and stores the result's rows `ldo` apart.
inline void store_transposed(const V* rows, float* out, int64_t ldo) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32((__m512i)rows[2 * i], (__m512i)rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)rows[2 * i], (__m512i)rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(out + i * ldo, _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * ldo, _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd));
    _mm512_storeu_si512(out + (4 + i) * ldo, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88));
    _mm512_storeu_si512(out + (12 + i) * ldo, _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd));
  }
#else
  for (int c = 0; c < W; c++)
    for (int r = 0; r < W; r++) memcpy(out + c * ldo + r, (const float*)(rows + r) + c, 4);
#endif
}

}  // namespace
}  // namespace MOE_LEVEL
