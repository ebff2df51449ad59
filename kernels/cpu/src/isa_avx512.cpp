// SPDX-License-Identifier: Apache-2.0
// AVX-512 (F, BW, DQ, VL: Skylake servers, Zen 4 and later). Empty on other machines.

#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "isa_avx512.h"
#include "kernels.h"

namespace scap {
const Kernels* avx512_kernels() {
  static const Kernels kernels = SCAP_KERNELS("avx512");
  const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has ? &kernels : nullptr;
}
}  // namespace scap
#else
namespace scap {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace scap
#endif
