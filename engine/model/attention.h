// Attention of tokens over the keys and values of their sequences, on a CPU, in tiles: tokens of one sequence that share
// what is made of their keys. A token's results depend on nothing but the token and its own keys and values.
#pragma once
#include <string.h>
#include "team.h"
#include "vectors.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum {
  SETS = 4, KEYS = SETS * LANES, // keys that are looked at together
  PIECES = HEAD_DIM / LANES, RUN = PIECES % 4 ? 2 : 4, // of a value, and how many of them are summed at a time
  TOGETHER = GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1, // heads: SETS or RUN sums each is what registers hold
  TILE = 8, // tokens of a tile at most
  LINE = 64 // bytes that come into the cache at once
};

// Products of a query with LANES keys at a time. Where the processor multiplies pairs in bfloat16 a word of the keys is
// two dimensions, elsewhere it is one, as a float.
#ifdef __AVX512BF16__
enum { PAIRED = 2 };
typedef bf16 query;
static inline vec scored(vec sum, const query *query, vec keys) {
  int pair;
  memcpy(&pair, query, sizeof pair);
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)keys);
}
static inline void ready(const bf16 *x, query *out) { memcpy(out, x, GROUP * HEAD_DIM * sizeof(bf16)); }
#else
enum { PAIRED = 1 };
typedef float query;
static inline vec scored(vec sum, const query *query, vec keys) { return sum + *query * keys; }
static inline void ready(const bf16 *x, query *out) {
  for (int i = 0; i < GROUP * HEAD_DIM; i += LANES) *(vec *)(out + i) = load(x + i);
}
#endif

// Two vectors become two others: of the lower or the upper words of each 16 bytes, in turn; of such pairs of words; of
// the even or the odd 16 bytes. All are patterns that processors have an instruction for.
#define LOW_WORDS(lane, _) ((lane) & 1 ? LANES : 0) + ((lane) & ~3) + ((lane) & 2) / 2
#define HIGH_WORDS(lane, _) LOW_WORDS(lane, _) + 2
#define LOW_PAIRS(lane, _) ((lane) & 2 ? LANES : 0) + ((lane) & ~2)
#define HIGH_PAIRS(lane, _) LOW_PAIRS(lane, _) + 2
#define EVEN_QUADS(lane, _) 2 * (lane) - ((lane) & 3)
#define ODD_QUADS(lane, _) EVEN_QUADS(lane, _) + 4
#define EXCHANGE(i, j, ONE, OTHER_ONE)                  \
  {                                                     \
    const words low = row[i], high = row[j];            \
    row[i] = PICK(low, high, EACH_LANE(ONE, 0));        \
    row[j] = PICK(low, high, EACH_LANE(OTHER_ONE, 0));  \
  }
#define COLUMN(i) (((i) & ~3) + ((i) & 1) * 2 + ((i) & 2) / 2) // which one of all rows the exchanges end with in row i

// KEYS keys from key on, of which count are there: out [HEAD_DIM / PAIRED, SETS], of LANES keys each.
static void turn_keys(const bf16 *key, int64_t stride, int count, vec *out) {
  for (int set = 0; set < SETS; set++)
    for (int first = 0; first < HEAD_DIM; first += 2 * LANES) {
      words row[LANES]; // two dimensions in a word
      UNROLL for (int k = 0; k < LANES; k++) {
        const int at = set * LANES + k < count ? set * LANES + k : count - 1;
        row[k] = *(const words *)(key + at * stride + first);
      }
      UNROLL for (int k = 0; k < LANES; k += 4) {
        EXCHANGE(k, k + 1, LOW_WORDS, HIGH_WORDS) EXCHANGE(k + 2, k + 3, LOW_WORDS, HIGH_WORDS)
        EXCHANGE(k, k + 2, LOW_PAIRS, HIGH_PAIRS) EXCHANGE(k + 1, k + 3, LOW_PAIRS, HIGH_PAIRS)
      }
      UNROLL for (int k = 0; k < 4; k++) {
        EXCHANGE(k, k + 4, EVEN_QUADS, ODD_QUADS)
#ifdef __AVX512F__
        EXCHANGE(k + 8, k + 12, EVEN_QUADS, ODD_QUADS)
        EXCHANGE(k, k + 8, EVEN_QUADS, ODD_QUADS) EXCHANGE(k + 4, k + 12, EVEN_QUADS, ODD_QUADS)
#endif
      }
      UNROLL for (int i = 0; i < LANES; i++) {
        vec *at = out + (first + 2 * COLUMN(i)) / PAIRED * SETS + set;
        *at = PAIRED == 2 ? (vec)row[i] : wide(row[i]);
        if (PAIRED == 1) at[SETS] = (vec)(row[i] & 0xffff0000u);
      }
    }
}

