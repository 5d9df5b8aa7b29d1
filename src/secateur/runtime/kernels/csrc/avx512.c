/* Kernels for AVX-512 with VBMI2 and VNNI (Ice Lake, Zen 4 and later), and BF16 where it is there.
 *
 * `vpexpand` puts the next kept values where the mask has ones and zeros elsewhere: a register of
 * the dense row, made of one load. What follows is the dense kernel.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "internal.h"

#include "avx512.inc"

#define PAIR_BLOCK 32
#define LANES 16
SCT_TARGET_BEGIN(SCT_AVX512)

#include "batches.inc"
#include "vector_math.inc"
#include "attention.inc"
#include "attention_avx512.inc"
#include "sample.inc"

SCT_INLINE const uint64_t *mask_of(const sct_matrix *m, int64_t row) {
    return m->mask + row * m->words;
}

SCT_INLINE int64_t start_of(const sct_matrix *m, int64_t row, int packed) {
    return packed ? m->offsets[row] : row * m->stride;
}

/* A line of the mask for each eight words. */
SCT_INLINE void ask_for_mask(const sct_matrix *m, int64_t row, int64_t w, int packed) {
    if (packed && (w & 7) == 0)
        _mm_prefetch((const char *)(mask_of(m, row) + w + MASK_AHEAD_WORDS), _MM_HINT_T0);
}

#define NO_MASK(m, row) ((m)->mask ? mask_of(m, row) : NULL)

/* bfloat16 values, float32 activations. */
SCT_INLINE void pairs(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000u);
    for (int64_t row = begin; row < end; row++) {
        const uint16_t *v = (const uint16_t *)m->values + start_of(m, row, packed);
        __m512 even[SCT_MAX_BATCH], odd[SCT_MAX_BATCH];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) even[b] = odd[b] = _mm512_setzero_ps();
        for (int64_t w = 0; w < m->words; w++) {
            __m512i e[2];
            ask_for(v);
            if (!packed) ask_for(v + 32);
            ask_for_mask(m, row, w, packed);
            v = two_bytes(v, packed ? mask_of(m, row)[w] : 0, packed, e);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                /* A bfloat16 is the upper half of a float32: of 32 values, the even ones are moved
                 * there and the odd ones are there already. x lies in the same order. */
                __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(e[h], 16));
                __m512 second = _mm512_castsi512_ps(_mm512_and_si512(e[h], upper));
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const float *x = in->floats + b * in->padded + w * 64 + h * 32;
                    even[b] = _mm512_fmadd_ps(first, _mm512_loadu_ps(x), even[b]);
                    odd[b] = _mm512_fmadd_ps(second, _mm512_loadu_ps(x + 16), odd[b]);
                }
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row] = _mm512_reduce_add_ps(_mm512_add_ps(even[b], odd[b]));
    }
}
SCT_ROWS(rows_pairs, pairs)

/* float16 values, float32 activations. */
SCT_INLINE void halves(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                       float *y, int64_t y_stride, const int B, const int packed) {
    for (int64_t row = begin; row < end; row++) {
        const uint16_t *v = (const uint16_t *)m->values + start_of(m, row, packed);
        __m512 low[SCT_MAX_BATCH], high[SCT_MAX_BATCH];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) low[b] = high[b] = _mm512_setzero_ps();
        for (int64_t w = 0; w < m->words; w++) {
            __m512i e[2];
            ask_for(v);
            if (!packed) ask_for(v + 32);
            ask_for_mask(m, row, w, packed);
            v = two_bytes(v, packed ? mask_of(m, row)[w] : 0, packed, e);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                __m512 first = _mm512_cvtph_ps(_mm512_castsi512_si256(e[h]));
                __m512 second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(e[h], 1));
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const float *x = in->floats + b * in->padded + w * 64 + h * 32;
                    low[b] = _mm512_fmadd_ps(first, _mm512_loadu_ps(x), low[b]);
                    high[b] = _mm512_fmadd_ps(second, _mm512_loadu_ps(x + 16), high[b]);
                }
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row] = _mm512_reduce_add_ps(_mm512_add_ps(low[b], high[b]));
    }
}
SCT_ROWS(rows_halves, halves)

