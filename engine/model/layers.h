// What a layer in bfloat16 is made of on a CPU, by all threads of a parallel region together, for a model's shape
// (HEAD_DIM, GROUP = query heads per kv head); the matrix products are product.c's. A token's results depend on nothing
// but the token and its own keys and values.
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "threads.h"

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
enum {
  SETS = 4, KEYS = SETS * LANES, // keys that are looked at together
  PIECES = HEAD_DIM / LANES, RUN = PIECES % 4 ? 2 : 4, // of a value, and how many of them are summed at a time
  TOGETHER = GROUP % 3 == 0 ? 3 : GROUP % 2 == 0 ? 2 : 1, // heads: SETS or RUN sums each is what registers hold
  TILE = 8, // tokens of one sequence that share what is made of their keys
  PATIENCE = 1 << 10, AGAIN = 1 << 6 // looks at the others' progress before the processor is offered, and offered again
};
#define UNROLL _Pragma("GCC unroll 16")

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

static inline float sum(vec x) {
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] += x[i + step];
  return x[0];
}

static inline float largest(vec x) {
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] = x[i] > x[i + step] ? x[i] : x[i + step];
  return x[0];
}

static inline vec exponential(vec x) { // Cephes: relative error under 2e-7; below -87 it is as good as nothing
  ints low = x < all(-87.0f);
  x = (vec)(((ints)all(-87.0f) & low) | ((ints)x & ~low));
  ints high = x > all(88.0f);
  x = (vec)(((ints)all(88.0f) & high) | ((ints)x & ~high));
  vec scaled = x * 1.44269504f;
  vec half = (vec)(((ints)all(-0.5f) & (ints)(scaled < all(0.0f))) | ((ints)all(0.5f) & (ints)(scaled >= all(0.0f))));
  ints n = __builtin_convertvector(scaled + half, ints);
  vec whole = __builtin_convertvector(n, vec);
  vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (vec)((n + 127) << 23);
}

// The threads of a pass, each with its number. They meet nine times a layer or more and hardly wait: OpenMP's own barriers
// ask the kernel to wake them where a process has computed in other threads as well (docs/log.md).
struct place { _Alignas(64) int64_t arrived; _Alignas(64) int64_t round; };
struct team { struct place *place; int64_t me, all; };

static void meet(struct team team) {
  if (team.all == 1) return;
  const int64_t round = __atomic_load_n(&team.place->round, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&team.place->arrived, 1, __ATOMIC_ACQ_REL) == team.all) {
    __atomic_store_n(&team.place->arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team.place->round, round + 1, __ATOMIC_RELEASE);
  } else
    for (int looks = 1; __atomic_load_n(&team.place->round, __ATOMIC_ACQUIRE) == round; looks++) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
      if (looks >= PATIENCE && looks % AGAIN == 0) sched_yield(); // the one that is waited for may need this processor
    }
}

// x [n] += y where y is given; out, where it is wanted, = x / sqrt(mean(x^2) + eps), times weight where there is one.
static inline void add_rms_norm_row(bf16 *x, const bf16 *y, const bf16 *weight, bf16 *out, int64_t n, float eps) {
  vec squares = {};
  for (int64_t i = 0; i < n; i += LANES) {
    vec v = load(x + i);
    if (y) {
      v = through_bf16(v + load(y + i));
      store(x + i, v);
    }
    squares += v * v;
  }
  if (!out) return;
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps);
  for (int64_t i = 0; i < n; i += LANES) store(out + i, load(x + i) * scale * (weight ? load(weight + i) : all(1.0f)));
}

static void add_rms_norm(bf16 *x, const bf16 *y, const bf16 *weight, bf16 *out, int64_t rows, int64_t n, float eps,
                         struct team team) {
  for (int64_t row = team.me; row < rows; row += team.all)
    add_rms_norm_row(x + row * n, y ? y + row * n : NULL, weight, out ? out + row * n : NULL, n, eps);
}

