// guided_step_: checks, the CPU kernel, and the way to the CUDA kernel in guided_step.cu.
// The semantics are those of kernels/fasttrace_kernels/reference.py.

#include "checks.h"
#include "ops.h"

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#ifdef FASTTRACE_CUDA
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fasttrace {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Span = std::pair<intptr_t, intptr_t>;

constexpr Require require{"guided_step_"};

// A chunk of work below this many elements costs less than handing it to a second thread.
constexpr int64_t kGrain = 16384;
// What is summed stays in the nearest cache while one slot after another passes by.
constexpr int64_t kTile = 512;

bool rows_fit(const Tensor& a, int64_t a_first, const Tensor& b, int64_t b_first) {
  if (a.dim() - a_first != b.dim() - b_first) return false;
  for (int64_t d = 0; a_first + d < a.dim(); ++d) {
    if (a.size(a_first + d) != b.size(b_first + d)) return false;
  }
  return true;
}

void check_tables(const Tensor& state, const Tensor& weights, const Tensor& input_scales,
                  const OptionalTensor& guidance, const OptionalTensor& noise) {
  const int64_t kept = state.size(0), lanes = state.size(1), slots = kept + 1 + noise.has_value();
  require(weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double,
          "weights must be float32 or float64");
  require(weights.dim() == 2 && weights.size(0) >= 1 && weights.size(1) == slots,
          "weights must be [T, ", slots, "] with T >= 1, one a slot: ", kept,
          " kept, the new prediction", noise ? " and noise" : "", "; got ", shape_of(weights));
  const int64_t calls = weights.size(0);
  require(input_scales.dim() == 1 && input_scales.size(0) == calls + 1, "input_scales must be [",
          calls + 1, "], one more than there are calls, got ", shape_of(input_scales));
  require(input_scales.scalar_type() == weights.scalar_type() &&
              (!guidance || guidance->scalar_type() == weights.scalar_type()),
          "weights, input_scales and guidance must have one dtype");
  require(
      !guidance || (guidance->dim() == 1 && (guidance->size(0) == 1 || guidance->size(0) == lanes)),
      "guidance must be [", lanes, "], one entry a lane, or [1], got ",
      guidance ? shape_of(*guidance) : "");
  if (!noise) return;
  require(noise->dim() == state.dim() && noise->size(0) == calls &&
              (noise->size(1) == 1 || noise->size(1) == lanes) && rows_fit(*noise, 2, state, 2),
          "noise must be [", calls, ", ", lanes, " or 1, ...] with the rows of state ",
          shape_of(state), ", got ", shape_of(*noise));
  require(noise->scalar_type() == state.scalar_type(), "noise must have the dtype of state");
}

void check(const Tensor& prediction, const Tensor& state, const Tensor& sample,
           const Tensor& counter, const Tensor& weights, const Tensor& input_scales,
           const OptionalTensor& guidance, const OptionalTensor& noise, int64_t latents) {
  const Dtype dtype = dtype_of(require, prediction, "prediction");
  require(prediction.dim() >= 2, "prediction must be [L, ...] with at least two dimensions, got ",
          shape_of(prediction));
  const bool wide_state = element_size(dtype) == 2 && state.scalar_type() == ScalarType::Float;
  require(state.scalar_type() == prediction.scalar_type() || wide_state,
          "state must have prediction's dtype, or be float32 beside a half-precision prediction");
  require(state.dim() == prediction.dim() + 1 && state.size(0) >= 1 && state.size(0) <= kMostKept &&
              rows_fit(state, 2, prediction, 1),
          "state must be [kept, L, ...] with kept 1 to ", kMostKept, " and the rows of prediction ",
          shape_of(prediction), ", got ", shape_of(state));
  const int64_t kept = state.size(0), lanes = state.size(1), branches = guidance ? 2 : 1;
  require(prediction.size(0) == branches * lanes, "prediction must have ", branches * lanes,
          " rows, ", branches, " for each of the ", lanes, " lanes of state (",
          guidance ? "a" : "no", " guidance is given), got ", prediction.size(0));
  require(sample.scalar_type() == prediction.scalar_type() && sample.dim() == prediction.dim() &&
              rows_fit(sample, 0, prediction, 0),
          "sample must have the shape and dtype of prediction, ", shape_of(prediction), ", got ",
          shape_of(sample));
  require(counter.dim() == 1 && counter.size(0) == 2 && counter.stride(0) == 1 &&
              counter.scalar_type() == ScalarType::Long,
          "counter must be [2] int64 without gaps, the number of the call and a ticket, got ",
          shape_of(counter));
  require(latents >= 1 && latents <= kept, "latents must be 1 to ", kept, ", of the ", kept,
          " tensors that state keeps, got ", latents);
  check_tables(state, weights, input_scales, guidance, noise);
  for (const Tensor* other : {&state, &sample, &counter, &weights, &input_scales,
                              guidance ? &*guidance : &state, noise ? &*noise : &state}) {
    require(other->device() == prediction.device(),
            "prediction and every other tensor must be on one device");
  }
}

// A row's elements, then the rows of the nearer dimension, and so on outwards.
bool rows_are_apart(const Tensor& tensor, int64_t first) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  int64_t span = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (d < first) {
      steps.emplace_back(tensor.stride(d), tensor.size(d));
    } else {
      span *= tensor.size(d);
    }
  }
  std::sort(steps.begin(), steps.end());
  for (const auto& [stride, size] : steps) {
    if (size > 1 && stride < span) return false;
    span += (size - 1) * stride;
  }
  return true;
}

