// Declarations of every op. No torch header here: the .cu files compile without torch.
#pragma once

#include <cstdint>
#include <optional>

namespace torch::stable {
class Tensor;
}

namespace fasttrace {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class MaskKind { kNone, kBool, kFloat, kDouble };

// One call of patch_rows as plain numbers: out viewed as [L, N, C], source as [S, N, C].
// Strides count elements; a mask stride of 0 broadcasts.
struct PatchRowsArgs {
  void* out;
  const void* source;
  const void* index;     // [L] int32, or int64 if wide_index
  const void* strength;  // [L] float, or double if wide_strength
  const void* mask;      // [L, N, C] through its strides
  int64_t lanes, tokens, channels, source_rows;
  int64_t out_lane_stride, source_row_stride;
  int64_t mask_lane_stride, mask_token_stride, mask_channel_stride;
  Dtype dtype;
  MaskKind mask_kind;
  bool wide_index, wide_strength;
};

using torch::stable::Tensor;

Tensor patch_rows_cpu(const Tensor& out, const Tensor& source, const Tensor& index,
                      const Tensor& strength, const std::optional<Tensor>& mask);
void patch_rows_cpu_(Tensor out, const Tensor& source, const Tensor& index, const Tensor& strength,
                     const std::optional<Tensor>& mask);

#ifdef FASTTRACE_CUDA
Tensor patch_rows_cuda(const Tensor& out, const Tensor& source, const Tensor& index,
                       const Tensor& strength, const std::optional<Tensor>& mask);
void patch_rows_cuda_(Tensor out, const Tensor& source, const Tensor& index, const Tensor& strength,
                      const std::optional<Tensor>& mask);
#endif

// `stream` is a cudaStream_t. Returns nullptr, or the launch error in words.
const char* patch_rows_launch(const PatchRowsArgs& args, void* stream);

}  // namespace fasttrace
