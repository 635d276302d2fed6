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
#include <numeric>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kChunk = 1 << 15;  // elements that a thread takes at a time
constexpr int kBlock = 256;          // of these, how many at once: what is computed in between stays in the first cache

constexpr int64_t kAhead = 2048;     // bytes, of what is fetched before it is needed

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

// Fetches what comes some blocks later: the processor's own prefetching stops at every page.
template <class T>
inline void ahead(const T* p, int64_t n) {
  const char* from = reinterpret_cast<const char*>(p) + kAhead;
  for (int64_t i = 0; i < int64_t(sizeof(T)) * n; i += 64) __builtin_prefetch(from + i);
}

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

constexpr int32_t kInfinity = 0x7f8;  // the top 12 bits of +inf; above it lie NaNs
constexpr int kFacts = 6;             // numbers of a scan's row before its counts, as the two below: core's
constexpr int kSampleShift = 17;
constexpr int64_t kCollected = 8;  // of so many risks at most one is collected: a byte a risk
constexpr int32_t kLowest = (127 - 48) << 6;

// Risks that a scan has met in its window, of one thread: their bits, and where in their chunk they lie.
struct Found {
  struct Run {
    size_t chunk;
    int count;
  };
  std::vector<int32_t> bits;
  std::vector<int32_t> at;
  std::vector<Run> runs;
  size_t count = 0;

  // Room for `n` more; where they go.
  std::pair<int32_t*, int32_t*> room(int n) {
    if (bits.size() < count + n) bits.resize(5 * (count + n) / 4), at.resize(bits.size());
    return {bits.data() + count, at.data() + count};
  }
};

// Scratch memory of the last risks, for the next ones: fresh pages cost milliseconds.
std::vector<Found>& spare() {
  static thread_local std::vector<Found> found;
  return found;
}

struct Window {
  int32_t low, high;  // bits
  bool largest;
  uint8_t bit;
};

struct Facts {
  int64_t below = 0, infinite = 0, nan = 0, zeros = 0;
};

// Counts a block, marks the codes of which it is sure (none where `code` is null), copies what lies in the window: how
// many. `found` and `where` have room for all, and for a vector more.
int sift(const Window& w, const int32_t* bits, int n, int32_t at, uint8_t* code, Facts& facts, int32_t* found,
         int32_t* where) {
  int count = 0, i = 0;
  int below = 0, zeros = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m512i low = _mm512_set1_epi32(w.low), high = _mm512_set1_epi32(w.high), one = _mm512_set1_epi32(1 << 20);
  const __m512i infinity = _mm512_set1_epi32(kInfinity << 20);
  const __m128i bit = _mm_set1_epi8(char(w.bit));
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i place = _mm512_add_epi32(_mm512_set1_epi32(at), first);
  for (; i + 16 <= n; i += 16) {
    const __m512i values = _mm512_loadu_si512(bits + i);
    const __mmask16 less = _mm512_cmplt_epi32_mask(values, low), up_to = _mm512_cmplt_epi32_mask(values, high);
    const __mmask16 inside = up_to & ~less;
    below += __builtin_popcount(less);
    zeros += __builtin_popcount(_mm512_cmplt_epi32_mask(values, one));
    if (_mm512_cmpge_epi32_mask(values, infinity)) [[unlikely]]
      for (int j = 0; j < 16; ++j) {
        const int32_t top = bits[i + j] >> 20;
        facts.infinite += top == kInfinity, facts.nan += top > kInfinity;
      }
    if (code) {
      const __m128i old = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code + i));
      const __mmask16 sure = w.largest ? ~up_to : less;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(code + i), _mm_or_si128(old, _mm_maskz_mov_epi8(sure, bit)));
    }
    // through a register: compressing to memory is microcode on some processors
    _mm512_storeu_si512(found + count, _mm512_maskz_compress_epi32(inside, values));
    _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(inside, place));
    count += __builtin_popcount(inside);
    place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
  }
#endif
  for (; i < n; ++i) {  // no branch on a risk: where it would go is a matter of chance
    const int32_t value = bits[i], top = value >> 20;
    const bool less = value < w.low, up_to = value < w.high;
    below += less, zeros += top == 0, facts.infinite += top == kInfinity, facts.nan += top > kInfinity;
    if (code) code[i] |= uint8_t(-int32_t(w.largest ? !up_to : less)) & w.bit;
    found[count] = value, where[count] = at + i;
    count += up_to && !less;
  }
  facts.below += below, facts.zeros += zeros;
  return count;
}

