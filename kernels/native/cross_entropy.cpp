// Cross-entropy of a block of logits, in place. reference: linear_cross_entropy (kernels/reference.py).
//
//     loss = log sum exp(x) - x_target                       of a row; none where the target is negative
//     x <- softmax(x) - onehot(target)                       zeros where the target is negative
//     total <- total + losses, row after row                 in float64
//
// A row is read twice: for its largest value, and for the exponentials, which wait in fp32 for their sum.
#include "gemm.h"
#include "interface.h"
#include "scratch.h"

namespace MOE_LEVEL {
namespace {

// The first n <= W of a row, -inf behind them.
template <class T>
inline V load_low(const T* p, int64_t n) {
  V x = load(p, n);
  for (int64_t i = n; i < W; i++) x[i] = -INFINITY;
  return x;
}

// -> the loss; x becomes its gradient where that is wanted. room: fp32, padded V.
template <class T>
inline float row_loss(T* x, int64_t v, int64_t target, bool gradient, float* room) {
  V most = all(-INFINITY), odd = {};  // odd: NaN, which no comparison keeps
  for (int64_t j = 0; j < v; j += W) {
    V l = load_low(x + j, v - j);
    most = larger(l, most);
    odd += l == l ? V{} : l;
  }
  const float top = largest(most), at = wide(x[target]);
  V exps = {};
  for (int64_t j = 0; j < v; j += W) {
    V e = exp2((load_low(x + j, v - j) - top) * LOG2E);
    exps += e;
    if (gradient) store(room + j, e);
  }
  const float total = sum(exps) + sum(odd) + (top - top);  // infinite logits give NaN too
  if (gradient) {
    const float of_target = room[target];
    const V share = all(1.f / total);
    for (int64_t j = 0; j < v; j += W) store(x + j, load(room + j) * share, v - j);
    V left = all(of_target / total - 1.f);
    store(x + target, left, 1);
  }
  return logf(total) + (top - at);
}

template <class T>
int whole(const CrossEntropy& a) {
  const int64_t vp = padded(a.v), parts = a.threads < 1 ? 1 : a.threads;
  float* rooms = (float*)moe_scratch((parts * vp + a.n) * sizeof(float));
  if (!rooms) return NO_MEMORY;
  float* losses = rooms + parts * vp;
#pragma omp parallel for num_threads((int)parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++)
    for (int64_t n = a.n * part / parts; n < a.n * (part + 1) / parts; n++) {
      T* x = (T*)a.logits + n * a.v;
      losses[n] = 0;
      if (a.targets[n] >= 0)
        losses[n] = row_loss(x, a.v, a.targets[n], a.gradient, rooms + part * vp);
      else if (a.gradient)
        memset((void*)x, 0, a.v * sizeof(T));
    }
  for (int64_t n = 0; n < a.n; n++) *a.total += losses[n];
  return OK;
}

}  // namespace

int cross_entropy(const CrossEntropy& a) { return a.dtype == BF16 ? whole<bf16>(a) : whole<float>(a); }

}  // namespace MOE_LEVEL
