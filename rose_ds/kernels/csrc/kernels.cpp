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
constexpr int kWord = 64;            // elements to a word of a mask of bits

constexpr int64_t kAhead = 4096;     // bytes, of what is fetched before it is needed
constexpr int64_t kSampleAhead = 24;  // the same of a sample, in risks

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
constexpr int kSampleShift = 17, kScanShift = 11;
constexpr int64_t kCollected = 8;  // of so many risks at most one is collected: a byte a risk
constexpr int32_t kLowest = (127 - 48) << 6;

// Risks that a scan has met in its window, of one thread: their bits, and where in their chunk they lie. On cache lines
// of its own: another thread's stores would take them away at every block.
struct alignas(64) Found {
  struct Run {
    size_t chunk, count;
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

constexpr size_t kSpare = 2;  // of an ensemble's step

// Scratch memory of earlier risks, for the next ones: fresh pages cost milliseconds.
std::vector<std::vector<Found>>& spare() {
  static thread_local std::vector<std::vector<Found>> found;
  return found;
}

struct Window {
  int32_t low, high;  // bits
  bool largest;
};

struct alignas(64) Facts {
  int64_t below = 0, infinite = 0, nan = 0, zeros = 0;
};

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Appends the places in a block of a word's ones, which begins at `from` there: how many.
inline int append(uint64_t ones, int from, uint8_t* places) {
#if defined(__AVX512VBMI2__)
  alignas(64) static constexpr auto kNumbers = [] {
    struct { uint8_t at[kWord]; } numbers{};
    for (int j = 0; j < kWord; ++j) numbers.at[j] = uint8_t(j);
    return numbers;
  }();
  const __m512i numbers = _mm512_add_epi8(_mm512_load_si512(kNumbers.at), _mm512_set1_epi8(char(from)));
  // through a register: compressing to memory is microcode on some processors
  _mm512_storeu_si512(places, _mm512_maskz_compress_epi8(ones, numbers));
  return __builtin_popcountll(ones);
#else
  int count = 0;
  for (; ones; ones &= ones - 1) places[count++] = uint8_t(from + __builtin_ctzll(ones));
  return count;
#endif
}
#endif

// Counts a block, sets the words of those it is sure of (none where `words` is null), copies what lies in the window: how
// many. `found` and `where` have room for all. `at`: where the block begins in its chunk; `stride`: from one word to the
// next.
inline int sift(const Window& w, const int32_t* bits, int n, int32_t at, uint64_t* words, int64_t stride, Facts& facts,
                int32_t* found, int32_t* where) {
  int count = 0, i = 0;
  int below = 0, zeros = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
  static_assert(kBlock <= 256);  // a place in a block is a byte
  const __m512i low = _mm512_set1_epi32(w.low), high = _mm512_set1_epi32(w.high);
  __m512i top = _mm512_setzero_si512(), bottom = _mm512_set1_epi32(kInfinity << 20);
  uint8_t places[kBlock + kWord];
  for (; i + kWord <= n; i += kWord) {
    const __m512i values[4] = {_mm512_loadu_si512(bits + i), _mm512_loadu_si512(bits + i + 16),
                               _mm512_loadu_si512(bits + i + 32), _mm512_loadu_si512(bits + i + 48)};
    const auto below_of = [&](__m512i bound) {
      const __mmask32 last = _mm512_kunpackw(_mm512_cmplt_epi32_mask(values[3], bound), _mm512_cmplt_epi32_mask(values[2], bound));
      const __mmask32 head = _mm512_kunpackw(_mm512_cmplt_epi32_mask(values[1], bound), _mm512_cmplt_epi32_mask(values[0], bound));
      return uint64_t(_mm512_kunpackd(last, head));
    };
    const uint64_t less = below_of(low), up_to = below_of(high);
    for (const __m512i& v : values) top = _mm512_max_epi32(top, v), bottom = _mm512_min_epi32(bottom, v);
    below += __builtin_popcountll(less);
    if (words) words[i / kWord * stride] = w.largest ? ~up_to : less;
    count += append(up_to & ~less, i, places + count);
  }
  for (int j = 0; j < count; ++j) found[j] = bits[places[j]], where[j] = at + places[j];
  if (_mm512_cmpge_epi32_mask(top, _mm512_set1_epi32(kInfinity << 20))) [[unlikely]]
    for (int j = 0; j < i; ++j) facts.infinite += bits[j] >> 20 == kInfinity, facts.nan += bits[j] >> 20 > kInfinity;
  if (_mm512_cmplt_epi32_mask(bottom, _mm512_set1_epi32(1 << 20)))
    for (int j = 0; j < i; ++j) zeros += bits[j] >> 20 == 0;
#endif
  for (; i < n; i += kWord) {  // no branch on a risk: where it would go is a matter of chance
    uint64_t sure = 0;
    for (int j = i; j < std::min(i + kWord, n); ++j) {
      const int32_t value = bits[j], digits = value >> 20;
      const bool less = value < w.low, up_to = value < w.high;
      below += less, zeros += digits == 0, facts.infinite += digits == kInfinity, facts.nan += digits > kInfinity;
      sure |= uint64_t(w.largest ? !up_to : less) << (j - i);
      found[count] = value, where[count] = at + j;
      count += up_to && !less;
    }
    if (words) words[i / kWord * stride] = sure;
  }
  facts.below += below, facts.zeros += zeros;
  return count;
}

// The risks of one kind, of this rank: as bits, which sort as the values do. `rose_ds.core.threshold.Counted`.
class Risks {
 public:
  // Eq. 2: |gradient|. With exp_avgs, Eq. 4: | alpha |scale * gradient - share * other| / |exp_avg| - 1 |, 0 where exp_avg
  // is 0; no others where share is 0. Masks are bits, set where risk <= tau, or >= tau: the given plane of `masks`, each
  // of (words, planes); without masks there are none.
  Risks(std::vector<at::Tensor> grads, std::vector<at::Tensor> exp_avgs, std::vector<double> alphas, double scale,
        std::vector<at::Tensor> others, double share, std::vector<at::Tensor> masks, int64_t plane, bool largest)
      : grads_(std::move(grads)), exp_avgs_(std::move(exp_avgs)), others_(std::move(others)), masks_(std::move(masks)),
        scale_(float(scale)), share_(float(share)), largest_(largest), threads_(at::get_num_threads()) {
    TORCH_CHECK(exp_avgs_.empty() || exp_avgs_.size() == grads_.size());
    TORCH_CHECK(others_.empty() || (others_.size() == grads_.size() && !exp_avgs_.empty()));
    TORCH_CHECK(masks_.empty() || masks_.size() == grads_.size());
    auto& sizes = sizes_;
    for (size_t i = 0; i < grads_.size(); ++i) {
      sizes.push_back(grads_[i].numel());
      if (!exp_avgs_.empty()) {
        TORCH_CHECK(exp_avgs_[i].numel() == sizes.back());
        moments_.push_back(data_of<float>(exp_avgs_[i], at::kFloat));
        alphas_.push_back(float(alphas[i]));
        TORCH_CHECK(others_.empty() || others_[i].numel() == sizes.back());
        other_.push_back(others_.empty() ? nullptr : data_of<float>(others_[i], at::kFloat));
      }
      if (!masks_.empty()) {
        TORCH_CHECK(masks_[i].dim() == 2 && masks_[i].size(0) == (sizes.back() + kWord - 1) / kWord);
        TORCH_CHECK(0 <= plane && plane < masks_[i].size(1));
        planes_ = masks_[i].size(1);
        auto* words = reinterpret_cast<uint64_t*>(data_of<int64_t>(masks_[i], at::kLong));
        words_.push_back(words ? words + plane : nullptr);
      }
      const bool half = grads_[i].scalar_type() == at::kBFloat16;
      pointers_.push_back(data_of<void>(grads_[i], half ? at::kBFloat16 : at::kFloat));
      halves_.push_back(half);
    }
    size_ = std::accumulate(sizes.begin(), sizes.end(), int64_t(0));
    chunks_ = chunks_of(sizes);
    if (!spare().empty()) found_ = std::move(spare().back()), spare().pop_back();
  }

