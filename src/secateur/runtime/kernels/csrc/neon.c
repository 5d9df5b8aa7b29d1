/* Kernels for NEON with dot products (Armv8.2 and later: Cortex-A76, Neoverse, Apple M1). */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "internal.h"

#define PAIR_BLOCK 2 /* pairs are in their natural order */
#define LANES 8

SCT_TARGET_BEGIN("arch=armv8.2-a+dotprod")

#include "batches.inc"
#include "neon.inc"
#include "vector_math.inc"
#include "attention.inc"
#include "sample.inc"

static void attend(const sct_queries *q) { attend_by(q, in_floats); }

#include "int4.inc"

SCT_TARGET_END

static sct_shuffles shuffles;

SCT_AT_LOAD static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int place = 0, next = 0; place < 8; place++) {
            const int kept = mask >> place & 1;
            shuffles.one_byte[mask][place] = (uint8_t)(kept ? next : 0xff);
            for (int i = 0; i < 2; i++)
                shuffles.two_byte[mask][2 * place + i] = (uint8_t)(kept ? 2 * next + i : 0xff);
            for (int i = 0; mask < 16 && place < 4 && i < 4; i++)
                shuffles.four_byte[mask][4 * place + i] = (uint8_t)(kept ? 4 * next + i : 0xff);
            next += kept;
        }
}

SCT_TARGET_BEGIN("arch=armv8.2-a+dotprod")

const sct_shuffles *sct_neon_shuffles(void) { return &shuffles; }

SCT_INLINE int64_t start_of(const sct_matrix *m, int64_t row, int packed) {
    return packed ? m->offsets[row] : row * m->stride;
}

/* The next eight of two bytes. */
SCT_INLINE uint16x8_t eight_two_bytes(const uint16_t **v, uint8_t kept, int packed,
                                      const sct_shuffles *table) {
    const uint16x8_t raw = vld1q_u16(*v);
    *v += packed ? __builtin_popcount(kept) : 8;
    if (!packed) return raw;
    const uint8x16_t places = vld1q_u8(table->two_byte[kept]);
    return vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(raw), places));
}

SCT_INLINE float32x4_t four_floats(const float **v, uint8_t kept, int packed,
                                   const sct_shuffles *table) {
    const float32x4_t raw = vld1q_f32(*v);
    *v += packed ? __builtin_popcount(kept) : 4;
    if (!packed) return raw;
    const uint8x16_t places = vld1q_u8(table->four_byte[kept]);
    return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(raw), places));
}

/* The next eight values of a type as float32. */
SCT_INLINE void eight_values(const void **v, uint8_t kept, int packed, const int type,
                             const sct_shuffles *table, float32x4_t e[2]) {
    if (type == SCT_FLOAT32) {
        const float *at = *v;
        e[0] = four_floats(&at, kept & 15, packed, table);
        e[1] = four_floats(&at, kept >> 4, packed, table);
        *v = at;
        return;
    }
    const uint16_t *at = *v;
    const uint16x8_t both = eight_two_bytes(&at, kept, packed, table);
    *v = at;
    if (type == SCT_FLOAT16) {
        e[0] = vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(both)));
        e[1] = vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(both)));
    } else {
        e[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(both), 16));
        e[1] = vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(both), 16));
    }
}

/* Float values, float32 activations. */
SCT_INLINE void values_at(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                          float *y, int64_t y_stride, const int B, const int packed,
                          const int type) {
    const sct_shuffles *table = sct_neon_shuffles();
    for (int64_t row = begin; row < end; row++) {
        const void *v =
            (const char *)m->values + start_of(m, row, packed) * (type == SCT_FLOAT32 ? 4 : 2);
        float32x4_t sum[2][SCT_MAX_BATCH];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[0][b] = sum[1][b] = vdupq_n_f32(0.0f);
        for (int64_t at = 0; at < m->words * 64; at += 8) {
            const uint64_t kept = packed ? m->mask[row * m->words + at / 64] : 0;
            float32x4_t e[2];
            eight_values(&v, (uint8_t)(kept >> (at & 63)), packed, type, table, e);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                const float *x = in->floats + b * in->padded + at;
                sum[0][b] = vfmaq_f32(sum[0][b], e[0], vld1q_f32(x));
                sum[1][b] = vfmaq_f32(sum[1][b], e[1], vld1q_f32(x + 4));
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row] = vaddvq_f32(vaddq_f32(sum[0][b], sum[1][b]));
    }
}

