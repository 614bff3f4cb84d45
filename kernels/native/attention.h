// What both passes of attention.cpp share: sizes, rows of heads and their rotation, packed keys, exponentials.
//
// Rows of a head lie in the caller's tensors at any strides (interface.h: Heads). They are copied once, channels side
// by side and rotary ones turned, and packed where a right operand is wanted: `across` with rows as steps of K, `along`
// with rows as columns (gemm.h).
#pragma once
#include "gemm.h"
#include "interface.h"

namespace MOE_LEVEL {
namespace {

constexpr int64_t PANEL = 64;  // keys at a time
constexpr int64_t AHEAD = 16;  // positions from asking for a row to reading it

template <class T>
struct Shape {
  int64_t nope, rope, d, v;
  int64_t dp, vp, rp;  // d, v, rope, padded to whole vectors
  int64_t dr;          // d, padded to what pack_along takes at once
  int64_t dk, vk;      // d, v in steps along K
  explicit Shape(const Attention& a)
      : nope(a.nope), rope(a.rope), d(a.nope + a.rope), v(a.value), dp(padded(d)), vp(padded(v)), rp(padded(rope)) {
    const int64_t unit = Operand<T>::step * W;
    dr = (d + unit - 1) / unit * unit;
    dk = steps<T>(d), vk = steps<T>(v);
  }
};

template <class T>
inline T* row_of(const Heads& x, int64_t b, int64_t t, int64_t h) {
  return (T*)x.at + b * x.batch + t * x.time + h * x.head;
}

// Rows of a left operand, `width` numbers apart, as gemm reads them.
template <class T>
inline const Op<T>* operands(const Row<T>* rows) { return (const Op<T>*)rows; }
template <class T>
inline int64_t apart(int64_t width) { return width / Operand<T>::step; }

// Rows are a right operand, and a left one's transpose, as they stand: where K does not count in pairs.
template <class T>
constexpr bool SAME = Operand<T>::step == 1;

template <class S, class R>
inline void copy(const S* from, int64_t n, R* to) {
  for (int64_t j = 0; j < n; j += W) store(to + j, load(from + j, n - j), n - j);
}
template <class R>
inline void copy_scaled(const float* from, int64_t n, float factor, R* to) {
  for (int64_t j = 0; j < n; j += W) store(to + j, load(from + j, n - j) * factor, n - j);
}

// ------------------------------------------------------------------------------------------------------------ rotation

typedef uint64_t L __attribute__((vector_size(4 * W)));  // a pair of channels a lane
typedef uint32_t Half __attribute__((vector_size(2 * W)));
typedef Half Halfany __attribute__((aligned(4), may_alias));

inline L twice(const float* p, int64_t n) {
  float buffer[W / 2] = {};
  if (n < W / 2) p = (const float*)memcpy(buffer, p, n * sizeof(float));
#if defined(__AVX512F__)  // compilers widen in two halves
  L x = (L)_mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i*)p));
#else
  L x = __builtin_convertvector(*(const Halfany*)p, L);
#endif
  return x | x << 32;
}

// n channels, neighbours a pair: (x, y) -> (x cos - y sin, x sin + y cos). BACK: by the negative angle.
constexpr uint64_t FORTH = uint64_t(1) << 31, BACK = uint64_t(1) << 63;  // whose sine gets the minus
struct Angle {
  const float *cos, *sin;
};
template <class S, class R>
inline void turn(const S* from, Angle angle, int64_t n, uint64_t sense, float factor, R* to) {
  for (int64_t j = 0; j < n; j += W) {
    V x = load(from + j, n - j) * factor;
    V c = (V)twice(angle.cos + j / 2, (n - j) / 2), s = (V)(twice(angle.sin + j / 2, (n - j) / 2) ^ sense);
    V other = (V)((L)x << 32 | (L)x >> 32);
    store(to + j, x * c + other * s, n - j);
  }
}

// Of the positions of row b from t on.
struct Angles {
  Angle at;
  int64_t pairs;
  Angles(const Attention& a, int64_t b, int64_t t) : pairs(a.rope / 2) {
    const int64_t from = b * a.angle_batch + t * pairs;
    at = Angle{a.cos + from, a.sin + from};
  }
  Angle next() {
    Angle now = at;
    at.cos += pairs, at.sin += pairs;
    return now;
  }
};

// ------------------------------------------------------------------------------------------------------------- packing

// A document of one head: positions begin to begin + n of row b.
struct Document {
  int64_t b, h, begin, n;
};

inline int64_t end_of_document(const Attention& a, int64_t b, int64_t begin) {
  if (!a.first) return a.t;
  const int32_t* first = a.first + b * a.t;
  int64_t end = begin + 1;
  while (end < a.t && first[end] == first[begin]) end++;
  return end;
}

// Rows of one head from position t on, one after the other. They lie far apart, which no processor guesses: what comes
// AHEAD positions later is asked for.
template <class T>
struct Rows {
  T* at;
  int64_t next, left;
  Rows(const Attention& a, const Heads& x, int64_t b, int64_t t, int64_t h)
      : at(row_of<T>(x, b, t, h)), next(x.time), left(a.t - 1 - t) {}
  T* take(int64_t n) {
    prefetch(at + least(AHEAD, left) * next, n);
    T* row = at;
    at += next, left--;
    return row;
  }
};

