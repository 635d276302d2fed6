// AdamW with masks.

#pragma once

#include <cmath>

#include "memory.h"

namespace {

struct Scalars {  // computed in fp64 and rounded once, as torch does
  float weight1, beta2, weight2, root2, eps, minus_step, less;
  bool decays;
};

// 1 for all, so that none is read; 0 or 1; any numbers; any, of the gradient alone; any, of the step alone
enum class Mask { kWhole, kHard, kSoft, kGradient, kStep };

// A mask of 0 freezes an element.
constexpr bool freezes(Mask mask) { return mask == Mask::kHard || mask == Mask::kSoft; }

// rose_ds.core.update.masked_adamw_, operation by operation; kStep: adamw_masked_update_.
template <Mask kMask, class G>
void masked_adamw(const Scalars& s, int64_t n, float* __restrict p, const G* __restrict grad, float* __restrict m,
                  float* __restrict v, const float* __restrict masks) {
  const float weight1 = s.weight1, beta2 = s.beta2, weight2 = s.weight2, root2 = s.root2, eps = s.eps;
  const float minus_step = s.minus_step, less = s.less, kept_of_whole = s.less + 1.0f;
  const bool decays = s.decays;
  for (int64_t i = 0; i < n; ++i) {
    const float mask = kMask == Mask::kWhole ? 1.0f : masks[i];
    const bool frozen = freezes(kMask) && mask == 0.0f, whole = mask == 1.0f;
    const float p0 = p[i], g = load(grad, i), m0 = m[i], v0 = v[i];
    float used = g, step_size = minus_step, kept = kept_of_whole;
    if constexpr (kMask == Mask::kSoft) {
      const float mixed = lerp(m0, g, mask);
      used = whole ? g : mixed, step_size = mask * minus_step, kept = mask * less + 1.0f;
    }
    if constexpr (kMask == Mask::kGradient) used = g * mask;
    if constexpr (kMask == Mask::kStep) step_size = mask * minus_step;
    used = frozen ? m0 : used;
    const float moved = lerp(m0, used, weight1);
    const float m1 = frozen ? m0 : moved;
    const float second = std::fma(weight2 * used, used, v0 * beta2);
    const float step = step_size * m1 / (std::sqrt(second) / root2 + eps);
    const float p1 = step + (decays ? p0 * kept : p0);
    p[i] = frozen ? p0 : p1, m[i] = m1, v[i] = second;
  }
}

#if defined(ROSE_AVX512)
inline __m512 load16(const float* p, __mmask16 live) { return _mm512_maskz_loadu_ps(live, p); }
inline __m512 load16(const uint16_t* p, __mmask16 live) {
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
template <Mask kMask, class G>
void masked_adamw(const Scalars& s, int n, float* p, const G* grad, float* m, float* v, const float (&values)[4],
                  uint64_t first, uint64_t second) {
  const __m512 weight1 = _mm512_set1_ps(s.weight1), beta2 = _mm512_set1_ps(s.beta2), eps = _mm512_set1_ps(s.eps);
  const __m512 weight2 = _mm512_set1_ps(s.weight2), root2 = _mm512_set1_ps(s.root2), one = _mm512_set1_ps(1.0f);
  const __m512 minus_step = _mm512_set1_ps(s.minus_step), less = _mm512_set1_ps(s.less);
  const __m512 value0 = _mm512_set1_ps(values[0]), value1 = _mm512_set1_ps(values[1]);
  const __m512 value2 = _mm512_set1_ps(values[2]), value3 = _mm512_set1_ps(values[3]);
  for (int i = 0; i < n; i += 16, first >>= 16, second >>= 16) {
    const __mmask16 live = n - i < 16 ? __mmask16((1 << (n - i)) - 1) : __mmask16(0xffff);
    const __m512 p0 = load16(p + i, live), g = load16(grad + i, live);
    const __m512 m0 = load16(m + i, live), v0 = load16(v + i, live);
    __mmask16 moves = __mmask16(first);
    __m512 used = g, step_size = minus_step, kept = _mm512_add_ps(less, one);
    if constexpr (kMask != Mask::kHard) {
      const __m512 low = _mm512_mask_mov_ps(value0, moves, value1), high = _mm512_mask_mov_ps(value2, moves, value3);
      const __m512 mask = _mm512_mask_mov_ps(low, __mmask16(second), high);
      moves = __mmask16(0xffff);
      if constexpr (kMask == Mask::kSoft) {
        moves = _mm512_cmp_ps_mask(mask, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        used = _mm512_mask_mov_ps(lerp(m0, g, mask), _mm512_cmp_ps_mask(mask, one, _CMP_EQ_OQ), g);
        kept = _mm512_add_ps(_mm512_mul_ps(mask, less), one);
      }
      if constexpr (kMask == Mask::kGradient) used = _mm512_mul_ps(g, mask);
      else step_size = _mm512_mul_ps(mask, minus_step);
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

// Tensors are contiguous pieces of parameters, gradients (fp32 or bf16) and moments. A piece's mask is values[code], times its
// scale: codes has a uint8 tensor for it; or one of bits, int64, (words, planes), where plane i set means the i-th byte
// of `code`; or is empty where the piece has one code, in `code`. `rule`: core's.
void adamw(const std::vector<at::Tensor>& params, const std::vector<at::Tensor>& grads,
           const std::vector<at::Tensor>& exp_avgs, const std::vector<at::Tensor>& exp_avg_sqs,
           const std::vector<at::Tensor>& codes, const std::vector<int64_t>& code, const std::vector<double>& scales,
           const std::vector<double>& values, double step, double lr, double beta1, double beta2, double eps,
           double weight_decay, const std::string& rule) {
  Scalars s;
  s.weight1 = float(1 - beta1), s.beta2 = float(beta2), s.weight2 = float(1 - beta2);
  s.root2 = float(std::sqrt(1 - std::pow(beta2, step))), s.eps = float(eps);
  s.minus_step = float(-(lr / (1 - std::pow(beta1, step))));
  s.decays = weight_decay != 0, s.less = float(double(float(1 - lr * weight_decay)) - 1.0);
  TORCH_CHECK(values.size() == 4);
  const bool on_gradient = rule == "gradient", on_step = rule == "update";
  TORCH_CHECK(on_gradient || on_step || rule == "robust");
  struct Piece {
    float *p, *m, *v;
    const void* g;
    const uint8_t* codes;
    const uint64_t* words;
    int64_t planes;
    bool half;
    int64_t code;
    float table[4];
    bool hard;
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
                      bits ? codes[i].size(1) : 0, half, code[i], {}, true});
    Piece& x = pieces.back();
    for (int j = 0; j < 4; ++j) {
      x.table[j] = float(values[j]) * float(scales[i]);
      x.hard = x.hard && (x.table[j] == 0.0f || x.table[j] == 1.0f);
    }
    sizes.push_back(n);
  }
  const auto chunks = chunks_of(sizes);
  for_chunks(chunks.size(), at::get_num_threads(), [&](int, size_t c) {
    const Piece& x = pieces[chunks[c].piece];
    const int64_t b = chunks[c].begin, n = chunks[c].size;
    const bool one = !x.codes && !x.words;
    const float(&table)[4] = x.table;
    const auto run = [&](auto* g) {
      if (one && table[x.code] == 1.0f)
        return masked_adamw<Mask::kWhole>(s, n, x.p + b, g + b, x.m + b, x.v + b, nullptr);
      if (one && table[x.code] == 0.0f && !on_gradient && !on_step) return frozen_adamw(s, n, x.m + b, x.v + b);
      alignas(64) float masks[kBlock];
      // one code for all is written out: a mask that is constant along a loop is not vectorised
      if (one) std::fill_n(masks, kBlock, table[x.code]);
      const int64_t first = x.code & 0xff, second = x.code >> 8;
      const float by_plane[4] = {table[0], table[first & 3], table[second & 3], table[(first | second) & 3]};
#if defined(ROSE_AVX512)
      if (x.words) {
        for (int64_t i = b; i < b + n; i += kWord) {
          const int size = int(std::min<int64_t>(kWord, b + n - i));
          const uint64_t *word = x.words + i / kWord * x.planes, other = x.planes > 1 ? word[1] : 0;
          const auto update = [&](auto mask, uint64_t of_first, uint64_t of_second) {
            masked_adamw<mask()>(s, size, x.p + i, g + i, x.m + i, x.v + i, by_plane, of_first, of_second);
          };
          if (on_gradient) update(std::integral_constant<Mask, Mask::kGradient>(), *word, other);
          else if (on_step) update(std::integral_constant<Mask, Mask::kStep>(), *word, other);
          else if (x.hard) update(std::integral_constant<Mask, Mask::kHard>(), ones_of(by_plane, *word, other), 0);
          else update(std::integral_constant<Mask, Mask::kSoft>(), *word, other);
        }
        return;
      }
#endif
      for (int64_t i = b; i < b + n; i += kBlock) {
        const int size = int(std::min<int64_t>(kBlock, b + n - i));
        if (x.words) look_up(by_plane, x.words + i / kWord * x.planes, x.planes, size, masks);
        else if (x.codes) look_up(table, x.codes + i, size, masks);
        if (on_gradient) masked_adamw<Mask::kGradient>(s, size, x.p + i, g + i, x.m + i, x.v + i, masks);
        else if (on_step) masked_adamw<Mask::kStep>(s, size, x.p + i, g + i, x.m + i, x.v + i, masks);
        else if (x.hard) masked_adamw<Mask::kHard>(s, size, x.p + i, g + i, x.m + i, x.v + i, masks);
        else masked_adamw<Mask::kSoft>(s, size, x.p + i, g + i, x.m + i, x.v + i, masks);
      }
    };
    if (x.half) run(static_cast<const uint16_t*>(x.g));
    else run(static_cast<const float*>(x.g));
  });
}

}  // namespace