// gate_up [rows, 2 n]: out [rows, n] = silu(gate) * up.
static void silu_mul(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t n, struct team team) {
  const int64_t begin = n / LANES * team.me / team.all * LANES, end = n / LANES * (team.me + 1) / team.all * LANES;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = begin; i < end; i += LANES) {
      const bf16 *at = gate_up + 2 * row * n + i;
      vec gate = load(at);
      store(out + row * n + i, through_bf16(gate / (exponential(-gate) + 1.0f)) * load(at + n));
    }
}

static inline void rotated(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *out) {
  for (int i = 0; i < HEAD_DIM / 2; i += LANES) {
    const int j = i + HEAD_DIM / 2;
    vec low = load(x + i), high = load(x + j);
    store(out + i, through_bf16(low * load(cos + i)) + high * load(sin + i));
    store(out + j, through_bf16(high * load(cos + j)) + low * load(sin + j));
  }
}

// qkv [n, heads + 2 kv_heads, HEAD_DIM]: query is rotated in place; key, rotated, and value go to their places.
static void rotate_and_write(bf16 *qkv, const bf16 *cos, const bf16 *sin, const int64_t *positions,
                             const int64_t *places, bf16 *keys, bf16 *values, int64_t n, int64_t kv_heads,
                             struct team team) {
  const int64_t stride = kv_heads * HEAD_DIM, width = (GROUP + 2) * stride;
  for (int64_t t = team.me; t < n; t += team.all) {
    const bf16 *c = cos + positions[t] * HEAD_DIM, *s = sin + positions[t] * HEAD_DIM;
    bf16 *query = qkv + t * width, *key = query + GROUP * stride;
    for (int64_t h = 0; h < GROUP * kv_heads; h++) rotated(query + h * HEAD_DIM, c, s, query + h * HEAD_DIM);
    for (int64_t h = 0; h < kv_heads; h++) rotated(key + h * HEAD_DIM, c, s, keys + places[t] * stride + h * HEAD_DIM);
    memcpy(values + places[t] * stride, key + stride, stride * sizeof(bf16));
  }
}

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define PICK(low, high, ...) __builtin_shufflevector(low, high, __VA_ARGS__)
#endif
#endif
#ifndef PICK // gcc before 12
#define PICK(low, high, ...) __builtin_shuffle(low, high, (words){__VA_ARGS__})
#endif
#define LOW(lane, step) ((lane) & (step) ? LANES + (lane) - (step) : (lane))
#define HIGH(lane, step) ((lane) & (step) ? LANES + (lane) : (lane) + (step))
#define EXCHANGE(step)                                                                     \
  UNROLL for (int i = 0; i < LANES; i++) if (!(i & (step))) {                              \
    const words low = row[i], high = row[i + (step)];                                      \
    row[i] = PICK(low, high, EACH_LANE(LOW, step));                     \
    row[i + (step)] = PICK(low, high, EACH_LANE(HIGH, step));           \
  }

// KEYS keys from key on, of which count are there: out [HEAD_DIM, SETS], a dimension of LANES keys in each.
static void turn_keys(const bf16 *key, int64_t stride, int count, vec *out) {
  for (int set = 0; set < SETS; set++)
    for (int first = 0; first < HEAD_DIM; first += 2 * LANES) {
      words row[LANES]; // two dimensions in a word
      UNROLL for (int k = 0; k < LANES; k++) {
        const int at = set * LANES + k < count ? set * LANES + k : count - 1;
        row[k] = *(const words *)(key + at * stride + first);
      }
      EXCHANGE(1) EXCHANGE(2) EXCHANGE(4)
#ifdef __AVX512F__
      EXCHANGE(8)
#endif
      UNROLL for (int i = 0; i < LANES; i++) {
        out[(first + 2 * i) * SETS + set] = wide(row[i]);
        out[(first + 2 * i + 1) * SETS + set] = (vec)(row[i] & 0xffff0000u);
      }
    }
}

struct seen { float most[GROUP], total[GROUP]; vec sums[GROUP][PIECES]; }; // of the keys so far, by one token

