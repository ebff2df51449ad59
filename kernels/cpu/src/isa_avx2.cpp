// SPDX-License-Identifier: Apache-2.0
// AVX2, FMA and F16C. Compiled with -mavx2 -mfma -mf16c; empty on other machines.

#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

using namespace scap;

namespace {

struct Isa {
  static constexpr int L = 8, kFloatRows = 4, kWordRows = 4, kMicroRows = 6, kMicroVectors = 2;
  static constexpr float kByteUnit = 1.0f / (1 << 24), kNibbleUnit = 1.0f / (1 << 28);
  using V = __m256;
  using I = __m256i;
  static inline V load(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static inline V set1(float f) { return _mm256_set1_ps(f); }
  static inline V add(V a, V b) { return _mm256_add_ps(a, b); }
  static inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static inline V div(V a, V b) { return _mm256_div_ps(a, b); }
  static inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static inline float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static inline V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where one is NaN
  static inline V where_negative(V x, V a, V b) { return _mm256_blendv_ps(b, a, x); }
  static inline V load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static inline V load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static inline V load_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
  }
  static inline I load_words(const uint32_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static inline I flip(I a, uint32_t mask) { return _mm256_xor_si256(a, _mm256_set1_epi32(int(mask))); }
  // the field in the highest bits, zeros below: its value times 2^24 or 2^28
  template <int J>
  static inline V byte(I a) {
    return _mm256_cvtepi32_ps(
        _mm256_and_si256(_mm256_slli_epi32(a, 24 - 8 * J), _mm256_set1_epi32(int(0xff000000u))));
  }
  template <int J>
  static inline V nibble(I a) {
    return _mm256_cvtepi32_ps(
        _mm256_and_si256(_mm256_slli_epi32(a, 28 - 4 * J), _mm256_set1_epi32(int(0xf0000000u))));
  }
  // Cephes' expf, within 1 unit in the last place or two; NaN stays NaN
  static inline V exp(V x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.33654f), x);
    x = _mm256_min_ps(_mm256_set1_ps(88.72283f), x);
    const V n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)), 8);
    V r = _mm256_fmadd_ps(n, _mm256_set1_ps(-0.693359375f), x);
    r = _mm256_fmadd_ps(n, _mm256_set1_ps(2.12194440e-4f), r);
    V p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    // 2^n in two steps: n = 128 has no float of its own
    const __m256i i = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(i, 1), rest = _mm256_sub_epi32(i, half);
    const __m256i bias = _mm256_set1_epi32(127);
    p = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
    return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
  }
  static inline void compact(const float*, int64_t, float, float, int32_t*, float*, int64_t*, int64_t*) {}
};

}  // namespace

#include "kernels.h"

namespace scap {
const Kernels* avx2_kernels() {
  static const Kernels kernels = SCAP_KERNELS("avx2");
  const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has ? &kernels : nullptr;
}
}  // namespace scap
#else
namespace scap {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace scap
#endif
