// The stable ABI of libtorch, whose failed calls say why in PyTorch's own words (where it tells them: torch 2.13), and
// never name a path of the build.
#pragma once
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fused_ops {

[[noreturn]] inline __attribute__((noinline, cold)) void raise_failed_call(const char* call) {
  const char* why = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  if (why && *why) throw std::runtime_error(why);
  const std::string text = call;
  throw std::runtime_error("fused_ops: PyTorch's " + text.substr(0, text.find('(')) +
                           " failed, and said why on stderr");
}

}  // namespace fused_ops

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) ::fused_ops::raise_failed_call(#call);

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
