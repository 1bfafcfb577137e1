// Operators as torch's dispatcher calls them. Its header's own conversion of a string argument (torch 2.13,
// stableivalue_conversions.h) loses 48 bytes at every call; here handles of strings are taken over and deleted.
#pragma once
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace seqkern {
namespace boxed {
struct StringArgument {
  StringHandle handle;
};
template <class T> using Argument = std::conditional_t<std::is_same_v<T, std::string>, StringArgument, T>;

template <class T> T&& taken(T& value) { return std::move(value); }
inline std::string taken(StringArgument& s) {
  struct Deleted {
    StringHandle handle;
    ~Deleted() { torch_delete_string(handle); }
  } owner{s.handle};
  size_t length = 0;
  const char* text = nullptr;
  if (torch_string_length(s.handle, &length) || torch_string_c_str(s.handle, &text))
    throw std::runtime_error("seqkern: a string argument could not be read");
  return std::string(text, length);
}

template <auto F> struct Operator;
template <class R, class... A, R (*F)(A...)> struct Operator<F> {
  static R call(Argument<A>... arguments) { return F(taken(arguments)...); }
};
}  // namespace boxed
}  // namespace seqkern

#define SK_BOX(function) TORCH_BOX(&seqkern::boxed::Operator<function>::call)
