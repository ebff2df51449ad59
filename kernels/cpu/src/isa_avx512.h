// SPDX-License-Identifier: Apache-2.0
// Vectors of AVX-512 (F, BW, DQ, VL) for kernels.h; included by the files that are compiled for it.
#pragma once

#include <immintrin.h>

#include "isa.h"

using namespace scap;

namespace {

struct Isa {
  // more rows at a time would fall into the same sets of the first-level cache where rows are 4 KB apart
  static constexpr int L = 16, kFloatRows = 4, kWordRows = 8, kMicroRows = 6, kMicroVectors = 4;
  static constexpr float kByteUnit = 1.0f / (1 << 24), kNibbleUnit = 1.0f;
  using V = __m512;
  using I = __m512i;
  static inline V load(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static inline V set1(float f) { return _mm512_set1_ps(f); }
  static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
  static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static inline V div(V a, V b) { return _mm512_div_ps(a, b); }
  static inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static inline float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static inline V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where one is NaN
  static inline V where_negative(V x, V a, V b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
  }
  static inline V load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static inline V load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static inline V load_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
  }
  static inline I load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static inline I flip(I a, uint32_t mask) { return _mm512_xor_si512(a, _mm512_set1_epi32(int(mask))); }
  // the byte in the highest place, zeros below: its value times 2^24
  template <int J>
  static inline V byte(I a) {
    if (J == 3) return _mm512_cvtepi32_ps(_mm512_and_si512(a, _mm512_set1_epi32(int(0xff000000u))));
    const __m512i from = _mm512_set4_epi32(0x0c000000 + J * 0x01000000, 0x08000000 + J * 0x01000000,
                                           0x04000000 + J * 0x01000000, J * 0x01000000);
    return _mm512_cvtepi32_ps(_mm512_maskz_shuffle_epi8(0x8888888888888888ull, a, from));
  }
  // a table of the 16 values: cheaper than a conversion, and exact
  template <int J>
  static inline V nibble(I a) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_permutexvar_ps(J == 0 ? a : _mm512_srli_epi32(a, 4 * J), values);
  }
  static inline V exp(V x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.33654f), x);
    x = _mm512_min_ps(_mm512_set1_ps(88.72283f), x);
    const V n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    V r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    V p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
  }
  static inline void compact(const float* x, int64_t k, float mode, float threshold, int32_t* index, float* value,
                             int64_t* at, int64_t* kept) {
    const __m512 centre = _mm512_set1_ps(mode), limit = _mm512_set1_ps(threshold);
    __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int64_t i = 0, n = 0;
    // whole vectors are stored: the buffers have room for 16 more
    for (; i + 16 <= k; i += 16) {
      const __m512 z = _mm512_sub_ps(_mm512_loadu_ps(x + i), centre);
      const __mmask16 keep = _mm512_cmp_ps_mask(_mm512_abs_ps(z), limit, _CMP_NLE_UQ);
      _mm512_storeu_ps(value + n, _mm512_maskz_compress_ps(keep, z));
      _mm512_storeu_si512(index + n, _mm512_maskz_compress_epi32(keep, number));
      n += __builtin_popcount(keep);
      number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
    }
    *at = i;
    *kept = n;
  }
};

}  // namespace
