// Products of the rows of byte matrices with a few vectors of bytes: nothing is packed, and the matrices are read once
// from memory.
#pragma once
#include "lanes.h"
#include "tile.h"

namespace tcpu {

// How bytes of a matrix meet those of a vector: one of the two has to be unsigned.
struct MatrixU7 {
  static constexpr bool biased = false;
  static TCPU_METHOD void add(v16i32& sums, v64u8 w, v64u8 x) { dot4_u7(sums, w, x); }
};
struct VectorsU7 {
  static constexpr bool biased = false;
  static TCPU_METHOD void add(v16i32& sums, v64u8 w, v64u8 x) { dot4_u7(sums, x, w); }
};
struct BothSigned {  // the matrix + 128: what that is too much is 128 times the sum of the vector
  static constexpr bool biased = true;
  static TCPU_METHOD void add(v16i32& sums, v64u8 w, v64u8 x) { dot4(sums, flip64(w), x); }
};

// How what comes later is fetched: far along one stretch of memory, or near along each of several.
enum Fetch { along, streams };

// Vectors [.., length], `step` bytes apart.
struct ByteVectors {
  const int8_t* base;
  int64_t step, length;
};

// Sums of one of the matrices: that of row n and vector v lies at place n * row + v * vector. LANES: each is 16 partial
// ones, to be added up after a loop over K; otherwise they are added up after each row.
template <bool LANES> struct ByteSums {
  static constexpr bool lanes = LANES;
  int32_t* base;
  TCPU_METHOD int32_t* at(int64_t place) const { return base + (LANES ? 16 : 1) * place; }
};

// f(Int<n>()) for 1 <= n <= MOST.
template <int MOST, class F> TCPU_INLINE void dispatch(int n, F f) {
  if constexpr (MOST > 1)
    if (n < MOST) return dispatch<MOST - 1>(n, f);
  f(Int<MOST>());
}

// *at(i) += the lanes of s[i]
template <int COUNT, class At> TCPU_INLINE void add_lanes(const v16i32* s, At at) {
  constexpr int W = width<int32_t>;
#pragma GCC unroll 32
  for (int first = 0; first < COUNT; first += W) {
    vec<int32_t> rows[W] = {};
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (first + i < COUNT) rows[i] = merge(s[first + i]);
    alignas(64) int32_t sums[W];
    store(sums, sum_rows(rows));
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (first + i < COUNT) *at(first + i) += sums[i];
  }
}

// VECTORS vectors from v on, ROWS rows from n on, `apart` rows apart, of MATRICES matrices: all sums stay in registers.
template <class Kind, int MATRICES, int ROWS, int VECTORS, int FETCH, class Sums, class Codes>
TCPU_INLINE void multiply_byte_rows(ByteVectors x, const int32_t* totals, const Sums* sums, int row_step,
                                    int vector_step, int n, int apart, int v, Codes codes) {
  constexpr int count = MATRICES * ROWS * VECTORS;
  auto at = [&](int i) TCPU_ALWAYS {
    const int j = i % VECTORS, r = i / VECTORS % ROWS;
    return sums[i / VECTORS / ROWS].at(int64_t(n + r * apart) * row_step + int64_t(v + j) * vector_step);
  };
  v16i32 s[count] = {};
#pragma GCC unroll 32
  for (int i = 0; i < count; ++i) {
    const int32_t surplus = Kind::biased ? 128 * totals[v + i % VECTORS] : 0;
    if constexpr (Sums::lanes) s[i] = Kind::biased ? load_lanes(at(i), -surplus) : load_lanes(at(i));
    else if constexpr (Kind::biased) *at(i) -= surplus;
  }
  const int8_t* vectors = x.base + v * x.step;
  for (int64_t k = 0; k < x.length; k += 64) {
    v64u8 bytes[VECTORS];
#pragma GCC unroll 8
    for (int j = 0; j < VECTORS; ++j) bytes[j] = load64(vectors + j * x.step + k);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      v64u8 w[MATRICES];
      codes(n + r * apart, k, w, Int<FETCH>());
#pragma GCC unroll 16
      for (int i = 0; i < MATRICES; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) Kind::add(s[(i * ROWS + r) * VECTORS + j], w[i], bytes[j]);
    }
  }
  if constexpr (Sums::lanes) {
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) store_lanes(at(i), s[i]);
  } else {
    add_lanes<count>(s, at);
  }
}

// sums += codes x vectors, for the first `count` <= MOST of the vectors and `rows` rows. codes(n, k, w, fetch) sets w[i]
// to 64 bytes, from column k on, of row n of matrix i, and fetches what comes later as `fetch` says. Enough sums are open
// at once to hide the latency of an addition.
//
// A few vectors wait for memory: it is read as four streams, the quarters of the rows, as a core asks for more at a time
// than along one. With more vectors a pair of rows meets all of them before the next one: it is still in the nearest
// cache then.
template <class Kind, int MOST, int MATRICES, class Sums, class Codes>
TCPU_INLINE void byte_rows(ByteVectors x, int count, int rows, const Sums (&sums)[MATRICES], int row_step,
                           int vector_step, Codes codes) {
  constexpr int STREAMS = 4;
  constexpr int room = TCPU_REGISTERS * 5 / 8 / (16 / width<int32_t>);  // wide sums; operands need registers as well
  constexpr int most = room > MATRICES ? min_of(MOST, min_of(8, room / MATRICES)) : 1;
  constexpr int few = min_of(MOST, room / (STREAMS * MATRICES));
  int32_t totals[Kind::biased ? MOST : 1];
  if constexpr (Kind::biased)
    for (int v = 0; v < count; ++v) totals[v] = sum_bytes(x.base + v * x.step, x.length);
  auto pass = [&](auto together, auto width, auto fetch, int row, int apart, int v) TCPU_ALWAYS {
    constexpr int ROWS = decltype(together)::value, V = decltype(width)::value, FETCH = decltype(fetch)::value;
    multiply_byte_rows<Kind, MATRICES, ROWS, V, FETCH>(x, totals, sums, row_step, vector_step, row, apart, v, codes);
  };
  if constexpr (few > 0)
    if (count > 0 && count <= few)
      return dispatch<few>(count, [&](auto width) TCPU_ALWAYS {
        const int apart = rows / STREAMS;
        for (int n = 0; n < apart; ++n) pass(Int<STREAMS>(), width, Int<Fetch::streams>(), n, apart, 0);
        for (int n = STREAMS * apart; n < rows; ++n) pass(Int<1>(), width, Int<Fetch::along>(), n, 1, 0);
      });
  for (int n = 0; n < rows; n += 2)
    for (int v = 0, left = divide_up(count, most), some; v < count; v += some, --left) {
      some = divide_up(count - v, left);  // passes of about the same size
      dispatch<most>(some, [&](auto width) TCPU_ALWAYS {
        constexpr int V = decltype(width)::value;
        if constexpr (2 * V * MATRICES <= room)
          if (n + 1 < rows) return pass(Int<2>(), width, Int<Fetch::along>(), n, 1, v);
        for (int row = n; row < rows && row < n + 2; ++row) pass(Int<1>(), width, Int<Fetch::along>(), row, 1, v);
      });
    }
}

}  // namespace tcpu
