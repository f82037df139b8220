// Products of small matrices: C [M, N] += A [M, K] B [K, N], with B packed first.
#pragma once
#include "vector.h"

namespace tcpu {

// int8: which operand is known to lie in [0, 127].
enum class Sign { both, a_u7, b_u7 };

template <class T, int K, int N> constexpr int packed_elements() { return K * N; }

template <class T, int K, int N, Sign S = Sign::both>
TCPU_INLINE void pack_b(const T* src, int64_t stride_k, int64_t stride_n, T* dst) {
  for (int k = 0; k < K; ++k)
    for (int n = 0; n < N; ++n) dst[k * N + n] = src[k * stride_k + n * stride_n];
}


template <int M, int N, int K, Sign S = Sign::both, class T, class C>
TCPU_INLINE void dot(const T* a, int64_t lda, const T* packed, C* c) {
  for (int m = 0; m < M; ++m)
    for (int k = 0; k < K; ++k) {
      C x = (C)a[m * lda + k];
      for (int n = 0; n < N; ++n) c[m * N + n] += x * (C)packed[k * N + n];
    }
}

template <int N, int K, class T, class L>
TCPU_INLINE void dot_lanes(const T* a, const T* b, int64_t ldb, L* lanes) {
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) lanes[n * 16 + k % 16] += (L)a[k] * (L)b[n * ldb + k];
}
template <int N, class L> TCPU_INLINE void fold_lanes(const L* lanes, L* c) {
  for (int n = 0; n < N; ++n) {
    L sum = lanes[n * 16];
    for (int i = 1; i < 16; ++i) sum += lanes[n * 16 + i];
    c[n] += sum;
  }
}

}  // namespace tcpu
