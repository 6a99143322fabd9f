// A target: what a custom call takes, how its work is cut, and its workspace, each stated once.
//
// An op's spec.h lists what XLA passes, the same on both platforms: operands, results and
// attributes in their order, and for each buffer its sizes by the names that they have in a struct
// of sizes.
//
//   #define ILAJAX_K_SELECT_BWD(ARG, RET, ATTR)
//     ARG(S32, keys, batch, channels, slots)
//     ...
//     ATTR(int64_t, sites)
//   ILAJAX_CALL(KSelectBwd, KSelectShape, "k_select", ILAJAX_K_SELECT_BWD)
//
// That makes a struct with a member for each, and what binds it to XLA and reads its sizes. The
// op's cpu.cc and cuda.cu have a struct for each handler:
//
//   struct KSelectForward {
//     using Call = KSelectFwd;
//     struct Plan { int64_t chunk; };           numbers that say how the work is cut
//     template <typename T> static Plan Make(const Shape&, const Tuning&);
//     static bool Fits(const Shape&, const Plan&);   whether numbers from outside are a plan;
//                                               without it they are if all are at least 1
//     template <typename T> struct Layout {     the workspace, carved array by array; without
//       Layout(Carver&, const Shape&, const Plan&);  memory this adds up their sizes
//     };
//     template <typename T> static ffi::Error Run(Context, Call, const Shape&, const Plan&, Layout<T>&);
//   };
//   ILAJAX_CPU_TARGET(KSelectFwd, KSelectForward);
//
// Python asks for the plan and the size of the workspace when it traces (ilajax/ffi/plans.py), and
// passes both with the call. A handler that uses neither has no Plan, Make, Fits and Layout; its
// spec may list them for the other platform.

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "xla_kernels/common/planner.h"

namespace ilajax {

using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;
using U8 = ffi::Buffer<ffi::U8>;
using Values = ffi::AnyBuffer;  // float32, bfloat16 or float16: in a call all of them the same

constexpr int64_t kUnread = -1;

// The sizes of a buffer; none: it is the workspace.
struct BufferSizes {
  std::string_view name;
  std::array<int64_t*, 4> sizes = {};
  size_t rank;

  template <typename... Sizes>
  explicit BufferSizes(std::string_view buffer, Sizes&... all)
      : name(buffer), sizes{&all...}, rank(sizeof...(all)) {}
};

// Reads sizes from the dimensions of buffers: what has been read before must be the same again.
inline ffi::Error ReadSizes(std::string_view op, Shapes shapes,
                            std::initializer_list<BufferSizes> buffers) {
  auto shape = shapes.begin();
  for (const auto& [name, sizes, rank] : buffers) {
    if (rank == 0) continue;
    if (shape == shapes.end()) return InvalidArgument(op, ": ", name, " is missing");
    bool fits = shape->size() == rank;
    for (size_t i = 0; i < rank && fits; ++i) {
      if (*sizes[i] == kUnread) *sizes[i] = shape->begin()[i];
      fits = *sizes[i] == shape->begin()[i];
    }
    if (!fits) {
      std::ostringstream message;
      for (int64_t got : *shape) message << (message.tellp() ? ", " : "") << got;
      message << "], expected [";
      for (size_t i = 0; i < rank; ++i) message << (i ? ", " : "") << *sizes[i];
      return InvalidArgument(op, ": ", name, " has shape [", message.str(), "], where ", kUnread,
                             " is any size");
    }
    ++shape;
  }
  return ffi::Error::Success();
}

// A selection of nothing would look for its cut for ever.
inline ffi::Error CheckCapacity(std::string_view op, int64_t capacity) {
  if (capacity >= 1) return ffi::Error::Success();
  return InvalidArgument(op, ": the capacity is ", capacity);
}

// Keys are of each channel, or of all of them at once.
inline ffi::Error CheckKeyChannels(std::string_view op, int64_t key_channels, int64_t channels) {
  if (key_channels == 1 || key_channels == channels) return ffi::Error::Success();
  return InvalidArgument(op, ": keys of ", key_channels, " channels, expected 1 or ", channels);
}

// Reads a plan from numbers that come from outside.
template <typename Op>
ffi::Error ReadPlan(Span numbers, const typename Op::Call::Shape& s, typename Op::Plan& plan) {
  constexpr size_t kSize = kPlanSize<typename Op::Plan>;
  if (numbers.size() != kSize) {
    return InvalidArgument("a plan of ", numbers.size(), " numbers, expected ", kSize);
  }
  std::memcpy(static_cast<void*>(&plan), numbers.begin(), kSize * sizeof(int64_t));
  const auto all = [&](int64_t least) {
    constexpr int64_t kMost = 0x7fffffff;
    return std::all_of(numbers.begin(), numbers.end(),
                       [&](int64_t number) { return number >= least && number <= kMost; });
  };
  bool fits;
  if constexpr (HasFits<Op>) {
    fits = all(0) && Op::Fits(s, plan);
  } else {
    fits = all(1);
  }
  if (fits) return ffi::Error::Success();
  return InvalidArgument(Op::Call::kName, ": the plan does not fit the shapes");
}

// --- A handler ---------------------------------------------------------------------------------

// What the buffers of a call say: their dimensions, and the one dtype of its values.
class BufferFacts {
 public:
  template <typename Buffer>
  void Add(Buffer buffer) {
    if constexpr (std::is_same_v<Buffer, ffi::AnyBuffer>) {
      const ffi::DataType dtype = buffer.element_type();
      mixed_ |= dtype_.has_value() && *dtype_ != dtype;
      dtype_ = dtype;
    }
    if constexpr (requires { buffer.dimensions(); }) {
      if constexpr (!std::is_same_v<Buffer, U8>) dimensions_[count_++] = buffer.dimensions();
    } else if constexpr (requires { (*buffer).dimensions(); }) {
      Add(*buffer);
    }
  }
  Shapes shapes() const { return {dimensions_.data(), count_}; }
  ffi::DataType dtype() const { return dtype_.value_or(ffi::DataType::F32); }
  bool mixed() const { return mixed_; }