// Keys and values that come into the cache of this core while others are looked at: so many lines of each are missing,
// and so many of them come at a time.
struct ahead { const char *keys, *values; int64_t lines, each; };

static inline void fetch(struct ahead *ahead) {
  for (int64_t i = 0; i < ahead->each && ahead->lines > 0; i++, ahead->lines--) {
    __builtin_prefetch(ahead->keys), ahead->keys += LINE;
    __builtin_prefetch(ahead->values), ahead->values += LINE;
  }
}

struct seen { float most[GROUP], total[GROUP]; vec sums[GROUP][PIECES]; }; // of the keys so far, by one token

// TOGETHER heads of a token, from head g on, over a block of keys of which it sees count; the softmax is made up. The
// values are wide [count, PIECES] where others look at them as well, else they stand in the cache, from value on.
static inline __attribute__((always_inline)) void look(struct seen *seen, int g, const query *query, const vec *keys,
                                                       const vec *wide_values, const bf16 *value, int64_t stride,
                                                       int count, struct ahead *ahead) {
  const float scale = 1.0f / __builtin_sqrtf((float)HEAD_DIM);
  const ints lanes = {EACH_LANE(SELF, 0)};
  vec scores[TOGETHER][SETS];
  UNROLL for (int h = 0; h < TOGETHER; h++) UNROLL for (int s = 0; s < SETS; s++) scores[h][s] = (vec){};
  for (int d = 0; d < HEAD_DIM / PAIRED; d++) {
    fetch(ahead);
    UNROLL for (int h = 0; h < TOGETHER; h++)
      UNROLL for (int s = 0; s < SETS; s++)
        scores[h][s] = scored(scores[h][s], query + (g + h) * HEAD_DIM + d * PAIRED, keys[d * SETS + s]);
  }
  float weights[TOGETHER][KEYS];
  for (int h = 0; h < TOGETHER; h++) {
    vec top = all(seen->most[g + h]), mass = {};
    for (int s = 0; s < SETS; s++) {
      scores[h][s] *= scale;
      if (count < KEYS) {
        const ints there = lanes < count - s * LANES;
        scores[h][s] = (vec)(((ints)scores[h][s] & there) | ((ints)all(-__builtin_inff()) & ~there));
      }
      top = larger(top, scores[h][s]);
    }
    const float most = largest(top);
    for (int s = 0; s < SETS; s++) {
      const vec weight = exponential(scores[h][s] - most);
      *(vec *)(weights[h] + s * LANES) = weight;
      mass += weight;
    }
    const float keep = exponential(all(seen->most[g + h] - most))[0];
    seen->most[g + h] = most, seen->total[g + h] = seen->total[g + h] * keep + sum(mass);
    for (int i = 0; i < PIECES; i++) seen->sums[g + h][i] *= keep;
  }
  for (int first = 0; first < PIECES; first += RUN) {
    vec sums[TOGETHER][RUN];
    UNROLL for (int h = 0; h < TOGETHER; h++) UNROLL for (int i = 0; i < RUN; i++) sums[h][i] = seen->sums[g + h][first + i];
    for (int k = 0; k < count; k++) {
      if (k % 2) fetch(ahead);
      vec piece[RUN];
      UNROLL for (int i = 0; i < RUN; i++)
        piece[i] = wide_values ? wide_values[k * PIECES + first + i] : load(value + k * stride + (first + i) * LANES);
      UNROLL for (int h = 0; h < TOGETHER; h++)
        UNROLL for (int i = 0; i < RUN; i++) sums[h][i] += weights[h][k] * piece[i];
    }
    UNROLL for (int h = 0; h < TOGETHER; h++) UNROLL for (int i = 0; i < RUN; i++) seen->sums[g + h][first + i] = sums[h][i];
  }
}

