/* int4 weights with AVX2. As q + 8 they have no sign, so vpmaddubsw takes them as they are, and eight
 * of its sums of two products (at most 2 · 15 · 127 each) fit in 16 bits. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "blocks.h"

static uint8_t places[256][8] __attribute__((aligned(64))); /* 0x80: zero */

/* The same for both halves of sixteen places. Their sum is a shuffle: the lower half also says how far
 * the upper one begins. */
static uint8_t lower[256][16] __attribute__((aligned(64)));
static uint8_t upper[256][16] __attribute__((aligned(64)));

SCT_AT_LOAD static void fill_tables(void) {
    for (int mask = 0; mask < 256; mask++) {
        for (int place = 0, next = 0; place < 8; place++)
            places[mask][place] = (uint8_t)(mask >> place & 1 ? next++ : 0x80);
        for (int place = 0; place < 8; place++) {
            lower[mask][place] = upper[mask][8 + place] = places[mask][place];
            lower[mask][8 + place] = (uint8_t)__builtin_popcount((unsigned)mask);
        }
    }
}

SCT_TARGET_BEGIN("avx2,fma,f16c,popcnt,bmi,bmi2")

#include "batches.inc"

#define SUMS_IN_16_BITS 8
#define AHEAD_BYTES 4096

/* Twice sixteen places, from v and from what is `then`: two times two numbers of 16 bits say where in
 * the tables their eights are. */
SCT_INLINE __m256i thirty_two(const uint8_t *v, const uint8_t *then, uint64_t even, uint64_t odd) {
    __m128i shuffle[2];
    for (int i = 0; i < 2; i++) {
        const void *low = lower[0] + (uint16_t)(even >> (16 * i));
        const void *high = upper[0] + (uint16_t)(odd >> (16 * i));
        shuffle[i] = _mm_add_epi8(_mm_load_si128(low), _mm_load_si128(high));
    }
    const __m128i first = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)v), shuffle[0]);
    const __m128i second = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)then), shuffle[1]);
    return _mm256_set_m128i(second, first);
}

/* The next 64 bytes: of kept weights in their places, or as they are. */
SCT_INLINE const uint8_t *next_word(const uint8_t *v, uint64_t kept, const int packed,
                                    __m256i out[2]) {
    if (!packed) {
        out[0] = _mm256_loadu_si256((const __m256i *)v);
        out[1] = _mm256_loadu_si256((const __m256i *)(v + 32));
        return v + 64;
    }
    const uint64_t even = (kept & 0x00ff00ff00ff00ff) << 4, odd = kept >> 4 & 0x0ff00ff00ff00ff0;
    const uint8_t *half = v + __builtin_popcount((uint32_t)kept);
    out[0] = thirty_two(v, v + __builtin_popcount((uint16_t)kept), even, odd);
    out[1] = thirty_two(half, half + __builtin_popcount((uint16_t)(kept >> 32)), even >> 32,
                        odd >> 32);
    return v + __builtin_popcountll(kept);
}

/* The halves of 32 bytes as q + 8. What is not kept is 0, and becomes 8 as well. */
SCT_INLINE void halves_of(__m256i bytes, __m256i out[2]) {
    const __m256i half = _mm256_set1_epi8(0x0f);
    bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8((char)0x88));
    out[0] = _mm256_and_si256(bytes, half);
    out[1] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half);
}

static const uint8_t *one_word(const uint8_t *v, uint64_t kept, int packed, int high,
                               int8_t out[64]) {
    __m256i both[2], e[2];
    v = next_word(v, kept, packed, both);
    for (int h = 0; h < 2; h++) {
        halves_of(both[h], e);
        const __m256i codes = _mm256_sub_epi8(e[high], _mm256_set1_epi8(8));
        _mm256_storeu_si256((__m256i *)(out + 32 * h), codes);
    }
    return v;
}

#include "int4.inc"

const uint8_t *sct_word_avx2(const uint8_t *v, uint64_t kept, int packed, int high,
                             int8_t out[64]) {
    return one_word(v, kept, packed, high, out);
}

const uint8_t *sct_places_avx2(void) {
    return places[0];
}

SCT_INLINE float sum_of(__m256 x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* The scales of eight of 16 lanes. */
SCT_INLINE __m256 scales_of(const uint8_t *codes, int together, int32_t exponent, const int h) {
    const __m128i which = _mm_load_si128((const __m128i *)scale_of_lane[together]);
    __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)codes), which);
    if (h) bytes = _mm_srli_si128(bytes, 8);
    const __m256i bits = _mm256_and_si256(_mm256_slli_epi32(_mm256_cvtepi8_epi32(bytes), 19),
                                          _mm256_set1_epi32((int32_t)SCALE_BITS));
    return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(exponent)));
}