/* float32 values and activations. */
SCT_INLINE void floats(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                       float *y, int64_t y_stride, const int B, const int packed) {
    for (int64_t row = begin; row < end; row++) {
        const float *v = (const float *)m->values + start_of(m, row, packed);
        const uint64_t *mask = packed ? mask_of(m, row) : NULL;
        __m512 sum[2][SCT_MAX_BATCH]; /* two, so that a product seldom waits for the one before */
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[0][b] = sum[1][b] = _mm512_setzero_ps();
        for (int64_t w = 0; w < m->words; w++) {
            uint64_t kept = packed ? mask[w] : 0;
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                __mmask16 here = (__mmask16)(kept >> (16 * part));
                __m512 e = packed ? _mm512_maskz_expand_ps(here, _mm512_castsi512_ps(load(v)))
                                  : _mm512_loadu_ps(v);
                v += packed ? __builtin_popcount(here) : 16;
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const float *x = in->floats + b * in->padded + w * 64 + part * 16;
                    sum[part & 1][b] = _mm512_fmadd_ps(e, _mm512_loadu_ps(x), sum[part & 1][b]);
                }
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row] = _mm512_reduce_add_ps(_mm512_add_ps(sum[0][b], sum[1][b]));
    }
}
SCT_ROWS(rows_floats, floats)

/* int8 values and activations. vpdpbusd wants one side unsigned, so weights are multiplied as
 * w + 128, and sums begin with −128 · Σ x. Two rows at once share what is loaded of x. */
#define BYTES_STEP(w)                                                                          \
    do {                                                                                       \
        __m512i e[2];                                                                          \
        _Pragma("GCC unroll 2") for (int r = 0; r < R; r++) {                                  \
            e[r] = load(v[r]);                                                                 \
            ask_in_steps(v[r]);                                                                \
            if (packed) {                                                                      \
                const uint64_t kept = mask_of(m, row + r)[w];                                  \
                e[r] = spread_bytes(kept, e[r]);                                   \
                v[r] += __builtin_popcountll(kept);                                            \
            } else {                                                                           \
                v[r] += 64;                                                                    \
            }                                                                                  \
            e[r] = _mm512_xor_si512(e[r], top);                                                \
        }                                                                                      \
        _Pragma("GCC unroll 8") for (int b = 0; b < B; b++) {                                  \
            const __m512i x = _mm512_load_si512(in->bytes + b * in->padded + (w) * 64);        \
            _Pragma("GCC unroll 2") for (int r = 0; r < R; r++)                                \
                dots[r][b] = _mm512_dpbusd_epi32(dots[r][b], e[r], x);                         \
        }                                                                                      \
    } while (0)

SCT_INLINE void bytes_at(const sct_matrix *m, const sct_input *in, int64_t row, float *y,
                         int64_t y_stride, const int B, const int packed, const int R) {
    const __m512i top = _mm512_set1_epi8((char)0x80);
    const int8_t *v[2];
    __m512 sum[2][SCT_MAX_BATCH];
    for (int r = 0; r < R; r++) {
        v[r] = (const int8_t *)m->values + start_of(m, row + r, packed);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[r][b] = _mm512_setzero_ps();
    }
    /* A block of k words has one scale for each lane: its sum stays integers, and is scaled once. */
    for (int64_t w = 0, block = 0, k = in->most; w < m->words; w += k, block++) {
        __m512i dots[2][SCT_MAX_BATCH];
        k = sct_next_block(k, m->words - w);
        for (int r = 0; r < R; r++) ask_for_mask(m, row + r, w, packed);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            const __m512i excess = _mm512_load_si512(in->excess + (b * in->blocks + block) * 16);
            for (int r = 0; r < R; r++) dots[r][b] = excess;
        }
        int64_t j = w; /* by fours, so that the loop itself costs little */
        for (; j + 4 <= w + k; j += 4) {
            BYTES_STEP(j);
            BYTES_STEP(j + 1);
            BYTES_STEP(j + 2);
            BYTES_STEP(j + 3);
        }
        for (; j < w + k; j++) BYTES_STEP(j);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            const __m512 scales = _mm512_load_ps(in->scales + (b * in->blocks + block) * 16);
#pragma GCC unroll 2
            for (int r = 0; r < R; r++)
                sum[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][b]), scales, sum[r][b]);
        }
    }
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row + r] = _mm512_reduce_add_ps(sum[r][b]) * m->scale[row + r];
}
SCT_TWO_ROWS(bytes, bytes_at)
SCT_ROWS(rows_bytes, bytes)

