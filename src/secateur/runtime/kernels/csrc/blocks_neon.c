/* Products by blocks for NEON with dot products: a register has the sums of four tokens for one
 * row, and one product takes four columns of them. */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "blocks.h"

SCT_TARGET_BEGIN("arch=armv8.2-a+dotprod")

#include "blocks_neon_bytes.inc"

/* Four columns of eight rows and two panels: those in `lane` of the codes. */
#define FOUR_COLUMNS(lane)                                                             \
    do {                                                                               \
        const int8x16_t first = vld1q_s8(x + 4 * k + 16 * (lane));                     \
        const int8x16_t second = vld1q_s8(other + 4 * k + 16 * (lane));                \
        _Pragma("GCC unroll 8") for (int r = 0; r < UNIT_ROWS; r++) {                  \
            dots[r][0] = vdotq_laneq_s32(dots[r][0], first, codes[r], lane);           \
            dots[r][1] = vdotq_laneq_s32(dots[r][1], second, codes[r], lane);          \
        }                                                                              \
    } while (0)

static void unit(const sct_places *at, float *sums, int64_t pitch) {
    const int8_t *x = (const int8_t *)at->panel[0];
    const int8_t *other = (const int8_t *)at->panel[at->panels - 1];
    int32x4_t dots[UNIT_ROWS][2];
    for (int r = 0; r < UNIT_ROWS; r++) dots[r][0] = dots[r][1] = vdupq_n_s32(0);
    for (int64_t k = 0; k < at->columns; k += 16) {
        int8x16_t codes[UNIT_ROWS];
        for (int r = 0; r < UNIT_ROWS; r++)
            codes[r] = vld1q_s8((const int8_t *)at->codes + r * SCT_SCALED + k);
        FOUR_COLUMNS(0);
        FOUR_COLUMNS(1);
        FOUR_COLUMNS(2);
        FOUR_COLUMNS(3);
    }
    for (int r = 0; r < UNIT_ROWS; r++)
        for (int i = 0; i < at->panels; i++)
            add(dots[r][i], at->panel_scales[i], at->scales ? at->scales + r : NULL,
                sums + r * pitch + 4 * i);
}

#include "blocks.inc"

SCT_TARGET_END

const sct_blocks sct_blocks_neon = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(CODE), .tile_bytes = 128 * 1024,
    .round = round_panel, .expand = expand, .multiply = multiply};
#endif
