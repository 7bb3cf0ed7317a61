#include "model.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>
#include <numeric>

namespace {

constexpr int kMost = 1 << 24;  // of any dimension: products of two fit an int64, offsets a size_t
constexpr size_t kAlign = 64;

int widest(const llk_shape& s) { return std::max({s.hidden, s.intermediate, s.heads * s.head_dim}); }

size_t stages(const llk_shape& s) { return (size_t)s.layers * kStagesPerLayer + kLastStages; }

template <class T>
T* take(llk_model& model, size_t count) {
  void* bytes = aligned_alloc(kAlign, (count * sizeof(T) + kAlign - 1) / kAlign * kAlign);
  if (!bytes) throw std::bad_alloc();
  model.memory.emplace_back(bytes, free);
  return static_cast<T*>(bytes);
}

bool fits(const llk_matrix& m, int outputs, int inputs) {
  return m.data && (uintptr_t)m.data % kAlign == 0 && m.outputs == outputs && m.inputs == inputs &&
         inputs % LLK_GROUP == 0 && m.kind >= 0 && m.kind < LLK_KIND_COUNT;
}

bool fits(const llk_shape& s, const llk_layer& l) {
  const int mixed = s.heads * s.head_dim, all = (s.heads + 2 * s.kv_heads) * s.head_dim;
  return fits(l.qkv, all, s.hidden) && fits(l.out, s.hidden, mixed) && fits(l.gate_up, 2 * s.intermediate, s.hidden) &&
         fits(l.down, s.hidden, s.intermediate) && l.attention_norm && l.mlp_norm && l.cosines && l.sines &&
         l.window >= 0 && !l.query_norm == !l.key_norm;
}

bool within(int value, int limit) { return value >= 0 && value < limit; }

llk_status check_adapters(const llk_step_args& a) {
  if (!a.adapter) return LLK_OK;
  for (int row = 0; row < a.rows; row++) {
    if (a.adapter[row] == -1) continue;
    if (!within(a.adapter[row], a.adapter_count)) return LLK_BAD_ADAPTER;
    const llk_adapter& adapter = a.adapters[a.adapter[row]];
    if (!adapter.layer || adapter.rank < 8 || adapter.rank > LLK_MOST_RANK || adapter.rank % 8) return LLK_BAD_ADAPTER;
  }
  return LLK_OK;
}

// Neighbouring rows share their keys' way from memory, as far as a block and a work item reach.
void group_rows(llk_model& model, const llk_step_args& a, int limit) {
  model.groups.clear();
  for (int row = 0; row < a.rows; row++) {
    RowGroup* last = model.groups.empty() ? nullptr : &model.groups.back();
    const bool follows = last && last->count < limit && a.sequence[row] == a.sequence[row - 1] &&
                         a.positions[row] == a.positions[row - 1] + 1 && a.positions[row] % LLK_BLOCK_TOKENS != 0;
    if (follows)
      last->count++;
    else
      model.groups.push_back({row, 1});
  }
}

// Brings rows of one adapter together, so that each of its weights is read for several of them.
void group_by_adapter(llk_model& model, const llk_step_args& a) {
  std::vector<int32_t>& rows = model.lowering;
  std::vector<LoweringUnit>& units = model.lowering_units;
  rows.resize(a.rows);
  units.clear();
  if (!a.adapter) return;
  std::iota(rows.begin(), rows.end(), 0);
  std::stable_sort(rows.begin(), rows.end(), [&](int left, int right) { return a.adapter[left] < a.adapter[right]; });
  for (int place = 0; place < a.rows; place++) {
    const int adapter = a.adapter[rows[place]];
    LoweringUnit* last = units.empty() ? nullptr : &units.back();
    if (adapter >= 0 && last && last->count < kLoweredRows && a.adapter[rows[last->first]] == adapter)
      last->count++;
    else
      units.push_back({place, 1});
  }
}

}  // namespace

