// The plain C interface: one struct of arguments an op, one entry point each. library.py mirrors the structs.
//
// Every level (build.py) defines all functions in a namespace of its own; dispatch.cpp chooses the level once and exports
// each as `int moe_<name>(const <Struct>*)`. Results: OK, or what was wrong. Matrices are row-major and contiguous; `dtype` is that of all
// `void` pointers of a struct. `threads`: at most so many; results have the same bits for any number.
#pragma once
#include <stdint.h>

enum { OK = 0, NO_MEMORY = 1, TOO_LARGE = 2, NOT_BUILT = 3 };
enum { FP32 = 0, BF16 = 1 };

// Routed experts (experts.cpp). N tokens, D model, E experts, K choices, F expert width.
// Either ids [N, K] with gates [N, K], or ends [E] with gates [N]: rows in expert order, K = 1.
typedef struct {
  int64_t n, d, f, e, k;
  int32_t dtype, threads;
  const void *x, *w13, *w2;  // [N, D], [E, 2F, D], [E, D, F]
  const int64_t* ids;        // [N, K]; outside [0, E): no expert
  const int32_t* ends;       // [E] or null
  const float* gates;
  void *y, *z;  // [N, D]; [N * K, 2F] in expert order: forward may leave it out (null), backward makes it again then
  const void* dy;
  void *dx, *dw13, *dw2;  // dw13, dw2 may be null together
  float* dgates;
} Experts;

// Causal attention, with MLA's rotary channels or without (attention.cpp). B batch, T time, H heads.
// Queries are [nope, rope] channels of a head; its key is `nope` of its own, then the row of k_rope that all heads share.
// Rotary channels come unrotated. rope = 0: plain attention, k_rope unused. scale is not negative.
typedef struct {
  void* at;                   // [B, T, H, n]
  int64_t batch, time, head;  // numbers from one to the next; the n channels are neighbours
} Heads;

typedef struct {
  int64_t b, t, h, nope, rope, value;
  int32_t dtype, threads;
  Heads q, k, k_rope, v;
  const float *cos, *sin;  // [B or 1, T, rope / 2], contiguous
  int64_t angle_batch;     // numbers from one batch row's angles to the next's; 0: shared
  const int32_t* first;    // [B, T] where the document of each position starts, or null: one document
  float scale;
  void* o;     // [B, T, H, value], contiguous
  float* lse;  // [B, H, T]: natural logarithm of the softmax's denominator, of scaled scores
  const void* dy;  // like o
  Heads dq, dk, dk_rope, dv;
} Attention;

// One step of decoding for the whole stack (decode.cpp). B sequences, T new tokens each, N = B T rows; MLA in absorbed form
// over the latent cache. Q, C latents, R rope channels, H heads, F expert width, G dense or shared width, V vocabulary.
typedef struct {
  const void *attn_norm, *q_a, *q_a_norm, *q_b;  // [D], [Q, D], [Q], [H (nope + R), Q]; q_a null: q_b has D columns
  const void *kv_a, *kv_a_norm, *kv_b, *o;       // [C + R, D], [C], [H (nope + v), C], [D, H v]
  const void *ffn_norm, *up, *down;              // [D]; dense or shared: [2G, D], [D, G], or null
  int64_t g;
  const void *router, *w13, *w2;  // [E, D], [E, 2F, D], [E, D, F]; router null: a dense layer
  const float* bias;              // [E]
  void* latents;                  // [B, capacity, C + R]: those of the new tokens are written
  int64_t* chosen;                // [N, K]: experts, best first
} DecodeLayer;

typedef struct {
  int64_t b, t, layers, capacity, d, h, q, c, nope, rope, v, e, k, f, groups, kept, vocab;
  int32_t dtype, threads, sigmoid, norm;
  float eps, scale, scaling;  // of norms, of scores, of gates
  const DecodeLayer* layer;
  const int64_t *tokens, *lengths;         // [N], [B]: tokens that the cache holds before this step
  const float *cos, *sin;                  // [capacity, R / 2]
  const void *embed, *last_norm, *head;    // [V, D], [D], [V, D]
  void* hidden;                            // [N, D] after the last norm
  float* logits;                           // [N, V]
  float temperature;       // 0: the first of the largest logits is drawn
  const int64_t* keys;     // [B] streams that others are drawn with: from number `number` of each on
  int64_t number;
  int64_t* drawn;          // [N]
  float* logprob;          // [N] of what was drawn, under the distribution that it was drawn from
} Decode;

