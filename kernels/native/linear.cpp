// Product of rows with an fp32 result: y = x w^T, [N, M] of x [N, D] and w [M, D].
//
// For the router's logits, which PyTorch would round to the dtype of x.
#include "gemm.h"
#include "interface.h"
#include "scratch.h"

namespace MOE_LEVEL {
namespace {

constexpr int64_t BLOCK = 192;  // rows a product, as in experts.cpp

template <class T>
struct Room {
  Row<T>* x;
  float* y;
  int64_t dp, mp;
  Room(Cut& cut, const Linear& a) : dp(padded(a.d)), mp(padded(a.m)) {
    x = cut.take<Row<T>>(BLOCK * dp);
    y = cut.take<float>(mp == a.m ? 0 : BLOCK * mp);
  }
};

template <class T>
void rows_of(const Linear& a, const Op<T>* w, int64_t begin, int64_t end, const Room<T>& r) {
  const int64_t width = r.dp * (int64_t)sizeof(Row<T>) / (int64_t)sizeof(Op<T>);
  for (int64_t n = begin; n < end; n += BLOCK) {
    const int64_t m = least(BLOCK, end - n);
    for (int64_t i = 0; i < m; i++) pack_row((const T*)a.x + (n + i) * a.d, a.d, r.x + i * r.dp);
    float* y = r.mp == a.m ? a.y + n * a.m : r.y;
    gemm(m, r.mp, steps<T>(a.d), (const Op<T>*)r.x, width, 1, w, r.mp, y, r.mp);
    if (y == r.y)
      for (int64_t i = 0; i < m; i++) memcpy(a.y + (n + i) * a.m, y + i * r.mp, a.m * sizeof(float));
  }
}

template <class T>
int product(const Linear& a) {
  const int64_t most = (a.n + BLOCK - 1) / BLOCK, parts = a.threads < 1 || most < 2 ? 1 : least(a.threads, most);
  Cut cut, each;
  cut.take<Op<T>>(steps<T>(a.d) * padded(a.m));
  Room<T>(each, a);
  char* base = moe_scratch(cut.used + parts * each.used);
  if (!base) return NO_MEMORY;
  const size_t before = cut.used;
  cut = Cut(base);
  Op<T>* w = cut.take<Op<T>>(steps<T>(a.d) * padded(a.m));
  pack_along(a.m, a.d, [&](int64_t i) { return (const T*)a.w + i * a.d; }, w, padded(a.m));
#pragma omp parallel for num_threads((int)parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) {
    Cut room(base + before + part * each.used);
    rows_of(a, w, a.n * part / parts, a.n * (part + 1) / parts, Room<T>(room, a));
  }
  return OK;
}

}  // namespace

int linear(const Linear& a) { return a.dtype == BF16 ? product<bf16>(a) : product<float>(a); }

}  // namespace MOE_LEVEL
