// SPDX-License-Identifier: Apache-2.0
//
// Choice of the instruction set, division of the work, and packing of weights; see sparse_fc.h.

#include "sparse_fc.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"

namespace {

using scap::Kept;
using scap::Kernels;

// -- instruction set ---------------------------------------------------------------------------------------------------

const Kernels* by_name(const char* name) {
  for (const Kernels* kernels : {scap::avx512_bf16_kernels(), scap::avx512_kernels(), scap::avx2_kernels(),
                                 scap::portable_kernels()})
    if (kernels && std::strcmp(kernels->name, name) == 0) return kernels;
  return nullptr;
}

const Kernels* best() {
  if (const char* wanted = std::getenv("SCAP_NNCF_ISA"))
    if (const Kernels* kernels = by_name(wanted)) return kernels;
  for (const Kernels* kernels : {scap::avx512_bf16_kernels(), scap::avx512_kernels(), scap::avx2_kernels()})
    if (kernels) return kernels;
  return scap::portable_kernels();
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

// -- memory ------------------------------------------------------------------------------------------------------------

// A thread's scratch: grows, is reused, never shrinks below what one call needs.
template <class T>
struct Buffer {
  T* get(size_t count) {
    if (count > size) {
      memory.reset();
      size = 0;
      memory.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      if (!memory) throw std::bad_alloc();
      size = count;
    }
    return memory.get();
  }
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory;
  size_t size = 0;
};

void serial(void*, int64_t count, void (*body)(void*, int64_t), void* context) {
  for (int64_t i = 0; i < count; ++i) body(context, i);
}

template <class F>
void parallel(scap_parallel run, void* pool, int64_t count, F&& f) {
  if (count <= 1 || !run) return serial(nullptr, count, [](void* c, int64_t i) { (*static_cast<F*>(c))(i); }, &f);
  run(pool, count, [](void* c, int64_t i) { (*static_cast<F*>(c))(i); }, &f);
}

int64_t up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

bool sound(const scap_call* call) {
  if (!call || !call->x || !call->weights || !call->outputs || call->count < 1 || call->rows < 0 || call->k < 1) return false;
  if (call->k > INT32_MAX - 64 || call->x_type < SCAP_F32 || call->x_type > SCAP_BF16) return false;
  if (call->activation < SCAP_LINEAR || call->activation > SCAP_RELU2) return false;
  if (call->activation != SCAP_LINEAR && (call->count != 2 || call->weights[0].n != call->weights[1].n)) return false;
  for (int i = 0; i < call->count; ++i) {
    const scap_weight& w = call->weights[i];
    const bool words = w.format == SCAP_U8 || w.format == SCAP_U4;
    if (!w.data || w.format < SCAP_F32 || w.format > SCAP_U4 || w.n < 1 || w.group < 1 || call->k % w.group) return false;
    if (words != (w.scale != nullptr) || (words && (w.scale_type < SCAP_F32 || w.scale_type > SCAP_BF16))) return false;
    if (w.zero && (w.zero_type < SCAP_F32 || w.zero_type > SCAP_I16 || w.zero_type == SCAP_U4)) return false;
    if (w.tile_columns < w.n && w.tile_columns % scap::unit_columns(w.format)) return false;
    if (w.tile_columns < 1 || (words && w.scale_columns < w.n)) return false;
  }
  return true;
}

// -- one call ----------------------------------------------------------------------------------------------------------

// Kept inputs of some tokens for one threshold.
struct Lists {
  Buffer<int32_t> index;
  Buffer<float> value, sums;
  Buffer<int64_t> starts;
  std::vector<Kept> kept;  // one a token
};

struct Workspace {
  Buffer<float> x, z, work, block, out;
  Buffer<uint16_t> half;
  std::vector<std::unique_ptr<Lists>> lists;
};

Workspace& workspace() {
  static thread_local Workspace space;
  return space;
}

class Run {
 public:
  explicit Run(const scap_call* call) : call_(*call), kernels_(current().load()), space_(workspace()) {
    if (call_.threads < 1) call_.threads = 1;
    size_ = call_.x_type == SCAP_F32 ? 4 : 2;
    fused_ = call_.activation != SCAP_LINEAR;
    const int outputs = fused_ ? 1 : call_.count;
    for (int i = 0; i < outputs; ++i) {
      begins_.push_back(units_);
      units_ += up(weight(i).n, unit(i)) / unit(i);
    }
    begins_.push_back(units_);
  }

  void operator()() {
    if (call_.rows == 0) return;
    if (few_tokens() && sparse()) return;
    dense();
  }

 private:
  const scap_weight& weight(int i) const { return call_.weights[i]; }
  int64_t unit(int i) const {
    const int64_t own = scap::unit_columns(weight(i).format);
    return fused_ ? std::max(own, scap::unit_columns(weight(1).format)) : own;
  }
  const void* row(int64_t r) const { return static_cast<const char*>(call_.x) + size_t(r * call_.k) * size_; }

  const float* as_float(int64_t r) {
    if (call_.x_type == SCAP_F32) return static_cast<const float*>(row(r));
    float* x = space_.x.get(size_t(call_.k));
    kernels_->to_float(row(r), call_.x_type, call_.k, x);
    return x;
  }

  // Worth trying without decompressing everything: reading kept rows for each token costs about `kept` passes.
  bool few_tokens() const { return call_.rows <= 8; }

  // Which list a weight uses: those with one threshold and one group size share it.
  int list_of(int i) const {
    for (int j = 0; j < i; ++j)
      if (weight(j).threshold == weight(i).threshold && weight(j).group == weight(i).group) return j;
    return i;
  }

  bool sparse() {
    const size_t room = size_t(call_.k) + 16;
    int64_t total = 0, weighted = 0;
    while (space_.lists.size() < size_t(call_.count)) space_.lists.push_back(std::make_unique<Lists>());
    for (int i = 0; i < call_.count; ++i) {
      Lists& lists = *space_.lists[size_t(i)];
      lists.kept.clear();
      if (list_of(i) != i) continue;
      const int64_t group = weight(i).group, groups = call_.k / group;
      const size_t rows = size_t(call_.rows);
      int32_t* index = lists.index.get(rows * room);
      float* value = lists.value.get(rows * room);
      float* sums = lists.sums.get(rows * size_t(groups));
      int64_t* starts = lists.starts.get(rows * size_t(groups + 1));
      for (int64_t r = 0; r < call_.rows; ++r, index += room, value += room, sums += groups, starts += groups + 1) {
        const int64_t n = kernels_->compact(as_float(r), call_.k, call_.mode, weight(i).threshold, index, value);
        int64_t at = 0;
        for (int64_t g = 0; g < groups; ++g) {
          starts[g] = at;
          double sum = 0;
          for (const int64_t end = (g + 1) * group; at < n && index[at] < end; ++at) sum += double(value[at]);
          sums[g] = float(sum);
        }
        starts[groups] = n;
        lists.kept.push_back(Kept{index, value, starts, sums, groups});
      }
    }
    for (int i = 0; i < call_.count; ++i)
      for (const Kept& kept : space_.lists[size_t(list_of(i))]->kept) {
        weighted += kept.starts[kept.groups] * weight(i).n;
        total += call_.k * weight(i).n;
      }
    if (weighted > 2 * (total / call_.rows)) return false;
    if (call_.dropped)
      for (int i = 0; i < call_.count; ++i)
        for (const Kept& kept : space_.lists[size_t(list_of(i))]->kept)
          call_.dropped[i] += uint64_t(call_.k - kept.starts[kept.groups]);
    // a thread is worth its start from some 20 KB of weights on
    const int64_t threads = std::max<int64_t>(1, std::min({call_.threads, units_, weighted / 20000}));
    parallel(call_.parallel, call_.pool, threads, [&](int64_t t) {
      columns(units_ * t / threads, units_ * (t + 1) / threads);
    });
    return true;
  }

  // The units [from, to) for all tokens.
  void columns(int64_t from, int64_t to) {
    Workspace& space = workspace();
    float* work = space.work.get(2 * scap::kWideChunk);
    for (int i = 0; i + 1 < int(begins_.size()); ++i) {
      const int64_t a = std::max(from, begins_[size_t(i)]) - begins_[size_t(i)];
      const int64_t b = std::min(to, begins_[size_t(i) + 1]) - begins_[size_t(i)];
      if (a >= b) continue;
      const int64_t c0 = a * unit(i), c1 = std::min(b * unit(i), weight(i).n), width = c1 - c0, held = up(width, 128);
      const bool direct = !fused_ && call_.x_type == SCAP_F32;
      float* y = direct ? nullptr : space.out.get(size_t(2 * held));
      for (int64_t r = 0; r < call_.rows; ++r) {
        const Kept* kept = &space_.lists[size_t(list_of(i))]->kept[size_t(r)];
        char* out = static_cast<char*>(call_.outputs[i]) + size_t(r * weight(i).n + c0) * size_;
        if (direct) {
          kernels_->gemv(&weight(i), kept, c0, c1, work, reinterpret_cast<float*>(out));
          continue;
        }
        kernels_->gemv(&weight(i), kept, c0, c1, work, y);
        if (fused_) {
          std::fill(y + width, y + held, 0.0f);
          std::fill(y + held + width, y + 2 * held, 0.0f);
          kernels_->gemv(&weight(1), &space_.lists[size_t(list_of(1))]->kept[size_t(r)], c0, c1, work, y + held);
          kernels_->glu(y, y + held, up(width, 16), call_.activation);
        }
        kernels_->from_float(y, call_.x_type, width, out);
      }
    }
  }

  void dense() {
    for (int64_t r0 = 0; r0 < call_.rows; r0 += scap::kGemmRows) {
      const int64_t rows = std::min(scap::kGemmRows, call_.rows - r0);
      // pruned inputs, once for each threshold
      std::vector<const float*> inputs;
      float* z = nullptr;
      int distinct = 0;
      for (int i = 0; i < call_.count; ++i) distinct += threshold_of(i) == i;
      z = space_.z.get(size_t(distinct * rows * call_.k));
      for (int i = 0; i < call_.count; ++i) {
        const int first = threshold_of(i);
        if (first != i) {
          inputs.push_back(inputs[size_t(first)]);
          continue;
        }
        if (call_.x_type == SCAP_F32 && weight(i).threshold < 0 && call_.mode == 0.0f) {
          inputs.push_back(static_cast<const float*>(row(r0)));
          continue;
        }
        const int64_t pieces = std::min(call_.threads, rows);
        parallel(call_.parallel, call_.pool, pieces, [&, z](int64_t t) {
          for (int64_t r = rows * t / pieces; r < rows * (t + 1) / pieces; ++r) {
            const float* x = static_cast<const float*>(row(r0 + r));
            if (call_.x_type != SCAP_F32) {
              float* wide = workspace().x.get(size_t(call_.k));
              kernels_->to_float(row(r0 + r), call_.x_type, call_.k, wide);
              x = wide;
            }
            kernels_->prune(x, call_.k, call_.mode, weight(i).threshold, z + r * call_.k);
          }
        });
        inputs.push_back(z);
        z += rows * call_.k;
      }
      if (call_.dropped)
        for (int i = 0; i < call_.count; ++i) call_.dropped[i] += zeros(inputs[size_t(i)], rows, weight(i).threshold);
      const std::vector<const uint16_t*> halves = as_bfloat(inputs, rows);
      const int64_t threads = std::min(call_.threads, units_);
      parallel(call_.parallel, call_.pool, threads, [&](int64_t t) {
        for (int64_t u = units_ * t / threads; u < units_ * (t + 1) / threads; ++u) block(u, r0, rows, inputs, halves);
      });
    }
  }

  int threshold_of(int i) const {
    for (int j = 0; j < i; ++j)
      if (weight(j).threshold == weight(i).threshold) return j;
    return i;
  }

  uint64_t zeros(const float* z, int64_t rows, float threshold) const {
    if (threshold < 0) return 0;
    uint64_t count = 0;
    for (int64_t e = 0; e < rows * call_.k; ++e) count += z[e] == 0.0f;
    return count;
  }

  // The inputs as bfloat16, for each weight, where nothing is lost by it and products of those are to be had.
  std::vector<const uint16_t*> as_bfloat(const std::vector<const float*>& inputs, int64_t rows) {
    std::vector<const uint16_t*> halves;
    if (!kernels_->gemm_bf16) return halves;
    for (int i = 0; i < call_.count; ++i) {
      const scap_weight& w = weight(i);
      const bool offset = w.zero && w.zero_type != SCAP_U8;  // others may be too far off for a bfloat16
      if ((w.format != SCAP_BF16 && w.format != SCAP_U8 && w.format != SCAP_U4) || offset || call_.k % 2 || w.group % 2)
        return halves;
    }
    const int64_t size = rows * call_.k;
    uint16_t* all = space_.half.get(size_t(size * call_.count));
    for (int i = 0; i < call_.count; ++i) {
      int same = 0;
      while (inputs[size_t(same)] != inputs[size_t(i)]) ++same;
      if (same < i) {
        halves.push_back(halves[size_t(same)]);
        continue;
      }
      const float* z = inputs[size_t(i)];
      uint16_t* half = all + i * size;
      const int64_t pieces = std::min(call_.threads, rows);
      std::atomic<uint32_t> lost{0};
      parallel(call_.parallel, call_.pool, pieces, [&](int64_t t) {
        uint32_t low = 0;
        for (int64_t e = rows * t / pieces * call_.k; e < rows * (t + 1) / pieces * call_.k; ++e) {
          uint32_t bits;
          std::memcpy(&bits, z + e, 4);
          low |= bits & 0xffffu;
          half[e] = uint16_t(bits >> 16);
        }
        if (low) lost = 1;
      });
      if (lost) return {};
      halves.push_back(half);
    }
    return halves;
  }

  // One unit of columns for `rows` tokens.
  void block(int64_t u, int64_t r0, int64_t rows, const std::vector<const float*>& inputs,
             const std::vector<const uint16_t*>& halves) {
    int i = 0;
    while (u >= begins_[size_t(i) + 1]) ++i;
    const int64_t c0 = (u - begins_[size_t(i)]) * unit(i), c1 = std::min(c0 + unit(i), weight(i).n);
    Workspace& space = workspace();
    float* work = space.work.get(std::max(2 * scap::kWideChunk, scap::kScratch));
    float* y = space.block.get(size_t(2 * 128 * scap::kGemmRows));
    float* up_y = y + 128 * scap::kGemmRows;
    product(i, inputs, halves, rows, c0, c1, work, y);
    if (fused_) product(1, inputs, halves, rows, c0, c1, work, up_y);
    for (int64_t r = 0; r < rows; ++r) {
      if (fused_) kernels_->glu(y + r * 128, up_y + r * 128, up(c1 - c0, 16), call_.activation);
      char* out = static_cast<char*>(call_.outputs[i]) + size_t((r0 + r) * weight(i).n + c0) * size_;
      kernels_->from_float(y + r * 128, call_.x_type, c1 - c0, out);
    }
  }

  void product(int i, const std::vector<const float*>& inputs, const std::vector<const uint16_t*>& halves, int64_t rows,
               int64_t c0, int64_t c1, float* work, float* y) {
    // where gate and up have units of their own, the smaller one goes in pieces
    const int64_t own = scap::unit_columns(weight(i).format);
    for (int64_t c = c0; c < c1; c += own) {
      const int64_t end = std::min(c + own, c1);
      if (!halves.empty())
        kernels_->gemm_bf16(&weight(i), halves[size_t(i)], rows, call_.k, c, end, work, y + (c - c0));
      else
        kernels_->gemm(&weight(i), inputs[size_t(i)], rows, call_.k, c, end, work, y + (c - c0));
    }
  }

  scap_call call_;
  const Kernels* kernels_;
  Workspace& space_;
  size_t size_;
  bool fused_;
  int64_t units_ = 0;
  std::vector<int64_t> begins_;
};

// -- packing -----------------------------------------------------------------------------------------------------------

uint32_t element(const scap_source& s, int64_t i) {  // unsigned value of an integer weight
  const uint8_t* data = static_cast<const uint8_t*>(s.data);
  if (s.data_type == SCAP_U8) return data[i] ^ (s.is_signed ? 0x80u : 0u);
  const uint32_t nibble = (data[i / 2] >> (i % 2 * 4)) & 15u;
  return nibble ^ (s.is_signed ? 8u : 0u);
}

size_t bytes_of(int32_t type) { return type == SCAP_F32 ? 4 : type == SCAP_U8 ? 1 : 2; }

// The columns [c0, c0 + 128) of a tile, all input channels.
void pack_columns(const scap_source& s, const scap_weight& w, uint8_t* memory, int64_t c0) {
  const int64_t c1 = std::min(c0 + 128, s.n), tile = c0 / w.tile_columns, in_tile = c0 - tile * w.tile_columns;
  uint8_t* base = memory + tile * w.tile_bytes;
  const bool float_weights = s.data_type <= SCAP_BF16;
  for (int64_t k0 = 0; k0 < s.k; k0 += 64) {  // a few cache lines of source and of destination at a time
    const int64_t k1 = std::min(k0 + 64, s.k);
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t column = in_tile + c - c0;
      if (float_weights) {
        const size_t size = bytes_of(s.data_type);
        const uint8_t* from = static_cast<const uint8_t*>(s.data);
        uint8_t* to = base + size_t(column) * size;
        for (int64_t k = k0; k < k1; ++k) {
          const uint8_t* item = from + size_t(c * s.stride_n + k * s.stride_k) * size;
          if (size == 4)
            std::memcpy(to + k * w.row_bytes, item, 4);
          else
            std::memcpy(to + k * w.row_bytes, item, 2);
        }
      } else if (s.data_type == SCAP_U8) {
        uint8_t* to = base + column / 64 * 64 + column % 16 * 4 + column % 64 / 16;
        for (int64_t k = k0; k < k1; ++k) to[k * w.row_bytes] = uint8_t(element(s, c * s.stride_n + k * s.stride_k));
      } else {
        uint8_t* to = base + column / 128 * 64 + column % 16 * 4 + column % 128 / 32;
        const int shift = column % 32 / 16 * 4;
        for (int64_t k = k0; k < k1; ++k)
          to[k * w.row_bytes] =
              uint8_t(to[k * w.row_bytes] | element(s, c * s.stride_n + k * s.stride_k) << shift);
      }
    }
  }
}

bool sound(const scap_source* s) {
  if (!s || !s->data || s->n < 1 || s->k < 1 || s->group < 1 || s->k % s->group) return false;
  if (s->data_type < SCAP_F32 || s->data_type > SCAP_U4) return false;
  if (s->data_type <= SCAP_BF16) return true;
  return s->scale && s->scale_type >= SCAP_F32 && s->scale_type <= SCAP_BF16 &&
         (s->zero_bits == 0 || (s->zero && (s->zero_bits == 4 || s->zero_bits == 8)));
}

}  // namespace