SCT_INLINE void pairs(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    values_at(m, in, begin, end, y, y_stride, B, packed, SCT_BFLOAT16);
}
SCT_INLINE void halves(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                       float *y, int64_t y_stride, const int B, const int packed) {
    values_at(m, in, begin, end, y, y_stride, B, packed, SCT_FLOAT16);
}
SCT_INLINE void floats(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                       float *y, int64_t y_stride, const int B, const int packed) {
    values_at(m, in, begin, end, y, y_stride, B, packed, SCT_FLOAT32);
}
SCT_ROWS(rows_pairs, pairs)
SCT_ROWS(rows_halves, halves)
SCT_ROWS(rows_floats, floats)

/* int8 values and activations. */
SCT_INLINE void bytes(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    const sct_shuffles *table = sct_neon_shuffles();
    for (int64_t row = begin; row < end; row++) {
        const int8_t *v = (const int8_t *)m->values + start_of(m, row, packed);
        float32x4_t sum[SCT_MAX_BATCH];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[b] = vdupq_n_f32(0.0f);
        for (int64_t w = 0, block = 0, k = in->most; w < m->words; w += k, block++) {
            int32x4_t dots[2][SCT_MAX_BATCH]; /* lanes 8 to 15 have the scales of lanes 0 to 7 */
            k = sct_next_block(k, m->words - w);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) dots[0][b] = dots[1][b] = vdupq_n_s32(0);
            for (int64_t j = w; j < w + k; j++) {
                const uint64_t kept = packed ? m->mask[row * m->words + j] : 0;
#pragma GCC unroll 4
                for (int part = 0; part < 4; part++) {
                    const int8x16_t e =
                        sixteen_bytes(&v, (uint16_t)(kept >> (16 * part)), packed, table);
#pragma GCC unroll 8
                    for (int b = 0; b < B; b++) {
                        const int8_t *x = in->bytes + b * in->padded + 64 * j + 16 * part;
                        dots[part & 1][b] = vdotq_s32(dots[part & 1][b], e, vld1q_s8(x));
                    }
                }
            }
#pragma GCC unroll 8
            for (int b = 0; b < B; b++)
                for (int half = 0; half < 2; half++) {
                    const float *scales = in->scales + (b * in->blocks + block) * 16 + 4 * half;
                    sum[b] = vfmaq_f32(sum[b], vcvtq_f32_s32(dots[half][b]), vld1q_f32(scales));
                }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) y[b * y_stride + row] = vaddvq_f32(sum[b]) * m->scale[row];
    }
}
SCT_ROWS(rows_bytes, bytes)

/* The scales of the 16 lanes of a block of int4 that begins at word w. */
SCT_INLINE void lane_scales(const sct_matrix *m, int64_t row, int64_t w, int64_t k,
                            float scales[16]) {
    const uint8_t *codes = m->scales + row * groups_of(m);
    for (int64_t lane = 0; lane < 16; lane++) {
        const int64_t column = 64 * w + lane * 4 * k;
        const uint8_t code = column < m->columns ? codes[column / m->group] : 0;
        scales[lane] = one_scale(exponent_bits(m, row), code);
    }
}

