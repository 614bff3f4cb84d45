// One step of decoding: the whole stack for B sequences of T new tokens each, in one call.
// reference: Transformer.encode over a LatentCache, and the head (moe/model.py, moe/layers/).
//
//     c_q, c_kv, k_rope = norm(W_DQ h), norm(W_DKV h), rotate(W_KR h)     h = norm(x); the last two go into the cache
//     q = scale [W_UK^T q_nope; rotate(q_rope)]                           [C + R] of each head
//     z = softmax(q . cache) c_kv                                         [C] of each head
//     x += W_O W_UV z
//     x += shared(h) + sum over chosen experts of gate * expert(h)        h = norm(x)
//
// Weights are read where they lie (few.h), so none is ever out of date. x, sums and affinities are fp32; what is
// multiplied has the weights' dtype, as in PyTorch's path, which rounds the results of products too.
//
// The team shares products by columns of their result, attention by heads, sequences and ranges of keys. Each sum is
// made by one thread, in an order that does not depend on their number: the bits are the same for any.
#include "draw.h"
#include "few.h"
#include "order.h"
#include "route.h"
#include "softmax.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace MOE_LEVEL {
namespace {

constexpr int64_t RANGE = 480;   // keys that one thread meets at a time: they and their scores stay in the second cache
constexpr int64_t START = 1024;  // bytes fetched ahead where reading jumps to another expert

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Widths of rows: p of fp32, l of left operands.
template <class T>
struct Shape {
  int64_t n, keys, dp, dl, qp, ql, kp, kl, cp, cl, hp, np, vp, ol, ep, fl, wide, g, deepest;
  explicit Shape(const Decode& a) {
    n = a.b * a.t, keys = a.c + a.rope, g = 0;
    for (int64_t i = 0; i < a.layers; i++) g = most(g, a.layer[i].g);
    dp = padded(a.d), qp = padded(a.q), kp = padded(keys), cp = padded(a.c), hp = padded(a.nope + a.rope);
    np = padded(a.nope), vp = padded(a.v), ep = padded(a.e);
    dl = ahead<T>(a.d), ql = ahead<T>(a.q), kl = ahead<T>(keys), cl = ahead<T>(a.c), ol = ahead<T>(a.h * a.v);
    fl = ahead<T>(a.f), wide = padded(a.t * a.h);
    deepest = most(most(most(a.d, a.q), most(keys, a.h * a.v)), most(a.f, g));
  }
};

// What the team shares.
template <class T>
struct Shared {
  float *x, *down, *latent, *z, *top, *total, *logits, *gates;
  Row<T>*q, *o, *act, *act_of;
  int64_t *first, *sequence;  // range of keys that each sequence begins with, and the sequence of each range
  Shared(Cut& cut, const Decode& a, const Shape<T>& s) {
    int64_t ranges = 0;
    for (int64_t b = 0; b < a.b; b++) ranges += (a.lengths[b] + a.t + RANGE - 1) / RANGE;
    first = cut.take<int64_t>(a.b + 1), sequence = cut.take<int64_t>(ranges);
    x = cut.take<float>(s.n * s.dp), down = cut.take<float>(s.n * s.qp), latent = cut.take<float>(s.n * s.kp);
    z = cut.take<float>(ranges * a.t * a.h * s.cp);
    top = cut.take<float>(ranges * s.wide), total = cut.take<float>(ranges * s.wide);
    logits = cut.take<float>(s.n * s.ep), gates = cut.take<float>(s.n * a.k);
    q = cut.take<Row<T>>(s.n * a.h * s.kl), o = cut.take<Row<T>>(s.n * s.ol);
    act = cut.take<Row<T>>(s.n * ahead<T>(s.g)), act_of = cut.take<Row<T>>(s.n * a.k * s.fl);
  }
};

inline Experts experts_of(const Decode& a, const int64_t* ids) {
  Experts e = {};
  e.n = a.b * a.t, e.e = a.e, e.k = a.k, e.ids = ids;
  return e;
}

// What one thread works in. Norms of all rows, and rows in expert order, are cheaper made by everyone than waited for.
template <class T>
struct Room {
  int64_t me, team;
  FewRoom<T> few;
  float *q, *wide, *scores, *up, *strength, *gates;
  Row<T>*h, *c_q, *nope, *z;
  Op<T>*packed, *weights;
  Order order;
  int64_t *from, *to;        // of rows in expert order: where their token's h and x start
  int64_t *active, actives;  // experts that have rows
  Room(Cut& cut, const Decode& a, const Shape<T>& s, int64_t me_, int64_t team_)
      : me(me_), team(team_), few(cut, s.deepest) {
    q = cut.take<float>(s.n * s.hp);
    wide = cut.take<float>(s.n * most(s.cp, s.vp));
    scores = cut.take<float>(most((RANGE + SPARE) * width_of(a.t * a.h), s.ep));
    up = cut.take<float>(s.n * 2 * padded(most(a.f, s.g)));
    strength = cut.take<float>(a.groups), gates = cut.take<float>(s.n * a.k);
    h = cut.take<Row<T>>(s.n * s.dl), c_q = cut.take<Row<T>>(s.n * s.ql);
    nope = cut.take<Row<T>>(s.n * s.np), z = cut.take<Row<T>>(s.n * s.cl);
    packed = cut.take<Op<T>>(steps<T>(s.keys) * padded(a.t * a.h));
    weights = cut.take<Op<T>>((steps<T>(RANGE) + SPARE) * width_of(a.t * a.h));
    order = cut_order(cut, experts_of(a, nullptr), 1);
    from = cut.take<int64_t>(s.n * a.k), to = cut.take<int64_t>(s.n * a.k), active = cut.take<int64_t>(a.e);
    actives = 0;
  }
};

struct Span {
  int64_t begin, end;
};

// Part i of `parts` of n columns, cut at whole vectors.
inline Span part(int64_t n, int64_t i, int64_t parts) {
  const int64_t vectors = (n + W - 1) / W;
  return {least(vectors * i / parts * W, n), least(vectors * (i + 1) / parts * W, n)};
}

template <class T>
struct Step {
  const Decode& a;
  const Shape<T> s;
  const Shared<T> w;

