// Choice of experts for all tokens, forward and backward. reference: route (kernels/reference.py), Router
// (moe/layers/router.py). What happens to one token is in route.h.
//
//     ids, gates [N, K], counts [E], s [N, E] if wanted      of logits [N, E]; where mask is 0: ids = E, gates = 0
//
//     ds at ids += scaling (d - sum(d s) / t) / t            d = dgates, s at ids, t their sum; scaling d without norm
//     dlogits = ds s (1 - s), or s (ds - sum(ds s))          sigmoid, softmax; s is made again from logits
//
// And the router's sequence-wise loss. reference: sequence_loss.
//
//     f = E / (K length) times how many tokens of a sequence have the expert among their K best      [B, E], no gradient
//     loss = mean over sequences of the mean over their tokens of share = f . s / sum(s)             of s [B, T, E]
//
//     ds = (f - share) gain, gain = 1 / (B length sum(s))
#include "route.h"

#include "interface.h"
#include "scratch.h"

namespace MOE_LEVEL {
namespace {

constexpr int64_t FEW = 64;  // tokens below which a second thread is not worth waking

inline RouteRule rule_of(const Route& a) {
  return RouteRule{a.e, a.k, a.groups, a.kept, a.sigmoid != 0, a.norm != 0, a.scaling};
}
inline int64_t parts_of(int64_t n, int32_t threads) { return n < FEW || threads < 1 ? 1 : threads; }

// [E] logits -> [padded E] affinities, zeros behind them.
inline void affinities_of(const RouteRule& r, const float* logits, float* s) {
  for (int64_t i = 0; i < r.e; i += W) store(s + i, load(logits + i, r.e - i));
  affinities(r, s);
  for (int64_t i = r.e; i < padded(r.e); i++) s[i] = 0;
}

struct ForwardRoom {
  float *x, *score, *strength;
  int64_t* counts;
  ForwardRoom(Cut& cut, const Route& a)
      : x(cut.take<float>(padded(a.e))),
        score(cut.take<float>(padded(a.e))),
        strength(cut.take<float>(a.groups)),
        counts(cut.take<int64_t>(a.e)) {}
};

void forward_rows(const Route& a, int64_t begin, int64_t end, const ForwardRoom& room) {
  const RouteRule r = rule_of(a);
  memset(room.counts, 0, a.e * sizeof(int64_t));
  for (int64_t n = begin; n < end; n++) {
    int64_t* ids = a.ids + n * a.k;
    float* gates = a.gates + n * a.k;
    for (int64_t i = 0; i < a.e; i += W) store(room.x + i, load(a.logits + n * a.e + i, a.e - i));
    route(r, room.x, a.bias, room.score, room.strength, ids, gates);
    if (a.s) memcpy(a.s + n * a.e, room.x, a.e * sizeof(float));
    const bool routed = !a.mask || a.mask[n];
    for (int64_t k = 0; k < a.k; k++) {
      if (routed) {
        room.counts[ids[k]]++;
      } else {
        ids[k] = a.e;
        gates[k] = 0;
      }
    }
  }
}

// x [padded E] room for affinities, d [padded E] for their gradient.
void backward_row(const Route& a, const RouteRule& r, int64_t n, float* x, float* d) {
  const int64_t* ids = a.ids + n * a.k;
  const float* dgates = a.dgates + n * a.k;
  float* out = a.dlogits + n * a.e;
  bool any = a.ds != nullptr;
  for (int64_t k = 0; k < a.k; k++) any |= ids[k] >= 0 && ids[k] < a.e;
  if (!any) {  // a token that was masked may hold anything
    memset(out, 0, a.e * sizeof(float));
    return;
  }
  affinities_of(r, a.logits + n * a.e, x);
  for (int64_t i = 0; i < a.e; i += W) store(d + i, a.ds ? load(a.ds + n * a.e + i, a.e - i) : V{});
  float total = 1e-20f, dot = 0, shared = 0;
  for (int64_t k = 0; k < a.k; k++) {
    if (ids[k] < 0 || ids[k] >= a.e) continue;
    total += x[ids[k]];
    dot += dgates[k] * x[ids[k]];
  }
  for (int64_t k = 0; k < a.k; k++)
    if (ids[k] >= 0 && ids[k] < a.e)
      d[ids[k]] += a.scaling * (r.norm ? (dgates[k] - dot / total) / total : dgates[k]);
  if (!r.sigmoid) {
    V sums = {};
    for (int64_t i = 0; i < a.e; i += W) sums += load(d + i) * load(x + i);
    shared = sum(sums);
  }
  for (int64_t i = 0; i < a.e; i += W) {
    V s = load(x + i), g = load(d + i);
    store(out + i, r.sigmoid ? g * s * (1.f - s) : s * (g - shared), a.e - i);
  }
}

// ------------------------------------------------------------------------------------------------- sequence-wise loss

inline bool live(const SequenceLoss& a, int64_t i) { return !a.mask || a.mask[i]; }

inline double length_of(const SequenceLoss& a, int64_t b) {
  int64_t length = 0;
  for (int64_t i = b * a.t; i < (b + 1) * a.t; i++) length += live(a, i);
  return length ? length : 1;
}

struct LossRoom {
  float* score;
  int64_t* ids;
  int32_t* counts;
  LossRoom(Cut& cut, const SequenceLoss& a)
      : score(cut.take<float>(padded(a.e))), ids(cut.take<int64_t>(a.k)), counts(cut.take<int32_t>(a.b * a.e)) {}
};

// How often an expert is among a token's k best.
void count_rows(const SequenceLoss& a, int64_t begin, int64_t end, const LossRoom& room) {
  memset(room.counts, 0, a.b * a.e * sizeof(int32_t));
  for (int64_t n = begin; n < end; n++) {
    if (!live(a, n)) continue;
    for (int64_t i = 0; i < a.e; i += W) {
      V s = load(a.s + n * a.e + i, a.e - i);
      store(room.score + i, s == s ? s : all(INFINITY));
    }
    for (int64_t i = a.e; i < padded(a.e); i++) room.score[i] = -INFINITY;
    best_ids(room.score, a.e, a.k, room.ids);
    for (int64_t k = 0; k < a.k; k++) room.counts[n / a.t * a.e + room.ids[k]]++;
  }
}

// share = f . s / sum(s) of one token; its sum waits in gain.
inline void share_of(const SequenceLoss& a, int64_t i) {
  const float *s = a.s + i * a.e, *f = a.f + i / a.t * a.e;
  V dot = {}, total = {};
  for (int64_t e = 0; e < a.e; e += W) {
    V x = load(s + e, a.e - e);
    dot += x * load(f + e, a.e - e);
    total += x;
  }
  a.gain[i] = sum(total);
  a.share[i] = sum(dot) / a.gain[i];
}

}  // namespace

int route_forward(const Route& a) {
  const int64_t parts = parts_of(a.n, a.threads);
  Cut each;
  ForwardRoom(each, a);
  char* base = moe_scratch(parts * each.used);
  if (!base) return NO_MEMORY;
#pragma omp parallel for num_threads((int)parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) {
    Cut cut(base + part * each.used);
    forward_rows(a, a.n * part / parts, a.n * (part + 1) / parts, ForwardRoom(cut, a));
  }
  memset(a.counts, 0, a.e * sizeof(int64_t));
  for (int64_t part = 0; part < parts; part++) {
    Cut cut(base + part * each.used);
    const int64_t* counts = ForwardRoom(cut, a).counts;
    for (int64_t e = 0; e < a.e; e++) a.counts[e] += counts[e];
  }
  return OK;
}

