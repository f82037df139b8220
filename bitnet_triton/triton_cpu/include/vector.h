// 64-byte vectors on every target, as one register or as pairs of halves: bytes (v64u8), int32 and float lanes.
#pragma once
#include "simd.h"

namespace tcpu {

// Has the vector extension's operators between vectors. A plain 64-byte vector would do, but compilers keep those that
// are wider than a register in memory.
template <class V> struct Pair {
  V lo, hi;
#define TCPU_OPERATOR(op)                                                        \
  TCPU_METHOD Pair operator op(Pair b) const { return {lo op b.lo, hi op b.hi}; } \
  TCPU_METHOD Pair& operator op##=(Pair b) { return *this = *this op b; }
  TCPU_OPERATOR(+)
  TCPU_OPERATOR(-)
  TCPU_OPERATOR(*)
  TCPU_OPERATOR(&)
  TCPU_OPERATOR(|)
  TCPU_OPERATOR(^)
#undef TCPU_OPERATOR
  TCPU_METHOD Pair operator~() const { return {~lo, ~hi}; }
};

template <class V, int REGISTERS> struct Joined { typedef Pair<typename Joined<V, REGISTERS / 2>::type> type; };
template <class V> struct Joined<V, 1> { typedef V type; };
template <class T> using wide = typename Joined<vec<T>, 64 / TCPU_VECTOR_BYTES>::type;
typedef wide<uint8_t> v64u8;
typedef wide<int32_t> v16i32;
typedef wide<float> v16f32;

// Register by register: a copy of 64 bytes would go through the stack.
template <class V> TCPU_INLINE void fetch(V& v, const char* p) { v = load<V>(p); }
template <class V> TCPU_INLINE void fetch(Pair<V>& v, const char* p) { fetch(v.lo, p), fetch(v.hi, p + sizeof(V)); }
template <class V> TCPU_INLINE void deposit(char* p, V v) { store(p, v); }
template <class V> TCPU_INLINE void deposit(char* p, Pair<V> v) { deposit(p, v.lo), deposit(p + sizeof(V), v.hi); }
template <class V> TCPU_INLINE V load_wide(const void* p) {
  V v;
  fetch(v, (const char*)p);
  return v;
}
template <class V> TCPU_INLINE void store_wide(void* p, V v) { deposit((char*)p, v); }
TCPU_INLINE v64u8 load64(const void* p) { return load_wide<v64u8>(p); }

template <class V> TCPU_INLINE void fill(V& v, uint8_t x) { v = (V)splat(x); }
template <class V> TCPU_INLINE void fill(Pair<V>& v, uint8_t x) { fill(v.lo, x), fill(v.hi, x); }
TCPU_INLINE v64u8 splat64(int x) {
  v64u8 v;
  fill(v, (uint8_t)x);
  return v;
}
TCPU_INLINE v64u8 flip64(v64u8 x) { return x ^ splat64(0x80); }

// There is no shift of bytes: shift 16 bits and clear what came from the neighbour.
TCPU_INLINE vec<uint8_t> shift_right(vec<uint8_t> x, int n) {
  return (vec<uint8_t>)((vec<uint16_t>)x >> (uint16_t)n) & splat((uint8_t)(0xFF >> n));
}
template <class V> TCPU_INLINE Pair<V> shift_right(Pair<V> x, int n) {
  return {shift_right(x.lo, n), shift_right(x.hi, n)};
}
TCPU_INLINE v64u8 shr64(v64u8 x, int n) { return shift_right(x, n); }

#if defined(TCPU_DPBUSD)
TCPU_INLINE vec<int32_t> dot4_register(vec<int32_t> acc, vec<uint8_t> u, vec<uint8_t> s) {
  return dpbusd(acc, (vec<int32_t>)u, (vec<int32_t>)s);
}
#elif defined(TCPU_MADD16)
// pmaddubsw would saturate (2 * 255 * 128): widen the even and the odd bytes to 16 bits instead.
TCPU_INLINE vec<int32_t> dot4_register(vec<int32_t> acc, vec<uint8_t> u, vec<uint8_t> s) {
  vec<uint16_t> u_even = (vec<uint16_t>)u & (uint16_t)0xFF, u_odd = (vec<uint16_t>)u >> 8;
  vec<int16_t> s_even = (vec<int16_t>)((vec<uint16_t>)s << 8) >> 8, s_odd = (vec<int16_t>)s >> 8;
  return acc + madd16((vec<int32_t>)u_even, (vec<int32_t>)s_even) + madd16((vec<int32_t>)u_odd, (vec<int32_t>)s_odd);
}
#elif defined(TCPU_SDOT)
// u = (u - 128) + 64 + 64, each of which is a signed byte.
TCPU_INLINE vec<int32_t> dot4_register(vec<int32_t> acc, vec<uint8_t> u, vec<uint8_t> s) {
  vec<int32_t> half = (vec<int32_t>)splat((uint8_t)64), bytes = (vec<int32_t>)s;
  acc = sdot(acc, (vec<int32_t>)(u ^ (uint8_t)0x80), bytes);
  return sdot(sdot(acc, half, bytes), half, bytes);
}
#else
TCPU_INLINE vec<int32_t> dot4_register(vec<int32_t> acc, vec<uint8_t> u, vec<uint8_t> s) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    vec<uint32_t> u_j = ((vec<uint32_t>)u >> (8 * j)) & 0xFF;
    vec<int32_t> s_j = (vec<int32_t>)((vec<uint32_t>)s << (24 - 8 * j)) >> 24;
    acc += (vec<int32_t>)u_j * s_j;
  }
  return acc;
}
#endif
template <class A, class B> TCPU_INLINE Pair<A> dot4_register(Pair<A> acc, Pair<B> u, Pair<B> s) {
  return {dot4_register(acc.lo, u.lo, s.lo), dot4_register(acc.hi, u.hi, s.hi)};
}
// acc[i] += sum over j < 4 of u8(u[4i + j]) * s8(s[4i + j]), exact.
TCPU_INLINE void dot4(v16i32& acc, v64u8 u, v64u8 s) { acc = dot4_register(acc, u, s); }

