// SPDX-License-Identifier: Apache-2.0
//
// The operation ScapSparseFC: FC layers that read one tensor, pruned inside.
//
// Inputs: x [..., K]; with `policy` a scalar flag (0: these tokens are not pruned); then for each layer its weights, and
// where it has them scales, zero points, bias (float32) and correction (float32, mode * column sums). All of these are
// Constants of raw bytes (u8, one dimension) in the order in which the stock IR stores them, so that no transformation
// changes them and the stock IR can be made again. They are packed for the kernels when the operation first runs.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <locale>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "openvino/core/extension.hpp"
#include "openvino/core/op_extension.hpp"
#include "openvino/core/parallel.hpp"
#include "openvino/op/constant.hpp"
#include "openvino/op/op.hpp"
#include "openvino/op/parameter.hpp"
#include "sparse_fc.h"

namespace scap {

// -- memory ------------------------------------------------------------------------------------------------------------

constexpr size_t kHugePage = size_t(2) << 20, kArena = size_t(32) << 20;

// Weights of many layers side by side in huge pages: small layers would not fill one each.
class Arena {
 public:
  static std::shared_ptr<uint8_t> get(size_t bytes) {
    static std::mutex mutex;
    static std::weak_ptr<Arena> last;
    bytes = (bytes + 4095) / 4096 * 4096;
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Arena> arena = last.lock();
    if (!arena || arena->size_ - arena->used_ < bytes) {
      arena = std::make_shared<Arena>(std::max((bytes + kHugePage - 1) / kHugePage * kHugePage, kArena));
      last = arena;
    }
    uint8_t* memory = arena->memory_ + arena->used_;
    arena->used_ += bytes;
    return std::shared_ptr<uint8_t>(arena, memory);
  }

  explicit Arena(size_t size) : size_(size) {
    mapped_ = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t start = (reinterpret_cast<uintptr_t>(mapped_) + kHugePage - 1) / kHugePage * kHugePage;
    memory_ = reinterpret_cast<uint8_t*>(start);
#ifdef MADV_HUGEPAGE
    madvise(memory_, size, MADV_HUGEPAGE);
#endif
  }
  ~Arena() { munmap(mapped_, size_ + kHugePage); }
  Arena(const Arena&) = delete;

