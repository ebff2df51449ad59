// SPDX-License-Identifier: Apache-2.0
// Plain C++ for every machine; compilers turn the loops over lanes into whatever vectors there are.

#include <math.h>

#include "isa.h"

using namespace scap;

namespace {

struct Isa {
  static constexpr int L = 4, kFloatRows = 4, kWordRows = 4, kMicroRows = 4, kMicroVectors = 4;
  static constexpr float kByteUnit = 1.0f, kNibbleUnit = 1.0f;
  struct V {
    float v[4];
  };
  struct I {
    uint32_t v[4];
  };
  template <class F>
  static inline V each(F f) {
    V r;
    for (int l = 0; l < L; ++l) r.v[l] = f(l);
    return r;
  }
  static inline V load(const float* p) {
    V r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static inline void store(float* p, V a) { __builtin_memcpy(p, &a, sizeof a); }
  static inline V set1(float f) {
    return each([&](int) { return f; });
  }
  static inline V add(V a, V b) {
    return each([&](int l) { return a.v[l] + b.v[l]; });
  }
  static inline V sub(V a, V b) {
    return each([&](int l) { return a.v[l] - b.v[l]; });
  }
  static inline V mul(V a, V b) {
    return each([&](int l) { return a.v[l] * b.v[l]; });
  }
  static inline V div(V a, V b) {
    return each([&](int l) { return a.v[l] / b.v[l]; });
  }
  static inline V fma(V a, V b, V c) {
    return each([&](int l) { return a.v[l] * b.v[l] + c.v[l]; });
  }
  static inline float fma1(float a, float b, float c) { return a * b + c; }
  static inline V max(V a, V b) {  // b where one is NaN
    return each([&](int l) { return a.v[l] > b.v[l] ? a.v[l] : b.v[l]; });
  }
  static inline V where_negative(V x, V a, V b) {
    return each([&](int l) { return x.v[l] < 0 ? a.v[l] : b.v[l]; });
  }
  static inline V exp(V a) {
    return each([&](int l) { return ::expf(a.v[l]); });
  }
  static V load_f16(const uint16_t* p);
  static inline V load_bf16(const uint16_t* p) {
    return each([&](int l) {
      const uint32_t u = uint32_t(p[l]) << 16;
      float f;
      __builtin_memcpy(&f, &u, 4);
      return f;
    });
  }
  static inline V load_u8(const uint8_t* p) {
    return each([&](int l) { return float(p[l]); });
  }
  static inline I load_words(const uint32_t* p) {
    I r;
    __builtin_memcpy(&r, p, sizeof r);
    return r;
  }
  static inline I flip(I a, uint32_t mask) {
    for (int l = 0; l < L; ++l) a.v[l] ^= mask;
    return a;
  }
  template <int J>
  static inline V byte(I a) {
    return each([&](int l) { return float(int32_t(a.v[l] << (24 - 8 * J)) >> 24); });
  }
  template <int J>
  static inline V nibble(I a) {
    return each([&](int l) { return float(int32_t(a.v[l] << (28 - 4 * J)) >> 28); });
  }
  static inline void compact(const float*, int64_t, float, float, int32_t*, float*, int64_t*, int64_t*) {}
};

}  // namespace

#include "kernels.h"

namespace {
inline Isa::V Isa::load_f16(const uint16_t* p) {
  return each([&](int l) { return half_to_float(p[l]); });
}
}  // namespace

namespace scap {
const Kernels* portable_kernels() {
  static const Kernels kernels = SCAP_KERNELS("portable");
  return &kernels;
}
}  // namespace scap
