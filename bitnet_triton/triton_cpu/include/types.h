// Storage types of narrow floats, bit casts, and conversions that are defined for every input.
#pragma once
#include <stdint.h>
#include <string.h>

#define TCPU_ALWAYS __attribute__((always_inline))
#define TCPU_METHOD inline TCPU_ALWAYS
#define TCPU_INLINE static TCPU_METHOD
// GCC does not vectorise a loop that copies structures, only one that copies what they hold
#define TCPU_COPIES_BITS(TYPE)                                                   \
  TCPU_METHOD TYPE(const TYPE& other) : bits(other.bits) {}                      \
  TCPU_METHOD TYPE& operator=(const TYPE& other) { bits = other.bits; return *this; }

namespace tcpu {

template <class D, class S> TCPU_INLINE D bitcast(S s) {
  static_assert(sizeof(D) == sizeof(S), "bitcast between different sizes");
  D d;
  memcpy((void*)&d, (const void*)&s, sizeof(D));
  return d;
}

template <int BYTES> struct Bits;
template <> struct Bits<1> { typedef uint8_t type; };
template <> struct Bits<2> { typedef uint16_t type; };
template <> struct Bits<4> { typedef uint32_t type; };
template <> struct Bits<8> { typedef uint64_t type; };
template <class T> using bits_of = typename Bits<sizeof(T)>::type;
template <int BYTES> struct SignedBits;
template <> struct SignedBits<1> { typedef int8_t type; };
template <> struct SignedBits<2> { typedef int16_t type; };
template <> struct SignedBits<4> { typedef int32_t type; };
template <> struct SignedBits<8> { typedef int64_t type; };
template <class T> using signed_of = typename SignedBits<sizeof(T)>::type;

struct bf16 {
  uint16_t bits;
  bf16() = default;
  TCPU_COPIES_BITS(bf16)
  TCPU_METHOD bf16(float f) {
    uint32_t u = bitcast<uint32_t>(f);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1)) >> 16;
    bool is_nan = (u & 0x7FFFFFFFu) > 0x7F800000u;
    bits = (uint16_t)(is_nan ? (u >> 16) | 0x40u : rounded);
  }
  TCPU_METHOD operator float() const { return bitcast<float>((uint32_t)bits << 16); }
};

// A float with EXP exponent and MAN mantissa bits in the low bits of an integer. Denormals of the narrow type are
// handled by integer conversion (decode) and by adding a power of two whose ulp is the narrow one (encode): neither
// needs denormal float32 arithmetic, which is slow on some CPUs and absent when a thread flushes denormals.
template <int MAN, int BIAS> TCPU_INLINE float decode_finite(uint32_t magnitude) {
  float denormal = (float)(int32_t)magnitude * bitcast<float>((uint32_t)(127 + 1 - BIAS - MAN) << 23);
  float normal = bitcast<float>((magnitude << (23 - MAN)) + ((uint32_t)(127 - BIAS) << 23));
  return magnitude < (1u << MAN) ? denormal : normal;
}
template <int MAN, int BIAS> TCPU_INLINE uint32_t encode_finite(uint32_t magnitude) {
  constexpr int drop = 23 - MAN;
  constexpr uint32_t smallest_normal = (uint32_t)(127 + 1 - BIAS) << 23;
  constexpr uint32_t magic = (uint32_t)(127 + 1 - BIAS - MAN + 23) << 23;
  uint32_t normal = (magnitude + ((1u << (drop - 1)) - 1) + ((magnitude >> drop) & 1)) >> drop;
  normal -= (uint32_t)(127 - BIAS) << MAN;
  uint32_t denormal = bitcast<uint32_t>(bitcast<float>(magnitude) + bitcast<float>(magic)) - magic;
  return magnitude < smallest_normal ? denormal : normal;
}

struct f16 {
  uint16_t bits;
  f16() = default;
  TCPU_COPIES_BITS(f16)
  TCPU_METHOD f16(float f) {
    uint32_t u = bitcast<uint32_t>(f), magnitude = u & 0x7FFFFFFFu;
    uint32_t r = encode_finite<10, 15>(magnitude);
    r = r > 0x7C00u ? 0x7C00u : r;
    r = magnitude >= 0x47800000u ? 0x7C00u : r;
    r = magnitude > 0x7F800000u ? 0x7E00u | ((magnitude >> 13) & 0x3FFu) : r;
    bits = (uint16_t)(r | ((u >> 16) & 0x8000u));
  }
  TCPU_METHOD operator float() const {
    uint32_t magnitude = bits & 0x7FFFu;
    uint32_t special = 0x7F800000u | (magnitude << 13);
    uint32_t u = magnitude >= 0x7C00u ? special : bitcast<uint32_t>(decode_finite<10, 15>(magnitude));
    return bitcast<float>(u | ((uint32_t)(bits & 0x8000u) << 16));
  }
};

// What the codes beyond the finite numbers mean.
enum class Fp8Kind { ieee, one_nan, finite_only, no_negative_zero };

