// SPDX-License-Identifier: Apache-2.0
// The Python module _cuda. Importing it needs no driver: the runtime is linked in and asks for one
// at the first call. Tensors arrive as addresses, sizes and strides; rapid3rt/ops/native.py has
// checked them, rapid3rt/ops/cuda.py adds workspace, device and stream; an op makes its device the
// current one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <string>

#include "ops.h"
#include "rapid3rt/binding.h"

namespace py = pybind11;

namespace rapid3rt::cuda {
namespace {

std::atomic<Schedule> current_schedule{Schedule::kQueue};

void force_schedule(const std::string& name) {
  R3_CHECK(name == "queue" || name == "static", "schedule must be queue or static, got '", name,
           "'");
  current_schedule = name == "queue" ? Schedule::kQueue : Schedule::kStatic;
}

// CUDA version that the installed driver goes up to, 1000 major + 10 minor; 0 without a driver.
int driver_version() {
  int version = 0;
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

void attend(const AttentionParams& params, void* workspace, const Launch& launch) {
  block_sparse_attention(params, current_schedule, workspace, launch);
}

Launch launch_on(int device, uintptr_t stream) {
  return {device, reinterpret_cast<cudaStream_t>(stream)};
}

// The function that Python sees: what makes the parameters, then device and stream.
template <class Params, class... Arguments>
auto on_stream(Params (*make)(Arguments...), void (*run)(const Params&, const Launch&)) {
  return [make, run](Arguments... arguments, int device, uintptr_t stream) {
    run(make(arguments...), launch_on(device, stream));
  };
}

// The same for what needs a workspace, whose address comes before the device.
template <class Params, class... Arguments>
auto with_workspace(Params (*make)(Arguments...),
                    void (*run)(const Params&, void*, const Launch&)) {
  return [make, run](Arguments... arguments, uintptr_t workspace, int device, uintptr_t stream) {
    run(make(arguments...), binding::pointer<void>(workspace), launch_on(device, stream));
  };
}

template <class Params, class... Arguments>
auto workspace_bytes(Params (*make)(Arguments...), int64_t (*count)(const Params&)) {
  return [make, count](Arguments... arguments) { return count(make(arguments...)); };
}

}  // namespace
}  // namespace rapid3rt::cuda

PYBIND11_MODULE(_cuda, m) {
  using namespace rapid3rt;
  using namespace rapid3rt::cuda;
  m.doc() = "CUDA kernels of rapid3rt. Knows no torch: tensors are addresses, sizes and strides.";
  m.attr("architectures") = RAPID3RT_CUDA_ARCHITECTURES;  // as CMake has them, comma-separated
  m.attr("runtime_version") = CUDART_VERSION;             // 1000 major + 10 minor
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("driver_version", &driver_version);
  m.def("force_schedule", &force_schedule);
  m.def("block_sparse_attention", with_workspace(&binding::attention, &attend), no_gil);
  m.def("block_sparse_attention_workspace_bytes",
        workspace_bytes(&binding::attention, &attention_workspace_bytes));
  m.def("build_block_lists", with_workspace(&binding::lists, &build_block_lists), no_gil);
  m.def("build_block_lists_workspace_bytes",
        workspace_bytes(&binding::lists, &lists_workspace_bytes));
  m.def("cache_lookup", on_stream(&binding::lookup, &cache_lookup), no_gil);
  m.def("cache_store", with_workspace(&binding::store, &cache_store), no_gil);
  m.def("cache_store_workspace_bytes", workspace_bytes(&binding::store, &store_workspace_bytes));
  m.def("gather_rows", on_stream(&binding::rows, &gather_rows), no_gil);
  m.def("gate_residual", on_stream(&binding::gate, &gate_residual), no_gil);
  m.def("norm_modulate", on_stream(&binding::modulate, &norm_modulate), no_gil);
  m.def("scatter_rows", on_stream(&binding::rows, &scatter_rows), no_gil);
}
