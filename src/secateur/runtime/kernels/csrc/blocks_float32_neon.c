/* Products by blocks in float32 for NEON: eight rows and two panels of four tokens. */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "blocks.h"

#define TIER sct_code_neon
#define PANEL_LANES 4
#define UNIT_ROWS 8
#define GROUP_ROWS 48
#define GROUP_PANELS 8

SCT_TARGET_BEGIN("arch=armv8.2-a+dotprod")

#include "blocks_neon.inc"

SCT_INLINE void widen_halves(const uint16_t *from, float *to) {
    const uint16x8_t x = vld1q_u16(from);
    vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(x))));
    vst1q_f32(to + 4, vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(x))));
}

#define UNIT_VECTOR float32x4_t
#define UNIT_LOAD(from) vld1q_f32(from)
#define UNIT_STORE(to, x) vst1q_f32(to, x)
#define UNIT_SPREAD(x) vdupq_n_f32(x)
#define UNIT_FMA(x, y, sum) vfmaq_f32(sum, x, y)
#include "blocks_float32.inc"

SCT_TARGET_END

const sct_blocks sct_blocks_float32_neon = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(VALUE), .tile_bytes = 256 * 1024,
    .round = fill_panel, .expand = expand, .multiply = multiply};
#endif
