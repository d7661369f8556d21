// guided_step_ on CUDA: the kernel and its launch. Compiles without torch.
// The semantics are those of kernels/fasttrace_kernels/reference.py.

#include "ops.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fasttrace {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocksPerLane = 1024;

// Up to 16 bytes move in one instruction.
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

// a + b * c, rounded after each: never fused, so that the bits are those of the CPU.
__device__ float plus_product(float a, float b, float c) { return __fadd_rn(a, __fmul_rn(b, c)); }
__device__ double plus_product(double a, double b, double c) {
  return __dadd_rn(a, __dmul_rn(b, c));
}

template <typename To>
__device__ To table_at(const GuidedStepArgs& args, const void* table, int64_t at) {
  return args.wide_tables ? static_cast<To>(static_cast<const double*>(table)[at])
                          : static_cast<To>(static_cast<const float*>(table)[at]);
}

// kWidth elements of one lane, from every slot to every slot.
template <typename T, typename State, typename Scale, int kWidth>
__device__ void step(const GuidedStepArgs& args, int64_t call, bool known, int64_t lane,
                     int64_t at) {
  using Wide = typename Compute<State>::Type;
  using Given = Pack<T, kWidth>;
  using Kept = Pack<State, kWidth>;
  const int kept = args.latents + args.predictions - 1;
  const int64_t slots = kept + 1 + (args.noise != nullptr);
  const int64_t row = call * slots;

  // Everything is read before anything is written, so that all loads are on their way at once.
  const T* prediction = static_cast<const T*>(args.prediction) + at;
  const Given uncond =
      *reinterpret_cast<const Given*>(prediction + lane * args.prediction_lane_stride);
  Given cond = uncond;
  Wide amount = 0;
  if (args.guidance) {
    const int64_t cond_lane = lane + args.lanes;
    cond = *reinterpret_cast<const Given*>(prediction + cond_lane * args.prediction_lane_stride);
    amount = table_at<Wide>(args, args.guidance, lane * args.guidance_lane_stride);
  }
  State* state = static_cast<State*>(args.state) + lane * args.state_lane_stride + at;
  Kept old[kMostKept];
#pragma unroll
  for (int slot = 0; slot < kMostKept; ++slot) {
    if (slot < kept) {
      old[slot] = *reinterpret_cast<const Kept*>(state + slot * args.state_slot_stride);
    }
  }
  Kept noise = {};
  if (args.noise) {
    noise = *reinterpret_cast<const Kept*>(static_cast<const State*>(args.noise) +
                                           call * args.noise_call_stride +
                                           lane * args.noise_lane_stride + at);
  }

  Wide newest[kWidth], total[kWidth];
  const Wide of_latent = table_at<Wide>(args, args.weights, row);
  const Wide of_newest = table_at<Wide>(args, args.weights, row + args.latents);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    newest[k] = static_cast<Wide>(uncond.values[k]);
    if (args.guidance) {
      newest[k] = plus_product(newest[k], amount, static_cast<Wide>(cond.values[k]) - newest[k]);
    }
    total[k] = of_latent * static_cast<Wide>(old[0].values[k]);
  }
#pragma unroll
  for (int slot = 1; slot <= kMostKept; ++slot) {
    if (slot == args.latents) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) total[k] = plus_product(total[k], of_newest, newest[k]);
    }
    if (slot < kept && slot < kMostKept) {
      const Wide weight = table_at<Wide>(args, args.weights, row + slot + (slot >= args.latents));
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const Wide value = static_cast<Wide>(old[slot % kMostKept].values[k]);
        total[k] = plus_product(total[k], weight, value);
      }
    }
  }
  if (args.noise) {
    const Wide weight = table_at<Wide>(args, args.weights, row + slots - 1);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      total[k] = plus_product(total[k], weight, static_cast<Wide>(noise.values[k]));
    }
  }

  Kept latent, guided;
  Given scaled;
  const Scale scale = table_at<Scale>(args, args.input_scales, call + 1);
  const Wide nan = static_cast<Wide>(__int_as_float(0x7fffffff));
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    latent.values[k] = static_cast<State>(known ? total[k] : nan);
    guided.values[k] = static_cast<State>(newest[k]);
    scaled.values[k] = static_cast<T>(static_cast<Scale>(latent.values[k]) * scale);
  }
  *reinterpret_cast<Kept*>(state) = latent;
