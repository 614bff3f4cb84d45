// Which level answers, and the exported functions: `int moe_<name>(const <Struct>*)` for every op of interface.h.
//
// The best level that was compiled in (MOE_BUILT, from build.py) and that the processor runs is taken at the first use.
// library.py asks for another one where MOE_NATIVE_LEVEL names it, and so do tests.
#include <atomic>
#include <string.h>

#include "interface.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// GCC and Clang ask the operating system too whether it saves these registers. Who has AVX2 has F16C, whose name older
// compilers do not know here.
#define RUNS_portable true
#define RUNS_avx2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
#define RUNS_avx512                                                                                             \
  (RUNS_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                      \
   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#define RUNS_avx512bf16 (RUNS_avx512 && __builtin_cpu_supports("avx512bf16"))

// Null where a build leaves an op's file out.
#define WEAK(name, args) __attribute__((weak)) int name(const args&);
#define WEAK_LEVEL(level) \
  namespace level {       \
  MOE_FUNCTIONS(WEAK)     \
  }
MOE_BUILT(WEAK_LEVEL)

namespace {

#define FIELD(name, args) int (*name)(const args&);
struct Level {
  const char* name;
  bool runs;
  MOE_FUNCTIONS(FIELD)
};

struct Levels {
  static constexpr int most = 8;
  Level all[most + 1] = {};
  char names[256] = "";
  int count = 0;

  void add(const Level& level) {
    all[count++] = level;
    if (!level.runs) return;
    if (*names) strcat(names, " ");
    strcat(names, level.name);
  }
  Levels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define POINTER(name, args) name,
#define ADD(level)                                      \
  {                                                     \
    using namespace level;                              \
    add(Level{#level, RUNS_##level, MOE_FUNCTIONS(POINTER)}); \
  }
    MOE_BUILT(ADD)
  }
  const Level* find(const char* name) const {  // "": the best, which stands last
    const Level* found = nullptr;
    for (const Level& level : all)
      if (level.name && level.runs && (!*name || !strcmp(name, level.name))) found = &level;
    return found;
  }
};

const Levels& levels() {
  static const Levels found;
  return found;
}

std::atomic<const Level*> chosen{nullptr};

const Level& level() {
  const Level* found = chosen.load(std::memory_order_acquire);
  if (!found) chosen.store(found = levels().find(""), std::memory_order_release);
  return *found;
}

}  // namespace

EXPORT const char* moe_native_digest() { return MOE_DIGEST; }
EXPORT const char* moe_native_level() { return level().name; }
EXPORT const char* moe_native_levels() { return levels().names; }  // those that run here, the best one last

// "": the best. Returns 0 where the level is not one of those that run here.
EXPORT int moe_native_use(const char* name) {
  const Level* found = levels().find(name);
  if (found) chosen.store(found, std::memory_order_release);
  return found != nullptr;
}

#define CALL(name, args) \
  EXPORT int moe_##name(const args* a) { return level().name ? level().name(*a) : NOT_BUILT; }
MOE_FUNCTIONS(CALL)

#define SIZE(args) \
  EXPORT int64_t moe_native_sizeof_##args() { return sizeof(args); }
MOE_STRUCTS(SIZE)