/* The sums of one block. Their halves of 8 lanes come one after the other in each word. */
typedef struct {
    __m256i of[2][2][SCT_MAX_BATCH]; /* by row, half, and activations */
} sct_dots;

/* Up to eight words of a block, added to its sums. */
SCT_INLINE void words_at(const uint8_t **v, const uint64_t *mask, const int8_t *x,
                         int64_t padded, int64_t words, sct_dots *dots, const int B,
                         const int packed) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sums[2][2][SCT_MAX_BATCH];
#pragma GCC unroll 8
    for (int b = 0; b < B; b++)
        sums[0][0][b] = sums[0][1][b] = sums[1][0][b] = sums[1][1][b] = _mm256_setzero_si256();
    for (int64_t j = 0; j < words; j++) {
        __m256i both[2], e[2];
        _mm_prefetch((const char *)*v + AHEAD_BYTES, _MM_HINT_T0);
        *v = next_word(*v, packed ? mask[j] : 0, packed, both);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            halves_of(both[h], e);
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++) {
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const void *at = x + b * padded + 64 * j + 32 * h;
                    const __m256i products =
                        _mm256_maddubs_epi16(e[r], _mm256_load_si256((const __m256i *)at));
                    sums[r][h][b] = _mm256_add_epi16(sums[r][h][b], products);
                }
            }
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; r++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++)
#pragma GCC unroll 8
            for (int b = 0; b < B; b++)
                dots->of[r][h][b] = _mm256_add_epi32(dots->of[r][h][b],
                                                     _mm256_madd_epi16(sums[r][h][b], ones));
}

SCT_INLINE void pair_at(const sct_matrix *m, const sct_input *in, int64_t pair, float *y,
                        int64_t y_stride, const int B, const int packed) {
    const uint8_t *v = bytes_of(m, pair, packed);
    const uint64_t *mask = masks_of(m, pair, packed);
    const int64_t groups = groups_of(m);
    const uint8_t *codes = m->scales + 2 * pair * groups;
    const int8_t *x = in->bytes;
    __m256 sum[2][SCT_MAX_BATCH];
    sct_dots dots;
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sum[0][b] = sum[1][b] = _mm256_setzero_ps();
    for (int64_t w = 0, block = 0, k = in->most; w < m->words; w += k, block++) {
        k = sct_next_block(k, m->words - w);
#pragma GCC unroll 8
        for (int b = 0; b < B; b++)
            for (int h = 0; h < 2; h++) {
                const int32_t *excess = in->excess + (b * in->blocks + block) * 16 + 8 * h;
                dots.of[0][h][b] = dots.of[1][h][b] = _mm256_load_si256((const __m256i *)excess);
            }
        uint8_t room[1024];
        const uint8_t *at = packed ? v : dense_words(m, &v, k, room);
        for (int64_t j = 0, few; j < k; j += few) {
            few = k - j < SUMS_IN_16_BITS ? k - j : SUMS_IN_16_BITS;
            words_at(&at, mask, x, in->padded, few, &dots, B, packed);
            x += 64 * few;
            if (packed) mask += few;
        }
        if (!m->of_four) v = at;
        const uint8_t *here = codes + 64 * w / m->group;
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++)
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const __m256 scale = scales_of(here + r * groups, runs_together(m, 4 * k),
                                               exponent_bits(m, 2 * pair + r), h);
#pragma GCC unroll 8
                for (int b = 0; b < B; b++) {
                    const float *own = in->scales + (b * in->blocks + block) * 16 + 8 * h;
                    const __m256 both = _mm256_mul_ps(scale, _mm256_load_ps(own));
                    sum[r][b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots.of[r][h][b]), both,
                                                sum[r][b]);
                }
            }
    }
    const int real = 2 * pair + 2 <= m->rows ? 2 : 1;
    for (int r = 0; r < real; r++)
        for (int b = 0; b < B; b++) y[b * y_stride + 2 * pair + r] = sum_of(sum[r][b]);
}

SCT_INLINE void pairs(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                      float *y, int64_t y_stride, const int B, const int packed) {
    for (int64_t row = begin; row < end; row += 2)
        pair_at(m, in, row / 2, y, y_stride, B, packed);
}
SCT_ROWS(rows, pairs)

void sct_rows_int4_avx2(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                        float *y, int64_t y_stride) {
    rows(m, in, begin, end, y, y_stride);
}

void sct_expand_int4_avx2(const sct_matrix *m, int64_t begin, int64_t end, void *tile) {
    if (m->mask) expand_rows(m, begin, end, tile, 1);
    else expand_rows(m, begin, end, tile, 0);
}

SCT_TARGET_END
#endif