/* int4 values and int8 activations in their order. */
SCT_INLINE void fours(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    const sct_shuffles *table = sct_neon_shuffles();
    for (int64_t row = begin; row < end; row++) {
        const uint8_t *v = bytes_of(m, row / 2, packed);
        const uint64_t *mask = masks_of(m, row / 2, packed);
        float32x4_t sum[SCT_MAX_BATCH];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[b] = vdupq_n_f32(0.0f);
        for (int64_t w = 0, block = 0, k = in->most; w < m->words; w += k, block++) {
            int32x4_t dots[4][SCT_MAX_BATCH];
            float scales[16];
            k = sct_next_block(k, m->words - w);
            for (int part = 0; part < 4; part++)
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) dots[part][b] = vdupq_n_s32(0);
            uint8_t room[1024];
            const int8_t *from = (const int8_t *)(packed ? v : dense_words(m, &v, k, room));
            for (int64_t j = w; j < w + k; j++) {
                const uint64_t kept = packed ? mask[j] : 0;
                for (int part = 0; part < 4; part++) {
                    const int8x16_t e = half_of(
                        sixteen_bytes(&from, (uint16_t)(kept >> (16 * part)), packed, table), row & 1);
#pragma GCC unroll 8
                    for (int b = 0; b < B; b++) {
                        const int8_t *x = in->bytes + b * in->padded + 64 * j;
                        dots[part][b] = vdotq_s32(dots[part][b], e, vld1q_s8(x + 16 * part));
                    }
                }
            }
            if (!m->of_four) v = (const uint8_t *)from;
            lane_scales(m, row, w, k, scales);
            for (int part = 0; part < 4; part++)
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const float *own = in->scales + (b * in->blocks + block) * 16 + 4 * part;
                    const float32x4_t both = vmulq_f32(vld1q_f32(own), vld1q_f32(scales + 4 * part));
                    sum[b] = vfmaq_f32(sum[b], vcvtq_f32_s32(dots[part][b]), both);
                }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) y[b * y_stride + row] = vaddvq_f32(sum[b]);
    }
}
SCT_ROWS(rows_fours, fours)

/* Eight values of a row as they are in a tile: int8 as bfloat16. */
SCT_INLINE void expand_eight(const sct_matrix *m, const void **v, uint8_t kept, void *to,
                             const sct_shuffles *table) {
    const int packed = m->mask != NULL;
    if (m->type == SCT_FLOAT32) {
        float32x4_t e[2];
        eight_values(v, kept, packed, SCT_FLOAT32, table, e);
        vst1q_f32(to, e[0]);
        vst1q_f32((float *)to + 4, e[1]);
    } else if (m->type == SCT_INT8) {
        const int8_t *at = *v;
        const int16x8_t e = vmovl_s8(eight_bytes(&at, kept, packed, table));
        const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(e)));
        const float32x4_t high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(e)));
        vst1_u16(to, vshrn_n_u32(vreinterpretq_u32_f32(low), 16)); /* exact: seven bits */
        vst1_u16((uint16_t *)to + 4, vshrn_n_u32(vreinterpretq_u32_f32(high), 16));
        *v = at;
    } else {
        const uint16_t *at = *v;
        vst1q_u16(to, eight_two_bytes(&at, kept, packed, table));
        *v = at;
    }
}

static void expand(const sct_matrix *m, int64_t begin, int64_t end, void *tile) {
    const int64_t width = m->words * 64, size = m->type == SCT_FLOAT32 ? 4 : 2;
    const int64_t stored = m->type == SCT_INT8 ? 1 : size;
    if (m->type == SCT_INT4) {
        expand_rows(m, begin, end, tile, m->mask != NULL);
        return;
    }
    for (int64_t row = begin; row < end; row++) {
        const void *v =
            (const char *)m->values + start_of(m, row, m->mask != NULL) * stored;
        for (int64_t at = 0; at < width; at += 8) {
            const uint64_t kept = m->mask ? m->mask[row * m->words + at / 64] : 0;
            expand_eight(m, &v, (uint8_t)(kept >> (at & 63)),
                         (char *)tile + ((row - begin) * width + at) * size, sct_neon_shuffles());
        }
    }
}

SCT_TARGET_END

const sct_tier_code sct_code_neon = {
    "neon", {rows_floats, rows_pairs, rows_halves, rows_bytes, rows_fours}, NULL, expand,
    prepare, attend, activate, highest, shares, rest};
#endif
