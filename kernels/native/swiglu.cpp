// SwiGLU of a dense feed-forward, forward and backward. reference: swiglu (kernels/reference.py).
//
//     a = silu(z_gate) z_up                                   [N, F] of z [N, 2F]: gate channels, then up channels
//
//     dz_up = da silu(z_gate)
//     dz_gate = da z_up s (1 + z_gate (1 - s))                s = sigmoid(z_gate)
#include "gemm.h"
#include "interface.h"

namespace MOE_LEVEL {
namespace {

constexpr int64_t FEW = 1 << 13;  // numbers below which a second thread is not worth waking

template <class T>
void forward(const Swiglu& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.n * a.f > FEW)
  for (int64_t n = 0; n < a.n; n++) {
    const T *gate = (const T*)a.z + n * 2 * a.f, *up = gate + a.f;
    T* out = (T*)a.a + n * a.f;
    for (int64_t j = 0; j < a.f; j += W) {
      V g = load(gate + j, a.f - j);
      store(out + j, g * sigmoid(g) * load(up + j, a.f - j), a.f - j);
    }
  }
}

template <class T>
void backward(const Swiglu& a) {
#pragma omp parallel for num_threads(a.threads) schedule(static) if (a.n * a.f > FEW)
  for (int64_t n = 0; n < a.n; n++) {
    const T *gate = (const T*)a.z + n * 2 * a.f, *up = gate + a.f, *da = (const T*)a.da + n * a.f;
    T *dgate = (T*)a.dz + n * 2 * a.f, *dup = dgate + a.f;
    for (int64_t j = 0; j < a.f; j += W) {
      V g = load(gate + j, a.f - j), d = load(da + j, a.f - j), s = sigmoid(g);
      store(dgate + j, d * load(up + j, a.f - j) * s * (1.f + g * (1.f - s)), a.f - j);
      store(dup + j, d * g * s, a.f - j);
    }
  }
}

}  // namespace

int swiglu_forward(const Swiglu& a) {
  if (a.dtype == BF16)
    forward<bf16>(a);
  else
    forward<float>(a);
  return OK;
}
int swiglu_backward(const Swiglu& a) {
  if (a.dtype == BF16)
    backward<bf16>(a);
  else
    backward<float>(a);
  return OK;
}

}  // namespace MOE_LEVEL
