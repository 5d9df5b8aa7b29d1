/* A pool of threads that waits for work awake for a moment, and asleep after that.
 *
 * Work comes every few microseconds while a token is decoded, and waking a thread takes tens of
 * them; so an idle thread spins, but for a few thousand rounds only, and then gives the processor
 * back: two busy pools on the same cores must not stand in each other's way.
 *
 * Work is over before the scheduler notices that two threads of it share a processor, and so they
 * may share it for seconds while another is idle. Where there are as many threads as processors,
 * each worker is therefore bound to one that the caller is not on.
 */
#define _GNU_SOURCE
#include <stdatomic.h>

#include "internal.h"
#include "system.h"

#define MOST_THREADS 256
#define SPINS_IDLE 4000
#define SPINS_BARRIER 20000

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif

static sct_lock callers = SCT_LOCK; /* one call at a time */
static sct_lock door = SCT_LOCK;    /* of sleeping and waking */
static sct_bell bell = SCT_BELL;
static sct_thread workers[MOST_THREADS];
static int count;                 /* threads, the caller among them; 0 before the first use */
static sct_work *work;
static void *context;
static atomic_uint round_number;  /* of the work; a new number is the signal to begin */
static atomic_int unfinished, sleepers, leaving;
static atomic_int arrived;
static atomic_uint barrier_round;

static void spin(int *rounds) {
    PAUSE();
    if (++*rounds > SPINS_BARRIER) let_others_run();
}

SCT_THREAD(serve) {
    int thread = (int)(intptr_t)argument;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS_IDLE && atomic_load(&round_number) == seen; i++) PAUSE();
        if (atomic_load(&round_number) == seen) {
            lock(&door);
            atomic_fetch_add(&sleepers, 1);
            while (atomic_load(&round_number) == seen) sleep_at(&bell, &door);
            atomic_fetch_sub(&sleepers, 1);
            unlock(&door);
        }
        seen++;
        if (atomic_load(&leaving)) return SCT_THREAD_END;
        work(context, thread, count);
        atomic_fetch_sub(&unfinished, 1);
    }
}

static void ring(void) {
    atomic_fetch_add(&round_number, 1);
    if (atomic_load(&sleepers)) {
        lock(&door);
        wake_all(&bell);
        unlock(&door);
    }
}

/* A fork waits for the call in progress. The child has none of the workers, and locks and bell
 * as they were: it begins anew, with as many threads. */
static int lost; /* how many it had */
static int watches_forks;
#if !defined(_WIN32)
static void before_fork(void) { lock(&callers); }
static void in_parent(void) { unlock(&callers); }
static void in_child(void) {
    callers = door = SCT_LOCK;
    bell = SCT_BELL;
    lost = count ? count : lost;
    count = 0;
}
#endif

#if defined(__linux__)
#define UNDECIDED (-1)
#define NOT_BOUND (-2)
static int caller_on = UNDECIDED; /* processor of the caller when workers were bound last */
static int bound_to[MOST_THREADS];

static void bind_to(int worker, int cpu) {
    cpu_set_t own;
    CPU_ZERO(&own);
    CPU_SET(cpu, &own);
    bound_to[worker] = pthread_setaffinity_np(workers[worker], sizeof own, &own) ? -1 : cpu;
}

/* Give each worker a processor of its own, or, when the caller has moved to that of a worker, the
 * one it left. The caller is never bound: it does other work too. */
static void bind_workers(void) {
    const int here = sched_getcpu(), left = caller_on;
    cpu_set_t set;
    if (here == left || here < 0 || left == NOT_BOUND) return;
    caller_on = here;
    if (left >= 0) {
        for (int i = 1; i < count; i++)
            if (bound_to[i] == here) bind_to(i, left);
        return;
    }
    if (pthread_getaffinity_np(pthread_self(), sizeof set, &set) || CPU_COUNT(&set) != count) {
        caller_on = NOT_BOUND;
        return;
    }
    for (int cpu = 0, i = 1; cpu < CPU_SETSIZE && i < count; cpu++)
        if (cpu != here && CPU_ISSET(cpu, &set)) bind_to(i++, cpu);
}
static void bind_again(void) { caller_on = UNDECIDED; }
#else /* was not measured there */
static void bind_workers(void) {}
static void bind_again(void) {}
#endif

static void dismiss(void) {
    if (count > 1) {
        atomic_store(&leaving, 1);
        ring();
        for (int i = 1; i < count; i++) end_thread(workers[i]);
        atomic_store(&leaving, 0);
    }
    count = 0;
}

static int hire(int wanted) {
    dismiss();
    if (wanted < 1) wanted = 1;
    if (wanted > MOST_THREADS) wanted = MOST_THREADS;
    atomic_store(&round_number, 0);
    atomic_store(&sleepers, 0);
    bind_again();
    if (!watches_forks) SCT_AT_FORK(before_fork, in_parent, in_child);
    watches_forks = 1;
    for (count = 1; count < wanted; count++)
        if (!begin_thread(&workers[count], serve, (void *)(intptr_t)count)) break;
    return count;
}

static void be_ready(void) {
    if (!count) hire(lost ? lost : usual_threads());
}

int sct_threads(void) {
    lock(&callers);
    be_ready();
    int found = count;
    unlock(&callers);
    return found;
}

int sct_set_threads(int threads) {
    lock(&callers);
    int found = hire(threads);
    unlock(&callers);
    return found;
}

void sct_parallel(sct_work *asked, void *asked_context) {
    lock(&callers);
    be_ready();
    work = asked;
    context = asked_context;
    if (count > 1) {
        bind_workers();
        atomic_store(&unfinished, count - 1);
        ring();
    }
    work(context, 0, count);
    /* awake: the caller goes on at once, with the next product of a token */
    for (int rounds = 0; count > 1 && atomic_load(&unfinished);) spin(&rounds);
    unlock(&callers);
}

void sct_barrier(int threads) {
    if (threads == 1) return;
    unsigned now = atomic_load(&barrier_round);
    if (atomic_fetch_add(&arrived, 1) == threads - 1) {
        atomic_store(&arrived, 0); /* before the round: whoever it lets go may arrive again */
        atomic_fetch_add(&barrier_round, 1);
        return;
    }
    for (int rounds = 0; atomic_load(&barrier_round) == now;) spin(&rounds);
}