// The risks of one kind, of this rank: as bits, which sort as the values do. `rose_ds.core.threshold.Counted`.
class Risks {
 public:
  // Eq. 2: |gradient|. With exp_avgs, Eq. 4: | alpha |scale * gradient| / |exp_avg| - 1 |, 0 where exp_avg is 0. Masks
  // are `bit` of the codes, set where risk <= tau, or >= tau; without codes there are none.
  Risks(std::vector<at::Tensor> grads, std::vector<at::Tensor> exp_avgs, std::vector<double> alphas, double scale,
        std::vector<at::Tensor> codes, int64_t bit, bool largest)
      : grads_(std::move(grads)), exp_avgs_(std::move(exp_avgs)), codes_(std::move(codes)), scale_(float(scale)),
        bit_(uint8_t(bit)), largest_(largest), threads_(at::get_num_threads()) {
    TORCH_CHECK(exp_avgs_.empty() || exp_avgs_.size() == grads_.size());
    TORCH_CHECK(codes_.empty() || codes_.size() == grads_.size());
    std::vector<int64_t> sizes;
    for (size_t i = 0; i < grads_.size(); ++i) {
      sizes.push_back(grads_[i].numel());
      if (!exp_avgs_.empty()) {
        TORCH_CHECK(exp_avgs_[i].numel() == sizes.back());
        moments_.push_back(data_of<float>(exp_avgs_[i], at::kFloat));
        alphas_.push_back(float(alphas[i]));
      }
      TORCH_CHECK(codes_.empty() || codes_[i].numel() == sizes.back());
      code_.push_back(codes_.empty() ? nullptr : data_of<uint8_t>(codes_[i], at::kByte));
      const bool half = grads_[i].scalar_type() == at::kBFloat16;
      pointers_.push_back(data_of<void>(grads_[i], half ? at::kBFloat16 : at::kFloat));
      halves_.push_back(half);
    }
    size_ = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
    chunks_ = chunks_of(sizes);
    found_.swap(spare());
  }

  ~Risks() {
    size_t room = 0;
    for (const auto& f : found_) room += f.bits.size();
    if (room <= size_t(size_ / kCollected)) found_.swap(spare());
  }

  at::Tensor histogram(int64_t prefix, int64_t shift, int64_t width) {
    const int64_t bins = int64_t(1) << width, above = shift + width;
    at::Tensor counts = at::zeros({bins}, at::kLong);
    int64_t* total = counts.data_ptr<int64_t>();
    // the second round collects what the first has left, unless it is much (risks of zero in a first step), and the
    // third looks at these alone
    const int64_t low = prefix << above, high = low + (int64_t(1) << above);
    bool known = window_.low <= low && high <= window_.high;
    if (above == 20 && !known && !first_.empty() && first_[prefix] <= size_ / kCollected) {
      collect(low, high, false);
      known = true;
    }
    if (known) {
      for (size_t t = 0; t < found_.size(); ++t)
        each_found(t, [&](size_t, int32_t bits, int32_t) {
          if (bits >> above == prefix) ++total[(bits >> shift) & (bins - 1)];
        });
      return counts;
    }
    // two tables in turn, as neighbours often share a bin and one would wait for the other's store; what has another
    // prefix goes into a bin of its own
    std::vector<std::vector<int64_t>> tables(threads_, std::vector<int64_t>(2 * (bins + 1)));
    for_blocks([&](int t, size_t, int64_t, const int32_t* bits, int n) {
      int64_t* tables_of[] = {tables[t].data(), tables[t].data() + bins + 1};
      if (above == 32)
        for (int i = 0; i < n; ++i) ++tables_of[i & 1][bits[i] >> shift];
      else
        for (int i = 0; i < n; ++i) ++tables_of[i & 1][bits[i] >> above == prefix ? (bits[i] >> shift) & (bins - 1) : bins];
    });
    for (const auto& table : tables)
      for (int64_t i = 0; i < bins; ++i) total[i] += table[i] + table[bins + 1 + i];
    if (above == 32) first_.assign(total, total + bins);
    return counts;
  }

