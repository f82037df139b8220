// The headers' functions as a program: argv[1] names one, stdin brings its arrays one after the other, stdout takes the
// result. So one build serves every test, and a build for another machine can run under an emulator.
#include "tcpu.h"
#include <omp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

using namespace tcpu;

// An array that ends at the edge of mapped memory: to touch what lies behind it is fatal.
template <class T> T* guarded(int64_t count) {
  const int64_t page = 4096;
  int64_t bytes = count * (int64_t)sizeof(T), pages = (bytes + page - 1) / page + 1;
  char* memory = (char*)mmap(nullptr, pages * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(memory + (pages - 1) * page, page, PROT_NONE);
  return (T*)(memory + (pages - 1) * page - bytes);
}
template <class T> T* read(int64_t count) {
  T* array = guarded<T>(count);
  if ((int64_t)fread(array, sizeof(T), count, stdin) != count) exit(3);
  return array;
}
template <class T> void write(const T* array, int64_t count) { fwrite(array, sizeof(T), count, stdout); }

struct Arguments {
  char** text;
  int64_t operator[](int i) const { return atoll(text[i]); }
};
struct Entry {
  const char* name;
  void (*run)(Arguments);
};
static Entry entries[2048];
static int entry_count = 0;
struct Register {
  Register(const char* name, void (*run)(Arguments)) { entries[entry_count++] = {name, run}; }
};
#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define ENTRY(name, ...) static Register JOIN(entry_, __COUNTER__)(name, __VA_ARGS__);

// Bytes.

template <class F> void map64(int64_t blocks, F f) {
  uint8_t *x = read<uint8_t>(blocks * 64), *y = guarded<uint8_t>(blocks * 64);
  for (int64_t i = 0; i < blocks; ++i) store_wide(y + i * 64, f(load64(x + i * 64)));
  write(y, blocks * 64);
}
ENTRY("flip64", [](Arguments a) { map64(a[0], [](v64u8 x) { return flip64(x); }); })
ENTRY("shr64", [](Arguments a) { map64(a[0], [=](v64u8 x) { return shr64(x, (int)a[1]); }); })
ENTRY("splat64", [](Arguments a) { map64(a[0], [=](v64u8) { return splat64((int)a[1]); }); })
// ((x + c) ^ c) - (~x | c) & c
ENTRY("operators", [](Arguments a) {
  map64(a[0], [=](v64u8 x) {
    v64u8 c = splat64((int)a[1]);
    return ((x + c) ^ c) - ((~x | c) & c);
  });
})
template <class F> void map_dot4(int64_t blocks, F f) {
  uint8_t *u = read<uint8_t>(blocks * 64), *s = read<uint8_t>(blocks * 64);
  int32_t* acc = read<int32_t>(blocks * 16);
  for (int64_t i = 0; i < blocks; ++i) {
    v16i32 sum = load_wide<v16i32>(acc + i * 16);
    f(sum, load64(u + i * 64), load64(s + i * 64));
    store_wide(acc + i * 16, sum);
  }
  write(acc, blocks * 16);
}
ENTRY("dot4", [](Arguments a) { map_dot4(a[0], [](v16i32& c, v64u8 u, v64u8 s) { dot4(c, u, s); }); })
ENTRY("dot4_u7", [](Arguments a) { map_dot4(a[0], [](v16i32& c, v64u8 u, v64u8 s) { dot4_u7(c, u, s); }); })
ENTRY("hsum16", [](Arguments) {
  v16i32* x = (v16i32*)aligned_alloc(64, sizeof(v16i32) * 16);
  if (fread(x, 64, 16, stdin) != 16) exit(3);
  v16i32 sums = hsum16(x);
  fwrite(&sums, 64, 1, stdout);
})
ENTRY("hsum16f", [](Arguments) {
  v16f32* x = (v16f32*)aligned_alloc(64, sizeof(v16f32) * 16);
  if (fread(x, 64, 16, stdin) != 16) exit(3);
  v16f32 sums = hsum16f(x);
  fwrite(&sums, 64, 1, stdout);
})

// Products: lda and the strides of B, the offset of its first element, its span.

template <class T, class C, int M, int N, int K, Sign S> void multiply(Arguments x) {
  int64_t lda = x[0], stride_k = x[1], stride_n = x[2], first = x[3], span = x[4];
  T *a = read<T>((M - 1) * lda + K), *b = read<T>(span);
  C* c = read<C>(M * N);
  T* packed = guarded<T>(packed_elements<T, K, N>());
  pack_b<T, K, N, S>(b + first, stride_k, stride_n, packed);
  dot<M, N, K, S>(a, lda, packed, c);
  write(c, M * N);
}
#define DOT(T, C, M, N, K, S) ENTRY(#T " " #C " " #M " " #N " " #K " " #S, multiply<T, C, M, N, K, Sign::S>)
#define SOME_DOTS(T, C, S) DOT(T, C, 2, 5, 7, S) DOT(T, C, 7, 80, 33, S) DOT(T, C, 13, 64, 64, S)
#define MORE_DOTS(T, C) \
  DOT(T, C, 1, 1, 1, both) DOT(T, C, 1, 16, 3, both) DOT(T, C, 6, 23, 130, both) DOT(T, C, 17, 100, 67, both)
SOME_DOTS(float, float, both)
SOME_DOTS(bf16, float, both)
SOME_DOTS(int8_t, int32_t, both)
SOME_DOTS(int8_t, int32_t, a_u7)
SOME_DOTS(int8_t, int32_t, b_u7)
DOT(f16, float, 7, 80, 33, both)
#ifdef RARE_PRODUCTS
MORE_DOTS(float, float)
MORE_DOTS(int8_t, int32_t)
DOT(double, double, 7, 20, 33, both)
DOT(int16_t, int32_t, 2, 5, 7, both)
DOT(uint8_t, int32_t, 7, 20, 33, both)
DOT(int8_t, int64_t, 2, 5, 7, both)
DOT(f16, f16, 2, 5, 7, both)
DOT(fp8e5, float, 7, 20, 33, both)
DOT(float, double, 2, 5, 7, both)
#endif

// B in fours: row q of [K / 4, 4 N] has elements 4 q to 4 q + 3 of each column
template <int M, int N, int K, Sign S> void multiply_quads(Arguments x) {  // lda, 1: B is packed first, 2: C is not read
  const int64_t lda = x[0];
  int8_t *a = read<int8_t>((M - 1) * lda + K), *b = read<int8_t>(K * N);
  int32_t* c = read<int32_t>(M * N);
  auto codes = [&](int q, int64_t column) { return load64(b + q * 4 * N + column); };
  if (x[1] == 1) {
    int8_t* packed = guarded<int8_t>(packed_elements<int8_t, K, N>());
    pack_quads<K, N, S>(codes, packed);
    dot<M, N, K, S>(a, lda, packed, c);
  } else if (x[1] == 2) {
    dot_quads<M, N, K, S, true>(a, lda, codes, c);
  } else {
    dot_quads<M, N, K, S, false>(a, lda, codes, c);
  }
  write(c, M * N);
}
#define QUADS(M, N, K) \
  ENTRY("quads " #M " " #N " " #K " both", multiply_quads<M, N, K, Sign::both>) \
  ENTRY("quads " #M " " #N " " #K " a_u7", multiply_quads<M, N, K, Sign::a_u7>) \
  ENTRY("quads " #M " " #N " " #K " b_u7", multiply_quads<M, N, K, Sign::b_u7>)
QUADS(1, 16, 4)
QUADS(8, 80, 20)

template <class T, class L, int N, int K> void multiply_lanes(Arguments x) {  // ldb
  int64_t ldb = x[0];
  T *a = read<T>(K), *b = read<T>((N - 1) * ldb + K);
  L *lanes = read<L>(N * 16), *c = read<L>(N);
  dot_lanes<N, K>(a, b, ldb, lanes);
  fold_lanes<N>(lanes, c);
  write(c, N);
}
#define LANES(T, L, N, K) ENTRY("lanes " #T " " #L " " #N " " #K, multiply_lanes<T, L, N, K>)
#define ALL_LANES(T, L) LANES(T, L, 1, 1) LANES(T, L, 23, 205)
ALL_LANES(float, float)
ALL_LANES(bf16, float)
ALL_LANES(f16, float)
ALL_LANES(int8_t, int32_t)

template <class T, int M, int N, int K> void multiply_rows(Arguments x) {  // lda, ldb
  T *a = read<T>((M - 1) * x[0] + K), *b = read<T>((N - 1) * x[1] + K);
  float* c = read<float>(M * N);
  dot_rows<M, N, K>(a, x[0], b, x[1], c);
  write(c, M * N);
}
template <class T, int M, int N, int K> void multiply_few(Arguments x) {  // lda, ldb
  float* a = read<float>((M - 1) * x[0] + K);
  T* b = read<T>((K - 1) * x[1] + N);
  float* c = read<float>(M * N);
  few_rows<M, N, K>(a, x[0], b, x[1], c);
  write(c, M * N);
}
#define FEW(T, M, N, K)                                                     \
  ENTRY("rows " #T " " #M " " #N " " #K, multiply_rows<T, M, N, K>)         \
  ENTRY("few " #T " " #M " " #N " " #K, multiply_few<T, M, N, K>)
#define ALL_FEW(T) FEW(T, 1, 16, 8) FEW(T, 2, 64, 128) FEW(T, 4, 16, 32)
ALL_FEW(float)
ALL_FEW(bf16)
ALL_FEW(f16)

#ifndef PRODUCTS_ONLY

// Element by element: the count, then the inputs.

template <class S, class D, class F> void map1(int64_t n, F f) {
  S* x = read<S>(n);
  D* y = guarded<D>(n);
  for (int64_t i = 0; i < n; ++i) y[i] = f(x[i]);
  write(y, n);
}
template <class T, class F> void map2(int64_t n, F f) {
  T *a = read<T>(n), *b = read<T>(n), *y = guarded<T>(n);
  for (int64_t i = 0; i < n; ++i) y[i] = f(a[i], b[i]);
  write(y, n);
}
#define MATH(name)                                                                                         \
  ENTRY(#name " float", [](Arguments a) { map1<float, float>(a[0], [](float x) { return name(x); }); })    \
  ENTRY(#name " double", [](Arguments a) { map1<double, double>(a[0], [](double x) { return name(x); }); })
MATH(m_exp)
MATH(m_exp2)
MATH(m_log)
MATH(m_log2)
MATH(m_sin)
MATH(m_cos)
MATH(m_erf)
MATH(m_tanh)
MATH(m_sqrt)
MATH(m_sqrt_rn)
MATH(m_rsqrt)
MATH(m_abs)
MATH(m_floor)
MATH(m_ceil)
MATH(m_rint)

#define MATH2(name, T) \
  ENTRY(#name " " #T, [](Arguments a) { map2<T>(a[0], [](T x, T y) { return name(x, y); }); })
#define FOR_FLOATS(name) MATH2(name, float) MATH2(name, double)
FOR_FLOATS(m_maxnum)
FOR_FLOATS(m_minnum)
FOR_FLOATS(m_maximum)
FOR_FLOATS(m_minimum)
FOR_FLOATS(m_div_rn)
MATH2(m_maximum, f16)
MATH2(m_maximum, bf16)
MATH2(m_mulhiui, int32_t)
MATH2(m_mulhiui, int64_t)
ENTRY("m_absi int32_t", [](Arguments a) { map1<int32_t, int32_t>(a[0], [](int32_t x) { return m_absi(x); }); })
ENTRY("m_absi int8_t", [](Arguments a) { map1<int8_t, int8_t>(a[0], [](int8_t x) { return m_absi(x); }); })
ENTRY("m_fma", [](Arguments a) {
  float *x = read<float>(a[0]), *y = read<float>(a[0]), *z = read<float>(a[0]), *r = guarded<float>(a[0]);
  for (int64_t i = 0; i < a[0]; ++i) r[i] = m_fma(x[i], y[i], z[i]);
  write(r, a[0]);
})
ENTRY("m_clamp", [](Arguments a) {  // the count; whether NaN propagates
  float *x = read<float>(a[0]), *r = guarded<float>(a[0]);
  for (int64_t i = 0; i < a[0]; ++i) r[i] = m_clamp(x[i], -1.0f, 2.0f, a[1] != 0);
  write(r, a[0]);
})

#define CONVERT(S, D) \
  ENTRY(#S " " #D, [](Arguments a) { map1<S, D>(a[0], [](S x) { return convert<D>(x); }); })
#define NARROW(T) CONVERT(float, T) CONVERT(double, T) CONVERT(T, float) CONVERT(T, int32_t) CONVERT(int32_t, T)
NARROW(f16)
NARROW(bf16)
NARROW(fp8e4nv)
NARROW(fp8e5)
NARROW(fp8e4b15)
NARROW(fp8e4b8)
NARROW(fp8e5b16)
#define TO_INTEGERS(S)                                                                                              \
  CONVERT(S, int8_t) CONVERT(S, int16_t) CONVERT(S, int32_t) CONVERT(S, int64_t) CONVERT(S, uint8_t)                \
  CONVERT(S, uint16_t) CONVERT(S, uint32_t) CONVERT(S, uint64_t)
TO_INTEGERS(float)
TO_INTEGERS(double)

// Reductions: rows, each of L lanes.

template <class Op, int L, class T> void reduce_rows(int64_t rows) {
  T *x = read<T>(rows * L), *y = guarded<T>(rows);
  for (int64_t i = 0; i < rows; ++i) y[i] = hreduce<Op, L>(x + i * L);
  write(y, rows);
}
#define REDUCE(Op, L, T) ENTRY(#Op " " #L " " #T, [](Arguments a) { reduce_rows<Op, L, T>(a[0]); })
#define REDUCE_FLOAT(Op) REDUCE(Op, 1, float) REDUCE(Op, 4, double) REDUCE(Op, 16, float) REDUCE(Op, 64, float)
REDUCE_FLOAT(h_add)
REDUCE_FLOAT(h_mul)
REDUCE_FLOAT(h_maxnum)
REDUCE_FLOAT(h_minnum)
REDUCE_FLOAT(h_maximum)
REDUCE_FLOAT(h_minimum)
REDUCE(h_maximum, 8, f16)
REDUCE(h_minnum, 16, bf16)
#define REDUCE_INTEGER(Op) REDUCE(Op, 2, int32_t) REDUCE(Op, 16, int32_t) REDUCE(Op, 64, int8_t) REDUCE(Op, 8, int64_t)
REDUCE_INTEGER(h_add)
REDUCE_INTEGER(h_mul)
REDUCE_INTEGER(h_max)
REDUCE_INTEGER(h_min)
REDUCE_INTEGER(h_umax)
REDUCE_INTEGER(h_umin)
REDUCE_INTEGER(h_and)
REDUCE_INTEGER(h_or)
REDUCE_INTEGER(h_xor)

// Atomics.

// One call per operand, in order: the old values, then what is left.
template <class T, class F> void in_order(int64_t n, F f) {
  T *operand = read<T>(n), *old = guarded<T>(n + 1);
  T cell = operand[0];
  for (int64_t i = 0; i < n; ++i) old[i] = f(&cell, operand[i]);
  old[n] = cell;
  write(old, n + 1);
}
// Four threads add 1 and take it back, again and again: what is left, and how often the old value was impossible.
template <class T, class F> void in_parallel(int64_t n, F f) {
  T cell = T(0);
  int impossible = 0;
#pragma omp parallel num_threads(4) reduction(+ : impossible)
  for (int64_t i = 0; i < n; ++i) {
    T before = f(&cell, i % 2 ? T(-1) : T(1));
    impossible += before < T(-4) || before > T(4);
  }
  float result[2] = {(float)cell, (float)impossible};
  write(result, 2);
}
#define ATOMIC(name, T) \
  ENTRY(#name " " #T, [](Arguments a) { in_order<T>(a[0], [](T* p, T v) { return name(p, v); }); })
#define ATOMIC_INTEGER(name) ATOMIC(name, int8_t) ATOMIC(name, int16_t) ATOMIC(name, int32_t) ATOMIC(name, int64_t)
ATOMIC_INTEGER(a_add)
ATOMIC_INTEGER(a_max)
ATOMIC_INTEGER(a_min)
ATOMIC_INTEGER(a_umax)
ATOMIC_INTEGER(a_umin)
ATOMIC_INTEGER(a_and)
ATOMIC_INTEGER(a_or)
ATOMIC_INTEGER(a_xor)
ATOMIC_INTEGER(a_xchg)
#define ATOMIC_FLOAT(name) ATOMIC(name, float) ATOMIC(name, double) ATOMIC(name, f16) ATOMIC(name, bf16)
ATOMIC_FLOAT(a_fadd)
ATOMIC_FLOAT(a_add)
ATOMIC_FLOAT(a_max)
ATOMIC_FLOAT(a_min)
ATOMIC_FLOAT(a_xchg)
#define CAS(T)                                                                             \
  ENTRY("a_cas " #T, [](Arguments a) { /* replaces the cell where it holds operand - 1 */  \
    in_order<T>(a[0], [](T* p, T v) { return a_cas(p, T(v - T(1)), v); });                 \
  })
CAS(int8_t)
CAS(int32_t)
CAS(int64_t)
CAS(float)
CAS(bf16)
#define PARALLEL(name, T) \
  ENTRY("parallel " #name " " #T, [](Arguments a) { in_parallel<T>(a[0], [](T* p, T v) { return name(p, v); }); })
PARALLEL(a_add, int8_t)
PARALLEL(a_add, int16_t)
PARALLEL(a_add, int32_t)
PARALLEL(a_add, int64_t)
PARALLEL(a_fadd, float)
PARALLEL(a_fadd, double)
PARALLEL(a_fadd, f16)
PARALLEL(a_fadd, bf16)

#endif

int main(int, char** argv) {
  for (int i = 0; i < entry_count; ++i)
    if (strcmp(entries[i].name, argv[1]) == 0) {
      entries[i].run({argv + 2});
      return 0;
    }
  return 2;
}
