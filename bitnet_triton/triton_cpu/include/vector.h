// 64-byte vectors: bytes, int32 and float lanes.
#pragma once
#include "types.h"

namespace tcpu {

typedef uint8_t v64u8 __attribute__((vector_size(64)));
typedef uint16_t v32u16 __attribute__((vector_size(64)));
typedef int32_t v16i32 __attribute__((vector_size(64)));
typedef float v16f32 __attribute__((vector_size(64)));

TCPU_INLINE v64u8 load64(const void* p) {
  v64u8 v;
  memcpy(&v, p, 64);
  return v;
}
TCPU_INLINE v64u8 splat64(int x) { return v64u8{} + (uint8_t)x; }
TCPU_INLINE v64u8 flip64(v64u8 x) { return x ^ (uint8_t)0x80; }
TCPU_INLINE v64u8 shr64(v64u8 x, int n) { return (v64u8)((v32u16)x >> (uint16_t)n) & (uint8_t)(0xFF >> n); }
TCPU_INLINE void dot4(v16i32& acc, v64u8 u, v64u8 s) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc[i] += u[4 * i + j] * (int8_t)s[4 * i + j];
}
TCPU_INLINE v16i32 hsum16(const v16i32 x[16]) {
  v16i32 sums;
  for (int n = 0; n < 16; ++n) {
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += (uint32_t)x[n][i];
    sums[n] = (int32_t)sum;
  }
  return sums;
}
TCPU_INLINE v16f32 hsum16f(const v16f32 x[16]) {
  v16f32 sums;
  for (int n = 0; n < 16; ++n) {
    float sum = 0;
    for (int i = 0; i < 16; ++i) sum += x[n][i];
    sums[n] = sum;
  }
  return sums;
}

}  // namespace tcpu