  at::Tensor sample(int64_t stride) const {
    at::Tensor counts = at::zeros({1 << 12}, at::kLong);
    int64_t *total = counts.data_ptr<int64_t>(), start = 0;
    for (size_t i = 0; i < grads_.size(); ++i) {
      const int64_t size = grads_[i].numel();
      int32_t bits;
      for (; start < size; start += stride) risks(i, start, 1, &bits), ++total[std::clamp((bits >> kSampleShift) - kLowest, 0, 0xfff)];
      start -= size;
    }
    return counts;
  }

  at::Tensor scan(int64_t low, int64_t high) {
    const int64_t bins = (high - low) << 7;
    at::Tensor row = at::zeros({kFacts + bins}, at::kLong);
    int64_t* out = row.data_ptr<int64_t>();
    const Facts facts = collect(low << kSampleShift, high << kSampleShift, true);
    out[1] = facts.below, out[2] = facts.infinite, out[3] = facts.nan, out[5] = facts.zeros;
    out[0] = size_;
    for (size_t t = 0; t < found_.size(); ++t)
      each_found(t, [&](size_t, int32_t bits, int32_t) { ++out[kFacts + ((bits - window_.low) >> 10)]; });
    return row;
  }

  // Sets the codes: of those alone of which the scan was not sure, where it had tau in its window.
  void mark(double tau) const {
    const int32_t bound = as_bits(float(tau));
    const uint8_t bit = bit_;
    const bool largest = largest_;
    if (sure_ && window_.low <= bound && bound < window_.high) {
      at::parallel_for(0, int64_t(found_.size()), 1, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          each_found(size_t(t), [&](size_t c, int32_t bits, int32_t at) {
            const bool kept = largest ? bits >= bound : bits <= bound;
            code_[chunks_[c].piece][chunks_[c].begin + at] |= uint8_t(-int32_t(kept)) & bit;
          });
      });
      return;
    }
    for_blocks([&](int, size_t piece, int64_t from, const int32_t* __restrict risk, int n) {
      uint8_t* __restrict code = code_[piece] + from;
      const int32_t limit = bound;
      const uint8_t one = bit, others = uint8_t(~bit);
      // no branch, and no byte that may alias the risks: or it is not vectorised
      if (largest)
        for (int i = 0; i < n; ++i) code[i] = uint8_t((code[i] & others) | (uint8_t(-int32_t(risk[i] >= limit)) & one));
      else
        for (int i = 0; i < n; ++i) code[i] = uint8_t((code[i] & others) | (uint8_t(-int32_t(risk[i] <= limit)) & one));
    });
  }

 private:
  // body(piece, first element, the risks' bits, how many) for every block of a chunk.
  template <class Body>
  void blocks_of(size_t c, const Body& body) const {
    const auto [piece, begin, size] = chunks_[c];
    int32_t bits[kBlock];
    for (int64_t b = 0; b < size; b += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, size - b));
      risks(piece, begin + b, n, bits);
      body(piece, begin + b, bits, n);
    }
  }

  template <class Body>
  void for_blocks(const Body& body) const {
    for_chunks(chunks_.size(), threads_, [&](int t, size_t c) {
      blocks_of(c, [&](size_t piece, int64_t from, const int32_t* bits, int n) { body(t, piece, from, bits, n); });
    });
  }

  // Finds the risks whose bits are in [low, high) and counts the others; `sure`: also sets the codes of those.
  Facts collect(int64_t low, int64_t high, bool sure) {
    window_ = {int32_t(low), int32_t(high), largest_, bit_}, sure_ = sure;
    found_.resize(threads_);
    for (auto& f : found_) f.count = 0, f.runs.clear();
    std::vector<Facts> facts(threads_);
    for_chunks(chunks_.size(), threads_, [&](int t, size_t c) {
      const Window w = window_;
      Found& f = found_[t];
      const size_t before = f.count;
      blocks_of(c, [&](size_t piece, int64_t from, const int32_t* bits, int n) {
        const auto [into, where] = f.room(kBlock + 16);
        uint8_t* code = sure && code_[piece] ? code_[piece] + from : nullptr;
        f.count += sift(w, bits, n, int32_t(from - chunks_[c].begin), code, facts[t], into, where);
      });
      f.runs.push_back({c, int(f.count - before)});
    });
    Facts all;
    for (const auto& f : facts)
      all.below += f.below, all.infinite += f.infinite, all.nan += f.nan, all.zeros += f.zeros;
    return all;
  }

  // body(chunk, bits, place in the chunk) for what a thread has found.
  template <class Body>
  void each_found(size_t t, const Body& body) const {
    size_t i = 0;
    for (const auto& run : found_[t].runs)
      for (const size_t end = i + run.count; i < end; ++i) body(run.chunk, found_[t].bits[i], found_[t].at[i]);
  }

  void risks(size_t piece, int64_t from, int n, int32_t* out) const {
    if (halves_[piece]) risks_of(static_cast<const uint16_t*>(pointers_[piece]) + from, piece, from, n, out);
    else risks_of(static_cast<const float*>(pointers_[piece]) + from, piece, from, n, out);
  }

  template <class G>
  void risks_of(const G* grad, size_t piece, int64_t from, int n, int32_t* __restrict out) const {
    ahead(grad, n);
    if (moments_.empty()) {
      for (int i = 0; i < n; ++i) out[i] = as_bits(load(grad, i)) & 0x7fffffff;
      return;
    }
    const float* m = moments_[piece] + from;
    ahead(m, n);
    const float alpha = alphas_[piece], scale = scale_;
    for (int i = 0; i < n; ++i) {
      const float magnitude = std::fabs(m[i]);
      const float risk = std::fabs(load(grad, i) * scale) * alpha / magnitude - 1.0f;
      const int32_t bits = as_bits(risk) & 0x7fffffff;
      out[i] = magnitude == 0.0f ? 0 : bits;
    }
  }

  std::vector<at::Tensor> grads_, exp_avgs_, codes_;
  std::vector<const void*> pointers_;
  std::vector<bool> halves_;
  std::vector<const float*> moments_;
  std::vector<uint8_t*> code_;
  std::vector<float> alphas_;
  float scale_;
  uint8_t bit_;
  bool largest_;
  int threads_;
  int64_t size_;
  std::vector<Chunk> chunks_;
  std::vector<Found> found_;
  std::vector<int64_t> first_;  // counts of the first round
  Window window_ = {0, 0, false, 0};  // of what is found
  bool sure_ = false;
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

