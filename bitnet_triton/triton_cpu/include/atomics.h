// Atomic access to memory. What changes it returns the value that was there before. Every order of
// memory that a kernel asks for is served by the strongest that the operation has.
#pragma once
#include "types.h"

namespace tcpu {

template <class T> TCPU_INLINE T a_load(const T* p) {
  return bitcast<T>(__atomic_load_n((const bits_of<T>*)p, __ATOMIC_ACQUIRE));
}
template <class T> TCPU_INLINE void a_store(T* p, T v) {
  __atomic_store_n((bits_of<T>*)p, bitcast<bits_of<T>>(v), __ATOMIC_RELEASE);
}

// Floats travel as integers of their size: compare-and-swap must compare bits (NaN, -0).
template <class T, class F> TCPU_INLINE T a_update(T* p, F next) {
  typedef bits_of<T> B;
  B* address = (B*)p;
  B old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, bitcast<B>(T(next(bitcast<T>(old)))), true,
                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return bitcast<T>(old);
}

template <class T> TCPU_INLINE T a_fadd(T* p, T v) {
  return a_update(p, [v](T old) { return T(old + v); });
}
template <class T> TCPU_INLINE T a_add(T* p, T v) {
  if constexpr (is_integer<T>::value) return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
  else return a_fadd(p, v);
}
template <class T> TCPU_INLINE T a_and(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_ACQ_REL); }
template <class T> TCPU_INLINE T a_or(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_ACQ_REL); }
template <class T> TCPU_INLINE T a_xor(T* p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_ACQ_REL); }

// A NaN operand loses against a number, as in maxnum and minnum.
template <class T> TCPU_INLINE T a_max(T* p, T v) {
  return a_update(p, [v](T old) { return old > v || v != v ? old : v; });
}
template <class T> TCPU_INLINE T a_min(T* p, T v) {
  return a_update(p, [v](T old) { return old < v || v != v ? old : v; });
}
template <class T> TCPU_INLINE T a_umax(T* p, T v) { return (T)a_max((bits_of<T>*)p, (bits_of<T>)v); }
template <class T> TCPU_INLINE T a_umin(T* p, T v) { return (T)a_min((bits_of<T>*)p, (bits_of<T>)v); }

template <class T> TCPU_INLINE T a_xchg(T* p, T v) {
  typedef bits_of<T> B;
  return bitcast<T>(__atomic_exchange_n((B*)p, bitcast<B>(v), __ATOMIC_ACQ_REL));
}
template <class T> TCPU_INLINE T a_cas(T* p, T compare, T v) {
  typedef bits_of<T> B;
  B old = bitcast<B>(compare);
  __atomic_compare_exchange_n((B*)p, &old, bitcast<B>(v), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return bitcast<T>(old);
}

}  // namespace tcpu