  ~Risks() {
    size_t room = 0;
    for (const auto& f : found_) room += f.bits.size();
    if (room && room <= size_t(size_ / kCollected) && spare().size() < kSpare) spare().push_back(std::move(found_));
  }

  at::Tensor histogram(int64_t prefix, int64_t shift, int64_t width) {
    const int64_t bins = int64_t(1) << width, above = shift + width;
    // the second round collects what the first has left, unless it is much (risks of zero in a first step), and the
    // third looks at these alone
    const int64_t low = prefix << above, high = low + (int64_t(1) << above);
    bool known = window_.low <= low && high <= window_.high;
    if (above == 20 && !known && !first_.empty() && first_[prefix] <= size_ / kCollected) {
      open(low, high, false);
      collect({this});
      known = true;
    }
    if (known)
      return summed(bins, [&](size_t t, int64_t* counts) {
        each_found(t, [&](size_t, int32_t bits, int32_t) {
          if (bits >> above == prefix) ++counts[(bits >> shift) & (bins - 1)];
        });
      });
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
    at::Tensor counts = at::zeros({bins}, at::kLong);
    int64_t* total = counts.data_ptr<int64_t>();
    for (const auto& table : tables)
      for (int64_t i = 0; i < bins; ++i) total[i] += table[i] + table[bins + 1 + i];
    if (above == 32) first_.assign(total, total + bins);
    return counts;
  }

