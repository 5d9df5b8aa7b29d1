/* Loads a library of the kernels as ctypes does, multiplies with every tier, and compares with plain
 * loops: program LIBRARY. Prints the tiers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "secateur.h"

#if defined(_WIN32)
#include <windows.h>
static void *find(const char *file, const char *name) {
    const HMODULE library = LoadLibraryA(file);
    return library ? (void *)GetProcAddress(library, name) : NULL;
}
#else
#include <dlfcn.h>
static void *find(const char *file, const char *name) {
    void *library = dlopen(file, RTLD_NOW);
    return library ? dlsym(library, name) : NULL;
}
#endif

enum { ROWS = 37, COLUMNS = 203, WORDS = 4, TOKENS = 19 };

static int8_t values[ROWS * COLUMNS + 64];
static uint64_t mask[ROWS * WORDS];
static int64_t offsets[ROWS + 1];
static float scale[ROWS], dense[ROWS][COLUMNS], x[TOKENS][COLUMNS], y[TOKENS][ROWS];

static unsigned state = 1;
static int random_number(int most) {
    state = state * 1664525u + 1013904223u;
    return (int)(state >> 8) % most;
}

static void fill(void) {
    int64_t kept = 0;
    for (int r = 0; r < ROWS; r++) {
        scale[r] = 0.01f * (float)(1 + random_number(9));
        for (int c = 0; c < COLUMNS; c++) {
            if (random_number(2)) continue;
            values[kept] = (int8_t)(random_number(255) - 127);
            mask[r * WORDS + c / 64] |= 1ull << (c % 64);
            dense[r][c] = (float)values[kept++] * scale[r];
        }
        offsets[r + 1] = kept;
    }
    for (int t = 0; t < TOKENS; t++) /* their rounding to int8 is exact */
        for (int c = 0; c < COLUMNS; c++) x[t][c] = (float)(c < 128 ? 127 : random_number(255) - 127);
}

static int differ(int tokens) {
    int wrong = 0;
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ROWS; r++) {
            double sum = 0, size = 1e-9;
            for (int c = 0; c < COLUMNS; c++) {
                sum += (double)x[t][c] * dense[r][c];
                size += fabs((double)x[t][c] * dense[r][c]);
            }
            wrong += !(fabs(y[t][r] - sum) < 1e-2 * size);
            y[t][r] = NAN;
        }
    return wrong;
}

typedef int product(const sct_matrix *, int64_t, const void *, int64_t, void *, int64_t, int64_t);

int main(int count, char **words) {
    const char *file = count > 1 ? words[1] : "";
    int (*abi)(void) = (int (*)(void))find(file, "sct_abi");
    int (*use)(const char *) = (int (*)(const char *))find(file, "sct_use_tier");
    int (*threads)(int) = (int (*)(int))find(file, "sct_set_threads");
    product *few = (product *)find(file, "sct_linear"), *many = (product *)find(file, "sct_prompt");
    if (!abi || !use || !threads || !few || !many) return printf("nothing to call\n"), 2;
    if (abi() != SCT_ABI) return printf("another version\n"), 3;
    fill();
    sct_matrix m = {.rows = ROWS, .columns = COLUMNS, .words = WORDS, .type = SCT_INT8,
                    .values = values, .mask = mask, .offsets = offsets, .scale = scale};
    const char *tiers[] = {"amx", "avx512bf16", "avx512", "avx2", "neon-i8mm", "neon"};
    for (int i = 0; i < 6; i++) {
        if (use(tiers[i])) continue;
        for (int n = 1; n < 4; n++) {
            if (threads(n) != n) return printf("no threads\n"), 4;
            if (few(&m, SCT_FLOAT32, x, COLUMNS, y, ROWS, 8) || differ(8)) return 5;
            if (many(&m, SCT_FLOAT32, x, COLUMNS, y, ROWS, TOKENS) || differ(TOKENS)) return 6;
        }
        printf("%s\n", tiers[i]);
    }
    return 0;
}
