#define FASTSLOTS_ISA avx512
#include "isa.inc"

namespace fastslots {
const Kernels<float>& avx512_float_kernels() {
  static constexpr Kernels<float> table = avx512::kernels<float>();
  return table;
}
}  // namespace fastslots
