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

// p * 2^n, where n = bits - (bits of exponent_magic): adding that constant to a number rounds it to an integer, which
// then stands in the low bits. 2^n is applied in two halves, so that overflow and denormals come out right.
constexpr float exponent_magic = 12582912.0f + 254.0f;  // 1.5 * 2^23 + twice the exponent bias
TCPU_INLINE float scale_by_power(float p, uint32_t bits) {
  uint32_t half = bits >> 1;
  return p * bitcast<float>(half << 23) * bitcast<float>((bits - half) << 23);
}

// 2^f for |f| <= 1/2
TCPU_INLINE float exp2_near(float f) {
  float p = 0x1.470b48p-13f;
  p = p * f + 0x1.5f7276p-10f;
  p = p * f + 0x1.3b270ep-7f;
  p = p * f + 0x1.c6ae72p-5f;
  p = p * f + 0x1.ebfbe2p-3f;
  p = p * f + 0x1.62e432p-1f;
  return p * f + 1.0f;
}

TCPU_INLINE float m_exp2(float x) {
  float bounded = -150.0f > x ? -150.0f : x;  // NaN passes
  bounded = 128.0f < bounded ? 128.0f : bounded;
  float shifted = bounded + exponent_magic;
  float f = bounded - (shifted - exponent_magic);
  return scale_by_power(exp2_near(f), bitcast<uint32_t>(shifted));
}
TCPU_INLINE double m_exp2(double x) { return __builtin_exp2(x); }

constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // products of the first with exponents are exact

TCPU_INLINE float m_exp(float x) {
  float bounded = -104.0f > x ? -104.0f : x;  // NaN passes
  bounded = 89.0f < bounded ? 89.0f : bounded;
  float shifted = bounded * 1.44269504088896341f + exponent_magic;
  float n = shifted - exponent_magic;
  float f = bounded - n * ln2_high;
  f = f - n * ln2_low;
  float p = 0x1.6a243ap-10f;
  p = p * f + 0x1.1239e0p-7f;
  p = p * f + 0x1.5558f2p-5f;
  p = p * f + 0x1.555492p-3f;
  p = p * f + 0x1.fffffcp-2f;
  return scale_by_power(p * (f * f) + f + 1.0f, bitcast<uint32_t>(shifted));
}
TCPU_INLINE double m_exp(double x) { return __builtin_exp(x); }

// x = 2^exponent * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); rest = log(1 + f) - f. For finite x > 0.
struct LogParts {
  float exponent, f, rest;
};
TCPU_INLINE LogParts log_parts(float x) {
  bool is_denormal = x < 0x1p-126f;
  uint32_t bits = bitcast<uint32_t>(is_denormal ? x * 0x1p23f : x);
  int32_t exponent = (int32_t)(bits - 0x3F3504F3u) >> 23;
  float f = bitcast<float>(bits - ((uint32_t)exponent << 23)) - 1.0f;
  float p = -0x1.38b672p-4f;
  p = p * f + 0x1.055c10p-3f;
  p = p * f - 0x1.0d8564p-3f;
  p = p * f + 0x1.22da0ap-3f;
  p = p * f - 0x1.547240p-3f;
  p = p * f + 0x1.99a008p-3f;
  p = p * f - 0x1.000228p-2f;
  p = p * f + 0x1.555554p-2f;
  return {(float)(exponent - (is_denormal ? 23 : 0)), f, (p * f - 0.5f) * (f * f)};
}
// The logarithm of x where log_parts does not hold, else `finite`.
TCPU_INLINE float log_edges(float x, float finite) {
  float r = x < __builtin_inff() ? finite : x;
  return x > 0 ? r : (x == 0 ? -__builtin_inff() : __builtin_nanf(""));
}

TCPU_INLINE float m_log(float x) {
  LogParts l = log_parts(x);
  return log_edges(x, l.exponent * ln2_high + (l.f + (l.rest + l.exponent * ln2_low)));
}
TCPU_INLINE double m_log(double x) { return __builtin_log(x); }

TCPU_INLINE float m_log2(float x) {
  LogParts l = log_parts(x);
  constexpr float above_one = 0.44269504088896341f;  // log2(e) = 1 + that: most of f is added without a rounding
  float correction = l.rest + (l.rest * above_one + l.f * above_one);
  return log_edges(x, l.exponent + (l.f + correction));
}
TCPU_INLINE double m_log2(double x) { return __builtin_log2(x); }

// 2/pi in two pieces of 29 and 53 bits for each exponent of x, without the bits that add multiples of four to x * 2/pi.
struct TwoOverPi {
  double high[104], low[104];
};
constexpr double bits_of_two_over_pi(int first, int count) {
  constexpr uint32_t words[] = {0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041};
  double sum = 0, weight = 0.5;
  for (int i = 0; i < first; ++i) weight *= 0.5;
  for (int i = first; i < first + count; ++i, weight *= 0.5)
    if ((words[i / 32] >> (31 - i % 32)) & 1) sum += weight;
  return sum;
}
constexpr TwoOverPi make_two_over_pi() {
  TwoOverPi table{};
  for (int i = 0; i < 104; ++i) {
    table.high[i] = bits_of_two_over_pi(i, 29);
    table.low[i] = bits_of_two_over_pi(i + 29, 53);
  }
  return table;
}
template <class> struct TwoOverPiTable {  // a template, so that only kernels that use it pay for its evaluation
  static constexpr TwoOverPi table = make_two_over_pi();
};