  // Columns `cut` of rows W^T, weight [., k].
  void product(int64_t m, const Rows<T>& rows, const void* weight, int64_t k, Span cut, Sink out, const Room<T>& r) const {
    out.c += cut.begin;
    along(m, rows, (const T*)weight + cut.begin * k, k, cut.end - cut.begin, k, out, r.few);
  }
  // The same by the whole team, for all tokens and all columns.
  void multiply(const Rows<T>& rows, const void* weight, int64_t columns, int64_t k, const Sink& out,
                const Room<T>& r) const {
    product(s.n, rows, weight, k, part(columns, r.me, r.team), out, r);
  }

  template <class O>
  void norm(const float* x, const void* weight, int64_t width, O* out, int64_t room) const {
    V square = {};
    for (int64_t j = 0; j < width; j += W) {
      V v = load(x + j, width - j);
      square += v * v;
    }
    const float factor = 1.f / sqrtf(sum(square) / (float)width + a.eps);
    for (int64_t j = 0; j < width; j += W)
      store(out + j, load(x + j, width - j) * factor * load((const T*)weight + j, width - j), room - j);
    for (int64_t j = padded(width); j < room; j += W) store(out + j, V{});
  }
  void norms(const float* x, int64_t ld, const void* weight, int64_t width, Row<T>* out) const {
    const int64_t ldo = ahead<T>(width);
    for (int64_t i = 0; i < s.n; i++) norm(x + i * ld, weight, width, out + i * ldo, ldo);
  }
  // R channels, neighbours are a pair.
  void rotate(float* x, int64_t row) const {
    const int64_t half = a.rope / 2, at = (a.lengths[row / a.t] + row % a.t) * half;
    for (int64_t i = 0; i < half; i++) {
      const float even = x[2 * i], odd = x[2 * i + 1], cos = a.cos[at + i], sin = a.sin[at + i];
      x[2 * i] = even * cos - odd * sin;
      x[2 * i + 1] = even * sin + odd * cos;
    }
  }

