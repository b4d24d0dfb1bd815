// A neural draft in bfloat16 on a CPU, every pass of it in one call (draft.py says what a pass is). Compiled for a
// draft's shape and NUM_AUX layers of the target, which a slot's hidden state is fused from, by draft_kernels.py.
#include "layers.h"

struct draft {
  struct shape shape;
  const bf16 *embedding, *embedding_norm, *norm; // the layer's own first norm is that of the hidden states
  const int64_t *vocabulary;
  struct matrix fuse;
  struct layer layer;
  struct matrix head;
};
struct answer { int64_t token; double chance; };

// The first of the likeliest of n logits, and its probability.
static struct answer judged(const bf16 *logits, const int64_t *vocabulary, int64_t n) {
  const int64_t whole = n / LANES * LANES;
  vec top = all(-__builtin_inff()), mass = {};
  for (int64_t i = 0; i < whole; i += LANES) top = larger(top, load(logits + i));
  float most = largest(top), total, one;
  for (int64_t i = whole; i < n; i++) one = alone(logits[i]), most = one > most ? one : most;
  for (int64_t i = 0; i < whole; i += LANES) mass += exponential(load(logits + i) - most);
  total = sum(mass);
  for (int64_t i = whole; i < n; i++) total += exponential(all(alone(logits[i]) - most))[0];
  int64_t at = 0;
  while (at < n - 1 && alone(logits[at]) != most) at++;
  return (struct answer){vocabulary[at], 1.0 / total};
}

// What a draft of several requests goes on with; row r of it is request who[r].
struct chain { int64_t rows, n, step, *who, *tokens, *positions, *places; const int64_t *ends; double *survival; };

// After a pass: every answer is noted, and those go on, each from its last slot, that may and are still likely enough.
static void go_on(struct chain *chain, const struct answer *answers, const int64_t *wanted, double least, int64_t most,
                  int64_t *drafted, double *chances, int64_t *counts, bf16 *hidden, int64_t size) {
  int64_t going = 0;
  for (int64_t r = 0; r < chain->rows; r++) {
    const int64_t i = chain->who[r], slot = chain->step ? r : chain->ends[r] - 1;
    drafted[i * most + chain->step] = answers[r].token, chances[i * most + chain->step] = answers[r].chance;
    counts[i] = chain->step + 1, chain->survival[i] *= answers[r].chance;
    if (counts[i] >= wanted[i] || !(chain->survival[i] >= least)) continue;
    memmove(hidden + going * size, hidden + slot * size, size * sizeof(bf16));
    chain->tokens[going] = answers[r].token, chain->who[going] = i;
    chain->positions[going] = chain->positions[slot] + 1, chain->places[going] = chain->places[slot] + 1;
    going++;
  }
  chain->rows = chain->n = going, chain->step++;
}

// aux [n, NUM_AUX, hidden], normalized in place, to the slots' hidden states [n, hidden].
static void fuse(const struct draft *draft, bf16 *aux, bf16 *hidden, int64_t n, void *product_room, struct team *team) {
  const int64_t size = draft->shape.hidden;
  add_rms_norm(aux, NULL, NULL, aux, NUM_AUX * n, size, (float)draft->shape.eps, team);
  times(aux, &draft->fuse, product_room, hidden, n, team);
}

// What attention is of: both [n, 2, hidden], a token's embedding and its slot's hidden state, normalized.
static void pair(const struct draft *draft, const int64_t *tokens, bf16 *hidden, bf16 *both, int64_t n,
                 struct team *team) {
  const int64_t size = draft->shape.hidden;
  const float eps = (float)draft->shape.eps;
  TAKE(some, n, 1, team) {
    const int64_t t = some.begin;
    bf16 *embedded = (bf16 *)draft->embedding + tokens[t] * size;
    add_rms_norm_row(embedded, NULL, draft->embedding_norm, both + 2 * t * size, size, eps);
    add_rms_norm_row(hidden + t * size, NULL, draft->layer.attention_norm, both + (2 * t + 1) * size, size, eps);
  }
  meet(team);
}

// Keys and values of n slots whose predictions nobody wants; arguments as of draft.
void remember(const struct draft *draft, const int64_t *tokens, const int64_t *positions, const int64_t *places,
              bf16 *aux, int64_t n, bf16 *keys, bf16 *values, bf16 *room, void *product_room) {
  const struct shape *shape = &draft->shape;
  bf16 *hidden = room, *both = hidden + n * shape->hidden, *qkv = both + 2 * n * shape->hidden;
  MEETING(place);
#pragma omp parallel
  {
    struct team team = JOIN(place);
    fuse(draft, aux, hidden, n, product_room, &team);
    pair(draft, tokens, hidden, both, n, &team);
    times(both, &draft->layer.qkv, product_room, qkv, n, &team);
    rotate_and_write(qkv, shape, NULL, positions, places, keys, values, n, &team);
  }
}

// tokens, positions, places [n] and aux [n, NUM_AUX, hidden] are the slots that wait, those of request r before ends[r];
// all are written over. At most wanted[r] <= most tokens are drafted for it, up to one with which it is less likely than
// least that all are accepted: drafted and chances [rows, most], counts [rows]. room is for all between, starts for
// n + 1 numbers.
void draft(const struct draft *draft, int64_t *tokens, int64_t *positions, int64_t *places, bf16 *aux, int64_t n,
           const int64_t *ends, const int64_t *wanted, int64_t rows, double least, bf16 *keys, bf16 *values, bf16 *room,
           int64_t *starts, void *product_room, int64_t most, int64_t *drafted, double *chances, int64_t *counts) {
  const struct shape *shape = &draft->shape;
  const int64_t size = shape->hidden, words = draft->head.outputs;
  const float eps = (float)shape->eps;
  int64_t who[rows];
  double survival[rows];
  struct answer answers[rows];
  for (int64_t r = 0; r < rows; r++) who[r] = r, survival[r] = 1.0;
  struct chain chain = {rows, n, 0, who, tokens, positions, places, ends, survival};
  bf16 *hidden = room, *both = hidden + n * size, *y = both + 2 * n * size, *h = y + n * size;
  bf16 *asked = h + n * size, *logits = asked + rows * size;
  struct pass pass = {n, 0, positions, places, starts, y, h, logits + rows * words, product_room};
  pass.tiles = tile_starts(positions, places, n, starts);
  MEETING(place);
#pragma omp parallel
  {
    struct team team = JOIN(place);
    fuse(draft, aux, hidden, n, product_room, &team);
    while (chain.rows) {
      pair(draft, tokens, hidden, both, chain.n, &team);
      run_layer(&draft->layer, shape, &pass, both, hidden, keys, values, &team);
      add_rms_norm(hidden, y, draft->norm, h, chain.n, size, eps, &team);
      TAKE(some, chain.rows, 1, &team) {
        const int64_t r = some.begin;
        memcpy(asked + r * size, h + (chain.step ? r : ends[r] - 1) * size, size * sizeof(bf16));
      }
      meet(&team);
      times(asked, &draft->head, product_room, logits, chain.rows, &team);
      TAKE(some, chain.rows, 1, &team)
        answers[some.begin] = judged(logits + some.begin * words, draft->vocabulary, words);
      gather(&team); // the chain, which all read, is going to change
      TAKE(some, 1, 1, &team) {
        go_on(&chain, answers, wanted, least, most, drafted, chances, counts, hidden, size);
        pass.n = chain.n, pass.tiles = tile_starts(positions, places, chain.n, starts);
      }
      meet(&team);
    }
  }
}
