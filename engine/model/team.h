// The threads of a parallel region that work together, and wait for each other.
#pragma once
#include <sched.h>
#include <stdint.h>
#include "threads.h"

enum { PATIENCE = 1 << 10, AGAIN = 1 << 6 }; // looks at the others' progress before the processor is offered, and again

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
