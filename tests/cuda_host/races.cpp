// Finds data races of the emulated kernels, whatever order their threads run in.
//
// The kernels are compiled with -fsanitize=thread, which calls the functions at the end of this file at every access to
// memory; they stand in for the compiler's own library, which knows nothing of blocks and warps. Of each byte that a
// launch touches they keep who wrote it last and who read it since. Two accesses of which one writes are a race unless
// they are of one thread, or of one block with a __syncthreads between them, or of one warp with a __syncwarp between
// them; a shuffle or a vote lets a warp write over what it has read before, but shows nobody what was written. Nothing
// orders two blocks.
#include <dlfcn.h>

#include <unordered_map>

#include "cuda_runtime.h"

namespace {

using cuda_host::Fiber;
using cuda_host::machine;
using cuda_host::Stamp;

// Who touched a byte, as indices of stamps, of which 0 is nobody; the readers are the last one and another.
struct Byte {
  uint32_t writer = 0, reader[2] = {0, 0};
};

constexpr uintptr_t kPageBytes = 4096;
constexpr size_t kMostPages = 8192;

bool is_shared(uintptr_t begin, uintptr_t end) {
  for (const auto& [variable, bytes] : machine.shared) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(variable);
    if (begin < first + bytes && first < end) return true;
  }
  return false;
}

struct Page {
  bool some_shared;
  int64_t launch = -1;
  Byte bytes[kPageBytes];

