// ROSE's step on CPUs: counts of risks, masks, and masked AdamW, over many pieces of memory in one call each.
//
// Exact: what rose_ds.core computes with torch, to the last bit. No operation may be contracted or re-associated (built
// with -ffp-contract=off and never with -ffast-math); where torch uses a fused multiply-add, this says std::fma. Every
// element is computed alike wherever it lies, so nothing depends on the number of threads or on how memory is cut up.

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kChunk = 1 << 15;  // elements that a thread takes at a time
constexpr int kBlock = 256;          // of these, how many at once: what is computed in between stays in the first cache

inline float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int32_t as_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load(const float* p, int64_t i) { return p[i]; }
inline float load(const uint16_t* p, int64_t i) { return as_float(int32_t(uint32_t(p[i]) << 16)); }  // bf16

struct Chunk {
  size_t piece;
  int64_t begin, size;
};

std::vector<Chunk> chunks_of(const std::vector<int64_t>& sizes) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < sizes.size(); ++i)
    for (int64_t b = 0; b < sizes[i]; b += kChunk) chunks.push_back({i, b, std::min(kChunk, sizes[i] - b)});
  return chunks;
}

// body(thread, number of the chunk) for every chunk; a thread that is free takes the next one.
template <class Body>
void for_chunks(size_t count, int threads, const Body& body) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (size_t i; (i = next.fetch_add(1)) < count;) body(int(t), i);
  });
}

// A 1-D tensor of the type that is wanted; the caller keeps it alive.
template <class T>
T* data_of(const at::Tensor& t, at::ScalarType type) {
  TORCH_CHECK(t.is_contiguous() && t.device().is_cpu() && t.scalar_type() == type);
  return static_cast<T*>(t.data_ptr());
}

// --- risks -----------------------------------------------------------------------------------------------------------

// The risks of one kind, of this rank: as bits, which sort as the values do.
class Risks {
 public:
  // Eq. 2: |gradient|. With exp_avgs, Eq. 4: | alpha |scale * gradient| / |exp_avg| - 1 |, 0 where exp_avg is 0.
  Risks(std::vector<at::Tensor> grads, std::vector<at::Tensor> exp_avgs, std::vector<double> alphas, double scale)
      : grads_(std::move(grads)), exp_avgs_(std::move(exp_avgs)), scale_(float(scale)), threads_(at::get_num_threads()) {
    TORCH_CHECK(exp_avgs_.empty() || exp_avgs_.size() == grads_.size());
    std::vector<int64_t> sizes;
    for (size_t i = 0; i < grads_.size(); ++i) {
      sizes.push_back(grads_[i].numel());
      if (!exp_avgs_.empty()) {
        TORCH_CHECK(exp_avgs_[i].numel() == sizes.back());
        moments_.push_back(data_of<float>(exp_avgs_[i], at::kFloat));
        alphas_.push_back(float(alphas[i]));
      }
      const bool half = grads_[i].scalar_type() == at::kBFloat16;
      pointers_.push_back(data_of<void>(grads_[i], half ? at::kBFloat16 : at::kFloat));
      halves_.push_back(half);
    }
    chunks_ = chunks_of(sizes);
  }

  // Counts by the bits [shift, shift + width) of those risks whose higher bits are `prefix`: int64 (2**width,).
  at::Tensor histogram(int64_t prefix, int64_t shift, int64_t width) {
    const int64_t bins = int64_t(1) << width;
    at::Tensor counts = at::zeros({bins}, at::kLong);
    int64_t* total = counts.data_ptr<int64_t>();
    if (shift + width >= 32) {
      count_all(int(shift), bins, total);
      return counts;
    }
    // The second round collects what the first one has left, a few in a hundred; the third looks at these alone.
    const int32_t first = int32_t(prefix >> std::max<int64_t>(0, 20 - shift - width));
    if (!collected_ || collected_prefix_ != first) collect(first);
    for (const auto& list : candidates_)
      for (int32_t bits : list)
        if (bits >> (shift + width) == prefix) ++total[(bits >> shift) & (bins - 1)];
    return counts;
  }

  // Sets `bit` of the codes where risk <= tau, or >= tau.
  void mark(double tau, int64_t bit, bool largest, const std::vector<at::Tensor>& codes) const {
    std::vector<uint8_t*> out;
    for (size_t i = 0; i < codes.size(); ++i) {
      TORCH_CHECK(codes[i].numel() == grads_[i].numel());
      out.push_back(data_of<uint8_t>(codes[i], at::kByte));
    }
    const int32_t bound = as_bits(float(tau));
    const uint8_t one = uint8_t(bit);
    for_blocks([&](int, size_t piece, int64_t from, const int32_t* __restrict risk, int n) {
      uint8_t* __restrict code = out[piece] + from;
      // no branch, and no byte that may alias the risks: or it is not vectorised
      if (largest)
        for (int i = 0; i < n; ++i) code[i] |= uint8_t(-int32_t(risk[i] >= bound)) & one;
      else
        for (int i = 0; i < n; ++i) code[i] |= uint8_t(-int32_t(risk[i] <= bound)) & one;
    });
  }

