// y = x w^T for bfloat16 on processors that multiply it, two columns of sixteen outputs to an instruction (AVX512-BF16).
// A row's results do not depend on how many rows there are: every sum runs over the columns in their order. Compiled at
// start by product.py.
#include <immintrin.h>
#include <stdint.h>
#include "team.h"

typedef uint16_t bf16;
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
enum { MOST = 6, WIDEST = 8, SUMS = 24 }; // rows and panels of a tile; sums of a tile that has others beside it
enum { AHEAD = 16, CHUNK = 48, FEW = 4 }; // pairs of columns: fetched ahead, and by one tile after the other; such tiles

static inline void store(bf16 *at, __m512 x, int64_t count) { // to nearest, ties to even, as torch does
  const words bits = (words)x;
  const halves out = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
  if (count >= PANEL) *(halves *)at = out;
  else for (int64_t i = 0; i < count; i++) at[i] = out[i];
}

// Pairs of columns [from, to) of all. Lines of so many panels are fetched meanwhile, each as far on as ahead is from w.
struct part { int64_t pairs, from, to, lines; const uint32_t *ahead; };
typedef void tile(const bf16 *x, const uint32_t *w, __m512 *kept, bf16 *out, int64_t n_out, int64_t first,
                  struct part part);

// R rows of x by P panels of w. The sums are held in registers, which is why each shape is a function of its own, and in
// kept from one part to the next.
#define UNROLL _Pragma("GCC unroll 16")
#define TILE(NAME, ALL, R, P)                                                                                          \
  static void NAME##_##R##_##P(const bf16 *x, const uint32_t *w, __m512 *kept, bf16 *out, int64_t n_out, int64_t first, \
                               struct part part) {                                                                      \
    const int64_t pairs = part.pairs;                                                                                   \
    const uint32_t *pair = (const uint32_t *)x;                                                                         \
    __m512 sums[R][P];                                                                                                  \
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)                                               \
      sums[r][p] = part.from ? kept[r * P + p] : _mm512_setzero_ps();                                                   \
    for (int64_t k = part.from; k < part.to; k++) {                                                                     \
      __m512bh column[P];                                                                                               \
      UNROLL for (int p = 0; p < P; p++) {                                                                              \
        column[p] = (__m512bh)_mm512_loadu_si512(w + (p * pairs + k) * PANEL);                                          \
        if (ALL) _mm_prefetch((const char *)(part.ahead + (p * pairs + k) * PANEL), _MM_HINT_T0);                       \
      }                                                                                                                 \
      if (!ALL)                                                                                                         \
        for (int64_t l = 0; l < part.lines; l++)                                                                        \
          _mm_prefetch((const char *)(part.ahead + (l * pairs + k) * PANEL), _MM_HINT_T0);                              \
      UNROLL for (int r = 0; r < R; r++) {                                                                              \
        const __m512bh both = (__m512bh)_mm512_set1_epi32((int)pair[r * pairs + k]);                                    \
        UNROLL for (int p = 0; p < P; p++) sums[r][p] = _mm512_dpbf16_ps(sums[r][p], both, column[p]);                  \
      }                                                                                                                 \
    }                                                                                                                   \
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)                                               \
      if (part.to < pairs) kept[r * P + p] = sums[r][p];                                                                \
      else store(out + r * n_out + first + p * PANEL, sums[r][p], n_out - first - p * PANEL);                           \
  }