 private:
  void* mapped_;
  uint8_t* memory_;
  size_t size_, used_ = 0;
};

// The packed weights are what is read from now on: pages of the file that the stock ones are mapped from may go. They
// come back by themselves if anybody reads them. Memory that is no file is left alone.
void release_file_pages(const void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t from = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (from >= to) return;
  static std::mutex mutex;
  static uintptr_t known_from = 0, known_to = 0;  // the file mapping found last
  std::lock_guard<std::mutex> lock(mutex);
  if (from < known_from || to > known_to) {
    std::ifstream maps("/proc/self/maps");
    std::string line;
    bool found = false;
    while (!found && std::getline(maps, line)) {
      unsigned long long begin = 0, end = 0, inode = 0;
      if (std::sscanf(line.c_str(), "%llx-%llx %*s %*s %*s %llu", &begin, &end, &inode) != 3) continue;
      if (from >= begin && to <= end) {
        if (inode == 0) return;
        known_from = begin;
        known_to = end;
        found = true;
      }
    }
    if (!found) return;
  }
  madvise(reinterpret_cast<void*>(from), to - from, MADV_PAGEOUT);
#else
  (void)data;
  (void)bytes;
#endif
}

void run_parallel(void*, int64_t count, void (*body)(void*, int64_t), void* context) {
  const auto run = [&] { ov::parallel_nt_static(int(count), [&](int i, int) { body(context, i); }); };
#if OV_THREAD_USE_TBB
  // a thread that waits takes up nothing else: it could be another call, which uses the same scratch
  tbb::this_task_arena::isolate(run);
#else
  run();
#endif
}

// -- attributes --------------------------------------------------------------------------------------------------------

struct Format {
  const char* name;
  int32_t type;
  bool is_signed;
  int bits;
};

constexpr Format kFormats[] = {{"f32", SCAP_F32, false, 32}, {"f16", SCAP_F16, false, 16}, {"bf16", SCAP_BF16, false, 16},
                               {"u8", SCAP_U8, false, 8},    {"i8", SCAP_U8, true, 8},     {"u4", SCAP_U4, false, 4},
                               {"i4", SCAP_U4, true, 4}};
constexpr const char* kActivations[] = {"none", "silu", "gelu", "gelu_tanh", "relu", "relu2"};

const Format* format_of(const std::string& name) {
  for (const Format& format : kFormats)
    if (name == format.name) return &format;
  return nullptr;
}

int activation_of(const std::string& name) {
  for (int i = 0; i < 6; ++i)
    if (name == kActivations[i]) return i;
  return -1;
}

bool read_float(const std::string& text, float* value) {
  std::istringstream stream(text);
  stream.imbue(std::locale::classic());
  double wide = 0;
  stream >> wide;
  *value = float(wide);
  return !stream.fail() && stream.eof() && wide == wide;
}

struct Attributes {
  int64_t version = 1, in_features = 0;
  std::vector<std::string> names, formats, scales, thresholds;
  std::vector<int64_t> out_features, groups, zero_bits, transposed, biases, corrections;
  std::string mode = "0", activation = "none", stock;
  bool policy = false;
};

// -- packed weights ----------------------------------------------------------------------------------------------------

struct Packed {
  std::mutex mutex;
  std::atomic<bool> ready{false};
  std::vector<scap_weight> pruned, dense;  // with and without threshold and correction
  std::vector<std::shared_ptr<uint8_t>> memory;
  std::vector<std::unique_ptr<float[]>> biases;
  std::vector<std::string> names;
  std::unique_ptr<std::atomic<uint64_t>[]> dropped;
  std::atomic<uint64_t> seen{0};
};

// All packed weights alive, for the counters.
struct Registry {
  std::mutex mutex;
  std::vector<std::weak_ptr<Packed>> all;
  static Registry& get() {
    static Registry registry;
    return registry;
  }
};

// -- the operation -----------------------------------------------------------------------------------------------------

class SparseFC : public ov::op::Op {
 public:
  OPENVINO_OP("ScapSparseFC", "extension");  // Python can read operations of this opset alone

  SparseFC() : packed_(std::make_shared<Packed>()) {}
  SparseFC(const ov::OutputVector& inputs, Attributes attributes)
      : Op(inputs), a_(std::make_shared<Attributes>(std::move(attributes))), packed_(std::make_shared<Packed>()) {
    constructor_validate_and_infer_types();
  }
  // A copy. The plugin makes one for each call of a model with dynamic shapes, to know the shapes of the outputs: it
  // shares what it can and is not checked anew where its weights are the same ones, or stand-ins for shapes.
  SparseFC(const ov::OutputVector& inputs, const SparseFC& other, bool same, bool trusted)
      : Op(inputs), a_(other.a_), trusted_(trusted), mode_(other.mode_), taus_(other.taus_) {
    if (same || trusted) packed_ = other.packed_;
    else packed_ = std::make_shared<Packed>();
    constructor_validate_and_infer_types();
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    visitor.on_attribute("version", a_->version);
    visitor.on_attribute("in_features", a_->in_features);
    visitor.on_attribute("names", a_->names);
    visitor.on_attribute("out_features", a_->out_features);
    visitor.on_attribute("formats", a_->formats);
    visitor.on_attribute("groups", a_->groups);
    visitor.on_attribute("scales", a_->scales);
    visitor.on_attribute("zero_bits", a_->zero_bits);
    visitor.on_attribute("transposed", a_->transposed);
    visitor.on_attribute("biases", a_->biases);
    visitor.on_attribute("corrections", a_->corrections);
    visitor.on_attribute("thresholds", a_->thresholds);
    visitor.on_attribute("mode", a_->mode);
    visitor.on_attribute("activation", a_->activation);
    visitor.on_attribute("policy", a_->policy);
    visitor.on_attribute("stock", a_->stock);
    return true;
  }

