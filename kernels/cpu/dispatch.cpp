// Which instruction set this processor serves.
#include "api.h"

namespace fastslots {

const Kernels<float>& portable_float_kernels();
#if defined(FASTSLOTS_X86)
const Kernels<float>& avx2_float_kernels();
const Kernels<float>& avx512_float_kernels();
#endif

bool isa_supported(Isa isa) {
#if defined(FASTSLOTS_X86)
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512) {
    return isa_supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::portable;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

const Kernels<float>& float_kernels([[maybe_unused]] Isa isa) {
#if defined(FASTSLOTS_X86)
  if (isa == Isa::avx512) return avx512_float_kernels();
  if (isa == Isa::avx2) return avx2_float_kernels();
#endif
  return portable_float_kernels();
}

}  // namespace fastslots