// The same where every byte of u is below 128: pmaddubsw cannot saturate then and takes three instructions, not nine.
#if defined(TCPU_MADD8) && !defined(TCPU_DPBUSD)
TCPU_INLINE vec<int32_t> dot4_u7_register(vec<int32_t> acc, vec<uint8_t> u, vec<uint8_t> s) {
  return acc + madd16(madd8((vec<int32_t>)u, (vec<int32_t>)s), (vec<int32_t>)splat((int16_t)1));
}
#elif defined(TCPU_SDOT)
TCPU_INLINE vec<int32_t> dot4_u7_register(vec<int32_t> acc, vec<uint8_t> u, vec<uint8_t> s) {
  return sdot(acc, (vec<int32_t>)u, (vec<int32_t>)s);
}
#else
TCPU_INLINE vec<int32_t> dot4_u7_register(vec<int32_t> acc, vec<uint8_t> u, vec<uint8_t> s) {
  return dot4_register(acc, u, s);
}
#endif
template <class A, class B> TCPU_INLINE Pair<A> dot4_u7_register(Pair<A> acc, Pair<B> u, Pair<B> s) {
  return {dot4_u7_register(acc.lo, u.lo, s.lo), dot4_u7_register(acc.hi, u.hi, s.hi)};
}
TCPU_INLINE void dot4_u7(v16i32& acc, v64u8 u, v64u8 s) { acc = dot4_u7_register(acc, u, s); }

// Adds the registers of a wide vector.
template <class V> TCPU_INLINE V merge(V v) { return v; }
template <class V> TCPU_INLINE auto merge(Pair<V> v) { return merge(v.lo + v.hi); }

template <class T> TCPU_INLINE wide<T> sum_lanes(const wide<T>* x) {
  vec<T> sums[16 / width<T>];
  for (int n = 0; n < 16; n += width<T>) {
    vec<T> rows[width<T>];
#pragma GCC unroll 16
    for (int i = 0; i < width<T>; ++i) rows[i] = merge(x[n + i]);
    sums[n / width<T>] = sum_rows(rows);
  }
  return load_wide<wide<T>>(sums);
}
// Lane n is the sum of the lanes of x[n].
TCPU_INLINE v16i32 hsum16(const v16i32 x[16]) { return sum_lanes<int32_t>(x); }
TCPU_INLINE v16f32 hsum16f(const v16f32 x[16]) { return sum_lanes<float>(x); }

}  // namespace tcpu