  void validate_and_infer_types() override {
    if (!trusted_) {
      check_attributes();
      check_inputs();
    }
    ov::PartialShape shape = get_input_partial_shape(0);
    const ov::element::Type type = get_input_element_type(0);
    NODE_VALIDATION_CHECK(this, type.is_dynamic() || type == ov::element::f32 || type == ov::element::f16 ||
                                    type == ov::element::bf16,
                          "x is ", type, ", expected f32, f16 or bf16");
    if (shape.rank().is_static()) {
      NODE_VALIDATION_CHECK(this, shape.size() >= 1 && shape[shape.size() - 1].compatible(a_->in_features), "x has shape ",
                            shape, ", expected [..., ", a_->in_features, "]");
    }
    set_output_size(outputs());
    for (size_t i = 0; i < outputs(); ++i) {
      ov::PartialShape out = shape;
      if (out.rank().is_static()) out[out.size() - 1] = a_->out_features[i];
      set_output_type(i, type, out);
    }
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    // packed weights are shared where the stock ones are
    bool same = inputs.size() == get_input_size(), stand_ins = same;
    for (size_t i = first(); (same || stand_ins) && i < inputs.size(); ++i) {
      const auto* other = dynamic_cast<const ov::op::v0::Constant*>(inputs[i].get_node());
      const auto* mine = other ? dynamic_cast<const ov::op::v0::Constant*>(get_input_node_ptr(i)) : nullptr;
      same = same && mine && other && mine->get_data_ptr() == other->get_data_ptr();
      stand_ins = stand_ins && !other && inputs[i].get_partial_shape() == get_input_partial_shape(i);
    }
    return std::make_shared<SparseFC>(inputs, *this, same, same || stand_ins);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outs, const ov::TensorVector& ins) const override {
    OPENVINO_ASSERT(ins.size() == get_input_size(), "SparseFC got ", ins.size(), " inputs");
    Packed& packed = *packed_;
    if (!packed.ready.load(std::memory_order_acquire)) pack(ins);
    const ov::Tensor& x = ins[0];
    ov::Shape shape = x.get_shape();
    OPENVINO_ASSERT(!shape.empty() && int64_t(shape.back()) == a_->in_features, "SparseFC: x has shape ", shape,
                    ", expected [..., ", a_->in_features, "]");
    scap_call call{};
    call.rows = int64_t(x.get_size()) / a_->in_features;
    call.k = a_->in_features;
    call.x = x.data();
    call.x_type = type_of(x.get_element_type());
    void* results[64];
    for (size_t i = 0; i < outputs(); ++i) {
      shape.back() = size_t(a_->out_features[i]);
      outs[i].set_shape(shape);
      OPENVINO_ASSERT(outs[i].get_element_type() == x.get_element_type(), "SparseFC: x is ", x.get_element_type(),
                      " and the output ", outs[i].get_element_type());
      results[i] = outs[i].data();
    }
    if (call.rows == 0) return true;
    const bool prune = !a_->policy || *static_cast<const uint8_t*>(ins[1].data()) != 0;
    uint64_t dropped[64] = {};
    call.weights = prune ? packed.pruned.data() : packed.dense.data();
    call.mode = prune ? mode_ : 0.0f;
    call.count = int32_t(a_->names.size());
    call.activation = activation_of(a_->activation);
    call.outputs = results;
    call.dropped = dropped;
    call.parallel = run_parallel;
    call.threads = parallel_get_max_threads();
    const int status = scap_run(&call);
    OPENVINO_ASSERT(status == 0, "SparseFC failed with status ", status, status == -2 ? ": out of memory" : "");
    if (prune) {
      for (size_t i = 0; i < a_->names.size(); ++i) packed.dropped[i].fetch_add(dropped[i], std::memory_order_relaxed);
      packed.seen.fetch_add(uint64_t(call.rows * call.k), std::memory_order_relaxed);
    }
    return true;
  }

