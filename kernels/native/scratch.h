// Memory that a call works in: one block a calling thread, kept for its next call and freed when the thread ends.
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef __SANITIZE_ADDRESS__  // a fence behind every array, so that AddressSanitizer sees who steps over its end
#include <sanitizer/asan_interface.h>
#endif

char* moe_scratch(size_t bytes);  // 64-byte aligned, or null; what an earlier call of this thread got is gone

// Cuts a block into arrays. First `measure` sums up with base null, then the same code runs on the block.
struct Cut {
  char* base;
  size_t used = 0;
  explicit Cut(char* b = nullptr) : base(b) {}
  template <class T>
  T* take(int64_t count) {
    T* p = base ? (T*)(base + used) : nullptr;
    size_t bytes = count * sizeof(T), room = (bytes + 63) & ~size_t(63);
#ifdef __SANITIZE_ADDRESS__
    room += 64;
    if (p) ASAN_UNPOISON_MEMORY_REGION(p, bytes), ASAN_POISON_MEMORY_REGION((char*)p + bytes, room - bytes);
#endif
    used += room;
    return p;
  }
};
