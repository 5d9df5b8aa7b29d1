/* Products by blocks for AMX with bfloat16: tiles of 16 rows by 32 columns times 32 columns of 16
 * tokens. Two tiles of rows and two panels give four tiles of sums. */
#include "blocks.h"

#if defined(SCT_HAS_AMX)
#include <immintrin.h>

#define PANEL_LANES 16
#define UNIT_ROWS 32
#define GROUP_ROWS 64
#define GROUP_PANELS 4

#include "avx512.inc"

SCT_TARGET_BEGIN(SCT_AVX512 ",amx-tile,amx-bf16")

#include "blocks_bfloats.inc"

/* All eight tiles have 16 rows of 64 bytes: sums 0 to 3, values 4 and 5, panels 6 and 7. */
static void begin(int64_t group) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {.palette = 1};
    (void)group;
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = 16;
    }
    _tile_loadconfig(&shapes);
}

static void end(void) { _tile_release(); }

SCT_INLINE void unit_of(const sct_float_places *at, float *sums, int64_t pitch, const int P) {
    float *after = sums + 16 * pitch; /* of the other 16 rows */
    _tile_zero(0);
    _tile_zero(2);
    if (P == 2) {
        _tile_zero(1);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < 64 * at->words; k += 32) {
        if (k % 64 == 0) sct_look_ahead(at->ahead);
        /* a word is [rows][64 columns], and a tile takes half of its columns */
        const uint16_t *values = at->values + k / 64 * UNIT_ROWS * 64 + k % 64;
        _tile_loadd(4, values, 128);
        _tile_loadd(6, at->panel[0] + 16 * k, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, values + 16 * 64, 128);
        _tile_dpbf16ps(2, 5, 6);
        if (P == 2) {
            _tile_loadd(7, at->panel[1] + 16 * k, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    /* all columns are done, so the sums are stored and not added */
    _tile_stored(0, sums, 4 * pitch);
    _tile_stored(2, after, 4 * pitch);
    if (P == 2) {
        _tile_stored(1, sums + 16, 4 * pitch);
        _tile_stored(3, after + 16, 4 * pitch);
    }
}

static void unit(const sct_float_places *at, float *sums, int64_t pitch) {
    if (at->panels == 2) unit_of(at, sums, pitch, 2);
    else unit_of(at, sums, pitch, 1);
}

SCT_TARGET_END

const sct_blocks sct_blocks_bfloats_amx = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(VALUE), .tile_bytes = 512 * 1024,
    .round = fill_panel, .expand = expand, .multiply = multiply, .begin = begin, .end = end};
#endif
