// What a step shares between its threads, and the table of functions that exists once per instruction set.
#pragma once
#include "abi.h"

constexpr int kMaxQueries = 24;                   // of one attention item
constexpr int kLoweredRows = 3;                   // that an adapter's weights meet at once
constexpr int kLoweredWidth = 3 * LLK_MOST_RANK;  // at most three projections share their input: q, k and v

// A layer's stages in order; each is over when all of its units are.
enum Stage { kNorm, kQkv, kAttention, kMixed, kOut, kMlpNorm, kGateUp, kGated, kDown, kStagesPerLayer };
// Stages after the last layer, counted from layers * kStagesPerLayer on.
enum LastStage { kEmbed, kLastBranch, kWanted, kLogits, kLastStages };

// At most kLoweredRows rows of one adapter, or one row without: places in `State::lowering`.
struct LoweringUnit {
  int32_t first, count;
};

// Rows of one sequence at neighbouring positions of one block, attended together.
struct RowGroup {
  int32_t row, count;
};

struct AttentionScratch {
  float scores[kMaxQueries][LLK_BLOCK_TOKENS];
  float peak[kMaxQueries];
  float total[kMaxQueries][8];
  float* queries;  // [head_dim][kMaxQueries]
};

struct ThreadScratch {
  AttentionScratch attention;
  // A step of one row is normed and quantized by every thread for itself.
  int16_t* quantized;  // [widest]
  float scale;
  float* normed;  // [hidden]
  float lowered[kLoweredWidth];
};

// How far a stage is: units taken and units finished.
struct Progress {
  int32_t taken, finished;
};

struct Team;
// Wakes those who wait: a stage has been finished.
void team_progress(Team* team);
// Returns once `finished` has reached `units`.
void team_await(Team* team, const int32_t* finished, int32_t units);

struct State {
  const llk_shape* shape;
  const llk_step_args* args;
  const RowGroup* groups;
  int group_count, heads_per_item, threads;
  Team* team;
  float *x, *branch, *qkv, *mixed, *gated;  // [max_rows] x hidden, hidden, q + k + v, q, intermediate
  int16_t* quantized;                       // [max_rows][widest]
  float* scales;                            // [max_rows]
  float* normed;                            // [max_rows][hidden], for adapters and matrices that are not int8
  const int32_t* lowering;                  // [rows]: row numbers, those of one adapter together
  const LoweringUnit* lowering_units;
  int lowering_count;
  float* lowered;                           // [max_rows][kLoweredWidth]: inputs of a stage after their adapters' `down`
  Progress* progress;                       // [layers * kStagesPerLayer + kLastStages], zero when a step starts
  ThreadScratch* scratch;                   // [threads]
  int32_t layer;                            // of `attend`
  const float* queries;
  float* attended;
};

// Memory for picking a token, for one thread.
struct PickScratch {
  float* maxima;   // [vocabulary / 64 + 1]
  float* values;   // [vocabulary + 64]
  double* masses;  // [vocabulary + 64]
};

struct Kernels {
  void (*quantize)(const float* x, const float* norm, float epsilon, int rows, int width, int16_t* out, float* scales);
  void (*gemm)(const llk_matrix* matrix, const int16_t* quantized, const float* scales, int rows, float* out);
  void (*gemm_float)(const llk_matrix* matrix, const float* x, int rows, float* out);
  void (*activate)(int activation, const float* x, int count, float* out);
  int (*pick)(const llk_pick_row* row, int vocabulary, const PickScratch* scratch);
  void (*step)(State* state, int thread);
  void (*attend)(State* state, int thread);
};

extern const Kernels llk_kernels_portable;
#if defined(__x86_64__)
extern const Kernels llk_kernels_avx2, llk_kernels_avx512_vnni;
#endif
