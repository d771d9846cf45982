/* Calls of a bundle, read from files: driver [--begin] CASE RESULT [CASE RESULT ...]
 *
 * A case is text, and then the bytes of its arrays, side by side in their order:
 *
 *   pa-case
 *   call decode                        or attend, append_kv
 *   spec f32_nhd_h16x1_d128_b16
 *   threads 2
 *   threading 1                        a pa_threading
 *   manner default                     or workspace, or caller: threads of this program's own, and a workspace
 *   scale 0x1.6a09e6p-4                if there is one
 *   not_causal 1                       likewise
 *   beside key_cache                   an array that is to lie one element further than its memory
 *   over out query                     an array that is to lie in the memory of another one, which has as much
 *   array query 1 3 4 6 24             name, dtype, rank, extents
 *   end
 *
 * A result is the line "status message", and after PA_OK the bytes of the arrays that are written, in the same order.
 * So that an access outside of an array ends the program, each array ends where a page ends that is followed by one
 * without access; with --begin it begins after such a page. Nothing is allocated in a call with a workspace: that is
 * looked at. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pa.h"

enum { kMostArrays = 24, kMostRank = 5, kMostThreads = 8 };

typedef struct Array {
  char name[32];
  pa_tensor tensor;
  int64_t shape[kMostRank];
  size_t bytes;
  int is_written;
  void* pages;
  size_t pages_size;
} Array;

typedef struct Case {
  char call[16], spec[128], manner[16], beside[32], over[2][32];
  int64_t num_threads;
  int threading, not_causal, has_scale, num_arrays;
  double scale;
  Array arrays[kMostArrays];
} Case;

static void fail(const char* what, const char* which) {
  fprintf(stderr, "driver: %s: %s (%s)\n", what, which, strerror(errno));
  exit(2);
}

static size_t size_of(int dtype) {
  switch (dtype) {
    case PA_FLOAT32:
    case PA_INT32:
    case PA_UINT32:
      return 4;
    case PA_FLOAT16:
    case PA_BFLOAT16:
    case PA_INT16:
    case PA_UINT16:
      return 2;
    case PA_INT64:
    case PA_UINT64:
    case PA_FLOAT64:
      return 8;
    default:
      return 1;
  }
}

/* Memory for an array between two pages without access. */
static void place(Array* array, int at_begin) {
  const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (array->bytes + page - 1) / page * page;
  array->pages_size = whole + 2 * page;
  array->pages = mmap(NULL, array->pages_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (array->pages == MAP_FAILED) fail("no memory", array->name);
  char* const first = (char*)array->pages + page;
  if (whole > 0 && mprotect(first, whole, PROT_READ | PROT_WRITE) != 0) fail("no memory", array->name);
  array->tensor.data = at_begin ? first : first + whole - array->bytes;
}

static void read_array(Case* of, const char* line) {
  if (of->num_arrays == kMostArrays) fail("too many arrays", line);
  Array* const array = &of->arrays[of->num_arrays++];
  int used = 0;
  if (sscanf(line, "array %31s %" SCNd32 " %" SCNd32 "%n", array->name, &array->tensor.dtype, &array->tensor.rank,
             &used) != 3 ||
      array->tensor.rank > kMostRank) {
    fail("no array", line);
  }
  array->bytes = size_of(array->tensor.dtype);
  for (int i = 0; i < array->tensor.rank; ++i) {
    int more = 0;
    if (sscanf(line + used, "%" SCNd64 "%n", &array->shape[i], &more) != 1) fail("no extent", line);
    used += more;
    array->bytes *= (size_t)array->shape[i];
  }
  array->tensor.shape = array->shape;
}

static void read_case(Case* of, const char* path, int at_begin) {
  char line[512];
  FILE* const file = fopen(path, "rb");
  if (file == NULL) fail("cannot read", path);
  memset(of, 0, sizeof *of);
  while (fgets(line, sizeof line, file) != NULL && strcmp(line, "end\n") != 0) {
    if (strncmp(line, "array ", 6) == 0) read_array(of, line);
    sscanf(line, "call %15s", of->call);
    sscanf(line, "spec %127s", of->spec);
    sscanf(line, "manner %15s", of->manner);
    sscanf(line, "beside %31s", of->beside);
    sscanf(line, "over %31s %31s", of->over[0], of->over[1]);
    sscanf(line, "threads %" SCNd64, &of->num_threads);
    sscanf(line, "threading %d", &of->threading);
    sscanf(line, "not_causal %d", &of->not_causal);
    if (sscanf(line, "scale %lf", &of->scale) == 1) of->has_scale = 1;
  }
  for (int i = 0; i < of->num_arrays; ++i) {
    Array* const array = &of->arrays[i];
    place(array, at_begin);
    if (fread(array->tensor.data, 1, array->bytes, file) != array->bytes) fail("too short", path);
    if (strcmp(of->beside, array->name) != 0) continue;
    const size_t element = size_of(array->tensor.dtype);
    array->tensor.data = at_begin ? (char*)array->tensor.data - element : (char*)array->tensor.data + element;
  }
  fclose(file);
}

/* The array of a name, or none. */
static pa_tensor given(Case* of, const char* name, int is_written) {
  static const pa_tensor none;
  for (int i = 0; i < of->num_arrays; ++i) {
    if (strcmp(of->arrays[i].name, name) != 0) continue;
    of->arrays[i].is_written = is_written;
    pa_tensor found = of->arrays[i].tensor;
    if (strcmp(of->over[0], name) == 0) found.data = given(of, of->over[1], 0).data;
    return found;
  }
  return none;
}

/* Threads of this program's own, which are there for one call. */
typedef struct Job {
  void (*task)(void*, int64_t);
  void* work;
  int64_t count, next;
  pthread_mutex_t mutex;
} Job;

static void* help(void* self) {
  Job* const job = self;
  for (;;) {
    pthread_mutex_lock(&job->mutex);
    const int64_t i = job->next++;
    pthread_mutex_unlock(&job->mutex);
    if (i >= job->count) return NULL;
    job->task(job->work, i);
  }
}

static void parallel_for(void* context, int64_t count, int64_t num_threads, void (*task)(void*, int64_t), void* work) {
  Job job = {task, work, count, 0, PTHREAD_MUTEX_INITIALIZER};
  pthread_t threads[kMostThreads];
  int started = 0;
  ++*(int64_t*)context;
  while (started < num_threads - 1 && started < kMostThreads) {
    if (pthread_create(&threads[started], NULL, help, &job) != 0) break;
    ++started;
  }
  help(&job);
  while (started > 0) pthread_join(threads[--started], NULL);
}

typedef struct Arguments {
  pa_decode_args decode;
  pa_attend_args attend;
  pa_append_kv_args append_kv;
} Arguments;

static void set_arguments(Case* of, Arguments* to) {
  memset(to, 0, sizeof *to);
  const double* const scale = of->has_scale ? &of->scale : NULL;
  pa_attend_args* const a = &to->attend;
  a->query = given(of, "query", 0);
  a->key_cache = given(of, "key_cache", 0), a->value_cache = given(of, "value_cache", 0);
  a->block_table = given(of, "block_table", 0);
  a->block_indptr = given(of, "block_indptr", 0), a->block_indices = given(of, "block_indices", 0);
  a->context_lens = given(of, "context_lens", 0), a->query_start_loc = given(of, "query_start_loc", 0);
  a->out = given(of, "out", 1), a->lse = given(of, "lse", 1);
  a->alibi_slopes = given(of, "alibi_slopes", 0), a->sinks = given(of, "sinks", 0);
  a->key_scale = given(of, "key_scale", 0), a->value_scale = given(of, "value_scale", 0);
  a->tree_mask = given(of, "tree_mask", 0);
  a->scale = scale, a->not_causal = of->not_causal;
  pa_decode_args* const d = &to->decode;
  d->query = a->query, d->key_cache = a->key_cache, d->value_cache = a->value_cache;
  d->block_table = a->block_table, d->block_indptr = a->block_indptr, d->block_indices = a->block_indices;
  d->context_lens = a->context_lens, d->out = a->out, d->lse = a->lse;
  d->alibi_slopes = a->alibi_slopes, d->sinks = a->sinks;
  d->key_scale = a->key_scale, d->value_scale = a->value_scale, d->scale = scale;
  if (strcmp(of->call, "append_kv") != 0) return;
  pa_append_kv_args* const n = &to->append_kv;
  n->key = given(of, "key", 0), n->value = given(of, "value", 0), n->slot_mapping = given(of, "slot_mapping", 0);
  n->key_cache = given(of, "key_cache", 1), n->value_cache = given(of, "value_cache", 1);
  n->key_scale = given(of, "key_scale", 1), n->value_scale = given(of, "value_scale", 1);
}

static pa_status call(const Case* of, const pa_kernels* kernels, const Arguments* args, const pa_options* options,
                      pa_error* error) {
  if (strcmp(of->call, "decode") == 0) return pa_decode(kernels, &args->decode, options, error);
  if (strcmp(of->call, "attend") == 0) return pa_attend(kernels, &args->attend, options, error);
  return pa_append_kv(kernels, &args->append_kv, options, error);
}

static pa_status measure(const Case* of, const pa_kernels* kernels, const Arguments* args, const pa_options* options,
                         size_t* size, pa_error* error) {
  if (strcmp(of->call, "decode") == 0) return pa_decode_workspace(kernels, &args->decode, options, size, error);
  if (strcmp(of->call, "attend") == 0) return pa_attend_workspace(kernels, &args->attend, options, size, error);
  return pa_append_kv_workspace(kernels, &args->append_kv, options, size, error);
}

/* Run a case as its manner says. */
static pa_status run(Case* of, pa_error* error) {
  const pa_kernels* kernels = NULL;
  Arguments args;
  pa_options options;
  int64_t parallel_calls = 0;
  memset(&options, 0, sizeof options);
  options.num_threads = of->num_threads, options.threading = of->threading;
  set_arguments(of, &args);
  pa_status status = pa_find(of->spec, &kernels, error);
  if (status != PA_OK || strcmp(of->manner, "default") == 0) {
    return status != PA_OK ? status : call(of, kernels, &args, &options, error);
  }
  if (strcmp(of->manner, "caller") == 0) {
    options.parallel_for = parallel_for, options.parallel_context = &parallel_calls;
  } else {
    options.num_threads = 1;
  }
  Array workspace;
  memset(&workspace, 0, sizeof workspace);
  strcpy(workspace.name, "workspace");
  status = measure(of, kernels, &args, &options, &workspace.bytes, error);
  if (status != PA_OK) return status;
  place(&workspace, 0);
  memset(workspace.tensor.data, 0xFF, workspace.bytes);
  options.workspace = workspace.tensor.data, options.workspace_size = workspace.bytes;
  const size_t before = mallinfo2().uordblks;
  status = call(of, kernels, &args, &options, error);
  if (strcmp(of->manner, "workspace") == 0 && mallinfo2().uordblks != before) fail("a call allocated", of->call);
  munmap(workspace.pages, workspace.pages_size);
  return status;
}

static void write_result(const Case* of, const char* path, pa_status status, const pa_error* error) {
  FILE* const file = fopen(path, "wb");
  if (file == NULL) fail("cannot write", path);
  fprintf(file, "%d %s\n", status, error->message);
  for (int i = 0; status == PA_OK && i < of->num_arrays; ++i) {
    const Array* const array = &of->arrays[i];
    if (array->is_written) fwrite(array->tensor.data, 1, array->bytes, file);
  }
  if (fclose(file) != 0) fail("cannot write", path);
}

int main(int argc, char** argv) {
  const int at_begin = argc > 1 && strcmp(argv[1], "--begin") == 0;
  static Case of;
  if (pa_api_version() != PA_API_VERSION) fail("another version", "pa.h");
  for (int i = 1 + at_begin; i + 1 < argc; i += 2) {
    pa_error error;
    read_case(&of, argv[i], at_begin);
    const pa_status status = run(&of, &error);
    write_result(&of, argv[i + 1], status, &error);
    for (int k = 0; k < of.num_arrays; ++k) munmap(of.arrays[k].pages, of.arrays[k].pages_size);
  }
  printf("%s\n", pa_isa() == NULL ? "none" : pa_isa());
  return 0;
}
