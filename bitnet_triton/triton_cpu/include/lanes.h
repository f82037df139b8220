// What products row by row need besides dot4: partial sums in memory, sums and shifts of bytes.
#pragma once
#include "vector.h"

namespace tcpu {

// Sixteen partial sums; ``bias`` goes into one of them, as all are added up in the end.
TCPU_INLINE v16i32 load_lanes(const int32_t* lanes) { return load_wide<v16i32>(lanes); }
TCPU_INLINE v16i32 load_lanes(const int32_t* lanes, int32_t bias) {
  alignas(64) int32_t start[16];
  memcpy(start, lanes, sizeof start);
  start[0] += bias;
  return load_wide<v16i32>(start);
}
TCPU_INLINE void store_lanes(int32_t* lanes, v16i32 sums) { store_wide(lanes, sums); }

TCPU_INLINE int32_t sum_bytes(const int8_t* x, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// The smallest of some numbers of elements, none of them negative.
TCPU_INLINE int64_t shortest(int64_t a) { return a < 0 ? 0 : a; }
template <class... Rest> TCPU_INLINE int64_t shortest(int64_t a, int64_t b, Rest... rest) {
  return shortest(a < b ? a : b, int64_t(rest)...);
}

template <class V> TCPU_INLINE V shift_left_bytes(V x, int n) {
  return (V)((vec<uint16_t>)x << (uint16_t)n) & splat((uint8_t)(0xFF << n));
}
template <class V> TCPU_INLINE Pair<V> shift_left_bytes(Pair<V> x, int n) {
  return {shift_left_bytes(x.lo, n), shift_left_bytes(x.hi, n)};
}
TCPU_INLINE v64u8 shl64(v64u8 x, int n) { return shift_left_bytes(x, n); }

}  // namespace tcpu