  at::Tensor sample(int64_t stride) {
    drawn_.resize((size_ + stride - 1) / stride);
    return summed(1 << 12, [&](size_t t, int64_t* counts) {
      const auto [first, end] = drawn_by(t);
      Place next(*this, first * stride), far = next;
      for (int64_t asked = first, j = first; j < end; ++j, next.move(*this, stride)) {
        for (; asked < std::min(end, j + kSampleAhead); ++asked, far.move(*this, stride)) ask_for(far.piece, far.at);
        risks<false>(next.piece, next.at, 1, &drawn_[j]);
        ++counts[std::clamp((drawn_[j] >> kSampleShift) - kLowest, 0, 0xfff)];
      }
    });
  }

  at::Tensor zoom(int64_t low, int64_t high) const {
    return summed((high - low) << 6, [&](size_t t, int64_t* counts) {
      const auto [first, end] = drawn_by(t);
      for (int64_t j = first; j < end; ++j)
        if (const int64_t top = drawn_[j] >> kSampleShift; low <= top && top < high)
          ++counts[(drawn_[j] >> kScanShift) - (low << 6)];
    });
  }

  // Of several risks of the same elements, each in its own window [lows, highs), in one look at the memory: a row for each.
  static std::vector<at::Tensor> scan(const std::vector<Risks*>& all, const std::vector<int64_t>& lows,
                                      const std::vector<int64_t>& highs) {
    TORCH_CHECK(lows.size() == all.size() && highs.size() == all.size());
    for (size_t i = 0; i < all.size(); ++i) all[i]->open(lows[i] << kScanShift, highs[i] << kScanShift, true);
    collect(all);
    std::vector<at::Tensor> rows;
    for (Risks* r : all) {
      const int64_t bins = (int64_t(r->window_.high) - r->window_.low) >> (kScanShift - 1);
      rows.push_back(r->summed(kFacts + bins, [&](size_t t, int64_t* counts) {
        r->each_found(t, [&](size_t, int32_t bits, int32_t) { ++counts[kFacts + ((bits - r->window_.low) >> 10)]; });
      }));
      int64_t* out = rows.back().data_ptr<int64_t>();
      out[0] = r->size_;
      for (const auto& f : r->facts_) out[1] += f.below, out[2] += f.infinite, out[3] += f.nan, out[5] += f.zeros;
    }
    return rows;
  }

  // Sets the mask: of those alone of which the scan was not sure, where it had tau in its window.
  void mark(double tau) const {
    if (masks_.empty()) return;
    const int32_t bound = as_bits(float(tau));
    const bool largest = largest_;
    if (sure_ && window_.low <= bound && bound < window_.high) {
      at::parallel_for(0, int64_t(found_.size()), 1, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; ++t)
          each_found(size_t(t), [&](size_t c, int32_t bits, int32_t at) {
            const bool kept = largest ? bits >= bound : bits <= bound;
            const int64_t i = chunks_[c].begin + at;
            words_[chunks_[c].piece][i / kWord * planes_] |= uint64_t(kept) << i % kWord;
          });
      });
      return;
    }
    for_blocks([&](int, size_t piece, int64_t from, const int32_t* risk, int n) {
      uint64_t* words = words_[piece] + from / kWord * planes_;
      for (int i = 0; i < n; i += kWord) {
        uint64_t kept = 0;
        for (int j = 0; j < std::min(kWord, n - i); ++j)
          kept |= uint64_t(largest ? risk[i + j] >= bound : risk[i + j] <= bound) << j;
        words[i / kWord * planes_] = kept;
      }
    });
  }

