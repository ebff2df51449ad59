// SPDX-License-Identifier: Apache-2.0
//
// Fully connected layers that skip the weights of dropped inputs, for CPUs: the C interface.
//
//   z = x - mode;  kept = z where |z| > threshold (NaN is kept);  y = kept @ W + bias;  glu: activation(y0) * y1
//
// Weights lie input channel by input channel ("rows"), so that a dropped input drops contiguous bytes. A thread owns
// output columns and adds their products in the order of the input channels: no result depends on the thread count.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

// Element types. U8 and U4 weights are unsigned integers in words of 32 bits, fields 16 columns apart: field j of word
// 16 b + i is column b * 16 * (32 / bits) + 16 j + i (kernels/packing.py); signed sources are stored plus 128 or 8.
enum { SCAP_NONE = -1, SCAP_F32 = 0, SCAP_F16 = 1, SCAP_BF16 = 2, SCAP_U8 = 3, SCAP_U4 = 4, SCAP_I16 = 5 };

enum { SCAP_LINEAR = 0, SCAP_SILU = 1, SCAP_GELU = 2, SCAP_GELU_TANH = 3, SCAP_RELU = 4, SCAP_RELU2 = 5 };

// One FC layer. Columns lie in tiles of tile_columns; in a tile, input channel k starts at k * row_bytes.
typedef struct {
  const void* data;
  const void* scale;  // [k / group, scale_columns] of scale_type, or NULL for float weights
  const void* zero;   // likewise, zero_type: an integer zero point, or a float offset: w = (u - half) * s + zero
  const float* bias;  // [n], fused (b + mode * column sums), or NULL
  int64_t n, tile_columns, row_bytes, tile_bytes, group, scale_columns;
  int32_t format, scale_type, zero_type;
  int32_t padded;  // rows may be read up to a multiple of 128 columns
  float threshold;
  int32_t reserved;
} scap_weight;

// Runs body(context, i) for i in [0, count), in parallel where it can; returns when all are done.
typedef void (*scap_parallel)(void* pool, int64_t count, void (*body)(void*, int64_t), void* context);

typedef struct {
  const void* x;  // [rows, k] contiguous, of x_type: F32, F16 or BF16
  const scap_weight* weights;
  void* const* outputs;  // one [rows, n] a weight, of x_type; with an activation one in all, [rows, n]
  uint64_t* dropped;     // dropped inputs of each weight are added here; may be NULL
  scap_parallel parallel;
  void* pool;
  int64_t rows, k, threads;
  int32_t count, x_type, activation;
  float mode;
} scap_call;

// 0, or a negative number: -1 an argument that makes no sense, -2 out of memory.
int scap_run(const scap_call* call);

// Name of the instruction set in use: avx512_bf16, avx512, avx2 or portable. The environment variable SCAP_NNCF_ISA forces one.
const char* scap_isa(void);
// Use another one; returns 0, or -1 where this machine or build has no such instruction set.
int scap_force_isa(const char* name);

// Stock weights of a layer [n, k] to the layout above. Element (n, k) of data is number n * stride_n + k * stride_k,
// that of scale and zero n * scale_stride_n + group * scale_stride_g. data_type: F32, F16, BF16, U8 or U4 (nibbles, low
// one first), is_signed for i8 and i4. zero_bits: 0 (none), 4 or 8, with the sign of the data.
typedef struct {
  const void *data, *scale, *zero;
  int64_t n, k, group, stride_n, stride_k, scale_stride_n, scale_stride_g;
  int32_t data_type, is_signed, scale_type, zero_bits;
} scap_source;

// Bytes needed, and the layout, in *weight (pointers are left alone). threads: how many will share a layer.
int64_t scap_pack_bytes(const scap_source* source, int64_t threads, scap_weight* weight);
// Fill memory of that size, aligned to 64 bytes, and the pointers data, scale and zero of *weight.
int scap_pack(const scap_source* source, scap_weight* weight, void* memory, scap_parallel parallel, void* pool);

// A pool for scap_call.parallel that runs on OpenMP: pool points to a scap_openmp.
typedef struct {
  void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned);
  int64_t threads;
} scap_openmp;
void scap_parallel_openmp(void* pool, int64_t count, void (*body)(void*, int64_t), void* context);

const char* scap_build(void);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
