// One token of logits [V]: the best, or one drawn at a temperature. reference: _sample (moe/inference/decoding.py).
//
//     log-probability under the distribution drawn from: NaN where a logit is not a number, or infinite
#pragma once
#include "simd.h"

namespace MOE_LEVEL {
namespace {

// Number `number` of stream `key`, in [0, 1): splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
inline double uniform(uint64_t key, uint64_t number) {
  uint64_t z = key + (number + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return (double)((z ^ z >> 31) >> 12) * 0x1p-52;
}

// Vectors of logits, the last one filled up with -inf.
inline V logits_at(const float* logits, int64_t j, int64_t vocab) {
  if (j + W <= vocab) return load(logits + j);
  float rest[W];
  for (int i = 0; i < W; i++) rest[i] = j + i < vocab ? logits[j + i] : -INFINITY;
  return load(rest);
}

// exp((x - top) / temperature), 0 where that is too small to matter; top: finite. NaN stays NaN.
inline V chance_of(V x, float top, float per_temperature) {
  V less = (x - top) * (LOG2E * per_temperature), p = exp2(less);
  return less == less ? (less < all(-125.f) ? V{} : p) : less;
}

// The first of the largest.
inline void best_of(const float* logits, int64_t vocab, int64_t* id, float* logprob) {
  V best = all(-INFINITY), total = {};
  I where = {};
  for (int64_t j = 0; j < vocab; j += W) {
    V v = logits_at(logits, j, vocab);
    I more = v > best;
    best = more ? v : best;
    where = more ? I{} + (int32_t)j : where;
  }
  const float top = largest(best);
  *id = vocab - 1;
  for (int i = 0; i < W; i++)
    if (best[i] == top && where[i] + i < *id) *id = where[i] + i;
  for (int64_t j = 0; j < vocab; j += W) total += chance_of(logits_at(logits, j, vocab), top, 1.f);
  *logprob = -logf(sum(total));
}

// The first whose chance, with those before it, exceeds share u of the total; sums in float64.
inline void draw(const float* logits, int64_t vocab, float temperature, double u, int64_t* id, float* logprob) {
  const float per_temperature = 1.f / temperature;
  V best = all(-INFINITY);
  double total = 0, before = 0;
  for (int64_t j = 0; j < vocab; j += W) best = larger(logits_at(logits, j, vocab), best);
  const float top = largest(best);
  for (int64_t j = 0; j < vocab; j += W) total += sum(chance_of(logits_at(logits, j, vocab), top, per_temperature));
  *id = vocab - 1;
  for (int64_t j = 0; j < vocab && before <= u * total; j += W) {
    const V chance = chance_of(logits_at(logits, j, vocab), top, per_temperature);
    if (before + sum(chance) <= u * total) {
      before += sum(chance);
      continue;
    }
    for (int i = 0; i < W && before <= u * total; i++)
      if (chance[i] > 0) {
        before += chance[i];
        *id = j + i;
      }
    break;
  }
  *logprob = (logits[*id] - top) * per_temperature - (float)log(total);
}

}  // namespace
}  // namespace MOE_LEVEL
