// Risks that are counted and marked where they lie.

#pragma once

#include <numeric>

#include "scores.h"
#include "sift.h"

namespace {

// The risks of one kind, of this rank: as bits, which sort as the values do. `rose_ds.core.threshold.Counted`.
class Risks {
 public:
  // Masks are bits, set where risk <= tau, or >= tau: the given plane of `masks`, each of (words, planes); without masks
  // there are none. The others: what risks are computed from, as for Scores.
  Risks(std::vector<at::Tensor> grads, std::vector<at::Tensor> exp_avgs, std::vector<double> alphas, double scale,
        bool agreement, std::vector<at::Tensor> others, double share, std::vector<Draw> draws, std::vector<at::Tensor> masks,
        int64_t plane, bool largest)
      : scores_(std::move(grads), std::move(exp_avgs), alphas, scale, agreement, std::move(others), share,
                std::move(draws)),
        sizes_(scores_.sizes), masks_(std::move(masks)), largest_(largest), threads_(at::get_num_threads()) {
    TORCH_CHECK(masks_.empty() || masks_.size() == sizes_.size());
    for (size_t i = 0; i < masks_.size(); ++i) {
      TORCH_CHECK(masks_[i].dim() == 2 && masks_[i].size(0) == (sizes_[i] + kWord - 1) / kWord);
      TORCH_CHECK(0 <= plane && plane < masks_[i].size(1));
      planes_ = masks_[i].size(1);
      auto* words = reinterpret_cast<uint64_t*>(data_of<int64_t>(masks_[i], at::kLong));
      words_.push_back(words ? words + plane : nullptr);
    }
    size_ = std::accumulate(sizes_.begin(), sizes_.end(), int64_t(0));
    chunks_ = chunks_of(sizes_);
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
        for (; asked < std::min(end, j + kSampleAhead); ++asked, far.move(*this, stride)) scores_.ask_for(far.piece, far.at);
        scores_.compute<false>(next.piece, next.at, 1, &drawn_[j]);
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

  // Sets the mask: of those alone of which the scan was not sure, where it had tau in its window (or, where the largest
  // are kept, at its end).
  void mark(double tau) const {
    if (masks_.empty()) return;
    const int32_t bound = as_bits(float(tau));
    const bool largest = largest_;
    if (sure_ && window_.low <= bound && bound < window_.high + int32_t(largest)) {
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
      scores_.compute<true>(piece, begin + b, n, bits);
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
    scores_.compute<true>(piece, from, n, bits);
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
      for (; piece < risks.sizes_.size() && at >= risks.sizes_[piece]; ++piece) at -= risks.sizes_[piece];
    }
    size_t piece = 0;
    int64_t at;
  };

  Scores scores_;
  std::vector<int64_t> sizes_;
  std::vector<at::Tensor> masks_;
  std::vector<uint64_t*> words_;  // of the plane
  int64_t planes_ = 1;
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

}  // namespace
