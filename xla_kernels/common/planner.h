// The planner of a target: what Python asks before it makes a call. See target.h.

#pragma once

#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "xla_kernels/common/tuning.h"
#include "xla_kernels/common/window.h"
#include "xla_kernels/common/workspace.h"

namespace ilajax {

// The dimensions of a call's buffers, in its order; the workspace is not among them.
using Shapes = std::span<const Span>;

// A plan is a struct of int64_t; XLA passes it as an array of them.
template <typename Plan>
constexpr size_t kPlanSize = sizeof(Plan) / sizeof(int64_t);

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
  std::string limit;      // why the kernel cannot do it here; empty if it can
  int64_t map_words = 0;  // of each slot, in the site map that the call takes; 0: it takes none
};

// Named, since nvcc takes no such requirement within a lambda.
template <typename Shape>
concept HasGroups = requires(Shape s) { s.groups; };
template <typename Call>
concept TakesPlan = requires(Call call) { call.plan; };
template <typename Op>
concept HasPlan = requires { typename Op::Plan; };
template <typename Op>
concept HasFits = requires { &Op::Fits; };
template <typename Op>
concept HasLimit = requires { &Op::Limit; };
template <typename Op>
concept HasSiteMap = requires { &Op::MapWords; };

// The bytes of a workspace, with another batch than the shape's.
template <typename Layout, typename Shape, typename Plan>
int64_t WorkspaceOf(Shape s, const Plan& plan, int64_t items, int64_t groups) {
  s.batch = items;
  if constexpr (HasGroups<Shape>) s.groups = groups;
  return SizeOf<Layout>(s, plan);
}

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
  planned.has_plan = TakesPlan<typename Op::Call>;
  if constexpr (HasPlan<Op>) {
    return DispatchFloat(problem.dtype, [&]<typename T>() -> ffi::Error {
      const auto plan = Op::template Make<T>(s, problem.tuning);
      planned.numbers.resize(kPlanSize<typename Op::Plan>);
      std::memcpy(planned.numbers.data(), &plan, sizeof(plan));
      using Layout = typename Op::template Layout<T>;
      planned.workspace = SizeOf<Layout>(s, plan);
      planned.fixed = WorkspaceOf<Layout>(s, plan, 0, 0);
      planned.each_item = WorkspaceOf<Layout>(s, plan, 1, 0) - planned.fixed;
      planned.each_group = WorkspaceOf<Layout>(s, plan, 0, 1) - planned.fixed;
      if constexpr (HasLimit<Op>) planned.limit = Op::Limit(s, plan, problem.tuning);
      if constexpr (HasSiteMap<Op>) planned.map_words = Op::MapWords(s, plan);
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