// float -> fp8 saturates to the largest finite value as the conversion instructions of NVIDIA do (satfinite).
template <int MAN, int BIAS, Fp8Kind KIND> struct Fp8 {
  uint8_t bits;
  static constexpr uint32_t infinity = 0x7Cu;
  static constexpr uint32_t nan = KIND == Fp8Kind::no_negative_zero ? 0x80u : 0x7Fu;
  static constexpr uint32_t largest = KIND == Fp8Kind::ieee ? 0x7Bu : KIND == Fp8Kind::one_nan ? 0x7Eu : 0x7Fu;
  Fp8() = default;
  TCPU_COPIES_BITS(Fp8)
  TCPU_METHOD Fp8(float f) {
    uint32_t u = bitcast<uint32_t>(f), magnitude = u & 0x7FFFFFFFu, sign = (u >> 24) & 0x80u;
    uint32_t r = encode_finite<MAN, BIAS>(magnitude);
    r = r > largest ? largest : r;
    r = magnitude >= 0x7F800000u ? largest : r;
    if constexpr (KIND == Fp8Kind::no_negative_zero) {
      r = r == 0 ? 0 : r | sign;
      r = magnitude > 0x7F800000u ? nan : r;
    } else {
      r = (magnitude > 0x7F800000u ? nan : r) | sign;
    }
    bits = (uint8_t)r;
  }
  TCPU_METHOD operator float() const {
    uint32_t magnitude = bits & 0x7Fu, sign = (uint32_t)(bits & 0x80u) << 24;
    uint32_t u = bitcast<uint32_t>(decode_finite<MAN, BIAS>(magnitude));
    if constexpr (KIND == Fp8Kind::ieee) u = magnitude >= infinity ? 0x7F800000u | ((magnitude & 3) << 21) : u;
    if constexpr (KIND == Fp8Kind::one_nan) u = magnitude == nan ? 0x7FC00000u : u;
    if constexpr (KIND == Fp8Kind::no_negative_zero) u = bits == nan ? 0x7FC00000u : u;
    return bitcast<float>(u | sign);
  }
};
typedef Fp8<3, 7, Fp8Kind::one_nan> fp8e4nv;
typedef Fp8<2, 15, Fp8Kind::ieee> fp8e5;
typedef Fp8<3, 15, Fp8Kind::finite_only> fp8e4b15;
typedef Fp8<3, 8, Fp8Kind::no_negative_zero> fp8e4b8;
typedef Fp8<2, 16, Fp8Kind::no_negative_zero> fp8e5b16;

template <class T> struct is_integer { static constexpr bool value = false; };
#define TCPU_INTEGER(T) template <> struct is_integer<T> { static constexpr bool value = true; };
TCPU_INTEGER(bool)
TCPU_INTEGER(char)
TCPU_INTEGER(signed char)
TCPU_INTEGER(unsigned char)
TCPU_INTEGER(short)
TCPU_INTEGER(unsigned short)
TCPU_INTEGER(int)
TCPU_INTEGER(unsigned)
TCPU_INTEGER(long)
TCPU_INTEGER(unsigned long)
TCPU_INTEGER(long long)
TCPU_INTEGER(unsigned long long)
#undef TCPU_INTEGER
template <class T> struct is_float { static constexpr bool value = false; };
template <> struct is_float<float> { static constexpr bool value = true; };
template <> struct is_float<double> { static constexpr bool value = true; };
template <bool FIRST, class A, class B> struct Choose { typedef A type; };
template <class A, class B> struct Choose<false, A, B> { typedef B type; };
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };

// The nearest float32 below a 16-bit type must not round twice: round to odd first.
TCPU_INLINE float round_to_odd(double d) {
  float f = (float)d;
  uint32_t u = bitcast<uint32_t>(f);
  bool inexact = (double)f != d && d == d;
  bool away = (double)f > d ? f > 0 : f < 0;
  uint32_t odd = (u - (away ? 1u : 0u)) | 1u;
  return bitcast<float>(inexact ? odd : u);
}

template <class D, class F> TCPU_INLINE D saturate(F x) {
  constexpr bool is_signed = D(-1) < D(0);
  constexpr int bits = (int)sizeof(D) * 8 - (is_signed ? 1 : 0);
  constexpr F limit = (F)(1ull << (bits - 1)) * 2;
  constexpr D largest = (D)(~0ull >> (64 - bits));
  constexpr D smallest = is_signed ? (D)(-largest - 1) : (D)0;
  if constexpr (sizeof(D) < 4) {
    F low = x > (F)smallest ? x : (F)smallest;
    F bounded = low < (F)largest ? low : (F)largest;
    return (D)(x != x ? 0 : (int32_t)bounded);
  } else if constexpr (is_signed) {
    return x >= limit ? largest : x >= -limit ? (D)x : x != x ? (D)0 : smallest;
  } else {
    return x >= limit ? largest : x > 0 ? (D)x : (D)0;
  }
}

template <class D, class S> TCPU_INLINE D convert(S s) {
  if constexpr (is_same<D, S>::value) {
    return s;
  } else if constexpr (is_same<D, bool>::value) {
    return s != S(0);
  } else if constexpr (is_integer<D>::value && !is_integer<S>::value) {
    if constexpr (is_float<S>::value) return saturate<D>(s);
    else return saturate<D>((float)s);
  } else if constexpr (is_integer<S>::value || is_float<D>::value) {
    return (D)s;
  } else if constexpr (is_same<S, double>::value) {
    return D(round_to_odd(s));
  } else {
    return D((float)s);
  }
}

}  // namespace tcpu