 private:
  size_t outputs() const { return a_->activation == "none" ? a_->names.size() : 1; }
  size_t first() const { return a_->policy ? 2 : 1; }

  static int32_t type_of(const ov::element::Type& type) {
    return type == ov::element::f32 ? SCAP_F32 : type == ov::element::f16 ? SCAP_F16 : SCAP_BF16;
  }

  void check_attributes() {
    NODE_VALIDATION_CHECK(this, a_->version == 1, "attribute version is ", a_->version,
                          ", this extension reads 1; use the scap-nncf that wrote the model");
    const size_t count = a_->names.size();
    NODE_VALIDATION_CHECK(this, count >= 1 && count <= 64, "names has ", count, " layers, expected 1 to 64");
    const bool equal = a_->formats.size() == count && a_->scales.size() == count && a_->thresholds.size() == count &&
                       a_->out_features.size() == count && a_->groups.size() == count && a_->zero_bits.size() == count &&
                       a_->transposed.size() == count && a_->biases.size() == count && a_->corrections.size() == count;
    NODE_VALIDATION_CHECK(this, equal, "the attributes of layers differ in length; expected ", count, " values each");
    constexpr int64_t most = std::numeric_limits<int32_t>::max() / 2;
    NODE_VALIDATION_CHECK(this, a_->in_features >= 1 && a_->in_features <= most, "in_features is ", a_->in_features);
    NODE_VALIDATION_CHECK(this, read_float(a_->mode, &mode_), "mode is '", a_->mode, "', expected a number");
    const int activation = activation_of(a_->activation);
    NODE_VALIDATION_CHECK(this, activation >= 0, "unknown activation '", a_->activation, "'");
    NODE_VALIDATION_CHECK(this, activation == 0 || (count == 2 && a_->out_features[0] == a_->out_features[1]),
                          "an activation needs two layers, gate and up, of one width");
    taus_.assign(count, -1.0f);
    for (size_t i = 0; i < count; ++i) {
      const Format* format = format_of(a_->formats[i]);
      NODE_VALIDATION_CHECK(this, format, "unknown weight format '", a_->formats[i], "' of ", a_->names[i]);
      const bool is_float = format->type <= SCAP_BF16;
      const Format* scale = format_of(a_->scales[i]);
      NODE_VALIDATION_CHECK(this, is_float ? a_->scales[i] == "none" : scale && scale->type <= SCAP_BF16,
                            "scales of ", a_->names[i], " are '", a_->scales[i], "'");
      NODE_VALIDATION_CHECK(this, a_->out_features[i] >= 1 && a_->out_features[i] <= most, "out_features of ", a_->names[i],
                            " is ", a_->out_features[i]);
      NODE_VALIDATION_CHECK(this, a_->groups[i] >= 1 && a_->in_features % a_->groups[i] == 0, "the group of ", a_->names[i],
                            " is ", a_->groups[i], ", which does not divide ", a_->in_features);
      NODE_VALIDATION_CHECK(this, a_->zero_bits[i] == 0 || (!is_float && a_->zero_bits[i] == format->bits),
                            "zero points of ", a_->names[i], " have ", a_->zero_bits[i], " bits");
      NODE_VALIDATION_CHECK(this, read_float(a_->thresholds[i], &taus_[i]), "the threshold of ", a_->names[i], " is '",
                            a_->thresholds[i], "', expected a number");
    }
  }

  size_t groups_of(size_t i) const { return size_t(a_->in_features / a_->groups[i]); }

