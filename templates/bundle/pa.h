/* Paged attention for programs in C and C++: the calls of a bundle made by pa_compiler.
 *
 * A bundle has kernels for one spec or several, each for one CPU or several. What fits this CPU and system best is
 * chosen once, when the library is loaded. pa_find gives the kernels of a spec by its name, which the bundle's
 * manifest.json, pa_name and `pa-compiler bundle` say, such as "f32_nhd_h16x1_d128_b16".
 *
 * Calls are safe from several threads at once. They check all arguments before anything but the workspace is written;
 * the contents of arrays must not change meanwhile. Nothing is thrown across this boundary. Whatever memory a call
 * takes of its own it keeps for the next one, until the thread ends or the library is unloaded: see pa_options for
 * memory and threads that are the caller's.
 *
 * A struct that is all zeros is a good beginning for each of those here: what is 0 in it is as the comment says. */
#ifndef PA_H_
#define PA_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of this file. pa_api_version() says that of the library. */
#define PA_API_VERSION 1

/* How a call ended. The names are those of the Python API's exceptions. */
typedef enum pa_status {
  PA_OK = 0,
  PA_TYPE_ERROR = 1,    /* an array is missing, of another dtype, or not one that the spec has */
  PA_VALUE_ERROR = 2,   /* shape, strides, alignment, overlap, a length, a number, or a name */
  PA_INDEX_ERROR = 3,   /* a block id or a slot outside of the caches */
  PA_RUNTIME_ERROR = 4, /* what this CPU, the system or the process lacks */
  PA_MEMORY_ERROR = 5   /* the system gives no memory */
} pa_status;

/* What went wrong, in words: "name: expected X, got Y". Empty after PA_OK. It is the caller's; wherever a function
 * takes one, NULL may stand for it. */
typedef struct pa_error {
  char message[512];
} pa_error;

typedef enum pa_dtype {
  PA_NONE = 0, /* no array */
  PA_FLOAT32 = 1,
  PA_FLOAT16 = 2,
  PA_BFLOAT16 = 3,
  PA_FLOAT8_E4M3FN = 4,
  PA_FLOAT8_E5M2 = 5,
  PA_INT8 = 6,
  PA_INT32 = 7,
  PA_INT64 = 8,
  PA_BOOL = 9, /* of 8 bits */
  PA_UINT8 = 10,
  PA_FLOAT64 = 11, /* this and the following are of no array here: errors can name them */
  PA_INT16 = 12,
  PA_UINT16 = 13,
  PA_UINT32 = 14,
  PA_UINT64 = 15
} pa_dtype;

/* An array in memory of the CPU. The last axis is contiguous; the others may have any strides, but in what is written
 * no two elements share memory. The arrays behind shape and strides are read during the call alone. */
typedef struct pa_tensor {
  void* data;             /* aligned to its elements */
  const int64_t* shape;   /* [rank] */
  const int64_t* strides; /* [rank], in elements; NULL: side by side, in C's order */
  int32_t rank;           /* up to 8 */
  int32_t dtype;          /* a pa_dtype; PA_NONE: there is no array */
} pa_tensor;

/* The kernels of one spec that were chosen for this CPU. They belong to the library. */
typedef struct pa_kernels pa_kernels;

/* Whose threads run a call. */
typedef enum pa_threading {
  PA_AUTO = 0,  /* OpenMP's team where the process has loaded a runtime that has one, else the library's own pool */
  PA_OWN = 1,   /* the library's own pool */
  PA_OPENMP = 2 /* OpenMP's team; PA_RUNTIME_ERROR where the process has none */
} pa_threading;

/* Runs task(work, i) for each i from 0 to count - 1 once, on up to num_threads threads, and returns when all are done.
 * In any order; a task may be slow or fast. num_threads is 2 or more. */
typedef void (*pa_parallel_for)(void* context, int64_t count, int64_t num_threads,
                                void (*task)(void* work, int64_t index), void* work);

/* What a call runs on. Results are the same in every bit whatever stands here. */
typedef struct pa_options {
  int64_t
      num_threads;   /* at most, the caller's own among them; 0: as many as there are CPUs for the library, see cpus */
  int32_t threading; /* a pa_threading */
  int32_t num_cpus;  /* of cpus; 0 where that is NULL */
  const int32_t* cpus; /* [num_cpus], from 0 to 65535, ascending: where threads of the library's pool run. NULL: on
                          those CPUs that the thread could use that loaded the library */
  pa_parallel_for parallel_for; /* threads of the caller's own in place of these; NULL: there are none */
  void* parallel_context;       /* handed to it */
  void* workspace; /* memory for all that the call needs beside its arguments, at a multiple of 64 bytes, with no byte
                      between the first and the last of one of their arrays; NULL: its own. With it, and with
                      parallel_for or one thread, a call allocates nothing */
  size_t workspace_size; /* its bytes: at least what pa_decode_workspace and its like say of this call. 0 where there
                            is none, but in these functions, which look at neither of the two */
} pa_options;

