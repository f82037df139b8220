// Reduction of a short array of lanes to one value by halving, in registers.
#pragma once
#include "maths.h"
#include "simd.h"

namespace tcpu {

template <class T, class = void> struct IsVector { static constexpr bool value = false; };
template <class T> struct IsVector<T, decltype(void(T{}[0]))> { static constexpr bool value = true; };

// The operators work on scalars and on vectors.
#define TCPU_REDUCTION(name, expression)                                               \
  struct name {                                                                        \
    template <class T> TCPU_METHOD T operator()(T a, T b) const { return expression; } \
  };
TCPU_REDUCTION(h_add, a + b)
TCPU_REDUCTION(h_mul, a * b)
TCPU_REDUCTION(h_maxnum, (a > b) ? a : ((b == b) ? b : a))
TCPU_REDUCTION(h_minnum, (a < b) ? a : ((b == b) ? b : a))
TCPU_REDUCTION(h_max, (a > b) ? a : b)
TCPU_REDUCTION(h_min, (a < b) ? a : b)
TCPU_REDUCTION(h_and, a & b)
TCPU_REDUCTION(h_or, a | b)
TCPU_REDUCTION(h_xor, a ^ b)
#undef TCPU_REDUCTION

// NaN wins; of two zeros the bits decide.
struct h_maximum {
  template <class T> TCPU_METHOD T operator()(T a, T b) const {
    if constexpr (IsVector<T>::value) {
      typedef vec<lane_int<T>, (int)sizeof(T)> I;
      return a > b ? a : (a < b ? b : (a == b ? (T)((I)a & (I)b) : a + b));
    } else {
      return m_maximum(a, b);
    }
  }
};
struct h_minimum {
  template <class T> TCPU_METHOD T operator()(T a, T b) const {
    if constexpr (IsVector<T>::value) {
      typedef vec<lane_int<T>, (int)sizeof(T)> I;
      return a < b ? a : (a > b ? b : (a == b ? (T)((I)a | (I)b) : a + b));
    } else {
      return m_minimum(a, b);
    }
  }
};

// For scalars; hreduce takes h_max and h_min of unsigned lanes instead.
struct h_umax {
  template <class T> TCPU_METHOD T operator()(T a, T b) const { return (T)h_max()((bits_of<T>)a, (bits_of<T>)b); }
};
struct h_umin {
  template <class T> TCPU_METHOD T operator()(T a, T b) const { return (T)h_min()((bits_of<T>)a, (bits_of<T>)b); }
};

// L lanes, a power of two.
template <class Op, int L, class T> TCPU_INLINE T hreduce(const T* lanes) {
  static_assert((L & (L - 1)) == 0, "hreduce: a power of two");
  if constexpr (is_same<Op, h_umax>::value) {
    return (T)hreduce<h_max, L>((const bits_of<T>*)lanes);
  } else if constexpr (is_same<Op, h_umin>::value) {
    return (T)hreduce<h_min, L>((const bits_of<T>*)lanes);
  } else if constexpr (L == 1) {
    return lanes[0];
  } else if constexpr (L == 2) {
    return Op()(lanes[0], lanes[1]);
  } else if constexpr (is_integer<T>::value || is_float<T>::value) {
    typedef vec<T, min_of(TCPU_VECTOR_BYTES, L / 2 * (int)sizeof(T))> V;
    constexpr int W = (int)(sizeof(V) / sizeof(T));
    V halves[L / 2 / W];
    for (int i = 0; i < L / 2 / W; ++i) halves[i] = Op()(load<V>(lanes + i * W), load<V>(lanes + L / 2 + i * W));
    return hreduce<Op, L / 2>((const T*)halves);
  } else {
    T halves[L / 2];
    for (int i = 0; i < L / 2; ++i) halves[i] = Op()(lanes[i], lanes[i + L / 2]);
    return hreduce<Op, L / 2>(halves);
  }
}

}  // namespace tcpu
