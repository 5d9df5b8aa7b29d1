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
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
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

/* The system wants to be asked before the tiles are used: their state is large. */
static int may_use_tiles(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    const long request_permission = 0x1023, tile_data = 18;
    return !syscall(SYS_arch_prctl, request_permission, tile_data);
#elif defined(_WIN32)
    typedef BOOL WINAPI enabler(DWORD64);
    const HMODULE kernel = GetModuleHandleA("kernel32.dll"); /* Windows 11 and Server 2022 have it */
    enabler *const enable = kernel ? (enabler *)(void *)GetProcAddress(
                                         kernel, "EnableProcessOptionalXStateFeatures")
                                   : NULL;
    return enable && enable(3 << 17);
#else
    return 0;
#endif
}

typedef struct {
    unsigned a, b, c, d;
} sct_leaf;

static sct_leaf leaf(unsigned number, unsigned part) {
    sct_leaf found = {0, 0, 0, 0};
    if (!__get_cpuid_count(number, part, &found.a, &found.b, &found.c, &found.d))
        return (sct_leaf){0, 0, 0, 0};
    return found;
}

/* Whether the system saves these registers when it changes threads: bits of XCR0. */
static int saves(unsigned registers) {
    if (!(leaf(1, 0).c & 1u << 27)) return 0; /* xgetbv */
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
#if defined(__APPLE__)
    if (low & 4) low |= 0xe0; /* it begins to save those of AVX-512 when they are used */
#endif
    return (low & registers) == registers;
}

static int has(unsigned word, unsigned bits) { return (word & bits) == bits; }

static int can(const char *tier) {
    const sct_leaf one = leaf(1, 0), seven = leaf(7, 0);
    const unsigned fma_avx_f16c_popcnt = 1u << 12 | 1u << 28 | 1u << 29 | 1u << 23;
    const unsigned avx2_bmi_bmi2 = 1u << 5 | 1u << 3 | 1u << 8;
    const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    const unsigned vbmi_vnni = 1u << 1 | 1u << 6 | 1u << 11, bf16 = 1u << 5;
    const unsigned tiles_int8_bf16 = 1u << 24 | 1u << 25 | 1u << 22;
    if (!has(one.c, fma_avx_f16c_popcnt) || !has(seven.b, avx2_bmi_bmi2) || !saves(6)) return 0;
    if (!strcmp(tier, "avx2")) return 1;
    if (!has(seven.b, f_dq_bw_vl) || !has(seven.c, vbmi_vnni) || !saves(0xe6)) return 0;
    if (!strcmp(tier, "avx512")) return 1;
    if (!has(leaf(7, 1).a, bf16)) return 0;
    if (strcmp(tier, "amx")) return 1;
    return has(seven.d, tiles_int8_bf16) && saves(3u << 17) && may_use_tiles();
}

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#endif

static const sct_tier_entry all[] = {
    {"neon-i8mm", &sct_code_neon, &sct_blocks_i8mm, NULL, &sct_blocks_float32_neon},
    {"neon", &sct_code_neon, &sct_blocks_neon, NULL, &sct_blocks_float32_neon},
};

#if defined(__APPLE__)
static int feature(const char *name, int unknown) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname(name, &found, &size, NULL, 0) ? unknown : found;
}
#endif

static int can(const char *tier) {
#if defined(__linux__)
    const unsigned long dot_product = 1ul << 20, i8mm = 1ul << 13; /* HWCAP_ASIMDDP, HWCAP2_I8MM */
    const int dots = !!(getauxval(AT_HWCAP) & dot_product);
    const int products = !!(getauxval(AT_HWCAP2) & i8mm);
#elif defined(__APPLE__) /* all have dot products; macOS 11 has no such name yet */
    const int dots = feature("hw.optional.arm.FEAT_DotProd", 1);
    const int products = feature("hw.optional.arm.FEAT_I8MM", 0);
#elif defined(_WIN32)
    const int dots = IsProcessorFeaturePresent(43); /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */
    const int products = IsProcessorFeaturePresent(66); /* PF_ARM_V82_I8MM_INSTRUCTIONS_AVAILABLE */
#else
    const int dots = 0, products = 0;
#endif
    return strcmp(tier, "neon") ? dots && products : dots;
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
