// Causal attention, forward and backward, with MLA's rotary channels or without. reference: latent_attention, attention
// (kernels/reference.py).
//
//     q = [q_nope, turned q_rope], k = [k_nope, turned k_rope]        [T, d], d = nope + rope, of one head and document
//     s = scale q k^T, p = softmax(s) = exp(s - lse), o = p v         [T, T] in blocks, [T, value]
//
//     ds = p . (do v^T - delta), delta = sum of do . o                dq = scale ds k, dk = scale ds^T q, dv = p^T do
//
// A document is a sequence of its own; a unit of work is one head of one row of the batch, so results have the same
// bits for any number of threads. Exponents are to the base 2.
//
// Forward: keys and values are packed once, then queries go by blocks: scores against up to BLOCK keys, their softmax
// relative to the largest so far, values. Backward: queries are packed once, then keys go by panels, small enough that
// scores, dp and ds are still in the first cache where they are used; p and ds of up to BLOCK queries are kept for dv
// and dk, whose sums then never leave the registers. Only blocks on the diagonal are masked; what lies above it is left
// out by narrow blocks there and by the K of products.
#include "attention.h"
#include "scratch.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
#endif

namespace MOE_LEVEL {
namespace {

constexpr int64_t QUERIES = 48;          // a block: whole tiles for heads of 16 to 64 channels
constexpr int64_t BLOCK = 12 * QUERIES;  // keys whose scores are held (forward), queries whose p and ds are (backward)
constexpr int64_t EDGE = 16, RIM = 16;   // keys (forward), queries (backward) at a time on the diagonal

// ------------------------------------------------------------------------------------------------------------- forward

template <class T>
struct ForwardRoom {
  Op<T>*keys, *values;
  Row<T>*rows, *q, *p;
  float *s, *o;
  ForwardRoom(Cut& cut, const Attention& a, const Shape<T>& s_) {
    keys = cut.take<Op<T>>(apart<T>(s_.dr) * (a.t + PANEL));
    values = cut.take<Op<T>>(steps<T>(a.t) * s_.vp);
    rows = cut.take<Row<T>>(PANEL * s_.dr);
    q = cut.take<Row<T>>(QUERIES * s_.dp);
    p = cut.take<Row<T>>(QUERIES * BLOCK + 3 * W);
    s = cut.take<float>(QUERIES * BLOCK + 3 * W);
    o = cut.take<float>(QUERIES * s_.vp);
  }
};

// m queries from q0 on against `keys` keys from k0 on: s [m][BLOCK], where a query sees the key.
template <class T>
void scores(const Shape<T>& s, const ForwardRoom<T>& r, int64_t m, int64_t q0, int64_t k0, int64_t keys) {
  const int64_t below = q0 - k0;
  for (int64_t j = 0, width; j < keys; j += width) {
    width = j < below ? least(PANEL, below - j) : least(EDGE, padded(keys - j));
    const int64_t i = j > below ? j - below : 0;
    gemm(m - i, width, s.dk, operands<T>(r.q + i * s.dp), apart<T>(s.dp), 1, column(r.keys, apart<T>(s.dr), k0 + j),
         PANEL, r.s + i * BLOCK + j, BLOCK);
  }
}

// W rows' results at once: across the lanes of one row each step would wait for the last.
inline V each_largest(const V* rows) {
  float t[W * W];
  store_transposed(rows, t, W);
  V x = load(t);
  for (int i = 1; i < W; i++) x = larger(x, load(t + i * W));
  return x;
}
inline V each_sum(const V* rows) {
  float t[W * W];
  store_transposed(rows, t, W);
  V x = load(t);
  for (int i = 1; i < W; i++) x += load(t + i * W);
  return x;
}

inline V largest_of(const float* s, int64_t n) {
  const int64_t whole = n / W * W;
  V most = all(-INFINITY);
  for (int64_t j = 0; j < whole; j += W) most = larger(most, load(s + j));
  return whole < n ? larger(most, first_lanes(n - whole, load(s + whole), most)) : most;
}

inline void store_two(float* p, V a, V b) {
  store(p, a);
  store(p + W, b);
}
#if defined(__AVX512BF16__)
inline void store_two(bf16* p, V a, V b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#endif

// N vectors of scores, of which the query sees n -> 2^(scale s - most) as p. Returns their sums.
template <class T, int N, bool MASKED>
inline __attribute__((always_inline)) V soften(const float* s, int64_t n, float scale, float most, Row<T>* p) {
  V x[N], sums = {};
#pragma GCC unroll 8
  for (int i = 0; i < N; i++) x[i] = load(s + i * W) * scale - most;
  power<T>(x);
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 2) {
    if (MASKED) x[i] = first_lanes(n - i * W, x[i], V{}), x[i + 1] = first_lanes(n - (i + 1) * W, x[i + 1], V{});
    sums += x[i] + x[i + 1];
    store_two(p + i * W, x[i], x[i + 1]);
  }
  return sums;
}

// A row of scores s [n], and zeros up to `fill`; up to 3 vectors behind both are written.
template <class T>
inline V soften_row(const float* s, int64_t n, int64_t fill, float scale, float most, Row<T>* p) {
  V sums = {};
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) sums += soften<T, 4, false>(s + j, n, scale, most, p + j);
  if (j + 2 * W < n) {
    sums += soften<T, 4, true>(s + j, n - j, scale, most, p + j);
    j += 4 * W;
  } else if (j < n) {
    sums += soften<T, 2, true>(s + j, n - j, scale, most, p + j);
    j += 2 * W;
  }
  for (; j < fill; j += W) store(p + j, V{});
  return sums;
}

// What the queries of a block have seen so far: largest scores, and sums relative to them, of each lane apart.
struct Seen {
  float most[QUERIES];
  V sums[QUERIES];
};

// Scores of m queries -> their largest so far. Where it grew, what was summed relative to the old one follows.
template <class T>
void rise(const Shape<T>& s, const ForwardRoom<T>& r, int64_t m, int64_t q0, int64_t k0, int64_t keys, float scale,
          Seen& seen) {
  for (int64_t i = 0; i < m; i += W) {
    V rows[W];
    float now[W];
    for (int64_t x = 0; x < W; x++)
      rows[x] = i + x < m ? largest_of(r.s + (i + x) * BLOCK, least(keys, q0 - k0 + i + x + 1)) : V{};
    store(now, each_largest(rows) * scale);
    for (int64_t x = i; x < least(i + W, m); x++) {
      const float before = seen.most[x];
      if (now[x - i] <= before) continue;
      seen.most[x] = now[x - i];
      if (!k0) continue;
      const float factor = power_of<T>(before - now[x - i]);
      seen.sums[x] *= factor;
      for (int64_t c = 0; c < s.vp; c += W) store(r.o + x * s.vp + c, load(r.o + x * s.vp + c) * factor);
    }
  }
}

template <class T>
void forward_block(const Attention& a, const Shape<T>& s, const Document& doc, int64_t q0, const ForwardRoom<T>& r) {
  constexpr int64_t ROWS = 12;  // queries that share the K of a product with values
  const int64_t m = least(QUERIES, doc.n - q0);
  const float scale = a.scale * LOG2E;
  Seen seen;
  for (int64_t i = 0; i < QUERIES; i++) seen.most[i] = -INFINITY, seen.sums[i] = V{};
  query_rows(a, s, doc, q0, m, r.q);
  for (int64_t k0 = 0; k0 < q0 + m; k0 += BLOCK) {
    const int64_t keys = least(BLOCK, q0 + m - k0);
    scores(s, r, m, q0, k0, keys);
    rise(s, r, m, q0, k0, keys, scale, seen);
    for (int64_t i = 0; i < m; i += ROWS) {
      const int64_t rows = least(ROWS, m - i), last = least(keys, q0 - k0 + i + rows);
      for (int64_t x = i; x < i + rows; x++)
        seen.sums[x] += soften_row<T>(r.s + x * BLOCK, least(keys, q0 - k0 + x + 1), last, scale, seen.most[x],
                                      r.p + x * BLOCK);
      gemm(rows, s.vp, steps<T>(last), operands<T>(r.p + i * BLOCK), apart<T>(BLOCK), 1,
           r.values + k0 / Operand<T>::step * s.vp, s.vp, r.o + i * s.vp, s.vp, k0 > 0);
    }
  }
  float sums[QUERIES];
  for (int64_t i = 0; i < QUERIES; i += W) store(sums + i, each_sum(seen.sums + i));
  for (int64_t i = 0; i < m; i++) {
    const int64_t t = doc.begin + q0 + i;
    copy_scaled(r.o + i * s.vp, s.v, 1.f / sums[i], (T*)a.o + ((doc.b * a.t + t) * a.h + doc.h) * s.v);
    a.lse[(doc.b * a.h + doc.h) * a.t + t] = (seen.most[i] + log2f(sums[i])) / LOG2E;
  }
}

template <class T>
void forward_head(const Attention& a, const Shape<T>& s, int64_t b, int64_t h, const Row<T>* turned,
                  const ForwardRoom<T>& r) {
  memset((void*)r.rows, 0, PANEL * s.dr * sizeof(Row<T>));
  memset((void*)r.q, 0, QUERIES * s.dp * sizeof(Row<T>));
  for (int64_t begin = 0, end; begin < a.t; begin = end) {
    end = end_of_document(a, b, begin);
    const Document doc{b, h, begin, end - begin};
    pack_keys<T>(a, s, doc, turned, r.rows, r.keys, nullptr);
    pack_across(doc.n, s.v, [&](int64_t i) { return row_of<T>(a.v, b, begin + i, h); }, r.values, s.vp);
    for (int64_t q0 = 0; q0 < doc.n; q0 += QUERIES) forward_block(a, s, doc, q0, r);
  }
}

template <class T>
int forward(const Attention& a) {
  const Shape<T> s(a);
  const int64_t units = a.b * a.h, parts = a.threads < 1 ? 1 : least(a.threads, units);
  if (!units || !a.t) return OK;
  Cut each;
  ForwardRoom<T>(each, a, s);
  const int64_t row = a.t * s.rp;
  Cut shared;
  shared.take<Row<T>>(a.b * row);
  char* base = moe_scratch(shared.used + parts * each.used);
  if (!base) return NO_MEMORY;
  Row<T>* turned = (Row<T>*)base;
  base += shared.used;
#pragma omp parallel num_threads((int)parts)
  {
    Cut cut(base + omp_get_thread_num() * each.used);
    const ForwardRoom<T> room(cut, a, s);
    if (s.rope) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.b; b++) turn_keys(a, s, b, turned + b * row);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; unit++)
      forward_head(a, s, unit / a.h, unit % a.h, turned + unit / a.h * row, room);
  }
  return OK;
}

