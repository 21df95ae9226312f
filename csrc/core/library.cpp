// Facts about the library itself.
#include "core/isa.h"
#include "core/stable.h"

// glibc's from 2.32 on, which libstdc++ asks before it counts references: the library's own serves older systems too.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace fused_ops {
namespace {

// 0 baseline, 1 AVX2, 2 AVX512: which copy of the CPU kernels this process runs.
int64_t cpu_isa() { return static_cast<int64_t>(current_isa()); }

}  // namespace
}  // namespace fused_ops

STABLE_TORCH_LIBRARY_FRAGMENT(fused_ops, m) { m.def("cpu_isa() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(fused_ops, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fused_ops::cpu_isa));
}
