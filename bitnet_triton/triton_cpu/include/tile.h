// How one step of a product works on this target, for each element type: a policy with
//   Packed  type in which A is read, converted before if need be, and in which B is packed
//   group   elements along K that one step consumes; together they are one Unit
//   Acc     type of a lane of an accumulator
//   spare   registers that a step needs beyond accumulators, operands of B and one operand of A
//   biased  B + 128 is packed, so 128 * (sum of a row of A) has to be subtracted
//   step(acc, b, a): acc + group products in each lane
#pragma once
#include "vector.h"

namespace tcpu {

template <int I> struct Int { static constexpr int value = I; };

// int8: which operand is known to lie in [0, 127].
enum class Sign { both, a_u7, b_u7 };

// One product per step, in the type of the accumulator; unsigned for all integers, as overflow wraps.
template <class T> struct Plain {
  typedef T Packed;
  typedef T Unit;
  typedef T Acc;
  static constexpr int group = 1, spare = 0;
  static constexpr bool biased = false;
  static TCPU_METHOD vec<T> step(vec<T> acc, vec<T> b, vec<T> a) { return acc + a * b; }
};

#ifdef TCPU_DPBF16
struct PairsBf16 {
  typedef bf16 Packed;
  typedef int32_t Unit;
  typedef float Acc;
  static constexpr int group = 2, spare = 0;
  static constexpr bool biased = false;
  static TCPU_METHOD vec<float> step(vec<float> acc, vec<int32_t> b, vec<int32_t> a) { return dpbf16(acc, a, b); }
};
#endif

template <Sign S> struct Quads {
  typedef int8_t Packed;
  typedef int32_t Unit;
  typedef int32_t Acc;
  static constexpr int group = 4;
#if defined(TCPU_DPBUSD)
  static constexpr int spare = 0;
  static constexpr bool biased = S == Sign::both;
  static TCPU_METHOD vec<int32_t> step(vec<int32_t> acc, vec<int32_t> b, vec<int32_t> a) {
    if constexpr (S == Sign::a_u7) return dpbusd(acc, a, b);
    else return dpbusd(acc, b, a);
  }
  static TCPU_METHOD vec<int32_t> sum_bytes(vec<int32_t> sums, vec<int32_t> s) {
    return dpbusd(sums, (vec<int32_t>)splat((uint8_t)1), s);
  }
#elif defined(TCPU_SDOT)
  static constexpr int spare = 0;
  static constexpr bool biased = false;
  static TCPU_METHOD vec<int32_t> step(vec<int32_t> acc, vec<int32_t> b, vec<int32_t> a) { return sdot(acc, a, b); }
#elif defined(TCPU_MADD8)
  // Exact only because one operand is below 128: two products then fit int16.
  static constexpr int spare = 2;
  static constexpr bool biased = false;
  static TCPU_METHOD vec<int32_t> step(vec<int32_t> acc, vec<int32_t> b, vec<int32_t> a) {
    vec<int32_t> pairs = S == Sign::a_u7 ? madd8(a, b) : madd8(b, a);
    return acc + madd16(pairs, (vec<int32_t>)splat((int16_t)1));
  }
#endif
};

#ifdef TCPU_MADD16
struct PairsInt16 {
  typedef int16_t Packed;
  typedef int32_t Unit;
  typedef int32_t Acc;
  static constexpr int group = 2, spare = 1;
  static constexpr bool biased = false;
  static TCPU_METHOD vec<int32_t> step(vec<int32_t> acc, vec<int32_t> b, vec<int32_t> a) { return acc + madd16(a, b); }
};
#endif

template <class T, Sign S> struct PolicyOf { typedef Plain<float> type; };  // every narrow float
template <Sign S> struct PolicyOf<double, S> { typedef Plain<double> type; };
#define TCPU_INTEGER_POLICY(T) \
  template <Sign S> struct PolicyOf<T, S> { typedef Plain<uint32_t> type; };
TCPU_INTEGER_POLICY(uint8_t)
TCPU_INTEGER_POLICY(int16_t)
TCPU_INTEGER_POLICY(uint16_t)
TCPU_INTEGER_POLICY(int32_t)
TCPU_INTEGER_POLICY(uint32_t)
#undef TCPU_INTEGER_POLICY
template <Sign S> struct PolicyOf<int64_t, S> { typedef Plain<uint64_t> type; };
template <Sign S> struct PolicyOf<uint64_t, S> { typedef Plain<uint64_t> type; };
#ifdef TCPU_DPBF16
template <Sign S> struct PolicyOf<bf16, S> { typedef PairsBf16 type; };
#endif
#if defined(TCPU_DPBUSD) || defined(TCPU_SDOT)
template <Sign S> struct PolicyOf<int8_t, S> { typedef Quads<S> type; };
#elif defined(TCPU_MADD16)
#ifdef TCPU_MADD8
template <Sign S> struct PolicyOf<int8_t, S> { typedef Quads<S> type; };
#else
template <Sign S> struct PolicyOf<int8_t, S> { typedef PairsInt16 type; };
#endif
template <> struct PolicyOf<int8_t, Sign::both> { typedef PairsInt16 type; };
#else
template <Sign S> struct PolicyOf<int8_t, S> { typedef Plain<uint32_t> type; };
#endif
template <class T, Sign S> using Policy = typename PolicyOf<T, S>::type;

}  // namespace tcpu
