// The vectors and instructions of the target. Vector extensions and inline assembly in place of the intrinsics header:
// that one alone costs more to parse than everything else in a generated kernel.
#pragma once
#include "types.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define TCPU_AVX512 1
#define TCPU_VECTOR_BYTES 64
#define TCPU_REGISTERS 32
#elif defined(__AVX2__)
#define TCPU_VECTOR_BYTES 32
#define TCPU_REGISTERS 16
#elif defined(__aarch64__)
#define TCPU_VECTOR_BYTES 16
#define TCPU_REGISTERS 32
#else
#define TCPU_VECTOR_BYTES 16
#define TCPU_REGISTERS 16
#endif

#if (defined(TCPU_AVX512) && defined(__AVX512VNNI__)) || (TCPU_VECTOR_BYTES == 32 && defined(__AVXVNNI__))
#define TCPU_DPBUSD 1
#endif
#if defined(TCPU_AVX512) && defined(__AVX512BF16__)
#define TCPU_DPBF16 1
#endif
#if defined(__SSE2__)
#define TCPU_MADD16 1  // pmaddwd: sums of two products of int16
#endif
#if defined(__SSSE3__)
#define TCPU_MADD8 1  // pmaddubsw: sums of two products u8 x s8, saturated to int16
#endif
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define TCPU_SDOT 1
#endif

