/* Kernels for AVX2 with FMA and F16C (every desktop processor since about 2013).
 *
 * There is no expand instruction; `pshufb` with a table of 256 shuffles does it for eight weights
 * at a time: entry m of the table says from which of the next values each of eight places is
 * filled, or that it stays zero.
 */
#if defined(__x86_64__)
#include <immintrin.h>

#include "internal.h"

#define PAIR_BLOCK 16
#define LANES 8

static uint8_t one_byte[256][8] __attribute__((aligned(64)));   /* 0x80: zero */
static uint8_t two_byte[256][16] __attribute__((aligned(64)));

SCT_AT_LOAD static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int place = 0, next = 0; place < 8; place++) {
            int kept = mask >> place & 1;
            one_byte[mask][place] = (uint8_t)(kept ? next : 0x80);
            two_byte[mask][2 * place] = (uint8_t)(kept ? 2 * next : 0x80);
            two_byte[mask][2 * place + 1] = (uint8_t)(kept ? 2 * next + 1 : 0x80);
            next += kept;
        }
}

SCT_TARGET_BEGIN("avx2,fma,f16c,popcnt,bmi,bmi2")

#include "batches.inc"
#include "vector_math.inc"
#include "attention.inc"
#include "sample.inc"

static void attend(const sct_queries *q) { attend_by(q, in_floats); }

SCT_INLINE float sum_of(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

SCT_INLINE int64_t start_of(const sct_matrix *m, int64_t row, int packed) {
    return packed ? m->offsets[row] : row * m->stride;
}

/* The next eight values of two bytes, and how far to go on. */
SCT_INLINE __m128i eight_two_bytes(const uint16_t **v, uint8_t kept, int packed) {
    __m128i raw = _mm_loadu_si128((const __m128i *)*v); /* eight values, of which some are used */
    if (!packed) {
        *v += 8;
        return raw;
    }
    *v += __builtin_popcount(kept);
    return _mm_shuffle_epi8(raw, _mm_load_si128((const __m128i *)two_byte[kept]));
}

SCT_INLINE __m256i sixteen_two_bytes(const uint16_t **v, uint64_t kept, int packed) {
    if (!packed) {
        *v += 16;
        return _mm256_loadu_si256((const __m256i *)(*v - 16));
    }
    __m128i low = eight_two_bytes(v, (uint8_t)kept, 1);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   eight_two_bytes(v, (uint8_t)(kept >> 8), 1), 1);
}

SCT_INLINE __m256 eight_floats(const float **v, uint8_t kept, int packed) {
    __m256 raw = _mm256_loadu_ps(*v);
    if (!packed) {
        *v += 8;
        return raw;
    }
    *v += __builtin_popcount(kept);
    /* Lanes of 32 bits have no shuffle with zeros. 0x80 widens to a negative number: the permutation
     * takes its lowest bits, and its sign, spread over the lane, clears what came there. */
    __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)one_byte[kept]));
    __m256 there = _mm256_permutevar8x32_ps(raw, places);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(places, 31)), there);
}

SCT_INLINE __m128i eight_bytes(const int8_t **v, uint8_t kept, int packed) {
    __m128i raw = _mm_loadl_epi64((const __m128i *)*v);
    if (!packed) {
        *v += 8;
        return raw;
    }
    *v += __builtin_popcount(kept);
    return _mm_shuffle_epi8(raw, _mm_loadl_epi64((const __m128i *)one_byte[kept]));
}

SCT_INLINE __m256i thirty_two_bytes(const int8_t **v, uint32_t kept, int packed) {
    if (!packed) {
        *v += 32;
        return _mm256_loadu_si256((const __m256i *)(*v - 32));
    }
    __m128i a = eight_bytes(v, (uint8_t)kept, 1), b = eight_bytes(v, (uint8_t)(kept >> 8), 1);
    __m128i c = eight_bytes(v, (uint8_t)(kept >> 16), 1);
    __m128i d = eight_bytes(v, (uint8_t)(kept >> 24), 1);
    return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}