template <class T>
inline void query_rows(const Attention& a, const Shape<T>& s, const Document& doc, int64_t q0, int64_t m,
                       Row<T>* to) {
  Rows<const T> rows(a, a.q, doc.b, doc.begin + q0, doc.h);
  Angles angles(a, doc.b, doc.begin + q0);
  for (int64_t i = 0; i < m; i++, to += s.dp) {
    const T* q = rows.take(s.d);
    copy(q, s.nope, to);
    if (s.rope) turn(q + s.nope, angles.next(), s.rope, FORTH, 1.f, to + s.nope);
  }
}

// turned: row b's k_rope, turned, padded(rope) apart.
template <class T>
inline void key_rows(const Attention& a, const Shape<T>& s, const Document& doc, const Row<T>* turned, Row<T>* to) {
  Rows<const T> keys(a, a.k, doc.b, doc.begin, doc.h), values(a, a.v, doc.b, doc.begin, doc.h);
  turned += doc.begin * s.rp;
  for (int64_t i = 0; i < doc.n; i++, to += s.dr, turned += s.rp) {
    values.take(s.v);
    copy(keys.take(s.nope), s.nope, to);
    copy(turned, s.rope, to + s.nope);
  }
}

// k_rope of all heads of row b, turned [T][padded rope].
template <class T>
void turn_keys(const Attention& a, const Shape<T>& s, int64_t b, Row<T>* to) {
  Rows<const T> rows(a, a.k_rope, b, 0, 0);
  Angles angles(a, b, 0);
  for (int64_t t = 0; t < a.t; t++) turn(rows.take(s.rope), angles.next(), s.rope, FORTH, 1.f, to + t * s.rp);
}

// Right operands whose columns are keys stand in panels of PANEL columns, [steps][PANEL] each, one behind the other:
// rows as long as a sequence would compete for the same places of the first cache.
template <class O>
inline O* column(O* panels, int64_t steps, int64_t j) {
  return panels + j / PANEL * steps * PANEL + j % PANEL;
}

// Keys along [d steps][n] for scores, and across [n steps][dp] for dq. rows: room for PANEL of them.
template <class T>
void pack_keys(const Attention& a, const Shape<T>& s, const Document& doc, const Row<T>* turned, Row<T>* rows,
               Op<T>* along, Op<T>* across) {
  for (int64_t j = 0; j < doc.n; j += PANEL) {
    const int64_t m = least(PANEL, doc.n - j);
    auto row = [&](int64_t i) { return rows + i * s.dr; };
    key_rows(a, s, Document{doc.b, doc.h, doc.begin + j, m}, turned, rows);
    pack_along(m, s.dr, row, column(along, apart<T>(s.dr), j), PANEL);
    if (across) pack_across(m, s.dp, row, across + j / Operand<T>::step * s.dp, s.dp, steps<T>(padded(m)));
  }
}

// --------------------------------------------------------------------------------------------------------- arithmetic

// Coefficients of 2^x for |x| <= 1/2, highest first; 2^0 is 1. Relative error below 2e-7, and 1.1e-4 for what bf16
// holds.
template <class T>
struct Series {
  static constexpr int terms = 6;
  static constexpr float of[] = {1.3264727e-3f, 9.6715127e-3f, 5.5507337e-2f, 2.4022242e-1f, 6.9314698e-1f, 1.f};
};
template <>
struct Series<bf16> {
  static constexpr int terms = 4;
  static constexpr float of[] = {5.5008931e-2f, 2.4221096e-1f, 6.9328293e-1f, 1.f};
};

// x -> 2^x for x <= 0, near enough for T; NaN stays NaN: see exp2. N vectors a step: one alone would wait for itself.
template <class T, int N>
inline __attribute__((always_inline)) void power(V (&x)[N]) {
  V n[N], p[N];
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) n[i] = (V)_mm512_roundscale_ps((__m512)x[i], 8);
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) x[i] -= n[i];
#else
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) x[i] = larger(all(-126.f), x[i]);
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) n[i] = x[i] + 12582912.f;
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) x[i] -= n[i] - 12582912.f;
#endif
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) p[i] = x[i] * Series<T>::of[0] + Series<T>::of[1];
#pragma GCC unroll 8
  for (int c = 2; c < Series<T>::terms; c++)
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) p[i] = p[i] * x[i] + Series<T>::of[c];
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) {
#if defined(__AVX512F__)
    x[i] = (V)_mm512_scalef_ps((__m512)p[i], (__m512)n[i]);
#else
    x[i] = (V)((U)p[i] + ((U)n[i] << 23));
#endif
  }
}
template <class T>
inline float power_of(float x) {
  V one[1] = {all(x)};
  power<T>(one);
  return one[0][0];
}

inline V first_lanes(int64_t n, V x, V otherwise) {
  static const int32_t lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  I lane;
  memcpy(&lane, lanes, sizeof lane);
  return lane < (int32_t)n ? x : otherwise;
}

}  // namespace
}  // namespace MOE_LEVEL
