// SPDX-License-Identifier: Apache-2.0
//
// What one instruction set offers. Each isa_*.cpp makes such a table from kernels.h.
#pragma once

#include "sparse_fc.h"

namespace scap {

// Columns of a unit of work of a format: whole cache lines and whole blocks of words.
inline int64_t unit_columns(int32_t format) { return format == SCAP_U4 ? 128 : 64; }

constexpr int64_t kChunk = 2048;      // columns whose float accumulators stay in the first-level cache
constexpr int64_t kWideChunk = 4096;  // with one accumulator a column (8 bits, one scale a column)
constexpr int64_t kGemmRows = 256;    // tokens that share one decompression of a block of weights
constexpr int64_t kScratch = 8192;    // floats of decompressed weights held at a time: half of a first-level cache

// What the kept inputs of one token are.
struct Kept {
  const int32_t* index;   // ascending
  const float* value;     // z
  const int64_t* starts;  // [groups + 1]: where a group of input channels begins in index
  const float* sums;      // [groups]: sum of z
  int64_t groups;
};

struct Kernels {
  const char* name;
  void (*to_float)(const void* x, int32_t type, int64_t count, float* out);
  void (*from_float)(const float* x, int32_t type, int64_t count, void* out);
  int64_t (*compact)(const float* x, int64_t k, float mode, float threshold, int32_t* index, float* value);
  void (*prune)(const float* x, int64_t k, float mode, float threshold, float* z);
  // One token, columns [c0, c1), c0 a multiple of the format's unit: out[c - c0], bias included. work: 2 * kWideChunk
  // floats.
  void (*gemv)(const scap_weight* w, const Kept* kept, int64_t c0, int64_t c1, float* work, float* out);
  // Many tokens a [m, k], one unit of columns [c0, c1): out [m, 128]. work: kScratch floats.
  void (*gemm)(const scap_weight* w, const float* a, int64_t m, int64_t k, int64_t c0, int64_t c1, float* work,
               float* out);
  // gate = activation(gate) * up, count a multiple of 16
  void (*glu)(float* gate, const float* up, int64_t count, int32_t activation);
  // As gemm, on inputs that are bfloat16 numbers, for weights in BF16, U8 or U4 (integer zero points) with even k and
  // group; NULL where there is no such instruction.
  void (*gemm_bf16)(const scap_weight* w, const uint16_t* a, int64_t m, int64_t k, int64_t c0, int64_t c1, float* work,
                    float* out);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // NULL where the build or the machine has none
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace scap
