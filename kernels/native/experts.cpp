// Routed SwiGLU experts, forward and backward. reference: experts, grouped_swiglu (kernels/reference.py).
//
//     z = rows w13^T                [M, 2F]   rows of x in expert order, gate channels then up channels
//     a = silu(z_gate) z_up g       [M, F]    g the row's gate weight
//     y = sum over k of a w2^T      [N, D]    added up in fp32
//
//     da = dy w2, dg = da . silu(z_gate) z_up, dz = ..., dx = sum over k of dz w13
//     dw13 = dz^T rows, dw2 = dy^T a
//
// Each thread owns a range of tokens and runs through all experts with it, so that nobody else adds to its rows of y and
// dx. Gradients of weights run over all rows of an expert, so the backward pass goes by groups of experts: first rows by
// tokens, as above, leaving dz and a, then weights by experts. A group's rows stay in the cache in between.
#include "order.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace MOE_LEVEL {
namespace {

constexpr int64_t BLOCK = 192;   // rows a product: its operands and results fit the second cache
constexpr int64_t AHEAD = 6;     // rows that are asked for before they are read
constexpr int64_t GROUP = 4096;  // rows between the two halves of the backward pass

template <class T>
struct Shape {
  int64_t d, f, dp, fp;  // p: padded to whole vectors
  int64_t dk, fk;        // steps along K of rows of D, and of F (padded)
  explicit Shape(const Experts& a)
      : d(a.d), f(a.f), dp(padded(a.d)), fp(padded(a.f)), dk(steps<T>(a.d)), fk(steps<T>(padded(a.f))) {}
};

inline int64_t parts_of(const Experts& a) { return a.threads < 1 ? 1 : least(a.threads, a.n > 0 ? a.n : 1); }

// Sums of a token's rows: y or dx itself where it is fp32 without padding, else a copy.
template <class T>
float* sums_of(Cut& cut, const Experts& a, const Shape<T>& s, void* out) {
  if (sizeof(T) == 4 && s.d == s.dp) return (float*)out;
  return cut.take<float>(a.n * s.dp);
}

template <class T>
void start_sums(const Experts& a, const Shape<T>& s, int64_t parts, int64_t part, float* sums) {
  int64_t begin = token_bound(a, parts, part), end = token_bound(a, parts, part + 1);
  memset(sums + begin * s.dp, 0, (end - begin) * s.dp * sizeof(float));
}

template <class T>
void finish_sums(const Experts& a, const Shape<T>& s, int64_t parts, int64_t part, const float* sums, T* out) {
  if ((const void*)sums == (const void*)out) return;
  for (int64_t n = token_bound(a, parts, part); n < token_bound(a, parts, part + 1); n++)
    for (int64_t j = 0; j < s.d; j += W) store(out + n * s.d + j, load(sums + n * s.dp + j), s.d - j);
}

// w13 of an expert for rows w13^T: [D steps][gate padded, up padded]
template <class T>
void pack_w13_along(const Shape<T>& s, const T* w13, Op<T>* out) {
  pack_along(s.f, s.d, [&](int64_t i) { return w13 + i * s.d; }, out, 2 * s.fp);
  pack_along(s.f, s.d, [&](int64_t i) { return w13 + (s.f + i) * s.d; }, out + s.fp, 2 * s.fp);
}

// rows * silu, for one row of z: fp32 in z (padded halves), gate-weighted activation out
template <class T>
inline void activate(const Shape<T>& s, const float* z, float gate, Row<T>* a) {
  for (int64_t j = 0; j < s.fp; j += W) {
    V g = load(z + j), u = load(z + s.fp + j);
    store(a + j, g * sigmoid(g) * u * gate);
  }
}

// ----------------------------------------------------------------------------------------------------------- forward

template <class T>
struct ForwardRoom {
  Op<T>*w13, *w2;
  Row<T>*x, *a;
  float* z;
  int64_t* at;
  ForwardRoom(Cut& cut, const Shape<T>& s) {
    w13 = cut.take<Op<T>>(s.dk * 2 * s.fp);
    w2 = cut.take<Op<T>>(s.fk * s.dp);
    x = cut.take<Row<T>>(BLOCK * s.dp);
    a = cut.take<Row<T>>(BLOCK * s.fp);
    z = cut.take<float>(BLOCK * 2 * s.fp);
    at = cut.take<int64_t>(BLOCK);
  }
};

template <class T>
void gather_rows(const Shape<T>& s, const Order& o, const T* from, int64_t row, int64_t m, Row<T>* out) {
  for (int64_t i = 0; i < m; i++) {
    if (i + AHEAD < m) prefetch(from + o.token_at(row + i + AHEAD) * s.d, s.d);
    pack_row(from + o.token_at(row + i) * s.d, s.d, out + i * s.dp);
  }
}

template <class T>
inline int64_t width_of_row(int64_t n) { return n * (int64_t)sizeof(Row<T>) / (int64_t)sizeof(Op<T>); }

// sums[at[i]] += rows[i] b. A token that chose an expert twice has neighbouring rows, which must not meet in one product.
template <class T>
void add_rows(int64_t m, int64_t n, int64_t k, const Row<T>* rows, int64_t width, const Op<T>* b, float* sums,
              const int64_t* at) {
  for (int64_t i = 0, j; i < m; i = j) {
    for (j = i + 1; j < m && at[j] != at[j - 1];) j++;
    gemm(j - i, n, k, (const Op<T>*)(rows + i * width), width_of_row<T>(width), 1, b, n, Target{sums, 0, at + i, true});
  }
}

template <class T>
void up(const Shape<T>& s, int64_t m, const Row<T>* x, const Op<T>* w13, float* z) {
  gemm(m, 2 * s.fp, s.dk, (const Op<T>*)x, width_of_row<T>(s.dp), 1, w13, 2 * s.fp, z, 2 * s.fp);
}

template <class T>
void forward_rows(const Experts& a, const Shape<T>& s, const Order& o, int64_t part, const ForwardRoom<T>& r,
                  float* sums) {
  const T *w13 = (const T*)a.w13, *w2 = (const T*)a.w2;
  for (int64_t e = 0; e < a.e; e++) {
    int64_t first = o.first(e, part), last = o.last(e, part);
    if (first == last) continue;
    pack_w13_along(s, w13 + e * 2 * s.f * s.d, r.w13);
    pack_along(s.d, s.f, [&](int64_t i) { return w2 + (e * s.d + i) * s.f; }, r.w2, s.dp);
    for (int64_t p = steps<T>(s.f); p < s.fk; p++) memset(r.w2 + p * s.dp, 0, s.dp * sizeof(Op<T>));
    for (int64_t row = first; row < last; row += BLOCK) {
      int64_t m = least(BLOCK, last - row);
      gather_rows(s, o, (const T*)a.x, row, m, r.x);
      up(s, m, r.x, r.w13, r.z);
      for (int64_t i = 0; i < m; i++) {
        const float* z = r.z + i * 2 * s.fp;
        activate(s, z, a.gates[o.choice_at(row + i)], r.a + i * s.fp);
        if (a.z) {
          T* kept = (T*)a.z + (row + i) * 2 * s.f;
          for (int64_t j = 0; j < s.f; j += W) {
            store(kept + j, load(z + j), s.f - j);
            store(kept + s.f + j, load(z + s.fp + j), s.f - j);
          }
        }
        r.at[i] = o.token_at(row + i) * s.dp;
      }
      add_rows<T>(m, s.dp, s.fk, r.a, s.fp, r.w2, sums, r.at);
    }
  }
}

template <class T>
int forward(const Experts& a) {
  const Shape<T> s(a);
  const int64_t parts = parts_of(a);
  Cut each;
  ForwardRoom<T>(each, s);
  const int64_t room = each.used;
  Cut shared;
  cut_order(shared, a, parts);
  sums_of(shared, a, s, a.y);
  char* base = moe_scratch(shared.used + parts * room);
  if (!base) return NO_MEMORY;
  shared = Cut(base);
  const Order o = cut_order(shared, a, parts);
  float* sums = sums_of(shared, a, s, a.y);
  char* rooms = base + shared.used;
  sort_rows(a, o);
#pragma omp parallel num_threads((int)parts)
  for (int64_t part = omp_get_thread_num(); part < parts; part += omp_get_num_threads()) {
    Cut cut(rooms + part * room);
    start_sums(a, s, parts, part, sums);
    forward_rows(a, s, o, part, ForwardRoom<T>(cut, s), sums);
    finish_sums(a, s, parts, part, sums, (T*)a.y);
  }
  return OK;
}

// ---------------------------------------------------------------------------------------------------------- backward

template <class T>
struct BackwardRoom {
  Op<T>*w13_along, *w13, *w2, *x_steps, *dy_steps, *dz_steps, *a_steps;
  Row<T>*x, *dy;
  float *z, *da, *dw13, *dw2;
  int64_t* at;
  BackwardRoom(Cut& cut, const Shape<T>& s, bool again) {
    w13_along = cut.take<Op<T>>(again ? s.dk * 2 * s.fp : 0);
    w13 = cut.take<Op<T>>(2 * s.fk * s.dp);
    w2 = cut.take<Op<T>>(s.dk * s.fp);
    x_steps = cut.take<Op<T>>(steps<T>(BLOCK) * s.dp);
    dy_steps = cut.take<Op<T>>(steps<T>(BLOCK) * s.dp);
    dz_steps = cut.take<Op<T>>(steps<T>(BLOCK) * 2 * s.fp);
    a_steps = cut.take<Op<T>>(steps<T>(BLOCK) * s.fp);
    x = cut.take<Row<T>>(again ? BLOCK * s.dp : 0);
    dy = cut.take<Row<T>>(BLOCK * s.dp);
    z = cut.take<float>(BLOCK * 2 * s.fp);
    da = cut.take<float>(BLOCK * s.fp);
    dw13 = cut.take<float>(2 * s.f * s.dp);
    dw2 = cut.take<float>(s.d * s.fp);
    at = cut.take<int64_t>(BLOCK);
  }
};

// What the first half leaves for the second: rows of one group of experts.
template <class T>
struct Left {
  Row<T>*dz, *a;  // [rows, 2 Fp], [rows, Fp]
  Left(Cut& cut, const Shape<T>& s, int64_t rows) {
    dz = cut.take<Row<T>>(rows * 2 * s.fp);
    a = cut.take<Row<T>>(rows * s.fp);
  }
};

// One row: da [Fp] and z (halves `half` apart, f valid) -> dz [2 Fp], a [Fp]; returns the gradient of its gate.
template <class T, class Z>
inline float differentiate(const Shape<T>& s, const float* da, const Z* z, int64_t half, float gate, Row<T>* dz,
                           Row<T>* a) {
  V dot = {};
  for (int64_t j = 0; j < s.fp; j += W) {
    V g = load(z + j, s.f - j), u = load(z + half + j, s.f - j), d = load(da + j);
    V sig = sigmoid(g), silu = g * sig, h = silu * u;
    dot += d * h;
    d *= gate;
    store(a + j, h * gate);
    store(dz + j, d * u * (sig + silu * (1.f - sig)));
    store(dz + s.fp + j, d * silu);
  }
  return sum(dot);
}

template <class T>
void backward_rows(const Experts& a, const Shape<T>& s, const Order& o, int64_t part, int64_t begin, int64_t end,
                   const BackwardRoom<T>& r, const Left<T>& left, float* sums) {
  const T *w13 = (const T*)a.w13, *w2 = (const T*)a.w2, *z = (const T*)a.z;
  const int64_t base = o.first(begin, 0);
  for (int64_t e = begin; e < end; e++) {
    int64_t first = o.first(e, part), last = o.last(e, part);
    if (first == last) continue;
    const T *up_rows = w13 + e * 2 * s.f * s.d, *down = w2 + e * s.d * s.f;
    pack_across(s.d, s.f, [&](int64_t i) { return down + i * s.f; }, r.w2, s.fp);
    pack_across(s.f, s.d, [&](int64_t i) { return up_rows + i * s.d; }, r.w13, s.dp, s.fk);
    pack_across(s.f, s.d, [&](int64_t i) { return up_rows + (s.f + i) * s.d; }, r.w13 + s.fk * s.dp, s.dp, s.fk);
    if (!z) pack_w13_along(s, up_rows, r.w13_along);
    for (int64_t row = first; row < last; row += BLOCK) {
      int64_t m = least(BLOCK, last - row);
      gather_rows(s, o, (const T*)a.dy, row, m, r.dy);
      gemm(m, s.fp, s.dk, (const Op<T>*)r.dy, width_of_row<T>(s.dp), 1, r.w2, s.fp, r.da, s.fp);
      if (!z) {
        gather_rows(s, o, (const T*)a.x, row, m, r.x);
        up(s, m, r.x, r.w13_along, r.z);
      }
      Row<T>*dz = left.dz + (row - base) * 2 * s.fp, *act = left.a + (row - base) * s.fp;
      for (int64_t i = 0; i < m; i++) {
        int64_t choice = o.choice_at(row + i);
        if (i + AHEAD < m) __builtin_prefetch(a.gates + o.choice_at(row + i + AHEAD));
        const float *da = r.da + i * s.fp, gate = a.gates[choice];
        a.dgates[choice] =
            z ? differentiate(s, da, z + (row + i) * 2 * s.f, s.f, gate, dz + i * 2 * s.fp, act + i * s.fp)
              : differentiate(s, da, r.z + i * 2 * s.fp, s.fp, gate, dz + i * 2 * s.fp, act + i * s.fp);
        r.at[i] = o.token_at(row + i) * s.dp;
      }
      add_rows<T>(m, s.dp, 2 * s.fk, dz, 2 * s.fp, r.w13, sums, r.at);
    }
  }
}

template <class T>
void weights_of(const Experts& a, const Shape<T>& s, const Order& o, int64_t e, int64_t base, const BackwardRoom<T>& r,
                const Left<T>& left) {
  const T *x = (const T*)a.x, *dy = (const T*)a.dy;
  T *dw13 = (T*)a.dw13 + e * 2 * s.f * s.d, *dw2 = (T*)a.dw2 + e * s.d * s.f;
  int64_t first = o.first(e, 0), last = o.first(e + 1, 0);
  if (first == last) {
    memset((void*)dw13, 0, 2 * s.f * s.d * sizeof(T));
    memset((void*)dw2, 0, s.d * s.f * sizeof(T));
    return;
  }
  for (int64_t row = first; row < last; row += BLOCK) {
    int64_t m = least(BLOCK, last - row), k = steps<T>(m);
    const Row<T>*dz = left.dz + (row - base) * 2 * s.fp, *act = left.a + (row - base) * s.fp;
    auto scattered = [&](const T* from) {
      return [=, &o, &s](int64_t i) {
        if (i + AHEAD < m) prefetch(from + o.token_at(row + i + AHEAD) * s.d, s.d);
        return from + o.token_at(row + i) * s.d;
      };
    };
    pack_across(m, s.d, scattered(x), r.x_steps, s.dp);
    pack_across(m, s.d, scattered(dy), r.dy_steps, s.dp);
    pack_across(m, 2 * s.fp, [&](int64_t i) { return dz + i * 2 * s.fp; }, r.dz_steps, 2 * s.fp);
    pack_across(m, s.fp, [&](int64_t i) { return act + i * s.fp; }, r.a_steps, s.fp);
    bool add = row > first;
    gemm(s.f, s.dp, k, r.dz_steps, 1, 2 * s.fp, r.x_steps, s.dp, r.dw13, s.dp, add);
    gemm(s.f, s.dp, k, r.dz_steps + s.fp, 1, 2 * s.fp, r.x_steps, s.dp, r.dw13 + s.f * s.dp, s.dp, add);
    gemm(s.d, s.fp, k, r.dy_steps, 1, s.dp, r.a_steps, s.fp, r.dw2, s.fp, add);
  }
  for (int64_t i = 0; i < 2 * s.f; i++)
    for (int64_t j = 0; j < s.d; j += W) store(dw13 + i * s.d + j, load(r.dw13 + i * s.dp + j), s.d - j);
  for (int64_t i = 0; i < s.d; i++)
    for (int64_t j = 0; j < s.f; j += W) store(dw2 + i * s.f + j, load(r.dw2 + i * s.fp + j), s.f - j);
}

// One past the last expert of the group that starts at `begin`: up to GROUP rows, at least one expert.
inline int64_t group_end(const Order& o, int64_t begin) {
  int64_t end = begin + 1;
  while (end < o.e && o.first(end + 1, 0) - o.first(begin, 0) <= GROUP) end++;
  return end;
}

template <class T>
int backward(const Experts& a) {
  const Shape<T> s(a);
  const int64_t parts = parts_of(a);
  const bool again = !a.z;
  Cut each;
  BackwardRoom<T>(each, s, again);
  const int64_t room = each.used;
  const int64_t most = least(a.n * a.k, GROUP);
  Cut shared;
  cut_order(shared, a, parts);
  sums_of(shared, a, s, a.dx);
  const size_t before = shared.used;
  Left<T>(shared, s, most);
  char* base = moe_scratch(shared.used + parts * room);
  if (!base) return NO_MEMORY;
  shared = Cut(base);
  Order o = cut_order(shared, a, parts);
  sort_rows(a, o);
  int64_t rows = 0;  // of the largest group: more than GROUP only for an expert that has more
  for (int64_t e = 0; e < a.e; e = group_end(o, e)) {
    int64_t group = o.first(group_end(o, e), 0) - o.first(e, 0);
    rows = group > rows ? group : rows;
  }
  if (rows > most) {
    shared.used = before;
    Left<T>(shared, s, rows);
    base = moe_scratch(shared.used + parts * room);
    if (!base) return NO_MEMORY;
    shared = Cut(base);
    o = cut_order(shared, a, parts);
    sort_rows(a, o);
  }
  float* sums = sums_of(shared, a, s, a.dx);
  const Left<T> left(shared, s, rows > most ? rows : most);
  char* rooms = base + shared.used;
  memset(a.dgates, 0, a.n * a.k * sizeof(float));
#pragma omp parallel num_threads((int)parts)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t part = me; part < parts; part += team) start_sums(a, s, parts, part, sums);
    for (int64_t begin = 0, end; begin < a.e; begin = end) {
      end = group_end(o, begin);
      for (int64_t part = me; part < parts; part += team) {
        Cut cut(rooms + me * room);
        backward_rows(a, s, o, part, begin, end, BackwardRoom<T>(cut, s, again), left, sums);
      }
#pragma omp barrier
      if (!a.dw13) continue;
#pragma omp for schedule(dynamic, 1)
      for (int64_t e = begin; e < end; e++) {
        Cut cut(rooms + me * room);
        weights_of(a, s, o, e, o.first(begin, 0), BackwardRoom<T>(cut, s, again), left);
      }
    }
    for (int64_t part = me; part < parts; part += team) finish_sums(a, s, parts, part, sums, (T*)a.dx);
  }
  return OK;
}

inline bool too_large(const Experts& a) { return a.n * a.k > INT32_MAX || a.n * a.k * a.e < 0; }

}  // namespace

int experts_forward(const Experts& a) {
  if (too_large(a)) return TOO_LARGE;
  return a.dtype == BF16 ? forward<bf16>(a) : forward<float>(a);
}
int experts_backward(const Experts& a) {
  if (too_large(a)) return TOO_LARGE;
  return a.dtype == BF16 ? backward<bf16>(a) : backward<float>(a);
}

}  // namespace MOE_LEVEL
