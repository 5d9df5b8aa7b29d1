/* pthread.h; with SCT_OLDER_GLIBC, names of its functions that all versions of glibc since 2.17 have.
 *
 * glibc 2.34 moved libpthread into libc and gave its functions a new version; the old one stayed.
 * A library that is built there would ask for the new one and load nowhere else. So a wheel that
 * any machine builds is a manylinux_2_17 wheel. Not for programs that are linked statically.
 */
#ifndef SCT_OLDER_GLIBC_H
#define SCT_OLDER_GLIBC_H

#include <pthread.h>

#if defined(SCT_OLDER_GLIBC) && defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#ifdef __x86_64__
#define SCT_FIRST "2.2.5"
#define SCT_AFFINITY "2.3.4"
#else
#define SCT_FIRST "2.17"
#define SCT_AFFINITY "2.17"
#endif
#define SCT_VERSION(name, version) __asm__(".symver " #name "," #name "@GLIBC_" version)
SCT_VERSION(pthread_create, SCT_FIRST);
SCT_VERSION(pthread_join, SCT_FIRST);
SCT_VERSION(pthread_getaffinity_np, SCT_AFFINITY);
SCT_VERSION(pthread_setaffinity_np, SCT_AFFINITY);
#endif

#endif
