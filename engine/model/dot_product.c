// y = x w^T for bfloat16 on processors that multiply it, two columns of sixteen outputs to an instruction (AVX512-BF16).
// A row's results do not depend on how many rows there are: every sum runs over the columns in their order. Compiled at
// start by product.py.
#include <immintrin.h>
#include <stdint.h>
#include "threads.h"

typedef uint16_t bf16;
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
enum { MOST = 6, WIDEST = 8, AHEAD = 16 }; // rows and panels of a tile; columns that are fetched ahead, in pairs

static inline void store(bf16 *at, __m512 x, int64_t count) { // to nearest, ties to even, as torch does
  const words bits = (words)x;
  const halves out = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
  if (count >= PANEL) *(halves *)at = out;
  else for (int64_t i = 0; i < count; i++) at[i] = out[i];
}

// R rows of x by P panels of w; the sums are held in registers, which is why each shape is a function of its own.
#define UNROLL _Pragma("GCC unroll 16")
#define TILE(R, P)                                                                                                     \
  static void tile_##R##_##P(const bf16 *x, const uint32_t *w, bf16 *out, int64_t n_in, int64_t n_out, int64_t first) { \
    const int64_t pairs = n_in / 2;                                                                                     \
    const uint32_t *pair = (const uint32_t *)x;                                                                         \
    __m512 sums[R][P];                                                                                                  \
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sums[r][p] = _mm512_setzero_ps();             \
    for (int64_t k = 0; k < pairs; k++) {                                                                               \
      __m512bh column[P];                                                                                               \
      UNROLL for (int p = 0; p < P; p++) {                                                                              \
        column[p] = (__m512bh)_mm512_loadu_si512(w + (p * pairs + k) * PANEL);                                          \
        _mm_prefetch((const char *)(w + (p * pairs + k + AHEAD) * PANEL), _MM_HINT_T0);                                 \
      }                                                                                                                 \
      UNROLL for (int r = 0; r < R; r++) {                                                                              \
        const __m512bh both = (__m512bh)_mm512_set1_epi32((int)pair[r * pairs + k]);                                    \
        UNROLL for (int p = 0; p < P; p++) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], both, column[p]);                  \
      }                                                                                                                 \
    }                                                                                                                   \
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)                                               \
      store(out + r * n_out + first + p * PANEL, sums[r][p], n_out - first - p * PANEL);                                \
  }
TILE(1, 8) TILE(2, 8) TILE(3, 6) TILE(4, 6) TILE(4, 4) TILE(5, 4) TILE(6, 4)
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)

typedef void tile(const bf16 *x, const uint32_t *w, bf16 *out, int64_t n_in, int64_t n_out, int64_t first);

// The tile of so many rows, and of as many panels as the largest tile beside it, or of one.
static tile *tile_of(int64_t rows, int64_t panels) {
  static tile *const narrow[] = {0, tile_1_1, tile_2_1, tile_3_1, tile_4_1, tile_5_1, tile_6_1};
  static tile *const broad[] = {0, tile_1_8, tile_2_8, tile_3_6, tile_4_6, tile_5_4, tile_6_4};
  return panels == 1 ? narrow[rows] : rows == 4 && panels == 4 ? tile_4_4 : broad[rows];
}

// Thread me of all makes its share of the outputs: x [rows, n_in], w [panels, n_in / 2, PANEL], out [rows, n_out].
// Neither room nor scales are needed.
void product(const bf16 *x, const void *room, const uint32_t *w, const void *scales, bf16 *out, int64_t rows,
             int64_t n_in, int64_t n_out, int64_t me, int64_t all) {
  if (rows < 1) return;
  const int64_t panels = (n_out + PANEL - 1) / PANEL, tiles = (rows + MOST - 1) / MOST, last = panels * (me + 1) / all;
  const int64_t most = (rows + tiles - 1) / tiles, broad = most > 4 ? 4 : most > 2 ? 6 : WIDEST;
  for (int64_t panel = panels * me / all, done; panel < last; panel += done) {
    done = broad <= last - panel ? broad : 1;
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
      tile_of(count, done)(x + row * n_in, w + panel * n_in / 2 * PANEL, out + row * n_out, n_in, n_out, panel * PANEL);
    }
  }
}

void multiply(const bf16 *x, void *room, const uint32_t *w, const void *scales, bf16 *out, int64_t rows, int64_t n_in,
              int64_t n_out) {
#pragma omp parallel
  product(x, room, w, scales, out, rows, n_in, n_out, omp_get_thread_num(), omp_get_num_threads());
}
