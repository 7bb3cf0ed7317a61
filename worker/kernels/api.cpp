#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "model.h"
#include "packed.h"
#include "team.h"

#define LLK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

const Kernels* kernels_of(int isa) {
  if (!llk_isa_supported(isa)) return nullptr;
#if defined(__x86_64__)
  if (isa == LLK_AVX2) return &llk_kernels_avx2;
  if (isa == LLK_AVX512_VNNI) return &llk_kernels_avx512_vnni;
#endif
  return &llk_kernels_portable;
}

bool packable(int kind, int outputs, int inputs) {
  return kind >= 0 && kind < LLK_KIND_COUNT && outputs > 0 && inputs > 0 && inputs % LLK_GROUP == 0;
}
bool usable(const llk_matrix& m) { return packable(m.kind, m.outputs, m.inputs) && (uintptr_t)m.data % 64 == 0; }

// The scale of a group as a bfloat16, rounded up so that no weight exceeds 127.
uint16_t scale_word(const float* weights) {
  float most = 0.f;
  for (int k = 0; k < LLK_GROUP; k++) most = std::max(most, fabsf(weights[k]));
  const float scale = most / 127.f;
  uint32_t word;
  memcpy(&word, &scale, 4);
  return (uint16_t)((word + 0xffff) >> 16);
}

void pack_group(const float* weights, int column, int8_t* group) {
  const uint16_t word = scale_word(weights);
  memcpy(group + kScalesAt + column * 2, &word, 2);
  const float scale = scale_at(group, column), inverse = scale > 0.f ? 1.f / scale : 0.f;
  for (int k = 0; k < kGroup; k++) {
    const float rounded = nearbyintf(weights[k] * inverse);
    group[k / 2 * kPairBytes + column * 2 + (k & 1)] = (int8_t)std::min(127.f, std::max(-127.f, rounded));
  }
}

void pack_output(const llk_matrix& m, const float* weights, int output) {
  char* block = const_cast<char*>(block_of(m, output / kColumns));
  const int column = output % kColumns;
  for (int k = 0; k < m.inputs; k += m.kind == LLK_INT8 ? kGroup : 1) {
    const size_t at = (size_t)k * kColumns + column;
    if (m.kind == LLK_INT8) pack_group(weights + k, column, (int8_t*)block + (size_t)(k / kGroup) * kGroupBytes);
    if (m.kind == LLK_FP16) ((uint16_t*)block)[at] = float_to_half(std::max(-kHalfMax, std::min(kHalfMax, weights[k])));
    if (m.kind == LLK_FP32) ((float*)block)[at] = weights[k];
  }
}

struct StepTask {
  State* state;
  void (*work)(State*, int);
};

struct PickTask {
  const Kernels* kernels;
  const llk_pick_row* rows;
  int count, vocabulary;
  int32_t* picks;
  std::atomic<int> taken{0};
};

// Threads take row by row; one that has no memory takes none.
void pick_rows(PickTask& task) {
  thread_local std::vector<double> memory;
  const size_t wide = (size_t)task.vocabulary + 64;
  try {
    if (memory.size() < 2 * wide + 1) memory.resize(2 * wide + 1);
  } catch (const std::bad_alloc&) {
    return;
  }
  float* values = (float*)(memory.data() + wide);
  const PickScratch scratch = {values + wide, values, memory.data()};
  for (int i; (i = task.taken.fetch_add(1)) < task.count;)
    task.picks[i] = task.kernels->pick(task.rows + i, task.vocabulary, &scratch);
}

int run(llk_model* model, const llk_step_args* args, void (*work)(State*, int)) {
  const llk_status bad = check_step(model->shape, *args);
  if (bad) return bad;
  int threads;
  Team* team = team_acquire(&threads);
  model->state.team = team;
  const bool ready = prepare(*model, *args, threads);
  StepTask task = {&model->state, work};
  if (ready)
    team_run(team, &task, [](void* step, int thread) { ((StepTask*)step)->work(((StepTask*)step)->state, thread); });
  team_release(team);
  return ready ? LLK_OK : LLK_NO_MEMORY;
}

}  // namespace

LLK_EXPORT int32_t llk_abi(void) { return LLK_ABI; }

LLK_EXPORT int32_t llk_isa_supported(int32_t isa) {
  if (isa == LLK_PORTABLE) return 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == LLK_AVX2) return avx2;
  if (isa == LLK_AVX512_VNNI)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#endif
  return 0;
}

LLK_EXPORT int32_t llk_best_isa(void) {
  for (int isa = LLK_ISA_COUNT - 1; isa > 0; isa--)
    if (llk_isa_supported(isa)) return isa;
  return LLK_PORTABLE;
}

