// patch_rows: checks, the CPU kernel, and the way to the CUDA kernel in patch_rows.cu.
// The semantics are those of kernels/fasttrace_kernels/reference.py.

#include "checks.h"
#include "ops.h"

#include <algorithm>
#include <cstring>
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

constexpr Require require{"patch_rows"};

// A chunk of work below this many elements costs less than handing it to a second thread.
constexpr int64_t kGrain = 32768;

void check(const Tensor& out, const Tensor& source, const Tensor& index, const Tensor& strength,
           const OptionalTensor& mask) {
  dtype_of(require, out);
  require(out.dim() >= 2, "out must be [L, ...] with at least two dimensions, got ", shape_of(out));
  bool fits = source.dim() == out.dim() && source.size(0) > 0;
  for (int64_t d = 1; fits && d < out.dim(); ++d) fits = source.size(d) == out.size(d);
  require(fits, "source must be [S, ...] with S >= 1 and the rows of out ", shape_of(out), ", got ",
          shape_of(source));
  require(source.scalar_type() == out.scalar_type(), "source and out must have one dtype");
  for (const Tensor* other : {&source, &index, &strength, mask ? &*mask : &source}) {
    require(other->device() == out.device(), "out and every other tensor must be on one device");
  }
  for (const auto& [name, table] : {std::pair("index", &index), std::pair("strength", &strength)}) {
    require(table->dim() == 1 && table->size(0) == out.size(0), name, " must be [", out.size(0),
            "], one entry a lane, got ", shape_of(*table));
  }
  require(index.scalar_type() == ScalarType::Int || index.scalar_type() == ScalarType::Long,
          "index must be int32 or int64");
  wide_float(require, strength, out.scalar_type(), "strength");
}

void read_mask(PatchRowsArgs& args, const Tensor& out, const Tensor& mask) {
  bool fits = mask.dim() >= 1 && mask.dim() <= out.dim();
  bool rest_full = mask.dim() == out.dim(), rest_one = true;
  for (int64_t d = 0; fits && d < mask.dim(); ++d) {
    fits = mask.size(d) == out.size(d) || mask.size(d) == 1;
    if (d >= 2) {
      rest_full = rest_full && mask.size(d) == out.size(d);
      rest_one = rest_one && mask.size(d) == 1;
    }
  }
  require(fits && (rest_full || rest_one), "mask must broadcast from the left against out ",
          shape_of(out), " and be all full or all 1 past dimension 1, got ", shape_of(mask));
  const bool is_bool = mask.scalar_type() == ScalarType::Bool;
  const bool wide =
      !is_bool && wide_float(require, mask, out.scalar_type(), "a mask that is not bool");
  args.mask_kind = is_bool ? MaskKind::kBool : wide ? MaskKind::kDouble : MaskKind::kFloat;
  args.mask = mask.data_ptr();
  const auto stride = [&](int64_t d) {
    return d < mask.dim() && mask.size(d) != 1 ? mask.stride(d) : 0;
  };
  args.mask_lane_stride = stride(0);
  if (out.dim() == 2) {
    args.mask_channel_stride = stride(1);
  } else {
    args.mask_token_stride = stride(1);
    args.mask_channel_stride = rest_one ? 0 : 1;
  }
}

// Every tensor here has dense rows in the order of out's; the mask is contiguous.
PatchRowsArgs arguments(const Tensor& out, const Tensor& source, const Tensor& index,
                        const Tensor& strength, const OptionalTensor& mask) {
  PatchRowsArgs args{};
  args.out = out.data_ptr();
  args.source = source.data_ptr();
  args.index = index.data_ptr();
  args.strength = strength.data_ptr();
  args.lanes = out.size(0);
  args.tokens = out.dim() == 2 ? 1 : out.size(1);
  args.channels = 1;
  for (int64_t d = out.dim() == 2 ? 1 : 2; d < out.dim(); ++d) args.channels *= out.size(d);
  args.source_rows = source.size(0);
  args.out_lane_stride = out.stride(0);
  args.source_row_stride = source.stride(0);
  args.dtype = dtype_of(require, out);
  args.wide_index = index.scalar_type() == ScalarType::Long;
  args.wide_strength = strength.scalar_type() == ScalarType::Double;
  if (mask) read_mask(args, out, *mask);
  return args;
}

