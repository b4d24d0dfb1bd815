// The threads of a parallel region that work together, phase by phase. Each takes some of its own share at a time, and of
// the others' once nothing of it is left. So one that has no processor keeps the others waiting for what it has taken, and
// one that comes late finds nothing to do and follows; at the end of the region all are waited for.
#pragma once
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include "threads.h"

enum { PATIENCE = 1 << 10, AGAIN = 1 << 6 }; // looks at the others' progress before the processor is offered, and again
enum { REACH = 4 }; // shares that one looks for work in
enum { COUNT_BITS = 20, MOST_ITEMS = (1 << COUNT_BITS) - 1 }; // of a share

// What has been taken of a share: in which phase (if in an older one, nothing yet), how many items from its front, by its
// own thread, and from its back.
struct share { _Alignas(64) uint64_t taken; };
struct place { struct share *shares; _Alignas(64) int64_t done; }; // items of all phases so far
struct team {
  struct place *place;
  const int64_t me, all;
  int64_t phase, items, mine, due; // the phase, from 1; items of it, those done here, those of all before it
  int64_t at; // which share is looked in, from one's own on
};
struct some { int64_t begin, end; };

// For as many threads as a parallel region may have.
#define MEETING(place)                                        \
  struct share shares_of_##place[omp_get_max_threads()];      \
  memset(shares_of_##place, 0, sizeof shares_of_##place);     \
  struct place place = {shares_of_##place, 0}
#define JOIN(place) {&(place), omp_get_thread_num(), omp_get_num_threads(), 1}

// At most grain of the n items of this phase, to be done by this thread; none once all are taken. A phase has one loop of
// these, with the same n in all threads, late ones as well, and then a meeting.
static inline struct some take(struct team *team, int64_t n, int64_t grain) {
  const uint64_t phase = (uint64_t)team->phase << 2 * COUNT_BITS;
  team->items = n;
  for (; team->at < team->all && team->at < REACH; team->at++) {
    const int64_t owner = (team->me + team->at) % team->all;
    const int64_t begin = n * owner / team->all, end = n * (owner + 1) / team->all;
    uint64_t *taken = &team->place->shares[owner].taken, old = __atomic_load_n(taken, __ATOMIC_RELAXED);
    while (begin < end) {
      if (old >> 2 * COUNT_BITS > (uint64_t)team->phase) break; // this phase has ended without this thread
      const uint64_t known = old < phase ? phase : old;
      const int64_t front = begin + (int64_t)(known >> COUNT_BITS & MOST_ITEMS), back = end - (int64_t)(known & MOST_ITEMS);
      const int64_t count = back - front < grain ? back - front : grain;
      if (!count) break;
      if (__atomic_compare_exchange_n(taken, &old, known + ((uint64_t)count << (team->at ? 0 : COUNT_BITS)), 0,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        team->mine += count;
        return team->at ? (struct some){back - count, back} : (struct some){front, front + count};
      }
    }
  }
  return (struct some){0, 0};
}
#define TAKE(some, n, grain, team) for (struct some some; (some = take(team, n, grain)).begin < some.end;)

// Where this thread's own share of n items ends; 0 where it does another's.
static inline int64_t own_end(const struct team *team, int64_t n) {
  return team->at ? 0 : n * (team->me + 1) / team->all;
}

static inline void hand_in(struct team *team) {
  team->due += team->items;
  if (team->mine) __atomic_add_fetch(&team->place->done, team->mine, __ATOMIC_ACQ_REL);
  team->phase++, team->items = team->mine = team->at = 0;
}

static inline int over(const struct team *team) {
  return __atomic_load_n(&team->place->done, __ATOMIC_ACQUIRE) >= team->due;
}

// The end of a phase: what it wrote can be read. Threads hardly wait here, nine times a layer or more: OpenMP's own
// barriers ask the kernel to wake them where a process has computed in other threads as well (docs/log.md).
static void meet(struct team *team) {
  hand_in(team);
  for (int looks = 1; !over(team); looks++) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
    if (looks >= PATIENCE && looks % AGAIN == 0) sched_yield(); // the one that is waited for may need this processor
  }
}

// One more item for each thread to have come.
static inline void come(struct team *team) { team->items += team->all, team->mine++; }

// The end of a phase that nobody goes on from before all have come: who is late still reads what it began with.
static void gather(struct team *team) {
  come(team);
  meet(team);
}