LLK_EXPORT void llk_set_threads(int32_t threads) { team_set_threads(threads); }
LLK_EXPORT int32_t llk_threads(void) { return team_threads(); }

LLK_EXPORT int64_t llk_packed_bytes(int32_t kind, int32_t outputs, int32_t inputs) {
  if (!packable(kind, outputs, inputs)) return 0;
  return ((int64_t)outputs + kColumns - 1) / kColumns * (int64_t)block_bytes(kind, inputs);
}

LLK_EXPORT int32_t llk_pack(int32_t kind, const float* weight, int32_t outputs, int32_t inputs, void* packed) {
  if (!packable(kind, outputs, inputs)) return LLK_BAD_SHAPE;
  const llk_matrix m = {packed, outputs, inputs, kind};
  memset(packed, 0, (size_t)llk_packed_bytes(kind, outputs, inputs));
  for (int output = 0; output < outputs; output++) pack_output(m, weight + (size_t)output * inputs, output);
  return LLK_OK;
}

LLK_EXPORT int32_t llk_unpack(const llk_matrix* matrix, float* weight) {
  if (!packable(matrix->kind, matrix->outputs, matrix->inputs)) return LLK_BAD_SHAPE;
  for (int output = 0; output < matrix->outputs; output++)
    unpack_output(*matrix, output, 1.f, weight + (size_t)output * matrix->inputs);
  return LLK_OK;
}

LLK_EXPORT int32_t llk_quantize(int32_t isa, const float* x, const float* norm, float epsilon, int32_t rows,
                                int32_t width, int16_t* quantized, float* scales) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 0 || width < 8 || width % 8) return LLK_BAD_SHAPE;
  kernels->quantize(x, norm, epsilon, rows, width, quantized, scales);
  return LLK_OK;
}

LLK_EXPORT int32_t llk_gemm(int32_t isa, const llk_matrix* matrix, const int16_t* quantized, const float* scales,
                            int32_t rows, float* out) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 1 || !usable(*matrix) || matrix->kind != LLK_INT8) return LLK_BAD_SHAPE;
  kernels->gemm(matrix, quantized, scales, rows, out);
  return LLK_OK;
}

LLK_EXPORT int32_t llk_gemm_float(int32_t isa, const llk_matrix* matrix, const float* x, int32_t rows, float* out) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || rows < 1 || !usable(*matrix) || matrix->kind == LLK_INT8) return LLK_BAD_SHAPE;
  kernels->gemm_float(matrix, x, rows, out);
  return LLK_OK;
}

LLK_EXPORT int32_t llk_activate(int32_t isa, int32_t activation, const float* x, int32_t count, float* out) {
  const Kernels* kernels = kernels_of(isa);
  if (!kernels || count < 0 || count % 8) return LLK_BAD_SHAPE;
  kernels->activate(activation, x, count, out);
  return LLK_OK;
}

LLK_EXPORT int32_t llk_pick(int32_t isa, const llk_pick_row* rows, int32_t count, int32_t vocabulary, int32_t* picks) {
  PickTask task;
  task.kernels = kernels_of(isa);
  task.rows = rows;
  task.count = count;
  task.vocabulary = vocabulary;
  task.picks = picks;
  if (!task.kernels || count < 0 || vocabulary < 1 || vocabulary > 1 << 20) return LLK_BAD_SHAPE;
  int threads;
  Team* team = team_acquire(&threads);
  team_run(team, &task, [](void* picks, int) { pick_rows(*(PickTask*)picks); });
  team_release(team);
  return task.taken < count ? LLK_NO_MEMORY : LLK_OK;
}

LLK_EXPORT llk_model* llk_open(const llk_shape* shape, int32_t isa, int32_t* status) {
  *status = check_shape(*shape);
  const Kernels* kernels = kernels_of(isa);
  if (!kernels) *status = LLK_BAD_SHAPE;
  if (*status) return nullptr;
  std::unique_ptr<llk_model> model(new (std::nothrow) llk_model());
  *status = LLK_NO_MEMORY;
  if (!model) return nullptr;
  model->shape = *shape;
  model->kernels = kernels;
  if (!reserve(*model)) return nullptr;
  *status = LLK_OK;
  return model.release();
}

LLK_EXPORT void llk_close(llk_model* model) { delete model; }

LLK_EXPORT int32_t llk_step(llk_model* model, const llk_step_args* args) {
  return run(model, args, model->kernels->step);
}

LLK_EXPORT int32_t llk_attend(llk_model* model, int32_t layer, const llk_step_args* args, const float* queries,
                              float* out) {
  if (layer < 0 || layer >= model->shape.layers) return LLK_BAD_SHAPE;
  model->state.layer = layer;
  model->state.queries = queries;
  model->state.attended = out;
  return run(model, args, model->kernels->attend);
}
