// patch_rows on CUDA: the kernel and its launch. Compiles without torch.
// The semantics are those of kernels/fasttrace_kernels/reference.py.

#include "ops.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fasttrace {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocksPerLane = 1024;

// 16 bytes move in one instruction.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

template <typename T>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

__device__ int64_t row_of(const PatchRowsArgs& args, int64_t lane) {
  return args.wide_index ? static_cast<const int64_t*>(args.index)[lane]
                         : static_cast<const int32_t*>(args.index)[lane];
}

template <typename Wide>
__device__ Wide strength_of(const PatchRowsArgs& args, int64_t lane) {
  return args.wide_strength ? static_cast<Wide>(static_cast<const double*>(args.strength)[lane])
                            : static_cast<Wide>(static_cast<const float*>(args.strength)[lane]);
}

template <typename Wide>
__device__ Wide mask_of(const PatchRowsArgs& args, int64_t offset) {
  switch (args.mask_kind) {
    case MaskKind::kBool:
      return static_cast<Wide>(static_cast<const uint8_t*>(args.mask)[offset]);
    case MaskKind::kFloat:
      return static_cast<Wide>(static_cast<const float*>(args.mask)[offset]);
    case MaskKind::kDouble:
      return static_cast<Wide>(static_cast<const double*>(args.mask)[offset]);
    default:
      return Wide(1);
  }
}

template <typename Wide, typename T>
__device__ T patched(T old_value, T new_value, Wide strength) {
  if (strength == Wide(0)) return old_value;
  if (strength == Wide(1)) return new_value;
  const Wide start = static_cast<Wide>(old_value);
  return static_cast<T>(start + strength * (static_cast<Wide>(new_value) - start));
}

// One grid row a lane; its threads walk the row kWidth elements at a time.
template <typename T, int kWidth>
__global__ void patch_rows_kernel(PatchRowsArgs args) {
  using Wide = typename Compute<T>::Type;
  using Packed = Pack<T, kWidth>;
  const int64_t lane = blockIdx.y;
  const int64_t row = row_of(args, lane);
  const Wide strength = strength_of<Wide>(args, lane);
  if (row == -1 || strength == Wide(0)) return;

  // The host can't see the index without a sync, so a row out of range shows itself as NaN.
  const bool known = row >= 0 && row < args.source_rows;
  const T nan = static_cast<T>(__int_as_float(0x7fffffff));
  T* out = static_cast<T*>(args.out) + lane * args.out_lane_stride;
  const T* source = static_cast<const T*>(args.source) + (known ? row : 0) * args.source_row_stride;

  const int64_t size = args.tokens * args.channels;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * kWidth;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth; i < size;
       i += step) {
    const int64_t token = args.mask_kind == MaskKind::kNone ? 0 : i / args.channels;
    const int64_t channel = i - token * args.channels;
    const int64_t offset = lane * args.mask_lane_stride + token * args.mask_token_stride;
    Packed old_values = *reinterpret_cast<const Packed*>(out + i);
    const Packed new_values = *reinterpret_cast<const Packed*>(source + i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const Wide part =
          strength * mask_of<Wide>(args, offset + (channel + k) * args.mask_channel_stride);
      old_values.values[k] =
          patched(old_values.values[k], known ? new_values.values[k] : nan, part);
    }
    *reinterpret_cast<Packed*>(out + i) = old_values;
  }
}

bool divides(int64_t width, int64_t element_size, const PatchRowsArgs& args) {
  const auto address =
      reinterpret_cast<uintptr_t>(args.out) | reinterpret_cast<uintptr_t>(args.source);
  return address % (width * element_size) == 0 && args.channels % width == 0 &&
         args.out_lane_stride % width == 0 && args.source_row_stride % width == 0;
}

template <typename T>
void launch(const PatchRowsArgs& args, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const bool packed = divides(kWidth, sizeof(T), args);
  const int64_t per_block = static_cast<int64_t>(kThreads) * (packed ? kWidth : 1);
  int64_t blocks = (args.tokens * args.channels + per_block - 1) / per_block;
  if (blocks > kMaxBlocksPerLane) blocks = kMaxBlocksPerLane;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(args.lanes));
  if (packed) {
    patch_rows_kernel<T, kWidth><<<grid, kThreads, 0, stream>>>(args);
  } else {
    patch_rows_kernel<T, 1><<<grid, kThreads, 0, stream>>>(args);
  }
}

}  // namespace

const char* patch_rows_launch(const PatchRowsArgs& args, void* stream) {
  if (args.lanes == 0 || args.tokens * args.channels == 0) return nullptr;
  if (args.lanes > 65535) return "at most 65535 lanes fit one launch";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case Dtype::kFloat32:
      launch<float>(args, cuda_stream);
      break;
    case Dtype::kFloat64:
      launch<double>(args, cuda_stream);
      break;
    case Dtype::kFloat16:
      launch<__half>(args, cuda_stream);
      break;
    case Dtype::kBFloat16:
      launch<__nv_bfloat16>(args, cuda_stream);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fasttrace
