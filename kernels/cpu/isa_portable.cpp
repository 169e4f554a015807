#define FASTSLOTS_ISA portable
#include "isa.inc"

namespace fastslots {
const Kernels<float>& portable_float_kernels() {
  static constexpr Kernels<float> table = portable::kernels<float>();
  return table;
}
const Kernels<double>& double_kernels() {
  static constexpr Kernels<double> table = portable::kernels<double>();
  return table;
}
}  // namespace fastslots
