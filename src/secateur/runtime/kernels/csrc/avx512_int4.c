/* int4 weights with AVX-512: `vpexpandb` puts the bytes of kept weights in their places, the lower
 * or upper half of each is taken, and vpdpbusd multiplies it with activations. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "blocks.h"

#include "avx512.inc"

SCT_TARGET_BEGIN(SCT_AVX512)

#include "batches.inc"

#define SCALES_AHEAD_BYTES 1024

/* The halves of 64 bytes as q + 8, the upper ones times 16: (bytes & half) ^ eight. What is not
 * kept is 0, and becomes 8 as well. */
SCT_INLINE __m512i half_of(__m512i bytes, const int high) {
    const __m512i half = _mm512_set1_epi8(high ? (char)0xf0 : 0x0f);
    const __m512i eight = _mm512_set1_epi8(high ? (char)0x80 : 0x08);
    return _mm512_ternarylogic_epi64(bytes, half, eight, 0x6a);
}

static const uint8_t *one_word(const uint8_t *v, uint64_t kept, int packed, int high,
                               int8_t out[64]) {
    __m512i e = load(v);
    if (packed) e = _mm512_maskz_expand_epi8(kept, e);
    if (high) e = _mm512_srli_epi16(e, 4);
    _mm512_storeu_si512(out, _mm512_sub_epi8(half_of(e, 0), _mm512_set1_epi8(8)));
    return v + (packed ? __builtin_popcountll(kept) : 64);
}

#include "int4.inc"

const uint8_t *sct_word_avx512(const uint8_t *v, uint64_t kept, int packed, int high,
                               int8_t out[64]) {
    return one_word(v, kept, packed, high, out);
}

/* The scales of 16 lanes, without the exponent of the row. */
SCT_INLINE __m512 scales_of(const uint8_t *codes, int together, int32_t exponent) {
    const __m128i which = _mm_load_si128((const __m128i *)scale_of_lane[together]);
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)codes), which);
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 19);
    return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(exponent)));
}

/* Where the two rows of a pair are read. */
typedef struct {
    const uint8_t *v[2];
    const uint64_t *mask;
} sct_place;

/* The next word of both rows. */
SCT_INLINE void two_words(sct_place *at, const int packed, __m512i e[2]) {
    ask_in_steps(at->v[0]);
    if (!packed) {
        const __m512i both = load(at->v[0]);
        e[0] = half_of(both, 0);
        e[1] = half_of(both, 1);
        at->v[0] += 64;
        return;
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++) {
        const uint64_t kept = at->mask[r];
        e[r] = half_of(_mm512_maskz_expand_epi8(kept, load(at->v[r])), r);
        at->v[r] += __builtin_popcountll(kept);
    }
    at->mask += 2;
}

#define STEP(j, s)                                                                             \
    do {                                                                                       \
        __m512i e[2];                                                                          \
        two_words(&at, packed, e);                                                             \
        _Pragma("GCC unroll 8") for (int b = 0; b < B; b++) {                                  \
            const __m512i x_ = _mm512_load_si512(x + b * in->padded + 64 * (j));               \
            dots[0][s][b] = _mm512_dpbusd_epi32(dots[0][s][b], e[0], x_);                      \
            dots[1][s][b] = _mm512_dpbusd_epi32(dots[1][s][b], e[1], x_);                      \
        }                                                                                      \
    } while (0)

/* Few activations: two sums for each row that do not wait for each other. */
SCT_INLINE void pair_at(const sct_matrix *m, const sct_input *in, int64_t pair, float *y,
                        int64_t y_stride, const int B, const int packed) {
    const int S = B <= 2 ? 2 : 1;
    sct_place at = {{bytes_of(m, pair, packed), bytes_of(m, pair, packed)},
                    masks_of(m, pair, packed)};
    const uint8_t *codes = m->scales + 2 * pair * groups_of(m);
    const int8_t *x = in->bytes;
    const int64_t groups = groups_of(m);
    __m512 sum[2][SCT_MAX_BATCH];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sum[0][b] = sum[1][b] = _mm512_setzero_ps();
    for (int64_t w = 0, block = 0, k = in->most; w < m->words; w += k, block++) {
        __m512i dots[2][2][SCT_MAX_BATCH];
        k = sct_next_block(k, m->words - w);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            dots[0][0][b] = dots[0][1][b] = dots[1][0][b] = dots[1][1][b] =
                _mm512_setzero_si512();
        int64_t j = 0;
        for (; j + 4 <= k; j += 4) {
            if (packed) _mm_prefetch((const char *)(at.mask + MASK_AHEAD_WORDS), _MM_HINT_T0);
            STEP(j, 0);
            STEP(j + 1, S - 1);
            STEP(j + 2, 0);
            STEP(j + 3, S - 1);
        }
        for (; j < k; j++) STEP(j, 0);
        x += 64 * k;
        const uint8_t *here = codes + 64 * w / m->group;
        _mm_prefetch((const char *)here + SCALES_AHEAD_BYTES, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++) {
            const __m512 scale = scales_of(here + r * groups, runs_together(m, 4 * k),
                                           exponent_bits(m, 2 * pair + r));
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                const int64_t lanes = (b * in->blocks + block) * 16;
                __m512i dot = dots[r][0][b];
                if (S == 2) dot = _mm512_add_epi32(dot, dots[r][1][b]);
                if (r == 1) dot = _mm512_srai_epi32(dot, 4);
                dot = _mm512_add_epi32(dot, _mm512_load_si512(in->excess + lanes));
                const __m512 both = _mm512_mul_ps(scale, _mm512_load_ps(in->scales + lanes));
                sum[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, sum[r][b]);
            }
        }
    }
    const int real = 2 * pair + 2 <= m->rows ? 2 : 1;
    for (int r = 0; r < real; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            y[b * y_stride + 2 * pair + r] = _mm512_reduce_add_ps(sum[r][b]);
}

SCT_INLINE void pairs(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    for (int64_t row = begin; row < end; row += 2)
        pair_at(m, in, row / 2, y, y_stride, B, packed);
}
SCT_ROWS(rows, pairs)

void sct_rows_int4_avx512(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                          float *y, int64_t y_stride) {
    rows(m, in, begin, end, y, y_stride);
}

void sct_expand_int4_avx512(const sct_matrix *m, int64_t begin, int64_t end, void *tile) {
    if (m->mask) expand_rows(m, begin, end, tile, 1);
    else expand_rows(m, begin, end, tile, 0);
}

SCT_TARGET_END
#endif
