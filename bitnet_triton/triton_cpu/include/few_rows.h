// A few rows times a matrix whose own rows lie along memory: nothing is packed, and the matrix is read once.
#pragma once
#include "tile.h"

namespace tcpu {

template <class T> TCPU_INLINE vec<float> load_floats(const T* p) {
  if constexpr (is_same<T, float>::value) return load<vec<float>>(p);
  else return widen(load<vec<uint16_t, TCPU_VECTOR_BYTES / 2>>(p), T());
}

// c [M, V vectors] += a [M, K] b [K, V vectors]
template <int M, int V, int K, class A, class B>
TCPU_INLINE void multiply_few_rows(const A* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int W = width<float>;
  vec<float> acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = load<vec<float>>(c + m * ldc + v * W);
  for (int k = 0; k < K; ++k) {
    vec<float> columns[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) columns[v] = load_floats(b + k * ldb + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      vec<float> x = splat(float(a[m * lda + k]));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] += columns[v] * x;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(c + m * ldc + v * W, acc[m][v]);
}

// c [M, N] += a [M, K] b [K, N], each with neighbours in a row side by side; N is a multiple of 16. Some rows of b at a
// time, so that they are read from memory once.
template <int M, int N, int K, class A, class B>
TCPU_INLINE void few_rows(const A* a, int64_t lda, const B* b, int64_t ldb, float* c) {
  constexpr int W = width<float>, vectors = N / W, some = min_of(K, 16);  // powers of two, all of them
  constexpr int together = min_of(vectors, TCPU_REGISTERS / 2 / M);
  for (int k = 0; k < K; k += some)
    for (int v = 0; v < vectors; v += together)
      multiply_few_rows<M, together, some>(a + k, lda, b + k * ldb + v * W, ldb, c + v * W, N);
}

}  // namespace tcpu