 private:
  // The sum over threads of what body(thread, counts) counts.
  template <class Body>
  at::Tensor summed(int64_t bins, const Body& body) const {
    at::Tensor rows = at::zeros({threads_, bins}, at::kLong);
    int64_t* data = rows.data_ptr<int64_t>();
    at::parallel_for(0, threads_, 1, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) body(size_t(t), data + t * bins);
    });
    return rows.sum(0);
  }

  // body(piece, first element, the risks' bits, how many) for every block of a chunk.
  template <class Body>
  void blocks_of(size_t c, const Body& body) const {
    const auto [piece, begin, size] = chunks_[c];
    int32_t bits[kBlock];
    for (int64_t b = 0; b < size; b += kBlock) {
      const int n = int(std::min<int64_t>(kBlock, size - b));
      risks<true>(piece, begin + b, n, bits);
      body(piece, begin + b, bits, n);
    }
  }

  template <class Body>
  void for_blocks(const Body& body) const {
    for_chunks(chunks_.size(), threads_, [&](int t, size_t c) {
      blocks_of(c, [&](size_t piece, int64_t from, const int32_t* bits, int n) { body(t, piece, from, bits, n); });
    });
  }

  // Which of the sample's risks a thread draws, and has in its cache.
  std::pair<int64_t, int64_t> drawn_by(size_t t) const {
    const int64_t n = int64_t(drawn_.size());
    return {int64_t(t) * n / threads_, int64_t(t + 1) * n / threads_};
  }

  // A window of bits [low, high) for what is collected next; `sure`: the masks of what is not in it are set.
  void open(int64_t low, int64_t high, bool sure) {
    window_ = {int32_t(low), int32_t(high), largest_}, sure_ = sure && !masks_.empty();
    found_.resize(threads_), facts_.assign(threads_, Facts());
    for (auto& f : found_) f.count = 0, f.runs.clear();
  }

  // Finds the risks in each one's window, and counts the others.
  static void collect(const std::vector<Risks*>& all) {
    const Risks& one = *all.at(0);
    for (const Risks* r : all) TORCH_CHECK(r->sizes_ == one.sizes_ && r->threads_ == one.threads_);
    for_chunks(one.chunks_.size(), one.threads_, [&](int t, size_t c) {
      const auto [piece, begin, size] = one.chunks_[c];
      for (Risks* r : all) r->found_[t].runs.push_back({c, r->found_[t].count});
      for (int64_t b = 0; b < size; b += kBlock)
        for (Risks* r : all) r->collect_block(t, piece, begin + b, int(b), int(std::min<int64_t>(kBlock, size - b)));
      for (Risks* r : all) r->found_[t].runs.back().count = r->found_[t].count - r->found_[t].runs.back().count;
    });
  }

  void collect_block(int t, size_t piece, int64_t from, int at, int n) {
    int32_t bits[kBlock];
    risks<true>(piece, from, n, bits);
    Found& f = found_[t];
    const auto [into, where] = f.room(kBlock);
    uint64_t* words = sure_ ? words_[piece] + from / kWord * planes_ : nullptr;
    f.count += sift(window_, bits, n, at, words, planes_, facts_[t], into, where);
  }

  // body(chunk, bits, place in the chunk) for what a thread has found.
  template <class Body>
  void each_found(size_t t, const Body& body) const {
    size_t i = 0;
    for (const auto& run : found_[t].runs)
      for (const size_t end = i + run.count; i < end; ++i) body(run.chunk, found_[t].bits[i], found_[t].at[i]);
  }

  // An element, by its number among those of all pieces.
  struct Place {
    Place(const Risks& risks, int64_t number) : at(number) { settle(risks); }
    void move(const Risks& risks, int64_t by) { at += by, settle(risks); }
    void settle(const Risks& risks) {
      for (; piece < risks.grads_.size() && at >= risks.sizes_[piece]; ++piece) at -= risks.sizes_[piece];
    }
    size_t piece = 0;
    int64_t at;
  };

  // Fetches what one risk is computed from.
  void ask_for(size_t piece, int64_t i) const {
    __builtin_prefetch(static_cast<const char*>(pointers_[piece]) + i * (halves_[piece] ? 2 : 4));
    if (moments_.empty()) return;
    __builtin_prefetch(moments_[piece] + i);
    if (other_[piece]) __builtin_prefetch(other_[piece] + i);
  }

  // kFetch: blocks after this one will be asked for.
  template <bool kFetch>
  void risks(size_t piece, int64_t from, int n, int32_t* out) const {
    if (halves_[piece]) risks_of<kFetch>(static_cast<const uint16_t*>(pointers_[piece]) + from, piece, from, n, out);
    else risks_of<kFetch>(static_cast<const float*>(pointers_[piece]) + from, piece, from, n, out);
  }

  template <bool kFetch, class G>
  void risks_of(const G* grad, size_t piece, int64_t from, int n, int32_t* __restrict out) const {
    if constexpr (kFetch) ahead(grad, n);
    if (moments_.empty()) {
      for (int i = 0; i < n; ++i) out[i] = as_bits(load(grad, i)) & 0x7fffffff;
      return;
    }
    const float* m = moments_[piece] + from;
    if constexpr (kFetch) ahead(m, n);
    const float alpha = alphas_[piece], scale = scale_, share = share_;
    const auto risk = [&](float g, float moment) {
      const float magnitude = std::fabs(moment);
      const int32_t bits = as_bits(std::fabs(g) * alpha / magnitude - 1.0f) & 0x7fffffff;
      return magnitude == 0.0f ? 0 : bits;
    };
    if (const float* other = other_[piece]) {
      if constexpr (kFetch) ahead(other + from, n);
      for (int i = 0; i < n; ++i) out[i] = risk(load(grad, i) * scale - other[from + i] * share, m[i]);
      return;
    }
    for (int i = 0; i < n; ++i) out[i] = risk(load(grad, i) * scale, m[i]);
  }

  std::vector<at::Tensor> grads_, exp_avgs_, others_, masks_;
  std::vector<int64_t> sizes_;
  std::vector<const void*> pointers_;
  std::vector<bool> halves_;
  std::vector<const float*> moments_, other_;
  std::vector<uint64_t*> words_;  // of the plane
  int64_t planes_ = 1;
  std::vector<float> alphas_;
  float scale_, share_;
  bool largest_;
  int threads_;
  int64_t size_;
  std::vector<Chunk> chunks_;
  std::vector<Found> found_;
  std::vector<Facts> facts_;  // of the last look, by thread
  std::vector<int64_t> first_;  // counts of the first round
  std::vector<int32_t> drawn_;  // the last sample
  Window window_ = {0, 0, false};  // of what is found
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