 private:
  std::array<Span, 16> dimensions_;
  size_t count_ = 0;
  std::optional<ffi::DataType> dtype_;
  bool mixed_ = false;
};

template <typename Op, typename Context>
ffi::Error Handle(Context context, const BufferFacts& facts, typename Op::Call call) {
  using Call = typename Op::Call;
  typename Call::Shape s;
  if constexpr (requires { call.window; }) {
    ILAJAX_RETURN_IF_ERROR(Window::Read(call.window, s.w));
  }
  ILAJAX_RETURN_IF_ERROR(Call::Read(facts.shapes(), s));
  if (facts.mixed()) return InvalidArgument(Call::kName, ": values of different dtypes");
  return DispatchFloat(facts.dtype(), [&]<typename T>() -> ffi::Error {
    if constexpr (HasPlan<Op>) {
      typename Op::Plan plan = {};
      ILAJAX_RETURN_IF_ERROR(ReadPlan<Op>(call.plan, s, plan));
      Carver carver(call.workspace->untyped_data());
      typename Op::template Layout<T> layout(carver, s, plan);
      if (carver.used() > static_cast<int64_t>(call.workspace->size_bytes())) {
        return InvalidArgument(Call::kName, ": the workspace has ", call.workspace->size_bytes(),
                               " bytes, but needs ", carver.used());
      }
      return Op::template Run<T>(context, call, s, plan, layout);
    } else {
      return Op::template Run<T>(context, call, s);
    }
  });
}

// A function for XLA, whose arguments are the members of Op::Call, then a context.
template <typename Op>
constexpr auto Handler() {
  return [](auto... arguments) -> ffi::Error {
    auto all = std::tie(arguments...);
    return [&]<size_t... i>(std::index_sequence<i...>) {
      BufferFacts facts;
      (facts.Add(std::get<i>(all)), ...);
      return Handle<Op>(std::get<sizeof...(i)>(all), facts, typename Op::Call{std::get<i>(all)...});
    }(std::make_index_sequence<sizeof...(arguments) - 1>());
  };
}

}  // namespace ilajax

// A struct for a call, from a list as above. `Sizes` has Check(), for what shapes do not say.
#define ILAJAX_CALL(Name, Sizes, op, LIST)                                                    \
  struct Name {                                                                               \
    using Shape = Sizes;                                                                      \
    static constexpr const char* kName = op;                                                  \
    LIST(ILAJAX_ARG_MEMBER, ILAJAX_RET_MEMBER, ILAJAX_ATTR_MEMBER)                            \
    static auto Bind() {                                                                      \
      return ffi::Ffi::Bind() LIST(ILAJAX_ARG_BIND, ILAJAX_RET_BIND, ILAJAX_ATTR_BIND);       \
    }                                                                                         \
    struct Reader : Sizes {                                                                   \
      ffi::Error Read(Shapes shapes) {                                                        \
        return ReadSizes(kName, shapes, {LIST(ILAJAX_SIZES, ILAJAX_SIZES, ILAJAX_NO_SIZES)}); \
      }                                                                                       \
    };                                                                                        \
    static ffi::Error Read(Shapes shapes, Sizes& sizes) {                                     \
      Reader reader = {sizes};                                                                \
      ILAJAX_RETURN_IF_ERROR(reader.Read(shapes));                                            \
      sizes = reader;                                                                         \
      return sizes.Check(kName);                                                              \
    }                                                                                         \
  };
#define ILAJAX_ARG_MEMBER(type, name, ...) type name;
#define ILAJAX_RET_MEMBER(type, name, ...) ffi::Result<type> name;
#define ILAJAX_ATTR_MEMBER(type, name) type name;
#define ILAJAX_ARG_BIND(type, name, ...) .Arg<type>()
#define ILAJAX_RET_BIND(type, name, ...) .Ret<type>()
#define ILAJAX_ATTR_BIND(type, name) .Attr<type>(#name)
#define ILAJAX_SIZES(type, name, ...) BufferSizes(#name __VA_OPT__(, ) __VA_ARGS__),
#define ILAJAX_NO_SIZES(type, name)

// Defines a target's handler, called `Name`, and its planner, NamePlan, by the struct `Op`.
#define ILAJAX_CPU_TARGET(Name, Op) ILAJAX_TARGET(Name, Op, ::xla::ffi::ThreadPool, {})
#define ILAJAX_CUDA_TARGET(Name, Op)                                \
  ILAJAX_TARGET(Name, Op, ::xla::ffi::PlatformStream<cudaStream_t>, \
                {::xla::ffi::Traits::kCmdBufferCompatible})
#define ILAJAX_TARGET(Name, Op, Context, ...)                                            \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Name, (::ilajax::Handler<::ilajax::Op>()),               \
                                ::ilajax::Op::Call::Bind().Ctx<Context>(), __VA_ARGS__); \
  ::xla::ffi::Error ilajax::Name##Plan(const Problem& problem, Planned& planned) {       \
    return MakePlan<Op>(problem, planned);                                               \
  }
