// y = x w^T for bfloat16 on processors that do not multiply it: weights are read as the two bytes they are, and
// multiplied as floats. A row's results do not depend on how many rows there are: every sum runs over the columns in
// their order. Compiled at start by product.py.
#include <stdint.h>
#include "team.h"

typedef uint16_t bf16;
enum { LANES = 8, VECS = PANEL / LANES, MOST = 6 }; // MOST rows by two vectors of sums are what sixteen registers hold
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline bf16 rounded(float x) { // to nearest, ties to even, as torch does
  union { float real; uint32_t bits; } at = {x};
  return (bf16)((at.bits + 0x7fff + ((at.bits >> 16) & 1)) >> 16);
}

// One column of R rows times the same column of V vectors of outputs. What is looped over inside is held in registers.
static inline __attribute__((always_inline)) void column(const int R, const int V, vec sums[R][V], const float *x,
                                                         int64_t stride, const vec *w) {
  if (R > 3)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sums[r][v] += x[r * stride] * w[v];
  else
    for (int v = 0; v < V; v++)
      for (int r = 0; r < R; r++) sums[r][v] += x[r * stride] * w[v];
}

// R rows of x by P panels of w. A word holds two columns of one output: the even one below, the odd one above.
static inline __attribute__((always_inline)) void tile(const int R, const int P, const float *x, const uint32_t *w,
                                                       bf16 *out, int64_t n_in, int64_t n_out, int64_t first) {
  enum { MOST_VECS = 4 * VECS };
  const int V = P * VECS;
  vec sums[R][V], column_of_w[MOST_VECS];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sums[r][v] = (vec){};
  for (int64_t k = 0; k < n_in; k += 2, w += PANEL) {
    for (int odd = 0; odd < 2; odd++) {
      for (int v = 0; v < V; v++) {
        const words pair = *(const words *)(w + v / VECS * (n_in / 2) * PANEL + v % VECS * LANES);
        column_of_w[v] = odd ? (vec)(pair & 0xffff0000u) : (vec)(pair << 16);
      }
      column(R, V, sums, x + k + odd, n_in, column_of_w);
    }
  }
  for (int r = 0; r < R; r++)
    for (int64_t i = 0; i < P * PANEL && first + i < n_out; i++)
      out[r * n_out + first + i] = rounded(sums[r][i / LANES][i % LANES]);
}

// As many panels at once as keep the multipliers busy: about eight sums, each of which waits for itself.
static int64_t few(int rows, int64_t left, const float *x, const uint32_t *w, bf16 *out, int64_t n_in, int64_t n_out,
                   int64_t first) {
#define TILE(R, P) return tile(R, P, x, w, out, n_in, n_out, first), P
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

// Rows [row, last) of x [rows, n_in] as floats to wide, before anybody's product.
void prepare(const bf16 *x, float *wide, int64_t rows, int64_t n_in, int64_t row, int64_t last) {
  for (int64_t i = row * n_in; i < last * n_in; i++) {
    union { uint32_t bits; float real; } at = {(uint32_t)x[i] << 16};
    wide[i] = at.real;
  }
}

int64_t grain(int64_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; } // panels of a tile: few

// The outputs of panels [panel, last): w [panels, n_in / 2, PANEL], out [rows, n_out]. There are no scales.
void product(const bf16 *x, const float *wide, const uint32_t *w, const void *scales, bf16 *out, int64_t rows,
             int64_t n_in, int64_t n_out, int64_t panel, int64_t last) {
  const int64_t tiles = (rows + MOST - 1) / MOST;
  for (int64_t done; panel < last; panel += done)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      done = few((int)count, tiles > 1 ? 1 : last - panel, wide + row * n_in, w + panel * n_in / 2 * PANEL,
                 out + row * n_out, n_in, n_out, panel * PANEL);
    }
}

void multiply(const bf16 *x, float *wide, const uint32_t *w, const void *scales, bf16 *out, int64_t rows, int64_t n_in,
              int64_t n_out) {
  if (rows < 1) return;
  MEETING(place);
#pragma omp parallel
  {
    struct team team = JOIN(place);
    TAKE(some, rows, 1, &team) prepare(x, wide, rows, n_in, some.begin, some.end);
    meet(&team);
    TAKE(some, (n_out + PANEL - 1) / PANEL, grain(rows), &team)
      product(x, wide, w, scales, out, rows, n_in, n_out, some.begin, some.end);
  }
}
