// In place of torch/extension.h, which includes all of torch: what DeepSpeed's ops for the CPU use of it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

namespace torch {
using namespace at;
constexpr auto kFloat32 = at::kFloat;
}
