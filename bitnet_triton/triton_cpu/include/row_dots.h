// Dot products of vectors with rows that lie along memory: nothing is packed. One vector keeps 16 partial sums per row,
// and the sum over lanes is left until after a loop over K; a few meet all rows at once, and their sums are complete.
#pragma once
#include "tile.h"
#include "reduce.h"

namespace tcpu {

// Who reads rows may ask for others meanwhile: fetch(c) asks for line c of them. A line at a time, between loads, comes
// twice as fast as many at once.
struct NoFetch { TCPU_METHOD void operator()(int) const {} };

// Part i, of BYTES, has been read: ask for as many bytes
template <int BYTES, class F> TCPU_INLINE void fetch_part(F& fetch, int i) {
  if constexpr (BYTES < 64) {
    if (i % (64 / BYTES) == 0) fetch(i * BYTES / 64);
  } else {
#pragma GCC unroll 8
    for (int c = 0; c < BYTES / 64; ++c) fetch(i * (BYTES / 64) + c);
  }
}

// How a register of a meets one of b: `elements` of them, and mac(acc, a, b) is acc plus their products, spread over
// the lanes. has_offset: mac adds too much, by an amount that depends on a alone and is summed up by offset(acc, a).
template <class T> struct LaneProduct {
  typedef vec<float> Register;
  typedef vec<float> Acc;
  static constexpr int elements = width<float>;
  static constexpr bool has_offset = false;
  template <int COUNT> static TCPU_METHOD Register load(const T* p) {
    if constexpr (is_same<T, float>::value) return load_part<COUNT * 4, vec<float>>(p);
    else return widen(load_part<COUNT * 2, vec<uint16_t, TCPU_VECTOR_BYTES / 2>>(p), T());
  }
  static TCPU_METHOD Acc mac(Acc acc, Register a, Register b) { return acc + a * b; }
};

#ifdef TCPU_DPBF16
template <> struct LaneProduct<bf16> {
  typedef vec<int32_t> Register;
  typedef vec<float> Acc;
  static constexpr int elements = 2 * width<float>;
  static constexpr bool has_offset = false;
  template <int COUNT> static TCPU_METHOD Register load(const bf16* p) { return load_part<COUNT * 2, Register>(p); }
  static TCPU_METHOD Acc mac(Acc acc, Register a, Register b) { return dpbf16(acc, a, b); }
};
#endif

template <> struct LaneProduct<int8_t> {
  typedef vec<uint8_t> Register;
  typedef vec<int32_t> Acc;
  static constexpr int elements = 4 * width<int32_t>;
  template <int COUNT> static TCPU_METHOD Register load(const int8_t* p) { return load_part<COUNT, Register>(p); }
#if defined(TCPU_SDOT)
  static constexpr bool has_offset = false;
  static TCPU_METHOD Acc mac(Acc acc, Register a, Register b) { return sdot(acc, (Acc)a, (Acc)b); }
#elif defined(TCPU_MADD16) && !defined(TCPU_DPBUSD)
  static constexpr bool has_offset = false;
  static TCPU_METHOD Acc mac(Acc acc, Register a, Register b) {
    return acc + madd16(even(a), even(b)) + madd16(odd(a), odd(b));
  }
  static TCPU_METHOD Acc even(Register x) { return (Acc)((vec<int16_t>)((vec<uint16_t>)x << 8) >> 8); }
  static TCPU_METHOD Acc odd(Register x) { return (Acc)((vec<int16_t>)x >> 8); }
#else
  static constexpr bool has_offset = true;  // the instruction wants b + 128
  static TCPU_METHOD Acc mac(Acc acc, Register a, Register b) {
    return dot4_register(acc, b ^ splat((uint8_t)0x80), a);
  }
  static TCPU_METHOD Acc offset(Acc acc, Register a) { return dot4_register(acc, splat((uint8_t)0x80), a); }
#endif
};

template <int ROWS, int K, class T, class L>
TCPU_INLINE void dot_lanes_of_rows(const T* a, const T* b, int64_t ldb, L* lanes) {
  typedef LaneProduct<T> P;
  typedef typename P::Acc Acc;
  constexpr int W = width<L>, registers = 16 / W, step = P::elements, rest = K % step;
  Acc acc[ROWS][registers], too_much[registers] = {};
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) acc[n][r] = load<Acc>(lanes + n * 16 + r * W);
  auto add = [&](auto count, int k, int r) {
    typename P::Register x = P::template load<decltype(count)::value>(a + k);
    if constexpr (P::has_offset) too_much[r] = P::offset(too_much[r], x);
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; ++n)
      acc[n][r] = P::mac(acc[n][r], x, P::template load<decltype(count)::value>(b + n * ldb + k));
  };
  constexpr int whole = K / step, turns = whole / registers;
  for (int i = 0; i < turns; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) add(Int<step>(), (i * registers + r) * step, r);
#pragma GCC unroll 4
  for (int r = 0; r < whole % registers; ++r) add(Int<step>(), (turns * registers + r) * step, r);
  if constexpr (rest > 0) add(Int<rest>(), whole * step, 0);
#pragma GCC unroll 8
  for (int n = 0; n < ROWS; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      if constexpr (P::has_offset) acc[n][r] -= too_much[r];
      store(lanes + n * 16 + r * W, acc[n][r]);
    }
}