namespace tcpu {

constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
constexpr int min_of(int a, int b) { return a < b ? a : b; }

template <class T, int BYTES> struct VectorOf { typedef T type __attribute__((vector_size(BYTES))); };
template <class T, int BYTES = TCPU_VECTOR_BYTES> using vec = typename VectorOf<T, BYTES>::type;
template <class T> constexpr int width = TCPU_VECTOR_BYTES / (int)sizeof(T);

template <class V> TCPU_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
template <class V> TCPU_INLINE void store(void* p, V v) { memcpy(p, &v, sizeof(V)); }

// BYTES < sizeof(V): nothing beyond them is touched; the other lanes read as zero.
template <int BYTES, class V> TCPU_INLINE V load_part(const void* p) {
  if constexpr (BYTES == (int)sizeof(V)) {
    return load<V>(p);
  } else {
#ifdef TCPU_AVX512
    typedef const char(*Bytes)[BYTES];
    V v;
    asm("vmovdqu8 %2, %0%{%1%}%{z%}" : "=v"(v) : "Yk"((1ull << BYTES) - 1), "m"(*(Bytes)p));
    return v;
#else
    V v{};
    memcpy(&v, p, BYTES);
    return v;
#endif
  }
}
template <int BYTES, class V> TCPU_INLINE void store_part(void* p, V v) {
  if constexpr (BYTES == (int)sizeof(V)) {
    store(p, v);
  } else {
#ifdef TCPU_AVX512
    typedef char(*Bytes)[BYTES];
    asm("vmovdqu8 %1, %0%{%2%}" : "+m"(*(Bytes)p) : "v"(v), "Yk"((1ull << BYTES) - 1));
#else
    memcpy(p, &v, BYTES);
#endif
  }
}
template <class T> TCPU_INLINE vec<T> splat(T x) { return x - vec<T>{}; }

#ifdef __clang__
#define TCPU_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define TCPU_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec<lane_int<decltype(a)>, sizeof(a)>){__VA_ARGS__})
#endif
template <class V> using lane_int = typename SignedBits<sizeof(V{}[0])>::type;

// acc[i] + sum over j < 4 of u8(u[4i + j]) * s8(s[4i + j]). Assembly, as GCC 12 spills accumulators around the builtin;
// and by value, as it would leave an operand in memory that is an element of an array.
#ifdef TCPU_DPBUSD
TCPU_INLINE vec<int32_t> dpbusd(vec<int32_t> acc, vec<int32_t> u, vec<int32_t> s) {
#ifdef TCPU_AVX512
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(s));
#endif
  return acc;
}
#endif
#ifdef TCPU_DPBF16
TCPU_INLINE vec<float> dpbf16(vec<float> acc, vec<int32_t> a, vec<int32_t> b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
#endif
#ifdef TCPU_MADD16
TCPU_INLINE vec<int32_t> madd16(vec<int32_t> a, vec<int32_t> b) {
#ifdef __AVX__
  vec<int32_t> r;
  asm("vpmaddwd %2, %1, %0" : "=v"(r) : "v"(a), "v"(b));
  return r;
#else
  asm("pmaddwd %1, %0" : "+x"(a) : "x"(b));
  return a;
#endif
}
#endif
#ifdef TCPU_MADD8
TCPU_INLINE vec<int32_t> madd8(vec<int32_t> u, vec<int32_t> s) {
#ifdef __AVX__
  vec<int32_t> r;
  asm("vpmaddubsw %2, %1, %0" : "=v"(r) : "v"(u), "v"(s));
  return r;
#else
  asm("pmaddubsw %1, %0" : "+x"(u) : "x"(s));
  return u;
#endif
}
#endif
#ifdef TCPU_SDOT
TCPU_INLINE vec<int32_t> sdot(vec<int32_t> acc, vec<int32_t> a, vec<int32_t> b) {
  asm("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
  return acc;
}
#endif

// Narrow lanes to 32-bit ones; GCC 12 takes the conversion builtin apart, into scalars or into halves.
TCPU_INLINE vec<uint32_t> widen(vec<uint8_t, TCPU_VECTOR_BYTES / 4> x) {
#ifdef __AVX2__
  vec<uint32_t> r;
  asm("vpmovzxbd %1, %0" : "=v"(r) : "vm"(x));
  return r;
#else
  return __builtin_convertvector(__builtin_convertvector(x, vec<uint16_t, TCPU_VECTOR_BYTES / 2>), vec<uint32_t>);
#endif
}
TCPU_INLINE vec<uint32_t> widen(vec<int8_t, TCPU_VECTOR_BYTES / 4> x) {
#ifdef __AVX2__
  vec<uint32_t> r;
  asm("vpmovsxbd %1, %0" : "=v"(r) : "vm"(x));
  return r;
#else
  return (vec<uint32_t>)__builtin_convertvector(
      __builtin_convertvector(x, vec<int16_t, TCPU_VECTOR_BYTES / 2>), vec<int32_t>);
#endif
}
TCPU_INLINE vec<uint32_t> widen(vec<uint16_t, TCPU_VECTOR_BYTES / 2> x) {
#ifdef __AVX2__
  vec<uint32_t> r;
  asm("vpmovzxwd %1, %0" : "=v"(r) : "vm"(x));
  return r;
#else
  return __builtin_convertvector(x, vec<uint32_t>);
#endif
}

// As many floats as a vector holds, from narrow storage.
TCPU_INLINE vec<float> widen(vec<uint16_t, TCPU_VECTOR_BYTES / 2> x, bf16) {
  return (vec<float>)(widen(x) << 16);
}
TCPU_INLINE vec<float> widen(vec<uint16_t, TCPU_VECTOR_BYTES / 2> x, f16) {
  vec<float> r;
#if defined(TCPU_AVX512) || defined(__F16C__)
  asm("vcvtph2ps %1, %0" : "=v"(r) : "vm"(x));
#elif defined(__aarch64__)
  asm("fcvtl %0.4s, %1.4h" : "=w"(r) : "w"(x));
#else
  for (int i = 0; i < width<float>; ++i) r[i] = bitcast<f16>(x[i]);
#endif
  return r;
}

// Interleaving of two vectors within each 16 bytes (lo, hi), and selection of every other 16 bytes (even, odd).
#if TCPU_VECTOR_BYTES == 64
#define TCPU_LO32 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define TCPU_HI32 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define TCPU_LO64 0, 8, 2, 10, 4, 12, 6, 14
#define TCPU_HI64 1, 9, 3, 11, 5, 13, 7, 15
#define TCPU_EVEN128 0, 1, 4, 5, 8, 9, 12, 13
#define TCPU_ODD128 2, 3, 6, 7, 10, 11, 14, 15
#elif TCPU_VECTOR_BYTES == 32
#define TCPU_LO32 0, 8, 1, 9, 4, 12, 5, 13
#define TCPU_HI32 2, 10, 3, 11, 6, 14, 7, 15
#define TCPU_LO64 0, 4, 2, 6
#define TCPU_HI64 1, 5, 3, 7
#define TCPU_EVEN128 0, 1, 4, 5
#define TCPU_ODD128 2, 3, 6, 7
#else
#define TCPU_LO32 0, 4, 1, 5
#define TCPU_HI32 2, 6, 3, 7
#define TCPU_LO64 0, 2
#define TCPU_HI64 1, 3
#endif
#define TCPU_INTERLEAVE(name, lane, ...)                        \
  template <class V> TCPU_INLINE V name(V a, V b) {             \
    return (V)TCPU_SHUFFLE((vec<lane>)a, (vec<lane>)b, __VA_ARGS__); \
  }
TCPU_INTERLEAVE(lo32, int32_t, TCPU_LO32)
TCPU_INTERLEAVE(hi32, int32_t, TCPU_HI32)
TCPU_INTERLEAVE(lo64, int64_t, TCPU_LO64)
TCPU_INTERLEAVE(hi64, int64_t, TCPU_HI64)
#if TCPU_VECTOR_BYTES > 16
TCPU_INTERLEAVE(even128, int64_t, TCPU_EVEN128)
TCPU_INTERLEAVE(odd128, int64_t, TCPU_ODD128)
#endif

// Transpose the square of 32-bit lanes that as many vectors as one has lanes hold.
template <class V> TCPU_INLINE void transpose32(V* r) {
  constexpr int W = width<int32_t>;
  V t[W];
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    V a = lo32(r[i], r[i + 1]), b = hi32(r[i], r[i + 1]);
    V c = lo32(r[i + 2], r[i + 3]), d = hi32(r[i + 2], r[i + 3]);
    t[i] = lo64(a, c), t[i + 1] = hi64(a, c), t[i + 2] = lo64(b, d), t[i + 3] = hi64(b, d);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
#if TCPU_VECTOR_BYTES == 64
    V even_low = even128(t[j], t[4 + j]), even_high = even128(t[8 + j], t[12 + j]);
    V odd_low = odd128(t[j], t[4 + j]), odd_high = odd128(t[8 + j], t[12 + j]);
    r[j] = even128(even_low, even_high), r[8 + j] = odd128(even_low, even_high);
    r[4 + j] = even128(odd_low, odd_high), r[12 + j] = odd128(odd_low, odd_high);
#elif TCPU_VECTOR_BYTES == 32
    r[j] = even128(t[j], t[4 + j]), r[4 + j] = odd128(t[j], t[4 + j]);
#else
    r[j] = t[j];
#endif
  }
}

// Lane n of the result is the sum of the lanes of x[n].
template <class V> TCPU_INLINE V sum_rows(const V* x) {
  constexpr int W = width<int32_t>;
  V quads[W / 4];
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    V a = lo32(x[i], x[i + 1]) + hi32(x[i], x[i + 1]);
    V b = lo32(x[i + 2], x[i + 3]) + hi32(x[i + 2], x[i + 3]);
    quads[i / 4] = lo64(a, b) + hi64(a, b);
  }
#if TCPU_VECTOR_BYTES == 64
  V low = even128(quads[0], quads[1]) + odd128(quads[0], quads[1]);
  V high = even128(quads[2], quads[3]) + odd128(quads[2], quads[3]);
  return even128(low, high) + odd128(low, high);
#elif TCPU_VECTOR_BYTES == 32
  return even128(quads[0], quads[1]) + odd128(quads[0], quads[1]);
#else
  return quads[0];
#endif
}

}  // namespace tcpu
