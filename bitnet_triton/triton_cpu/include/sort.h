// Sort contiguous rows, and take the first values of a sorted row.
//
// Elements are mapped one to one to signed integers of their width that compare the same way, so
// that one network for each width serves every type, both directions and NaN: floating-point
// numbers come in IEEE 754's total order (-NaN < -inf < ... < -0 < 0 < ... < inf < NaN).
//
// The network is Batcher's bitonic sorter in the form in which every comparison points upwards: two
// sorted halves are merged by comparing each element with its mirror image, and then with the one
// n/4, n/8, ... 1 away. Where that is less than a vector's length, lanes of a vector change places.
#pragma once

#include "types.h"

namespace tcpu {
namespace sorting {

#if defined(__AVX512BW__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// ---- elements as signed integers

enum class Order { as_signed, as_unsigned, sign_magnitude };
// whatever is not an integer is a floating-point number of some format
template <class T> constexpr Order order_of(const T*) { return Order::sign_magnitude; }
constexpr Order order_of(const signed char*) { return Order::as_signed; }
constexpr Order order_of(const short*) { return Order::as_signed; }
constexpr Order order_of(const int*) { return Order::as_signed; }
constexpr Order order_of(const long*) { return Order::as_signed; }
constexpr Order order_of(const long long*) { return Order::as_signed; }
constexpr Order order_of(const unsigned char*) { return Order::as_unsigned; }
constexpr Order order_of(const unsigned short*) { return Order::as_unsigned; }
constexpr Order order_of(const unsigned*) { return Order::as_unsigned; }
constexpr Order order_of(const unsigned long*) { return Order::as_unsigned; }
constexpr Order order_of(const unsigned long long*) { return Order::as_unsigned; }

template <int BYTES> struct signed_integer;
template <> struct signed_integer<1> { typedef int8_t type; };
template <> struct signed_integer<2> { typedef int16_t type; };
template <> struct signed_integer<4> { typedef int32_t type; };
template <> struct signed_integer<8> { typedef int64_t type; };
template <class T> using key = typename signed_integer<sizeof(T)>::type;

template <class K> struct vector { typedef K type __attribute__((vector_size(VECTOR_BYTES))); };
template <class K> using vec = typename vector<K>::type;
template <class K> constexpr int LANES = VECTOR_BYTES / sizeof(K);
template <class K> constexpr K LARGEST = K(~(uint64_t(1) << 63) >> (64 - 8 * sizeof(K)));

// Rows hold elements, not keys: touch them through memcpy alone.
template <class K> TCPU_INLINE vec<K> load(const void* row, int i) {
  vec<K> v;
  __builtin_memcpy(&v, (const char*)row + i * sizeof(K), sizeof v);
  return v;
}
template <class V> TCPU_INLINE void store(void* row, int i, V v) {
  __builtin_memcpy((char*)row + i * sizeof(v[0]), &v, sizeof v);
}

// Its own inverse, up to the order in which the two steps come.
template <Order ORDER, class K> TCPU_INLINE vec<K> reorder(vec<K> v) {
  if constexpr (ORDER == Order::as_unsigned) return v ^ K(~LARGEST<K>);
  if constexpr (ORDER == Order::sign_magnitude) {
    return v ^ ((v >> K(8 * sizeof(K) - 1)) & LARGEST<K>);
  }
  return v;
}
template <class T, bool DESCENDING> TCPU_INLINE void encode(const void* from, void* to, int n) {
  for (int i = 0; i < n; i += LANES<key<T>>) {
    const auto v = reorder<order_of((const T*)nullptr), key<T>>(load<key<T>>(from, i));
    store(to, i, DESCENDING ? ~v : v);
  }
}
template <class T, bool DESCENDING> TCPU_INLINE void decode(void* row, int n) {
  for (int i = 0; i < n; i += LANES<key<T>>) {
    const auto v = load<key<T>>(row, i);
    store(row, i, reorder<order_of((const T*)nullptr), key<T>>(DESCENDING ? ~v : v));
  }
}

// ---- lanes of one vector

template <int... I> struct indices {};
template <int N, int... I> struct below : below<N - 1, N - 1, I...> {};
template <int... I> struct below<0, I...> { typedef indices<I...> type; };
template <class K> using lanes = typename below<LANES<K>>::type;

#ifdef __clang__
#define TCPU_SORT_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, (index)...)
#else
#define TCPU_SORT_SHUFFLE(a, b, index) __builtin_shuffle(a, b, vec<K>{K(index)...})
#endif

// Lane i becomes lane i ^ MASK.
template <class K, int MASK, int... I> TCPU_INLINE vec<K> swapped(vec<K> v, indices<I...>) {
  return TCPU_SORT_SHUFFLE(v, v, I ^ MASK);
}
// Lane i of a where bit BIT of i is clear, of b where it is set.
template <class K, int BIT, int... I> TCPU_INLINE vec<K> blend(vec<K> a, vec<K> b, indices<I...>) {
  return TCPU_SORT_SHUFFLE(a, b, I & BIT ? I + int(sizeof...(I)) : I);
}

#undef TCPU_SORT_SHUFFLE

template <class V> TCPU_INLINE V smaller(V a, V b) { return a < b ? a : b; }
template <class V> TCPU_INLINE V larger(V a, V b) { return a < b ? b : a; }
template <class K> TCPU_INLINE vec<K> reversed(vec<K> v) {
  return swapped<K, LANES<K> - 1>(v, lanes<K>());
}

// Compare lanes i and i ^ MASK; the larger goes where BIT, the highest bit of MASK, is set.
template <class K, int MASK, int BIT> TCPU_INLINE vec<K> exchange(vec<K> v) {
  const vec<K> w = swapped<K, MASK>(v, lanes<K>());
  return blend<K, BIT>(smaller(v, w), larger(v, w), lanes<K>());
}
// Sort groups of 2 * BIT lanes, each of them bitonic.
template <class K, int BIT = LANES<K> / 2> TCPU_INLINE vec<K> clean_lanes(vec<K> v) {
  if constexpr (BIT == 0) return v;
  else return clean_lanes<K, BIT / 2>(exchange<K, BIT, BIT>(v));
}
// Sort groups of SIZE lanes.
template <class K, int SIZE = LANES<K>> TCPU_INLINE vec<K> sort_lanes(vec<K> v) {
  if constexpr (SIZE == 1) return v;
  else {
    v = exchange<K, SIZE - 1, SIZE / 2>(sort_lanes<K, SIZE / 2>(v));
    return clean_lanes<K, SIZE / 4>(v);
  }
}

// ---- rows of n keys, at least one vector; all lengths are powers of two

// Sort groups of `group` keys, each of them bitonic.
template <class K> __attribute__((noinline)) static void clean(void* row, int n, int group) {
  for (int distance = group / 2; distance >= LANES<K>; distance /= 2) {
    for (int start = 0; start < n; start += 2 * distance) {
      for (int i = start; i < start + distance; i += LANES<K>) {
        const vec<K> a = load<K>(row, i), b = load<K>(row, i + distance);
        store(row, i, smaller(a, b));
        store(row, i + distance, larger(a, b));
      }
    }
  }
  for (int i = 0; i < n; i += LANES<K>) store(row, i, clean_lanes<K>(load<K>(row, i)));
}

// Merge the two sorted halves of a row.
template <class K> __attribute__((noinline)) static void merge(void* row, int n) {
  for (int i = 0, j = n - LANES<K>; i < j; i += LANES<K>, j -= LANES<K>) {
    const vec<K> a = load<K>(row, i), b = reversed<K>(load<K>(row, j));
    store(row, i, smaller(a, b));
    store(row, j, reversed<K>(larger(a, b)));
  }
  clean<K>(row, n, n / 2);
}

template <class K> __attribute__((noinline)) static void sort_keys(void* row, int n) {
  for (int i = 0; i < n; i += LANES<K>) store(row, i, sort_lanes<K>(load<K>(row, i)));
  for (int size = 2 * LANES<K>; size <= n; size *= 2) {
    for (int start = 0; start < n; start += size) merge<K>((K*)row + start, size);
  }
}

// Of the values of two sorted rows keep the smaller half, sorted, in the first row.
template <class K> TCPU_INLINE void keep_smaller(void* row, const void* other, int n) {
  for (int i = 0; i < n; i += LANES<K>) {
    store(row, i, smaller(load<K>(row, i), reversed<K>(load<K>(other, n - LANES<K> - i))));
  }
  clean<K>(row, n, n);
}

// A row of less than one vector, filled up with keys that come last.
template <class T, bool DESCENDING, int N> TCPU_INLINE vec<key<T>> sorted_short(const void* row) {
  typedef key<T> K;
  K x[LANES<K>];
  for (int i = 0; i < LANES<K>; ++i) x[i] = LARGEST<K>;
  decode<T, DESCENDING>(x, LANES<K>);
  __builtin_memcpy(x, row, N * sizeof(T));
  encode<T, DESCENDING>(x, x, LANES<K>);
  store(x, 0, sort_lanes<K>(load<K>(x, 0)));
  decode<T, DESCENDING>(x, LANES<K>);
  return load<K>(x, 0);
}

// ---- rows of elements

template <class T, bool DESCENDING, int N> TCPU_INLINE void sort_elements(void* x) {
  typedef key<T> K;
  if constexpr (N < LANES<K>) {
    const vec<K> v = sorted_short<T, DESCENDING, N>(x);
    __builtin_memcpy(x, &v, N * sizeof(T));
  } else {
    encode<T, DESCENDING>(x, x, N);
    sort_keys<K>(x, N);
    decode<T, DESCENDING>(x, N);
  }
}

template <class T, bool DESCENDING, int N, int TAKEN>
TCPU_INLINE void first_elements(const void* x, void* out) {
  typedef key<T> K;
  if constexpr (N < LANES<K>) {
    const vec<K> v = sorted_short<T, DESCENDING, N>(x);
    __builtin_memcpy(out, &v, TAKEN * sizeof(T));
  } else {
    constexpr int CHUNK = TAKEN < LANES<K> ? LANES<K> : TAKEN;
    alignas(VECTOR_BYTES) K best[CHUNK], next[CHUNK];
    encode<T, DESCENDING>(x, best, CHUNK);
    sort_keys<K>(best, CHUNK);
    for (int i = CHUNK; i < N; i += CHUNK) {
      encode<T, DESCENDING>((const char*)x + i * sizeof(T), next, CHUNK);
      sort_keys<K>(next, CHUNK);
      keep_smaller<K>(best, next, CHUNK);
    }
    decode<T, DESCENDING>(best, CHUNK);
    __builtin_memcpy(out, best, TAKEN * sizeof(T));
  }
}

}  // namespace sorting

// Sort x[N] in place; N is a power of two.
template <class T, bool DESCENDING, int N> static void sort_row(T* x) {
  static_assert(N > 0 && (N & (N - 1)) == 0, "N: expected a power of two");
  sorting::sort_elements<T, DESCENDING, N>(x);
}

// The first K values of sorted x[N]; both are powers of two. Needs the stack of 2 K elements.
template <class T, bool DESCENDING, int N, int K> static void topk_row(const T* x, T* out) {
  static_assert(N > 0 && (N & (N - 1)) == 0, "N: expected a power of two");
  static_assert(K > 0 && K <= N && (K & (K - 1)) == 0, "K: expected a power of two up to N");
  sorting::first_elements<T, DESCENDING, N, K>(x, out);
}

}  // namespace tcpu
