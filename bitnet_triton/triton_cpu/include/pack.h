// Packing of B [K, N] for the kernels of dot.h: panels of a few vectors of columns; within a panel, for each group
// along K, the columns one after the other, each with its group. Edges are filled with zeros.
#pragma once
#include "tile.h"

namespace tcpu {

// `total` things in as few parts of at most `most` as possible, of sizes `big` and then `big - 1`.
template <int TOTAL, int MOST> struct Split {
  static constexpr int parts = divide_up(TOTAL, MOST);
  static constexpr int big = divide_up(TOTAL, parts);
  static constexpr int bigs = TOTAL - parts * (big - 1);
  static constexpr int smalls = parts - bigs;
};

template <class P, int K, int N> struct Layout {
  static constexpr int W = width<typename P::Acc>;
  static constexpr int groups = divide_up(K, P::group);
  static constexpr int vectors = divide_up(N, W);
  static constexpr int last_lanes = N - (vectors - 1) * W;
  typedef Split<vectors, TCPU_REGISTERS == 32 ? 4 : 2> Panels;
  static constexpr int vector_elements = groups * W * P::group;  // of one vector of columns
};

template <class T, int K, int N> constexpr int packed_elements() {
  typedef Policy<T, Sign::both> P;  // no other Sign needs more
  typedef Layout<P, K, N> L;
  return divide_up(L::vectors * L::vector_elements * (int)sizeof(typename P::Packed), (int)sizeof(T));
}

// Whether memory of type T may be read as D without conversion.
template <class T, class D>
constexpr bool reads_directly =
    is_same<T, D>::value || (is_integer<T>::value && is_integer<D>::value && sizeof(T) == sizeof(D));

// visit(vectors in the panel, lanes used of its last vector, index of its first vector)
template <class L, class F> TCPU_INLINE void for_panels(F visit) {
  typedef typename L::Panels P;
  constexpr bool ragged = L::last_lanes < L::W;
  constexpr int bigs = P::bigs - (ragged && P::smalls == 0), smalls = P::smalls - (ragged && P::smalls > 0);
  int first = 0;
  for (int i = 0; i < bigs; ++i, first += P::big) visit(Int<P::big>(), Int<L::W>(), first);
  if constexpr (smalls > 0)
    for (int i = 0; i < smalls; ++i, first += P::big - 1) visit(Int<P::big - 1>(), Int<L::W>(), first);
  if constexpr (ragged) visit(Int<P::smalls ? P::big - 1 : P::big>(), Int<L::last_lanes>(), first);
}

// COUNT elements from p, converted to P::Packed; the rest of the vector is zero.
template <class P, int COUNT, class T> TCPU_INLINE vec<typename P::Unit> load_units(const T* p) {
  typedef typename P::Packed D;
  typedef vec<typename P::Unit> Units;
  constexpr int room = TCPU_VECTOR_BYTES / (int)sizeof(D), bytes = COUNT * (int)sizeof(T);
  if constexpr (reads_directly<T, D>) {
    return load_part<bytes, Units>(p);
  } else if constexpr (is_same<T, bf16>::value || is_same<T, f16>::value) {
    return widen(load_part<bytes, vec<uint16_t, room * 2>>(p), T());
  } else if constexpr (is_integer<D>::value && is_integer<T>::value) {
    return (Units)__builtin_convertvector((load_part<bytes, vec<T, room * (int)sizeof(T)>>(p)), vec<D>);
  } else {
    D lanes[room] = {};
    for (int i = 0; i < COUNT; ++i) lanes[i] = (D)p[i];
    return load<Units>(lanes);
  }
}

// The columns' Units from ROWS <= P::group consecutive rows of B.
template <class P, int ROWS, int LANES, class T>
TCPU_INLINE vec<typename P::Unit> interleave_rows(const T* p, int64_t stride_k) {
  typedef typename P::Packed D;
  if constexpr (P::group == 1) {
    return load_units<P, LANES>(p);
  } else {
    constexpr bool same_size = sizeof(T) == sizeof(D);
    typedef typename Choose<same_size, bits_of<T>, T>::type Element;
    typedef vec<Element, width<uint32_t> * (int)sizeof(T)> Narrow;
    vec<uint32_t> units{};
#pragma GCC unroll 4
    for (int j = 0; j < ROWS; ++j) {
      Narrow row = load_part<LANES * (int)sizeof(T), Narrow>(p + j * stride_k);
      vec<uint32_t> element = widen(row);
      if constexpr (!same_size) element &= 0xFFFFu;
      units |= element << (int)(8 * sizeof(D) * j);
    }
    return (vec<typename P::Unit>)units;
  }
}

template <class P, class V> TCPU_INLINE V bias(V units) {
  if constexpr (P::biased) return units ^ (int32_t)0x80808080;
  else return units;
}

// stride_n == 1
template <class P, int K, int N, class T>
static __attribute__((noinline)) void pack_rows(const T* src, int64_t stride_k, typename P::Packed* dst) {
  typedef Layout<P, K, N> L;
  constexpr int full = K / P::group, rest = K % P::group, step = L::W * P::group;
  for_panels<L>([&](auto vectors, auto last_lanes, int first) {
    constexpr int V = decltype(vectors)::value, last = decltype(last_lanes)::value;
    const T* from = src + first * L::W;
    typename P::Packed* to = dst + (int64_t)first * L::vector_elements;
    auto pack_group = [&](auto rows) {
      constexpr int R = decltype(rows)::value;
#pragma GCC unroll 4
      for (int v = 0; v < V - 1; ++v)
        store(to + v * step, bias<P>(interleave_rows<P, R, L::W>(from + v * L::W, stride_k)));
      store(to + (V - 1) * step, bias<P>(interleave_rows<P, R, last>(from + (V - 1) * L::W, stride_k)));
    };
    for (int g = 0; g < full; ++g, from += P::group * stride_k, to += V * step) pack_group(Int<P::group>());
    if constexpr (rest > 0) pack_group(Int<rest>());
  });
}

// stride_k == 1: squares of Units are transposed in registers.
template <class P, int K, int N, class T>
static __attribute__((noinline)) void pack_columns(const T* src, int64_t stride_n, typename P::Packed* dst) {
  typedef Layout<P, K, N> L;
  constexpr int W = L::W, square = W * P::group, rest = K % square;
  for_panels<L>([&](auto vectors, auto last_lanes, int first) {
    constexpr int V = decltype(vectors)::value;
    auto pack_square = [&](auto lanes, auto count, const T* from, typename P::Packed* to) {
      constexpr int C = decltype(count)::value, G = divide_up(C, P::group), used = decltype(lanes)::value;
      vec<typename P::Unit> r[W] = {};
#pragma GCC unroll 16
      for (int i = 0; i < used; ++i) r[i] = load_units<P, C>(from + i * stride_n);
      transpose32(r);
#pragma GCC unroll 16
      for (int i = 0; i < G; ++i) store(to + i * V * square, bias<P>(r[i]));
    };
    auto pack_vector = [&](auto lanes, int v) {
      const T* from = src + (first + v) * W * stride_n;
      typename P::Packed* to = dst + (int64_t)first * L::vector_elements + v * square;
      for (int k = 0; k + square <= K; k += square)
        pack_square(lanes, Int<square>(), from + k, to + (int64_t)k * V * W);
      if constexpr (rest > 0) pack_square(lanes, Int<rest>(), from + (K - rest), to + (int64_t)(K - rest) * V * W);
    };
    for (int v = 0; v < V - 1; ++v) pack_vector(Int<W>(), v);
    pack_vector(last_lanes, V - 1);
  });
}

// Any strides, element by element.
template <class P, int K, int N, class T>
static __attribute__((noinline)) void pack_strided(const T* src, int64_t stride_k, int64_t stride_n,
                                                   typename P::Packed* dst) {
  typedef Layout<P, K, N> L;
  typedef typename P::Packed D;
  constexpr int W = L::W, G = P::group;
  for_panels<L>([&](auto vectors, auto last_lanes, int first) {
    constexpr int columns = (decltype(vectors)::value - 1) * W + decltype(last_lanes)::value;
    constexpr int padded = decltype(vectors)::value * W;
    D* to = dst + (int64_t)first * L::vector_elements;
    for (int g = 0; g < L::groups; ++g)
      for (int n = 0; n < padded; ++n)
        for (int j = 0; j < G; ++j, ++to) {
          int k = g * G + j;
          bool inside = k < K && n < columns;
          D element = inside ? (D)src[k * stride_k + (first * W + n) * stride_n] : D(0);
          if constexpr (P::biased) element = (D)(element ^ 0x80);
          *to = element;
        }
  });
}

// B [K, N] with any strides (in elements) into packed_elements<T, K, N>() elements at dst.
template <class T, int K, int N, Sign S = Sign::both>
TCPU_INLINE void pack_b(const T* src, int64_t stride_k, int64_t stride_n, T* dst) {
  typedef Policy<T, S> P;
  typename P::Packed* to = (typename P::Packed*)dst;
  if (stride_n == 1) pack_rows<P, K, N>(src, stride_k, to);
  else if (sizeof(typename P::Unit) == 4 && stride_k == 1) pack_columns<P, K, N>(src, stride_n, to);
  else pack_strided<P, K, N>(src, stride_k, stride_n, to);
}

// B [K, N] of int8 whose elements lie in fours along K: codes(q, c) are 64 bytes, from byte c on, of row q of a matrix
// [K / 4, 4 N], the four of one column after those of the other.
template <int K, int N, Sign S, class Codes> TCPU_INLINE void pack_quads(Codes codes, int8_t* dst) {
  typedef Policy<int8_t, S> P;
  typedef Layout<P, K, N> L;
  typedef typename P::Packed D;
  constexpr int W = L::W, G = P::group;
  static_assert(K % 4 == 0 && N % 16 == 0 && 4 % G == 0, "pack_quads: whole fours, 64 bytes at a time");
  for_panels<L>([&](auto vectors, auto, int first) TCPU_ALWAYS {
    constexpr int V = decltype(vectors)::value;
    D* panel = (D*)dst + (int64_t)first * L::vector_elements;
    for (int q = 0; q < K / 4; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int column = (first + v) * W;
        const v64u8 bytes = codes(q, 4 * (column - column % 16));
        if constexpr (G == 4 && W == 16) {
          store(panel + (q * V + v) * 64, bias<P>((vec<int32_t>)bytes));
        } else {
          alignas(64) int8_t some[64];
          store_wide(some, bytes);
          const int8_t* from = some + 4 * (column % 16);
          if constexpr (G == 4) {
            store(panel + (q * V + v) * W * 4, bias<P>(load<vec<int32_t>>(from)));
          } else {
            for (int j = 0; j < 4; ++j)
              for (int n = 0; n < W; ++n) panel[((q * (4 / G) + j / G) * V + v) * W * G + n * G + j % G] = D(from[4 * n + j]);
          }
        }
      }
  });
}

}  // namespace tcpu