// ------------------------------------------------------------------------------------------------------------ backward

template <class T>
struct BackwardRoom {
  // of all queries of a document
  Row<T>*q, *dy;               // [n][dp], [n][vp]
  Op<T>*q_across, *dy_across;  // [n steps][dp], [n steps][vp]
  float *lse, *delta, *dq;     // [n] x 2, [n][dp]
  // of a panel of keys
  Row<T>* rows;                       // [PANEL][dr]
  Op<T>*keys, *keys_across, *values;  // [d steps][PANEL], [PANEL steps][dp], [v steps][PANEL]
  Op<T>*p, *ds_across;                // [BLOCK steps][PANEL]
  Row<T>* ds;                         // [QUERIES][PANEL]
  float *s, *dp, *dk, *dv;            // [QUERIES][PANEL] x 2, [PANEL][dp], [PANEL][vp]
  BackwardRoom(Cut& cut, const Attention& a, const Shape<T>& s_) {
    q = cut.take<Row<T>>(a.t * s_.dp);
    dy = cut.take<Row<T>>(a.t * s_.vp);
    q_across = SAME<T> ? (Op<T>*)q : cut.take<Op<T>>(steps<T>(a.t) * s_.dp);
    dy_across = SAME<T> ? (Op<T>*)dy : cut.take<Op<T>>(steps<T>(a.t) * s_.vp);
    lse = cut.take<float>(a.t + 1);
    delta = cut.take<float>(a.t + 1);
    dq = cut.take<float>(a.t * s_.dp);
    rows = cut.take<Row<T>>(PANEL * s_.dr);
    keys = cut.take<Op<T>>(apart<T>(s_.dr) * PANEL);
    keys_across = cut.take<Op<T>>(steps<T>(PANEL) * s_.dp);
    values = cut.take<Op<T>>(s_.vk * PANEL);
    p = cut.take<Op<T>>(steps<T>(BLOCK) * PANEL);
    ds_across = cut.take<Op<T>>(steps<T>(BLOCK) * PANEL);
    ds = SAME<T> ? nullptr : cut.take<Row<T>>(QUERIES * PANEL);
    s = cut.take<float>(QUERIES * PANEL);
    dp = cut.take<float>(QUERIES * PANEL);
    dk = cut.take<float>(PANEL * s_.dp);
    dv = cut.take<float>(PANEL * s_.vp);
  }
};

