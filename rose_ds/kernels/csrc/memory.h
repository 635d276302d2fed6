// Pieces of memory: cut into chunks, given to threads, read as numbers or bits.

#pragma once

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define ROSE_AVX512
#include <immintrin.h>
#endif
#ifdef __FAST_MATH__
#error "the kernels must round as IEEE 754 says: compile without fast math"
#endif

namespace {

constexpr int64_t kChunk = 1 << 15;  // elements that a thread takes at a time
constexpr int kBlock = 256;          // of these, how many at once: what is computed in between stays in the first cache
constexpr int kWord = 64;            // elements to a word of a mask of bits
constexpr int64_t kAhead = 4096;     // bytes, of what is fetched before it is needed

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

// torch.lerp's two branches, each a fused multiply-add
inline float lerp(float a, float b, float w) {
  const bool near_a = std::fabs(w) < 0.5f;
  return std::fma(near_a ? w : w - 1.0f, b - a, near_a ? a : b);
}

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

}  // namespace