// Brings every tensor into the layout `run` expects, and calls it.
template <typename Run>
void with_arguments(Tensor& out, const Tensor& source, const Tensor& index, const Tensor& strength,
                    const OptionalTensor& mask, const Run& run) {
  const int64_t row_size = out.size(0) == 0 ? 0 : out.numel() / out.size(0);
  const bool any_order = !mask && rows_are_dense(out) && same_row_strides(out, source);
  if (!any_order && !rows_are_contiguous(out)) {
    Tensor packed = torch::stable::contiguous(out);
    with_arguments(packed, source, index, strength, mask, run);
    torch::stable::copy_(out, packed);
    return;
  }
  require(out.size(0) <= 1 || out.stride(0) >= row_size, "the rows of out overlap in memory");
  const auto plain = [](const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  };
  const Tensor rows = any_order || rows_are_contiguous(source) ? source : plain(source);
  const Tensor lanes = plain(index), strengths = plain(strength);
  run(arguments(out, rows, lanes, strengths,
                mask ? OptionalTensor(plain(*mask)) : OptionalTensor()));
}

struct PatchedLane {
  int64_t lane, row;
  double strength;
};

std::vector<PatchedLane> patched_lanes(const Tensor& source, const Tensor& index,
                                       const Tensor& strength) {
  const int64_t rows = source.size(0);
  const bool wide_index = index.scalar_type() == ScalarType::Long;
  const bool wide_strength = strength.scalar_type() == ScalarType::Double;
  std::vector<PatchedLane> patched;
  for (int64_t lane = 0; lane < index.size(0); ++lane) {
    const int64_t at = lane * index.stride(0), strength_at = lane * strength.stride(0);
    const int64_t row = wide_index ? static_cast<const int64_t*>(index.data_ptr())[at]
                                   : static_cast<const int32_t*>(index.data_ptr())[at];
    require(row >= -1 && row < rows, "index[", lane, "] is ", row, ", but source has ", rows,
            " rows; expected -1 (not patched) to ", rows - 1);
    const double value = wide_strength
                             ? static_cast<const double*>(strength.data_ptr())[strength_at]
                             : static_cast<const float*>(strength.data_ptr())[strength_at];
    if (row >= 0 && value != 0) patched.push_back({lane, row, value});
  }
  return patched;
}

