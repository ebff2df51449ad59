// SPDX-License-Identifier: Apache-2.0
//
// The operation under sanitizers, against a plain definition in double: random shapes, formats, groups and masks; then
// wrong attributes. Built and run by test_sparse_op.py. Arguments: seed, number of cases, instruction set.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>

#include "extension.cpp"

namespace {

std::mt19937 generator;

int pick(std::initializer_list<int> values) { return *(values.begin() + generator() % values.size()); }
float uniform(float a, float b) { return std::uniform_real_distribution<float>(a, b)(generator); }

float half_to_float(uint16_t h) { return float(ov::float16::from_bits(h)); }
float bfloat_to_float(uint16_t h) { return float(ov::bfloat16::from_bits(h)); }

// Bytes at an odd address: constants of bytes lie anywhere.
struct Bytes {
  std::vector<uint8_t> memory;
  ov::Tensor tensor() { return ov::Tensor(ov::element::u8, {memory.size() - 1}, memory.data() + 1); }
  explicit Bytes(size_t size) : memory(size + 1) {
    for (auto& byte : memory) byte = uint8_t(generator());
  }
  uint8_t* data() { return memory.data() + 1; }
};

struct Layer {
  std::vector<double> weight;  // [k][n]
  std::vector<double> bias, correction;
};

void put_float(Bytes& bytes, size_t i, const std::string& type, float value) {
  if (type == "f32") {
    std::memcpy(bytes.data() + 4 * i, &value, 4);
  } else {
    const uint16_t bits = type == "f16" ? ov::float16(value).to_bits() : ov::bfloat16(value).to_bits();
    std::memcpy(bytes.data() + 2 * i, &bits, 2);
  }
}

double get_float(Bytes& bytes, size_t i, const std::string& type) {
  float value;
  uint16_t bits;
  if (type == "f32") return std::memcpy(&value, bytes.data() + 4 * i, 4), double(value);
  std::memcpy(&bits, bytes.data() + 2 * i, 2);
  return type == "f16" ? half_to_float(bits) : bfloat_to_float(bits);
}

int get_integer(Bytes& bytes, size_t i, const std::string& type) {
  if (type == "u8") return bytes.data()[i];
  if (type == "i8") return int8_t(bytes.data()[i]);
  const int nibble = bytes.data()[i / 2] >> (i % 2 * 4) & 15;
  return type == "u4" ? nibble : nibble - 16 * (nibble > 7);
}

double activate(double x, const std::string& name) {
  if (name == "silu") return x / (1 + std::exp(-x));
  if (name == "gelu") return x / 2 * std::erfc(-x / std::sqrt(2.0));
  if (name == "gelu_tanh") return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  if (name == "relu") return std::max(x, 0.0);
  return std::max(x, 0.0) * std::max(x, 0.0);
}

std::string text_of(float value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", double(value));
  return text;
}

void fail(const char* what, const scap::Attributes& a, double wrong, double right) {
  std::printf("%s: k %ld, mode %s, activation %s: %g instead of %g\n", what, long(a.in_features), a.mode.c_str(),
              a.activation.c_str(), wrong, right);
  for (size_t i = 0; i < a.names.size(); ++i)
    std::printf("  n %ld, %s, group %ld, zero points %ld, transposed %ld, threshold %s\n", long(a.out_features[i]),
                a.formats[i].c_str(), long(a.groups[i]), long(a.zero_bits[i]), long(a.transposed[i]),
                a.thresholds[i].c_str());
  std::exit(1);
}

void one_case(int number) {
  scap::Attributes a;
  const int k = pick({1, 2, 7, 16, 33, 64, 96, 128, 257});
  const int tokens = number % 40 == 39 ? 2048 : pick({1, 1, 1, 2, 3, 8, 9, 17, 70});
  const bool glu = pick({0, 0, 1}) == 1;
  const int count = glu ? 2 : pick({1, 1, 2, 3});
  a.in_features = k;
  a.activation = glu ? scap::kActivations[1 + generator() % 5] : "none";
  a.policy = pick({0, 1}) == 1;
  const float mode = pick({0, 1}) ? uniform(-0.5f, 0.5f) : 0.0f;
  a.mode = text_of(mode);
  std::vector<Bytes> bytes;
  std::vector<Layer> layers;
  std::vector<float> taus;
  const int width = tokens > 100 ? pick({1, 65}) : pick({1, 2, 31, 64, 65, 127, 128, 200, 2050});
  for (int l = 0; l < count; ++l) {
    const int n = glu ? width : tokens > 100 ? pick({1, 33}) : pick({1, 3, 63, 64, 130, 300});
    const std::string format = scap::kFormats[generator() % 7].name;
    const bool words = format[0] == 'i' || format[0] == 'u';
    std::vector<int> divisors;
    for (int g = 1; g <= k; ++g)
      if (k % g == 0 && (g >= 4 || g == k)) divisors.push_back(g);
    const int group = words ? divisors[generator() % divisors.size()] : k, groups = k / group;
    const bool across = pick({0, 1}) == 1;
    const std::string scale = words ? scap::kFormats[generator() % 3].name : "none";
    const int bits = scap::format_of(format)->bits, zero = words && pick({0, 1}) ? bits : 0;
    a.names.push_back("layer" + std::to_string(l));
    a.out_features.push_back(n);
    a.formats.push_back(format);
    a.groups.push_back(group);
    a.scales.push_back(scale);
    a.zero_bits.push_back(zero);
    a.transposed.push_back(across);
    a.biases.push_back(pick({0, 1}));
    a.corrections.push_back(mode != 0);
    taus.push_back(float(pick({-1, 0, 1, 1, 2, 100})) * 0.5f);
    a.thresholds.push_back(text_of(taus.back()));
    Layer layer;
    layer.weight.resize(size_t(k) * n);
    Bytes data((size_t(n) * k * bits + 7) / 8), scales(words ? size_t(n) * groups * (scale == "f32" ? 4 : 2) : 0);
    Bytes zeros((size_t(n) * groups * zero + 7) / 8);
    if (!words)
      for (size_t i = 0; i < size_t(n) * k; ++i) put_float(data, i, format, uniform(-1, 1));
    else
      for (size_t i = 0; i < size_t(n) * groups; ++i) put_float(scales, i, scale, uniform(0.01f, 0.1f));
    for (int i = 0; i < k; ++i)
      for (int c = 0; c < n; ++c) {
        const size_t at = across ? size_t(i) * n + c : size_t(c) * k + i;
        const size_t s = across ? size_t(i / group) * n + c : size_t(c) * groups + i / group;
        layer.weight[size_t(i) * n + c] =
            words ? (get_integer(data, at, format) - (zero ? get_integer(zeros, s, format) : 0)) * get_float(scales, s, scale)
                  : get_float(data, at, format);
      }
    bytes.push_back(std::move(data));
    if (words) bytes.push_back(std::move(scales));
    if (zero) bytes.push_back(std::move(zeros));
    for (auto* vector : {&layer.bias, &layer.correction}) {
      vector->assign(size_t(n), 0.0);
      if (!(vector == &layer.bias ? a.biases.back() : a.corrections.back())) continue;
      Bytes values(size_t(n) * 4);
      for (int c = 0; c < n; ++c) {
        put_float(values, size_t(c), "f32", uniform(-1, 1));
        (*vector)[size_t(c)] = get_float(values, size_t(c), "f32");
      }
      bytes.push_back(std::move(values));
    }
    layers.push_back(std::move(layer));
  }
  const int x_type = pick({0, 0, 1, 2});
  const ov::element::Type type = x_type == 0 ? ov::element::f32 : x_type == 1 ? ov::element::f16 : ov::element::bf16;
  std::vector<double> x(size_t(tokens) * k);
  ov::Tensor input(type, {1, size_t(tokens), size_t(k)});
  const float spread = float(pick({0, 1, 1, 1}));  // all zero: nothing is active
  for (size_t i = 0; i < x.size(); ++i) {
    const float value = spread * std::normal_distribution<float>()(generator);
    if (x_type == 0) {
      input.data<float>()[i] = value;
      x[i] = value;
    } else if (x_type == 1) {
      input.data<ov::float16>()[i] = ov::float16(value);
      x[i] = float(input.data<ov::float16>()[i]);
    } else {
      input.data<ov::bfloat16>()[i] = ov::bfloat16(value);
      x[i] = float(input.data<ov::bfloat16>()[i]);
    }
  }
  ov::OutputVector nodes{std::make_shared<ov::op::v0::Parameter>(type, ov::PartialShape{1, -1, k})};
  ov::TensorVector ins{input};
  const bool prune = !a.policy || pick({0, 1}) == 1;
  uint8_t flag = prune;
  if (a.policy) {
    nodes.push_back(std::make_shared<ov::op::v0::Parameter>(ov::element::boolean, ov::PartialShape{}));
    ins.push_back(ov::Tensor(ov::element::boolean, {}, &flag));
  }
  for (Bytes& item : bytes) {
    nodes.push_back(std::make_shared<ov::op::v0::Constant>(item.tensor()));
    ins.push_back(item.tensor());
  }
  const auto node = std::make_shared<scap::SparseFC>(nodes, a);
  ov::TensorVector outs;
  for (size_t i = 0; i < node->get_output_size(); ++i) outs.emplace_back(type, ov::Shape{0});
  node->evaluate(outs, ins);
  const auto twin = std::dynamic_pointer_cast<scap::SparseFC>(node->clone_with_new_inputs(nodes));
  ov::TensorVector again;
  for (size_t i = 0; i < node->get_output_size(); ++i) again.emplace_back(type, ov::Shape{0});
  twin->evaluate(again, ins);
  for (size_t i = 0; i < outs.size(); ++i)
    if (std::memcmp(outs[i].data(), again[i].data(), outs[i].get_byte_size()) != 0) fail("not the same twice", a, 0, 0);
  std::vector<std::vector<double>> y, size;
  for (int l = 0; l < count; ++l) {
    const size_t n = size_t(a.out_features[size_t(l)]);
    y.emplace_back(size_t(tokens) * n);
    size.emplace_back(size_t(tokens) * n);
    for (int t = 0; t < tokens; ++t)
      for (size_t c = 0; c < n; ++c) {
        double sum = layers[size_t(l)].bias[c] + (prune ? layers[size_t(l)].correction[c] : 0), all = std::abs(sum);
        for (int i = 0; i < k; ++i) {
          const float z = float(x[size_t(t) * k + i]) - (prune ? mode : 0.0f);
          if (prune && std::abs(z) <= taus[size_t(l)]) continue;
          sum += double(z) * layers[size_t(l)].weight[size_t(i) * n + c];
          all += std::abs(double(z) * layers[size_t(l)].weight[size_t(i) * n + c]);
        }
        y.back()[size_t(t) * n + c] = sum;
        size.back()[size_t(t) * n + c] = all;
      }
  }
  for (size_t o = 0; o < outs.size(); ++o)
    for (size_t i = 0; i < y[o].size(); ++i) {
      const double right = glu ? activate(y[0][i], a.activation) * y[1][i] : y[o][i];
      const double slack = glu ? (1 + size[0][i]) * (1 + size[1][i]) * (a.activation == "relu2" ? 1 + size[0][i] : 1) : 1 + size[o][i];
      const double wrong = x_type == 0   ? outs[o].data<float>()[i]
                           : x_type == 1 ? float(outs[o].data<ov::float16>()[i])
                                         : float(outs[o].data<ov::bfloat16>()[i]);
      const double step = x_type == 0 ? 0 : x_type == 1 ? 1.0 / 1024 : 1.0 / 128;
      if (x_type == 1 && std::abs(right) > 65000) continue;  // beyond float16
      if (!(std::abs(wrong - right) <= 2e-6 * slack + step * std::abs(right) + (x_type == 1 ? 1e-7 : 0))) std::printf("x %d tokens %d prune %d out %zu at %zu; ", x_type, tokens, int(prune), o, i), fail("wrong", a, wrong, right);
    }
}

void expect_refused(const char* what, const std::function<void(scap::Attributes&)>& spoil, size_t weights = 4 * 8 * 4) {
  scap::Attributes a;
  a.in_features = 8;
  a.names = {"layer"};
  a.out_features = {4};
  a.formats = {"f32"};
  a.groups = {8};
  a.scales = {"none"};
  a.zero_bits = a.transposed = a.biases = a.corrections = {0};
  a.thresholds = {"0.5"};
  spoil(a);
  const ov::OutputVector inputs{std::make_shared<ov::op::v0::Parameter>(ov::element::f32, ov::PartialShape{-1, 8}),
                                std::make_shared<ov::op::v0::Constant>(ov::element::u8, ov::Shape{weights}, 0)};
  try {
    scap::SparseFC node(inputs, a);
  } catch (const ov::Exception&) {
    return;
  }
  std::printf("accepted: %s\n", what);
  std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4 || scap_force_isa(arguments[3]) != 0) return 2;
  generator.seed(unsigned(std::atol(arguments[1])));
  for (int i = 0; i < std::atoi(arguments[2]); ++i) one_case(i);
  using A = scap::Attributes;
  expect_refused("version", [](A& a) { a.version = 2; });
  expect_refused("lengths", [](A& a) { a.groups.clear(); });
  expect_refused("no layers", [](A& a) { a = A(); });
  expect_refused("format", [](A& a) { a.formats = {"f8"}; });
  expect_refused("scales", [](A& a) { a.scales = {"f16"}; });
  expect_refused("group", [](A& a) { a.groups = {3}; });
  expect_refused("group 0", [](A& a) { a.groups = {0}; });
  expect_refused("width", [](A& a) { a.out_features = {0}; });
  expect_refused("huge", [](A& a) { a.out_features = {int64_t(1) << 60}; });
  expect_refused("threshold", [](A& a) { a.thresholds = {"0.5x"}; });
  expect_refused("nan", [](A& a) { a.thresholds = {"nan"}; });
  expect_refused("mode", [](A& a) { a.mode = ""; });
  expect_refused("activation", [](A& a) { a.activation = "silu"; });
  expect_refused("unknown activation", [](A& a) { a.activation = "selu"; });
  expect_refused("in features", [](A& a) { a.in_features = -8; });
  expect_refused("bytes", [](A&) {}, 127);
  expect_refused("missing input", [](A& a) { a.biases = {1}; });
  std::puts("ok");
  return 0;
}