  explicit Page(uintptr_t index) : some_shared(is_shared(index * kPageBytes, (index + 1) * kPageBytes)) {}
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_index = 0;
Page* last_page = nullptr;
std::vector<Stamp> stamps;
int64_t stamped_launch = -1;
void* caller = nullptr;  // the instruction of the kernel that accesses memory now

Byte& byte_at(uintptr_t address) {
  const uintptr_t index = address / kPageBytes;
  if (!last_page || index != last_index) {
    std::unique_ptr<Page>& page = pages[index];
    if (!page) page = std::make_unique<Page>(index);
    last_index = index, last_page = page.get();
  }
  if (last_page->launch != machine.launch)
    std::fill_n(last_page->bytes, kPageBytes, Byte()), last_page->launch = machine.launch;
  return last_page->bytes[address % kPageBytes];
}

void begin_launch() {
  stamped_launch = machine.launch;
  stamps.assign(1, Stamp{});
  if (pages.size() > kMostPages) pages.clear(), last_page = nullptr;
}

uint32_t stamp_of(Fiber& f) {
  if (stamped_launch != machine.launch) begin_launch();
  if (f.stamp == 0) stamps.push_back(f.now), f.stamp = static_cast<uint32_t>(stamps.size() - 1);
  return f.stamp;
}

// How far two threads are apart: 0 for the same, then a warp, a block, a launch.
int distance(const Stamp& a, const Stamp& b) {
  if (a.block != b.block) return 3;
  return a.thread / cuda_host::kWarp != b.thread / cuda_host::kWarp ? 2 : a.thread != b.thread;
}

// Whether all that b does comes after all that a did. `reads`: a only reads.
bool ordered(const Stamp& a, const Stamp& b, bool reads) {
  const int apart = distance(a, b);
  if (apart == 0) return true;
  if (apart == 3) return false;
  if (a.block_barriers != b.block_barriers) return true;
  return apart == 1 && (a.warp_barriers != b.warp_barriers || (reads && a.exchanges != b.exchanges));
}

// `addr2line -fCe` of the library tells the place in the kernel.
void report(const char* what, uintptr_t address, const Stamp& a, const Stamp& b) {
  if (machine.races++) return;
  Dl_info library{};
  dladdr(caller, &library);
  const auto place = static_cast<const char*>(caller) - static_cast<const char*>(library.dli_fbase);
  std::fprintf(stderr, "cuda_host: thread %u of block %lld %s, of thread %u of block %lld, at %p; place %#llx\n",
               b.thread, static_cast<long long>(b.block), what, a.thread, static_cast<long long>(a.block),
               reinterpret_cast<void*>(address), static_cast<long long>(place));
}

void check(uint32_t before, uint32_t now, bool reads, const char* what, uintptr_t address) {
  if (before == 0 || before == now) return;
  const Stamp &a = stamps[before], &b = stamps[now];
  if (!ordered(a, b, reads)) report(what, address, a, b);
}

// The byte as this block sees it: shared memory is another one for every block.
Byte& fresh_byte(uintptr_t address, uint32_t now) {
  Byte& byte = byte_at(address);
  const uint32_t last = byte.writer ? byte.writer : byte.reader[0];
  if (last_page->some_shared && last != 0 && stamps[last].block != stamps[now].block && is_shared(address, address + 1))
    byte = Byte();
  return byte;
}

void read(uintptr_t address, size_t bytes, uint32_t now) {
  for (uintptr_t at = address; at < address + bytes; ++at) {
    Byte& byte = fresh_byte(at, now);
    check(byte.writer, now, false, "reads an unordered write", at);
    if (byte.reader[0] == now) continue;
    const uint32_t other = byte.reader[1];
    if (other == 0 || distance(stamps[byte.reader[0]], stamps[now]) >= distance(stamps[other], stamps[now]))
      byte.reader[1] = byte.reader[0];
    byte.reader[0] = now;
  }
}

void write(uintptr_t address, size_t bytes, uint32_t now) {
  for (uintptr_t at = address; at < address + bytes; ++at) {
    Byte& byte = fresh_byte(at, now);
    check(byte.writer, now, false, "writes over an unordered write", at);
    for (const uint32_t reader : byte.reader) check(reader, now, true, "writes over an unordered read", at);
    byte = {now, {0, 0}};
  }
}

// A thread that loads 16 bytes of any alignment loads the two aligned vectors that hold them, and the rest of those is
// of no matter, whoever writes it: only the bytes between the two are sure to be used. So such a load waits for the
// thread's next access.
void read_vector(Fiber& f, uintptr_t address) {
  const uintptr_t first = f.vector;
  f.vector = 0;
  if (first != address + 16 && first + 16 != address) {
    if (first) read(first, 16, stamp_of(f));
    f.vector = address;
    return;
  }
  const uintptr_t middle = std::max(first, address);
  read(middle - 1, 1, stamp_of(f)), read(middle, 1, stamp_of(f));
}

void access(void* p, size_t bytes, bool writes, void* from) {
  Fiber* f = machine.running;
  const auto inside = [&](const void* begin, size_t size) {
    return static_cast<size_t>(static_cast<char*>(p) - static_cast<const char*>(begin)) < size;
  };
  if (!f || inside(f->stack.get(), cuda_host::kStackBytes)) return;
  if (inside(&machine, sizeof(machine)) || inside(machine.fibers.data(), sizeof(Fiber) * machine.fibers.size())) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  caller = from;
  if (!writes && bytes == 16) return read_vector(*f, address);
  cuda_host::finish_loads(*f);
  writes ? write(address, bytes, stamp_of(*f)) : read(address, bytes, stamp_of(*f));
}

}  // namespace

void cuda_host::finish_loads(Fiber& f) {
  if (f.vector) read(std::exchange(f.vector, 0), 16, stamp_of(f));
}
void cuda_host::copy_vector(void* to, const void* from) {
  access(const_cast<void*>(from), 16, false, __builtin_return_address(0));
  access(to, 16, true, __builtin_return_address(0));
  std::memcpy(to, from, 16);
}

extern "C" {
#define HOOK(name, bytes, writes) \
  void __tsan_##name(void* p) { access(p, bytes, writes, __builtin_return_address(0)); }
#define HOOKS(bytes)              \
  HOOK(read##bytes, bytes, false) \
  HOOK(write##bytes, bytes, true) HOOK(unaligned_read##bytes, bytes, false) HOOK(unaligned_write##bytes, bytes, true)
HOOK(read1, 1, false)
HOOK(write1, 1, true)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, true, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// What clang calls besides.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return *p; }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
  return std::memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  __tsan_write_range(to, bytes);
  return std::memset(to, value, bytes);
}
}
