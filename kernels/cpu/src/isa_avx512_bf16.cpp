// SPDX-License-Identifier: Apache-2.0
//
// AVX-512 with products of bfloat16 pairs (Cooper Lake, Sapphire Rapids, Zen 4 and later): twice the speed for many
// tokens, where it is exact: inputs that are bfloat16 numbers already, and weights that are, or small integers.

#include "isa.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "isa_avx512.h"
#include "kernels.h"

namespace {

// c[m][n] += scale[n] * sum over pairs of inputs
template <int M>
inline void micro_pairs(const uint16_t* a, int64_t k, const uint32_t* b, int64_t ldb, int64_t pairs, const float* scale,
                        float* c, int64_t ldc) {
  __m512 acc[M][4];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 4; ++n) acc[m][n] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh bs[4];
    for (int n = 0; n < 4; ++n) bs[n] = (__m512bh)_mm512_loadu_si512(b + p * ldb + 16 * n);
    for (int m = 0; m < M; ++m) {
      int pair;
      __builtin_memcpy(&pair, a + m * k + 2 * p, 4);
      const __m512bh as = (__m512bh)_mm512_set1_epi32(pair);
      for (int n = 0; n < 4; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], as, bs[n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 4; ++n) {
      float* y = c + m * ldc + 16 * n;
      _mm512_storeu_ps(y, _mm512_fmadd_ps(acc[m][n], _mm512_loadu_ps(scale + 16 * n), _mm512_loadu_ps(y)));
    }
}

// Row k of a block without its scale: numbers that bfloat16 holds.
template <int32_t F>
inline void plain_row(const scap_weight* w, const uint8_t* row, int64_t g, int64_t c0, int64_t columns, int64_t block,
                      float* out) {
  if constexpr (F == SCAP_BF16) {
    int64_t c = 0;
    for (; c + L <= columns; c += L) Isa::store(out + c, FloatRows<F>::load(row, c));
    for (; c < columns; ++c) out[c] = scalar_at(row, F, c);
    for (; c < block; ++c) out[c] = 0.0f;
  } else {
    for (int64_t b = 0; b * 16 * WordRows<F>::kFields < block; ++b)
      word_fields<F, 0>(flip<F>(Isa::load_words(reinterpret_cast<const uint32_t*>(row) + 16 * b)),
                        out + b * 16 * WordRows<F>::kFields);
    const float half = F == SCAP_U8 ? 128.0f : 8.0f;
    const int64_t at = g * w->scale_columns + c0;
    int64_t c = 0;
    for (; c + L <= columns; c += L) {
      V y = Isa::mul(Isa::load(out + c), Isa::set1(unit<F>()));
      if (w->zero) y = Isa::add(y, Isa::sub(Isa::set1(half), vector_at(w->zero, w->zero_type, at + c)));
      Isa::store(out + c, y);
    }
    for (; c < columns; ++c)
      out[c] = out[c] * unit<F>() + (w->zero ? half - scalar_at(w->zero, w->zero_type, at + c) : 0.0f);
    for (; c < block; ++c) out[c] = 0.0f;
  }
}

template <int32_t F>
void gemm_pairs(const scap_weight* w, const uint16_t* a, int64_t m, int64_t k, int64_t c0, int64_t c1, float* work,
                float* out) {
  constexpr int64_t kBlock = F == SCAP_U4 ? 128 : 64, kOut = 128, kDepth = 2 * kScratch / kBlock;
  constexpr bool kWords = F != SCAP_BF16;
  const int64_t columns = c1 - c0, tile = c0 / w->tile_columns, in_tile = c0 - tile * w->tile_columns;
  const uint8_t* base = static_cast<const uint8_t*>(w->data) + tile * w->tile_bytes;
  base += F == SCAP_U8 ? in_tile : F == SCAP_U4 ? in_tile / 2 : in_tile * 2;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(work);
  float first[128], second[128], scale[128];
  for (int64_t c = 0; c < kBlock; ++c) scale[c] = 1.0f;
  for (int64_t r = 0; r < m; ++r) clear(out + r * kOut, kBlock);
  for (int64_t k0 = 0; k0 < k;) {
    const int64_t g = k0 / w->group, depth = least(least(kDepth, k - k0), (g + 1) * w->group - k0);
    if (kWords)
      for (int64_t c = 0; c < columns; ++c) scale[c] = scalar_at(w->scale, w->scale_type, g * w->scale_columns + c0 + c);
    for (int64_t i = 0; i < depth; i += 2) {
      plain_row<F>(w, base + (k0 + i) * w->row_bytes, g, c0, columns, kBlock, first);
      plain_row<F>(w, base + (k0 + i + 1) * w->row_bytes, g, c0, columns, kBlock, second);
      for (int64_t c = 0; c < kBlock; c += 16) {
        const __m512i low = _mm512_srli_epi32(_mm512_loadu_si512(first + c), 16);
        const __m512i high = _mm512_and_si512(_mm512_loadu_si512(second + c), _mm512_set1_epi32(int(0xffff0000u)));
        _mm512_storeu_si512(pairs + i / 2 * kBlock + c, _mm512_or_si512(low, high));
      }
    }
    for (int64_t n = 0; n < kBlock; n += 64) {
      int64_t r = 0;
      for (; r + 6 <= m; r += 6)
        micro_pairs<6>(a + r * k + k0, k, pairs + n, kBlock, depth / 2, scale + n, out + r * kOut + n, kOut);
      for (; r < m; ++r)
        micro_pairs<1>(a + r * k + k0, k, pairs + n, kBlock, depth / 2, scale + n, out + r * kOut + n, kOut);
    }
    k0 += depth;
  }
  if (w->bias)
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < columns; ++c) out[r * kOut + c] += w->bias[c0 + c];
}

void gemm_bf16(const scap_weight* w, const uint16_t* a, int64_t m, int64_t k, int64_t c0, int64_t c1, float* work,
               float* out) {
  switch (w->format) {
    case SCAP_BF16: return gemm_pairs<SCAP_BF16>(w, a, m, k, c0, c1, work, out);
    case SCAP_U8: return gemm_pairs<SCAP_U8>(w, a, m, k, c0, c1, work, out);
    default: return gemm_pairs<SCAP_U4>(w, a, m, k, c0, c1, work, out);
  }
}

}  // namespace

namespace scap {
const Kernels* avx512_bf16_kernels() {
  static Kernels kernels = SCAP_KERNELS("avx512_bf16");
  kernels.gemm_bf16 = gemm_bf16;
  return avx512_kernels() && __builtin_cpu_supports("avx512bf16") ? &kernels : nullptr;
}
}  // namespace scap
#else
namespace scap {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace scap
#endif
