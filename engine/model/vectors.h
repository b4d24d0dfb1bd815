// Numbers in bfloat16 as floats, as many at once as the processor has room for.
#pragma once
#include <stdint.h>

#ifdef __AVX512F__
enum { LANES = 16 };
#define EACH_LANE(of, step) of(0, step), of(1, step), of(2, step), of(3, step), of(4, step), of(5, step), of(6, step), \
  of(7, step), of(8, step), of(9, step), of(10, step), of(11, step), of(12, step), of(13, step), of(14, step), of(15, step)
#else
enum { LANES = 8 };
#define EACH_LANE(of, step) of(0, step), of(1, step), of(2, step), of(3, step), of(4, step), of(5, step), of(6, step), \
  of(7, step)
#endif

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define UNROLL _Pragma("GCC unroll 16")
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define PICK(low, high, ...) __builtin_shufflevector(low, high, __VA_ARGS__)
#endif
#endif
#ifndef PICK // gcc before 12
#define PICK(low, high, ...) __builtin_shuffle(low, high, (words){__VA_ARGS__})
#endif

static inline vec wide(words low) { return (vec)(low << 16); }

static inline vec load(const bf16 *at) { return wide(__builtin_convertvector(*(const halves *)at, words)); }

static inline float alone(bf16 x) { return ((union { uint32_t bits; float value; }){(uint32_t)x << 16}).value; }

static inline words rounded(vec x) { // to nearest, ties to even, as torch does
  words bits = (words)x;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline void store(bf16 *at, vec x) { *(halves *)at = __builtin_convertvector(rounded(x), halves); }

static inline vec through_bf16(vec x) { return wide(rounded(x)); }

static inline vec all(float x) { return x - (vec){}; }

static inline vec larger(vec x, vec y) { // x where neither is
  const ints more = y > x;
  return (vec)(((ints)y & more) | ((ints)x & ~more));
}

#define SELF(lane, _) lane
#define FAR(lane, step) ((lane) ^ (step))
#define OTHER(x, step) ((vec)PICK((words)(x), (words)(x), EACH_LANE(FAR, step)))

static inline float sum(vec x) { // halves, quarters, and so on
#ifdef __AVX512F__
  x += OTHER(x, 8);
#endif
  x += OTHER(x, 4);
  x += OTHER(x, 2);
  return x[0] + x[1];
}

static inline float largest(vec x) {
#ifdef __AVX512F__
  x = larger(x, OTHER(x, 8));
#endif
  x = larger(x, OTHER(x, 4));
  x = larger(x, OTHER(x, 2));
  return x[0] > x[1] ? x[0] : x[1];
}

static inline vec exponential(vec x) { // Cephes: relative error under 2e-7; below -87 it is as good as nothing
  x = larger(x, all(-87.0f));
  x = -larger(-x, all(-88.0f));
  const vec shifted = x * 1.44269504f + 12582912.0f; // the nearest whole number, in the lowest bits
  const vec whole = shifted - 12582912.0f;
  vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vec)((ints)p + ((ints)shifted << 23));
}