/* int8 as bfloat16: integers up to 127 are exact. */
SCT_INLINE void store_integers(uint16_t *to, __m512i e) {
    for (int part = 0; part < 4; part++) {
        __m128i quarter = part == 0   ? _mm512_castsi512_si128(e)
                          : part == 1 ? _mm512_extracti32x4_epi32(e, 1)
                          : part == 2 ? _mm512_extracti32x4_epi32(e, 2)
                                      : _mm512_extracti32x4_epi32(e, 3);
        __m512 numbers = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter));
        /* the upper half of a float32 is the bfloat16; the lower one of such integers is 0 */
        __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(numbers), 16);
        _mm256_storeu_si256((__m256i *)(to + part * 16), _mm512_cvtepi32_epi16(upper));
    }
}

static void expand(const sct_matrix *m, int64_t begin, int64_t end, void *tile) {
    if (m->type == SCT_INT4) {
        sct_expand_int4_avx512(m, begin, end, tile);
        return;
    }
    const int64_t width = m->words * 64;
    const int packed = m->mask != NULL;
    for (int64_t row = begin; row < end; row++) {
        const uint64_t *mask = NO_MASK(m, row);
        const char *v = (const char *)m->values;
        const int64_t start = start_of(m, row, packed), to = (row - begin) * width;
        const int size = m->type == SCT_FLOAT32 ? 4 : m->type == SCT_INT8 ? 1 : 2;
        v += start * size;
        for (int64_t w = 0; w < m->words; w++) {
            uint64_t kept = packed ? mask[w] : ~0ull;
            if (m->type == SCT_INT8) {
                __m512i e = packed ? _mm512_maskz_expand_epi8(kept, load(v)) : load(v);
                store_integers((uint16_t *)tile + to + w * 64, e);
            } else if (m->type == SCT_FLOAT32) {
                const char *u = v;
                for (int part = 0; part < 4; part++) {
                    __mmask16 here = (__mmask16)(kept >> (16 * part));
                    __m512i e = _mm512_maskz_expand_epi32(here, load(u));
                    _mm512_storeu_si512((float *)tile + to + w * 64 + part * 16, e);
                    u += 4 * __builtin_popcount(here);
                }
            } else {
                __m512i e[2];
                two_bytes((const uint16_t *)v, kept, packed, e);
                _mm512_storeu_si512((uint16_t *)tile + to + w * 64, e[0]);
                _mm512_storeu_si512((uint16_t *)tile + to + w * 64 + 32, e[1]);
            }
            v += size * __builtin_popcountll(kept);
        }
    }
}

SCT_TARGET_END
SCT_TARGET_BEGIN(SCT_AVX512 ",avx512bf16")

/* bfloat16 values and activations, two products for each 32 bits at once. Two rows share each load of
 * x. A row has one sum, so that its order is the same however many vectors there are. */
SCT_INLINE void bfloats_at(const sct_matrix *m, const sct_input *in, int64_t row, float *y,
                           int64_t y_stride, const int B, const int packed, const int R) {
    const uint16_t *v[2];
    __m512 sum[2][SCT_MAX_BATCH];
    for (int r = 0; r < R; r++) {
        v[r] = (const uint16_t *)m->values + start_of(m, row + r, packed);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sum[r][b] = _mm512_setzero_ps();
    }
    for (int64_t w = 0; w < m->words; w++) {
        __m512i e[2][2];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            ask_for(v[r]);
            if (!packed) ask_for(v[r] + 32);
            ask_for_mask(m, row + r, w, packed);
            v[r] = two_bytes(v[r], packed ? mask_of(m, row + r)[w] : 0, packed, e[r]);
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            const uint16_t *x = in->bfloats + b * in->padded + w * 64;
            const __m512bh first = (__m512bh)_mm512_load_si512(x);
            const __m512bh second = (__m512bh)_mm512_load_si512(x + 32);
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) {
                sum[r][b] = _mm512_dpbf16_ps(sum[r][b], (__m512bh)e[r][0], first);
                sum[r][b] = _mm512_dpbf16_ps(sum[r][b], (__m512bh)e[r][1], second);
            }
        }
    }
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + row + r] = _mm512_reduce_add_ps(sum[r][b]);
}
SCT_TWO_ROWS(bfloats, bfloats_at)
SCT_ROWS(rows_bfloats, bfloats)

#include "attention_bf16.inc"

SCT_TARGET_END

#define ROWS {rows_floats, rows_pairs, rows_halves, rows_bytes, sct_rows_int4_avx512}

const sct_tier_code sct_code_avx512 = {"avx512", ROWS,     NULL,    expand, prepare,
                                       attend,   activate, highest, shares, rest};
const sct_tier_code sct_code_avx512bf16 = {"avx512bf16", ROWS,   rows_bfloats, expand,
                                           prepare,      attend_bfloats, activate,     highest,
                                           shares,       rest};
#endif
