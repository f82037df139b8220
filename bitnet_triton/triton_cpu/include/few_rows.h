// A few rows times a matrix whose own rows lie along memory: nothing is packed, and the matrix is read once.
#pragma once
#include "tile.h"
#include "row_dots.h"

namespace tcpu {

// A row that is masked off, where rows are listed
template <class T, int N> alignas(64) static const T zero_row[N] = {};

template <class T> TCPU_INLINE vec<float> load_floats(const T* p) {
  if constexpr (is_same<T, float>::value) return load<vec<float>>(p);
  else return widen(load<vec<uint16_t, TCPU_VECTOR_BYTES / 2>>(p), T());
}

// c [M, V vectors] += a [M, K] b [K, V vectors]. row(k): where row k of b lies; read(k) is called when it has been read.
template <int M, int V, int K, class A, class R, class F>
TCPU_INLINE void multiply_few_rows(const A* a, int64_t lda, R row, float* c, int64_t ldc, F read) {
  constexpr int W = width<float>;
  vec<float> acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = load<vec<float>>(c + m * ldc + v * W);
  for (int k = 0; k < K; ++k) {
    vec<float> columns[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) columns[v] = load_floats(row(k) + v * W);
    read(k);
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
// time, so that they are read from memory once. fetch(c) is called once for each line c of b, of BYTES an element.
template <int M, int N, int K, int BYTES, class A, class R, class F>
TCPU_INLINE void few_rows_at(const A* a, int64_t lda, R row, float* c, F fetch) {
  constexpr int W = width<float>, vectors = N / W, some = min_of(K, 16);  // powers of two, all of them
  constexpr int together = min_of(vectors, TCPU_REGISTERS / 2 / M);
  for (int k = 0; k < K; k += some)
    for (int v = 0; v < vectors; v += together) {
      auto part = [&](int i) TCPU_ALWAYS { return row(k + i) + v * W; };
      auto read = [&](int i) TCPU_ALWAYS {
        fetch_part<together * W * BYTES>(fetch, (k * vectors + v * some) / together + i);
      };
      multiply_few_rows<M, together, some>(a + k, lda, part, c + v * W, N, read);
    }
}

template <int M, int N, int K, class A, class B, class F = NoFetch>
TCPU_INLINE void few_rows(const A* a, int64_t lda, const B* b, int64_t ldb, float* c, F fetch = F()) {
  few_rows_at<M, N, K, sizeof(B)>(a, lda, [&](int k) TCPU_ALWAYS { return b + k * ldb; }, c, fetch);
}
// The same of rows that lie anywhere
template <int M, int N, int K, class A, class B>
TCPU_INLINE void few_listed(const A* a, int64_t lda, const B* const* b, float* c) {
  few_rows_at<M, N, K, sizeof(B)>(a, lda, [&](int k) TCPU_ALWAYS { return b[k]; }, c, NoFetch());
}

}  // namespace tcpu
