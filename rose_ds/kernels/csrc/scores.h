// What elements are ranked by, computed where they lie.

#pragma once

#include <tuple>

#include "memory.h"

namespace {

constexpr int32_t kNan = 0x7fc00000;

// Where a piece begins in its tensor, and two keys: what its random numbers are hashed from.
using Draw = std::tuple<int64_t, uint32_t, uint32_t>;

// Non-negative fp32 numbers, as bits. |scale * gradient - share * other|: Eq. 2, or the task gradient's magnitude; no
// others where share is 0. With exp_avgs, Eq. 4: | alpha times that / |exp_avg| - 1 |, and 0 where exp_avg is 0; or, as
// `agreement`, 1 where exp_avg after the step has the gradient's sign, 0 where not, or NaN. With draws, random numbers,
// and the gradients only say how many.
class Scores {
 public:
  Scores(std::vector<at::Tensor> grads, std::vector<at::Tensor> exp_avgs, const std::vector<double>& alphas, double scale,
         bool agreement, std::vector<at::Tensor> others, double share, std::vector<Draw> draws)
      : grads_(std::move(grads)), exp_avgs_(std::move(exp_avgs)), others_(std::move(others)), draws_(std::move(draws)),
        scale_(float(scale)), share_(float(share)), agreement_(agreement) {
    TORCH_CHECK(exp_avgs_.empty() || exp_avgs_.size() == grads_.size());
    TORCH_CHECK(others_.empty() || others_.size() == grads_.size());
    TORCH_CHECK(draws_.empty() || (draws_.size() == grads_.size() && exp_avgs_.empty() && others_.empty()));
    for (size_t i = 0; i < grads_.size(); ++i) {
      const int64_t n = grads_[i].numel();
      sizes.push_back(n);
      if (!draws_.empty()) continue;
      const bool half = grads_[i].scalar_type() == at::kBFloat16;
      halves_.push_back(half), data_.push_back(data_of<void>(grads_[i], half ? at::kBFloat16 : at::kFloat));
      TORCH_CHECK(others_.empty() || others_[i].numel() == n);
      other_.push_back(others_.empty() ? nullptr : data_of<float>(others_[i], at::kFloat));
      if (exp_avgs_.empty()) continue;
      TORCH_CHECK(exp_avgs_[i].numel() == n);
      moments_.push_back(data_of<float>(exp_avgs_[i], at::kFloat)), alphas_.push_back(float(alphas.at(i)));
    }
  }

  // Fetches what one score is computed from.
  void ask_for(size_t piece, int64_t i) const {
    if (!draws_.empty()) return;
    __builtin_prefetch(static_cast<const char*>(data_[piece]) + i * (halves_[piece] ? 2 : 4));
    if (!moments_.empty()) __builtin_prefetch(moments_[piece] + i);
    if (other_[piece]) __builtin_prefetch(other_[piece] + i);
  }

  // Of n elements of a piece. kFetch: blocks after this one will be asked for.
  template <bool kFetch>
  void compute(size_t piece, int64_t from, int n, int32_t* out) const {
    if (!draws_.empty()) draw(draws_[piece], from, n, out);
    else if (halves_[piece]) read<kFetch>(static_cast<const uint16_t*>(data_[piece]) + from, piece, from, n, out);
    else read<kFetch>(static_cast<const float*>(data_[piece]) + from, piece, from, n, out);
  }

  std::vector<int64_t> sizes;  // of the pieces

 private:
  template <bool kFetch, class G>
  void read(const G* grad, size_t piece, int64_t from, int n, int32_t* __restrict out) const {
    if constexpr (kFetch) ahead(grad, n);
    const float* other = other_[piece] ? other_[piece] + from : nullptr;
    if constexpr (kFetch) if (other) ahead(other, n);
    const float scale = scale_, share = share_;
    const auto alone = [=](int i) { return load(grad, i) * scale; };
    const auto without = [=](int i) { return load(grad, i) * scale - other[i] * share; };
    if (moments_.empty()) {
      const auto magnitudes = [&](const auto& g) {
        for (int i = 0; i < n; ++i) out[i] = as_bits(g(i)) & 0x7fffffff;
      };
      if (other) magnitudes(without);
      else magnitudes(alone);
      return;
    }
    const float* m = moments_[piece] + from;
    if constexpr (kFetch) ahead(m, n);
    const float alpha = alphas_[piece];
    const auto second_order = [&](const auto& g) {
      for (int i = 0; i < n; ++i) {
        const float magnitude = std::fabs(m[i]);
        const int32_t bits = as_bits(std::fabs(g(i)) * alpha / magnitude - 1.0f) & 0x7fffffff;
        out[i] = magnitude == 0.0f ? 0 : bits;
      }
    };
    const auto agreement = [&](const auto& g) {
      for (int i = 0; i < n; ++i) {
        const float gradient = g(i), product = lerp(m[i], gradient, alpha) * gradient;
        const int32_t one = product > 0.0f ? as_bits(1.0f) : 0;
        out[i] = product != product ? kNan : one;
      }
    };
    if (agreement_ && other) agreement(without);
    else if (agreement_) agreement(alone);
    else if (other) second_order(without);
    else second_order(alone);
  }

  // rose_ds.core.magnitudes.uniform: a hash of each element's place.
  static void draw(const Draw& draw, int64_t from, int n, int32_t* __restrict out) {
    const auto [start, low_key, high_key] = draw;
    const uint64_t place = uint64_t(start + from);
    const uint32_t low = uint32_t(place), high = uint32_t(place >> 32);
    for (int i = 0; i < n; ++i) {
      const uint32_t here = low + uint32_t(i), above = high + (here < low);
      const uint32_t mixed = mix(mix(here ^ low_key) ^ high_key ^ above);
      out[i] = as_bits(float(int32_t(mixed >> 8)) * 0x1p-24f);
    }
  }

  // MurmurHash3's finalizer.
  static uint32_t mix(uint32_t x) {
    x = (x ^ x >> 16) * 0x85ebca6b;
    x = (x ^ x >> 13) * 0xc2b2ae35;
    return x ^ x >> 16;
  }

  std::vector<at::Tensor> grads_, exp_avgs_, others_;
  std::vector<Draw> draws_;
  std::vector<const void*> data_;  // of the gradients
  std::vector<bool> halves_;
  std::vector<const float*> moments_, other_;
  std::vector<float> alphas_;
  float scale_, share_;
  bool agreement_;
};

}  // namespace