llk_status check_shape(const llk_shape& s) {
  for (int size : {s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads, s.head_dim, s.vocabulary, s.positions, s.max_rows})
    if (size < 1 || size > kMost) return LLK_BAD_SHAPE;
  if ((int64_t)s.heads * s.head_dim > kMost || s.kv_heads > s.heads || s.heads % s.kv_heads != 0) return LLK_BAD_SHAPE;
  if (s.head_dim % 16 != 0 || !within(s.activation, 2) || !within(s.kv_half, 2)) return LLK_BAD_SHAPE;
  if (!fits(s.embedding, s.vocabulary, s.hidden) || !fits(s.head, s.vocabulary, s.hidden)) return LLK_BAD_SHAPE;
  if (!s.final_norm || !s.layer) return LLK_BAD_SHAPE;
  for (int i = 0; i < s.layers; i++)
    if (!fits(s, s.layer[i])) return LLK_BAD_SHAPE;
  return LLK_OK;
}

llk_status check_step(const llk_shape& s, const llk_step_args& a) {
  if (a.rows < 1 || a.rows > s.max_rows || a.wanted_rows < 0 || a.wanted_rows > s.max_rows) return LLK_BAD_ROW;
  for (int row = 0; row < a.rows; row++) {
    if (!within(a.tokens[row], s.vocabulary)) return LLK_BAD_TOKEN;
    if (!within(a.sequence[row], a.sequences)) return LLK_BAD_ROW;
    const int position = a.positions[row], block = position / LLK_BLOCK_TOKENS;
    if (!within(position, s.positions) || !within(block, a.table_blocks[a.sequence[row]])) return LLK_BAD_POSITION;
    const bool checked = row && a.sequence[row] == a.sequence[row - 1] && position >= a.positions[row - 1];
    const int32_t* table = a.tables[a.sequence[row]];
    for (int i = checked ? a.positions[row - 1] / LLK_BLOCK_TOKENS : 0; i <= block; i++)
      if (!within(table[i], a.blocks)) return LLK_BAD_BLOCK;
  }
  for (int i = 0; i < a.wanted_rows; i++)
    if (!within(a.wanted[i], a.rows)) return LLK_BAD_ROW;
  return check_adapters(a);
}

bool reserve(llk_model& model) {
  const llk_shape& s = model.shape;
  const size_t rows = (size_t)s.max_rows, mixed = (size_t)s.heads * s.head_dim;
  State& state = model.state;
  try {
    model.layers.assign(s.layer, s.layer + s.layers);
    model.shape.layer = model.layers.data();
    state.shape = &model.shape;
    state.x = take<float>(model, rows * s.hidden);
    state.branch = take<float>(model, rows * s.hidden);
    state.qkv = take<float>(model, rows * (mixed + 2 * (size_t)s.kv_heads * s.head_dim));
    state.mixed = take<float>(model, rows * mixed);
    state.gated = take<float>(model, rows * s.intermediate);
    state.quantized = take<int16_t>(model, rows * widest(s));
    state.scales = take<float>(model, rows);
    state.normed = take<float>(model, rows * s.hidden);
    state.lowered = take<float>(model, rows * kLoweredWidth);
    state.progress = take<Progress>(model, stages(s));
    model.groups.reserve(rows);
    model.lowering.reserve(rows);
    model.lowering_units.reserve(rows);
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

bool prepare(llk_model& model, const llk_step_args& args, int threads) {
  const llk_shape& s = model.shape;
  State& state = model.state;
  try {
    while ((int)model.scratch.size() < threads) {
      ThreadScratch fresh;
      fresh.quantized = take<int16_t>(model, widest(s));
      fresh.normed = take<float>(model, s.hidden);
      fresh.attention.queries = take<float>(model, (size_t)s.head_dim * kMaxQueries);
      model.scratch.push_back(fresh);
    }
  } catch (const std::bad_alloc&) {
    return false;
  }
  const int per_key = s.heads / s.kv_heads;
  group_rows(model, args, std::max(1, kMaxQueries / per_key));
  const bool few = (int)model.groups.size() * s.kv_heads < 2 * threads;
  state.heads_per_item = few || per_key > kMaxQueries ? 1 : per_key;
  group_by_adapter(model, args);
  state.lowering = model.lowering.data();
  state.lowering_units = model.lowering_units.data();
  state.lowering_count = (int)model.lowering_units.size();
  state.args = &args;
  state.groups = model.groups.data();
  state.group_count = (int)model.groups.size();
  state.threads = threads;
  state.scratch = model.scratch.data();
  memset(state.progress, 0, sizeof(Progress) * stages(s));
  return true;
}
