// y = x w^T for weights in int8, GROUP columns to a scale. Within a group the products are of integers: a row of x is
// rounded to int16 there, by a power of two, so that what is within 2^-7 of its largest stays what it was as bfloat16.
// Sums of a group are exact, and those over groups run in their order: a row's results do not depend on how many rows
// there are. Compiled at start by int8.py.
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include "team.h"

typedef uint16_t bf16;
enum { LANES = 8, VECS = PANEL / LANES, MOST = 6, PAIRS = GROUP / 2 }; // MOST: as in product.c
typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), may_alias));
typedef int16_t pairs __attribute__((vector_size(4 * LANES), may_alias)); // two columns of LANES outputs
typedef int8_t bytes __attribute__((vector_size(2 * LANES), aligned(1), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline float real(uint32_t bits) {
  union { uint32_t bits; float real; } at = {bits};
  return at.real;
}

static inline bf16 rounded(float x) { // to nearest, ties to even, as torch does
  union { float real; uint32_t bits; } at = {x};
  return (bf16)((at.bits + 0x7fff + ((at.bits >> 16) & 1)) >> 16);
}

static inline pairs widened(const int8_t *at) {
#ifdef __AVX2__
  return (pairs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)at)); // gcc makes three of what is written below
#else
  return __builtin_convertvector(*(const bytes *)at, pairs);
#endif
}