int route_backward(const Route& a) {
  const int64_t parts = parts_of(a.n, a.threads), width = padded(a.e);
  float* base = (float*)moe_scratch(parts * 2 * width * sizeof(float));
  if (!base) return NO_MEMORY;
  const RouteRule r = rule_of(a);
#pragma omp parallel for num_threads((int)parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) {
    float *x = base + part * 2 * width, *d = x + width;
    for (int64_t n = a.n * part / parts; n < a.n * (part + 1) / parts; n++) backward_row(a, r, n, x, d);
  }
  return OK;
}

int sequence_loss_forward(const SequenceLoss& a) {
  const int64_t n = a.b * a.t, parts = parts_of(n, a.threads);
  Cut each;
  LossRoom(each, a);
  char* base = moe_scratch(parts * each.used);
  if (!base) return NO_MEMORY;
#pragma omp parallel for num_threads((int)parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) {
    Cut cut(base + part * each.used);
    count_rows(a, n * part / parts, n * (part + 1) / parts, LossRoom(cut, a));
  }
  for (int64_t b = 0; b < a.b; b++) {
    const float scale = (float)(a.e / (a.k * length_of(a, b)));
    for (int64_t e = 0; e < a.e; e++) {
      int64_t chosen = 0;
      for (int64_t part = 0; part < parts; part++) {
        Cut cut(base + part * each.used);
        chosen += LossRoom(cut, a).counts[b * a.e + e];
      }
      a.f[b * a.e + e] = chosen * scale;
    }
  }
#pragma omp parallel for num_threads((int)parts) schedule(static)
  for (int64_t i = 0; i < n; i++) share_of(a, i);
  double loss = a.b ? 0 : NAN;
  for (int64_t b = 0; b < a.b; b++) {
    const double each = 1. / (length_of(a, b) * a.b);
    for (int64_t i = b * a.t; i < (b + 1) * a.t; i++) {
      if (live(a, i)) loss += a.share[i] * each;
      a.gain[i] = live(a, i) ? (float)(each / a.gain[i]) : 0.f;
    }
  }
  *a.loss = (float)loss;
  return OK;
}

int sequence_loss_backward(const SequenceLoss& a) {
  const int64_t n = a.b * a.t, parts = parts_of(n, a.threads);
#pragma omp parallel for num_threads((int)parts) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const float *f = a.f + i / a.t * a.e, gain = a.gain[i] * *a.dloss, share = a.share[i];
    float* ds = a.ds + i * a.e;
    if (a.gain[i] == 0)
      memset(ds, 0, a.e * sizeof(float));
    else
      for (int64_t e = 0; e < a.e; e += W) store(ds + e, (load(f + e, a.e - e) - share) * gain, a.e - e);
  }
  return OK;
}

}  // namespace MOE_LEVEL
