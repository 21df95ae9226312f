// Puts each tensor between pages that must not be touched: preloaded, it serves posix_memalign, which is what torch
// allocates tensors with, from an arena of its own, one allocation to a run of pages, and never hands out a page twice.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

extern void* __libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void* p);

enum { kOff, kTail, kHead };  // an unreadable page right behind the last byte, or right before the first
static const size_t kArena = (size_t)1 << 38, kPage = 4096;
static char *arena, *next;
static int mode = kOff;
static long served;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((visibility("default"))) long guard_mode(int wanted) {
  pthread_mutex_lock(&lock);
  if (!arena) {
    arena = mmap(NULL, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    next = arena = arena == MAP_FAILED ? NULL : arena;
  }
  mode = arena ? wanted : kOff;
  const long count = arena ? served : -1;
  pthread_mutex_unlock(&lock);
  return count;
}

// GUARD_MODE=1|2 in the environment: from the start, for a whole process.
__attribute__((constructor)) static void start(void) {
  const char* wanted = getenv("GUARD_MODE");
  if (wanted) guard_mode(wanted[0] - '0');
}

__attribute__((visibility("default"))) int posix_memalign(void** out, size_t alignment, size_t size) {
  if (mode == kOff || size == 0) {
    *out = __libc_memalign(alignment, size);
    return *out ? 0 : ENOMEM;
  }
  pthread_mutex_lock(&lock);
  const size_t inside = (size + kPage - 1) / kPage * kPage;
  char* pages = next + kPage;
  if ((size_t)(pages - arena) + inside + kPage > kArena || mprotect(pages, inside, PROT_READ | PROT_WRITE)) {
    pthread_mutex_unlock(&lock);
    return ENOMEM;
  }
  next = pages + inside;
  ++served;
  const int tail = mode == kTail;
  pthread_mutex_unlock(&lock);
  memset(pages, 0xFF, inside);  // NaN, or index -1, for who reads what was never written
  *out = tail ? pages + inside - size : pages;
  return 0;
}

__attribute__((visibility("default"))) void free(void* p) {
  if (!arena || (char*)p < arena || (char*)p >= arena + kArena) {
    __libc_free(p);
    return;
  }
  // What is used after this faults. The length is not kept: all pages up to the next unreadable one are this tensor's.
  char* page = (char*)((uintptr_t)p & ~(uintptr_t)(kPage - 1));
  while (page < next && madvise(page, kPage, MADV_DONTNEED) == 0 && mprotect(page, kPage, PROT_NONE) == 0) {
    page += kPage;
    unsigned char there;
    if (page >= next || mincore(page, kPage, &there) || !(there & 1)) break;
  }
}
