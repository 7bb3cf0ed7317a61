// Attention over paged keys and values, block by block in order of position with a running maximum. A score is one chain
// over the dimensions, an output one chain over the tokens: the order depends on the row's own position alone.
#pragma once
#include <stddef.h>

#include "numeric.h"
#include "state.h"

namespace {

constexpr int kTokens = LLK_BLOCK_TOKENS, kTile = LLK_KEY_TILE;

struct Half {
  typedef uint16_t type;
  static LLK_INLINE F8 get(const uint16_t* p) { return load_half(p); }
  static LLK_INLINE void put(uint16_t* p, F8 a) { store_half(p, max(splat(-kHalfMax), min(splat(kHalfMax), a))); }
};
struct Single {
  typedef float type;
  static LLK_INLINE F8 get(const float* p) { return load(p); }
  static LLK_INLINE void put(float* p, F8 a) { store(p, a); }
};

// What one work item needs: queries of neighbouring rows of a sequence that share a key head.
struct Queries {
  int count;
  const float* query[kMaxQueries];
  float* out[kMaxQueries];
  int first[kMaxQueries], last[kMaxQueries];  // visible positions, both included
};

struct KVHead {
  const void *keys, *values;
  const int32_t* table;
  int kv_heads, kv_head, head_dim;
  float softcap;
};

inline size_t kv_offset(int block, int kv_heads, int kv_head, int head_dim) {
  return ((size_t)block * kv_heads + kv_head) * kTokens * head_dim;
}

template <class KV>
inline const typename KV::type* keys_of(const KVHead& kv, int block) {
  return (const typename KV::type*)kv.keys + kv_offset(kv.table[block], kv.kv_heads, kv.kv_head, kv.head_dim);
}

// Scores of 16 tokens (two tiles of `keys`) from `token` of the block on, for N queries. `ahead`: as many elements that
// are soon to be read.
template <class KV, int N>
LLK_INLINE void score_tiles(const typename KV::type* keys, int dim, const float* const* query, float (*scores)[kTokens],
                            int token, const typename KV::type* ahead) {
  F8 low[N], high[N];
#pragma GCC unroll 4
  for (int q = 0; q < N; q++) low[q] = high[q] = splat(0.f);
  for (int d = 0; d < dim; d++) {
    const F8 k_low = KV::get(keys + d * kTile), k_high = KV::get(keys + (dim + d) * kTile);
    __builtin_prefetch(ahead + d * 2 * kTile);
#pragma GCC unroll 4
    for (int q = 0; q < N; q++) {
      const F8 x = splat(query[q][d]);
      low[q] = fma(x, k_low, low[q]);
      high[q] = fma(x, k_high, high[q]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < N; q++) {
    store(scores[q] + token, low[q]);
    store(scores[q] + token + kTile, high[q]);
  }
}

// out[d..d+16] += weights of tokens first <= t < last times their values, for N queries. `ahead` as above.
template <class KV, int N>
LLK_INLINE void weigh_values(const typename KV::type* values, int dim, int first, int last, float (*weights)[kTokens],
                             float* const* out, int d, const typename KV::type* ahead) {
  F8 low[N], high[N];
#pragma GCC unroll 4
  for (int q = 0; q < N; q++) {
    low[q] = load(out[q] + d);
    high[q] = load(out[q] + d + 8);
  }
  for (int t = first; t < last; t++) {
    const F8 v_low = KV::get(values + (size_t)t * dim + d), v_high = KV::get(values + (size_t)t * dim + d + 8);
    __builtin_prefetch(ahead + t * 2 * kTile);
#pragma GCC unroll 4
    for (int q = 0; q < N; q++) {
      const F8 x = splat(weights[q][t]);
      low[q] = fma(x, v_low, low[q]);
      high[q] = fma(x, v_high, high[q]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < N; q++) {
    store(out[q] + d, low[q]);
    store(out[q] + d + 8, high[q]);
  }
}

// Calls f with the number of queries as a constant, four at a time.
template <class F>
LLK_INLINE void by_four(int count, F f) {
  for (int q = 0; q < count; q += 4) switch (count - q) {
      case 1: f(q, Constant<1>()); break;
      case 2: f(q, Constant<2>()); break;
      case 3: f(q, Constant<3>()); break;
      default: f(q, Constant<4>());
    }
}

// Scores to weights of a block's tokens first <= t < last for one query; the sums so far are rescaled.
inline void soften(AttentionScratch& s, int q, int first, int last, int visible_first, int visible_last, int dim,
                   float cap, float* out) {
  const F8 none = splat(-INFINITY), zero = splat(0.f);
  F8 peak = none;
  for (int t = first; t < last; t += kTile) {
    F8 score = load(s.scores[q] + t);
    if (cap > 0.f) score = softcap(score, cap);
    score = lanes(score, none, visible_first - t, visible_last + 1 - t);
    store(s.scores[q] + t, score);
    peak = max(score, peak);
  }
  const float most = largest(peak), before = s.peak[q];
  const bool visible = visible_first < last && visible_last >= first && visible_first <= visible_last;
  const float now = visible && most > before ? most : before;
  const F8 shift = splat(now);
  float factors[8];
  store(factors, exponential(splat(before) - shift));
  if (before != now) {
    for (int d = 0; d < dim; d += 8) store(out + d, load(out + d) * splat(factors[0]));
    store(s.total[q], load(s.total[q]) * splat(factors[0]));
  }
  s.peak[q] = now;
  for (int t = first; t < last; t += kTile) {
    const F8 weight = visible ? exponential(load(s.scores[q] + t) - shift) : zero;
    const F8 kept = lanes(weight, zero, visible_first - t, visible_last + 1 - t);
    store(s.scores[q] + t, kept);
    store(s.total[q], load(s.total[q]) + kept);
  }
}

template <class KV>
inline void attend_block(const Queries& queries, const KVHead& kv, int block, int first, int last, const void* next,
                         AttentionScratch& s) {
  typedef typename KV::type T;
  const int dim = kv.head_dim, base = block * kTokens;
  const T* keys = keys_of<KV>(kv, block);
  const T* values = (const T*)kv.values + (keys - (const T*)kv.keys);
  const int from = first / (2 * kTile) * (2 * kTile), to = (last + 2 * kTile - 1) / (2 * kTile) * (2 * kTile);
  for (int t = from; t < to; t += 2 * kTile)
    by_four(queries.count, [&](int q, auto n) __attribute__((always_inline)) {
      const size_t at = (size_t)t * dim;
      score_tiles<KV, n.value>(keys + at, dim, queries.query + q, s.scores + q, t, values + at);
    });
  for (int q = 0; q < queries.count; q++)
    soften(s, q, from, to, queries.first[q] - base, queries.last[q] - base, dim, kv.softcap, queries.out[q]);
  for (int d = 0; d < dim; d += 16)
    by_four(queries.count, [&](int q, auto n) __attribute__((always_inline)) {
      const T* ahead = (const T*)next + d * kTokens;
      weigh_values<KV, n.value>(values, dim, first, last, s.scores + q, queries.out + q, d, ahead);
    });
}

// `following`: keys that this thread is likely to read next.
template <class KV>
inline void attend(const Queries& queries, const KVHead& kv, const void* following, AttentionScratch& s) {
  int first = queries.first[0], last = queries.last[0];
  for (int q = 0; q < queries.count; q++) {
    first = queries.first[q] < first ? queries.first[q] : first;
    last = queries.last[q] > last ? queries.last[q] : last;
    s.peak[q] = -INFINITY;
    store(s.total[q], splat(0.f));
    memset(queries.out[q], 0, sizeof(float) * (size_t)kv.head_dim);
  }
  for (int block = first / kTokens; block <= last / kTokens; block++) {
    const int base = block * kTokens;
    const int from = first > base ? first - base : 0, to = last - base < kTokens ? last - base + 1 : kTokens;
    const void* next = block < last / kTokens ? keys_of<KV>(kv, block + 1) : following;
    attend_block<KV>(queries, kv, block, from, to, next, s);
  }
  for (int q = 0; q < queries.count; q++) {
    const F8 scale = splat(1.f / sum(load(s.total[q])));
    for (int d = 0; d < kv.head_dim; d += 8) store(queries.out[q] + d, load(queries.out[q] + d) * scale);
  }
}

}  // namespace
