// Facts about the library itself.
#include "core/isa.h"
#include "core/tensor.h"

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