// rose_ds.core.update.masked_adamw_, operation by operation. kWhole: the mask is 1 for all, and no code is read.
template <bool kWhole, class G>
void masked_adamw(const Scalars& s, const float* values, int64_t n, float* __restrict p, const G* __restrict grad,
                  float* __restrict m, float* __restrict v, const uint8_t* __restrict code) {
  const float v0 = values[0], v1 = values[1], v2 = values[2], v3 = values[3];
  const float weight1 = s.weight1, beta2 = s.beta2, weight2 = s.weight2, root2 = s.root2, eps = s.eps;
  const float minus_step = s.minus_step, less = s.less;
  const bool decays = s.decays;
  for (int64_t i = 0; i < n; ++i) {
    float mask = 1.0f;
    if constexpr (!kWhole) {
      const int which = code[i];
      const float low = which & 1 ? v1 : v0, high = which & 1 ? v3 : v2;
      mask = which & 2 ? high : low;
    }
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
    // one code for all is written out for a chunk: a mask that is constant along a loop is not vectorised
    thread_local std::vector<uint8_t> same(kChunk);
    const bool all = !x.codes && table[x.code] == 1.0f;
    if (!x.codes && !all) std::fill(same.begin(), same.end(), uint8_t(x.code));
    const uint8_t* code = x.codes ? x.codes + b : same.data();
    const auto run = [&](auto* g) {
      if (all) masked_adamw<true>(s, table, n, x.p + b, g + b, x.m + b, x.v + b, code);
      else masked_adamw<false>(s, table, n, x.p + b, g + b, x.m + b, x.v + b, code);
    };
    if (x.half) run(static_cast<const uint16_t*>(x.g));
    else run(static_cast<const float*>(x.g));
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Risks>(m, "Risks")
      .def(py::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<double>, double,
                    std::vector<at::Tensor>, int64_t, bool>())
      .def("histogram", &Risks::histogram, without_gil)
      .def("sample", &Risks::sample, without_gil)
      .def("scan", &Risks::scan, without_gil)
      .def("mark", &Risks::mark, without_gil);
  m.def("adamw", &adamw, without_gil);
}
