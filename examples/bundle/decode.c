/* Decode from a paged cache in files, in C: decode DIRECTORY, with what make_cache.py has written there.
 *
 *   cc -std=c99 decode.c $(pkg-config --cflags --libs pa) -o decode */
#include <stdio.h>
#include <stdlib.h>

#include "pa.h"

enum { kBatch = 3, kHeads = 8, kKvHeads = 2, kHeadDim = 64, kBlockSize = 16, kBlocks = 6, kMaxBlocks = 3 };

static float query[kBatch][kHeads][kHeadDim], out[kBatch][kHeads][kHeadDim];
static float keys[kBlocks][kBlockSize][kKvHeads][kHeadDim], values[kBlocks][kBlockSize][kKvHeads][kHeadDim];
static int32_t table[kBatch][kMaxBlocks], lens[kBatch];

static void read_file(const char* directory, const char* name, void* to, size_t size) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s.bin", directory, name);
  FILE* const file = fopen(path, "rb");
  if (file == NULL || fread(to, 1, size, file) != size) {
    fprintf(stderr, "%s: expected a file of %zu bytes\n", path, size);
    exit(1);
  }
  fclose(file);
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: decode DIRECTORY\n");
    return 1;
  }
  read_file(argv[1], "query", query, sizeof query);
  read_file(argv[1], "key_cache", keys, sizeof keys);
  read_file(argv[1], "value_cache", values, sizeof values);
  read_file(argv[1], "block_table", table, sizeof table);
  read_file(argv[1], "context_lens", lens, sizeof lens);

  const int64_t of_query[] = {kBatch, kHeads, kHeadDim}, of_cache[] = {kBlocks, kBlockSize, kKvHeads, kHeadDim};
  const int64_t of_table[] = {kBatch, kMaxBlocks}, of_lens[] = {kBatch};
  const pa_decode_args args = {
      .query = {.data = query, .shape = of_query, .rank = 3, .dtype = PA_FLOAT32},
      .key_cache = {.data = keys, .shape = of_cache, .rank = 4, .dtype = PA_FLOAT32},
      .value_cache = {.data = values, .shape = of_cache, .rank = 4, .dtype = PA_FLOAT32},
      .block_table = {.data = table, .shape = of_table, .rank = 2, .dtype = PA_INT32},
      .context_lens = {.data = lens, .shape = of_lens, .rank = 1, .dtype = PA_INT32},
      .out = {.data = out, .shape = of_query, .rank = 3, .dtype = PA_FLOAT32},
  };
  const pa_kernels* kernels;
  pa_error error;
  if (pa_find("f32_nhd_h8x2_d64_b16", &kernels, &error) != PA_OK || pa_decode(kernels, &args, NULL, &error) != PA_OK) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  for (int seq = 0; seq < kBatch; ++seq) {
    printf("sequence %d:", seq);
    for (int i = 0; i < 4; ++i) printf(" %.5f", out[seq][0][i]);
    printf("\n");
  }
  return 0;
}