/* bfloat16 values, float32 activations. A sum waits four cycles for itself, so there are four of
 * them. Registers allow that for two vectors; more of them read a row, which is in the first cache
 * then, once more for each two. So the order of sums is the same for any number. */
SCT_INLINE void pair(const sct_matrix *m, const sct_input *in, int64_t row, int first_vector,
                     float *y, int64_t y_stride, const int B, const int packed) {
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000u);
    const uint16_t *v = (const uint16_t *)m->values + start_of(m, row, packed);
    __m256 even[2][2], odd[2][2];
#pragma GCC unroll 2
    for (int b = 0; b < B; b++)
        even[0][b] = odd[0][b] = even[1][b] = odd[1][b] = _mm256_setzero_ps();
    for (int64_t w = 0; w < m->words; w++) {
        uint64_t kept = packed ? m->mask[row * m->words + w] : 0;
#pragma GCC unroll 4
        for (int h = 0; h < 4; h++) {
            const int s = h & 1;
            __m256i e = sixteen_two_bytes(&v, kept >> (16 * h), packed);
            __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(e, 16));
            __m256 second = _mm256_castsi256_ps(_mm256_and_si256(e, upper));
#pragma GCC unroll 2
            for (int b = 0; b < B; b++) {
                const float *x = in->floats + (first_vector + b) * in->padded + w * 64 + h * 16;
                even[s][b] = _mm256_fmadd_ps(first, _mm256_loadu_ps(x), even[s][b]);
                odd[s][b] = _mm256_fmadd_ps(second, _mm256_loadu_ps(x + 8), odd[s][b]);
            }
        }
    }
#pragma GCC unroll 2
    for (int b = 0; b < B; b++)
        y[(first_vector + b) * y_stride + row] =
            sum_of(_mm256_add_ps(_mm256_add_ps(even[0][b], odd[0][b]),
                                 _mm256_add_ps(even[1][b], odd[1][b])));
}

SCT_INLINE void pairs(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    for (int64_t row = begin; row < end; row++) {
        int b = 0;
        for (; b + 2 <= B; b += 2) pair(m, in, row, b, y, y_stride, 2, packed);
        if (b < B) pair(m, in, row, b, y, y_stride, 1, packed);
    }
}
SCT_ROWS(rows_pairs, pairs)

/* float16 (`half`) or float32 values, float32 activations. */
SCT_INLINE void eights(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                       float *y, int64_t y_stride, const int B, const int packed, const int half) {
    for (int64_t row = begin; row < end; row++) {
        const int64_t start = start_of(m, row, packed);
        const uint16_t *h = (const uint16_t *)m->values + start;
        const float *f = (const float *)m->values + start;
        __m256 sum[2][SCT_MAX_BATCH];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[0][b] = sum[1][b] = _mm256_setzero_ps();
        for (int64_t w = 0; w < m->words; w++) {
            uint64_t kept = packed ? m->mask[row * m->words + w] : 0;
#pragma GCC unroll 8
            for (int part = 0; part < 8; part++) {
                uint8_t here = (uint8_t)(kept >> (8 * part));
                __m256 e = half ? _mm256_cvtph_ps(eight_two_bytes(&h, here, packed))
                                : eight_floats(&f, here, packed);
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const float *x = in->floats + b * in->padded + w * 64 + part * 8;
                    sum[part & 1][b] = _mm256_fmadd_ps(e, _mm256_loadu_ps(x), sum[part & 1][b]);
                }
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row] = sum_of(_mm256_add_ps(sum[0][b], sum[1][b]));
    }
}
SCT_INLINE void halves(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                       float *y, int64_t y_stride, const int B, const int packed) {
    eights(m, in, begin, end, y, y_stride, B, packed, 1);
}
SCT_INLINE void floats(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                       float *y, int64_t y_stride, const int B, const int packed) {
    eights(m, in, begin, end, y, y_stride, B, packed, 0);
}
SCT_ROWS(rows_halves, halves)
SCT_ROWS(rows_floats, floats)

