// The layers of a pass in bfloat16 on a CPU, all in one call: what torch would need hundreds of calls for. Compiled for a
// model's shape by kernels.py.
#include <time.h>
#include "layers.h"

struct model { struct shape shape; const struct layer *layers; };

static double seconds(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// x [n, hidden] through the first depth layers, in place. keys and values are those of layer 0, cache numbers before
// those of the next. What the layers aux give out goes to given [n, num_aux, hidden]; room is for all between, starts
// for n + 1 numbers (kernels.py). took: seconds of processor of all threads, and by the clock.
void forward(const struct model *model, int64_t depth, bf16 *x, const int64_t *positions, const int64_t *places,
             bf16 *keys, bf16 *values, int64_t cache, const int64_t *aux, int64_t num_aux, bf16 *given, bf16 *room,
             int64_t *starts, void *product_room, int64_t n, double *took) {
  const int64_t hidden = model->shape.hidden, tiles = tile_starts(positions, places, n, starts);
  bf16 *y = room, *h = y + n * hidden, *between = h + n * hidden;
  const struct pass pass = {n, tiles, positions, places, starts, y, h, between, product_room};
  MEETING(place);
  const double begin = seconds(CLOCK_MONOTONIC);
  double processor = 0;
#pragma omp parallel reduction(+ : processor)
  {
    const double mine = seconds(CLOCK_THREAD_CPUTIME_ID);
    struct team team = JOIN(place);
    for (int64_t i = 0; i <= depth; i++) {
      const struct layer *layer = model->layers + i;
      const int more = i < depth;
      add_rms_norm(x, i ? y : NULL, more ? layer->attention_norm : NULL, more ? h : NULL, n, hidden,
                   (float)model->shape.eps, &team);
      for (int64_t j = 0; j < num_aux; j++)
        if (aux[j] == i - 1) {
          TAKE(some, n, 1, &team)
            memcpy(given + (some.begin * num_aux + j) * hidden, x + some.begin * hidden, hidden * sizeof(bf16));
          meet(&team);
        }
      if (more) run_layer(layer, &model->shape, &pass, h, x, keys + i * cache, values + i * cache, &team);
    }
    processor = seconds(CLOCK_THREAD_CPUTIME_ID) - mine;
  }
  took[0] = processor, took[1] = seconds(CLOCK_MONOTONIC) - begin;
}
