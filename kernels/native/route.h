// Choice of experts for one token. reference: route (kernels/reference.py), Router (moe/layers/router.py).
//
//     s = sigmoid(logits), or softmax over experts      affinities
//     ids = top-k of s + bias inside the best groups    best first; the lower id wins a tie
//     gates = s at ids, normalised, times a factor      the bias never reaches a gate
#pragma once
#include "simd.h"

namespace MOE_LEVEL {
namespace {

struct RouteRule {
  int64_t e, k, groups, kept;  // kept of groups compete: strength is the sum of the two best (softmax: the best) scores
  bool sigmoid, norm;
  float scaling;
};

// x [E], padded -> affinities in its place.
inline void affinities(const RouteRule& r, float* x) {
  const int64_t width = padded(r.e);
  if (r.sigmoid) {
    for (int64_t i = 0; i < width; i += W) store(x + i, sigmoid(load(x + i)) + load(x + i) * 0.f);
    return;
  }
  float top = x[0], total = 0;
  for (int64_t i = 1; i < r.e; i++) top = x[i] > top ? x[i] : top;
  for (int64_t i = 0; i < width; i += W) {
    V d = load(x + i) - top;
    store(x + i, exp2(d * LOG2E) + d * 0.f);
  }
  for (int64_t i = 0; i < r.e; i++) total += x[i];
  for (int64_t i = 0; i < width; i += W) store(x + i, load(x + i) / total);
}

// How many of n values come before each of some, those from i on: larger ones, and earlier ones that are as large.
inline I ranks(const float* values, int64_t n, int64_t i, V some) {
  I place, before = {};
  for (int l = 0; l < W; l++) place[l] = (int32_t)i + l;
  for (int64_t j = 0; j < n; j++) {
    const V other = all(values[j]);
    before -= (other > some) | ((other == some) & (I{} + (int32_t)j < place));
  }
  return before;
}

// The sum of a group's two best scores, or its best.
inline float strength_of(const float* score, int64_t size, bool two) {
  V best = all(-INFINITY), second = best;
  for (int64_t i = 0; i < size; i += W) {
    V s = load(score + i, size - i);
    for (int64_t j = size - i; j < W; j++) s[j] = -INFINITY;
    second = larger(smaller(best, s), second);
    best = larger(s, best);
  }
  const float top = largest(best);
  if (!two) return top;
  const I first = best == all(top);
  const bool tie = sum(first ? all(1.f) : V{}) > 1;
  return top + (tie ? top : largest(first ? second : best));
}

// Scores of all but the best groups become -inf.
inline void close_groups(const RouteRule& r, float* score, float* strength) {
  const int64_t size = r.e / r.groups;
  for (int64_t g = 0; g < r.groups; g++) strength[g] = strength_of(score + g * size, size, r.sigmoid);
  for (int64_t g = 0; g < r.groups; g += W) {
    const I before = ranks(strength, r.groups, g, load(strength + g, r.groups - g));
    for (int64_t l = 0; l < least(W, r.groups - g); l++)
      if (before[l] >= r.kept)
        for (int64_t i = 0; i < size; i++) score[(g + l) * size + i] = -INFINITY;
  }
}

// The first of the best of scores [padded E].
inline int64_t best_of(const float* score, int64_t e) {
  V best = all(-INFINITY);
  I where = {};
  for (int64_t i = 0; i < padded(e); i += W) {
    V s = load(score + i);
    I more = s > best;
    best = more ? s : best;
    where = more ? I{} + (int32_t)i : where;
  }
  const float top = largest(best);
  int64_t id = e - 1;
  for (int i = 0; i < W; i++)
    if (best[i] == top && where[i] + i < id) id = where[i] + i;
  return id;
}

constexpr int LANES = 16;   // that scores are dealt to, in turn
constexpr int RANKED = 64;  // scores, at most, that are ranked one against the other

// What at least k scores reach, if k <= LANES: the k-th largest of the lanes' largest.
inline float bar_of(const float* score, int64_t e, int64_t k) {
  constexpr int N = LANES / W;
  V most[N];
  float each[LANES];
  for (int j = 0; j < N; j++) most[j] = all(-INFINITY);
  for (int64_t i = 0; i < padded(e); i += W) most[i / W % N] = larger(load(score + i), most[i / W % N]);
  for (int j = 0; j < N; j++) store(each + j * W, most[j]);
  V bar = all(INFINITY);
  for (int j = 0; j < N; j++) {
    I above = {};
    for (int i = 0; i < LANES; i++) above -= all(each[i]) > most[j];
    bar = smaller(above < I{} + (int32_t)k ? most[j] : bar, bar);
  }
  return -largest(-bar);
}

// Scores that reach the bar and their ids, in order; no more once there are too many. -> how many
inline int64_t reaching(const float* score, int64_t e, float bar, float* values, int32_t* ids) {
  int64_t n = 0;
#if defined(__AVX512F__)
  const __m512i step = _mm512_set1_epi32(W);
  __m512i id = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < e && n <= RANKED; i += W, id = _mm512_add_epi32(id, step)) {
    const __m512 s = _mm512_loadu_ps(score + i);
    const __mmask16 in = _mm512_cmp_ps_mask(s, _mm512_set1_ps(bar), _CMP_GE_OQ);
    _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(in, s));
    _mm512_storeu_si512(ids + n, _mm512_maskz_compress_epi32(in, id));
    n += __builtin_popcount(in);
  }
#else
  for (int64_t i = 0; i < e && n <= RANKED; i++) {
    values[n] = score[i];
    ids[n] = (int32_t)i;
    n += score[i] >= bar;
  }
#endif
  return n;
}

// scores [padded E], lost -> ids of the k best, best first; the lower id wins a tie.
inline void best_ids(float* score, int64_t e, int64_t k, int64_t* ids) {
  float values[RANKED + 3 * W];
  int32_t at[RANKED + 3 * W];
  const int64_t n = k > LANES ? RANKED + 1 : reaching(score, e, bar_of(score, e, k), values, at);
  if (n > RANKED) {
    for (int64_t i = 0; i < k; i++) {
      ids[i] = best_of(score, e);
      score[ids[i]] = -INFINITY;
    }
    return;
  }
  store(values + n, all(-INFINITY));
  for (int64_t i = 0; i < n; i += W) {
    const I before = ranks(values, n, i, load(values + i));
    for (int l = 0; l < W; l++)
      if (before[l] < k) ids[before[l]] = at[i + l];
  }
}

// logits [padded E] -> ids [K], gates [K]. score: room for padded E; strength: for the groups.
inline void route(const RouteRule& r, float* logits, const float* bias, float* score, float* strength, int64_t* ids,
                  float* gates) {
  affinities(r, logits);
  for (int64_t i = 0; i < padded(r.e); i += W) {
    V s = load(logits + i) + load(bias + i, r.e - i);
    store(score + i, s == s ? s : all(INFINITY));  // NaN comes first, as in PyTorch, so that it shows
  }
  for (int64_t i = r.e; i < padded(r.e); i++) score[i] = -INFINITY;
  if (r.kept < r.groups) close_groups(r, score, strength);
  best_ids(score, r.e, r.k, ids);
  float total = 0;
  for (int64_t k = 0; k < r.k; k++) total += gates[k] = logits[ids[k]];
  const float factor = r.norm ? r.scaling / (total + 1e-20f) : r.scaling;
  for (int64_t k = 0; k < r.k; k++) gates[k] *= factor;
}

}  // namespace
}  // namespace MOE_LEVEL