/* One query token for each of batch sequences. Caches are in the spec's kv_layout, as append_kv writes them:
 *   NHD     key_cache [num_blocks, block_size, num_kv_heads, head_dim], value_cache [.., value_dim]
 *   HND     key_cache [num_blocks, num_kv_heads, block_size, head_dim], value_cache [.., value_dim]
 *   packed  key_cache [num_blocks, num_kv_heads, head_dim / p, p * block_size],
 *           value_cache [num_blocks, num_kv_heads, block_size / p, p * value_dim], p as docs/reference.md says
 * Slots without a token may hold anything, NaN too. */
typedef struct pa_decode_args {
  pa_tensor query;         /* [batch, num_heads, head_dim], dtype */
  pa_tensor key_cache;     /* dtype, or kv_dtype. Of int4 PA_UINT8, with two codes in a byte, the even one low: the last
                              axis of both caches is half as long, and p is 2 */
  pa_tensor value_cache;   /* the same; none where the spec has shared_kv */
  pa_tensor block_table;   /* [batch, max_blocks], int32 or int64: the blocks of each sequence. Entries past its length
                              are not looked at. None with the two that follow */
  pa_tensor block_indptr;  /* [batch + 1], int32 or int64, from 0 on: block i of sequence b is block_indices[
                              block_indptr[b] + i]. Errors call it block_table[0] */
  pa_tensor block_indices; /* [n], int32 or int64. Errors call it block_table[1] */
  pa_tensor context_lens;  /* [batch], int32 or int64: tokens of each sequence, the query's own among them. 0 is one */
  pa_tensor out;           /* [batch, num_heads, value_dim] or [batch, num_heads * value_dim], out_dtype: written */
  pa_tensor lse;           /* [batch, num_heads], float32: written, the natural logarithm of the softmax's denominator.
                              Or none */
  pa_tensor alibi_slopes;  /* [num_heads], float32, where the spec has alibi; otherwise none */
  pa_tensor sinks;         /* [num_heads], float32, where the spec has sinks; otherwise none */
  pa_tensor key_scale;     /* float32, where the spec has a kv_dtype, as its kv_scale says: [1], [num_kv_heads] or
                              [num_blocks, num_kv_heads, block_size]; of int4 [num_blocks, num_kv_heads, block_size, 2],
                              a scale and a zero point. Otherwise none */
  pa_tensor value_scale;   /* the same */
  const pa_tensor* inputs; /* [num_inputs]: what the spec's functions read, in the order of the spec's inputs */
  int64_t num_inputs;
  const double* scale; /* factor of the scores; NULL: 1 / sqrt(head_dim) */
} pa_decode_args;

/* Any number of query tokens for each of batch sequences, its last ones. Their keys and values are in the caches
 * already. As pa_decode_args, but for */
typedef struct pa_attend_args {
  pa_tensor query; /* [num_tokens, num_heads, head_dim]: the query tokens of one sequence after another */
  pa_tensor key_cache;
  pa_tensor value_cache;
  pa_tensor block_table;
  pa_tensor block_indptr;
  pa_tensor block_indices;
  pa_tensor context_lens;
  pa_tensor query_start_loc; /* [batch + 1], int32 or int64, from 0 to num_tokens: where those of each sequence begin */
  pa_tensor out;             /* [num_tokens, num_heads, value_dim] or [num_tokens, num_heads * value_dim] */
  pa_tensor lse;             /* [num_tokens, num_heads] */
  pa_tensor alibi_slopes;
  pa_tensor sinks;
  pa_tensor key_scale;
  pa_tensor value_scale;
  pa_tensor tree_mask; /* [sum of n * n], bool or uint8: which of its n query tokens (columns) each of them (rows) of a
                          sequence sees, be it itself; or none */
  const pa_tensor* inputs;
  int64_t num_inputs;
  const double* scale;
  int32_t not_causal; /* 0: a query token sees nothing after its own position. Otherwise all of its sequence */
} pa_attend_args;

/* New tokens, written into their slots in their order: of two with one slot the later stays. */
typedef struct pa_append_kv_args {
  pa_tensor key;          /* [num_tokens, num_kv_heads, head_dim], dtype */
  pa_tensor value;        /* [num_tokens, num_kv_heads, value_dim], dtype; none with shared_kv */
  pa_tensor key_cache;    /* as of pa_decode_args: written */
  pa_tensor value_cache;  /* written */
  pa_tensor slot_mapping; /* [num_tokens], int32 or int64: block id * block_size + the slot in the block; -1: nowhere */
  pa_tensor key_scale;    /* as of pa_decode_args; written where each token has one, otherwise read */
  pa_tensor value_scale;  /* the same */
} pa_append_kv_args;