 private:
  // body(thread, piece, first element, the risks' bits, how many) for every block.
  template <class Body>
  void for_blocks(const Body& body) const {
    for_chunks(chunks_.size(), threads_, [&](int t, size_t c) {
      const auto [piece, begin, size] = chunks_[c];
      int32_t bits[kBlock];
      for (int64_t b = 0; b < size; b += kBlock) {
        const int64_t from = begin + b;
        const int n = int(std::min<int64_t>(kBlock, size - b));
        if (halves_[piece]) risks_of(static_cast<const uint16_t*>(pointers_[piece]) + from, piece, from, n, bits);
        else risks_of(static_cast<const float*>(pointers_[piece]) + from, piece, from, n, bits);
        body(t, piece, from, bits, n);
      }
    });
  }

  template <class G>
  void risks_of(const G* grad, size_t piece, int64_t from, int n, int32_t* __restrict out) const {
    if (moments_.empty()) {
      for (int i = 0; i < n; ++i) out[i] = as_bits(load(grad, i)) & 0x7fffffff;
      return;
    }
    const float* m = moments_[piece] + from;
    const float alpha = alphas_[piece], scale = scale_;
    for (int i = 0; i < n; ++i) {
      const float magnitude = std::fabs(m[i]);
      const float risk = std::fabs(load(grad, i) * scale) * alpha / magnitude - 1.0f;
      const int32_t bits = as_bits(risk) & 0x7fffffff;
      out[i] = magnitude == 0.0f ? 0 : bits;
    }
  }

  void count_all(int shift, int64_t bins, int64_t* total) const {
    // two tables in turn, as neighbours often share a bin and one would wait for the other's store
    std::vector<std::vector<int32_t>> tables(threads_, std::vector<int32_t>(2 * bins));
    for_blocks([&](int t, size_t, int64_t, const int32_t* bits, int n) {
      int32_t *even = tables[t].data(), *odd = even + bins;
      int i = 0;
      for (; i + 1 < n; i += 2) ++even[bits[i] >> shift], ++odd[bits[i + 1] >> shift];
      if (i < n) ++even[bits[i] >> shift];
    });
    for (const auto& table : tables)
      for (size_t i = 0; i < table.size(); ++i) total[i % bins] += table[i];
  }

  // Copies the values that begin with `prefix`; how many. `out` has room for all, and for a vector more.
  static int those_with(int32_t prefix, const int32_t* bits, int n, int32_t* out) {
    int count = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i wanted = _mm512_set1_epi32(prefix);
    for (; i + 16 <= n; i += 16) {
      const __m512i values = _mm512_loadu_si512(bits + i);
      const __mmask16 there = _mm512_cmpeq_epi32_mask(_mm512_srai_epi32(values, 20), wanted);
      // through a register: compressing to memory is microcode on some processors
      _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(there, values));
      count += __builtin_popcount(there);
    }
#endif
    for (; i < n; ++i) {  // no branch: where it would go is a matter of chance
      out[count] = bits[i];
      count += (bits[i] >> 20) == prefix;
    }
    return count;
  }

  void collect(int32_t prefix) {
    candidates_.resize(threads_);
    for (auto& list : candidates_) list.clear();
    for_blocks([&](int t, size_t, int64_t, const int32_t* bits, int n) {
      int32_t found[kBlock + 16];
      candidates_[t].insert(candidates_[t].end(), found, found + those_with(prefix, bits, n, found));
    });
    collected_ = true, collected_prefix_ = prefix;
  }

  std::vector<at::Tensor> grads_, exp_avgs_;
  std::vector<const void*> pointers_;
  std::vector<bool> halves_;
  std::vector<const float*> moments_;
  std::vector<float> alphas_;
  float scale_;
  int threads_;
  std::vector<Chunk> chunks_;
  std::vector<std::vector<int32_t>> candidates_;
  bool collected_ = false;
  int32_t collected_prefix_ = 0;
};

// --- masked AdamW ----------------------------------------------------------------------------------------------------

struct Scalars {  // computed in fp64 and rounded once, as torch does
  float weight1, beta2, weight2, root2, eps, minus_step, less;
  bool decays;
};

// torch.lerp's two branches, each a fused multiply-add
inline float lerp(float a, float b, float w) {
  const bool near_a = std::fabs(w) < 0.5f;
  return std::fma(near_a ? w : w - 1.0f, b - a, near_a ? a : b);
}