// 1 for all, so that none is read; 0 or 1; any numbers; any, of the gradient alone
enum class Mask { kWhole, kHard, kSoft, kGradient };

// rose_ds.core.update.masked_adamw_, operation by operation.
template <Mask kMask, class G>
void masked_adamw(const Scalars& s, int64_t n, float* __restrict p, const G* __restrict grad, float* __restrict m,
                  float* __restrict v, const float* __restrict masks) {
  const float weight1 = s.weight1, beta2 = s.beta2, weight2 = s.weight2, root2 = s.root2, eps = s.eps;
  const float minus_step = s.minus_step, less = s.less, kept_of_whole = s.less + 1.0f;
  const bool decays = s.decays;
  for (int64_t i = 0; i < n; ++i) {
    const float mask = kMask == Mask::kWhole ? 1.0f : masks[i];
    const bool frozen = kMask != Mask::kGradient && mask == 0.0f, whole = mask == 1.0f;
    const float p0 = p[i], g = load(grad, i), m0 = m[i], v0 = v[i];
    float used = g, step_size = minus_step, kept = kept_of_whole;
    if constexpr (kMask == Mask::kSoft) {
      const float mixed = lerp(m0, g, mask);
      used = whole ? g : mixed, step_size = mask * minus_step, kept = mask * less + 1.0f;
    }
    if constexpr (kMask == Mask::kGradient) used = g * mask;
    used = frozen ? m0 : used;
    const float moved = lerp(m0, used, weight1);
    const float m1 = frozen ? m0 : moved;
    const float second = std::fma(weight2 * used, used, v0 * beta2);
    const float step = step_size * m1 / (std::sqrt(second) / root2 + eps);
    const float p1 = step + (decays ? p0 * kept : p0);
    p[i] = frozen ? p0 : p1, m[i] = m1, v[i] = second;
  }
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512 load(const float* p, __mmask16 live) { return _mm512_maskz_loadu_ps(live, p); }
inline __m512 load(const uint16_t* p, __mmask16 live) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, p)), 16));
}

// Of two words of bits: which elements have a mask of 1, where there are no others but 0.
inline uint64_t ones_of(const float (&values)[4], uint64_t first, uint64_t second) {
  const auto where = [&](int i, uint64_t bits) { return values[i] == 1.0f ? bits : 0; };
  return where(0, ~first & ~second) | where(1, first & ~second) | where(2, ~first & second) | where(3, first & second);
}

