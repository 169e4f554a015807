// Arrays out of Python objects, through DLPack: never converted or copied (an output of the wrong dtype would be written
// to a temporary and lost), so they must be on the CPU, and of the dtype, layout and shape that the call implies.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace nb = nanobind;

constexpr int64_t kAny = -1;
using Shape = std::vector<int64_t>;

// What a dictionary holds under a name.
inline nb::object member(const nb::dict& from, const std::string& name) {
  if (!from.contains(name.c_str())) throw nb::value_error(("no array is named " + name).c_str());
  return from[name.c_str()];
}

// Takes arrays out of Python objects and keeps them alive for the call.
template <typename T>
class Arrays {
 public:
  const T* input(nb::handle object, const std::string& name, const Shape& shape) {
    return take<const T>(object, name, shape);
  }

  const T* input(const nb::dict& from, const std::string& name, const Shape& shape) {
    return input(member(from, name), name, shape);
  }

  T* output(nb::handle object, const std::string& name, const Shape& shape) { return take<T>(object, name, shape); }

  T* output_or_null(const nb::dict& from, const std::string& name, const Shape& shape) {
    return from.contains(name.c_str()) ? output(member(from, name), name, shape) : nullptr;
  }

  const uint8_t* mask(nb::handle object, const Shape& shape) {
    return object.is_none() ? nullptr : take<const uint8_t>(object, "slot_mask", shape);
  }

  // int64, each from 0 to below `limit`.
  const int64_t* indices(nb::handle object, const std::string& name, const Shape& shape, int64_t limit) {
    const int64_t* const values = take<const int64_t>(object, name, shape);
    int64_t count = 1;
    for (int64_t axis : last_shape_) count *= axis;
    for (int64_t i = 0; i < count; ++i) {
      if (values[i] < 0 || values[i] >= limit) {
        throw nb::value_error((name + " must lie in 0.." + std::to_string(limit - 1)).c_str());
      }
    }
    return values;
  }

  // [.., .., .., n] with any strides but a contiguous last axis.
  const T* strided(nb::handle object, const std::string& name, const Shape& shape, int64_t strides[3]) {
    nb::ndarray<const T, nb::ndim<4>, nb::device::cpu> array;
    if (!nb::try_cast(object, array, false)) throw_type<T>(name, "4-d");
    last_shape_.assign(array.shape_ptr(), array.shape_ptr() + 4);
    check_shape(name, shape);
    if (!array.data() && array.size()) throw_type<T>(name, "materialised");
    if (array.stride(3) != 1 && array.shape(3) > 1) throw_type<T>(name, "last-axis contiguous");
    for (int i = 0; i < 3; ++i) strides[i] = array.stride(i);
    owners_.push_back(nb::borrow(object));
    return present(array.data());
  }

  const Shape& last_shape() const { return last_shape_; }

  // The shape of an input whose sizes are not known yet.
  Shape shape_of(nb::handle object, const std::string& name, size_t axes) {
    take<const T>(object, name, Shape(axes, kAny));
    return last_shape_;
  }

 private:
  template <typename E>
  E* take(nb::handle object, const std::string& name, const Shape& shape) {
    nb::ndarray<E, nb::c_contig, nb::device::cpu> array;
    if (!nb::try_cast(object, array, false)) throw_type<E>(name, "C-contiguous");
    last_shape_.assign(array.shape_ptr(), array.shape_ptr() + array.ndim());
    check_shape(name, shape);
    if (!array.data() && array.size()) throw_type<E>(name, "materialised");  // a lazy tensor that nothing has computed
    owners_.push_back(nb::borrow(object));
    return present(array.data());
  }

  // An empty array has no address, but is there: null means "not asked for".
  template <typename E>
  static E* present(E* data) {
    static std::remove_const_t<E> nothing;
    return data ? data : &nothing;
  }

  template <typename E>
  [[noreturn]] static void throw_type(const std::string& name, const char* layout) {
    constexpr bool whole = std::is_integral_v<E>;
    const char* type = whole ? (sizeof(E) == 1 ? "uint8" : sizeof(E) == 4 ? "int32" : "int64") : sizeof(E) == 4 ? "float32" : "float64";
    throw nb::type_error((name + " must be a " + layout + " " + type + " array on the CPU").c_str());
  }

  void check_shape(const std::string& name, const Shape& shape) const {
    bool fits = last_shape_.size() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || shape[i] == last_shape_[i];
    if (fits) return;
    const std::string found = text(last_shape_), expected = text(shape);
    throw nb::value_error((name + " has shape " + found + ", expected " + expected).c_str());
  }

  static std::string text(const Shape& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + (shape[i] == kAny ? "any" : std::to_string(shape[i]));
    return out + "]";
  }

  std::vector<nb::object> owners_;
  Shape last_shape_;
};
