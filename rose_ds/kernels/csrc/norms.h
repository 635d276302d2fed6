// Norms of whole tensors.

#pragma once

#include <cmath>
#include <numeric>

#include "memory.h"

namespace {

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
