// The functions of CUDA's libdevice, as ld_<name>, overloaded for float and double; see libdevice.py for the symbols.
#pragma once
#include <fenv.h>
#include "maths.h"

// Clang has no builtins for these, and <math.h> would be a second way to everything else.
extern "C" {
float j0f(float) noexcept;
double j0(double) noexcept;
float j1f(float) noexcept;
double j1(double) noexcept;
float jnf(int, float) noexcept;
double jn(int, double) noexcept;
float y0f(float) noexcept;
double y0(double) noexcept;
float y1f(float) noexcept;
double y1(double) noexcept;
float ynf(int, float) noexcept;
double yn(int, double) noexcept;
}

namespace tcpu {

// As in maths.h.

#define TCPU_SAME(name, function)                                        \
  TCPU_INLINE float ld_##name(float x) { return function(x); }           \
  TCPU_INLINE double ld_##name(double x) { return function(x); }
TCPU_SAME(exp, m_exp)
TCPU_SAME(exp2, m_exp2)
TCPU_SAME(log, m_log)
TCPU_SAME(log2, m_log2)
TCPU_SAME(sin, m_sin)
TCPU_SAME(cos, m_cos)
TCPU_SAME(erf, m_erf)
TCPU_SAME(tanh, m_tanh)
TCPU_SAME(sqrt, m_sqrt)
TCPU_SAME(rsqrt, m_rsqrt)
TCPU_SAME(floor, m_floor)
TCPU_SAME(ceil, m_ceil)
TCPU_SAME(rint, m_rint)
TCPU_SAME(nearbyint, m_rint)
TCPU_SAME(fabs, m_abs)
#undef TCPU_SAME
TCPU_INLINE float ld_fma(float a, float b, float c) { return m_fma(a, b, c); }
TCPU_INLINE double ld_fma(double a, double b, double c) { return m_fma(a, b, c); }

// From the C library.

#define TCPU_UNARY(name)                                                     \
  TCPU_INLINE float ld_##name(float x) { return __builtin_##name##f(x); }    \
  TCPU_INLINE double ld_##name(double x) { return __builtin_##name(x); }
TCPU_UNARY(acos)
TCPU_UNARY(acosh)
TCPU_UNARY(asin)
TCPU_UNARY(asinh)
TCPU_UNARY(atan)
TCPU_UNARY(atanh)
TCPU_UNARY(cbrt)
TCPU_UNARY(cosh)
TCPU_UNARY(erfc)
TCPU_UNARY(expm1)
TCPU_UNARY(lgamma)
TCPU_UNARY(log1p)
TCPU_UNARY(logb)
TCPU_UNARY(sinh)
TCPU_UNARY(tgamma)
TCPU_UNARY(trunc)
#undef TCPU_UNARY
#define TCPU_BINARY(name)                                                                \
  TCPU_INLINE float ld_##name(float x, float y) { return __builtin_##name##f(x, y); }    \
  TCPU_INLINE double ld_##name(double x, double y) { return __builtin_##name(x, y); }
TCPU_BINARY(atan2)
TCPU_BINARY(copysign)
TCPU_BINARY(fdim)
TCPU_BINARY(fmod)
TCPU_BINARY(hypot)
TCPU_BINARY(nextafter)
TCPU_BINARY(pow)
TCPU_BINARY(remainder)
#undef TCPU_BINARY
TCPU_INLINE float ld_ldexp(float x, int32_t n) { return __builtin_ldexpf(x, n); }
TCPU_INLINE double ld_ldexp(double x, int32_t n) { return __builtin_ldexp(x, n); }
template <class T> TCPU_INLINE T ld_scalbn(T x, int32_t n) { return ld_ldexp(x, n); }
TCPU_INLINE int32_t ld_ilogb(float x) { return __builtin_ilogbf(x); }
TCPU_INLINE int32_t ld_ilogb(double x) { return __builtin_ilogb(x); }
TCPU_INLINE float ld_j0(float x) { return j0f(x); }
TCPU_INLINE double ld_j0(double x) { return j0(x); }
TCPU_INLINE float ld_j1(float x) { return j1f(x); }
TCPU_INLINE double ld_j1(double x) { return j1(x); }
TCPU_INLINE float ld_jn(int32_t n, float x) { return jnf(n, x); }
TCPU_INLINE double ld_jn(int32_t n, double x) { return jn(n, x); }
TCPU_INLINE float ld_y0(float x) { return y0f(x); }
TCPU_INLINE double ld_y0(double x) { return y0(x); }
TCPU_INLINE float ld_y1(float x) { return y1f(x); }
TCPU_INLINE double ld_y1(double x) { return y1(x); }
TCPU_INLINE float ld_yn(int32_t n, float x) { return ynf(n, x); }
TCPU_INLINE double ld_yn(int32_t n, double x) { return yn(n, x); }

// Composed.

TCPU_INLINE float ld_tan(float x) { return m_sin(x) / m_cos(x); }
TCPU_INLINE double ld_tan(double x) { return __builtin_tan(x); }
TCPU_INLINE float ld_log10(float x) {
  LogParts l = log_parts(x);
  constexpr float scale = 0.434294481903251828f, log2_high = 0.301025390625f, log2_low = 4.605038981195e-6f;
  float fraction = l.f * scale + (l.rest * scale + l.exponent * log2_low);
  return log_edges(x, l.exponent * log2_high + fraction);
}
TCPU_INLINE double ld_log10(double x) { return __builtin_log10(x); }
TCPU_INLINE float ld_exp10(float x) {
  float bounded = -46.0f > x ? -46.0f : x;  // NaN passes
  bounded = 39.0f < bounded ? 39.0f : bounded;
  float shifted = bounded * 3.32192809488736235f + exponent_magic;
  float n = shifted - exponent_magic;
  float rest = bounded - n * 0.301025390625f;  // log10(2) in two pieces; products of the first are exact
  rest = rest - n * 4.605038981195e-6f;
  return scale_by_power(exp2_near(rest * 3.32192809488736235f), bitcast<uint32_t>(shifted));
}
TCPU_INLINE double ld_exp10(double x) { return __builtin_pow(10.0, x); }

// Half away from zero. The builtin is a call.
template <class T> TCPU_INLINE T ld_round(T x) {
  T whole = ld_trunc(x);
  return m_abs(x - whole) >= T(0.5) ? whole + ld_copysign(T(1), x) : whole;
}
TCPU_INLINE int64_t ld_llround(float x) { return convert<int64_t>(ld_round(x)); }
TCPU_INLINE int64_t ld_llround(double x) { return convert<int64_t>(ld_round(x)); }
TCPU_INLINE int64_t ld_llrint(float x) { return convert<int64_t>(m_rint(x)); }
TCPU_INLINE int64_t ld_llrint(double x) { return convert<int64_t>(m_rint(x)); }

// sin(pi * (x + quarters / 2)): x is reduced exactly to the nearest half.
TCPU_INLINE float sine_of_pi(float x, int32_t quarters) {
  float halves = m_rint((x - 2.0f * m_rint(0.5f * x)) * 2.0f);
  float rest = (x - 2.0f * m_rint(0.5f * x)) - 0.5f * halves;
  return sine_near(rest * 3.14159265358979324f, (uint32_t)(convert<int32_t>(halves) + quarters));
}
TCPU_INLINE double sine_of_pi(double x, int32_t quarters) {
  double reduced = x - 2.0 * m_rint(0.5 * x), halves = m_rint(reduced * 2.0);
  double angle = (reduced - 0.5 * halves) * 3.14159265358979324;
  int32_t quadrant = convert<int32_t>(halves) + quarters;
  double value = quadrant & 1 ? __builtin_cos(angle) : __builtin_sin(angle);
  return quadrant & 2 ? -value : value;
}
template <class T> TCPU_INLINE T ld_sinpi(T x) { return sine_of_pi(x, 0); }
template <class T> TCPU_INLINE T ld_cospi(T x) { return sine_of_pi(x, 1); }

template <class T> TCPU_INLINE T ld_rcbrt(T x) { return T(1) / ld_cbrt(x); }
template <class T> TCPU_INLINE T ld_rhypot(T x, T y) { return T(1) / ld_hypot(x, y); }
template <class T> TCPU_INLINE T ld_norm3d(T x, T y, T z) { return ld_hypot(ld_hypot(x, y), z); }
template <class T> TCPU_INLINE T ld_norm4d(T x, T y, T z, T w) { return ld_hypot(ld_hypot(x, y), ld_hypot(z, w)); }
template <class T> TCPU_INLINE T ld_rnorm3d(T x, T y, T z) { return T(1) / ld_norm3d(x, y, z); }
template <class T> TCPU_INLINE T ld_rnorm4d(T x, T y, T z, T w) { return T(1) / ld_norm4d(x, y, z, w); }
template <class T> TCPU_INLINE T ld_powi(T x, int32_t n) { return (T)__builtin_pow((double)x, (double)n); }
TCPU_INLINE double ld_rcp64h(double x) { return bitcast<double>(bitcast<uint64_t>(1.0 / x) & 0xFFFFFFFF00000000u); }
TCPU_INLINE float ld_saturate(float x) { return m_clamp(x, 0.0f, 1.0f, false); }

// A function whose float version goes through double.
#define TCPU_THROUGH_DOUBLE(name) \
  TCPU_INLINE float ld_##name(float x) { return (float)ld_##name((double)x); }

TCPU_INLINE double ld_normcdf(double x) { return 0.5 * __builtin_erfc(x * -0.707106781186547524); }
TCPU_THROUGH_DOUBLE(normcdf)

// exp(x^2) erfc(x): the asymptotic series where erfc loses its range; x^2 is split, as exp amplifies its error.
TCPU_INLINE double ld_erfcx(double x) {
  if (x < 10.0) {
    double square = x * x, error = __builtin_fma(x, x, -square);
    double product = __builtin_exp(square) * __builtin_erfc(x);
    return square < 1e300 ? product + product * error : product;
  }
  double term = 1.0, sum = 1.0, step = -0.5 / x / x;
  for (int k = 1; k < 16; ++k) sum += term *= step * (2 * k - 1);
  return sum / x * 0.564189583547756287;
}
TCPU_THROUGH_DOUBLE(erfcx)

// z with erf(z) = x or erfc(z) = p: a rough closed form (2e-3), then Halley's iteration, which triples the digits.
TCPU_INLINE double erfinv_rough(double log_of_one_minus_square) {
  double half = 0.5 * log_of_one_minus_square + 4.33074675;
  return __builtin_sqrt(__builtin_sqrt(half * half - log_of_one_minus_square / 0.147) - half);
}
TCPU_INLINE double ld_erfcinv(double p) {
  if (!(p > 0 && p < 2)) return p == 0 ? __builtin_inf() : p == 2 ? -__builtin_inf() : __builtin_nan("");
  double z = __builtin_copysign(erfinv_rough(__builtin_log(p) + __builtin_log(2 - p)), 1 - p);
  for (int i = 0; i < 4; ++i) {
    double u = (p - __builtin_erfc(z)) * 0.886226925452758014 * __builtin_exp(z * z);
    z -= u / (1 - z * u);
  }
  return z;
}
TCPU_INLINE double ld_erfinv(double x) {
  double a = m_abs(x);
  if (a >= 0.5) return __builtin_copysign(ld_erfcinv(1 - a), x);
  double z = __builtin_copysign(erfinv_rough(__builtin_log1p(-x * x)), x);
  for (int i = 0; i < 3; ++i) {
    double u = (__builtin_erf(z) - x) * 0.886226925452758014 * __builtin_exp(z * z);
    z -= u / (1 + z * u);
  }
  return x == 0 ? x : z;
}
TCPU_INLINE double ld_normcdfinv(double p) { return -1.41421356237309505 * ld_erfcinv(2 * p); }
TCPU_THROUGH_DOUBLE(erfcinv)
TCPU_THROUGH_DOUBLE(erfinv)
TCPU_THROUGH_DOUBLE(normcdfinv)

// I_n(|x|) for n = 0, 1: the power series, whose terms are positive, else the asymptotic one.
TCPU_INLINE double modified_bessel(int n, double a) {
  double term = 1.0, sum = 1.0;
  if (a < 30.0) {
    for (int k = 1; k < 80; ++k) sum += term *= a * a / (4.0 * k * (k + n));
    return n == 0 ? sum : sum * a * 0.5;
  }
  for (int k = 1; k < 30; ++k) {
    int odd = 2 * k - 1;
    sum += term *= (odd * odd - 4.0 * n * n) / (8.0 * k * a);
  }
  double root = __builtin_exp(0.5 * a);  // twice: exp(a) alone would overflow before the quotient does
  return root / __builtin_sqrt(6.28318530717958648 * a) * root * sum;
}
TCPU_INLINE double ld_cyl_bessel_i0(double x) {
  return m_abs(x) < __builtin_inf() ? modified_bessel(0, m_abs(x)) : m_abs(x);
}
TCPU_INLINE double ld_cyl_bessel_i1(double x) {
  return m_abs(x) < __builtin_inf() ? __builtin_copysign(modified_bessel(1, m_abs(x)), x) : x;
}
TCPU_THROUGH_DOUBLE(cyl_bessel_i0)
TCPU_THROUGH_DOUBLE(cyl_bessel_i1)
#undef TCPU_THROUGH_DOUBLE

TCPU_INLINE float ld_fast_cos(float x) { return m_cos(x); }
TCPU_INLINE float ld_fast_sin(float x) { return m_sin(x); }
TCPU_INLINE float ld_fast_tan(float x) { return ld_tan(x); }
TCPU_INLINE float ld_fast_exp(float x) { return m_exp(x); }
TCPU_INLINE float ld_fast_exp10(float x) { return ld_exp10(x); }
TCPU_INLINE float ld_fast_log(float x) { return m_log(x); }
TCPU_INLINE float ld_fast_log2(float x) { return m_log2(x); }
TCPU_INLINE float ld_fast_log10(float x) { return ld_log10(x); }
TCPU_INLINE float ld_fast_pow(float x, float y) { return m_exp2(y * m_log2(x)); }
TCPU_INLINE float ld_fast_fdivide(float x, float y) { return x / y; }

// Predicates.

template <class T> TCPU_INLINE int32_t ld_isnan(T x) { return x != x; }
template <class T> TCPU_INLINE int32_t ld_isinf(T x) { return m_abs(x) == (T)__builtin_inf(); }
template <class T> TCPU_INLINE int32_t ld_isfinite(T x) { return m_abs(x) < (T)__builtin_inf(); }
template <class T> TCPU_INLINE int32_t ld_signbit(T x) { return bitcast<bits_of<T>>(x) >> (8 * sizeof(T) - 1) ? 1 : 0; }

// Integers: unsigned ones arrive in signed types.

TCPU_INLINE int32_t ld_abs(int32_t x) { return m_absi(x); }
TCPU_INLINE int64_t ld_llabs(int64_t x) { return m_absi(x); }
TCPU_INLINE int32_t ld_clz(int32_t x) { return x == 0 ? 32 : __builtin_clz((uint32_t)x); }
TCPU_INLINE int32_t ld_clzll(int64_t x) { return x == 0 ? 64 : __builtin_clzll((uint64_t)x); }
TCPU_INLINE int32_t ld_popc(int32_t x) { return __builtin_popcount((uint32_t)x); }
TCPU_INLINE int32_t ld_popcll(int64_t x) { return __builtin_popcountll((uint64_t)x); }
TCPU_INLINE int32_t ld_ffs(int32_t x) { return __builtin_ffs(x); }
TCPU_INLINE int32_t ld_ffsll(int64_t x) { return __builtin_ffsll(x); }
TCPU_INLINE uint32_t reverse_bits(uint32_t x) {
  x = ((x >> 1) & 0x55555555u) | ((x & 0x55555555u) << 1);
  x = ((x >> 2) & 0x33333333u) | ((x & 0x33333333u) << 2);
  x = ((x >> 4) & 0x0F0F0F0Fu) | ((x & 0x0F0F0F0Fu) << 4);
  return __builtin_bswap32(x);
}
TCPU_INLINE int32_t ld_brev(int32_t x) { return (int32_t)reverse_bits((uint32_t)x); }
TCPU_INLINE int64_t ld_brevll(int64_t x) {
  return (int64_t)((uint64_t)reverse_bits((uint32_t)x) << 32 | reverse_bits((uint32_t)((uint64_t)x >> 32)));
}
TCPU_INLINE int32_t ld_byte_perm(int32_t x, int32_t y, int32_t selector) {
  uint64_t bytes = (uint64_t)(uint32_t)y << 32 | (uint32_t)x;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t which = ((uint32_t)selector >> (4 * i)) & 15;
    uint32_t byte = (uint32_t)(bytes >> (8 * (which & 7))) & 0xFF;
    r |= (which & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << (8 * i);  // bit 3 spreads the sign
  }
  return (int32_t)r;
}
TCPU_INLINE int32_t ld_mulhi(int32_t a, int32_t b) { return (int32_t)(((int64_t)a * b) >> 32); }
TCPU_INLINE int32_t ld_umulhi(int32_t a, int32_t b) { return m_mulhiui(a, b); }
TCPU_INLINE int64_t ld_mul64hi(int64_t a, int64_t b) { return (int64_t)(((__int128)a * b) >> 64); }
TCPU_INLINE int64_t ld_umul64hi(int64_t a, int64_t b) { return m_mulhiui(a, b); }
TCPU_INLINE int32_t low24(int32_t x) { return (int32_t)((uint32_t)x << 8) >> 8; }
TCPU_INLINE int32_t ld_mul24(int32_t a, int32_t b) { return (int32_t)((int64_t)low24(a) * low24(b)); }
TCPU_INLINE int32_t ld_umul24(int32_t a, int32_t b) { return (int32_t)((a & 0xFFFFFFu) * (b & 0xFFFFFFu)); }
TCPU_INLINE int32_t ld_hadd(int32_t a, int32_t b) { return (int32_t)(((int64_t)a + b) >> 1); }
TCPU_INLINE int32_t ld_rhadd(int32_t a, int32_t b) { return (int32_t)(((int64_t)a + b + 1) >> 1); }
TCPU_INLINE int32_t ld_uhadd(int32_t a, int32_t b) { return (int32_t)(((uint64_t)(uint32_t)a + (uint32_t)b) >> 1); }
TCPU_INLINE int32_t ld_urhadd(int32_t a, int32_t b) {
  return (int32_t)(((uint64_t)(uint32_t)a + (uint32_t)b + 1) >> 1);
}
TCPU_INLINE int32_t ld_sad(int32_t a, int32_t b, int32_t c) {
  uint32_t difference = a > b ? (uint32_t)a - (uint32_t)b : (uint32_t)b - (uint32_t)a;
  return (int32_t)(difference + (uint32_t)c);
}
TCPU_INLINE int32_t ld_usad(int32_t a, int32_t b, int32_t c) {
  uint32_t x = (uint32_t)a, y = (uint32_t)b;
  return (int32_t)((x > y ? x - y : y - x) + (uint32_t)c);
}

TCPU_INLINE int32_t ld_float_as_int(float x) { return bitcast<int32_t>(x); }
TCPU_INLINE int32_t ld_float_as_uint(float x) { return bitcast<int32_t>(x); }
TCPU_INLINE float ld_int_as_float(int32_t x) { return bitcast<float>(x); }
TCPU_INLINE float ld_uint_as_float(int32_t x) { return bitcast<float>(x); }
TCPU_INLINE int64_t ld_double_as_longlong(double x) { return bitcast<int64_t>(x); }
TCPU_INLINE double ld_longlong_as_double(int64_t x) { return bitcast<double>(x); }
TCPU_INLINE int32_t ld_double2hiint(double x) { return (int32_t)(bitcast<uint64_t>(x) >> 32); }
TCPU_INLINE int32_t ld_double2loint(double x) { return (int32_t)bitcast<uint64_t>(x); }
TCPU_INLINE double ld_hiloint2double(int32_t high, int32_t low) {
  return bitcast<double>((uint64_t)(uint32_t)high << 32 | (uint32_t)low);
}

// Named directions of rounding.

enum class Rounding { nearest, zero, down, up };

template <class T> TCPU_INLINE void opaque(T& x) { asm volatile("" : "+m"(x)::"memory"); }
// Passing operands and result through memory keeps the compiler from moving the operation out of the changed mode.
template <Rounding R, class F, class... T> TCPU_INLINE auto rounded(F operation, T... x) {
  if constexpr (R == Rounding::nearest) {
    return operation(x...);
  } else {
    int before = fegetround();
    fesetround(R == Rounding::zero ? FE_TOWARDZERO : R == Rounding::down ? FE_DOWNWARD : FE_UPWARD);
    (opaque(x), ...);
    auto result = operation(x...);
    opaque(result);
    fesetround(before);
    return result;
  }
}
template <Rounding R, class T> TCPU_INLINE T ld_add(T a, T b) {
  return rounded<R>([](T x, T y) { return x + y; }, a, b);
}
template <Rounding R, class T> TCPU_INLINE T ld_sub(T a, T b) {
  return rounded<R>([](T x, T y) { return x - y; }, a, b);
}
template <Rounding R, class T> TCPU_INLINE T ld_mul(T a, T b) {
  return rounded<R>([](T x, T y) { return x * y; }, a, b);
}
template <Rounding R, class T> TCPU_INLINE T ld_div(T a, T b) {
  return rounded<R>([](T x, T y) { return x / y; }, a, b);
}
template <Rounding R, class T> TCPU_INLINE T ld_rcp(T a) {
  return rounded<R>([](T x) { return T(1) / x; }, a);
}
template <Rounding R, class T> TCPU_INLINE T ld_sqrt(T a) {
  return rounded<R>([](T x) { return m_sqrt(x); }, a);
}
// Without the instruction this calls fma, which obeys the mode; m_fma would round twice.
TCPU_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TCPU_INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
template <Rounding R, class T> TCPU_INLINE T ld_fma(T a, T b, T c) {
  return rounded<R>([](T x, T y, T z) { return fused(x, y, z); }, a, b, c);
}
TCPU_INLINE float ld_frsqrt_rn(float x) { return (float)(1.0 / m_sqrt((double)x)); }

// From integers and from double. I: the type that the bits of x stand for.
template <Rounding R, class D, class I, class S> TCPU_INLINE D ld_to_float(S x) {
  return rounded<R>([](I y) { return (D)y; }, (I)x);
}
template <Rounding R, class I, class T> TCPU_INLINE auto ld_to_integer(T x) {
  T whole = R == Rounding::nearest ? m_rint(x) : R == Rounding::down ? m_floor(x) : R == Rounding::up ? m_ceil(x) : x;
  return (signed_of<I>)convert<I>(whole);
}

}  // namespace tcpu