/* int8 values and activations. vpmaddubsw wants one side unsigned and saturates at 16 bits, so it
 * gets |w|, and the sign of w goes to x. */
SCT_INLINE void bytes(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t row = begin; row < end; row++) {
        const int8_t *v = (const int8_t *)m->values + start_of(m, row, packed);
        __m256 sum[SCT_MAX_BATCH];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[b] = _mm256_setzero_ps();
        for (int64_t w = 0, block = 0, k = in->most; w < m->words; w += k, block++) {
            __m256i dots[SCT_MAX_BATCH];
            k = sct_next_block(k, m->words - w);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) dots[b] = _mm256_setzero_si256();
            for (int64_t half = 2 * w; half < 2 * (w + k); half++) {
                const uint64_t kept = packed ? m->mask[row * m->words + half / 2] : 0;
                const __m256i e =
                    thirty_two_bytes(&v, (uint32_t)(kept >> (32 * (half & 1))), packed);
                const __m256i size = _mm256_abs_epi8(e);
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const void *at = in->bytes + b * in->padded + half * 32;
                    /* at most 2 · 127 · 127 = 32,258: the sum of two products does not saturate */
                    const __m256i x = _mm256_sign_epi8(_mm256_load_si256(at), e);
                    const __m256i products = _mm256_maddubs_epi16(size, x);
                    dots[b] = _mm256_add_epi32(dots[b], _mm256_madd_epi16(products, ones));
                }
            }
            /* lanes 8 to 15 of a block have the scales of lanes 0 to 7, as k divides 8 */
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                const __m256 scale = _mm256_load_ps(in->scales + (b * in->blocks + block) * 16);
                sum[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[b]), scale, sum[b]);
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row] = sum_of(sum[b]) * m->scale[row];
    }
}
SCT_ROWS(rows_bytes, bytes)

static void expand(const sct_matrix *m, int64_t begin, int64_t end, void *tile) {
    if (m->type == SCT_INT4) {
        sct_expand_int4_avx2(m, begin, end, tile);
        return;
    }
    const int64_t width = m->words * 64;
    const int packed = m->mask != NULL;
    for (int64_t row = begin; row < end; row++) {
        const int64_t start = start_of(m, row, packed);
        const uint16_t *h = (const uint16_t *)m->values + start;
        const float *f = (const float *)m->values + start;
        const int8_t *i = (const int8_t *)m->values + start;
        for (int64_t at = 0; at < width; at += 8) {
            uint64_t kept = packed ? m->mask[row * m->words + at / 64] : 0;
            uint8_t here = (uint8_t)(kept >> (at & 63));
            const int64_t to = (row - begin) * width + at;
            if (m->type == SCT_FLOAT32) {
                _mm256_storeu_ps((float *)tile + to, eight_floats(&f, here, packed));
            } else if (m->type == SCT_INT8) {
                __m256i whole = _mm256_cvtepi8_epi32(eight_bytes(&i, here, packed));
                __m256i bits = _mm256_castps_si256(_mm256_cvtepi32_ps(whole));
                bits = _mm256_srli_epi32(bits, 16); /* exact: integers of seven bits */
                __m128i two = _mm_packus_epi32(_mm256_castsi256_si128(bits),
                                               _mm256_extracti128_si256(bits, 1));
                _mm_storeu_si128((__m128i *)((uint16_t *)tile + to), two);
            } else {
                __m128i e = eight_two_bytes(&h, here, packed);
                _mm_storeu_si128((__m128i *)((uint16_t *)tile + to), e);
            }
        }
    }
}

SCT_TARGET_END

const sct_tier_code sct_code_avx2 = {
    "avx2", {rows_floats, rows_pairs, rows_halves, rows_bytes, sct_rows_int4_avx2}, NULL, expand,
    prepare, attend, activate, highest, shares, rest};
#endif
