// Working memory: see scratch.h.
#include "scratch.h"

#include <stdlib.h>
#include <string.h>

namespace {

struct Block {
  char* at = nullptr;
  size_t size = 0;
  ~Block() { free(at); }
};
thread_local Block block;

}  // namespace

char* moe_scratch(size_t bytes) {
  if (bytes > SIZE_MAX / 2) return nullptr;
  if (!block.at || bytes > block.size) {
    free(block.at);
    size_t size = (bytes + 4096) & ~size_t(4095);
    block.at = (char*)aligned_alloc(4096, size);
    block.size = block.at ? size : 0;
  }
#ifdef __SANITIZE_ADDRESS__
  if (block.at) ASAN_UNPOISON_MEMORY_REGION(block.at, block.size);
#endif
#ifdef MOE_POISON
  if (block.at) memset(block.at, 0xff, block.size);  // NaN, as fp32 and as bf16: reading what was never written shows
#endif
  return block.at;
}