// In bytes: from the first element to past the last.
Span span_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {0, 0};
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto start = reinterpret_cast<intptr_t>(tensor.data_ptr());
  return {start, start + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

// What is written in place: rows without gaps, and memory that no other argument lies in.
void check_memory(const Tensor& state, const Tensor& sample,
                  const std::vector<const Tensor*>& others) {
  require(rows_are_contiguous(state, 2) && rows_are_contiguous(sample, 1),
          "the rows of state and sample must be contiguous");
  require(rows_are_apart(state, 2) && rows_are_apart(sample, 1),
          "the rows of state and sample must not overlap in memory");
  const Span written[] = {span_of(state), span_of(sample)};
  const auto shared = [](const Span& a, const Span& b) {
    return a.first < b.second && b.first < a.second;
  };
  bool apart = !shared(written[0], written[1]);
  for (const Tensor* other : others) {
    const Span read = span_of(*other);
    apart = apart && !shared(written[0], read) && !shared(written[1], read);
  }
  require(apart, "state and sample must not share memory with each other or another tensor");
}

// A stride, 0 where one entry is for all lanes.
int64_t step_of(const Tensor& tensor, int64_t d) {
  return tensor.size(d) == 1 ? 0 : tensor.stride(d);
}

// Checks, brings what is only read into the layout `run` expects, and calls it.
template <typename Run>
void with_arguments(const Tensor& prediction, const Tensor& state, const Tensor& sample,
                    const Tensor& counter, const Tensor& weights, const Tensor& input_scales,
                    const OptionalTensor& guidance, const OptionalTensor& noise, int64_t latents,
                    const Run& run) {
  check(prediction, state, sample, counter, weights, input_scales, guidance, noise, latents);
  std::vector<const Tensor*> others = {&prediction, &counter, &weights, &input_scales};
  if (guidance) others.push_back(&*guidance);
  if (noise) others.push_back(&*noise);
  check_memory(state, sample, others);
  const auto plain = [](const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  };
  const Tensor rows = rows_are_contiguous(prediction) ? prediction : plain(prediction);
  const Tensor row_weights = plain(weights), scales = plain(input_scales);
  GuidedStepArgs args{};
  args.prediction = rows.data_ptr();
  args.state = state.data_ptr();
  args.sample = sample.data_ptr();
  args.counter = static_cast<int64_t*>(counter.data_ptr());
  args.weights = row_weights.data_ptr();
  args.input_scales = scales.data_ptr();
  args.lanes = state.size(1);
  args.row_size = args.lanes == 0 ? 0 : state.numel() / (state.size(0) * args.lanes);
  args.calls = weights.size(0);
  args.latents = static_cast<int>(latents);
  args.predictions = static_cast<int>(state.size(0) + 1 - latents);
  args.prediction_lane_stride = rows.stride(0);
  args.sample_lane_stride = sample.stride(0);
  args.state_slot_stride = state.stride(0);
  args.state_lane_stride = state.stride(1);
  args.dtype = dtype_of(require, prediction, "prediction");
  args.state_dtype = dtype_of(require, state, "state");
  args.wide_tables = weights.scalar_type() == ScalarType::Double;
  if (guidance) {
    args.guidance = guidance->data_ptr();
    args.guidance_lane_stride = step_of(*guidance, 0);
  }
  OptionalTensor noise_rows;
  if (noise) {
    noise_rows = rows_are_contiguous(*noise, 2) ? *noise : plain(*noise);
    args.noise = noise_rows->data_ptr();
    args.noise_call_stride = noise_rows->stride(0);
    args.noise_lane_stride = step_of(*noise_rows, 1);
  }
  run(args);
}

template <typename To>
To table_at(const GuidedStepArgs& args, const void* table, int64_t at) {
  return args.wide_tables ? static_cast<To>(static_cast<const double*>(table)[at])
                          : static_cast<To>(static_cast<const float*>(table)[at]);
}

// T of prediction and sample, State of what is kept, Scale of the product that makes the sample.
template <typename T, typename State, typename Scale>
class CpuStep {
  using Wide = std::conditional_t<std::is_same_v<State, double>, double, float>;

 public:
  CpuStep(const GuidedStepArgs& args, int64_t call)
      : args_(args), call_(call), scale_(table_at<Scale>(args, args.input_scales, call + 1)) {
    const int64_t slots = args.latents + args.predictions + (args.noise != nullptr);
    for (int64_t slot = 0; slot < slots; ++slot) {
      weights_.push_back(table_at<Wide>(args, args.weights, call * slots + slot));
    }
  }

  void run() const {
    torch::stable::parallel_for(
        0, args_.lanes * args_.row_size, kGrain, [this](int64_t begin, int64_t end) {
          while (begin < end) {
            const int64_t lane = begin / args_.row_size, start = begin - lane * args_.row_size;
            const int64_t size = std::min({end - begin, args_.row_size - start, kTile});
            tile(lane, start, size);
            begin += size;
          }
        });
  }

 private:
  // Elements [start, start + size) of a lane; one loop a slot, so that each is vectorised.
  void tile(int64_t lane, int64_t start, int64_t size) const {
    Wide newest[kTile], total[kTile];
    State carried[kTile];  // what moves into the next slot
    guide(lane, start, size, newest);
    State* const first = static_cast<State*>(args_.state) + lane * args_.state_lane_stride + start;
    State* slot = first;
    const Wide of_latent = weights_[0], of_newest = weights_[args_.latents];
    for (int64_t i = 0; i < size; ++i) {
      carried[i] = slot[i];
      total[i] = of_latent * static_cast<Wide>(slot[i]);
    }
    const auto pass = [&](Wide weight) {
      slot += args_.state_slot_stride;
      for (int64_t i = 0; i < size; ++i) {
        const State here = slot[i];
        total[i] += weight * static_cast<Wide>(here);
        slot[i] = carried[i];
        carried[i] = here;
      }
    };
    for (int k = 1; k < args_.latents; ++k) pass(weights_[k]);
    for (int64_t i = 0; i < size; ++i) {
      total[i] += of_newest * newest[i];
      carried[i] = static_cast<State>(newest[i]);
    }
    for (int k = 1; k < args_.predictions; ++k) pass(weights_[args_.latents + k]);
    if (args_.noise) {
      const State* noise = static_cast<const State*>(args_.noise) +
                           call_ * args_.noise_call_stride + lane * args_.noise_lane_stride + start;
      const Wide of_noise = weights_.back();
      for (int64_t i = 0; i < size; ++i) total[i] += of_noise * static_cast<Wide>(noise[i]);
    }
    T* sample = static_cast<T*>(args_.sample) + lane * args_.sample_lane_stride + start;
    const Scale scale = scale_;
    for (int64_t i = 0; i < size; ++i) {
      first[i] = static_cast<State>(total[i]);
      sample[i] = static_cast<T>(static_cast<Scale>(first[i]) * scale);
    }
    if (args_.guidance) std::copy_n(sample, size, sample + args_.lanes * args_.sample_lane_stride);
  }

  void guide(int64_t lane, int64_t start, int64_t size, Wide* newest) const {
    const T* uncond =
        static_cast<const T*>(args_.prediction) + lane * args_.prediction_lane_stride + start;
    for (int64_t i = 0; i < size; ++i) newest[i] = static_cast<Wide>(uncond[i]);
    if (!args_.guidance) return;
    const T* cond = uncond + args_.lanes * args_.prediction_lane_stride;
    const Wide amount = table_at<Wide>(args_, args_.guidance, lane * args_.guidance_lane_stride);
    for (int64_t i = 0; i < size; ++i) {
      newest[i] += amount * (static_cast<Wide>(cond[i]) - newest[i]);
    }
  }

  const GuidedStepArgs& args_;
  int64_t call_;
  Scale scale_;
  std::vector<Wide> weights_;
};

template <typename Half>
void run_half(const GuidedStepArgs& args, int64_t call) {
  if (args.state_dtype == Dtype::kFloat32) {
    CpuStep<Half, float, float>(args, call).run();
  } else {
    CpuStep<Half, Half, float>(args, call).run();
  }
}

void run_cpu(const GuidedStepArgs& args) {
  const int64_t call = args.counter[0];
  require(call >= 0 && call < args.calls, "counter says that call ", call,
          " was made, but weights has ", args.calls, " calls; expected 0 to ", args.calls - 1);
  switch (args.dtype) {
    case Dtype::kFloat32:
      if (args.wide_tables) {
        CpuStep<float, float, double>(args, call).run();
      } else {
        CpuStep<float, float, float>(args, call).run();
      }
      break;
    case Dtype::kFloat64:
      CpuStep<double, double, double>(args, call).run();
      break;
    case Dtype::kFloat16:
      run_half<torch::headeronly::Half>(args, call);
      break;
    case Dtype::kBFloat16:
      run_half<torch::headeronly::BFloat16>(args, call);
      break;
  }
  args.counter[0] = call + 1;
}

}  // namespace

void guided_step_cpu_(const Tensor& prediction, Tensor state, Tensor sample, Tensor counter,
                      const Tensor& weights, const Tensor& input_scales,
                      const OptionalTensor& guidance, const OptionalTensor& noise,
                      int64_t latents) {
  with_arguments(prediction, state, sample, counter, weights, input_scales, guidance, noise,
                 latents, run_cpu);
}

#ifdef FASTTRACE_CUDA
void guided_step_cuda_(const Tensor& prediction, Tensor state, Tensor sample, Tensor counter,
                       const Tensor& weights, const Tensor& input_scales,
                       const OptionalTensor& guidance, const OptionalTensor& noise,
                       int64_t latents) {
  const auto device = state.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
          "there is no CUDA stream for device ", device);
  with_arguments(prediction, state, sample, counter, weights, input_scales, guidance, noise,
                 latents, [stream](const GuidedStepArgs& args) {
                   const char* failure = guided_step_launch(args, stream);
                   require(failure == nullptr, "the CUDA launch failed: ", failure ? failure : "");
                 });
}
#endif

}  // namespace fasttrace
