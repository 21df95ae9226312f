// Where an op's arguments come in from PyTorch and its results go out, and the one check of devices and data: of every
// tensor argument of every op, before anything is read.
//
// The dispatcher chose the kernel by one of the tensors, so it is enough that the others are beside it. A tensor whose
// storage was freed (as sharded training does between its uses) or made smaller has a shape, but no data behind it.
// The check takes three calls into libtorch a tensor, of under twenty instructions each.
#pragma once
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/checks.h"

namespace fused_ops {

// What a type of ours is called in libtorch: Stable<const Tensor&> is const torch::stable::Tensor&.
template <class T>
struct StableType {
  using type = T;
};
template <>
struct StableType<Tensor> {
  using type = torch::stable::Tensor;
};
template <class T>
struct StableType<std::optional<T>> {
  using type = std::optional<typename StableType<T>::type>;
};
template <class T>
struct StableType<const T&> {
  using type = const typename StableType<T>::type&;
};
template <class T>
using Stable = typename StableType<T>::type;

// The schemas that this library defines, for the names in messages.
inline std::vector<const char*>& schemas() {
  static std::vector<const char*> all;
  return all;
}

inline void define(torch::stable::detail::StableLibrary& m, const char* schema) {
  schemas().push_back(schema);
  m.def(schema);
}

// "input" of "op(Tensor input, ...) -> ...", by its place; the place itself for an op that is not defined here.
inline std::string argument_name(const char* op, size_t index) {
  const size_t length = std::strlen(op);
  for (const char* schema : schemas()) {
    if (std::strncmp(schema, op, length) != 0 || schema[length] != '(') continue;
    std::string_view rest = std::string_view(schema).substr(length + 1);
    for (size_t i = 0; i < index; ++i) rest.remove_prefix(rest.find(", ") + 2);
    rest = rest.substr(0, std::min(rest.find(", "), rest.find(") ->")));
    return std::string(rest.substr(rest.rfind(' ') + 1));
  }
  return std::to_string(index);
}

inline int64_t item_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
    case ScalarType::Short: return 2;
    default: return 1;  // or a dtype that no op takes
  }
}

// Takes an op's arguments one by one.
class ArgumentCheck {
 public:
  explicit ArgumentCheck(const char* op) : op_(op) {}

  template <class T>
  void next(const T&) {
    ++index_;
  }
  void next(const std::optional<Tensor>& t) {
    if (t)
      next(*t);
    else
      ++index_;
  }
  // The same for arguments that say their names, of an op whose schema is not defined here.
  template <class T>
  void next(const char* name, const T& t) {
    name_ = name;
    next(t);
  }
  void next(const Tensor& t) {
    const Device device = device_of(t);
    if (!first_) first_ = device;
    if (device.type != first_->type || device.index != first_->index) raise_device(device);
    int64_t bytes = 0, offset = 0;
    if (aoti_torch_get_storage_size(t.get(), &bytes) != TORCH_SUCCESS)
      raise(op_, ": ", name(), " must be of layout torch.strided");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
    const int64_t extent = t.extent();
    if (extent > 0 && (offset + extent) * item_bytes(t.scalar_type()) > bytes) raise_data(t, bytes);
    ++index_;
  }

 private:
  struct Device {
    int32_t type = 0, index = 0;
  };

  static Device device_of(const Tensor& t) {
    Device device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
    if (device.type != aoti_torch_device_type_cpu())
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
    return device;
  }
  static std::string name_of(const Device& device) {
    if (device.type == aoti_torch_device_type_cpu()) return "cpu";
    if (device.type == aoti_torch_device_type_meta()) return "meta";
    const bool cuda = device.type == aoti_torch_device_type_cuda();
    return (cuda ? "cuda" : "device type " + std::to_string(device.type)) + ':' + std::to_string(device.index);
  }
  [[noreturn]] __attribute__((noinline, cold)) void raise_device(const Device& device) const {
    raise("Expected all tensors to be on the same device, but found at least two devices, ", name_of(*first_), " and ",
          name_of(device), "! (when checking argument for argument ", name(), " in method fused_ops::", op_, ")");
  }
  [[noreturn]] __attribute__((noinline, cold)) void raise_data(const Tensor& t, int64_t bytes) const {
    raise(op_, ": ", name(),
          ": The tensor has a non-zero number of elements, but its data is not allocated yet; shape ", shape_of(t),
          " in a storage of ", bytes, " bytes");
  }

  std::string name() const { return name_ ? name_ : argument_name(op_, index_); }

  const char *op_, *name_ = nullptr;
  size_t index_ = 0;
  std::optional<Device> first_;
};

// Results, in their order, to where libtorch looks for them.
template <class T>
void give(StableIValue* stack, const T& result) {
  *stack = torch::stable::detail::from(static_cast<const Stable<T>&>(result));
}
template <class... T>
void give(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... each) { (give(stack++, each), ...); }, results);
}

// An op written with Tensor, as libtorch calls it.
template <auto op>
struct Border;
template <class Result, class... Args, Result (*op)(Args...)>
struct Border<op> {
  static inline const char* name = "";

  static void boxed(StableIValue* stack, uint64_t, uint64_t) { call(stack, std::index_sequence_for<Args...>{}); }

 private:
  template <size_t... kIndex>
  static void call(StableIValue* stack, std::index_sequence<kIndex...>) {
    std::tuple<std::decay_t<Args>...> args{torch::stable::detail::to<Stable<std::decay_t<Args>>>(stack[kIndex])...};
    ArgumentCheck check(name);
    (check.next(std::get<kIndex>(args)), ...);
    if constexpr (std::is_void_v<Result>)
      std::apply(op, args);
    else
      give(stack, std::apply(op, args));
  }
};

template <auto op>
void implement(torch::stable::detail::StableLibrary& m, const char* name) {
  Border<op>::name = name;
  m.impl(name, &Border<op>::boxed);
}

// The arguments of a call, as they lie on libtorch's stack. All must be taken, in the order of the schema, before
// anything raises: a tensor that is not taken is never given back.
class Arguments {
 public:
  Arguments(const char* op, StableIValue* stack) : check(op), next_(stack) {}

  Tensor tensor() { return take<torch::stable::Tensor>(); }
  std::optional<Tensor> maybe_tensor() { return take<std::optional<torch::stable::Tensor>>(); }
  bool flag() { return take<bool>(); }
  int64_t integer() { return take<int64_t>(); }
  double number() { return take<double>(); }

  ArgumentCheck check;

 private:
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  StableIValue* next_;
};

// An op whose arguments travel as one struct, which takes them from Arguments and checks its tensors itself; `Struct`
// may be one derived from the op's, of a schema that ends sooner.
template <class Op>
struct StructOf;
template <class Result, class Struct>
struct StructOf<Result (*)(const Struct&)> {
  using type = Struct;
};
template <auto op, class Struct>
struct StructBorder {
  static inline const char* name = "";

  static void boxed(StableIValue* stack, uint64_t, uint64_t) {
    Arguments arguments(name, stack);
    const Struct given(arguments);
    if constexpr (std::is_void_v<decltype(op(given))>)
      op(given);
    else
      give(stack, op(given));
  }
};

template <auto op, class Struct = typename StructOf<decltype(op)>::type>
void implement_struct(torch::stable::detail::StableLibrary& m, const char* name) {
  StructBorder<op, Struct>::name = name;
  m.impl(name, &StructBorder<op, Struct>::boxed);
}

}  // namespace fused_ops