  void embed(const Room<T>& r) const {
    for (int64_t i = r.me; i < s.n; i += r.team) pack_row((const T*)a.embed + a.tokens[i] * a.d, a.d, w.x + i * s.dp);
  }
  void attention(const DecodeLayer& l, const Room<T>& r) const;
  void remember(const DecodeLayer& l, int64_t i) const;
  void queries(const DecodeLayer& l, int64_t head, const Room<T>& r) const;
  void attend(const DecodeLayer& l, int64_t range, const Room<T>& r) const;
  void values(const DecodeLayer& l, int64_t head, const Room<T>& r) const;
  void feed_forward(const DecodeLayer& l, Room<T>& r) const;
  void choose(const DecodeLayer& l, Room<T>& r) const;
  void activate(int64_t m, const Rows<T>& rows, const void* up, int64_t width, Span cut, Row<T>* out,
                const Room<T>& r) const;
  void last(const Room<T>& r) const;
};

// --------------------------------------------------------------------------------------------------------- attention

template <class T>
void Step<T>::attention(const DecodeLayer& l, const Room<T>& r) const {
  norms(w.x, s.dp, l.attn_norm, a.d, r.h);
  if (l.q_a) multiply({r.h, s.dl}, l.q_a, a.q, a.d, {w.down, s.qp}, r);
  multiply({r.h, s.dl}, l.kv_a, s.keys, a.d, {w.latent, s.kp}, r);
#pragma omp barrier
  if (l.q_a) norms(w.down, s.qp, l.q_a_norm, a.q, r.c_q);
  for (int64_t i = r.me; i < s.n; i += r.team) remember(l, i);
  for (int64_t head = r.me; head < a.h; head += r.team) queries(l, head, r);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
  for (int64_t range = 0; range < w.first[a.b]; range++) attend(l, range, r);
  for (int64_t head = r.me; head < a.h; head += r.team) values(l, head, r);
#pragma omp barrier
  multiply({w.o, s.ol}, l.o, a.d, a.h * a.v, {w.x, s.dp, true}, r);
#pragma omp barrier
}

// A new token's row of the cache.
template <class T>
void Step<T>::remember(const DecodeLayer& l, int64_t i) const {
  const int64_t sequence = i / a.t, place = a.lengths[sequence] + i % a.t;
  float* latent = w.latent + i * s.kp;
  T* kept = (T*)l.latents + (sequence * a.capacity + place) * s.keys;
  norm(latent, l.kv_a_norm, a.c, kept, a.c);
  rotate(latent + a.c, i);
  for (int64_t j = a.c; j < s.keys; j += W) store(kept + j, load(latent + j, s.keys - j), s.keys - j);
}

// One head's query of every token, as it meets the cache; log2(e) is in it too, for the softmax.
template <class T>
void Step<T>::queries(const DecodeLayer& l, int64_t head, const Room<T>& r) const {
  const int64_t width = a.nope + a.rope, k = l.q_a ? a.q : a.d;
  const Rows<T> rows = l.q_a ? Rows<T>{r.c_q, s.ql} : Rows<T>{r.h, s.dl};
  const float scale = a.scale * LOG2E;
  product(s.n, rows, (const T*)l.q_b + head * width * k, k, {0, width}, {r.q, s.hp}, r);
  for (int64_t i = 0; i < s.n; i++) {
    pack_row(r.q + i * s.hp, a.nope, r.nope + i * s.np);
    rotate(r.q + i * s.hp + a.nope, i);
  }
  const T* w_uk = (const T*)l.kv_b + head * (a.nope + a.v) * a.c;
  across(s.n, (const Op<T>*)r.nope, s.np / Operand<T>::step, 1, w_uk, a.c, a.c, a.nope, r.wide, s.cp);
  for (int64_t i = 0; i < s.n; i++) {
    Row<T>* q = w.q + (i * a.h + head) * s.kl;
    const float *nope = r.wide + i * s.cp, *rope = r.q + i * s.hp + a.nope;
    for (int64_t j = 0; j < a.c; j += W) store(q + j, load(nope + j) * scale, a.c - j);
    for (int64_t j = 0; j < a.rope; j += W) store(q + a.c + j, load(rope + j, a.rope - j) * scale, a.rope - j);
    for (int64_t j = s.keys; j < s.kl; j += W) store(q + j, V{}, s.kl - j);
  }
}

// All heads of a sequence over one range of its keys: sums of values, not yet divided by the total of their weights. A
// row of scores is a key's, so the softmax runs down columns, all heads at once.
template <class T>
void Step<T>::attend(const DecodeLayer& l, int64_t range, const Room<T>& r) const {
  const int64_t b = w.sequence[range], rows = a.t * a.h, width = width_of(rows), begin = (range - w.first[b]) * RANGE;
  const int64_t keys = least(RANGE, a.lengths[b] + a.t - begin);
  const T* cache = (const T*)l.latents + (b * a.capacity + begin) * s.keys;
  const Row<T>* q = w.q + b * rows * s.kl;
  pack_along(rows, s.keys, [&](int64_t i) { return q + i * s.kl; }, r.packed, padded(rows));
  turned(rows, r.packed, cache, s.keys, keys, s.keys, r.scores, r.few);
  for (int64_t key = most(0, a.lengths[b] + 1 - begin); key < keys; key++)  // a new token sees no later one
    for (int64_t i = 0; i < least(rows, (begin + key - a.lengths[b]) * a.h); i++) r.scores[key * width + i] = HIDDEN;
  for (int64_t i = keys * width; i < (keys + SPARE) * width; i++) r.scores[i] = HIDDEN;
  float *top = w.top + range * s.wide, *total = w.total + range * s.wide;
  if (width < W)
    softmax_of_halves(keys, r.scores, r.weights, top, total);
  else
    softmax(keys, width, r.scores, r.weights, top, total);
  across(rows, r.weights, 1, width, cache, s.keys, a.c, keys, w.z + range * rows * s.cp, s.cp);
}

// One head's ranges joined, then its values.
template <class T>
void Step<T>::values(const DecodeLayer& l, int64_t head, const Room<T>& r) const {
  const int64_t rows = a.t * a.h;
  for (int64_t i = 0; i < s.n; i++) {
    const int64_t b = i / a.t, row = i % a.t * a.h + head, begin = w.first[b], end = w.first[b + 1];
    float top = -INFINITY, total = 0;
    for (int64_t range = begin; range < end; range++) top = fmaxf(top, w.top[range * s.wide + row]);
    float* z = w.z + (begin * rows + row) * s.cp;
    for (int64_t range = begin; range < end; range++) {
      const float factor = weight_of(all(w.top[range * s.wide + row]), all(top))[0];
      const float* more = w.z + (range * rows + row) * s.cp;
      total += w.total[range * s.wide + row] * factor;
      for (int64_t j = 0; j < s.cp; j += W)
        store(z + j, range == begin ? load(more + j) * factor : load(z + j) + load(more + j) * factor);
    }
    Row<T>* out = r.z + i * s.cl;
    for (int64_t j = 0; j < s.cp; j += W) store(out + j, load(z + j) * (1.f / total));
    for (int64_t j = s.cp; j < s.cl; j += W) store(out + j, V{});
  }
  const T* w_uv = (const T*)l.kv_b + (head * (a.nope + a.v) + a.nope) * a.c;
  product(s.n, {r.z, s.cl}, w_uv, a.c, {0, a.v}, {r.wide, s.vp}, r);
  for (int64_t i = 0; i < s.n; i++)
    for (int64_t j = 0; j < a.v; j += W)
      store(w.o + i * s.ol + head * a.v + j, load(r.wide + i * s.vp + j), a.v - j);
}

// ------------------------------------------------------------------------------------------------------ feed-forward

template <class T>
void Step<T>::feed_forward(const DecodeLayer& l, Room<T>& r) const {
  norms(w.x, s.dp, l.ffn_norm, a.d, r.h);
  const T *w13 = (const T*)l.w13, *w2 = (const T*)l.w2;
  if (l.router) choose(l, r);
  const int64_t experts = l.router ? r.actives : 0, units = r.team == 1 ? 1 : 8 * r.team;
  const int64_t pieces = l.up ? least(units, most(1, l.g / W)) : 0;  // of the shared expert; cuts: of every other
  const int64_t cuts = experts ? least(units / experts + 1, most(1, a.f / W)) : 0;
#pragma omp for schedule(dynamic, 1)
  for (int64_t unit = 0; unit < pieces + experts * cuts; unit++) {
    if (unit < pieces) {
      activate(s.n, {r.h, s.dl}, l.up, l.g, part(l.g, unit, pieces), w.act, r);
      continue;
    }
    const int64_t i = (unit - pieces) / cuts, e = r.active[i], row = r.order.first(e, 0);
    if (i + 1 < experts) fetch(w13 + r.active[i + 1] * 2 * a.f * a.d, START);
    activate(r.order.rows(e), {r.h, 0, r.from + row}, w13 + e * 2 * a.f * a.d, a.f, part(a.f, (unit - pieces) % cuts, cuts),
             w.act_of + row * s.fl, r);
  }
  const Span mine = part(a.d, r.me, r.team);
  if (l.up) product(s.n, {w.act, ahead<T>(l.g)}, l.down, l.g, mine, {w.x, s.dp, true}, r);
  for (int64_t i = 0; i < experts; i++) {
    const int64_t e = r.active[i], row = r.order.first(e, 0);
    if (i + 1 < experts) fetch(w2 + (r.active[i + 1] * a.d + mine.begin) * a.f, START);
    product(r.order.rows(e), {w.act_of + row * s.fl, s.fl}, w2 + e * a.d * a.f, a.f, mine,
            {w.x, 0, true, r.to + row, r.gates + row}, r);
  }
#pragma omp barrier
}

// Experts of every token, and the rows in expert order.
template <class T>
void Step<T>::choose(const DecodeLayer& l, Room<T>& r) const {
  const RouteRule rule = {a.e, a.k, a.groups, a.kept, a.sigmoid != 0, a.norm != 0, a.scaling};
  multiply({r.h, s.dl}, l.router, a.e, a.d, {w.logits, s.ep}, r);
#pragma omp barrier
  for (int64_t i = r.me; i < s.n; i += r.team)
    route(rule, w.logits + i * s.ep, l.bias, r.scores, r.strength, l.chosen + i * a.k, w.gates + i * a.k);
#pragma omp barrier
  sort_rows(experts_of(a, l.chosen), r.order);
  r.actives = 0;
  for (int64_t e = 0; e < a.e; e++)
    if (r.order.rows(e)) r.active[r.actives++] = e;
  for (int64_t row = 0; row < s.n * a.k; row++) {
    r.from[row] = r.order.token_at(row) * s.dl;
    r.to[row] = r.order.token_at(row) * s.dp;
    r.gates[row] = w.gates[r.order.choice_at(row)];
  }
}

// Columns `cut` of silu(gate) up, for m rows.
template <class T>
void Step<T>::activate(int64_t m, const Rows<T>& rows, const void* up, int64_t width, Span cut, Row<T>* out,
                       const Room<T>& r) const {
  const int64_t half = padded(cut.end - cut.begin), ldo = ahead<T>(width);
  const Sink sink = {r.up - cut.begin, 2 * half};
  product(m, rows, up, a.d, cut, sink, r);
  product(m, rows, (const T*)up + width * a.d, a.d, cut, {sink.c + half, 2 * half}, r);
  for (int64_t i = 0; i < m; i++) {
    const float* z = r.up + i * 2 * half;
    Row<T>* row = out + i * ldo + cut.begin;
    for (int64_t j = 0; j < half; j += W) {
      V gate = load(z + j);
      store(row + j, gate * sigmoid(gate) * load(z + half + j));
    }
    if (cut.end == width)
      for (int64_t j = padded(width); j < ldo; j += W) store(out + i * ldo + j, V{});
  }
}

// -------------------------------------------------------------------------------------------------------------- step

template <class T>
void Step<T>::last(const Room<T>& r) const {
  norms(w.x, s.dp, a.last_norm, a.d, r.h);
  for (int64_t i = r.me; i < s.n; i += r.team)
    for (int64_t j = 0; j < a.d; j += W)
      store((T*)a.hidden + i * a.d + j, load(r.h + i * s.dl + j), a.d - j);
  multiply({r.h, s.dl}, a.head, a.vocab, a.d, {a.logits, a.vocab, false, nullptr, nullptr, true}, r);
#pragma omp barrier
  for (int64_t i = r.me; i < s.n; i += r.team) {
    const float* logits = a.logits + i * a.vocab;
    if (a.temperature > 0)
      draw(logits, a.vocab, a.temperature, uniform(a.keys[i / a.t], a.number + i % a.t), a.drawn + i, a.logprob + i);
    else
      best_of(logits, a.vocab, a.drawn + i, a.logprob + i);
  }
}

template <class T>
void ranges_of_keys(const Decode& a, const Shared<T>& w) {
  int64_t range = 0;
  for (int64_t b = 0; b < a.b; b++) {
    w.first[b] = range;
    for (int64_t end = range + (a.lengths[b] + a.t + RANGE - 1) / RANGE; range < end; range++) w.sequence[range] = b;
  }
  w.first[a.b] = range;
}

// Waiting for each other costs about as much as so many products of one layer.
constexpr int64_t WORTH_A_TEAM = 1 << 18;

inline int64_t threads_for(const Decode& a) {
  const int64_t products = a.b * a.t * a.d * (a.h * (a.nope + a.rope + a.v) + 3 * a.k * a.f);
  return products < WORTH_A_TEAM ? 1 : most(a.threads, 1);
}

template <class T>
int step(const Decode& a) {
  const Shape<T> s(a);
  const int64_t threads = threads_for(a);
  Cut each, shared;
  Room<T>(each, a, s, 0, 1);
  Shared<T>(shared, a, s);
  const int64_t room = each.used;
  char* base = moe_scratch(shared.used + threads * room);
  if (!base) return NO_MEMORY;
  char* rooms = base + shared.used;
  shared = Cut(base);
  const Step<T> run = {a, s, Shared<T>(shared, a, s)};
  ranges_of_keys(a, run.w);
  memset((void*)run.w.o, 0, s.n * s.ol * sizeof(Row<T>));
#pragma omp parallel num_threads((int)threads)
  {
    const int64_t me = omp_get_thread_num();
    Cut cut(rooms + me * room);
    Room<T> r(cut, a, s, me, omp_get_num_threads());
    run.embed(r);
#pragma omp barrier
    for (int64_t i = 0; i < a.layers; i++) {
      run.attention(a.layer[i], r);
      run.feed_forward(a.layer[i], r);
    }
    run.last(r);
  }
  return OK;
}

}  // namespace

int decode_step(const Decode& a) {
  for (int64_t b = 0; b < a.b; b++)
    if (a.lengths[b] + a.t > a.capacity) return TOO_LARGE;
  if (a.b * a.t <= 0) return OK;
  return a.dtype == BF16 ? step<bf16>(a) : step<float>(a);
}

}  // namespace MOE_LEVEL
