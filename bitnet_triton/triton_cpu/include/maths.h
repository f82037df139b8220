// Scalar mathematics. The float versions are free of branches and calls, so that a loop around them vectorises.
#pragma once
#include "types.h"

namespace tcpu {

// Without the instruction the builtin is a slow call; the product of two floats is exact in double.
TCPU_INLINE float m_fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return (float)((double)a * b + c);
#endif
}
TCPU_INLINE double m_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
TCPU_INLINE float m_abs(float x) { return __builtin_fabsf(x); }
TCPU_INLINE double m_abs(double x) { return __builtin_fabs(x); }
TCPU_INLINE float m_floor(float x) { return __builtin_floorf(x); }
TCPU_INLINE double m_floor(double x) { return __builtin_floor(x); }
TCPU_INLINE float m_ceil(float x) { return __builtin_ceilf(x); }
TCPU_INLINE double m_ceil(double x) { return __builtin_ceil(x); }
TCPU_INLINE float m_rint(float x) { return __builtin_rintf(x); }
TCPU_INLINE double m_rint(double x) { return __builtin_rint(x); }
TCPU_INLINE float m_sqrt(float x) { return __builtin_sqrtf(x); }
TCPU_INLINE double m_sqrt(double x) { return __builtin_sqrt(x); }
TCPU_INLINE float m_sqrt_rn(float x) { return m_sqrt(x); }
TCPU_INLINE double m_sqrt_rn(double x) { return m_sqrt(x); }
TCPU_INLINE float m_rsqrt(float x) { return 1.0f / m_sqrt(x); }
TCPU_INLINE double m_rsqrt(double x) { return 1.0 / m_sqrt(x); }
TCPU_INLINE float m_div_rn(float a, float b) { return a / b; }
TCPU_INLINE double m_div_rn(double a, double b) { return a / b; }

TCPU_INLINE float m_exp(float x) { return __builtin_expf(x); }
TCPU_INLINE double m_exp(double x) { return __builtin_exp(x); }
TCPU_INLINE float m_exp2(float x) { return __builtin_exp2f(x); }
TCPU_INLINE double m_exp2(double x) { return __builtin_exp2(x); }
TCPU_INLINE float m_log(float x) { return __builtin_logf(x); }
TCPU_INLINE double m_log(double x) { return __builtin_log(x); }
TCPU_INLINE float m_log2(float x) { return __builtin_log2f(x); }
TCPU_INLINE double m_log2(double x) { return __builtin_log2(x); }
TCPU_INLINE float m_sin(float x) { return __builtin_sinf(x); }
TCPU_INLINE double m_sin(double x) { return __builtin_sin(x); }
TCPU_INLINE float m_cos(float x) { return __builtin_cosf(x); }
TCPU_INLINE double m_cos(double x) { return __builtin_cos(x); }
TCPU_INLINE float m_erf(float x) { return __builtin_erff(x); }
TCPU_INLINE double m_erf(double x) { return __builtin_erf(x); }
TCPU_INLINE float m_tanh(float x) { return __builtin_tanhf(x); }
TCPU_INLINE double m_tanh(double x) { return __builtin_tanh(x); }

// maxnum, minnum: a NaN operand is ignored. maximum, minimum: NaN wins, and -0 < +0.
template <class T> TCPU_INLINE T m_maxnum(T a, T b) { return ((a > b) | (b != b)) ? a : b; }
template <class T> TCPU_INLINE T m_minnum(T a, T b) { return ((a < b) | (b != b)) ? a : b; }
template <class T> TCPU_INLINE T m_maximum(T a, T b) {
  typedef bits_of<T> B;
  T equal = bitcast<T>((B)(bitcast<B>(a) & bitcast<B>(b)));
  return a > b ? a : a < b ? b : a == b ? equal : T(a + b);
}
template <class T> TCPU_INLINE T m_minimum(T a, T b) {
  typedef bits_of<T> B;
  T equal = bitcast<T>((B)(bitcast<B>(a) | bitcast<B>(b)));
  return a < b ? a : a > b ? b : a == b ? equal : T(a + b);
}
template <class T> TCPU_INLINE T m_clamp(T x, T lo, T hi, bool propagate_nan) {
  T bounded = m_minnum(m_maxnum(x, lo), hi);
  return propagate_nan && x != x ? x : bounded;
}

template <class T> TCPU_INLINE T m_absi(T x) { return x < 0 ? (T)(0 - (bits_of<T>)x) : x; }
TCPU_INLINE uint32_t m_mulhiui(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }
TCPU_INLINE uint64_t m_mulhiui(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
TCPU_INLINE int32_t m_mulhiui(int32_t a, int32_t b) { return (int32_t)m_mulhiui((uint32_t)a, (uint32_t)b); }
TCPU_INLINE int64_t m_mulhiui(int64_t a, int64_t b) { return (int64_t)m_mulhiui((uint64_t)a, (uint64_t)b); }

}  // namespace tcpu
