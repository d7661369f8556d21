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

// Tensors that live from one call to the next: a thread of guided_step holds all of them at once.
constexpr int kMostKept = 8;

// One call of guided_step_ as plain numbers: prediction and sample viewed as [2L or L, N], state as
// [kept, L, N], noise as [T, L, N]. Strides count elements; one of 0 broadcasts.
struct GuidedStepArgs {
  const void* prediction;
  void* state;
  void* sample;
  int64_t* counter;  // [2]: the call, and the ticket by which the last block knows itself
  // Of float, or double if wide_tables.
  const void* weights;       // [T, S]
  const void* input_scales;  // [T + 1]
  const void* guidance;      // [L] through its stride, or nullptr
  const void* noise;         // or nullptr
  int64_t lanes, row_size, calls;
  int latents, predictions;
  int64_t prediction_lane_stride, sample_lane_stride, state_slot_stride, state_lane_stride;
  int64_t guidance_lane_stride, noise_call_stride, noise_lane_stride;
  Dtype dtype, state_dtype;  // of prediction and sample; of state and noise
  bool wide_tables;
};

using torch::stable::Tensor;

Tensor patch_rows_cpu(const Tensor& out, const Tensor& source, const Tensor& index,
                      const Tensor& strength, const std::optional<Tensor>& mask);
void patch_rows_cpu_(Tensor out, const Tensor& source, const Tensor& index, const Tensor& strength,
                     const std::optional<Tensor>& mask);
void guided_step_cpu_(const Tensor& prediction, Tensor state, Tensor sample, Tensor counter,
                      const Tensor& weights, const Tensor& input_scales,
                      const std::optional<Tensor>& guidance, const std::optional<Tensor>& noise,
                      int64_t latents);

#ifdef FASTTRACE_CUDA
Tensor patch_rows_cuda(const Tensor& out, const Tensor& source, const Tensor& index,
                       const Tensor& strength, const std::optional<Tensor>& mask);
void patch_rows_cuda_(Tensor out, const Tensor& source, const Tensor& index, const Tensor& strength,
                      const std::optional<Tensor>& mask);
void guided_step_cuda_(const Tensor& prediction, Tensor state, Tensor sample, Tensor counter,
                       const Tensor& weights, const Tensor& input_scales,
                       const std::optional<Tensor>& guidance, const std::optional<Tensor>& noise,
                       int64_t latents);
#endif

// `stream` is a cudaStream_t. Returns nullptr, or the launch error in words.
const char* patch_rows_launch(const PatchRowsArgs& args, void* stream);
const char* guided_step_launch(const GuidedStepArgs& args, void* stream);

}  // namespace fasttrace