// lanes [N, 16] += partial sums of a [K] * b [n, K]; rows of b lie ldb elements apart. Which lane takes which element
// is not specified.
template <int N, int K, class T, class L>
TCPU_INLINE void dot_lanes(const T* a, const T* b, int64_t ldb, L* lanes) {
  constexpr int most = min_of(8, TCPU_REGISTERS / 2 / (16 / width<L>)), rest = N % most;
  for (int n = 0; n + most <= N; n += most)
    dot_lanes_of_rows<most, K>(a, b + n * ldb, ldb, lanes + n * 16);
  if constexpr (rest > 0) dot_lanes_of_rows<rest, K>(a, b + (N - rest) * ldb, ldb, lanes + (N - rest) * 16);
}

// Of COUNT vectors [COUNT, K] with ROWS rows, a register's worth in all: lane v * ROWS + n has that of v and n.
// row(n): where row n lies. fetch(c) is called once for each line c of the rows that is read, in turn.
template <int COUNT, int ROWS, int K, class T, class R, class F = NoFetch>
TCPU_INLINE vec<float> dots_of_rows(const T* a, int64_t lda, R row, F fetch = F()) {
  typedef LaneProduct<T> P;
  typedef typename P::Register Register;
  constexpr int step = P::elements, rest = K % step;
  vec<float> acc[width<float>] = {};
  auto add = [&](auto count, int k) {
    constexpr int some = decltype(count)::value;
    Register x[COUNT];
#pragma GCC unroll 8
    for (int v = 0; v < COUNT; ++v) x[v] = P::template load<some>(a + v * lda + k);
#pragma GCC unroll 16
    for (int n = 0; n < ROWS; ++n) {
      Register w = P::template load<some>(row(n) + k);
      fetch_part<step * sizeof(T)>(fetch, k / step * ROWS + n);
#pragma GCC unroll 8
      for (int v = 0; v < COUNT; ++v) acc[v * ROWS + n] = P::mac(acc[v * ROWS + n], x[v], w);
    }
  };
  for (int k = 0; k + step <= K; k += step) add(Int<step>(), k);
  if constexpr (rest > 0) add(Int<rest>(), K - rest);
  return sum_rows(acc);
}

// c [COUNT, N] += what dots_of_rows returned, for ROWS columns
template <int COUNT, int N, int ROWS> TCPU_INLINE void add_dots(vec<float> dots, float* c) {
  alignas(64) float sums[width<float>];
  store(sums, dots);
#pragma GCC unroll 8
  for (int v = 0; v < COUNT; ++v)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) c[v * N + i] += sums[v * ROWS + i];
}

// c [COUNT, N] += a [COUNT, K] times the transpose of b [N, K]; rows lie lda and ldb elements apart. Some 4 KiB of b are
// fetched ahead, rows behind the last one included: a loop over K reads them next. With fetch, that is called instead,
// once for each line of b.
template <int COUNT, int N, int K, class T, class F = NoFetch>
TCPU_INLINE void dot_rows(const T* a, int64_t lda, const T* b, int64_t ldb, float* c, F fetch = F()) {
  constexpr int rows = min_of(N, width<float> / COUNT), line = 64 / (int)sizeof(T);
  constexpr int ahead = 64 * line / min_of(K, 64 * line / rows);  // rows; not fewer than are open
  static_assert(COUNT <= width<float> && N % rows == 0, "dot_rows: powers of two");
  for (int n = 0; n < N; n += rows) {
    if constexpr (is_same<F, NoFetch>::value)
      for (int i = 0; i < rows; ++i)
        for (int k = 0; k < K; k += line) __builtin_prefetch(b + (n + ahead + i) * ldb + k);
    auto row = [&](int i) TCPU_ALWAYS { return b + (n + i) * ldb; };
    auto lines = [&](int i) TCPU_ALWAYS { fetch(n * (K / line) + i); };
    add_dots<COUNT, N, rows>(dots_of_rows<COUNT, rows, K>(a, lda, row, lines), c + n);
  }
}

// The same of rows that lie anywhere; whoever listed them has fetched them.
template <int COUNT, int N, int K, class T>
TCPU_INLINE void dot_listed(const T* a, int64_t lda, const T* const* b, float* c) {
  constexpr int rows = min_of(N, width<float> / COUNT);
  static_assert(COUNT <= width<float> && N % rows == 0, "dot_listed: powers of two");
  for (int n = 0; n < N; n += rows)
    add_dots<COUNT, N, rows>(dots_of_rows<COUNT, rows, K>(a, lda, [&](int i) TCPU_ALWAYS { return b[n + i]; }), c + n);
}

// c[n] += sum of lanes[n][0..15]
template <int N, class L> TCPU_INLINE void fold_lanes(const L* lanes, L* c) {
  constexpr int W = width<L>;
  for (int n = 0; n + W <= N; n += W) {
    vec<L> rows[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = merge(load_wide<wide<L>>(lanes + (n + i) * 16));
    store(c + n, load<vec<L>>(c + n) + sum_rows(rows));
  }
  for (int n = N - N % W; n < N; ++n) c[n] += hreduce<h_add, 16>(lanes + n * 16);
}

}  // namespace tcpu
