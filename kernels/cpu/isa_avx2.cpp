#define FASTSLOTS_ISA avx2
#include "isa.inc"

namespace fastslots {
const Kernels<float>& avx2_float_kernels() {
  static constexpr Kernels<float> table = avx2::kernels<float>();
  return table;
}
}  // namespace fastslots
