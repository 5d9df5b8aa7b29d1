/* Products by blocks for NEON with i8mm: `smmla` multiplies eight columns of two rows with those of
 * two tokens, and gives four sums. */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "blocks.h"

SCT_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")

#include "blocks_neon_bytes.inc"

/* Eight columns of the two pairs of tokens of a panel. */
SCT_INLINE void token_pairs(const char *panel, int8x16_t pairs[2]) {
    const uint32x4_t four = vld1q_u32((const uint32_t *)panel);
    const uint32x4_t next = vld1q_u32((const uint32_t *)(panel + 16));
    pairs[0] = vreinterpretq_s8_u32(vzip1q_u32(four, next));
    pairs[1] = vreinterpretq_s8_u32(vzip2q_u32(four, next));
}

static void unit(const sct_places *at, float *sums, int64_t pitch) {
    int32x4_t dots[UNIT_ROWS / 2][4]; /* by pairs of rows and of tokens */
    for (int r = 0; r < UNIT_ROWS / 2; r++)
        for (int i = 0; i < 4; i++) dots[r][i] = vdupq_n_s32(0);
    for (int64_t k = 0; k < at->columns; k += 8) {
        int8x16_t tokens[4];
        token_pairs(at->panel[0] + 4 * k, tokens);
        token_pairs(at->panel[at->panels - 1] + 4 * k, tokens + 2);
#pragma GCC unroll 4
        for (int r = 0; r < UNIT_ROWS / 2; r++) {
            const int8_t *codes = (const int8_t *)at->codes + 2 * r * SCT_SCALED + k;
            const int8x16_t rows = vcombine_s8(vld1_s8(codes), vld1_s8(codes + SCT_SCALED));
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) dots[r][i] = vmmlaq_s32(dots[r][i], rows, tokens[i]);
        }
    }
    for (int r = 0; r < UNIT_ROWS; r++)
        for (int i = 0; i < at->panels; i++) {
            const int32x4_t first = dots[r / 2][2 * i], second = dots[r / 2][2 * i + 1];
            const int32x4_t row = r % 2 ? vcombine_s32(vget_high_s32(first), vget_high_s32(second))
                                        : vcombine_s32(vget_low_s32(first), vget_low_s32(second));
            add(row, at->panel_scales[i], at->scales ? at->scales + r : NULL,
                sums + r * pitch + 4 * i);
        }
}

#include "blocks.inc"

SCT_TARGET_END

const sct_blocks sct_blocks_i8mm = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(CODE), .tile_bytes = 128 * 1024,
    .round = round_panel, .expand = expand, .multiply = multiply};
#endif
