// What the checks of every op are made of.
#pragma once

#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "ops.h"
#include "words.h"

namespace fasttrace {

using torch::headeronly::ScalarType;

// Not STD_TORCH_CHECK, which puts the path of the source file into the message.
struct Require {
  const char* op;

  template <typename... Parts>
  void operator()(bool condition, const Parts&... parts) const {
    if (condition) return;
    throw std::runtime_error(words(op, ": ", parts...));
  }
};

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += words(d ? ", " : "", tensor.size(d));
  return text + "]";
}

// No gap and no overlap within a row: one run of memory, in whatever order of the dimensions.
inline bool rows_are_dense(const Tensor& tensor) {
  int64_t expected = 1, found = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) found += tensor.size(d) == 1;
  while (found < tensor.dim()) {
    int64_t d = 1;
    while (d < tensor.dim() && (tensor.size(d) == 1 || tensor.stride(d) != expected)) ++d;
    if (d == tensor.dim()) return false;
    expected *= tensor.size(d);
    ++found;
  }
  return true;
}

// A row is what lies past the dimensions before `first`.
inline bool rows_are_contiguous(const Tensor& tensor, int64_t first = 1) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d >= first; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

inline bool same_row_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 1; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

inline bool wide_float(const Require& require, const Tensor& tensor, ScalarType out_type,
                       const char* name) {
  const bool wide = tensor.scalar_type() == ScalarType::Double;
  require(tensor.scalar_type() == ScalarType::Float || (wide && out_type == ScalarType::Double),
          name, " must be float32 (float64 is for a float64 out)");
  return wide;
}

inline Dtype dtype_of(const Require& require, const Tensor& tensor, const char* name = "out") {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      break;
  }
  require(false, name, " must be float16, bfloat16, float32 or float64");
  return Dtype::kFloat32;
}

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace fasttrace
