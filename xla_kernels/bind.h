// What both Python modules have: registrations() and plan().

#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <string>
#include <vector>

#include "xla_kernels/common/planner.h"

#define TARGET(target, Name) XLA_FFI_DECLARE_HANDLER_SYMBOL(Name);
#include "xla_kernels/targets.def"

namespace ilajax {

namespace nb = ::nanobind;

inline nb::dict Registrations() {
  nb::dict targets;
#define TARGET(target, Name) targets[#target] = nb::capsule(reinterpret_cast<void*>(Name));
#include "xla_kernels/targets.def"
  return targets;
}

inline ffi::DataType DataTypeOf(const std::string& name) {
  if (name == "float32") return ffi::DataType::F32;
  if (name == "bfloat16") return ffi::DataType::BF16;
  if (name == "float16") return ffi::DataType::F16;
  throw nb::value_error(("no dtype of values: " + name).c_str());
}

inline nb::object Plan(const std::string& target, std::vector<std::vector<int64_t>> shapes,
                       const std::string& dtype, std::vector<int64_t> window,
                       const std::map<std::string, int64_t>& tuning) {
  const std::map<std::string, Planner*> planners = {
#define TARGET(target, Name) {#target, &Name##Plan},
#include "xla_kernels/targets.def"
  };
  const auto planner = planners.find(target);
  if (planner == planners.end()) throw nb::value_error(("no target " + target).c_str());
  Problem problem = {std::move(shapes), DataTypeOf(dtype), std::move(window), {}};
  for (const auto& [name, number] : tuning) {
    int64_t* const to = Find(problem.tuning, name);
    if (to == nullptr) throw nb::value_error(("no number of a plan: " + name).c_str());
    *to = number;
  }
  Planned planned;
  const ffi::Error error = planner->second(problem, planned);
  if (error.failure()) throw nb::value_error(error.message().c_str());
  if (!planned.has_plan) return nb::none();
  return nb::make_tuple(planned.numbers, planned.workspace, planned.fixed, planned.each_item,
                        planned.each_group, planned.limit, planned.map_words);
}

// `registrations` are those of a harness, where one stands before the handlers.
inline void Bind(nb::module_& m, nb::dict (*registrations)() = &Registrations) {
  m.def("registrations", registrations,
        "FFI target name -> capsule of its handler, as jax.ffi.register_ffi_target takes it.");
  m.def(
      "plan", &Plan, nb::arg("target"), nb::arg("shapes"), nb::arg("dtype"), nb::arg("window"),
      nb::arg("tuning"),
      "How a call is to cut its work: the numbers to pass, the bytes of its workspace, the same as "
      "fixed, for each sample and for each group where the batch is open, why the kernel cannot do "
      "it, or \"\", and the words of a slot in the site map that it takes, or 0. None for a call "
      "without plan and workspace. The shapes are those of operands and results but the "
      "workspace.");
}

}  // namespace ilajax
