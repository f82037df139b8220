// Products of small matrices whose second operand was packed by pack_b, and dot products that keep their lanes.
#pragma once
#include "few_rows.h"
#include "pack.h"
#include "row_dots.h"

namespace tcpu {

// The sums of the rows of A, for biased products.
template <class P, int M, int K> TCPU_INLINE void sum_a(const int8_t* a, int64_t lda, int32_t* sums) {
  constexpr int W = width<int32_t>, rest = K % TCPU_VECTOR_BYTES;
  auto sum_some = [&](auto rows, int m) {
    vec<int32_t> partial[W] = {};
#pragma GCC unroll 16
    for (int i = 0; i < decltype(rows)::value; ++i) {
      const int8_t* row = a + (m + i) * lda;
      for (int k = 0; k < K - rest; k += TCPU_VECTOR_BYTES)
        partial[i] = P::sum_bytes(partial[i], load<vec<int32_t>>(row + k));
      if constexpr (rest > 0) partial[i] = P::sum_bytes(partial[i], load_part<rest, vec<int32_t>>(row + (K - rest)));
    }
    store(sums + m, sum_rows(partial));
  };
  for (int m = 0; m + W <= M; m += W) sum_some(Int<W>(), m);
  if constexpr (M % W > 0) sum_some(Int<M % W>(), M - M % W);
}

template <class P, int VALID> TCPU_INLINE typename P::Unit load_unit(const typename P::Packed* p) {
  typename P::Unit unit = 0;
  memcpy(&unit, p, VALID * sizeof(*p));
  return unit;
}

// A panel that pack_b has written: the Units of vector v of group g.
template <class P, int V> struct PackedPanel {
  const typename P::Packed* base;
  TCPU_METHOD vec<typename P::Unit> operator()(int g, int v) const {
    return load<vec<typename P::Unit>>(base + (int64_t)(g * V + v) * (width<typename P::Acc> * P::group));
  }
};

// c [R, V vectors] += a [R, K] times one panel. LAST: lanes used of the last vector. FRESH: c is taken to be zero.
template <class P, int R, int V, int K, int LAST, bool FRESH = false, class Panel, class C>
TCPU_INLINE void multiply_tile(const typename P::Packed* a, int64_t lda, Panel b, C* c, int64_t ldc,
                               const int32_t* a_sums) {
  typedef vec<typename P::Acc> Acc;
  typedef vec<typename P::Unit> Units;
  constexpr int G = P::group, W = width<typename P::Acc>, full = K / G, rest = K % G;
  constexpr int chains = R * V >= 8 ? 1 : R * V >= 4 ? 2 : 4;  // enough independent sums to hide the latency
  constexpr int last_bytes = LAST * (int)sizeof(C);
  // integers are added at the end: GCC 12 copies and spills the sums of some loops that begin with loaded vectors
  constexpr bool ahead = !FRESH && !is_integer<typename P::Acc>::value;
  auto loaded = [&](int r, int v) TCPU_ALWAYS {
    const C* from = c + r * ldc + v * W;
    return v < V - 1 ? load<Acc>(from) : load_part<last_bytes, Acc>(from);
  };
  Acc acc[chains][R][V] = {};
  if constexpr (ahead)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[0][r][v] = loaded(r, v);
  auto step = [&](auto valid, int g, Acc(&sums)[R][V]) {
    Units columns[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) columns[v] = b(g, v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Units x = splat(load_unit<P, decltype(valid)::value>(a + r * lda + g * G));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = P::step(sums[r][v], columns[v], x);
    }
  };
  for (int g = 0; g + chains <= full; g += chains)
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) step(Int<G>(), g + i, acc[i]);
#pragma GCC unroll 4
  for (int i = 0; i < full % chains; ++i) step(Int<G>(), full - full % chains + i, acc[i]);
  if constexpr (rest > 0) step(Int<rest>(), full, acc[0]);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Acc sum = acc[0][r][v];
#pragma GCC unroll 4
      for (int i = 1; i < chains; ++i) sum += acc[i][r][v];
      if constexpr (P::biased) sum -= splat(a_sums[r] * 128);
      if constexpr (!FRESH && !ahead) sum += loaded(r, v);
      if (v < V - 1) store(c + r * ldc + v * W, sum);
      else store_part<last_bytes>(c + r * ldc + v * W, sum);
    }
  }
}

// Rows of A in the type that the policy reads.
template <class P, int R, int K, class T>
TCPU_INLINE void convert_rows(const T* a, int64_t lda, typename P::Packed* rows, int64_t row_length) {
  constexpr int room = TCPU_VECTOR_BYTES / (int)sizeof(typename P::Packed), rest = K % room;
  constexpr bool by_vectors = is_integer<T>::value || is_same<T, bf16>::value || is_same<T, f16>::value;
  for (int r = 0; r < R; ++r, a += lda, rows += row_length) {
    if constexpr (by_vectors) {
      for (int k = 0; k < K - rest; k += room) store(rows + k, load_units<P, room>(a + k));
      if constexpr (rest > 0) store(rows + (K - rest), load_units<P, rest>(a + (K - rest)));
    } else {
      for (int k = 0; k < K; ++k) rows[k] = (typename P::Packed)a[k];
    }
  }
}