// AdamW over one tensor (adamw.cpp). dtype is that of g; copy is bf16.
typedef struct {
  int64_t n;
  int32_t dtype, threads;
  float *p, *m, *v;
  const void* g;
  void* copy;  // or null
  float scale, beta1, beta2, eps;
  float keep, rate, root2;  // 1 - lr decay, lr / (1 - beta1^t), (1 - beta2^t)^-1/2
} Adamw;

typedef struct {
  int64_t n;
  int32_t dtype, threads;
  const void* x;
  double* sum;  // of the squares, one number
} SquareSum;

// RMSNorm (norm.cpp). N rows of D, those of x and dy ldx and lddy numbers apart.
typedef struct {
  int64_t n, d, ldx, lddy;
  int32_t dtype, threads;
  float eps;
  const void *x, *weight;
  void* y;
  float* r;  // [N] 1 / rms(x)
  const void* dy;
  void *dx, *dweight;
} Norm;

// SwiGLU (swiglu.cpp): a [N, F] of z [N, 2F].
typedef struct {
  int64_t n, f;
  int32_t dtype, threads;
  const void* z;
  void* a;
  const void* da;
  void* dz;
} Swiglu;

// Cross-entropy of logits [N, V] (cross_entropy.cpp): in place their gradient, where it is wanted.
typedef struct {
  int64_t n, v;
  int32_t dtype, threads, gradient;
  void* logits;
  const int64_t* targets;  // [N] below V; negative: none
  double* total;           // the losses are added to it
} CrossEntropy;

// Product of rows with an fp32 result (linear.cpp): y [N, M] of x [N, D] and w [M, D].
typedef struct {
  int64_t n, d, m;
  int32_t dtype, threads;
  const void *x, *w;
  float* y;
} Linear;

// Choice of experts (route.cpp). N tokens, E experts, K choices in the `kept` best of `groups`.
typedef struct {
  int64_t n, e, k, groups, kept;
  int32_t sigmoid, norm, threads;
  float scaling;
  const float *logits, *bias;  // [N, E], [E]
  const uint8_t* mask;         // [N] or null: 0 is a token that is not routed
  int64_t* ids;                // [N, K]; backward: outside [0, E) is no expert
  float* gates;                // [N, K]
  int64_t* counts;             // [E]
  float* s;                    // [N, E] affinities, or null
  const float *dgates, *ds;    // ds may be null
  float* dlogits;
} Route;

// The router's sequence-wise loss (route.cpp). B sequences of T tokens.
typedef struct {
  int64_t b, t, e, k;
  int32_t threads;
  const float* s;       // [B, T, E]
  const uint8_t* mask;  // [B, T] or null
  float *loss, *f, *share, *gain;  // scalar, [B, E], [B, T] x 2: gain is 1 / (B length sum(s))
  const float* dloss;
  float* ds;
} SequenceLoss;

#define MOE_FUNCTIONS(X) \
  X(experts_forward, Experts) X(experts_backward, Experts) X(attention_forward, Attention) \
  X(attention_backward, Attention) X(decode_step, Decode) X(adamw, Adamw) X(square_sum, SquareSum) \
  X(norm_forward, Norm) X(norm_backward, Norm) X(swiglu_forward, Swiglu) X(swiglu_backward, Swiglu) \
  X(cross_entropy, CrossEntropy) X(linear, Linear) X(route_forward, Route) X(route_backward, Route) \
  X(sequence_loss_forward, SequenceLoss) X(sequence_loss_backward, SequenceLoss)

// library.py asks for their sizes: a mirror that drifted is told.
#define MOE_STRUCTS(X) \
  X(Adamw) X(SquareSum) X(Norm) X(Swiglu) X(CrossEntropy) X(Linear) X(Route) X(SequenceLoss) X(Experts) \
  X(Attention) X(DecodeLayer) X(Decode)

#define MOE_LEVELS(X) X(portable) X(avx2) X(avx512) X(avx512bf16)

#define MOE_DECLARE(name, args) int name(const args&);
#define MOE_DECLARE_LEVEL(level)      \
  namespace level {                   \
  MOE_FUNCTIONS(MOE_DECLARE)          \
  }
MOE_LEVELS(MOE_DECLARE_LEVEL)
#undef MOE_DECLARE
#undef MOE_DECLARE_LEVEL
