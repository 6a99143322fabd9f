// The planner of a target: what Python asks before it makes a call. See target.h.

#ifndef ILAJAX_XLA_KERNELS_COMMON_PLANNER_H_
#define ILAJAX_XLA_KERNELS_COMMON_PLANNER_H_

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "xla_kernels/common/ffi.h"
#include "xla_kernels/common/tuning.h"
#include "xla_kernels/common/window.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

// The dimensions of a call's buffers, in its order; the workspace is not among them.
using Shapes = std::span<const Span>;

// A plan is a struct of int64_t; XLA passes it as an array of them.
template <typename Plan>
constexpr size_t kPlanSize = std::is_empty_v<Plan> ? 0 : sizeof(Plan) / sizeof(int64_t);

template <typename Op>
concept HasPlan = requires { typename Op::Plan; };

// What Python asks about.
struct Problem {
  std::vector<std::vector<int64_t>> shapes;  // as Shapes
  ffi::DataType dtype = ffi::DataType::F32;
  std::vector<int64_t> window;  // as the attribute; empty where there is none
  Tuning tuning;
};

struct Planned {
  bool has_plan = false;
  std::vector<int64_t> numbers;
  int64_t workspace = 0;
  // The same where jax.export leaves the batch open: fixed + each_item * batch + each_group *
  // groups, with the plan that has been made for some batch.
  int64_t fixed = 0, each_item = 0, each_group = 0;
  std::string limit;  // why the kernel cannot do it here; empty if it can
};

// A plan, or what is wrong with the problem.
template <typename Op>
ffi::Error MakePlan(const Problem& problem, Planned& planned) {
  typename Op::Call::Shape s;
  if constexpr (requires { s.w; }) {
    ILAJAX_RETURN_IF_ERROR(Window::Read(Span(problem.window.data(), problem.window.size()), s.w));
  }
  std::vector<Span> shapes;
  for (const auto& shape : problem.shapes) shapes.emplace_back(shape.data(), shape.size());
  ILAJAX_RETURN_IF_ERROR(Op::Call::Read(shapes, s));
  if constexpr (HasPlan<Op>) {
    return DispatchFloat(problem.dtype, [&]<typename T>() -> ffi::Error {
      const auto plan = Op::template Make<T>(s, problem.tuning);
      planned.has_plan = true;
      planned.numbers.resize(kPlanSize<typename Op::Plan>);
      std::memcpy(planned.numbers.data(), &plan, planned.numbers.size() * sizeof(int64_t));
      const auto size = [&](int64_t items, int64_t groups) {
        typename Op::Call::Shape of = s;
        of.batch = items;
        if constexpr (requires { of.groups; }) of.groups = groups;
        return SizeOf<typename Op::template Layout<T>>(of, plan);
      };
      int64_t groups = 1;
      if constexpr (requires { s.groups; }) groups = s.groups;
      planned.workspace = size(s.batch, groups);
      planned.fixed = size(0, 0);
      planned.each_item = size(1, 0) - planned.fixed;
      planned.each_group = size(0, 1) - planned.fixed;
      if constexpr (requires { Op::Limit(s, plan, problem.tuning); }) {
        planned.limit = Op::Limit(s, plan, problem.tuning);
      }
      return ffi::Error::Success();
    });
  }
  return ffi::Error::Success();
}

using Planner = ffi::Error(const Problem&, Planned&);

// Those of all targets, which bind.h gives to Python.
#define TARGET(target, Name) Planner Name##Plan;
#include "xla_kernels/targets.def"

}  // namespace ilajax

#endif  // ILAJAX_XLA_KERNELS_COMMON_PLANNER_H_
