// AdamW in one pass over a tensor, and the sum of squares that clipping asks for. reference: adamw (kernels/reference.py).
//
//     p <- p (1 - lr decay);  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2
//     p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
//
// Memory is all it takes: the gradient is read as it came (bf16 or fp32), clipped on the way, and the bf16 working copy is
// written beside the fp32 master.
#include "gemm.h"
#include "interface.h"
#include "scratch.h"

namespace MOE_LEVEL {
namespace {

template <class T>
void update(const Adamw& a) {
  const T* grads = (const T*)a.g;
  const V keep = all(a.keep), scale = all(a.scale), gain1 = all(1.f - a.beta1), decay2 = all(a.beta2),
          gain2 = all(1.f - a.beta2), rate = all(a.rate), root2 = all(a.root2), eps = all(a.eps);
  constexpr int64_t FEW = 1 << 15;  // below it a second thread is not worth waking
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.n > FEW)
  for (int64_t i = 0; i < a.n; i += W) {
    const int64_t n = a.n - i;
    V g = load(grads + i, n) * scale, m = load(a.m + i, n), v = load(a.v + i, n), p = load(a.p + i, n) * keep;
    m += gain1 * (g - m);
    v = decay2 * v + gain2 * g * g;
    p -= rate * m / (root(v) * root2 + eps);
    store(a.m + i, m, n);
    store(a.v + i, v, n);
    store(a.p + i, p, n);
    if (a.copy) store((bf16*)a.copy + i, p, n);
  }
}

// Blocks are the same for any number of threads, and are added up in order.
constexpr int64_t SQUARES = 1 << 14;

template <class T>
int squares(const SquareSum& a) {
  const T* x = (const T*)a.x;
  const int64_t blocks = (a.n + SQUARES - 1) / SQUARES;
  float* part = (float*)moe_scratch(blocks * sizeof(float) + 64);
  if (!part) return NO_MEMORY;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (blocks > 4)
  for (int64_t block = 0; block < blocks; block++) {
    V s[4] = {};
    for (int64_t i = block * SQUARES, end = least(a.n, i + SQUARES); i < end; i += 4 * W)
      for (int k = 0; k < 4 && i + k * W < end; k++) {
        V y = load(x + i + k * W, end - i - k * W);
        s[k] += y * y;
      }
    part[block] = sum((s[0] + s[1]) + (s[2] + s[3]));
  }
  double total = 0;
  for (int64_t block = 0; block < blocks; block++) total += part[block];
  *a.sum = total;
  return OK;
}

}  // namespace

int square_sum(const SquareSum& a) { return a.dtype == BF16 ? squares<bf16>(a) : squares<float>(a); }

int adamw(const Adamw& a) {
  if (a.dtype == BF16)
    update<bf16>(a);
  else
    update<float>(a);
  return OK;
}

}  // namespace MOE_LEVEL
