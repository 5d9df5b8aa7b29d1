/* Products by blocks for AMX with int8: tiles of 16 rows by 64 columns times 64 columns of 16 tokens.
 *
 * Two tiles of rows and two panels give four tiles of sums. They are integers of one block of
 * columns; what AVX-512 does with them meanwhile, scaling and adding up, is as much work again.
 */
#include "blocks.h"

#if defined(SCT_HAS_AMX)
#include <immintrin.h>

#define CODE int8_t
#define OFFSET 0
#define PANEL_LANES 16
#define UNIT_ROWS 32
#define GROUP_ROWS 64
#define GROUP_PANELS 4

SCT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt,fma,bmi,bmi2,"
                 "amx-tile,amx-int8")

#include "blocks_avx512_bytes.inc"

/* The shapes of the eight tiles: sums 0 to 3, codes 4 and 5, panels 6 and 7. */
static void begin(int64_t group) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    const int columns = group < 64 ? (int)group : 64;
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? columns : 64);
        shapes.rows[i] = (uint8_t)(i > 5 ? columns / 4 : 16);
    }
    _tile_loadconfig(&shapes);
}

static void end(void) { _tile_release(); }

/* The sums of 16 rows and a panel of 16 tokens: dots, times the scale of the token, and of the row
 * where its type has groups. */
SCT_INLINE void add_up(const int32_t *dots, const sct_places *at, int row, int i, float *sums,
                       int64_t pitch) {
    const __m512 scale = _mm512_load_ps(at->panel_scales[i]);
    sums += row * pitch + 16 * i;
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) {
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots + 16 * r));
        const __m512 by =
            at->scales ? _mm512_mul_ps(scale, _mm512_set1_ps(at->scales[row + r])) : scale;
        _mm512_store_ps(sums + r * pitch,
                        _mm512_fmadd_ps(dot, by, _mm512_load_ps(sums + r * pitch)));
    }
}

SCT_INLINE void unit_of(const sct_places *at, float *sums, int64_t pitch, const int P) {
    int32_t dots[4][256] __attribute__((aligned(64)));
    const int8_t *codes = at->codes;
    _tile_zero(0);
    _tile_zero(2);
    if (P == 2) {
        _tile_zero(1);
        _tile_zero(3);
    }
    /* Codes are [rows][64 columns], a panel is [columns / 4][16 tokens][4 columns]: as AMX wants its
     * two sides. */
    for (int64_t k = 0; k < at->columns; k += 64) {
        _tile_loadd(4, codes + k, SCT_SCALED);
        _tile_loadd(6, at->panel[0] + 16 * k, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(5, codes + 16 * SCT_SCALED + k, SCT_SCALED);
        _tile_dpbssd(2, 5, 6);
        if (P == 2) {
            _tile_loadd(7, at->panel[1] + 16 * k, 64);
            _tile_dpbssd(1, 4, 7);
            _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_stored(0, dots[0], 64);
    _tile_stored(2, dots[2], 64);
    if (P == 2) {
        _tile_stored(1, dots[1], 64);
        _tile_stored(3, dots[3], 64);
    }
    for (int t = 0; t < 4; t++)
        if (P == 2 || t % 2 == 0) add_up(dots[t], at, t / 2 * 16, t % 2, sums, pitch);
}

static void unit(const sct_places *at, float *sums, int64_t pitch) {
    if (at->panels == 2) unit_of(at, sums, pitch, 2);
    else unit_of(at, sums, pitch, 1);
}

#include "blocks.inc"

SCT_TARGET_END

const sct_blocks sct_blocks_amx = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(CODE), .tile_bytes = 512 * 1024,
    .round = round_panel, .expand = expand, .multiply = multiply, .begin = begin, .end = end};
#endif