  // Bytes of each input of layer i.
  std::vector<size_t> sizes_of(size_t i) const {
    const Format& format = *format_of(a_->formats[i]);
    const size_t n = size_t(a_->out_features[i]), elements = n * size_t(a_->in_features);
    std::vector<size_t> sizes{(elements * size_t(format.bits) + 7) / 8};
    if (format.type >= SCAP_U8) sizes.push_back(n * groups_of(i) * (a_->scales[i] == "f32" ? 4 : 2));
    if (a_->zero_bits[i]) sizes.push_back((n * groups_of(i) * size_t(a_->zero_bits[i]) + 7) / 8);
    if (a_->biases[i]) sizes.push_back(4 * n);
    if (a_->corrections[i]) sizes.push_back(4 * n);
    return sizes;
  }

  void check_inputs() {
    size_t at = first();
    for (size_t i = 0; i < a_->names.size(); ++i) {
      for (const size_t bytes : sizes_of(i)) {
        NODE_VALIDATION_CHECK(this, at < get_input_size(), a_->names[i], " lacks weights: input ", at, " is missing");
        const ov::PartialShape& shape = get_input_partial_shape(at);
        const ov::Node* node = get_input_node_ptr(at);
        const bool constant = dynamic_cast<const ov::op::v0::Constant*>(node) != nullptr;
        NODE_VALIDATION_CHECK(this, constant || dynamic_cast<const ov::op::v0::Parameter*>(node), "input ", at, " of ",
                              a_->names[i], " is a ", node->get_type_name(), "; weights must be Constants");
        NODE_VALIDATION_CHECK(this, get_input_element_type(at) == ov::element::u8 && shape.is_static() &&
                                        shape.size() == 1 && size_t(shape[0].get_length()) == bytes,
                              "input ", at, " of ", a_->names[i], " is ", get_input_element_type(at), " ", shape,
                              ", expected u8 [", bytes, "]");
        ++at;
      }
    }
    NODE_VALIDATION_CHECK(this, at == get_input_size(), "expected ", at, " inputs, got ", get_input_size());
  }

  void pack(const ov::TensorVector& ins) const {
    Packed& packed = *packed_;
    std::lock_guard<std::mutex> lock(packed.mutex);
    if (packed.ready) return;
    const size_t count = a_->names.size();
    packed.pruned.clear();
    packed.dense.clear();
    packed.biases.clear();
    packed.memory.clear();
    size_t at = first();
    for (size_t i = 0; i < count; ++i) {
      for (const size_t bytes : sizes_of(i)) {
        OPENVINO_ASSERT(ins[at].get_byte_size() == bytes, "SparseFC: weights of ", a_->names[i], " have ",
                        ins[at].get_byte_size(), " bytes, expected ", bytes);
        ++at;
      }
    }
    at = first();
    for (size_t i = 0; i < count; ++i) {
      const Format& format = *format_of(a_->formats[i]);
      const int64_t n = a_->out_features[i], k = a_->in_features, groups = int64_t(groups_of(i));
      const bool across = a_->transposed[i] != 0;
      const ov::Tensor& stock = ins[at++];
      scap_source source{};
      source.data = stock.data();
      source.n = n;
      source.k = k;
      source.group = a_->groups[i];
      source.stride_n = across ? 1 : k;
      source.stride_k = across ? n : 1;
      source.scale_stride_n = across ? 1 : groups;
      source.scale_stride_g = across ? n : 1;
      source.data_type = format.type;
      source.is_signed = format.is_signed;
      source.scale_type = SCAP_NONE;
      if (format.type >= SCAP_U8) {
        source.scale = ins[at++].data();
        source.scale_type = format_of(a_->scales[i])->type;
      }
      source.zero_bits = int32_t(a_->zero_bits[i]);
      if (source.zero_bits) source.zero = ins[at++].data();
      const void* bias = a_->biases[i] ? ins[at++].data() : nullptr;
      const void* correction = a_->corrections[i] ? ins[at++].data() : nullptr;
      scap_weight weight{};
      const int64_t bytes = scap_pack_bytes(&source, parallel_get_max_threads(), &weight);
      OPENVINO_ASSERT(bytes > 0, "SparseFC: cannot pack the weights of ", a_->names[i]);
      packed.memory.push_back(Arena::get(size_t(bytes)));
      const int status = scap_pack(&source, &weight, packed.memory.back().get(), run_parallel, nullptr);
      OPENVINO_ASSERT(status == 0, "SparseFC: cannot pack the weights of ", a_->names[i]);
      release_file_pages(stock.data(), stock.get_byte_size());
      scap_weight dense = weight;
      weight.threshold = taus_[i];
      weight.bias = keep(bias, correction, n);
      dense.bias = keep(bias, nullptr, n);
      packed.pruned.push_back(weight);
      packed.dense.push_back(dense);
    }
    packed.names = a_->names;
    packed.dropped.reset(new std::atomic<uint64_t>[count]());
    Registry& registry = Registry::get();
    {
      std::lock_guard<std::mutex> hold(registry.mutex);
      registry.all.erase(std::remove_if(registry.all.begin(), registry.all.end(),
                                        [](const std::weak_ptr<Packed>& p) { return p.expired(); }),
                         registry.all.end());
      registry.all.push_back(packed_);
    }
    packed.ready.store(true, std::memory_order_release);
  }

