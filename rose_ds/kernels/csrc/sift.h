// One block of risks, sorted by a window: what is below, what is above, and what lies in it.

#pragma once

#include "memory.h"

namespace {

constexpr int32_t kInfinity = 0x7f8;  // the top 12 bits of +inf; above it lie NaNs
constexpr int kFacts = 6;             // numbers of a scan's row before its counts, as the two below: core's
constexpr int kSampleShift = 17, kScanShift = 11;
constexpr int64_t kSampleAhead = 24;  // risks of a sample, of what is fetched before it is needed
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

#if defined(ROSE_AVX512)
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
#if defined(ROSE_AVX512)
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

}  // namespace