#pragma unroll
  for (int slot = 1; slot < kMostKept; ++slot) {
    if (slot < kept) {
      *reinterpret_cast<Kept*>(state + slot * args.state_slot_stride) =
          slot == args.latents ? guided : old[slot - 1];
    }
  }
  T* sample = static_cast<T*>(args.sample) + at;
  *reinterpret_cast<Given*>(sample + lane * args.sample_lane_stride) = scaled;
  if (args.guidance) {
    *reinterpret_cast<Given*>(sample + (lane + args.lanes) * args.sample_lane_stride) = scaled;
  }
}

// One grid row a lane; its threads walk the row kWidth elements at a time. Two blocks fit a
// multiprocessor, without spills.
template <typename T, typename State, typename Scale, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) guided_step_kernel(GuidedStepArgs args) {
  const int64_t call = args.counter[0];
  // The host can't see the call without a sync, so one out of range shows itself as NaN.
  const bool known = call >= 0 && call < args.calls;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kWidth;
  for (int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
       at < args.row_size; at += stride) {
    step<T, State, Scale, kWidth>(args, known ? call : 0, known, blockIdx.y, at);
  }

  // Who draws the last ticket knows that every block has read the counter, and moves it.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    auto* ticket = reinterpret_cast<unsigned long long*>(args.counter + 1);
    const unsigned long long blocks = static_cast<unsigned long long>(gridDim.x) * gridDim.y;
    if (atomicAdd(ticket, 1ULL) == blocks - 1) {
      args.counter[0] = call + 1;
      args.counter[1] = 0;
    }
  }
}

template <typename T, typename State>
bool divides(int64_t width, const GuidedStepArgs& args) {
  const auto given =
      reinterpret_cast<uintptr_t>(args.prediction) | reinterpret_cast<uintptr_t>(args.sample);
  const auto kept =
      reinterpret_cast<uintptr_t>(args.state) | reinterpret_cast<uintptr_t>(args.noise);
  const int64_t sizes = args.row_size | args.prediction_lane_stride | args.sample_lane_stride |
                        args.state_slot_stride | args.state_lane_stride | args.noise_call_stride |
                        args.noise_lane_stride;
  return given % (width * sizeof(T)) == 0 && kept % (width * sizeof(State)) == 0 &&
         sizes % width == 0;
}

template <typename T, typename State, typename Scale>
void launch(const GuidedStepArgs& args, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(State);
  const bool packed = divides<T, State>(kWidth, args);
  const int64_t per_block = static_cast<int64_t>(kThreads) * (packed ? kWidth : 1);
  int64_t blocks = (args.row_size + per_block - 1) / per_block;
  if (blocks > kMaxBlocksPerLane) blocks = kMaxBlocksPerLane;
  // Also of nothing, since no lanes make a call too.
  const dim3 grid(blocks < 1 ? 1 : static_cast<unsigned>(blocks),
                  args.lanes < 1 ? 1 : static_cast<unsigned>(args.lanes));
  if (packed) {
    guided_step_kernel<T, State, Scale, kWidth><<<grid, kThreads, 0, stream>>>(args);
  } else {
    guided_step_kernel<T, State, Scale, 1><<<grid, kThreads, 0, stream>>>(args);
  }
}

template <typename Half>
void launch_half(const GuidedStepArgs& args, cudaStream_t stream) {
  if (args.state_dtype == Dtype::kFloat32) {
    launch<Half, float, float>(args, stream);
  } else {
    launch<Half, Half, float>(args, stream);
  }
}

}  // namespace

const char* guided_step_launch(const GuidedStepArgs& args, void* stream) {
  if (args.lanes > 65535) return "at most 65535 lanes fit one launch";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  switch (args.dtype) {
    case Dtype::kFloat32:
      if (args.wide_tables) {
        launch<float, float, double>(args, cuda_stream);
      } else {
        launch<float, float, float>(args, cuda_stream);
      }
      break;
    case Dtype::kFloat64:
      launch<double, double, double>(args, cuda_stream);
      break;
    case Dtype::kFloat16:
      launch_half<__half>(args, cuda_stream);
      break;
    case Dtype::kBFloat16:
      launch_half<__nv_bfloat16>(args, cuda_stream);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fasttrace