/* The lengths of a call of pa_decode, or, with query_start_loc, of pa_attend, causal and without a tree. */
typedef struct pa_plan_args {
  pa_tensor context_lens;    /* [batch], int32 or int64 */
  pa_tensor query_start_loc; /* [batch + 1], int32 or int64; or none */
  int64_t num_threads;       /* of pa_attend; 0: as of pa_options */
} pa_plan_args;

/* All heads of consecutive sequences with one query token each, in a range of their blocks. */
typedef struct pa_work_item {
  int64_t batch_start;
  int64_t num_seqs;
  int64_t block_begin;
  int64_t block_end;
  int64_t num_tokens; /* KV tokens that it reads */
} pa_work_item;

/* Query tokens of one sequence with some of its kv heads, in a range of its blocks. */
typedef struct pa_attend_item {
  int64_t seq;
  int64_t token_begin; /* of the call's query tokens */
  int64_t num_query;
  int64_t first_pos; /* of the first of them in its sequence */
  int64_t kv_head_begin;
  int64_t num_kv_heads;
  int64_t block_begin;
  int64_t block_end;
  int64_t work; /* FLOPs, or what could be computed while it reads */
} pa_attend_item;

typedef enum pa_item_kind { PA_WORK_ITEM = 1, PA_ATTEND_ITEM = 2 } pa_item_kind;

/* What a thread computes at a time. */
typedef struct pa_item {
  int64_t kind; /* a pa_item_kind: which of the two it is */
  union {
    pa_work_item work;
    pa_attend_item attend;
  } of;
} pa_item;

/* PA_API_VERSION of the library. */
int32_t pa_api_version(void);

/* What the bundle says of itself, as JSON: versions, specs, targets and kernels. It belongs to the library. */
const char* pa_manifest(void);

/* The names of the bundle's specs: pa_name(0) to pa_name(pa_count() - 1), NULL beyond. */
int64_t pa_count(void);
const char* pa_name(int64_t number);

/* The target whose kernels were chosen, such as "x86-64-v4"; NULL where none fits this CPU and system. The variable
 * PA_ISA of the environment, when the library is loaded, chooses another one of the bundle's, for tests. */
const char* pa_isa(void);

/* The kernels of the spec of a name.
 *
 * PA_VALUE_ERROR: the bundle has no spec of that name; the message lists those it has. Or PA_ISA names no target of it.
 * PA_RUNTIME_ERROR: no target of the bundle fits this CPU and system, or not the one that PA_ISA names; the message
 * says what each of them lacks. */
pa_status pa_find(const char* name, const pa_kernels** kernels, pa_error* error);

/* Their name, by which profilers show them and manifest.json lists them: spec, strategy and tiles, and target. */
const char* pa_kernels_name(const pa_kernels* kernels);

/* Attention of one query token per sequence. A sequence of length 0, and a head all of whose scores are -inf, gives out
 * 0 and lse -inf, or with sinks the sink. options may be NULL: all are 0.
 *
 * Errors as of pa_status; then neither out nor lse is written. */
pa_status pa_decode(const pa_kernels* kernels, const pa_decode_args* args, const pa_options* options, pa_error* error);

/* Attention of any number of query tokens per sequence. A query token gets what it gets in any other batch, at any
 * number of threads and however a prompt is cut into chunks of two tokens or more; a single one gets what pa_decode
 * gives. */
pa_status pa_attend(const pa_kernels* kernels, const pa_attend_args* args, const pa_options* options, pa_error* error);

/* Write the keys and values of new tokens into the caches. */
pa_status pa_append_kv(const pa_kernels* kernels, const pa_append_kv_args* args, const pa_options* options,
                       pa_error* error);

/* The bytes of pa_options.workspace that the call of these arguments needs, on so many threads as options say. They are
 * checked, and nothing is written. For another call with the same shapes and lengths it is the same number. The plan of
 * the call is made in memory of the library's own. */
pa_status pa_decode_workspace(const pa_kernels* kernels, const pa_decode_args* args, const pa_options* options,
                              size_t* size, pa_error* error);
pa_status pa_attend_workspace(const pa_kernels* kernels, const pa_attend_args* args, const pa_options* options,
                              size_t* size, pa_error* error);
pa_status pa_append_kv_workspace(const pa_kernels* kernels, const pa_append_kv_args* args, const pa_options* options,
                                 size_t* size, pa_error* error);

/* The work items of a call with these lengths, in the order in which threads take them: the first capacity of them are
 * written to items, which may be NULL with capacity 0, and how many there are to count. */
pa_status pa_plan(const pa_kernels* kernels, const pa_plan_args* args, pa_item* items, int64_t capacity, int64_t* count,
                  pa_error* error);

#ifdef __cplusplus
}
#endif

#endif /* PA_H_ */