#ifndef SCAP_BUILD
#define SCAP_BUILD "unknown"
#endif

extern "C" {

// What this library was built for; also found by whoever searches the file for it.
const char* scap_build(void) { return SCAP_BUILD; }

int scap_run(const scap_call* call) {
  if (!sound(call)) return -1;
  try {
    Run run(call);
    run();
    return 0;
  } catch (const std::bad_alloc&) {
    return -2;
  }
}

const char* scap_isa(void) { return current().load()->name; }

int scap_force_isa(const char* name) {
  const Kernels* kernels = name ? by_name(name) : nullptr;
  if (!kernels) return -1;
  current() = kernels;
  return 0;
}

int64_t scap_pack_bytes(const scap_source* s, int64_t threads, scap_weight* w) {
  if (!sound(s) || !w) return -1;
  const bool words = s->data_type >= SCAP_U8;
  const int64_t widest = s->data_type == SCAP_U8 && s->group == s->k ? scap::kWideChunk : scap::kChunk;
  const int64_t share = up((s->n + std::max<int64_t>(threads, 1) - 1) / std::max<int64_t>(threads, 1), 128);
  *w = scap_weight{};
  w->format = s->data_type;
  w->n = s->n;
  w->scale_columns = s->n;
  w->group = words ? s->group : s->k;
  w->scale_type = words ? s->scale_type : SCAP_NONE;
  // unsigned weights without zero points have all of them at 0
  w->zero_type = words && (s->zero_bits || !s->is_signed) ? SCAP_U8 : SCAP_NONE;
  w->padded = 1;
  w->threshold = -1.0f;
  w->tile_columns = std::min(share, widest);
  const int64_t bits = s->data_type == SCAP_U4 ? 4 : 8 * int64_t(bytes_of(s->data_type));
  w->row_bytes = w->tile_columns * bits / 8;
  w->tile_bytes = s->k * w->row_bytes;
  const int64_t tiles = (s->n + w->tile_columns - 1) / w->tile_columns, groups = s->k / w->group;
  int64_t bytes = tiles * w->tile_bytes;
  if (words) bytes += up(groups * s->n * int64_t(bytes_of(s->scale_type)), 64);
  if (w->zero_type == SCAP_U8) bytes += up(groups * s->n, 64);
  return bytes;
}

int scap_pack(const scap_source* s, scap_weight* w, void* memory, scap_parallel run, void* pool) {
  if (!sound(s) || !w || !memory || w->format != s->data_type || w->n != s->n) return -1;
  uint8_t* data = static_cast<uint8_t*>(memory);
  const int64_t tiles = (s->n + w->tile_columns - 1) / w->tile_columns, units = (s->n + 127) / 128;
  const int64_t groups = s->k / w->group;
  parallel(run, pool, tiles, [&](int64_t t) { std::memset(data + t * w->tile_bytes, 0, size_t(w->tile_bytes)); });
  parallel(run, pool, units, [&](int64_t u) { pack_columns(*s, *w, data, u * 128); });
  w->data = data;
  data += tiles * w->tile_bytes;
  if (w->scale_type == SCAP_NONE) return 0;
  const size_t size = bytes_of(w->scale_type);
  w->scale = data;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < s->n; ++c)
      std::memcpy(data + size_t(g * s->n + c) * size,
                  static_cast<const uint8_t*>(s->scale) + size_t(c * s->scale_stride_n + g * s->scale_stride_g) * size, size);
  data += up(groups * s->n * int64_t(size), 64);
  if (w->zero_type == SCAP_NONE) return 0;
  w->zero = data;
  if (s->zero_bits == 0) {
    std::memset(data, 0, size_t(groups * s->n));
    return 0;
  }
  scap_source zero = *s;  // zero points, read as weights are: plus 128 or 8 where they are signed
  zero.data = s->zero;
  zero.data_type = s->zero_bits == 4 ? SCAP_U4 : SCAP_U8;
  const uint32_t shift = s->data_type == SCAP_U8 && s->zero_bits == 4 && s->is_signed ? 120 : 0;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < s->n; ++c)
      data[g * s->n + c] = uint8_t(element(zero, c * s->scale_stride_n + g * s->scale_stride_g) + shift);
  return 0;
}

void scap_parallel_openmp(void* pool, int64_t count, void (*body)(void*, int64_t), void* context) {
  const scap_openmp* openmp = static_cast<const scap_openmp*>(pool);
  struct Share {
    std::atomic<int64_t> next{0};
    int64_t count;
    void (*body)(void*, int64_t);
    void* context;
  } share;
  share.count = count;
  share.body = body;
  share.context = context;
  openmp->gomp_parallel(
      [](void* p) {
        Share& s = *static_cast<Share*>(p);
        for (int64_t i = s.next++; i < s.count; i = s.next++) s.body(s.context, i);
      },
      &share, unsigned(std::min(count, openmp->threads)), 0);
}

}  // extern "C"