// The bytes between the first and the last element of one row.
std::pair<intptr_t, intptr_t> row_span(const Tensor& tensor, int64_t row, int64_t element_size) {
  int64_t last = 0;
  for (int64_t d = 1; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto start =
      reinterpret_cast<intptr_t>(tensor.data_ptr()) + row * tensor.stride(0) * element_size;
  return {start, start + (last + 1) * element_size};
}

// A row that is both read and rewritten would make the result depend on the order of the lanes.
void check_aliasing(const Tensor& out, const Tensor& source,
                    const std::vector<PatchedLane>& patched, int64_t element_size) {
  if (patched.empty() || out.numel() == 0) return;
  const auto out_start = row_span(out, 0, element_size).first;
  const auto out_stop = row_span(out, out.size(0) - 1, element_size).second;
  for (const auto& reader : patched) {
    const auto read = row_span(source, reader.row, element_size);
    if (read.second <= out_start || read.first >= out_stop) continue;
    for (const auto& writer : patched) {
      const auto written = row_span(out, writer.lane, element_size);
      const bool itself = writer.lane == reader.lane && written == read;
      require(itself || read.second <= written.first || written.second <= read.first, "lane ",
              reader.lane, " reads row ", reader.row, " of source, which is lane ", writer.lane,
              " of out and is patched in the same call");
    }
  }
}

template <typename Wide, typename T>
T lerp(T old_value, T new_value, Wide strength) {
  const Wide start = static_cast<Wide>(old_value);
  return static_cast<T>(start + strength * (static_cast<Wide>(new_value) - start));
}

template <typename Wide, typename T>
void patch_one(T& out, T source, Wide strength) {
  if (strength != 0) out = strength == 1 ? source : lerp(out, source, strength);
}

template <typename Wide, typename T>
void patch_run(T* out, const T* source, Wide strength, int64_t size) {
  if (strength == 0) return;
  if (strength == 1) {
    std::memmove(out, source, size * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < size; ++i) out[i] = lerp(out[i], source[i], strength);
}

template <typename Wide>
Wide mask_at(const PatchRowsArgs& args, int64_t offset) {
  if (args.mask_kind == MaskKind::kBool) return static_cast<const uint8_t*>(args.mask)[offset];
  if (args.mask_kind == MaskKind::kFloat) return static_cast<const float*>(args.mask)[offset];
  return static_cast<Wide>(static_cast<const double*>(args.mask)[offset]);
}

// Elements [begin, end) of one row, counted over tokens x channels.
template <typename Wide, typename T>
void patch_part(const PatchRowsArgs& args, const PatchedLane& patched, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(args.out) + patched.lane * args.out_lane_stride;
  const T* source = static_cast<const T*>(args.source) + patched.row * args.source_row_stride;
  const Wide strength = static_cast<Wide>(patched.strength);
  if (args.mask_kind == MaskKind::kNone) {
    patch_run(out + begin, source + begin, strength, end - begin);
    return;
  }
  while (begin < end) {
    const int64_t token = begin / args.channels;
    const int64_t stop = std::min(end, (token + 1) * args.channels);
    const int64_t offset = patched.lane * args.mask_lane_stride + token * args.mask_token_stride;
    if (args.mask_channel_stride == 0) {
      patch_run(out + begin, source + begin, strength * mask_at<Wide>(args, offset), stop - begin);
    } else {
      for (int64_t i = begin; i < stop; ++i) {
        const int64_t channel = (i - token * args.channels) * args.mask_channel_stride;
        patch_one(out[i], source[i], strength * mask_at<Wide>(args, offset + channel));
      }
    }
    begin = stop;
  }
}

template <typename Wide, typename T>
void run_cpu(const PatchRowsArgs& args, const std::vector<PatchedLane>& patched) {
  const int64_t row_size = args.tokens * args.channels;
  const int64_t total = static_cast<int64_t>(patched.size()) * row_size;
  if (total == 0) return;
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t which = begin / row_size, start = which * row_size;
      const int64_t stop = std::min(end, start + row_size);
      patch_part<Wide, T>(args, patched[which], begin - start, stop - start);
      begin = stop;
    }
  });
}

}  // namespace

void patch_rows_cpu_(Tensor out, const Tensor& source, const Tensor& index, const Tensor& strength,
                     const OptionalTensor& mask) {
  check(out, source, index, strength, mask);
  const auto patched = patched_lanes(source, index, strength);
  check_aliasing(out, source, patched, element_size(dtype_of(require, out)));
  with_arguments(out, source, index, strength, mask, [&patched](const PatchRowsArgs& args) {
    switch (args.dtype) {
      case Dtype::kFloat32:
        return run_cpu<float, float>(args, patched);
      case Dtype::kFloat64:
        return run_cpu<double, double>(args, patched);
      case Dtype::kFloat16:
        return run_cpu<float, torch::headeronly::Half>(args, patched);
      case Dtype::kBFloat16:
        return run_cpu<float, torch::headeronly::BFloat16>(args, patched);
    }
  });
}

Tensor patch_rows_cpu(const Tensor& out, const Tensor& source, const Tensor& index,
                      const Tensor& strength, const OptionalTensor& mask) {
  Tensor result = torch::stable::clone(out);
  patch_rows_cpu_(result, source, index, strength, mask);
  return result;
}

#ifdef FASTTRACE_CUDA
void patch_rows_cuda_(Tensor out, const Tensor& source, const Tensor& index, const Tensor& strength,
                      const OptionalTensor& mask) {
  const auto device = out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
          "there is no CUDA stream for device ", device);
  check(out, source, index, strength, mask);
  with_arguments(out, source, index, strength, mask, [stream](const PatchRowsArgs& args) {
    const char* failure = patch_rows_launch(args, stream);
    require(failure == nullptr, "the CUDA launch failed: ", failure ? failure : "");
  });
}

Tensor patch_rows_cuda(const Tensor& out, const Tensor& source, const Tensor& index,
                       const Tensor& strength, const OptionalTensor& mask) {
  Tensor result = torch::stable::clone(out);
  patch_rows_cuda_(result, source, index, strength, mask);
  return result;
}
#endif

}  // namespace fasttrace
