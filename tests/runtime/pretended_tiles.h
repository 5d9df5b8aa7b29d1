/* The tiles of AMX in plain C, by Intel's description of the instructions, for processors without
 * them. Put before blocks_amx.c and blocks_bfloats_amx.c with -include. */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static __thread struct {
    int configured, rows[8], bytes[8];
    uint8_t at[8][16][64];
} tiles;

static inline void pretended_config(const void *from) {
    const uint8_t *bytes = from;
    if (bytes[0] != 1) abort();
    memset(&tiles, 0, sizeof tiles);
    tiles.configured = 1;
    for (int i = 0; i < 8; i++) {
        uint16_t width;
        memcpy(&width, bytes + 16 + 2 * i, 2);
        tiles.bytes[i] = width;
        tiles.rows[i] = bytes[48 + i];
        if (width > 64 || tiles.rows[i] > 16) abort();
    }
}

static inline void pretended_release(void) { tiles.configured = 0; }

static inline void pretended_zero(int tile) {
    if (!tiles.configured) abort();
    memset(tiles.at[tile], 0, sizeof tiles.at[tile]);
}

static inline void pretended_load(int tile, const void *from, int64_t stride) {
    pretended_zero(tile);
    for (int r = 0; r < tiles.rows[tile]; r++)
        memcpy(tiles.at[tile][r], (const char *)from + r * stride, (size_t)tiles.bytes[tile]);
}

static inline void pretended_store(int tile, void *to, int64_t stride) {
    if (!tiles.configured) abort();
    for (int r = 0; r < tiles.rows[tile]; r++)
        memcpy((char *)to + r * stride, tiles.at[tile][r], (size_t)tiles.bytes[tile]);
}

static inline float pretended_float(const uint8_t *bfloat) {
    uint16_t half;
    memcpy(&half, bfloat, 2);
    const union { uint32_t u; float f; } x = {(uint32_t)half << 16};
    return x.f;
}

static inline void pretended_product(int sums, int a, int b, int floats) {
    if (!tiles.configured || tiles.rows[sums] != tiles.rows[a]) abort();
    if (tiles.bytes[a] / 4 != tiles.rows[b] || tiles.bytes[sums] != tiles.bytes[b]) abort();
    for (int m = 0; m < tiles.rows[sums]; m++)
        for (int n = 0; n < tiles.bytes[sums] / 4; n++) {
            union { int32_t i; float f; } sum;
            memcpy(&sum, tiles.at[sums][m] + 4 * n, 4);
            for (int k = 0; k < tiles.rows[b]; k++) {
                const uint8_t *x = tiles.at[a][m] + 4 * k, *y = tiles.at[b][k] + 4 * n;
                for (int j = 0; j < 4; j++) {
                    if (!floats) sum.i += (int8_t)x[j] * (int8_t)y[j];
                    else if (j % 2 == 0) sum.f += pretended_float(x + j) * pretended_float(y + j);
                }
            }
            memcpy(tiles.at[sums][m] + 4 * n, &sum, 4);
        }
}

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig pretended_config
#define _tile_release pretended_release
#define _tile_zero pretended_zero
#define _tile_loadd pretended_load
#define _tile_stored pretended_store
#define _tile_dpbssd(sums, a, b) pretended_product(sums, a, b, 0)
#define _tile_dpbf16ps(sums, a, b) pretended_product(sums, a, b, 1)
