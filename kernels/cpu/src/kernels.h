// SPDX-License-Identifier: Apache-2.0
//
// The kernels, once for every instruction set: included after a namespace-local `struct Isa` (see isa_*.cpp) with lanes
// of Isa::L floats. Nothing of the standard library's templates is used here: the linker could take the copy that was
// compiled for another instruction set.

namespace {

using V = Isa::V;
using I = Isa::I;
constexpr int L = Isa::L;

inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, body = h & 0x7fffu;
  if (body >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (body & 0x3ffu) << 13);
  if (body < 0x400u) {  // subnormal: exact in float
    const float v = float(body) * 5.9604644775390625e-08f;
    return sign ? -v : v;
  }
  return bits_to_float(sign | ((body << 13) + 0x38000000u));
}

inline uint16_t float_to_half(float f) {  // round to nearest even
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000u, body = u & 0x7fffffffu;
  if (body > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (body >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (body < 0x38800000u) {  // subnormal: the addition rounds
    const float v = bits_to_float(body) + 0.5f;
    return uint16_t(sign | (float_to_bits(v) - 0x3f000000u));
  }
  return uint16_t(sign | ((body - 0x38000000u + 0xfffu + ((body >> 13) & 1u)) >> 13));
}

inline float bfloat_to_float(uint16_t b) { return bits_to_float(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float scalar_at(const void* data, int32_t type, int64_t i) {
  switch (type) {
    case SCAP_F32: return static_cast<const float*>(data)[i];
    case SCAP_F16: return half_to_float(static_cast<const uint16_t*>(data)[i]);
    case SCAP_BF16: return bfloat_to_float(static_cast<const uint16_t*>(data)[i]);
    case SCAP_U8: return float(static_cast<const uint8_t*>(data)[i]);
    default: return float(static_cast<const int16_t*>(data)[i]);
  }
}

inline V vector_at(const void* data, int32_t type, int64_t i) {
  if (type == SCAP_F32) return Isa::load(static_cast<const float*>(data) + i);
  if (type == SCAP_F16) return Isa::load_f16(static_cast<const uint16_t*>(data) + i);
  if (type == SCAP_BF16) return Isa::load_bf16(static_cast<const uint16_t*>(data) + i);
  if (type == SCAP_U8) return Isa::load_u8(static_cast<const uint8_t*>(data) + i);
  float lanes[L];
  for (int l = 0; l < L; ++l) lanes[l] = scalar_at(data, type, i + l);
  return Isa::load(lanes);
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// -- inputs and outputs ------------------------------------------------------------------------------------------------

void to_float(const void* x, int32_t type, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + L <= count; i += L) Isa::store(out + i, vector_at(x, type, i));
  for (; i < count; ++i) out[i] = scalar_at(x, type, i);
}

void from_float(const float* x, int32_t type, int64_t count, void* out) {
  if (type == SCAP_F32) {
    __builtin_memcpy(out, x, size_t(count) * 4);
  } else {
    uint16_t* half = static_cast<uint16_t*>(out);
    if (type == SCAP_BF16)
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_bfloat(x[i]);
    else
      for (int64_t i = 0; i < count; ++i) half[i] = float_to_half(x[i]);
  }
}

int64_t compact(const float* x, int64_t k, float mode, float threshold, int32_t* index, float* value) {
  int64_t n = 0, i = 0;
  Isa::compact(x, k, mode, threshold, index, value, &i, &n);
  for (; i < k; ++i) {
    const float z = x[i] - mode;
    index[n] = int32_t(i);
    value[n] = z;
    n += !(__builtin_fabsf(z) <= threshold);
  }
  return n;
}

void prune(const float* x, int64_t k, float mode, float threshold, float* out) {
  for (int64_t i = 0; i < k; ++i) {
    const float z = x[i] - mode;
    out[i] = __builtin_fabsf(z) <= threshold ? 0.0f : z;
  }
}

// -- one token ---------------------------------------------------------------------------------------------------------

// acc[c] += sum over R rows; `columns` readable ones, a multiple of L for float formats and of the unit for words
template <int32_t F>
struct Rows;

template <int32_t F>
struct FloatRows {
  static constexpr int kBytes = F == SCAP_F32 ? 4 : 2;
  static inline V load(const uint8_t* row, int64_t c) {
    if (F == SCAP_F32) return Isa::load(reinterpret_cast<const float*>(row) + c);
    if (F == SCAP_F16) return Isa::load_f16(reinterpret_cast<const uint16_t*>(row) + c);
    return Isa::load_bf16(reinterpret_cast<const uint16_t*>(row) + c);
  }
  template <int R>
  static inline void add(const uint8_t* const* rows, const uint8_t* const* next, const float* z, int64_t columns,
                         int64_t tail, float* acc) {
    constexpr int64_t kLine = 64 / kBytes;
    V zs[R];
    for (int r = 0; r < R; ++r) zs[r] = Isa::set1(z[r]);
    int64_t c = 0;
    for (; c + kLine <= columns; c += kLine) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + c * kBytes);
      for (int64_t q = c; q < c + kLine; q += L) {
        V sum = Isa::load(acc + q);
        for (int r = 0; r < R; ++r) sum = Isa::fma(load(rows[r], q), zs[r], sum);
        Isa::store(acc + q, sum);
      }
    }
    for (; c < columns; c += L) {
      V sum = Isa::load(acc + c);
      for (int r = 0; r < R; ++r) sum = Isa::fma(load(rows[r], c), zs[r], sum);
      Isa::store(acc + c, sum);
    }
    for (int64_t t = c; t < c + tail; ++t)
      for (int r = 0; r < R; ++r) acc[t] = Isa::fma1(scalar_at(rows[r], F, t), z[r], acc[t]);
  }
};

template <>
struct Rows<SCAP_F32> : FloatRows<SCAP_F32> {};
template <>
struct Rows<SCAP_F16> : FloatRows<SCAP_F16> {};
template <>
struct Rows<SCAP_BF16> : FloatRows<SCAP_BF16> {};

// `unit` of a word's field: what the instruction set finds cheapest is the value times a power of two
template <int32_t F>
inline I flip(I words) {
  return Isa::flip(words, F == SCAP_U8 ? 0x80808080u : 0x88888888u);
}

template <int32_t F, int J>
inline V field(I flipped) {
  if constexpr (F == SCAP_U8)
    return Isa::template byte<J>(flipped);
  else
    return Isa::template nibble<J>(flipped);
}

template <int32_t F>
constexpr float unit() {
  return F == SCAP_U8 ? Isa::kByteUnit : Isa::kNibbleUnit;
}

template <int32_t F>
struct WordRows {
  static constexpr int kFields = F == SCAP_U8 ? 4 : 8;
  template <int R, int J>
  static inline void fields(const I* words, const V* zs, float* acc) {
    if constexpr (J < kFields) {
      V sum = Isa::load(acc + 16 * J);
      for (int r = 0; r < R; ++r) sum = Isa::fma(field<F, J>(words[r]), zs[r], sum);
      Isa::store(acc + 16 * J, sum);
      fields<R, J + 1>(words, zs, acc);
    }
  }
  template <int R>
  static inline void add(const uint8_t* const* rows, const uint8_t* const* next, const float* z, int64_t columns,
                         int64_t, float* acc) {
    V zs[R];
    for (int r = 0; r < R; ++r) zs[r] = Isa::set1(z[r]);
    const int64_t lines = columns / (16 * kFields);
    for (int64_t b = 0; b < lines; ++b) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(next[r] + 64 * b);
      for (int part = 0; part < 16; part += L) {
        I words[R];
        for (int r = 0; r < R; ++r)
          words[r] = flip<F>(Isa::load_words(reinterpret_cast<const uint32_t*>(rows[r]) + 16 * b + part));
        fields<R, 0>(words, zs, acc + b * 16 * kFields + part);
      }
    }
  }
};

template <>
struct Rows<SCAP_U8> : WordRows<SCAP_U8> {};
template <>
struct Rows<SCAP_U4> : WordRows<SCAP_U4> {};

constexpr int64_t kAhead = 8192;  // bytes of kept rows; 15 to 20 % on layers of 576 columns

template <int32_t F, int R>
void add_rows(const uint8_t* base, int64_t row_bytes, const int32_t* index, const float* z, int64_t count,
              int64_t listed, int64_t read_bytes, int64_t columns, int64_t tail, float* acc) {
  const uint8_t *rows[R], *next[R];
  // far enough ahead for memory to answer: short rows are through before it does
  const int64_t ahead = R * (1 + kAhead / (R * read_bytes + 1));
  int64_t i = 0;
  for (; i + R <= count; i += R) {
    for (int r = 0; r < R; ++r) {
      rows[r] = base + index[i + r] * row_bytes;
      next[r] = base + index[least(i + ahead + r, listed - 1)] * row_bytes;
    }
    Rows<F>::template add<R>(rows, next, z + i, columns, tail, acc);
  }
  for (; i < count; ++i) {
    rows[0] = next[0] = base + index[i] * row_bytes;
    Rows<F>::template add<1>(rows, next, z + i, columns, tail, acc);
  }
}

inline void clear(float* acc, int64_t count) { __builtin_memset(acc, 0, size_t(count) * 4); }

// total[c] (+)= scale[g, c] * (sum[c] * unit - (zero[g, c] - half) * zsum), or + zero * zsum for float offsets
void fold(const scap_weight* w, int64_t g, int64_t c0, int64_t columns, float unit, float half, float zsum, float* sum,
          float* total, bool first) {
  const int64_t at = g * w->scale_columns + c0;
  const bool offset = w->zero && w->zero_type <= SCAP_BF16;
  const V u = Isa::set1(unit), h = Isa::set1(half), zs = Isa::set1(zsum);
  int64_t c = 0;
  for (; c + L <= columns; c += L) {
    V y = Isa::mul(Isa::load(sum + c), u);
    const V s = vector_at(w->scale, w->scale_type, at + c);
    if (!w->zero) {
      y = Isa::mul(y, s);
    } else {
      const V z = vector_at(w->zero, w->zero_type, at + c);
      y = offset ? Isa::fma(z, zs, Isa::mul(y, s)) : Isa::mul(Isa::fma(Isa::sub(h, z), zs, y), s);
    }
    Isa::store(total + c, first ? y : Isa::add(Isa::load(total + c), y));
  }
  for (; c < columns; ++c) {
    float y = sum[c] * unit;
    const float s = scalar_at(w->scale, w->scale_type, at + c);
    if (!w->zero) {
      y *= s;
    } else {
      const float z = scalar_at(w->zero, w->zero_type, at + c);
      y = offset ? Isa::fma1(z, zsum, y * s) : Isa::fma1(half - z, zsum, y) * s;
    }
    total[c] = first ? y : total[c] + y;
  }
}

template <int32_t F>
void gemv_format(const scap_weight* w, const Kept* kept, int64_t c0, int64_t c1, float* work, float* out) {
  constexpr bool kWords = F == SCAP_U8 || F == SCAP_U4;
  constexpr int R = kWords ? Isa::kWordRows : Isa::kFloatRows;
  constexpr int64_t kUnit = F == SCAP_U4 ? 128 : 64;
  const int64_t chunk = kWords && kept->groups == 1 ? kWideChunk : kChunk;
  for (int64_t a = c0; a < c1;) {
    const int64_t tile = a / w->tile_columns, in_tile = a - tile * w->tile_columns;
    const int64_t b = least(least(a + chunk, c1), (tile + 1) * w->tile_columns), columns = b - a;
    const uint8_t* base = static_cast<const uint8_t*>(w->data) + tile * w->tile_bytes;
    if (kWords)
      base += F == SCAP_U8 ? in_tile : in_tile / 2;
    else
      base += in_tile * (F == SCAP_F32 ? 4 : 2);
    const int64_t readable = kWords || w->padded ? (columns + kUnit - 1) / kUnit * kUnit : columns / L * L;
    const int64_t tail = readable < columns ? columns - readable : 0;
    float* sum = work;
    const int64_t read_bytes = F == SCAP_U4 ? columns / 2 : F == SCAP_U8 ? columns : columns * (F == SCAP_F32 ? 4 : 2);
    const int64_t held = readable > columns ? readable : columns;
    if (!kWords) {
      clear(sum, held);
      add_rows<F, R>(base, w->row_bytes, kept->index, kept->value, kept->starts[kept->groups], kept->starts[kept->groups],
                     read_bytes, readable, tail, sum);
      float* y = out + (a - c0);
      if (w->bias)
        for (int64_t c = 0; c < columns; ++c) y[c] = sum[c] + w->bias[a + c];
      else
        __builtin_memcpy(y, sum, size_t(columns) * 4);
    } else {
      float* y = out + (a - c0);
      const float half = F == SCAP_U8 ? 128.0f : 8.0f;
      bool first = true;
      for (int64_t g = 0; g < kept->groups; ++g) {
        const int64_t from = kept->starts[g], to = kept->starts[g + 1];
        if (from == to) continue;  // its sum of z is zero too
        clear(sum, held);
        add_rows<F, R>(base, w->row_bytes, kept->index + from, kept->value + from, to - from, kept->starts[kept->groups] - from,
                       read_bytes, readable, 0, sum);
        fold(w, g, a, columns, unit<F>(), half, kept->sums[g], sum, y, first);
        first = false;
      }
      if (first) clear(y, columns);
      if (w->bias)
        for (int64_t c = 0; c < columns; ++c) y[c] += w->bias[a + c];
    }
    a = b;
  }
}

void gemv(const scap_weight* w, const Kept* kept, int64_t c0, int64_t c1, float* work, float* out) {
  switch (w->format) {
    case SCAP_F32: return gemv_format<SCAP_F32>(w, kept, c0, c1, work, out);
    case SCAP_F16: return gemv_format<SCAP_F16>(w, kept, c0, c1, work, out);
    case SCAP_BF16: return gemv_format<SCAP_BF16>(w, kept, c0, c1, work, out);
    case SCAP_U8: return gemv_format<SCAP_U8>(w, kept, c0, c1, work, out);
    default: return gemv_format<SCAP_U4>(w, kept, c0, c1, work, out);
  }
}

// -- many tokens: decompress a block of weights, multiply all of them --------------------------------------------------

template <int32_t F, int J>
inline void word_fields(I words, float* out) {
  if constexpr (J < WordRows<F>::kFields) {
    Isa::store(out + 16 * J, field<F, J>(words));
    word_fields<F, J + 1>(words, out);
  }
}

// Row k of the columns [c0, c0 + columns) as floats; the rest of the block is zero.
template <int32_t F>
inline void expand_row(const scap_weight* w, const uint8_t* row, int64_t g, int64_t c0, int64_t columns, int64_t block,
                       float* out) {
  if (F == SCAP_U8 || F == SCAP_U4) {
    for (int part = 0; part < 16; part += L)
      for (int64_t b = 0; b * 16 * WordRows<F>::kFields < block; ++b)
        word_fields<F, 0>(flip<F>(Isa::load_words(reinterpret_cast<const uint32_t*>(row) + 16 * b + part)),
                          out + b * 16 * WordRows<F>::kFields + part);
    const float half = F == SCAP_U8 ? 128.0f : 8.0f;
    const int64_t at = g * w->scale_columns + c0;
    const bool offset = w->zero && w->zero_type <= SCAP_BF16;
    const V u = Isa::set1(unit<F>()), h = Isa::set1(half);
    int64_t c = 0;
    for (; c + L <= columns; c += L) {
      V y = Isa::mul(Isa::load(out + c), u);
      const V s = vector_at(w->scale, w->scale_type, at + c);
      if (!w->zero) {
        y = Isa::mul(y, s);
      } else {
        const V z = vector_at(w->zero, w->zero_type, at + c);
        y = offset ? Isa::fma(y, s, z) : Isa::mul(Isa::add(y, Isa::sub(h, z)), s);
      }
      Isa::store(out + c, y);
    }
    for (; c < columns; ++c) {
      const float y = out[c] * unit<F>(), s = scalar_at(w->scale, w->scale_type, at + c);
      const float z = w->zero ? scalar_at(w->zero, w->zero_type, at + c) : 0.0f;
      out[c] = !w->zero ? y * s : offset ? Isa::fma1(y, s, z) : (y + (half - z)) * s;
    }
    for (; c < block; ++c) out[c] = 0.0f;
  } else {
    int64_t c = 0;
    for (; c + L <= columns; c += L) Isa::store(out + c, FloatRows<F == SCAP_U8 || F == SCAP_U4 ? SCAP_F32 : F>::load(row, c));
    for (; c < columns; ++c) out[c] = scalar_at(row, F, c);
    for (; c < block; ++c) out[c] = 0.0f;
  }
}

template <int M>
inline void micro(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc) {
  constexpr int N = Isa::kMicroVectors;
  V acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = Isa::load(c + m * ldc + n * L);
  for (int64_t k = 0; k < depth; ++k) {
    V bs[N];
    for (int n = 0; n < N; ++n) bs[n] = Isa::load(b + k * ldb + n * L);
    for (int m = 0; m < M; ++m) {
      const V as = Isa::set1(a[m * lda + k]);
      for (int n = 0; n < N; ++n) acc[m][n] = Isa::fma(as, bs[n], acc[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) Isa::store(c + m * ldc + n * L, acc[m][n]);
}

template <int32_t F>
void gemm_format(const scap_weight* w, const float* a, int64_t m, int64_t k, int64_t c0, int64_t c1, float* work,
                 float* out) {
  constexpr int64_t kBlock = F == SCAP_U4 ? 128 : 64, kOut = 128, kDepth = kScratch / kBlock;
  constexpr int M = Isa::kMicroRows, kColumns = Isa::kMicroVectors * L;
  const int64_t columns = c1 - c0, tile = c0 / w->tile_columns, in_tile = c0 - tile * w->tile_columns;
  const uint8_t* base = static_cast<const uint8_t*>(w->data) + tile * w->tile_bytes;
  base += F == SCAP_U8 ? in_tile : F == SCAP_U4 ? in_tile / 2 : in_tile * (F == SCAP_F32 ? 4 : 2);
  for (int64_t r = 0; r < m; ++r) clear(out + r * kOut, kBlock);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = least(kDepth, k - k0);
    for (int64_t i = 0; i < depth; ++i)
      expand_row<F>(w, base + (k0 + i) * w->row_bytes, (k0 + i) / w->group, c0, columns, kBlock, work + i * kBlock);
    for (int64_t n = 0; n < kBlock; n += kColumns) {
      int64_t r = 0;
      for (; r + M <= m; r += M) micro<M>(a + r * k + k0, k, work + n, kBlock, depth, out + r * kOut + n, kOut);
      for (; r < m; ++r) micro<1>(a + r * k + k0, k, work + n, kBlock, depth, out + r * kOut + n, kOut);
    }
  }
  if (w->bias)
    for (int64_t r = 0; r < m; ++r)
      for (int64_t c = 0; c < columns; ++c) out[r * kOut + c] += w->bias[c0 + c];
}

void gemm(const scap_weight* w, const float* a, int64_t m, int64_t k, int64_t c0, int64_t c1, float* work, float* out) {
  switch (w->format) {
    case SCAP_F32: return gemm_format<SCAP_F32>(w, a, m, k, c0, c1, work, out);
    case SCAP_F16: return gemm_format<SCAP_F16>(w, a, m, k, c0, c1, work, out);
    case SCAP_BF16: return gemm_format<SCAP_BF16>(w, a, m, k, c0, c1, work, out);
    case SCAP_U8: return gemm_format<SCAP_U8>(w, a, m, k, c0, c1, work, out);
    default: return gemm_format<SCAP_U4>(w, a, m, k, c0, c1, work, out);
  }
}

// -- activations -------------------------------------------------------------------------------------------------------

inline V sigmoid(V x) {
  const V one = Isa::set1(1.0f);
  return Isa::div(one, Isa::add(one, Isa::exp(Isa::sub(Isa::set1(0.0f), x))));
}

// Half of erfc(|x| / sqrt 2), i.e. the tail of the normal distribution: Abramowitz and Stegun, 7.1.26
inline V normal_tail(V magnitude) {
  const V a = Isa::mul(magnitude, Isa::set1(0.70710678118654752f));
  const V t = Isa::div(Isa::set1(1.0f), Isa::fma(Isa::set1(0.3275911f), a, Isa::set1(1.0f)));
  V p = Isa::set1(1.061405429f);
  p = Isa::fma(p, t, Isa::set1(-1.453152027f));
  p = Isa::fma(p, t, Isa::set1(1.421413741f));
  p = Isa::fma(p, t, Isa::set1(-0.284496736f));
  p = Isa::fma(p, t, Isa::set1(0.254829592f));
  return Isa::mul(Isa::mul(Isa::mul(p, t), Isa::set1(0.5f)), Isa::exp(Isa::sub(Isa::set1(0.0f), Isa::mul(a, a))));
}

inline V activate(V x, int32_t activation) {
  const V zero = Isa::set1(0.0f);
  switch (activation) {
    case SCAP_SILU: return Isa::mul(x, sigmoid(x));
    case SCAP_GELU: {
      const V tail = normal_tail(Isa::max(x, Isa::sub(zero, x)));
      return Isa::mul(x, Isa::where_negative(x, tail, Isa::sub(Isa::set1(1.0f), tail)));
    }
    case SCAP_GELU_TANH: {  // (1 + tanh u) / 2 = sigmoid(2 u)
      const V cube = Isa::mul(Isa::mul(x, x), x);
      return Isa::mul(x, sigmoid(Isa::mul(Isa::set1(1.5957691216057308f), Isa::fma(Isa::set1(0.044715f), cube, x))));
    }
    case SCAP_RELU: return Isa::max(zero, x);
    default: {
      const V r = Isa::max(zero, x);
      return Isa::mul(r, r);
    }
  }
}

void glu(float* gate, const float* up, int64_t count, int32_t activation) {
  for (int64_t c = 0; c < count; c += L)
    Isa::store(gate + c, Isa::mul(activate(Isa::load(gate + c), activation), Isa::load(up + c)));
}

}  // namespace

#define SCAP_KERNELS(name) {name, to_float, from_float, compact, prune, gemv, gemm, glu, nullptr}
