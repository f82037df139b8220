// Reduction of a short array of lanes to one value, in registers, by halving.
#pragma once
#include "types.h"
#include "maths.h"

namespace tcpu {

// Each operator works on scalars and on vectors, so conditions are joined by | and not by ||.
#define TCPU_REDUCTION(name, expression)                        \
  struct name {                                                 \
    template <class T> TCPU_METHOD T operator()(T a, T b) const { return expression; } \
  };
TCPU_REDUCTION(h_add, a + b)
TCPU_REDUCTION(h_mul, a * b)
TCPU_REDUCTION(h_maxnum, ((a > b) | (b != b)) ? a : b)
TCPU_REDUCTION(h_minnum, ((a < b) | (b != b)) ? a : b)
TCPU_REDUCTION(h_max, (a > b) ? a : b)
TCPU_REDUCTION(h_min, (a < b) ? a : b)
TCPU_REDUCTION(h_and, a & b)
TCPU_REDUCTION(h_or, a | b)
TCPU_REDUCTION(h_xor, a ^ b)
#undef TCPU_REDUCTION
struct h_maximum {
  template <class T> TCPU_METHOD T operator()(T a, T b) const { return m_maximum(a, b); }
};
struct h_minimum {
  template <class T> TCPU_METHOD T operator()(T a, T b) const { return m_minimum(a, b); }
};
struct h_umax {
  template <class T> TCPU_METHOD T operator()(T a, T b) const { return (T)h_max()((bits_of<T>)a, (bits_of<T>)b); }
};
struct h_umin {
  template <class T> TCPU_METHOD T operator()(T a, T b) const { return (T)h_min()((bits_of<T>)a, (bits_of<T>)b); }
};

template <class Op, int L, class T> TCPU_INLINE T hreduce(const T* lanes) {
  static_assert((L & (L - 1)) == 0, "hreduce: a power of two");
  T x[L];
  for (int i = 0; i < L; ++i) x[i] = lanes[i];
  for (int half = L / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = Op()(x[i], x[i + half]);
  return x[0];
}

}  // namespace tcpu
