/* What this processor can do: the best tier, or one that was asked for. */
#include <string.h>

#include "blocks.h"
#include "internal.h"

typedef struct {
    const char *name;
    const sct_tier_code *code;
    const sct_blocks *integers, *bfloats, *float32; /* `bfloats` may be NULL */
} sct_tier_entry;

int sct_abi(void) { return SCT_ABI; }

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const sct_tier_entry all[] = {
#if defined(SCT_HAS_AMX)
    {"amx", &sct_code_avx512bf16, &sct_blocks_amx, &sct_blocks_bfloats_amx,
     &sct_blocks_float32_avx512},
#endif
    {"avx512bf16", &sct_code_avx512bf16, &sct_blocks_avx512, &sct_blocks_bfloats_avx512,
     &sct_blocks_float32_avx512},
    {"avx512", &sct_code_avx512, &sct_blocks_avx512, NULL, &sct_blocks_float32_avx512},
    {"avx2", &sct_code_avx2, &sct_blocks_avx2, NULL, &sct_blocks_float32_avx2},
};

/* Linux wants to be asked before the tiles are used: their state is large. */
static int may_use_tiles(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    const long request_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const int bf16 = d >> 22 & 1, tiles = d >> 24 & 1, int8 = d >> 25 & 1;
    return tiles && int8 && bf16 && !syscall(SYS_arch_prctl, request_permission, tile_data);
#else
    return 0;
#endif
}

static int can(const char *tier) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(tier, "avx2")) return avx2;
    if (!strcmp(tier, "avx512")) return avx512;
    const int bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    return strcmp(tier, "amx") ? bf16 : bf16 && may_use_tiles();
}

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#endif

static const sct_tier_entry all[] = {
    {"neon-i8mm", &sct_code_neon, &sct_blocks_i8mm, NULL, &sct_blocks_float32_neon},
    {"neon", &sct_code_neon, &sct_blocks_neon, NULL, &sct_blocks_float32_neon},
};

static int can(const char *tier) {
#if defined(__linux__)
    const unsigned long dot_product = 1ul << 20, i8mm = 1ul << 13; /* HWCAP_ASIMDDP, HWCAP2_I8MM */
    const int dots = !!(getauxval(AT_HWCAP) & dot_product);
    return strcmp(tier, "neon") ? dots && getauxval(AT_HWCAP2) & i8mm : dots;
#elif defined(__ARM_FEATURE_DOTPROD)
    return !strcmp(tier, "neon"); /* what the library was compiled for */
#else
    return (void)tier, 0;
#endif
}

#else

static const sct_tier_entry all[] = {{NULL}};
static int can(const char *tier) { (void)tier; return 0; }

#endif

static const sct_tier_entry none = {"none", NULL, NULL, NULL, NULL};
static const sct_tier_entry *chosen; /* NULL: not decided yet */

int sct_use_tier(const char *tier) {
    const sct_tier_entry *found = strcmp(tier, "none") ? NULL : &none;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].name && !strcmp(tier, all[i].name) && can(tier)) found = &all[i];
    if (!found) return -1;
    chosen = found;
    return 0;
}

static const sct_tier_entry *active(void) {
    for (size_t i = 0; !chosen && i < sizeof all / sizeof *all; i++)
        if (all[i].name) sct_use_tier(all[i].name);
    if (!chosen) chosen = &none;
    return chosen;
}

const char *sct_tier(void) { return active()->name; }
const sct_tier_code *sct_code(void) { return active()->code; }

const sct_blocks *sct_blocks_for(int64_t type, int exact) {
    const sct_tier_entry *tier = active();
    if (type == SCT_INT8 || type == SCT_INT4) return tier->integers;
    return type == SCT_BFLOAT16 && !exact && tier->bfloats ? tier->bfloats : tier->float32;
}