// sin(r + quadrant * pi/2) for |r| < 1
TCPU_INLINE float sine_near(float r, uint32_t quadrant) {
  float z = r * r;
  float s = 0x1.69da8ap-19f;
  s = s * z - 0x1.9fff6cp-13f;
  s = s * z + 0x1.1110eep-7f;
  s = s * z - 0x1.555556p-3f;
  s = s * z * r + r;
  float c = 0x1.9637e8p-16f;
  c = c * z - 0x1.6bfba0p-10f;
  c = c * z + 0x1.555526p-5f;
  c = c * (z * z) + (1.0f - 0.5f * z);
  uint32_t swap = 0u - (quadrant & 1);  // a mask, as compilers make an unpredictable jump of a condition here
  uint32_t value = (bitcast<uint32_t>(c) & swap) | (bitcast<uint32_t>(s) & ~swap);
  return bitcast<float>(value ^ ((quadrant & 2) << 30));
}

// The reduction holds for every float: x * high is exact in double.
TCPU_INLINE float sine(float x, uint32_t quarters) {
  const TwoOverPi& table = TwoOverPiTable<void>::table;
  int32_t exponent = (int32_t)((bitcast<uint32_t>(x) >> 23) & 0xFF);
  int64_t i = exponent > 152 ? exponent - 152 : 0;  // as wide as double, so that compilers can vectorise the look-up
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer
  double turns = (double)x * table.high[i];
  double shifted = turns + magic;
  double part = (turns - (shifted - magic)) + (double)x * table.low[i];
  return sine_near((float)(part * 1.57079632679489662), (uint32_t)bitcast<uint64_t>(shifted) + quarters);
}
TCPU_INLINE float m_sin(float x) {  // by magnitude: polynomials lose the sign of zero
  return bitcast<float>(bitcast<uint32_t>(sine(m_abs(x), 0)) ^ (bitcast<uint32_t>(x) & 0x80000000u));
}
TCPU_INLINE double m_sin(double x) { return __builtin_sin(x); }
TCPU_INLINE float m_cos(float x) { return sine(x, 1); }
TCPU_INLINE double m_cos(double x) { return __builtin_cos(x); }

TCPU_INLINE float with_sign_of(float magnitude, float sign) {
  return bitcast<float>((bitcast<uint32_t>(magnitude) & 0x7FFFFFFFu) | (bitcast<uint32_t>(sign) & 0x80000000u));
}

// A polynomial near zero; else 1 - erfc, whose binary logarithm is a polynomial.
TCPU_INLINE float m_erf(float x) {
  float z = x * x, p = 0x1.496a2ap-14f;
  p = p * z - 0x1.a3f6fcp-11f;
  p = p * z + 0x1.5405b2p-8f;
  p = p * z - 0x1.b7f90cp-6f;
  p = p * z + 0x1.ce2cf8p-4f;
  p = p * z - 0x1.81273ep-2f;
  p = p * z + 0x1.06eba8p-3f;  // 2/sqrt(pi) - 1, as x itself is added exactly
  float a = m_abs(x);
  float t = a > 4.0f ? 4.0f : a;
  float q = 0x1.23188cp-12f;
  q = q * t - 0x1.1c73a2p-8f;
  q = q * t + 0x1.050b2cp-5f;
  q = q * t - 0x1.323836p-3f;
  q = q * t - 0x1.d6e886p-1f;
  q = q * t - 0x1.a06906p+0f;
  q = q * t - 0x1.723642p-12f;
  return with_sign_of(a < 1.0f ? p * a + a : 1.0f - m_exp2(q), x);
}
TCPU_INLINE double m_erf(double x) { return __builtin_erf(x); }

TCPU_INLINE float m_tanh(float x) {
  float z = x * x, p = -0x1.75e1cep-8f;
  p = p * z + 0x1.52269cp-6f;
  p = p * z - 0x1.b83c5ap-5f;
  p = p * z + 0x1.110726p-3f;
  p = p * z - 0x1.555532p-2f;
  float a = m_abs(x);
  float large = 1.0f - 2.0f / (m_exp(2.0f * a) + 1.0f);
  return with_sign_of(a < 0.625f ? p * z * a + a : large, x);
}
TCPU_INLINE double m_tanh(double x) { return __builtin_tanh(x); }

// maxnum, minnum: a NaN operand is ignored. maximum, minimum: NaN wins, and -0 < +0.
template <class T> TCPU_INLINE T m_maxnum(T a, T b) { return (a > b || b != b) ? a : b; }
template <class T> TCPU_INLINE T m_minnum(T a, T b) { return (a < b || b != b) ? a : b; }
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
