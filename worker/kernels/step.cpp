// One step of a Llama-shaped model. Compiled once per instruction set (LLK_TABLE names the result), so nothing here may
// have external linkage but that table: the linker must not give one instruction set's code to another.
#include "attention.h"
#include "lora.h"
#include "numeric.h"
#include "pick.h"
#include "product.h"
#include "state.h"

namespace {

// Threads take the next `grain` of a stage's `units` until none is left, then wait until all are finished. Who takes what
// changes no bit. Nobody waits for a thread that holds no unit: one that the system has suspended finds the stages that
// it missed finished, and passes through them.
template <class F>
inline void share(State& s, int stage, int units, int grain, F work) {
  Progress& progress = s.progress[stage];
  for (;;) {
    const int first = __atomic_fetch_add(&progress.taken, grain, __ATOMIC_RELAXED);
    if (first >= units) break;
    const int last = first + grain < units ? first + grain : units;
    work(first, last);
    if (__atomic_add_fetch(&progress.finished, last - first, __ATOMIC_ACQ_REL) == units) team_progress(s.team);
  }
  if (__atomic_load_n(&progress.finished, __ATOMIC_ACQUIRE) < units) team_await(s.team, &progress.finished, units);
}

template <class Epilogue>
inline void multiply_shared(State& s, int stage, const llk_matrix& m, const Activations& a, Epilogue epilogue) {
  const int blocks = blocks_of(m), grain = blocks / (s.threads * 8);
  share(s, stage, blocks, grain > 0 ? grain : 1, [&](int first, int last) { multiply(m, first, last, a, epilogue); });
}

template <class F>
inline void share_rows(State& s, int stage, int rows, F work) {
  share(s, stage, rows, 1, [&](int row, int) { work(row); });
}

// Where a prepared row of activations goes.
struct RowSlot {
  float* plain;
  int16_t* quantized;
  float* scale;
  float* lowered;
};

inline RowSlot shared_slot(const State& s, int row, int width) {
  const size_t at = (size_t)row * width;
  return {s.normed + at, s.quantized + at, s.scales + row, s.lowered + (size_t)row * kLoweredWidth};
}

// A row as the matrix wants it: normed (NULL: as it is, int8 only), and quantized for int8 weights.
inline void prepare_row(const llk_matrix& m, const float* x, const float* norm, float epsilon, const RowSlot& out) {
  if (m.kind == LLK_INT8)
    quantize_row(x, norm, epsilon, m.inputs, out.quantized, out.scale);
  else
    normalize_row(x, norm, epsilon, m.inputs, out.plain);
}

// Prepares rows for a product: `row(r, slot)` does one. One row is prepared by every thread for itself, which saves a
// stage, unless that changes what is shared. A late thread may then read what is already being changed; it finds no unit
// left to use the result for.
template <class F>
inline Activations prepare_rows(State& s, int stage, int thread, int rows, int width, bool changes_state, F row) {
  if (rows == 1 && !changes_state) {
    ThreadScratch& own = s.scratch[thread];
    row(0, RowSlot{own.normed, own.quantized, &own.scale, own.lowered});
    return {own.normed, own.quantized, &own.scale, 1, width, own.lowered};
  }
  share_rows(s, stage, rows, [&](int r) { row(r, shared_slot(s, r, width)); });
  return {s.normed, s.quantized, s.scales, rows, width, s.lowered};
}

// The same for rows that adapters may change: their inputs are lowered as well, `input(r, slot)` says what from.
template <class F, class G>
inline Activations prepare_adapted(State& s, int stage, int thread, int width, bool changes_state, Lowering to, F row,
                                   G input) {
  const int rows = s.args->rows;
  if (!s.args->adapter) return prepare_rows(s, stage, thread, rows, width, changes_state, row);
  const auto unit = [&](LoweringUnit unit, const auto& slot_of) {
    const llk_adapter* adapter = adapter_of(s, s.lowering[unit.first]);
    if (adapter) fetch_first(*adapter, to);
    const float* x[kLoweredRows];
    float* lowered[kLoweredRows];
    for (int i = 0; i < unit.count; i++) {
      const int r = s.lowering[unit.first + i];
      const RowSlot slot = slot_of(r);
      row(r, slot);
      x[i] = adapter ? input(r, slot) : nullptr;
      lowered[i] = slot.lowered;
    }
    if (adapter) lower_rows(*adapter, to, unit.count, x, width, lowered);
  };
  if (rows == 1 && !changes_state) {
    ThreadScratch& own = s.scratch[thread];
    unit({0, 1}, [&](int) { return RowSlot{own.normed, own.quantized, &own.scale, own.lowered}; });
    return {own.normed, own.quantized, &own.scale, 1, width, own.lowered};
  }
  share(s, stage, s.lowering_count, 1, [&](int first, int) {
    unit(s.lowering_units[first], [&](int r) { return shared_slot(s, r, width); });
  });
  return {s.normed, s.quantized, s.scales, rows, width, s.lowered};
}

// Adds what the branch before left, if that waited for a norm (`pending`), then norm, quantization, lowering.
inline Activations normed_rows(State& s, int stage, int thread, const llk_matrix& m, const float* norm,
                               const float* pending, Lowering to) {
  const int hidden = s.shape->hidden;
  const float epsilon = s.shape->epsilon;
  const auto row = [&](int r, const RowSlot& out) {
    float* x = s.x + (size_t)r * hidden;
    if (pending) add_normed(x, s.branch + (size_t)r * hidden, pending, epsilon, hidden);
    prepare_row(m, x, norm, epsilon, out);
  };
  const auto input = [&](int r, const RowSlot& out) {
    if (m.kind == LLK_INT8) normalize_row(s.x + (size_t)r * hidden, norm, epsilon, hidden, out.plain);
    return out.plain;
  };
  return prepare_adapted(s, stage, thread, hidden, pending != nullptr, to, row, input);
}

inline Activations plain_rows(State& s, int stage, int thread, const llk_matrix& m, const float* rows, Lowering to) {
  if (m.kind != LLK_INT8 && !s.args->adapter) return {rows, nullptr, nullptr, s.args->rows, m.inputs};
  const auto row = [&](int r, const RowSlot& out) {
    if (m.kind == LLK_INT8) prepare_row(m, rows + (size_t)r * m.inputs, nullptr, 0.f, out);
  };
  const auto input = [&](int r, const RowSlot&) { return rows + (size_t)r * m.inputs; };
  Activations prepared = prepare_adapted(s, stage, thread, m.inputs, false, to, row, input);
  prepared.plain = rows;
  return prepared;
}

inline void rotate(float* head, int dim, const float* cosines, const float* sines) {
  for (int d = 0; d < dim / 2; d += 8) {
    const F8 a = load(head + d), b = load(head + dim / 2 + d), c = load(cosines + d), s = load(sines + d);
    store(head + d, a * c - b * s);
    store(head + dim / 2 + d, fma(b, c, a * s));
  }
}

template <class KV>
inline void write_key(typename KV::type* block, int token, int dim, const float* head) {
  typename KV::type* tile = block + (size_t)(token / kTile) * kTile * dim + token % kTile;
  for (int d = 0; d < dim; d += 8) {
    typename KV::type eight[8];
    KV::put(eight, load(head + d));
    for (int i = 0; i < 8; i++) tile[(d + i) * kTile] = eight[i];
  }
}

template <class KV>
inline void write_value(typename KV::type* block, int token, int dim, const float* head) {
  for (int d = 0; d < dim; d += 8) KV::put(block + (size_t)token * dim + d, load(head + d));
}

// Norm, rotation and KV write of one row of a head that has just been projected.
template <class KV>
inline void place_head(State& s, int layer, int head, int row) {
  const llk_shape& shape = *s.shape;
  const llk_layer& l = shape.layer[layer];
  const int dim = shape.head_dim, keys_from = shape.heads, values_from = shape.heads + shape.kv_heads;
  float* v = s.qkv + (size_t)row * (values_from + shape.kv_heads) * dim + (size_t)head * dim;
  const int position = s.args->positions[row], token = position % kTokens;
  if (head < values_from) {
    if (const float* norm = head < keys_from ? l.query_norm : l.key_norm) {
      const F8 factor = splat(inverse_rms(v, dim, shape.epsilon));
      for (int d = 0; d < dim; d += 8) store(v + d, load(v + d) * factor * load(norm + d));
    }
    const size_t angle = (size_t)position * (dim / 2);
    rotate(v, dim, l.cosines + angle, l.sines + angle);
  }
  if (head < keys_from) {
    for (int d = 0; d < dim; d += 8) store(v + d, load(v + d) * splat(shape.attention_scale));
    return;
  }
  const int32_t* table = s.args->tables[s.args->sequence[row]];
  const int kv_head = head < values_from ? head - keys_from : head - values_from;
  const size_t offset = kv_offset(table[position / kTokens], shape.kv_heads, kv_head, dim);
  if (head < values_from)
    write_key<KV>((typename KV::type*)s.args->keys[layer] + offset, token, dim, v);
  else
    write_value<KV>((typename KV::type*)s.args->values[layer] + offset, token, dim, v);
}

// A unit of the projection is a whole head, so that the thread that computed it can finish it.
template <class KV>
inline void project_heads(State& s, int layer, const Activations& a) {
  const llk_shape& shape = *s.shape;
  const llk_layer& l = shape.layer[layer];
  const int heads = shape.heads + 2 * shape.kv_heads, per_head = shape.head_dim / kColumns, width = l.qkv.outputs;
  share(s, layer * kStagesPerLayer + kQkv, heads, 1, [&](int head, int) {
    const int slot = head < shape.heads ? 0 : head < shape.heads + shape.kv_heads ? 1 : 2;
    const int first = (slot == 0 ? 0 : slot == 1 ? shape.heads : shape.heads + shape.kv_heads) * per_head;
    multiply(l.qkv, head * per_head, (head + 1) * per_head, a, [&](int row, int block, F8 low, F8 high) {
      const int eighth = 2 * (block - first);
      lift(s, layer, a, row, {kToQ + slot, slot, eighth}, {kToQ + slot, slot, eighth + 1}, low, high);
      float* out = s.qkv + (size_t)row * width + (size_t)block * kColumns;
      const float* bias = l.qkv_bias ? l.qkv_bias + (size_t)block * kColumns : nullptr;
      store(out, bias ? low + load(bias) : low);
      store(out + 8, bias ? high + load(bias + 8) : high);
    });
    for (int row = 0; row < a.rows; row++) place_head<KV>(s, layer, head, row);
  });
}

// First position that a row sees.
inline int first_seen(const State& s, int layer, int row) {
  const int position = s.args->positions[row], window = s.shape->layer[layer].window;
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// An item of attention: neighbouring rows, and query heads that share a key head.
struct Item {
  RowGroup group;
  int first_head;
  KVHead kv;
};

inline Item item_of(const State& s, int layer, int number) {
  const llk_shape& shape = *s.shape;
  const int items = shape.heads / s.heads_per_item, first_head = number % items * s.heads_per_item;
  const RowGroup group = s.groups[number / items];
  const int32_t* table = s.args->tables[s.args->sequence[group.row]];
  const int kv_head = first_head / (shape.heads / shape.kv_heads);
  const KVHead kv = {s.args->keys[layer], s.args->values[layer], table, shape.kv_heads, kv_head, shape.head_dim,
                     shape.attention_softcap};
  return {group, first_head, kv};
}

template <class KV>
inline void attend_item(State& s, int thread, int layer, const float* queries, size_t stride, float* out, int number,
                        int items) {
  const llk_shape& shape = *s.shape;
  const Item item = item_of(s, layer, number);
  Queries wanted;
  wanted.count = 0;
  for (int row = item.group.row; row < item.group.row + item.group.count; row++)
    for (int head = item.first_head; head < item.first_head + s.heads_per_item; head++) {
      const int n = wanted.count++;
      wanted.query[n] = queries + (size_t)row * stride + (size_t)head * shape.head_dim;
      wanted.out[n] = out + ((size_t)row * shape.heads + head) * shape.head_dim;
      wanted.first[n] = first_seen(s, layer, row);
      wanted.last[n] = s.args->positions[row];
    }
  const Item next = number + 1 < items ? item_of(s, layer, number + 1) : item;
  const void* following = keys_of<KV>(next.kv, first_seen(s, layer, next.group.row) / kTokens);
  attend<KV>(wanted, item.kv, following, s.scratch[thread].attention);
}

template <class KV>
inline void attend_rows(State& s, int stage, int thread, int layer, const float* queries, size_t stride, float* out) {
  const int items = s.group_count * (s.shape->heads / s.heads_per_item);
  share(s, stage, items, 1, [&](int item, int) {
    attend_item<KV>(s, thread, layer, queries, stride, out, item, items);
  });
}

// Adds a branch's output to the stream, or leaves it where its norm will find it.
inline void add_branch(State& s, int stage, const llk_matrix& m, const Activations& a, const float* bias, bool normed,
                       Lowering from) {
  const int hidden = s.shape->hidden;
  multiply_shared(s, stage, m, a, [&](int row, int block, F8 low, F8 high) {
    const size_t at = (size_t)row * hidden + (size_t)block * kColumns;
    lift(s, from.layer, a, row, {from.target, 0, 2 * block}, {from.target, 0, 2 * block + 1}, low, high);
    if (bias) {
      low = low + load(bias + (size_t)block * kColumns);
      high = high + load(bias + (size_t)block * kColumns + 8);
    }
    float* out = (normed ? s.branch : s.x) + at;
    store(out, normed ? low : load(out) + low);
    store(out + 8, normed ? high : load(out + 8) + high);
  });
}

template <class KV>
inline void run_layer(State& s, int thread, int layer, const float* pending) {
  const llk_shape& shape = *s.shape;
  const llk_layer& l = shape.layer[layer];
  const int first = layer * kStagesPerLayer;
  const Lowering to_heads = {layer, kToQ, 3}, to_out = {layer, kToOut, 1};
  const Lowering to_gate = {layer, kToGate, 2}, to_down = {layer, kToDown, 1};
  project_heads<KV>(s, layer, normed_rows(s, first + kNorm, thread, l.qkv, l.attention_norm, pending, to_heads));
  attend_rows<KV>(s, first + kAttention, thread, layer, s.qkv, (size_t)l.qkv.outputs, s.mixed);
  const Activations heads = plain_rows(s, first + kMixed, thread, l.out, s.mixed, to_out);
  add_branch(s, first + kOut, l.out, heads, l.out_bias, l.post_attention_norm != nullptr, to_out);
  const Activations normed =
      normed_rows(s, first + kMlpNorm, thread, l.gate_up, l.mlp_norm, l.post_attention_norm, to_gate);
  multiply_shared(s, first + kGateUp, l.gate_up, normed, [&](int row, int block, F8 gate, F8 up) {
    lift(s, layer, normed, row, {kToGate, 0, block}, {kToUp, 1, block}, gate, up);
    store(s.gated + (size_t)row * shape.intermediate + (size_t)block * 8, activate(shape.activation, gate) * up);
  });
  const Activations gated = plain_rows(s, first + kGated, thread, l.down, s.gated, to_down);
  add_branch(s, first + kDown, l.down, gated, nullptr, l.post_mlp_norm != nullptr, to_down);
}

inline void logits(State& s, int thread, const float* pending) {
  const llk_shape& shape = *s.shape;
  const llk_step_args& args = *s.args;
  const int first = shape.layers * kStagesPerLayer;
  if (pending)
    share_rows(s, first + kLastBranch, args.rows, [&](int r) {
      const size_t at = (size_t)r * shape.hidden;
      add_normed(s.x + at, s.branch + at, pending, shape.epsilon, shape.hidden);
    });
  if (!args.wanted_rows) return;
  const auto row = [&](int i, const RowSlot& out) {
    const float* x = s.x + (size_t)args.wanted[i] * shape.hidden;
    prepare_row(shape.head, x, shape.final_norm, shape.epsilon, out);
  };
  const Activations rows = prepare_rows(s, first + kWanted, thread, args.wanted_rows, shape.hidden, false, row);
  multiply_shared(s, first + kLogits, shape.head, rows, [&](int r, int block, F8 low, F8 high) {
    if (shape.logit_softcap > 0.f) {
      low = softcap(low, shape.logit_softcap);
      high = softcap(high, shape.logit_softcap);
    }
    store_outputs(args.logits + (size_t)r * shape.vocabulary, block * kColumns, shape.vocabulary, low, high);
  });
}

template <class KV>
inline void run_step(State& s, int thread) {
  const llk_shape& shape = *s.shape;
  share_rows(s, shape.layers * kStagesPerLayer + kEmbed, s.args->rows, [&](int r) {
    unpack_output(shape.embedding, s.args->tokens[r], shape.embedding_scale, s.x + (size_t)r * shape.hidden);
  });
  const float* pending = nullptr;
  for (int layer = 0; layer < shape.layers; layer++) {
    run_layer<KV>(s, thread, layer, pending);
    pending = shape.layer[layer].post_mlp_norm;
  }
  logits(s, thread, pending);
}

void step(State* state, int thread) {
  if (state->shape->kv_half)
    run_step<Half>(*state, thread);
  else
    run_step<Single>(*state, thread);
}

void attend_only(State* s, int thread) {
  const size_t stride = (size_t)s->shape->heads * s->shape->head_dim;
  if (s->shape->kv_half)
    attend_rows<Half>(*s, 0, thread, s->layer, s->queries, stride, s->attended);
  else
    attend_rows<Single>(*s, 0, thread, s->layer, s->queries, stride, s->attended);
}

void quantize_only(const float* x, const float* norm, float epsilon, int rows, int width, int16_t* out, float* scales) {
  for (int r = 0; r < rows; r++) {
    const size_t at = (size_t)r * width;
    quantize_row(x + at, norm, epsilon, width, out + at, scales + r);
  }
}

void multiply_only(const llk_matrix& m, const Activations& a, float* out) {
  multiply(m, 0, blocks_of(m), a, [&](int row, int block, F8 low, F8 high) {
    store_outputs(out + (size_t)row * m.outputs, block * kColumns, m.outputs, low, high);
  });
}

void gemm_only(const llk_matrix* m, const int16_t* quantized, const float* scales, int rows, float* out) {
  multiply_only(*m, {nullptr, quantized, scales, rows, m->inputs}, out);
}

void gemm_float_only(const llk_matrix* m, const float* x, int rows, float* out) {
  multiply_only(*m, {x, nullptr, nullptr, rows, m->inputs}, out);
}

void activate_only(int activation, const float* x, int count, float* out) {
  for (int i = 0; i < count; i += 8) store(out + i, activate(activation, load(x + i)));
}

int pick_only(const llk_pick_row* row, int vocabulary, const PickScratch* scratch) {
  return pick_row(*row, vocabulary, *scratch);
}

}  // namespace

extern const Kernels LLK_TABLE = {quantize_only, gemm_only, gemm_float_only, activate_only, pick_only, step, attend_only};
