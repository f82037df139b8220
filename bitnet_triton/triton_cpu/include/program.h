// A kernel's grid, what a program keeps between runs, and what it tells its user.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include "types.h"

extern "C" {
int omp_get_thread_num();  // the header of that name comes with some compilers only
int __cxa_thread_atexit_impl(void (*)(void*), void*, void*);  // of glibc; called as a thread ends
extern void* __dso_handle __attribute__((visibility("hidden")));
}

namespace tcpu {

// ---- integers that a GPU defines and C++ does not ----------------------------------------------

template <class T> TCPU_INLINE T div_signed(T a, T b) {
  // Lanes that are masked off divide by whatever is there: no trap, as on a GPU
  if (b == 0) return 0;
  return b == T(-1) ? T(0 - uint64_t(a)) : T(a / b);
}
template <class T> TCPU_INLINE T rem_signed(T a, T b) { return b == 0 || b == T(-1) ? T(0) : T(a % b); }
template <class T> struct unsigned_of { using type = T; };
template <> struct unsigned_of<int8_t> { using type = uint8_t; };
template <> struct unsigned_of<int16_t> { using type = uint16_t; };
template <> struct unsigned_of<int32_t> { using type = uint32_t; };
template <> struct unsigned_of<int64_t> { using type = uint64_t; };
template <class T> using unsigned_t = typename unsigned_of<T>::type;
template <class T> TCPU_INLINE T div_unsigned(T a, T b) {
  return b == 0 ? T(0) : T(unsigned_t<T>(a) / unsigned_t<T>(b));
}
template <class T> TCPU_INLINE T rem_unsigned(T a, T b) {
  return b == 0 ? T(0) : T(unsigned_t<T>(a) % unsigned_t<T>(b));
}
template <int N> struct bits_of_size;
template <> struct bits_of_size<1> { using type = uint8_t; };
template <> struct bits_of_size<2> { using type = uint16_t; };
template <> struct bits_of_size<4> { using type = uint32_t; };
template <class T> TCPU_INLINE T floordiv_signed(T a, T b) {
  return T(div_signed(a, b) - (rem_signed(a, b) != 0 && (a < 0) != (b < 0)));
}
template <class T> TCPU_INLINE T ceildiv_signed(T a, T b) {
  return T(div_signed(a, b) + (rem_signed(a, b) != 0 && (a < 0) == (b < 0)));
}
// Shifting by the width or more gives what shifting bit by bit would
template <class T> TCPU_INLINE T shift_left(T a, T b) {
  return unsigned_t<T>(b) >= sizeof(T) * 8 ? T(0) : T(uint64_t(a) << b);
}
template <class T> TCPU_INLINE T shift_right_unsigned(T a, T b) {
  return unsigned_t<T>(b) >= sizeof(T) * 8 ? T(0) : T(unsigned_t<T>(a) >> b);
}
template <class T> TCPU_INLINE T shift_right_signed(T a, T b) {
  return T(a >> (unsigned_t<T>(b) >= sizeof(T) * 8 ? T(sizeof(T) * 8 - 1) : b));
}
TCPU_INLINE bool shift_left(bool a, bool b) { return a && !b; }
TCPU_INLINE bool shift_right_unsigned(bool a, bool b) { return a && !b; }
TCPU_INLINE bool shift_right_signed(bool a, bool) { return a; }
template <class T> TCPU_INLINE T m_fmod(T a, T b) { return sizeof(T) == 4 ? T(__builtin_fmodf(float(a), float(b))) : T(__builtin_fmod(a, b)); }

// ---- rounding towards zero: what lies beyond the number is one step too far ---------------------

template <class T> TCPU_INLINE T truncate_to(float x) {
  T y = T(x);
  const bool too_far = __builtin_fabsf(float(y)) > __builtin_fabsf(x);
  using bits = typename bits_of_size<sizeof(T)>::type;
  return too_far ? bitcast<T>(bits(bitcast<bits>(y) - 1)) : y;
}

// ---- microscaled blocks ------------------------------------------------------------------------

// One half of a byte: sign, two bits of exponent, one of mantissa
TCPU_INLINE float e2m1(int8_t byte, int high) {
  const int bits = (uint8_t(byte) >> (high * 4)) & 15, exponent = (bits >> 1) & 3, mantissa = bits & 1;
  const float magnitude = exponent == 0 ? 0.5f * mantissa : (1.0f + 0.5f * mantissa) * float(1 << exponent) * 0.5f;
  return bits & 8 ? -magnitude : magnitude;
}
// A power of two, by its exponent: 0 is the denormal 2**-127, 255 is NaN
TCPU_INLINE float e8m0(int8_t byte) {
  const uint32_t exponent = uint8_t(byte);
  if (exponent == 255) return __builtin_nanf("");
  return bitcast<float>(exponent == 0 ? 0x400000u : exponent << 23);
}

// ---- what a program tells its user -------------------------------------------------------------

struct Failure { int happened; char text[1024]; };
// Of the launch that a thread works for, and of the last one that a thread has made: several threads
// may launch one kernel at once
static thread_local Failure* current_failure;
static thread_local char last_message[sizeof Failure::text];

// Keeps the first failure of a launch: the others follow from it, or say the same
static __attribute__((noinline, cold)) void fail(const char* text, int x, int y, int z) {
  Failure& failure = *current_failure;
  if (__atomic_exchange_n(&failure.happened, 1, __ATOMIC_ACQ_REL)) return;
  snprintf(failure.text, sizeof failure.text, "%s (program %d, %d, %d)", text, x, y, z);
}

static __attribute__((unused, noinline)) void print_text(const char* prefix, int x, int y, int z) {
  printf("pid (%d, %d, %d)%s\n", x, y, z, prefix);
}

TCPU_INLINE void format_value(char* out, int size, double v, bool, bool) { snprintf(out, size, "%f", v); }
TCPU_INLINE void format_value(char* out, int size, float v, bool hex, bool s) { format_value(out, size, double(v), hex, s); }
template <class T> TCPU_INLINE void format_value(char* out, int size, T* v, bool, bool) { snprintf(out, size, "%p", (const void*)v); }
template <class T> TCPU_INLINE void format_value(char* out, int size, T v, bool hex, bool is_signed) {
  if constexpr (__is_class(T)) snprintf(out, size, "%f", double(float(v)));
  else if (hex) snprintf(out, size, "0x%0*llx", int(sizeof(T) * 2), (unsigned long long)unsigned_t<T>(v));
  else if (is_signed) snprintf(out, size, "%lld", (long long)v);
  else snprintf(out, size, "%llu", (unsigned long long)unsigned_t<T>(v));
}

// `prefix` ends with the number of the operand where there are several; `width`: digits of an index
template <class T>
static __attribute__((noinline)) void print_value(const char* prefix, int x, int y, int z, const int* index,
                                                  const int* width, int rank, T value, bool hex, bool is_signed) {
  char places[96] = "", text[64];
  int at = 0;
  for (int d = 0; d < rank; ++d)
    at += snprintf(places + at, sizeof places - at, "%s%*d", d ? ", " : "", width[d], index[d]);
  format_value(text, sizeof text, value, hex, is_signed);
  printf("pid (%d, %d, %d) idx (%s)%s%s\n", x, y, z, places, prefix, text);
}

// ---- the grid ----------------------------------------------------------------------------------

// Memory for arrays that are too large for a stack; a thread keeps it for the next launch. No destructor:
// for one the compiler calls C++'s library, which costs each kernel more to link than all else.
struct Arena {
  char* memory;
  long size;
  static void release(void* arena) {
    free(((Arena*)arena)->memory);
    *(Arena*)arena = {};
  }
  char* reserve(long wanted) {
    if (wanted > size) {
      if (memory) free(memory);
      else __cxa_thread_atexit_impl(release, this, &__dso_handle);
      memory = (char*)aligned_alloc(64, (wanted + 63) / 64 * 64);
      size = memory ? wanted : 0;
    }
    return memory;
  }
};
static thread_local Arena thread_arena;

// Neighbouring programs, for one thread. They read neighbouring memory, and fetch early what comes next.
struct alignas(64) Share {
  long next, end;
  template <class F> TCPU_METHOD void take(long chunk, F run) {
    for (long first; (first = __atomic_fetch_add(&next, chunk, __ATOMIC_RELAXED)) < end;)
      for (long p = first; p < end && p < first + chunk; ++p) run(p);
  }
};

// A thread that is through with its share goes on with those of the others.
template <class F> TCPU_INLINE void run_shares(Share* shares, int count, long total, F run) {
  const long chunk = total > 64L * count ? total / (16L * count) : 1;
  for (int i = 0, at = omp_get_thread_num() % count; i < count; ++i, at = at + 1 < count ? at + 1 : 0)
    shares[at].take(chunk, run);
}

// WAIT: programs may wait for earlier ones, so they are begun in their order.
template <long ARENA, bool WAIT, class F>
static int run_grid(int nx, int ny, int nz, int threads, F program) {
  constexpr int most = 64;
  const long total = long(nx) * ny * nz;
  const int count = WAIT || threads < 1 ? 1 : threads < most ? threads : most;
  Share shares[most];
  for (int i = 0; i < count; ++i) shares[i] = {total * i / count, total * (i + 1) / count};
  Failure failure = {0, ""};
#pragma omp parallel num_threads(threads) if (threads > 1 && total > 1)
  {
    current_failure = &failure;
    char* arena = nullptr;
    if constexpr (ARENA > 0) {
      arena = thread_arena.reserve(ARENA);
      if (!arena) fail("out of memory", 0, 0, 0);
    }
    auto run = [&](long p) TCPU_ALWAYS { program(arena, int(p % nx), int(p / nx % ny), int(p / nx / ny)); };
    if (ARENA == 0 || arena) {
      if constexpr (WAIT) shares[0].take(1, run);
      else run_shares(shares, count, total, run);
    }
  }
  if (failure.happened) memcpy(last_message, failure.text, sizeof last_message);
  return failure.happened;
}

// A launch that was recorded
struct Step { int (*run)(int, int, int, int, const void*); int grid[3]; const void* arguments; };

}  // namespace tcpu

// Returns the number of the launch that failed, counted from 1; 0 if none did
extern "C" __attribute__((used)) long tcpu_replay(const tcpu::Step* steps, int count, int threads) {
  for (int i = 0; i < count; ++i)
    if (steps[i].run(steps[i].grid[0], steps[i].grid[1], steps[i].grid[2], threads, steps[i].arguments)) return i + 1;
  return 0;
}

extern "C" __attribute__((used)) const char* tcpu_message() { return tcpu::last_message; }
