/* Threads and locks: POSIX, or Windows. */
#ifndef SCT_SYSTEM_H
#define SCT_SYSTEM_H

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

typedef SRWLOCK sct_lock;
typedef CONDITION_VARIABLE sct_bell;
typedef HANDLE sct_thread;
#define SCT_LOCK ((SRWLOCK)SRWLOCK_INIT)
#define SCT_BELL ((CONDITION_VARIABLE)CONDITION_VARIABLE_INIT)
#define SCT_THREAD(name) static DWORD WINAPI name(void *argument)
#define SCT_THREAD_END 0

static inline void lock(sct_lock *l) { AcquireSRWLockExclusive(l); }
static inline void unlock(sct_lock *l) { ReleaseSRWLockExclusive(l); }
static inline void sleep_at(sct_bell *b, sct_lock *l) {
    SleepConditionVariableSRW(b, l, INFINITE, 0);
}
static inline void wake_all(sct_bell *b) { WakeAllConditionVariable(b); }
static inline int begin_thread(sct_thread *t, DWORD(WINAPI *run)(void *), void *argument) {
    *t = CreateThread(NULL, 0, run, argument, 0, NULL);
    return *t != NULL;
}
static inline void end_thread(sct_thread t) {
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
}
static inline void let_others_run(void) { SwitchToThread(); }
#define SCT_AT_FORK(before, in_parent, in_child) ((void)0) /* there is no fork */

static inline int usual_threads(void) {
    DWORD_PTR own, all;
    if (!GetProcessAffinityMask(GetCurrentProcess(), &own, &all)) return 1;
    const int found = __builtin_popcountll(own);
    return found ? found : 1; /* 0: the process has several groups of 64 processors */
}

#else
#include <sched.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "older_glibc.h"

typedef pthread_mutex_t sct_lock;
typedef pthread_cond_t sct_bell;
typedef pthread_t sct_thread;
#define SCT_LOCK ((pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER)
#define SCT_BELL ((pthread_cond_t)PTHREAD_COND_INITIALIZER)
#define SCT_THREAD(name) static void *name(void *argument)
#define SCT_THREAD_END NULL

static inline void lock(sct_lock *l) { pthread_mutex_lock(l); }
static inline void unlock(sct_lock *l) { pthread_mutex_unlock(l); }
static inline void sleep_at(sct_bell *b, sct_lock *l) { pthread_cond_wait(b, l); }
static inline void wake_all(sct_bell *b) { pthread_cond_broadcast(b); }
static inline int begin_thread(sct_thread *t, void *(*run)(void *), void *argument) {
    return !pthread_create(t, NULL, run, argument);
}
static inline void end_thread(sct_thread t) { pthread_join(t, NULL); }
static inline void let_others_run(void) { sched_yield(); }
#define SCT_AT_FORK pthread_atfork

static inline int usual_threads(void) {
#if defined(__linux__)
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set)) return CPU_COUNT(&set);
#elif defined(__APPLE__)
    int quick = 0; /* slow processors would hold up the others, which wait for them */
    size_t size = sizeof quick;
    if (!sysctlbyname("hw.perflevel0.logicalcpu", &quick, &size, NULL, 0) && quick > 0)
        return quick;
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}
#endif
#endif
