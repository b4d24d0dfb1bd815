// What stands between the matrix products of a decoding step, in bfloat16 on a CPU: each function is one call where
// torch needs two to nine. Compiled once for a model's shape (HEAD_DIM, GROUP = query heads per kv head) by kernels.py.
// A token's results depend on nothing but the token and its own keys and values.
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t uints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32), aligned(2), may_alias));
enum { LANES = 16, KEYS = 64, PIECES = HEAD_DIM / LANES, MANY = 32 }; // rows from MANY on are worth two threads

static inline vec load(const bf16 *at) { return (vec)(__builtin_convertvector(*(const halves *)at, uints) << 16); }

static inline uints rounded(vec x) { // to nearest, ties to even, as torch does
  uints bits = (uints)x;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline void store(bf16 *at, vec x) { *(halves *)at = __builtin_convertvector(rounded(x), halves); }

static inline vec through_bf16(vec x) { return (vec)(rounded(x) << 16); }

static inline vec all(float x) { return x - (vec){}; }

static inline float sum(vec x) {
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; i++) x[i] += x[i + step];
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

// x [rows, n] += y where y is given; out = x / sqrt(mean(x^2) + eps) * weight. n is a multiple of 16.
void add_rms_norm(bf16 *x, const bf16 *y, const bf16 *weight, bf16 *out, int64_t rows, int64_t n, float eps) {
#pragma omp parallel for if (rows >= MANY)
  for (int64_t row = 0; row < rows; row++) {
    bf16 *mine = x + row * n;
    vec squares = {};
    for (int64_t i = 0; i < n; i += LANES) {
      vec v = load(mine + i);
      if (y) {
        v = through_bf16(v + load(y + row * n + i));
        store(mine + i, v);
      }
      squares += v * v;
    }
    float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps);
    for (int64_t i = 0; i < n; i += LANES) store(out + row * n + i, load(mine + i) * scale * load(weight + i));
  }
}

// gate_up [rows, 2 n]: out [rows, n] = silu(gate) * up.
void silu_mul(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t n) {
#pragma omp parallel for if (rows >= MANY)
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < n; i += LANES) {
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
void rotate_and_write(bf16 *qkv, const bf16 *cos, const bf16 *sin, const int64_t *positions, const int64_t *places,
                      bf16 *keys, bf16 *values, int64_t n, int64_t heads, int64_t kv_heads) {
  for (int64_t t = 0; t < n; t++) {
    const bf16 *c = cos + positions[t] * HEAD_DIM, *s = sin + positions[t] * HEAD_DIM;
    for (int64_t h = 0; h < heads; h++, qkv += HEAD_DIM) rotated(qkv, c, s, qkv);
    bf16 *key = keys + places[t] * kv_heads * HEAD_DIM;
    for (int64_t h = 0; h < kv_heads; h++, qkv += HEAD_DIM) rotated(qkv, c, s, key + h * HEAD_DIM);
    memcpy(values + places[t] * kv_heads * HEAD_DIM, qkv, kv_heads * HEAD_DIM * sizeof(bf16));
    qkv += kv_heads * HEAD_DIM;
  }
}

// One query token and the GROUP heads of one kv head, over keys 0 to last; the softmax is made up block by block.
static void attend_one(const bf16 *query, const bf16 *key, const bf16 *value, int64_t stride, int64_t last, bf16 *out) {
  const float scale = 1.0f / __builtin_sqrtf((float)HEAD_DIM);
  vec q[GROUP][PIECES], acc[GROUP][PIECES];
  float most[GROUP], total[GROUP];
  for (int g = 0; g < GROUP; g++) {
    most[g] = -__builtin_inff(), total[g] = 0;
    for (int i = 0; i < PIECES; i++)
      q[g][i] = load(query + g * HEAD_DIM + i * LANES) * scale, acc[g][i] = all(0.0f);
  }
  for (int64_t first = 0; first <= last; first += KEYS) {
    const int count = last - first + 1 < KEYS ? (int)(last - first + 1) : KEYS;
    float score[GROUP][KEYS];
    for (int k = 0; k < count; k++) {
      vec loaded[PIECES];
      for (int i = 0; i < PIECES; i++) loaded[i] = load(key + (first + k) * stride + i * LANES);
      for (int g = 0; g < GROUP; g++) {
        vec dot = q[g][0] * loaded[0];
        for (int i = 1; i < PIECES; i++) dot += q[g][i] * loaded[i];
        score[g][k] = sum(dot);
      }
    }
    for (int g = 0; g < GROUP; g++) {
      for (int k = count; k < KEYS; k++) score[g][k] = -__builtin_inff();
      float top = most[g];
      for (int k = 0; k < count; k++) top = score[g][k] > top ? score[g][k] : top;
      vec mass = {};
      for (int k = 0; k < KEYS; k += LANES) {
        vec *at = (vec *)(score[g] + k);
        ints there = *at > all(-3e38f);
        *at = (vec)((ints)exponential(*at - top) & there);
        mass += *at;
      }
      const float keep = exponential(all(most[g] - top))[0];
      most[g] = top, total[g] = total[g] * keep + sum(mass);
      for (int i = 0; i < PIECES; i++) acc[g][i] *= keep;
    }
    for (int k = 0; k < count; k++)
      for (int i = 0; i < PIECES; i++) {
        vec v = load(value + (first + k) * stride + i * LANES);
        for (int g = 0; g < GROUP; g++) acc[g][i] += score[g][k] * v;
      }
  }
  for (int g = 0; g < GROUP; g++)
    for (int i = 0; i < PIECES; i++) store(out + g * HEAD_DIM + i * LANES, acc[g][i] / total[g]);
}

// Tokens [first, last) of qkv, rotated, over the keys and values of their slots up to themselves: out [n, heads, HEAD_DIM].
void attend(const bf16 *qkv, const bf16 *keys, const bf16 *values, const int64_t *positions, const int64_t *places,
            bf16 *out, int64_t first, int64_t last, int64_t kv_heads) {
  const int64_t stride = kv_heads * HEAD_DIM, width = (GROUP + 2) * stride;
#pragma omp parallel for collapse(2) schedule(static)
  for (int64_t t = first; t < last; t++)
    for (int64_t h = 0; h < kv_heads; h++) {
      const int64_t begin = (places[t] - positions[t]) * stride + h * HEAD_DIM;
      attend_one(qkv + t * width + h * GROUP * HEAD_DIM, keys + begin, values + begin, stride, positions[t],
                 out + (t * kv_heads + h) * GROUP * HEAD_DIM);
    }
}