// TOGETHER heads of a token, from head g on, over a block of keys of which it sees count; the softmax is made up.
static inline void look(struct seen *seen, int g, const float *query, const vec *keys, const vec *values, int count) {
  vec scores[TOGETHER][SETS];
  UNROLL for (int h = 0; h < TOGETHER; h++) UNROLL for (int s = 0; s < SETS; s++) scores[h][s] = (vec){};
  for (int d = 0; d < HEAD_DIM; d++)
    UNROLL for (int h = 0; h < TOGETHER; h++)
      UNROLL for (int s = 0; s < SETS; s++) scores[h][s] += query[(g + h) * HEAD_DIM + d] * keys[d * SETS + s];
  float weights[TOGETHER][KEYS];
  for (int h = 0; h < TOGETHER; h++) {
    vec top = all(seen->most[g + h]), mass = {};
    for (int s = 0; s < SETS; s++) {
      ints there;
      for (int i = 0; i < LANES; i++) there[i] = s * LANES + i < count ? -1 : 0;
      scores[h][s] = (vec)(((ints)scores[h][s] & there) | ((ints)all(-__builtin_inff()) & ~there));
      ints more = scores[h][s] > top;
      top = (vec)(((ints)scores[h][s] & more) | ((ints)top & ~more));
    }
    const float most = largest(top);
    for (int s = 0; s < SETS; s++) {
      ints there = scores[h][s] > all(-3e38f);
      const vec weight = (vec)((ints)exponential(scores[h][s] - most) & there);
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
    for (int k = 0; k < count; k++)
      UNROLL for (int h = 0; h < TOGETHER; h++)
        UNROLL for (int i = 0; i < RUN; i++) sums[h][i] += weights[h][k] * values[k * PIECES + first + i];
    UNROLL for (int h = 0; h < TOGETHER; h++) UNROLL for (int i = 0; i < RUN; i++) seen->sums[g + h][first + i] = sums[h][i];
  }
}

// One kv head of n tokens that follow each other, the first at a position: qkv and out are theirs.
static void attend_tile(const bf16 *qkv, const bf16 *key, const bf16 *value, int64_t stride, int64_t position, int64_t n,
                        bf16 *out) {
  const int64_t width = (GROUP + 2) * stride, last = position + n - 1;
  const float scale = 1.0f / __builtin_sqrtf((float)HEAD_DIM);
  struct seen seen[TILE];
  float query[TILE][GROUP * HEAD_DIM];
  vec turned[HEAD_DIM * SETS], values[KEYS * PIECES];
  for (int64_t t = 0; t < n; t++) {
    for (int g = 0; g < GROUP; g++) seen[t].most[g] = -__builtin_inff(), seen[t].total[g] = 0;
    memset(seen[t].sums, 0, sizeof seen[t].sums);
    for (int i = 0; i < GROUP * HEAD_DIM; i += LANES) *(vec *)(query[t] + i) = load(qkv + t * width + i) * scale;
  }
  for (int64_t first = 0; first <= last; first += KEYS) {
    const int there = last - first + 1 < KEYS ? (int)(last - first + 1) : KEYS;
    turn_keys(key + first * stride, stride, there, turned);
    for (int k = 0; k < there; k++)
      for (int i = 0; i < PIECES; i++) values[k * PIECES + i] = load(value + (first + k) * stride + i * LANES);
    for (int64_t t = 0; t < n; t++) {
      const int64_t sees = position + t - first + 1;
      if (sees < 1) continue;
      for (int g = 0; g < GROUP; g += TOGETHER)
        look(seen + t, g, query[t], turned, values, sees < KEYS ? (int)sees : KEYS);
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
  for (int64_t i = 0; i < count; i += 64 / sizeof(bf16)) (void)line[i];
}

// qkv [n, heads + 2 kv_heads, HEAD_DIM], rotated, over the keys and values of each token's slot up to itself: out [n, heads, HEAD_DIM].
// starts: where tiles of tokens begin, and where the last one ends.
static void attend(const bf16 *qkv, const bf16 *keys, const bf16 *values, const int64_t *positions,
                   const int64_t *places, bf16 *out, const int64_t *starts, int64_t tiles, int64_t kv_heads,
                   struct team team) {
  const int64_t stride = kv_heads * HEAD_DIM, width = (GROUP + 2) * stride;
  const int64_t each = tiles >= 2 * team.all ? kv_heads : 1; // heads of a tile by one thread, where there is work for all
  for (int64_t i = 0; i < tiles; i++)
    for (int64_t h = 0; h < kv_heads; h++) {
      if ((i * kv_heads + h) / each % team.all != team.me) continue;
      const int64_t t = starts[i], sequence = (places[t] - positions[t]) * stride, begin = sequence + h * HEAD_DIM;
      if (!h) touch(keys + sequence, (positions[t] + 1) * stride), touch(values + sequence, (positions[t] + 1) * stride);
      attend_tile(qkv + t * width + h * GROUP * HEAD_DIM, keys + begin, values + begin, stride, positions[t],
                  starts[i + 1] - t, out + (t * kv_heads + h) * GROUP * HEAD_DIM);
    }
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

// A matrix [outputs, inputs] as one of the products reads it; prepare is NULL where it needs nothing made of its rows.
typedef void prepare_of(const bf16 *x, void *room, int64_t rows, int64_t inputs, int64_t me, int64_t all);
typedef void product_of(const bf16 *x, const void *room, const void *weights, const void *scales, bf16 *out,
                        int64_t rows, int64_t inputs, int64_t outputs, int64_t me, int64_t all);
struct matrix { prepare_of *prepare; product_of *product; const void *weights, *scales; int64_t inputs, outputs; };

static void times(const bf16 *x, const struct matrix *m, void *room, bf16 *out, int64_t rows, struct team team) {
  if (m->prepare) {
    m->prepare(x, room, rows, m->inputs, team.me, team.all);
    meet(team);
  }
  m->product(x, room, m->weights, m->scales, out, rows, m->inputs, m->outputs, team.me, team.all);
  meet(team);
}

static void add_bias(bf16 *x, const bf16 *bias, int64_t rows, int64_t n, struct team team) {
  for (int64_t row = team.me; row < rows; row += team.all)
    for (int64_t i = 0; i < n; i += LANES) store(x + row * n + i, load(x + row * n + i) + load(bias + i));
  meet(team);
}

struct layer { const bf16 *attention_norm, *mlp_norm, *qkv_bias; struct matrix qkv, out, gate_up, down; };
struct shape { const bf16 *cos, *sin; int64_t hidden, kv_heads; double eps; };
// n tokens on their way; y and h [n, hidden], and between: qkv and attended, or gate_up and activated, of each.
struct pass {
  int64_t n, tiles;
  const int64_t *positions, *places, *starts;
  bf16 *y, *h, *between;
  void *product_room;
};

// normed [n, qkv.inputs]: what attention is of. Its output is added to x [n, hidden]; the MLP's, in y, is yet to be.
static void run_layer(const struct layer *layer, const struct shape *shape, const struct pass *pass, const bf16 *normed,
                      bf16 *x, bf16 *keys, bf16 *values, struct team team) {
  const int64_t n = pass->n, *positions = pass->positions, *places = pass->places;
  bf16 *between = pass->between, *y = pass->y, *h = pass->h;
  bf16 *attended = between + n * layer->qkv.outputs, *activated = between + n * layer->gate_up.outputs;
  times(normed, &layer->qkv, pass->product_room, between, n, team);
  if (layer->qkv_bias) add_bias(between, layer->qkv_bias, n, layer->qkv.outputs, team);
  rotate_and_write(between, shape->cos, shape->sin, positions, places, keys, values, n, shape->kv_heads, team);
  meet(team);
  attend(between, keys, values, positions, places, attended, pass->starts, pass->tiles, shape->kv_heads, team);
  meet(team);
  times(attended, &layer->out, pass->product_room, y, n, team);
  add_rms_norm(x, y, layer->mlp_norm, h, n, shape->hidden, (float)shape->eps, team);
  meet(team);
  times(h, &layer->gate_up, pass->product_room, between, n, team);
  silu_mul(between, activated, n, layer->gate_up.outputs / 2, team);
  meet(team);
  times(activated, &layer->down, pass->product_room, y, n, team);
}
