// Softmax down the columns of scores, a key a row: all heads at once, without a sum across lanes.
//
//     scores [keys + SPARE, width], the last SPARE rows HIDDEN    ->  weights exp2(score - top), as left operands of a
//     width: whole vectors, or HALF (few.h)                           product over keys; top and total of each column
#pragma once
#include "few.h"

namespace MOE_LEVEL {
namespace {

constexpr int64_t SPARE = 3;      // up to four keys are taken at a time
constexpr float HIDDEN = -1e30f;  // a score that gives no weight

// exp2(x - top), 0 where that is too small to matter; NaN stays NaN.
inline V weight_of(V x, V top) {
  V less = x - top, p = exp2(less) + less * 0.f;
  return less < all(-125.f) ? V{} : p;
}

// Weights as left operands: of W columns of one key (of two, where pairs are multiplied), or of HALF columns of four.
inline void keep(float* out, V even, V) { store(out, even); }
inline void keep_halves(float* out, V first, V second) {
  store(out, first);
  store(out + W, second);
}
template <class O> constexpr int64_t KEYS = 1;
#if defined(__AVX512BF16__)
template <> constexpr int64_t KEYS<pair> = 2;
// Where each 16 bits of the pairs come from, in two vectors of bf16 that stand side by side.
#define WORDS(a, b) \
  a, b, a + 1, b + 1, a + 2, b + 2, a + 3, b + 3, a + 4, b + 4, a + 5, b + 5, a + 6, b + 6, a + 7, b + 7
typedef uint16_t Words __attribute__((vector_size(4 * W)));
inline void keep_words(pair* out, V first, V second, Words from) {
  const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16((__m512i)from, bits));
}
inline void keep(pair* out, V even, V odd) { keep_words(out, even, odd, Words{WORDS(0, 16), WORDS(8, 24)}); }
inline void keep_halves(pair* out, V first, V second) {
  keep_words(out, first, second, Words{WORDS(0, 8), WORDS(16, 24)});
}
#undef WORDS
#endif

// Scores [keys + SPARE, width] -> left operands [steps, width], and each column's largest score and total.
template <class O>
void softmax(int64_t keys, int64_t width, const float* scores, O* out, float* tops, float* totals) {
  for (int64_t c = 0; c < width; c += W) {
    V top = all(HIDDEN), total = {};
    for (int64_t i = 0; i < keys; i++) top = larger(load(scores + i * width + c), top);
    for (int64_t i = 0; i < keys; i += KEYS<O>) {
      V even = weight_of(load(scores + i * width + c), top), odd = {};
      if constexpr (KEYS<O> == 2) odd = weight_of(load(scores + (i + 1) * width + c), top);
      total += even + odd;
      keep(out + i / KEYS<O> * width + c, even, odd);
    }
    store(tops + c, top);
    store(totals + c, total);
  }
}

// The same where a row is half a vector: four keys at a time.
template <class O>
void softmax_of_halves(int64_t keys, const float* scores, O* out, float* tops, float* totals) {
  V top = all(HIDDEN), total = {};
  float fold[2 * W];
  for (int64_t i = 0; i < keys; i += 2) top = larger(load(scores + i * HALF), top);
  for (int i = 0; i < 2; i++) store(fold + i * W, top);
  top = larger(top, load(fold + HALF));
  for (int64_t i = 0; i < keys; i += 4) {
    V first = weight_of(load(scores + i * HALF), top), second = weight_of(load(scores + i * HALF + W), top);
    total += first + second;
    keep_halves(out + i / KEYS<O> * HALF, first, second);
  }
  store(tops, top);
  for (int i = 0; i < 2; i++) store(fold + i * W, total);
  store(totals, total + load(fold + HALF));
}

}  // namespace
}  // namespace MOE_LEVEL