// rose_ds.core.update.masked_adamw_, operation by operation.
template <class G>
void masked_adamw(const Scalars& s, const float* values, int64_t n, float* __restrict p, const G* __restrict grad,
                  float* __restrict m, float* __restrict v, const uint8_t* __restrict code) {
  const float v0 = values[0], v1 = values[1], v2 = values[2], v3 = values[3];
  const float weight1 = s.weight1, beta2 = s.beta2, weight2 = s.weight2, root2 = s.root2, eps = s.eps;
  const float minus_step = s.minus_step, less = s.less;
  const bool decays = s.decays;
  for (int64_t i = 0; i < n; ++i) {
    const int which = code[i];
    const float low = which & 1 ? v1 : v0, high = which & 1 ? v3 : v2, mask = which & 2 ? high : low;
    const bool frozen = mask == 0.0f, whole = mask == 1.0f;
    const float p0 = p[i], g = load(grad, i), m0 = m[i], v0_ = v[i];
    const float mixed = lerp(m0, g, mask);
    float used = whole ? g : mixed;
    used = frozen ? m0 : used;
    const float moved = lerp(m0, used, weight1);
    const float m1 = frozen ? m0 : moved;
    const float second = std::fma(weight2 * used, used, v0_ * beta2);
    const float denominator = std::sqrt(second) / root2 + eps;
    const float step = mask * minus_step * m1 / denominator;
    const float kept = decays ? p0 * (mask * less + 1.0f) : p0;
    const float p1 = step + kept;
    p[i] = frozen ? p0 : p1, m[i] = m1, v[i] = second;
  }
}

// Tensors are 1-D pieces of parameters, gradients (fp32 or bf16) and moments. A piece's mask is values[code]: codes has a
// uint8 tensor for it, or is empty where the piece has one code, in `code`.
void adamw(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& grads,
           const std::vector<at::Tensor>& exp_avgs, const std::vector<at::Tensor>& exp_avg_sqs,
           const std::vector<at::Tensor>& codes, const std::vector<int64_t>& code, const std::vector<double>& values,
           double step, double lr, double beta1, double beta2, double eps, double weight_decay) {
  Scalars s;
  s.weight1 = float(1 - beta1), s.beta2 = float(beta2), s.weight2 = float(1 - beta2);
  s.root2 = float(std::sqrt(1 - std::pow(beta2, step))), s.eps = float(eps);
  s.minus_step = float(-(lr / (1 - std::pow(beta1, step))));
  s.decays = weight_decay != 0, s.less = float(double(float(1 - lr * weight_decay)) - 1.0);
  TORCH_CHECK(values.size() == 4);
  const float table[4] = {float(values[0]), float(values[1]), float(values[2]), float(values[3])};
  struct Piece {
    float *p, *m, *v;
    const void* g;
    const uint8_t* codes;
    bool half;
    int code;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel();
    TORCH_CHECK(grads[i].numel() == n && exp_avgs[i].numel() == n && exp_avg_sqs[i].numel() == n);
    const bool half = grads[i].scalar_type() == at::kBFloat16, own = codes[i].numel() > 0 || n == 0;
    TORCH_CHECK(!own || codes[i].numel() == n);
    pieces.push_back({data_of<float>(params[i], at::kFloat), data_of<float>(exp_avgs[i], at::kFloat),
                      data_of<float>(exp_avg_sqs[i], at::kFloat),
                      data_of<void>(grads[i], half ? at::kBFloat16 : at::kFloat),
                      own ? data_of<uint8_t>(codes[i], at::kByte) : nullptr, half, int(code[i])});
    sizes.push_back(n);
  }
  const auto chunks = chunks_of(sizes);
  for_chunks(chunks.size(), at::get_num_threads(), [&](int, size_t c) {
    const Piece& x = pieces[chunks[c].piece];
    const int64_t b = chunks[c].begin, n = chunks[c].size;
    // one code for all is written out for a chunk: a mask that is a constant to the compiler is not vectorised
    thread_local std::vector<uint8_t> same(kChunk);
    if (!x.codes) std::fill(same.begin(), same.end(), uint8_t(x.code));
    const uint8_t* code = x.codes ? x.codes + b : same.data();
    const auto run = [&](auto* g) { masked_adamw(s, table, n, x.p + b, g + b, x.m + b, x.v + b, code); };
    if (x.half) run(static_cast<const uint16_t*>(x.g));
    else run(static_cast<const float*>(x.g));
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Risks>(m, "Risks")
      .def(py::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<double>, double>())
      .def("histogram", &Risks::histogram, without_gil)
      .def("mark", &Risks::mark, without_gil);
  m.def("adamw", &adamw, without_gil);
}