// torch.lerp by lane
inline __m512 lerp(__m512 a, __m512 b, __m512 w) {
  const __mmask16 near_a = _mm512_cmp_ps_mask(_mm512_abs_ps(w), _mm512_set1_ps(0.5f), _CMP_LT_OQ);
  const __m512 weight = _mm512_mask_sub_ps(w, __mmask16(~near_a), w, _mm512_set1_ps(1.0f));
  return _mm512_fmadd_ps(weight, _mm512_sub_ps(b, a), _mm512_mask_mov_ps(b, near_a, a));
}

// The same with masks of bits, a word of each plane at a time. Hard: `first` says whether an element's mask is 1 or 0; else
// it is the one of `values` that the two bits say.
template <bool kHard, class G>
void masked_adamw(const Scalars& s, int n, float* p, const G* grad, float* m, float* v, const float (&values)[4],
                  uint64_t first, uint64_t second) {
  const __m512 weight1 = _mm512_set1_ps(s.weight1), beta2 = _mm512_set1_ps(s.beta2), eps = _mm512_set1_ps(s.eps);
  const __m512 weight2 = _mm512_set1_ps(s.weight2), root2 = _mm512_set1_ps(s.root2), one = _mm512_set1_ps(1.0f);
  const __m512 minus_step = _mm512_set1_ps(s.minus_step), less = _mm512_set1_ps(s.less);
  const __m512 value0 = _mm512_set1_ps(values[0]), value1 = _mm512_set1_ps(values[1]);
  const __m512 value2 = _mm512_set1_ps(values[2]), value3 = _mm512_set1_ps(values[3]);
  for (int i = 0; i < n; i += 16, first >>= 16, second >>= 16) {
    const __mmask16 live = n - i < 16 ? __mmask16((1 << (n - i)) - 1) : __mmask16(0xffff);
    const __m512 p0 = load(p + i, live), g = load(grad + i, live), m0 = load(m + i, live), v0 = load(v + i, live);
    __mmask16 moves = __mmask16(first);
    __m512 used = g, step_size = minus_step, kept = _mm512_add_ps(less, one);
    if constexpr (!kHard) {
      const __m512 low = _mm512_mask_mov_ps(value0, moves, value1), high = _mm512_mask_mov_ps(value2, moves, value3);
      const __m512 mask = _mm512_mask_mov_ps(low, __mmask16(second), high);
      moves = _mm512_cmp_ps_mask(mask, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      used = _mm512_mask_mov_ps(lerp(m0, g, mask), _mm512_cmp_ps_mask(mask, one, _CMP_EQ_OQ), g);
      step_size = _mm512_mul_ps(mask, minus_step), kept = _mm512_add_ps(_mm512_mul_ps(mask, less), one);
    }
    used = _mm512_mask_mov_ps(m0, moves, used);
    const __m512 m1 = _mm512_mask_mov_ps(m0, moves, lerp(m0, used, weight1));
    const __m512 moment2 = _mm512_fmadd_ps(_mm512_mul_ps(weight2, used), used, _mm512_mul_ps(v0, beta2));
    const __m512 denominator = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(moment2), root2), eps);
    const __m512 step = _mm512_div_ps(_mm512_mul_ps(step_size, m1), denominator);
    const __m512 rest = s.decays ? _mm512_mul_ps(p0, kept) : p0;
    _mm512_mask_storeu_ps(p + i, moves & live, _mm512_add_ps(step, rest));
    _mm512_mask_storeu_ps(m + i, moves & live, m1);
    _mm512_mask_storeu_ps(v + i, live, moment2);
  }
}
#endif

// The same where the mask is 0 everywhere: the gradient in use is the first moment, which alone moves the second.
void frozen_adamw(const Scalars& s, int64_t n, const float* __restrict m, float* __restrict v) {
  const float weight2 = s.weight2, beta2 = s.beta2;
  for (int64_t i = 0; i < n; ++i) v[i] = std::fma(weight2 * m[i], m[i], v[i] * beta2);
}

// Of a block: the masks' values by their codes. Apart from the update, which would be vectorised by the length of codes,
// and run out of registers.
inline void look_up(const float (&values)[4], const uint8_t* __restrict code, int n, float* __restrict masks) {
  const float v0 = values[0], v1 = values[1], v2 = values[2], v3 = values[3];
  for (int i = 0; i < n; ++i) {
    const int c = code[i];
    const float low = c & 1 ? v1 : v0, high = c & 1 ? v3 : v2;
    masks[i] = c & 2 ? high : low;
  }
}

