#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

// The schemas are defined in Python, so that the ops exist without this library too.
#ifdef FASTTRACE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fasttrace, CUDA, m) {
  m.impl("patch_rows", TORCH_BOX(&fasttrace::patch_rows_cuda));
  m.impl("patch_rows_", TORCH_BOX(&fasttrace::patch_rows_cuda_));
  m.impl("guided_step_", TORCH_BOX(&fasttrace::guided_step_cuda_));
}
#else
STABLE_TORCH_LIBRARY_IMPL(fasttrace, CPU, m) {
  m.impl("patch_rows", TORCH_BOX(&fasttrace::patch_rows_cpu));
  m.impl("patch_rows_", TORCH_BOX(&fasttrace::patch_rows_cpu_));
  m.impl("guided_step_", TORCH_BOX(&fasttrace::guided_step_cpu_));
}
#endif
