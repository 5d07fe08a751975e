// SPDX-License-Identifier: Apache-2.0
// The Python module _cpu. Tensors arrive as addresses, sizes and strides; rapid3rt/ops/native.py
// has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "isa.h"
#include "ops.h"
#include "rapid3rt/binding.h"

namespace py = pybind11;

namespace rapid3rt {
namespace {

std::vector<std::string> isas() {
  return {kIsaNames, kIsaNames + static_cast<int>(best_isa()) + 1};
}

std::string attention_isa_of(int dtype, int64_t head_dim) {
  return attention_isa(static_cast<DType>(dtype), head_dim);
}

std::string isa() { return kIsaNames[static_cast<int>(current_isa())]; }

// No name: the best one again.
void force_isa_named(const std::optional<std::string>& name) {
  if (!name) return unforce_isa();
  std::string list;
  int at = -1, i = 0;
  for (const std::string& known : isas()) {
    list += (i == 0 ? "" : ", ") + known;
    if (known == *name) at = i;
    ++i;
  }
  R3_CHECK(at >= 0, "RAPID3RT_CPU_ISA must be one of ", list,
           " (this build on this machine), got '", *name, "'");
  force_isa(static_cast<Isa>(at));
}

// The function that Python sees: what makes the parameters, then the number of threads.
template <class Params, class... Arguments>
auto on_threads(Params (*make)(Arguments...), void (*run)(const Params&)) {
  return [make, run](Arguments... arguments, int num_threads) {
    Params params = make(arguments...);
    params.num_threads = num_threads;
    run(params);
  };
}

}  // namespace
}  // namespace rapid3rt

PYBIND11_MODULE(_cpu, m) {
  using namespace rapid3rt;
  m.doc() = "CPU kernels of rapid3rt. Knows no torch: tensors are addresses, sizes and strides.";
#ifdef _OPENMP
  m.attr("has_openmp") = true;
#else
  m.attr("has_openmp") = false;
#endif
  m.attr("isas") = isas();  // those that this build and this machine have, ascending
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("isa", &isa);
  m.def("force_isa", &force_isa_named);
  m.def("attention_isa", &attention_isa_of);
  m.def("block_sparse_attention", on_threads(&binding::attention, &block_sparse_attention), no_gil);
  m.def("build_block_lists", on_threads(&binding::lists, &build_block_lists), no_gil);
  m.def("cache_lookup", on_threads(&binding::lookup, &cache_lookup), no_gil);
  m.def("cache_store", on_threads(&binding::store, &cache_store), no_gil);
  m.def("gather_rows", on_threads(&binding::rows, &gather_rows), no_gil);
  m.def("gate_residual", on_threads(&binding::gate, &gate_residual), no_gil);
  m.def("norm_modulate", on_threads(&binding::modulate, &norm_modulate), no_gil);
  m.def("scatter_rows", on_threads(&binding::rows, &scatter_rows), no_gil);
}
