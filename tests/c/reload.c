/* Load a bundle, call it on threads of its own, and unload it, many times: reload LIBRARY SPEC COUNT. Prints how many
 * more bytes of the heap, mappings and threads there are in the end than after the first ten times. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pa.h"

enum { kBatch = 64, kTokens = 500 };

typedef struct Held {
  long heap, mappings, threads;
} Held;

static Held held(void) {
  Held found = {(long)mallinfo2().uordblks, 0, 0};
  char line[512];
  FILE* file = fopen("/proc/self/maps", "r");
  while (fgets(line, sizeof line, file) != NULL) ++found.mappings;
  fclose(file);
  file = fopen("/proc/self/status", "r");
  while (fgets(line, sizeof line, file) != NULL) sscanf(line, "Threads: %ld", &found.threads);
  fclose(file);
  return found;
}

/* Functions of a library by their names, of any type. */
static void find(void* library, const char* name, void* function) {
  void* const found = dlsym(library, name);
  if (found == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(1);
  }
  memcpy(function, &found, sizeof found);
}

static float query[kBatch][6][24], out[kBatch][6][24], keys[kTokens / 5][5][2][24], values[kTokens / 5][5][2][24];
static int32_t table[kBatch][kTokens / 5], lens[kBatch];

static void use(const char* path, const char* spec) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    exit(1);
  }
  pa_status (*found)(const char*, const pa_kernels**, pa_error*);
  pa_status (*decode)(const pa_kernels*, const pa_decode_args*, const pa_options*, pa_error*);
  find(library, "pa_find", &found), find(library, "pa_decode", &decode);
  const int64_t of_query[] = {kBatch, 6, 24}, of_cache[] = {kTokens / 5, 5, 2, 24}, of_lens[] = {kBatch};
  const int64_t of_table[] = {kBatch, kTokens / 5};
  const pa_decode_args args = {
      .query = {.data = query, .shape = of_query, .rank = 3, .dtype = PA_FLOAT32},
      .key_cache = {.data = keys, .shape = of_cache, .rank = 4, .dtype = PA_FLOAT32},
      .value_cache = {.data = values, .shape = of_cache, .rank = 4, .dtype = PA_FLOAT32},
      .block_table = {.data = table, .shape = of_table, .rank = 2, .dtype = PA_INT32},
      .context_lens = {.data = lens, .shape = of_lens, .rank = 1, .dtype = PA_INT32},
      .out = {.data = out, .shape = of_query, .rank = 3, .dtype = PA_FLOAT32},
  };
  const pa_options options = {.num_threads = 4, .threading = PA_OWN};
  const pa_kernels* kernels;
  pa_error error;
  if (found(spec, &kernels, &error) != PA_OK || decode(kernels, &args, &options, &error) != PA_OK) {
    fprintf(stderr, "%s\n", error.message);
    exit(1);
  }
  /* And an error, with an exception inside. */
  const double scale = 1e300;
  pa_decode_args wrong = args;
  wrong.scale = &scale;
  if (decode(kernels, &wrong, &options, &error) != PA_VALUE_ERROR) exit(1);
  dlclose(library);
  if (dlopen(path, RTLD_NOW | RTLD_NOLOAD) != NULL) {
    fprintf(stderr, "the library is still loaded\n");
    exit(1);
  }
}

int main(int argc, char** argv) {
  const int count = argc == 4 ? atoi(argv[3]) : 0;
  Held before = {0, 0, 0};
  for (int seq = 0; seq < kBatch; ++seq) lens[seq] = kTokens;
  for (int i = 0; i < count; ++i) {
    if (i == 10) before = held();
    use(argv[1], argv[2]);
  }
  const Held after = held();
  printf("%ld %ld %ld\n", after.heap - before.heap, after.mappings - before.mappings, after.threads - before.threads);
  return 0;
}