// Two neighbouring queries' values for W keys, as a left operand's transpose; as rows too, where `rows` is not null.
inline void put(V even, V odd, float* across, float*) {
  store(across, even);
  store(across + PANEL, odd);
}
#if defined(__AVX512BF16__)
inline void put(V even, V odd, pair* across, bf16* rows) {
  alignas(64) static const uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                               8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  _mm512_storeu_si512(across, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
  if (!rows) return;
  _mm256_storeu_si256((__m256i*)rows, _mm512_castsi512_si256(both));
  _mm256_storeu_si256((__m256i*)(rows + PANEL), _mm512_extracti64x4_epi64(both, 1));
}
#endif

// Scores and dp of two neighbouring queries -> p and ds. Of the panel's keys they see `seen` and `seen + 1`, or the
// second none at all.
template <class T, bool MASKED>
inline void differentiate(const float* s, const float* dp, int64_t width, int64_t seen, bool second, float scale,
                          const float* lse, const float* delta, Op<T>* p, Op<T>* ds_across, Row<T>* ds) {
  for (int64_t j = 0; j < width; j += W) {
    V x[2] = {load(s + j) * scale - lse[0], load(s + PANEL + j) * scale - lse[1]};
    power<T>(x);
    V y[2] = {x[0] * (load(dp + j) - delta[0]), x[1] * (load(dp + PANEL + j) - delta[1])};
    if (MASKED) {
      const int64_t next = second ? seen + 1 - j : 0;
      x[0] = first_lanes(seen - j, x[0], V{}), y[0] = first_lanes(seen - j, y[0], V{});
      x[1] = first_lanes(next, x[1], V{}), y[1] = first_lanes(next, y[1], V{});
    }
    put(x[0], x[1], p + j, (Row<T>*)nullptr);
    put(y[0], y[1], ds_across + j, ds + j);
  }
  if (MASKED)  // products take whole panels
    for (int64_t j = width; j < PANEL; j += W) {
      put(V{}, V{}, p + j, (Row<T>*)nullptr);
      put(V{}, V{}, ds_across + j, (Row<T>*)nullptr);
    }
}

// Queries q0 to q0 + m against the keys j to j + width: p and ds at the given rows, dq.
template <class T>
void backward_tile(const Shape<T>& s, int64_t q0, int64_t m, int64_t j, int64_t width, float scale, Op<T>* p,
                   Op<T>* ds_across, const BackwardRoom<T>& r) {
  constexpr int64_t step = Operand<T>::step;
  Row<T>* ds = SAME<T> ? (Row<T>*)ds_across : r.ds;
  gemm(m, width, s.dk, operands<T>(r.q + q0 * s.dp), apart<T>(s.dp), 1, r.keys, PANEL, r.s, PANEL);
  gemm(m, width, s.vk, operands<T>(r.dy + q0 * s.vp), apart<T>(s.vp), 1, r.values, PANEL, r.dp, PANEL);
  for (int64_t i = 0; i < m; i += 2) {
    const int64_t seen = q0 + i + 1 - j, at = i / step * PANEL;
    const bool second = i + 1 < m;
    auto both = seen < width || !second ? differentiate<T, true> : differentiate<T, false>;
    both(r.s + i * PANEL, r.dp + i * PANEL, width, seen, second, scale, r.lse + q0 + i, r.delta + q0 + i, p + at,
         ds_across + at, ds + i * PANEL);
  }
  gemm(m, s.dp, steps<T>(width), operands<T>(ds), apart<T>(PANEL), 1, r.keys_across, s.dp, r.dq + q0 * s.dp, s.dp,
       j > 0);
}

// A panel of keys from j on against all queries that see any of them.
template <class T>
void backward_panel(const Attention& a, const Shape<T>& s, const Document& doc, int64_t j, const Row<T>* turned,
                    const BackwardRoom<T>& r) {
  constexpr int64_t step = Operand<T>::step, GROUP = 24;  // keys that share the K of a product with queries
  const int64_t keys = least(PANEL, doc.n - j), all = padded(keys);
  const Document panel{doc.b, doc.h, doc.begin + j, keys};
  pack_keys(a, s, panel, turned, r.rows, r.keys, r.keys_across);
  pack_along(keys, s.v, [&](int64_t i) { return row_of<T>(a.v, doc.b, panel.begin + i, doc.h); }, r.values, PANEL);
  for (int64_t begin = j; begin < doc.n; begin += BLOCK) {
    const int64_t end = least(begin + BLOCK, doc.n);
    for (int64_t q0 = begin, m; q0 < end; q0 += m) {
      const bool rim = q0 < j + PANEL;
      m = least(rim ? RIM : QUERIES, end - q0);
      const int64_t at = (q0 - begin) / step * PANEL;
      const int64_t width = rim ? least(padded(q0 + m - j), all) : all;
      backward_tile(s, q0, m, j, width, a.scale * LOG2E, r.p + at, r.ds_across + at, r);
    }
    for (int64_t i = 0; i < keys; i += GROUP) {
      const int64_t m = least(GROUP, keys - i), from = begin == j ? i : 0, at = from / step * PANEL + i;
      const int64_t q = (begin + from) / step, k = steps<T>(end - begin - from);
      gemm(m, s.vp, k, r.p + at, 1, PANEL, r.dy_across + q * s.vp, s.vp, r.dv + i * s.vp, s.vp, begin > j);
      gemm(m, s.dp, k, r.ds_across + at, 1, PANEL, r.q_across + q * s.dp, s.dp, r.dk + i * s.dp, s.dp, begin > j);
    }
  }
}

// Queries and upstream gradients of a document, as rows and across.
template <class T>
void backward_queries(const Attention& a, const Shape<T>& s, const Document& doc, const BackwardRoom<T>& r) {
  query_rows(a, s, doc, 0, doc.n, r.q);
  if (!SAME<T>) pack_across(doc.n, s.dp, [&](int64_t i) { return r.q + i * s.dp; }, r.q_across, s.dp);
  const Heads like_o{nullptr, a.t * a.h * s.v, a.h * s.v, s.v};
  for (int64_t i = 0; i < doc.n; i++) {
    const int64_t t = doc.begin + i, at = doc.b * like_o.batch + t * like_o.time + doc.h * like_o.head;
    const int64_t ahead = (least(t + AHEAD, a.t - 1) - t) * like_o.time;
    const T *o = (const T*)a.o + at, *dy = (const T*)a.dy + at;
    prefetch(o + ahead, s.v);
    prefetch(dy + ahead, s.v);
    copy(dy, s.v, r.dy + i * s.vp);
    V delta = {};
    for (int64_t c = 0; c < s.v; c += W) delta += load(o + c, s.v - c) * load(dy + c, s.v - c);
    r.delta[i] = sum(delta);
    r.lse[i] = a.lse[(doc.b * a.h + doc.h) * a.t + t] * LOG2E;
  }
  r.delta[doc.n] = r.lse[doc.n] = 0;
  if (!SAME<T>) pack_across(doc.n, s.vp, [&](int64_t i) { return r.dy + i * s.vp; }, r.dy_across, s.vp);
}

// dk_rope: this head's part of its gradient, [T, rope], not turned back.
template <class T>
void backward_head(const Attention& a, const Shape<T>& s, int64_t b, int64_t h, const Row<T>* turned, float* dk_rope,
                   const BackwardRoom<T>& r) {
  memset((void*)r.rows, 0, PANEL * s.dr * sizeof(Row<T>));
  memset((void*)r.q, 0, a.t * s.dp * sizeof(Row<T>));
  memset((void*)r.dy, 0, a.t * s.vp * sizeof(Row<T>));
  for (int64_t begin = 0, end; begin < a.t; begin = end) {
    end = end_of_document(a, b, begin);
    const Document doc{b, h, begin, end - begin};
    backward_queries(a, s, doc, r);
    for (int64_t j = 0; j < doc.n; j += PANEL) {
      backward_panel(a, s, doc, j, turned, r);
      for (int64_t i = 0; i < least(PANEL, doc.n - j); i++) {
        const int64_t t = begin + j + i;
        copy_scaled(r.dk + i * s.dp, s.nope, a.scale, row_of<T>(a.dk, b, t, h));
        copy_scaled(r.dk + i * s.dp + s.nope, s.rope, a.scale, dk_rope + t * s.rope);
        copy(r.dv + i * s.vp, s.v, row_of<T>(a.dv, b, t, h));
      }
    }
    Angles angles(a, b, begin);
    for (int64_t i = 0; i < doc.n; i++) {
      T* dq = row_of<T>(a.dq, b, begin + i, h);
      copy_scaled(r.dq + i * s.dp, s.nope, a.scale, dq);
      if (s.rope) turn(r.dq + i * s.dp + s.nope, angles.next(), s.rope, BACK, a.scale, dq + s.nope);
    }
  }
}

// Heads added up in their order, and turned back. parts [H, T, rope] of row b; sums: room for one row.
template <class T>
void finish_k_rope(const Attention& a, const Shape<T>& s, int64_t b, const float* parts, float* sums) {
  Angles angles(a, b, 0);
  for (int64_t t = 0; t < a.t; t++) {
    for (int64_t j = 0; j < s.rope; j += W) {
      V x = {};
      for (int64_t h = 0; h < a.h; h++) x += load(parts + (h * a.t + t) * s.rope + j, s.rope - j);
      store(sums + j, x, s.rope - j);
    }
    turn(sums, angles.next(), s.rope, BACK, 1.f, row_of<T>(a.dk_rope, b, t, 0));
  }
}

template <class T>
int backward(const Attention& a) {
  const Shape<T> s(a);
  const int64_t units = a.b * a.h, parts = a.threads < 1 ? 1 : least(a.threads, units);
  if (!units || !a.t) return OK;
  Cut each;
  BackwardRoom<T>(each, a, s);
  const int64_t head = a.t * s.rope, row = a.t * s.rp;
  Cut shared;
  shared.take<float>(units * head);
  const size_t parted = shared.used;
  shared.take<Row<T>>(a.b * row);
  char* base = moe_scratch(shared.used + parts * each.used);
  if (!base) return NO_MEMORY;
  float* dk_rope = (float*)base;
  Row<T>* turned = (Row<T>*)(base + parted);
  base += shared.used;
#pragma omp parallel num_threads((int)parts)
  {
    Cut cut(base + omp_get_thread_num() * each.used);
    const BackwardRoom<T> room(cut, a, s);
    if (s.rope) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.b; b++) turn_keys(a, s, b, turned + b * row);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; unit++)
      backward_head(a, s, unit / a.h, unit % a.h, turned + unit / a.h * row, dk_rope + unit * head, room);
    if (s.rope) {
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.b; b++) finish_k_rope(a, s, b, dk_rope + b * a.h * head, room.dq);
    }
  }
  return OK;
}

}  // namespace

int attention_forward(const Attention& a) { return a.dtype == BF16 ? forward<bf16>(a) : forward<float>(a); }
int attention_backward(const Attention& a) { return a.dtype == BF16 ? backward<bf16>(a) : backward<float>(a); }

}  // namespace MOE_LEVEL
