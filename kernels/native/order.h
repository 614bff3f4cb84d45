// Expert order: rows sorted by expert, and within an expert by choice (stable). reference: order in kernels/eager.py.
//
// Tokens are cut into `parts` ranges, one for each thread: rows of one expert that belong to one part are neighbours, so
// a thread owns whole tokens and adds up their experts in rising order, whatever the number of parts.
#pragma once
#include "gemm.h"
#include "interface.h"
#include "scratch.h"

namespace MOE_LEVEL {
namespace {

struct Order {
  int64_t parts, e, k;
  int32_t* start;   // [E, parts] first row of each, then one past the last row of all
  int32_t* choice;  // [rows]: flat choice n * K + k at each row; null: the row itself
  int64_t first(int64_t expert, int64_t part) const { return start[expert * parts + part]; }
  int64_t last(int64_t expert, int64_t part) const { return start[expert * parts + part + 1]; }
  int64_t rows(int64_t expert) const { return first(expert + 1, 0) - first(expert, 0); }
  int64_t choice_at(int64_t row) const { return choice ? choice[row] : row; }
  int64_t token_at(int64_t row) const { return choice ? (uint32_t)choice[row] / (uint32_t)k : row; }
};

inline int64_t token_bound(const Experts& a, int64_t parts, int64_t part) { return a.n * part / parts; }

inline Order cut_order(Cut& cut, const Experts& a, int64_t parts) {
  int32_t* start = cut.take<int32_t>(a.e * parts + 1);
  return Order{parts, a.e, a.k, start, a.ends ? nullptr : cut.take<int32_t>(a.n * a.k)};
}

inline void sort_rows(const Experts& a, const Order& o) {
  if (a.ends) {
    int64_t begin = 0;
    for (int64_t e = 0; e < a.e; e++) {
      int64_t end = least(a.ends[e] > begin ? a.ends[e] : begin, a.n);
      for (int64_t p = 0; p < o.parts; p++) {
        int64_t bound = token_bound(a, o.parts, p);
        o.start[e * o.parts + p] = (int32_t)(bound < begin ? begin : least(bound, end));
      }
      begin = end;
    }
    o.start[a.e * o.parts] = (int32_t)begin;
    return;
  }
  memset(o.start, 0, (a.e * o.parts + 1) * sizeof(int32_t));
  const uint64_t experts = a.e;
#pragma omp parallel for num_threads((int)o.parts) schedule(static, 1)
  for (int64_t p = 0; p < o.parts; p++)
    for (int64_t i = token_bound(a, o.parts, p) * a.k; i < token_bound(a, o.parts, p + 1) * a.k; i++)
      if ((uint64_t)a.ids[i] < experts) o.start[a.ids[i] * o.parts + p]++;
  int32_t total = 0;
  for (int64_t i = 0; i <= a.e * o.parts; i++) {
    int32_t count = o.start[i];
    o.start[i] = total;
    total += count;
  }
#pragma omp parallel for num_threads((int)o.parts) schedule(static, 1)
  for (int64_t p = 0; p < o.parts; p++)  // moves each start to its end, which is the next one's start
    for (int64_t i = token_bound(a, o.parts, p) * a.k; i < token_bound(a, o.parts, p + 1) * a.k; i++)
      if ((uint64_t)a.ids[i] < experts) o.choice[o.start[a.ids[i] * o.parts + p]++] = (int32_t)i;
  for (int64_t i = a.e * o.parts; i > 0; i--) o.start[i] = o.start[i - 1];
  o.start[0] = 0;
}

}  // namespace
}  // namespace MOE_LEVEL