// The tile of so many rows, and of as many panels as the largest tile beside it, or of two or one.
#define TILES(NAME, ALL)                                                                                               \
  TILE(NAME, ALL, 1, 8) TILE(NAME, ALL, 2, 8) TILE(NAME, ALL, 3, 6) TILE(NAME, ALL, 4, 6)                       \
  TILE(NAME, ALL, 4, 4) TILE(NAME, ALL, 5, 4) TILE(NAME, ALL, 6, 4)                                               \
  TILE(NAME, ALL, 1, 2) TILE(NAME, ALL, 2, 2) TILE(NAME, ALL, 3, 2)                                               \
  TILE(NAME, ALL, 4, 2) TILE(NAME, ALL, 5, 2) TILE(NAME, ALL, 6, 2)                                               \
  TILE(NAME, ALL, 1, 1) TILE(NAME, ALL, 2, 1) TILE(NAME, ALL, 3, 1)                                               \
  TILE(NAME, ALL, 4, 1) TILE(NAME, ALL, 5, 1) TILE(NAME, ALL, 6, 1)                                               \
  static tile *NAME(int64_t rows, int64_t panels) {                                                                     \
    static tile *const one[] = {0, NAME##_1_1, NAME##_2_1, NAME##_3_1, NAME##_4_1, NAME##_5_1, NAME##_6_1};             \
    static tile *const two[] = {0, NAME##_1_2, NAME##_2_2, NAME##_3_2, NAME##_4_2, NAME##_5_2, NAME##_6_2};             \
    static tile *const broad[] = {0, NAME##_1_8, NAME##_2_8, NAME##_3_6, NAME##_4_6, NAME##_5_4, NAME##_6_4};           \
    if (panels == 1) return one[rows];                                                                                  \
    if (panels == 2) return two[rows];                                                                                  \
    return rows == 4 && panels == 4 ? NAME##_4_4 : broad[rows];                                                         \
  }
TILES(alone, 1) // the only rows fetch all that there is to fetch
TILES(among, 0) // one of several tiles of rows, which share it

// The panels of a tile where there are so many rows, rows >= 1, which a thread takes together.
int64_t grain(int64_t rows) {
  const int64_t tiles = (rows + MOST - 1) / MOST, most = (rows + tiles - 1) / tiles;
  return most > 4 ? 4 : most > 2 ? 6 : WIDEST;
}

// The outputs of panels [panel, last): x [rows, n_in], w [panels, n_in / 2, PANEL], out [rows, n_out]. Neither room nor
// scales are needed.
//
// Of several tiles of rows only the first would wait for memory, and the others leave it idle. So, where they are few,
// they take turns over a chunk of the columns, which stays in the nearest cache, while the next one comes.
void product(const bf16 *x, const void *room, const uint32_t *w, const void *scales, bf16 *out, int64_t rows,
             int64_t n_in, int64_t n_out, int64_t panel, int64_t last) {
  const int64_t tiles = (rows + MOST - 1) / MOST, broad = grain(rows), pairs = n_in / 2;
  const int64_t chunk = tiles > 1 && tiles <= FEW ? CHUNK : pairs, ahead = tiles > 1 ? chunk : AHEAD;
  __m512 kept[FEW][SUMS];
  for (int64_t done; panel < last; panel += done) {
    done = broad <= last - panel ? broad : last - panel > 1 ? 2 : 1;
    const uint32_t *here = w + panel * pairs * PANEL;
    const int64_t lines = (done + tiles - 1) / tiles;
    for (int64_t from = 0; from < pairs; from += chunk)
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = rows * t / tiles, count = rows * (t + 1) / tiles - row;
        const int64_t to = from + chunk < pairs ? from + chunk : pairs;
        // After the last chunk of these panels comes the first of the panels behind them.
        const int64_t next = tiles > 1 && to == pairs ? done * pairs - from : ahead;
        const struct part part = {pairs, from, to, t * lines < done ? lines : 0, here + (t * lines * pairs + next) * PANEL};
        (tiles > 1 ? among : alone)(count, done)(x + row * n_in, here, kept[t % FEW], out + row * n_out, n_out,
                                                 panel * PANEL, part);
      }
  }
}

void multiply(const bf16 *x, void *room, const uint32_t *w, const void *scales, bf16 *out, int64_t rows, int64_t n_in,
              int64_t n_out) {
  if (rows < 1) return;
  MEETING(place);
#pragma omp parallel
  {
    struct team team = JOIN(place);
    TAKE(some, (n_out + PANEL - 1) / PANEL, grain(rows), &team)
      product(x, room, w, scales, out, rows, n_in, n_out, some.begin, some.end);
  }
}