static inline ints add_products(ints sums, pairs w, ints x) { // x: one pair, LANES times
#ifdef __AVX2__
  return sums + (ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#else
  const ints both = (ints)w;
  return sums + (both << 16 >> 16) * (x << 16 >> 16) + (both >> 16) * (x >> 16);
#endif
}

// R rows of x by P panels of w; x_scales [R, groups], w_scales [P, groups, PANEL] in bfloat16.
static inline __attribute__((always_inline)) void tile(const int R, const int P, const int16_t *x,
                                                       const float *x_scales, const int8_t *w, const bf16 *w_scales,
                                                       bf16 *out, int64_t groups, int64_t n_out, int64_t first) {
  enum { MOST_VECS = 4 * VECS };
  const int V = P * VECS;
  vec sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = (vec){};
  for (int64_t g = 0; g < groups; g++) {
    ints part[R][V]; // at most 2 * 127 * 2^15 in each of PAIRS steps: 2^27
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) part[r][v] = (ints){};
    for (int k = 0; k < PAIRS; k++) {
      pairs column[MOST_VECS];
      for (int v = 0; v < V; v++) {
        const int8_t *at = w + ((v / VECS * groups + g) * PAIRS + k) * PANEL * 2 + v % VECS * LANES * 2;
        column[v] = widened(at);
      }
      for (int r = 0; r < R; r++) {
        int32_t pair;
        memcpy(&pair, x + (r * groups + g) * GROUP + 2 * k, sizeof pair);
        for (int v = 0; v < V; v++) part[r][v] = add_products(part[r][v], column[v], pair - (ints){});
      }
    }
    for (int v = 0; v < V; v++) {
      const bf16 *at = w_scales + (v / VECS * groups + g) * PANEL + v % VECS * LANES;
      const vec scale = (vec)(__builtin_convertvector(*(const halves *)at, ints) << 16);
      for (int r = 0; r < R; r++)
        sums[r][v] += __builtin_convertvector(part[r][v], vec) * (scale * x_scales[r * groups + g]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < P * PANEL && first + i < n_out; i++)
      out[r * n_out + first + i] = rounded(sums[r][i / LANES][i % LANES]);
}

// Few rows by several panels at once, so that a sum does not wait for itself; how many it were.
static int64_t few(int rows, int64_t left, const int16_t *x, const float *x_scales, const int8_t *w,
                   const bf16 *w_scales, bf16 *out, int64_t groups, int64_t n_out, int64_t first) {
#define TILE(R, P) return tile(R, P, x, x_scales, w, w_scales, out, groups, n_out, first), P
  switch (rows) {
  case 1:
    if (left >= 4) TILE(1, 4);
    TILE(1, 1);
  case 2:
    if (left >= 2) TILE(2, 2);
    TILE(2, 1);
  case 3: TILE(3, 1);
  case 4: TILE(4, 1);
  case 5: TILE(5, 1);
  default: TILE(6, 1);
  }
}

// GROUP columns of a row to int16: the largest in size becomes 2^14 or more. One that is no number makes the row none.
static void to_int16(const bf16 *x, int count, int16_t *whole, float *scale) {
  bf16 padded[GROUP] = {0};
  memcpy(padded, x, count * sizeof(bf16));
  bf16 most = 0;
  for (int k = 0; k < GROUP; k++) {
    const bf16 size = padded[k] & 0x7fff;
    most = size > most ? size : most;
  }
  const uint32_t exponent = most >> 7, down = 14; // below 2^-112 it is as good as nothing
  const int counts = exponent > down && exponent < 255;
  const float up = counts ? real((2 * 127 + down - exponent) << 23) : 0.0f;
  *scale = counts ? real((exponent - down) << 23) : exponent == 255 ? __builtin_nanf("") : 0.0f;
  for (int k = 0; k < GROUP; k++) { // the addend puts the nearest integer into the lowest bits
    union { float real; uint32_t bits; } at = {counts ? real((uint32_t)padded[k] << 16) * up + 12582912.0f : 0.0f};
    whole[k] = (int16_t)at.bits;
  }
}

// Rows [row, last) of x [rows, n_in] as integers to room, before anybody's product: scales [rows, groups], then whole
// numbers [rows, groups, GROUP].
void prepare(const bf16 *x, float *room, int64_t rows, int64_t n_in, int64_t row, int64_t last) {
  const int64_t groups = (n_in + GROUP - 1) / GROUP;
  int16_t *whole = (int16_t *)(room + rows * groups);
  for (int64_t i = row * groups; i < last * groups; i++) {
    const int64_t at = i % groups * GROUP;
    const int count = n_in - at < GROUP ? (int)(n_in - at) : GROUP;
    to_int16(x + i / groups * n_in + at, count, whole + i * GROUP, room + i);
  }
}

int64_t grain(int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; } // panels of a tile: few

// The outputs of panels [panel, last): w [panels, groups, PAIRS, PANEL, 2], w_scales [panels, groups, PANEL],
// out [rows, n_out].
void product(const bf16 *x, const float *room, const int8_t *w, const bf16 *w_scales, bf16 *out, int64_t rows,
             int64_t n_in, int64_t n_out, int64_t panel, int64_t last) {
  const int64_t tiles = (rows + MOST - 1) / MOST;
  const int64_t groups = (n_in + GROUP - 1) / GROUP;
  const int16_t *whole = (const int16_t *)(room + rows * groups);
  for (int64_t done; panel < last; panel += done)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      done = few((int)count, tiles > 1 ? 1 : last - panel, whole + row * groups * GROUP, room + row * groups,
                 w + panel * groups * GROUP * PANEL, w_scales + panel * groups * PANEL, out + row * n_out, groups, n_out,
                 panel * PANEL);
    }
}

void multiply(const bf16 *x, float *room, const int8_t *w, const bf16 *w_scales, bf16 *out, int64_t rows, int64_t n_in,
              int64_t n_out) {
  if (rows < 1) return;
  MEETING(place);
#pragma omp parallel
  {
    struct team team = JOIN(place);
    TAKE(some, rows, 1, &team) prepare(x, room, rows, n_in, some.begin, some.end);
    meet(&team);
    TAKE(some, (n_out + PANEL - 1) / PANEL, grain(rows), &team)
      product(x, room, w, w_scales, out, rows, n_in, n_out, some.begin, some.end);
  }
}