  // bias + correction, kept with the packed weights; NULL where there is neither
  const float* keep(const void* bias, const void* correction, int64_t n) const {
    if (!bias && !correction) return nullptr;
    std::unique_ptr<float[]> sum(new float[size_t(n)]());
    for (const void* part : {bias, correction}) {
      if (!part) continue;
      for (size_t i = 0; i < size_t(n); ++i) {
        float value;  // constants of bytes lie anywhere
        std::memcpy(&value, static_cast<const uint8_t*>(part) + 4 * i, 4);
        sum[i] += value;
      }
    }
    packed_->biases.push_back(std::move(sum));
    return packed_->biases.back().get();
  }

  std::shared_ptr<Attributes> a_ = std::make_shared<Attributes>();
  bool trusted_ = false;  // a copy of a node that was checked
  float mode_ = 0.0f;
  std::vector<float> taus_;
  std::shared_ptr<Packed> packed_;
};

}  // namespace scap

// -- counters, for measuring from outside ------------------------------------------------------------------------------

// "name<TAB>dropped<TAB>seen" lines of all layers that ran. Returns the bytes needed; writes at most `size`.
extern "C" __attribute__((visibility("default"))) int64_t scap_counts(char* text, int64_t size) {
  std::string all;
  scap::Registry& registry = scap::Registry::get();
  std::lock_guard<std::mutex> lock(registry.mutex);
  for (const auto& weak : registry.all)
    if (const auto packed = weak.lock())
      for (size_t i = 0; i < packed->names.size(); ++i)
        all += packed->names[i] + "\t" + std::to_string(packed->dropped[i].load()) + "\t" +
               std::to_string(packed->seen.load()) + "\n";
  if (text && size > 0) std::memcpy(text, all.data(), size_t(std::min<int64_t>(size, int64_t(all.size()))));
  return int64_t(all.size());
}

extern "C" __attribute__((visibility("default"))) void scap_reset_counts() {
  scap::Registry& registry = scap::Registry::get();
  std::lock_guard<std::mutex> lock(registry.mutex);
  for (const auto& weak : registry.all)
    if (const auto packed = weak.lock()) {
      for (size_t i = 0; i < packed->names.size(); ++i) packed->dropped[i] = 0;
      packed->seen = 0;
    }
}

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({std::make_shared<ov::OpExtension<scap::SparseFC>>()}));
