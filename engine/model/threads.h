// Which of a parallel region's threads this is, and of how many; without OpenMP the only one.
#pragma once
#ifdef _OPENMP
int omp_get_thread_num(void), omp_get_num_threads(void), omp_get_max_threads(void); // clang comes without omp.h
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_max_threads(void) { return 1; }
#endif
