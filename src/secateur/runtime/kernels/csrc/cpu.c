/* What this processor can do. */
#include <string.h>

#include "internal.h"

int sct_abi(void) { return SCT_ABI; }

#if defined(__x86_64__)

static int can(const char *tier) {
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
    if (!strcmp(tier, "avx2")) return avx2;
    if (!strcmp(tier, "avx512")) return avx512;
    return avx512 && __builtin_cpu_supports("avx512bf16");
}

static const sct_tier_code *const all[] = {&sct_code_avx512bf16, &sct_code_avx512, &sct_code_avx2};
static const sct_tier_code *chosen;
static int decided;

int sct_use_tier(const char *tier) {
    if (!strcmp(tier, "none")) {
        chosen = NULL;
        decided = 1;
        return 0;
    }
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(tier, all[i]->name) && can(tier)) {
            chosen = all[i];
            decided = 1;
            return 0;
        }
    return -1;
}

const sct_tier_code *sct_code(void) {
    for (size_t i = 0; !decided && i < sizeof all / sizeof *all; i++) sct_use_tier(all[i]->name);
    decided = 1;
    return chosen;
}

#else

int sct_use_tier(const char *tier) { return strcmp(tier, "none") ? -1 : 0; }
const sct_tier_code *sct_code(void) { return NULL; }

#endif

const char *sct_tier(void) {
    const sct_tier_code *code = sct_code();
    return code ? code->name : "none";
}