// The same of a mask of bits; the block begins at a word. `values` by the bits of one plane, or of two.
inline void look_up(const float (&values)[4], const uint64_t* words, int64_t planes, int n, float* __restrict masks) {
  const float v0 = values[0], v1 = values[1], v2 = values[2], v3 = values[3];
  constexpr int kHalf = kWord / 2;  // bits are shifted in the length of the values
  for (int i = 0; i < n; i += kHalf) {
    const uint64_t* word = words + i / kWord * planes;
    const uint32_t first = uint32_t(word[0] >> i % kWord), second = planes > 1 ? uint32_t(word[1] >> i % kWord) : 0;
    for (int j = 0; j < kHalf; ++j) {
      const float low = first >> j & 1 ? v1 : v0, high = first >> j & 1 ? v3 : v2;
      masks[i + j] = second >> j & 1 ? high : low;
    }
  }
}

// Tensors are contiguous pieces of parameters, gradients (fp32 or bf16) and moments. A piece's mask is values[code]: codes has a
// uint8 tensor for it; or one of bits, int64, (words, planes), where plane i set means the i-th byte of `code`; or is
// empty where the piece has one code, in `code`. `on_gradient`: the masks multiply the gradient, and no more.
void adamw(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& grads,
           const std::vector<at::Tensor>& exp_avgs, const std::vector<at::Tensor>& exp_avg_sqs,
           const std::vector<at::Tensor>& codes, const std::vector<int64_t>& code, const std::vector<double>& values,
           double step, double lr, double beta1, double beta2, double eps, double weight_decay, bool on_gradient) {
  Scalars s;
  s.weight1 = float(1 - beta1), s.beta2 = float(beta2), s.weight2 = float(1 - beta2);
  s.root2 = float(std::sqrt(1 - std::pow(beta2, step))), s.eps = float(eps);
  s.minus_step = float(-(lr / (1 - std::pow(beta1, step))));
  s.decays = weight_decay != 0, s.less = float(double(float(1 - lr * weight_decay)) - 1.0);
  TORCH_CHECK(values.size() == 4);
  const float table[4] = {float(values[0]), float(values[1]), float(values[2]), float(values[3])};
  const bool hard = std::all_of(table, table + 4, [](float x) { return x == 0.0f || x == 1.0f; });
  struct Piece {
    float *p, *m, *v;
    const void* g;
    const uint8_t* codes;
    const uint64_t* words;
    int64_t planes;
    bool half;
    int64_t code;
  };
  std::vector<Piece> pieces;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t n = params[i].numel();
    TORCH_CHECK(grads[i].numel() == n && exp_avgs[i].numel() == n && exp_avg_sqs[i].numel() == n);
    const bool half = grads[i].scalar_type() == at::kBFloat16, bits = codes[i].scalar_type() == at::kLong;
    const bool bytes = !bits && (codes[i].numel() > 0 || n == 0);
    TORCH_CHECK(!bytes || codes[i].numel() == n);
    TORCH_CHECK(!bits || (codes[i].dim() == 2 && codes[i].size(0) == (n + kWord - 1) / kWord && codes[i].size(1) <= 2));
    pieces.push_back({data_of<float>(params[i], at::kFloat), data_of<float>(exp_avgs[i], at::kFloat),
                      data_of<float>(exp_avg_sqs[i], at::kFloat),
                      data_of<void>(grads[i], half ? at::kBFloat16 : at::kFloat),
                      bytes ? data_of<uint8_t>(codes[i], at::kByte) : nullptr,
                      bits ? reinterpret_cast<uint64_t*>(data_of<int64_t>(codes[i], at::kLong)) : nullptr,
                      bits ? codes[i].size(1) : 0, half, code[i]});
    sizes.push_back(n);
  }
  const auto chunks = chunks_of(sizes);
  for_chunks(chunks.size(), at::get_num_threads(), [&](int, size_t c) {
    const Piece& x = pieces[chunks[c].piece];
    const int64_t b = chunks[c].begin, n = chunks[c].size;
    const bool one = !x.codes && !x.words;
    const auto run = [&](auto* g) {
      if (one && table[x.code] == 1.0f)
        return masked_adamw<Mask::kWhole>(s, n, x.p + b, g + b, x.m + b, x.v + b, nullptr);
      if (one && table[x.code] == 0.0f && !on_gradient) return frozen_adamw(s, n, x.m + b, x.v + b);
      alignas(64) float masks[kBlock];
      // one code for all is written out: a mask that is constant along a loop is not vectorised
      if (one) std::fill_n(masks, kBlock, table[x.code]);
      const int64_t first = x.code & 0xff, second = x.code >> 8;
      const float by_plane[4] = {table[0], table[first & 3], table[second & 3], table[(first | second) & 3]};
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
      if (x.words && !on_gradient) {
        for (int64_t i = b; i < b + n; i += kWord) {
          const int size = int(std::min<int64_t>(kWord, b + n - i));
          const uint64_t *word = x.words + i / kWord * x.planes, other = x.planes > 1 ? word[1] : 0;
          const auto update = [&](auto is_hard, uint64_t of_first, uint64_t of_second) {
            masked_adamw<is_hard.value>(s, size, x.p + i, g + i, x.m + i, x.v + i, by_plane, of_first, of_second);
          };
          if (hard) update(std::true_type(), ones_of(by_plane, *word, other), 0);
          else update(std::false_type(), *word, other);
        }
        return;
      }
#endif
      for (int64_t i = b; i < b + n; i += kBlock) {
        const int size = int(std::min<int64_t>(kBlock, b + n - i));
        if (x.words) look_up(by_plane, x.words + i / kWord * x.planes, x.planes, size, masks);
        else if (x.codes) look_up(table, x.codes + i, size, masks);
        if (on_gradient) masked_adamw<Mask::kGradient>(s, size, x.p + i, g + i, x.m + i, x.v + i, masks);
        else if (hard) masked_adamw<Mask::kHard>(s, size, x.p + i, g + i, x.m + i, x.v + i, masks);
        else masked_adamw<Mask::kSoft>(s, size, x.p + i, g + i, x.m + i, x.v + i, masks);
      }
    };
    if (x.half) run(static_cast<const uint16_t*>(x.g));
    else run(static_cast<const float*>(x.g));
  });
}

