// The C interface between Python and the kernels. Plain structures and functions: no tie to a Python or torch version.
//
// The caller owns every array; a model keeps pointers to weights and tables, which must outlive it. Everything is
// little endian, row-major and contiguous. The fields mirror `abi.py`; raise LLK_ABI with every change.
#pragma once
#include <stdint.h>

#define LLK_ABI 6
#define LLK_GROUP 64         // inputs that share a scale
#define LLK_COLUMNS 16       // outputs of a packed block
#define LLK_BLOCK_TOKENS 64  // tokens of a KV block
#define LLK_KEY_TILE 16      // tokens whose keys are interleaved
#define LLK_TARGETS 7        // projections that an adapter may change: q, k, v, out, gate, up, down
#define LLK_MOST_RANK 64     // of an adapter

#ifdef __cplusplus
extern "C" {
#endif

enum llk_status { LLK_OK = 0, LLK_BAD_SHAPE, LLK_BAD_TOKEN, LLK_BAD_POSITION, LLK_BAD_BLOCK, LLK_BAD_ROW,
                  LLK_BAD_ADAPTER, LLK_NO_MEMORY };
enum llk_isa { LLK_PORTABLE = 0, LLK_AVX2 = 1, LLK_AVX512_VNNI = 2, LLK_ISA_COUNT = 3 };
enum llk_kind { LLK_INT8 = 0, LLK_FP16 = 1, LLK_FP32 = 2, LLK_KIND_COUNT = 3 };
enum llk_activation { LLK_SILU = 0, LLK_GELU_TANH = 1 };

// Weights of a linear layer, packed by llk_pack; llk_packed_bytes(kind, outputs, inputs) bytes, aligned to 64. With int8
// weights the activations are int16 with a scale per row; with the others they are fp32, and an output is one chain of
// fused multiply-adds in order of the inputs.
typedef struct {
  const void* data;
  int32_t outputs, inputs, kind;
} llk_matrix;

typedef struct {
  llk_matrix qkv, out;       // [q heads, k heads, v heads] x hidden; hidden x [q heads]
  llk_matrix gate_up, down;  // outputs interleaved by 8: gate 0..7, up 0..7, gate 8..15, ...
  const float *attention_norm, *mlp_norm;            // [hidden]
  const float *post_attention_norm, *post_mlp_norm;  // [hidden] or NULL: norm of the branch before it is added
  const float *query_norm, *key_norm;                // [head_dim] or NULL
  const float *qkv_bias, *out_bias;                  // [outputs] or NULL
  const float *cosines, *sines;                      // [positions][head_dim / 2]
  int32_t window;                                    // tokens that a row sees, itself included; 0: all
} llk_layer;

typedef struct {
  int32_t hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary, positions;
  int32_t max_rows, activation, kv_half;  // kv_half: 1 for fp16 keys and values, 0 for fp32
  float epsilon, embedding_scale, attention_scale, attention_softcap, logit_softcap;  // caps: 0 for none
  llk_matrix embedding, head;
  const float* final_norm;
  const llk_layer* layer;
} llk_shape;

// What an adapter adds to the projections of a layer: factor * up (down x), in fp16. NULL where it changes nothing.
typedef struct {
  const uint16_t* down[LLK_TARGETS];  // [rank / 8][inputs][8]
  const uint16_t* up[LLK_TARGETS];    // [outputs / 8][rank][8]
  float factor[LLK_TARGETS];
} llk_adapter_layer;

typedef struct {
  const llk_adapter_layer* layer;  // [layers]
  int32_t rank;                    // a multiple of 8
} llk_adapter;

// Rows of a step: one token each, of any sequences, at any positions. A row sees its own sequence up to itself; what it
// sees must lie in the pool or be a row of this step.
typedef struct {
  int32_t rows, sequences, wanted_rows, blocks;
  const int32_t *tokens, *positions, *sequence;  // [rows]
  const int32_t* const* tables;                  // [sequences]: KV blocks in order of position
  const int32_t* table_blocks;                   // [sequences]: how many
  const int32_t* wanted;                         // [wanted_rows] row numbers
  float* logits;                                 // [wanted_rows][vocabulary]
  void* const* keys;                             // per layer: [blocks][kv_heads][64 / 16][head_dim][16]
  void* const* values;                           // per layer: [blocks][kv_heads][64][head_dim]
  int32_t adapter_count;
  const llk_adapter* adapters;  // [adapter_count]
  const int32_t* adapter;       // [rows]: number of the row's adapter, -1 for none; or NULL: no row has one
} llk_step_args;

// What decides the next token of a row. The filters keep the tokens whose logits are at least as large as the least that
// each of them keeps; min-p and top-k look at all tokens, top-p at those that the two leave.
typedef struct {
  const float* logits;  // [vocabulary], bias and penalties applied; minus infinity where a token is barred
  const float* raw;     // [vocabulary], the model's own, or the same pointer: what must be numbers
  double temperature;   // 0: the likeliest token, the first of equal ones
  double top_p;         // 1: all
  double log_min_p;     // minus infinity: all
  uint64_t seed;
  uint32_t choice, index;
  int32_t top_k;  // 0: all
} llk_pick_row;

typedef struct llk_model llk_model;

int32_t llk_abi(void);
int32_t llk_best_isa(void);                // the best instruction set that this processor has
int32_t llk_isa_supported(int32_t isa);
void llk_set_threads(int32_t threads);     // for the whole process; threads start at the next parallel call
int32_t llk_threads(void);

int64_t llk_packed_bytes(int32_t kind, int32_t outputs, int32_t inputs);  // 0 if it cannot be packed
int32_t llk_pack(int32_t kind, const float* weight, int32_t outputs, int32_t inputs, void* packed);  // [outputs][inputs]
int32_t llk_unpack(const llk_matrix* matrix, float* weight);

// Single kernels, for tests and measurements. quantize: norm may be NULL.
int32_t llk_quantize(int32_t isa, const float* x, const float* norm, float epsilon, int32_t rows, int32_t width,
                     int16_t* quantized, float* scales);
int32_t llk_gemm(int32_t isa, const llk_matrix* matrix, const int16_t* quantized, const float* scales, int32_t rows,
                 float* out);  // int8
int32_t llk_gemm_float(int32_t isa, const llk_matrix* matrix, const float* x, int32_t rows, float* out);  // fp16, fp32
int32_t llk_activate(int32_t isa, int32_t activation, const float* x, int32_t count, float* out);  // count: times 8

// picks[i]: the token of row i, -1 if its logits are not all numbers or the largest is infinite. Rows are shared among the
// threads.
int32_t llk_pick(int32_t isa, const llk_pick_row* rows, int32_t count, int32_t vocabulary, int32_t* picks);

// NULL if a shape does not fit the kernels or memory is short. A model is used by one call at a time.
llk_model* llk_open(const llk_shape* shape, int32_t isa, int32_t* status);
void llk_close(llk_model* model);
int32_t llk_step(llk_model* model, const llk_step_args* args);
// Attention of one layer: queries [rows][heads][head_dim], already scaled; same shape out. Keys and values are read only.
int32_t llk_attend(llk_model* model, int32_t layer, const llk_step_args* args, const float* queries, float* out);

#ifdef __cplusplus
}
#endif
