// What a layer in bfloat16 is made of on a CPU, by all threads of a parallel region together, for a model's shape
// (HEAD_DIM, GROUP = query heads per kv head); the matrix products are product.c's. A token's results depend on nothing
// but the token and its own keys and values. What a team does is a phase, or several, and ends when all of it is done.
#include "attention.h"

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
                         struct team *team) {
  TAKE(some, rows, 1, team) {
    const int64_t at = some.begin * n;
    add_rms_norm_row(x + at, y ? y + at : NULL, weight, out ? out + at : NULL, n, eps);
  }
  meet(team);
}

// gate_up [rows, 2 n]: out [rows, n] = silu(gate) * up.
static void silu_mul(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t n, struct team *team) {
  TAKE(some, n / LANES, 16, team)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t i = some.begin * LANES; i < some.end * LANES; i += LANES) {
        const bf16 *at = gate_up + 2 * row * n + i;
        vec gate = load(at);
        store(out + row * n + i, through_bf16(gate / (exponential(-gate) + 1.0f)) * load(at + n));
      }
  meet(team);
}

static inline void rotated(const bf16 *x, const bf16 *cos, const bf16 *sin, bf16 *out) {
  for (int i = 0; i < HEAD_DIM / 2; i += LANES) {
    const int j = i + HEAD_DIM / 2;
    vec low = load(x + i), high = load(x + j);
    store(out + i, through_bf16(low * load(cos + i)) + high * load(sin + i));
    store(out + j, through_bf16(high * load(cos + j)) + low * load(sin + j));
  }
}

// A matrix [outputs, inputs] as one of the products reads it; prepare is NULL where it needs nothing made of its rows.
typedef void prepare_of(const bf16 *x, void *room, int64_t rows, int64_t inputs, int64_t row, int64_t last);
typedef void product_of(const bf16 *x, const void *room, const void *weights, const void *scales, bf16 *out,
                        int64_t rows, int64_t inputs, int64_t outputs, int64_t panel, int64_t last);
typedef int64_t grain_of(int64_t rows);
struct matrix {
  prepare_of *prepare;
  product_of *product;
  grain_of *grain;
  const void *weights, *scales;
  int64_t inputs, outputs, panels;
};

struct layer { const bf16 *attention_norm, *mlp_norm, *qkv_bias, *qk_norm; struct matrix qkv, out, gate_up, down; };
struct shape { const bf16 *cos, *sin; int64_t hidden, kv_heads; double eps; };

// qkv [n, heads + 2 kv_heads, HEAD_DIM]: query is rotated in place; key, rotated, and value go to their places. Where
// there is a qk_norm [heads + kv_heads, HEAD_DIM], each head of both is normalized before.
static void rotate_and_write(bf16 *qkv, const struct shape *shape, const bf16 *qk_norm, const int64_t *positions,
                             const int64_t *places, bf16 *keys, bf16 *values, int64_t n, struct team *team) {
  const int64_t kv_heads = shape->kv_heads;
  const int64_t stride = kv_heads * HEAD_DIM, width = (GROUP + 2) * stride;
  TAKE(some, n, 1, team) {
    const int64_t t = some.begin;
    const bf16 *c = shape->cos + positions[t] * HEAD_DIM, *s = shape->sin + positions[t] * HEAD_DIM;
    bf16 *query = qkv + t * width, *key = query + GROUP * stride;
    for (int64_t i = 0; qk_norm && i < (GROUP + 1) * stride; i += HEAD_DIM)
      add_rms_norm_row(query + i, NULL, qk_norm + i, query + i, HEAD_DIM, (float)shape->eps);
    for (int64_t h = 0; h < GROUP * kv_heads; h++) rotated(query + h * HEAD_DIM, c, s, query + h * HEAD_DIM);
    for (int64_t h = 0; h < kv_heads; h++) rotated(key + h * HEAD_DIM, c, s, keys + places[t] * stride + h * HEAD_DIM);
    memcpy(values + places[t] * stride, key + stride, stride * sizeof(bf16));
  }
  meet(team);
}

static void times(const bf16 *x, const struct matrix *m, void *room, bf16 *out, int64_t rows, struct team *team) {
  if (m->prepare) {
    TAKE(some, rows, 1, team) m->prepare(x, room, rows, m->inputs, some.begin, some.end);
    meet(team);
  }
  TAKE(some, m->panels, m->grain(rows), team)
    m->product(x, room, m->weights, m->scales, out, rows, m->inputs, m->outputs, some.begin, some.end);
  meet(team);
}

static void add_bias(bf16 *x, const bf16 *bias, int64_t rows, int64_t n, struct team *team) {
  TAKE(some, rows, 1, team)
    for (int64_t at = some.begin * n, i = 0; i < n; i += LANES) store(x + at + i, load(x + at + i) + load(bias + i));
  meet(team);
}

// n tokens on their way; y and h [n, hidden], and between: qkv and attended, or gate_up and activated, of each.
struct pass {
  int64_t n, tiles;
  const int64_t *positions, *places, *starts;
  bf16 *y, *h, *between;
  void *product_room;
};

// normed [n, qkv.inputs]: what attention is of. Its output is added to x [n, hidden]; the MLP's, in y, is yet to be.
static void run_layer(const struct layer *layer, const struct shape *shape, const struct pass *pass, const bf16 *normed,
                      bf16 *x, bf16 *keys, bf16 *values, struct team *team) {
  const int64_t n = pass->n, *positions = pass->positions, *places = pass->places;
  bf16 *between = pass->between, *y = pass->y, *h = pass->h;
  bf16 *attended = between + n * layer->qkv.outputs, *activated = between + n * layer->gate_up.outputs;
  times(normed, &layer->qkv, pass->product_room, between, n, team);
  if (layer->qkv_bias) add_bias(between, layer->qkv_bias, n, layer->qkv.outputs, team);
  rotate_and_write(between, shape, layer->qk_norm, positions, places, keys, values, n, team);
  attend(between, keys, values, positions, places, attended, pass->starts, pass->tiles, shape->kv_heads, team);
  times(attended, &layer->out, pass->product_room, y, n, team);
  add_rms_norm(x, y, layer->mlp_norm, h, n, shape->hidden, (float)shape->eps, team);
  times(h, &layer->gate_up, pass->product_room, between, n, team);
  silu_mul(between, activated, n, layer->gate_up.outputs / 2, team);
  times(activated, &layer->down, pass->product_room, y, n, team);
}