// How M rows are taken in blocks that leave registers for V vectors of columns.
template <class P, int M, int V> using RowBlocks = Split<M, min_of(16, (TCPU_REGISTERS - V - 1 - P::spare) / V)>;

template <class P, int M, int V, int K, int LAST, class T, class C>
static __attribute__((noinline)) void multiply_panel(const T* a, int64_t lda, const typename P::Packed* b, C* c,
                                                     int64_t ldc, const int32_t* a_sums, int used) {
  typedef typename P::Packed D;
  typedef RowBlocks<P, M, V> Blocks;
  const PackedPanel<P, V> panel{b};
  auto multiply_rows = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    if constexpr (reads_directly<T, D>) {
      multiply_tile<P, R, V, K, LAST>((const D*)a, lda, panel, c, ldc, a_sums);
    } else {
      constexpr int row_length = divide_up(K, TCPU_VECTOR_BYTES) * TCPU_VECTOR_BYTES;
      alignas(64) D converted[R * row_length];
      convert_rows<P, R, K>(a, lda, converted, row_length);
      multiply_tile<P, R, V, K, LAST>(converted, row_length, panel, c, ldc, a_sums);
    }
    a += R * lda, c += R * ldc, a_sums += R, used -= R;
  };
  for (int i = 0; i < Blocks::bigs && used > 0; ++i) multiply_rows(Int<Blocks::big>());
  if constexpr (Blocks::smalls > 0)
    for (int i = 0; i < Blocks::smalls && used > 0; ++i) multiply_rows(Int<Blocks::big - 1>());
}

// c [M, N] += a [M, K] b [K, N]; rows of a lie lda elements apart, those of c are contiguous. From row `used` on, a is zero.
template <int M, int N, int K, Sign S = Sign::both, class T, class C>
TCPU_INLINE void dot(const T* a, int64_t lda, const T* packed, C* c, int used = M) {
  typedef Policy<T, S> P;
  typedef typename P::Acc Acc;
  if constexpr (reads_directly<C, Acc>) {
    typedef Layout<P, K, N> L;
    int32_t a_sums[P::biased ? divide_up(M, L::W) * L::W : 1];
    if constexpr (P::biased) sum_a<P, M, K>(a, lda, a_sums);
    for_panels<L>([&](auto vectors, auto last, int first) {
      const typename P::Packed* panel = (const typename P::Packed*)packed + (int64_t)first * L::vector_elements;
      multiply_panel<P, M, decltype(vectors)::value, K, decltype(last)::value>(a, lda, panel, c + first * L::W, N,
                                                                               a_sums, used);
    });
  } else {
    Acc sums[M * N] = {};
    dot<M, N, K, S>(a, lda, packed, sums, used);
    typedef typename Choose<is_integer<T>::value && T(-1) < T(0), signed_of<Acc>, Acc>::type Sum;
    for (int i = 0; i < M * N; ++i) c[i] = C(c[i] + (Sum)sums[i]);
  }
}

// c [M, N] += a [M, K] b [K, N] with b as in pack_quads; FRESH: c is taken to be zero. With few rows its bytes are
// unpacked where they are multiplied, once for each block of rows, which is cheaper than to write them down and read them
// again.
template <int M, int N, int K, Sign S, bool FRESH, class Codes>
TCPU_INLINE void dot_quads(const int8_t* a, int64_t lda, Codes codes, int32_t* c) {
  typedef Policy<int8_t, S> P;
  typedef Layout<P, K, N> L;
  if constexpr (P::group == 4 && L::W == 16) {
    int32_t a_sums[P::biased ? divide_up(M, L::W) * L::W : 1];
    if constexpr (P::biased) sum_a<P, M, K>(a, lda, a_sums);
    for_panels<L>([&](auto vectors, auto, int first) TCPU_ALWAYS {
      constexpr int V = decltype(vectors)::value;
      typedef RowBlocks<P, M, V> Blocks;
      auto panel = [&](int g, int v) TCPU_ALWAYS { return bias<P>((vec<int32_t>)codes(g, 64 * (first + v))); };
      auto multiply_rows = [&](auto rows, int m) TCPU_ALWAYS {
        multiply_tile<P, decltype(rows)::value, V, K, L::W, FRESH>(a + m * lda, lda, panel, c + m * N + first * L::W,
                                                                   N, a_sums + (P::biased ? m : 0));
      };
      // or GCC 12 keeps the sums of the product before in registers, through this one, which spills its own
      if constexpr (!FRESH) asm("" : "+m"(*(int32_t(*)[M * N])c));
      for (int i = 0; i < Blocks::bigs; ++i) multiply_rows(Int<Blocks::big>(), i * Blocks::big);
      if constexpr (Blocks::smalls > 0)
        for (int i = 0; i < Blocks::smalls; ++i)
          multiply_rows(Int<Blocks::big - 1>(), Blocks::bigs * Blocks::big + i * (Blocks::big - 1));
    });
  } else {
    alignas(64) int8_t packed[packed_elements<int8_t, K, N>()];
    pack_quads<K, N, S>(codes, packed);
    if constexpr (FRESH) memset(c, 0, sizeof(int32_t) * M * N);
    dot<M, N, K, S>(a, lda, packed, c);
  }
}

}  // namespace tcpu