// One kv head of n tokens that follow each other, the first at a position: qkv and out are theirs.
static void attend_tile(const bf16 *qkv, const bf16 *key, const bf16 *value, int64_t stride, int64_t position, int64_t n,
                        bf16 *out, struct ahead *ahead) {
  const int64_t width = (GROUP + 2) * stride, last = position + n - 1;
  struct seen seen[TILE];
  query queries[TILE][GROUP * HEAD_DIM];
  vec turned[HEAD_DIM / PAIRED * SETS], values[KEYS * PIECES];
  for (int64_t t = 0; t < n; t++) {
    for (int g = 0; g < GROUP; g++) seen[t].most[g] = -__builtin_inff(), seen[t].total[g] = 0;
    memset(seen[t].sums, 0, sizeof seen[t].sums);
    ready(qkv + t * width, queries[t]);
  }
  for (int64_t first = 0; first <= last; first += KEYS) {
    const int there = last - first + 1 < KEYS ? (int)(last - first + 1) : KEYS;
    turn_keys(key + first * stride, stride, there, turned);
    for (int k = 0; n > 1 && k < there; k++)
      for (int i = 0; i < PIECES; i++) values[k * PIECES + i] = load(value + (first + k) * stride + i * LANES);
    for (int64_t t = 0; t < n; t++) {
      const int64_t sees = position + t - first + 1;
      if (sees < 1) continue;
      const int count = sees < KEYS ? (int)sees : KEYS;
      for (int g = 0; g < GROUP; g += TOGETHER)
        if (n > 1) look(seen + t, g, queries[t], turned, values, NULL, 0, count, ahead);
        else look(seen + t, g, queries[t], turned, NULL, value + first * stride, stride, count, ahead);
    }
  }
  for (int64_t t = 0; t < n; t++)
    for (int g = 0; g < GROUP; g++)
      for (int i = 0; i < PIECES; i++)
        store(out + (t * stride * GROUP) + g * HEAD_DIM + i * LANES, seen[t].sums[g][i] / seen[t].total[g]);
}

// Into the cache of this core. In their order the processor foresees what is read; by head, line after line would be
// waited for.
static void touch(const bf16 *at, int64_t count) {
  const volatile bf16 *line = at;
  for (int64_t i = 0; i < count; i += LINE / sizeof(bf16)) (void)line[i];
}

// qkv [n, heads + 2 kv_heads, HEAD_DIM], rotated, over the keys and values of each token's slot up to itself: out [n, heads, HEAD_DIM].
// starts: where tiles of tokens begin, and where the last one ends. A thread takes all heads of a tile, where there are
// tiles for all, and else one.
static void attend(const bf16 *qkv, const bf16 *keys, const bf16 *values, const int64_t *positions,
                   const int64_t *places, bf16 *out, const int64_t *starts, int64_t tiles, int64_t kv_heads,
                   struct team *team) {
  const int64_t stride = kv_heads * HEAD_DIM, width = (GROUP + 2) * stride;
  const int64_t heads = tiles >= 2 * team->all ? kv_heads : 1, parts = kv_heads / heads; // at a time; of a tile
  int64_t here = -1; // the tile whose keys and values have been fetched
  TAKE(some, tiles * parts, 1, team) {
    const int64_t i = some.begin / parts, head = some.begin % parts * heads, next = i + 1;
    const int64_t t = starts[i], n = starts[i + 1] - t, first = places[t] - positions[t];
    const bf16 *key = keys + first * stride, *value = values + first * stride;
    if (i != here && (parts == 1 || kv_heads >= team->all)) {
      touch(key, (positions[t] + n) * stride);
      touch(value, (positions[t] + n) * stride);
    }
    here = i;
    struct ahead ahead = {0};
    if (parts == 1 && next < own_end(team, tiles)) {
      here = next;
      const int64_t then = starts[next], there = (places[then] - positions[then]) * stride;
      const int64_t turns = n * kv_heads * (GROUP / TOGETHER) * (positions[t] / KEYS + 1) * HEAD_DIM; // about so many
      const int64_t lines = (positions[then] + 1) * stride * (int64_t)sizeof(bf16) / LINE;
      ahead = (struct ahead){(const char *)(keys + there), (const char *)(values + there), lines, lines / turns + 1};
    }
    for (int64_t h = head; h < head + heads; h++)
      attend_tile(qkv + t * width + h * GROUP * HEAD_DIM, key + h * HEAD_DIM, value + h * HEAD_DIM, stride, positions[t],
                  n, out + (t * kv_heads + h) * GROUP * HEAD_DIM, &ahead);
  }
  meet(team);
}

// Tiles of at most TILE tokens that follow each other: where they begin, and where the last one ends; how many.
static int64_t tile_starts(const int64_t *positions, const int64_t *places, int64_t n, int64_t *starts) {
  int64_t tiles = 0;
  for (int64_t t = 0; t < n; t++)
    if (!t || t - starts[tiles - 1] == TILE || places[t] != places[t - 1] + 1 || positions[t] != positions[t - 1] + 1)
      starts[tiles++] = t;
  starts[tiles] = n;
  return tiles;
}
