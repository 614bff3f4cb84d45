// Root-mean-square norm, forward and backward. reference: rms_norm (kernels/reference.py).
//
//     r = 1 / sqrt(mean(x^2) + eps)          [N]
//     y = x r w                              [N, D]
//
//     dx = r (dy w - x r mean(dy w x r))     [N, D]
//     dw = sum over rows of dy x r           [D]
//
// Rows are read where they lie. dw is summed up in blocks of rows, which depend on N alone, and the blocks in order.
#include "gemm.h"
#include "interface.h"
#include "scratch.h"

namespace MOE_LEVEL {
namespace {

constexpr int64_t FEW = 1 << 14;  // numbers below which a second thread is not worth waking
constexpr int64_t BLOCKS = 64;

template <class T>
void forward(const Norm& a) {
  const T *x = (const T*)a.x, *w = (const T*)a.weight;
  T* y = (T*)a.y;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.n * a.d > FEW)
  for (int64_t n = 0; n < a.n; n++) {
    const T* row = x + n * a.ldx;
    V squares = {};
    for (int64_t j = 0; j < a.d; j += W) {
      V v = load(row + j, a.d - j);
      squares += v * v;
    }
    const float r = 1.f / sqrtf(sum(squares) / a.d + a.eps);
    for (int64_t j = 0; j < a.d; j += W)
      store(y + n * a.d + j, load(row + j, a.d - j) * r * load(w + j, a.d - j), a.d - j);
    if (a.r) a.r[n] = r;
  }
}

// One row: dx, and its part of dw, which is padded.
template <class T>
inline void backward_row(const Norm& a, int64_t n, const T* w, float* dw) {
  const T *x = (const T*)a.x + n * a.ldx, *dy = (const T*)a.dy + n * a.lddy;
  T* dx = (T*)a.dx + n * a.d;
  const float r = a.r[n];
  V dot = {};
  for (int64_t j = 0; j < a.d; j += W) {
    V g = load(dy + j, a.d - j), hat = load(x + j, a.d - j) * r;
    dot += g * load(w + j, a.d - j) * hat;
    store(dw + j, load(dw + j) + g * hat);
  }
  const float mean = sum(dot) / a.d;
  for (int64_t j = 0; j < a.d; j += W) {
    V g = load(dy + j, a.d - j) * load(w + j, a.d - j), hat = load(x + j, a.d - j) * r;
    store(dx + j, (g - hat * mean) * r, a.d - j);
  }
}

template <class T>
int backward(const Norm& a) {
  const int64_t dp = padded(a.d), rows = (a.n + BLOCKS - 1) / BLOCKS, blocks = rows ? (a.n + rows - 1) / rows : 0;
  const T* w = (const T*)a.weight;
  float* sums = (float*)moe_scratch((blocks + 1) * dp * sizeof(float));
  if (!sums) return NO_MEMORY;
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.n * a.d > FEW)
  for (int64_t b = 0; b < blocks; b++) {
    float* dw = sums + b * dp;
    memset(dw, 0, dp * sizeof(float));
    for (int64_t n = b * rows; n < least(a.n, (b + 1) * rows); n++) backward_row(a, n, w, dw);
  }
  for (int64_t j = 0; j < a.d; j += W) {
    V s = {};
    for (int64_t b = 0; b < blocks; b++) s += load(sums + b * dp + j);
    store((T*)a.dweight + j, s, a.d - j);
  }
  return OK;
}

}  // namespace

int norm_forward(const Norm& a) {
  if (a.dtype == BF16)
    forward<bf16>(a);
  else
    forward<float>(a);
  return OK;
}
int norm_backward(const Norm& a) { return a.dtype == BF16 ? backward<bf16>(a) : backward<float>(a); }

}  // namespace MOE_LEVEL
