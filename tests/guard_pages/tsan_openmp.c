// Tells ThreadSanitizer what it cannot see in libgomp, which is not instrumented: everything before a parallel region
// happens before what its threads do, and that before everything behind it. Preloaded behind libtsan (.ci/sanitize).
#define _GNU_SOURCE
#include <dlfcn.h>

void __tsan_acquire(void* address);
void __tsan_release(void* address);

typedef void (*region)(void*);
typedef void (*parallel)(region, void*, unsigned, unsigned);

struct call {
  region function;
  void* data;
};

static void run(void* argument) {
  struct call* c = argument;
  __tsan_acquire(c);
  c->function(c->data);
  __tsan_release(c);
}

void GOMP_parallel(region function, void* data, unsigned threads, unsigned flags) {
  struct call c = {function, data};
  const parallel original = (parallel)dlsym(RTLD_NEXT, "GOMP_parallel");
  __tsan_release(&c);
  original(run, &c, threads, flags);
  __tsan_acquire(&c);
}