// --- norms -----------------------------------------------------------------------------------------------------------

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  constexpr int kLanes = 32;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const double value = load(x, i + j);
      lanes[j] = std::fma(value, value, lanes[j]);
    }
  for (; i < n; ++i) lanes[0] += double(load(x, i)) * load(x, i);
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

// Sums of squares in fp64 of fp32 or bf16 tensors, shape (count,). Chunks are summed in their order, whatever the number of
// threads.
at::Tensor squares(const std::vector<at::Tensor>& pieces) {
  std::vector<int64_t> sizes;
  for (const auto& piece : pieces) sizes.push_back(piece.numel());
  const auto chunks = chunks_of(sizes);
  std::vector<const void*> pointers;
  std::vector<bool> halves;
  for (const auto& piece : pieces) {
    halves.push_back(piece.scalar_type() == at::kBFloat16);
    pointers.push_back(data_of<void>(piece, halves.back() ? at::kBFloat16 : at::kFloat));
  }
  std::vector<double> sums(chunks.size());
  for_chunks(chunks.size(), at::get_num_threads(), [&](int, size_t c) {
    const auto [piece, begin, size] = chunks[c];
    if (halves[piece]) sums[c] = sum_of_squares(static_cast<const uint16_t*>(pointers[piece]) + begin, size);
    else sums[c] = sum_of_squares(static_cast<const float*>(pointers[piece]) + begin, size);
  });
  at::Tensor found = at::zeros({int64_t(pieces.size())}, at::kDouble);
  for (size_t c = 0; c < chunks.size(); ++c) found.data_ptr<double>()[chunks[c].piece] += sums[c];
  return found;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<Risks>(m, "Risks")
      .def(py::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<double>, double,
                    std::vector<at::Tensor>, double, std::vector<at::Tensor>, int64_t, bool>())
      .def("histogram", &Risks::histogram, without_gil)
      .def("sample", &Risks::sample, without_gil)
      .def("zoom", &Risks::zoom, without_gil)
      .def("scan", [](Risks& risks, int64_t low, int64_t high) { return Risks::scan({&risks}, {low}, {high})[0]; },
           without_gil)
      .def_static("scan_together", &Risks::scan, without_gil)
      .def("mark", &Risks::mark, without_gil);
  m.def("adamw", &adamw, without_gil);
  m.def("squares", &squares, without_gil);
}
