/* Products by blocks for AVX2: codes of 16 bits, two columns in each product of vpmaddwd.
 *
 * vpmaddubsw takes twice as many columns, but only for |x| with the sign moved to w, and its sums of
 * 16 bits have to be widened: no fewer instructions for a product.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "blocks.h"

#define CODE int16_t
#define OFFSET 0
#define PANEL_LANES 8
#define UNIT_ROWS 4
#define GROUP_ROWS 32
#define GROUP_PANELS 4

SCT_TARGET_BEGIN("avx2,fma,popcnt,bmi,bmi2")

#include "blocks_avx2.inc"

SCT_INLINE __m256i two(const int16_t *codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    return _mm256_set1_epi32(word);
}

/* Lanes of 32 bits as gcc names them: with __m256i it copies and spills sums. */
typedef int32_t sct_sums __attribute__((vector_size(32)));

/* Sums of integers times the scales of tokens and of a row. */
SCT_INLINE void add(sct_sums dots, const float *panel_scales, __m256 by, float *sums) {
    const __m256 scale = _mm256_mul_ps(_mm256_load_ps(panel_scales), by);
    const __m256 numbers = _mm256_cvtepi32_ps((__m256i)dots);
    _mm256_store_ps(sums, _mm256_fmadd_ps(numbers, scale, _mm256_load_ps(sums)));
}

SCT_INLINE void unit_of(const sct_places *at, float *sums, int64_t pitch, const int P) {
    sct_sums first[UNIT_ROWS], second[UNIT_ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < UNIT_ROWS; r++) first[r] = second[r] = (sct_sums){0};
    for (int64_t k = 0; k < at->columns; k += 2) {
        const __m256i x = _mm256_load_si256((const __m256i *)(at->panel[0] + 16 * k));
        const __m256i other =
            P == 2 ? _mm256_load_si256((const __m256i *)(at->panel[1] + 16 * k)) : x;
#pragma GCC unroll 4
        for (int r = 0; r < UNIT_ROWS; r++) {
            const __m256i codes = two((const int16_t *)at->codes + r * SCT_SCALED + k);
            first[r] += (sct_sums)_mm256_madd_epi16(x, codes);
            if (P == 2) second[r] += (sct_sums)_mm256_madd_epi16(other, codes);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < UNIT_ROWS; r++) {
        const __m256 by = _mm256_set1_ps(at->scales ? at->scales[r] : 1.0f);
        add(first[r], at->panel_scales[0], by, sums + r * pitch);
        if (P == 2) add(second[r], at->panel_scales[1], by, sums + r * pitch + 8);
    }
}

static void unit(const sct_places *at, float *sums, int64_t pitch) {
    if (at->panels == 2) unit_of(at, sums, pitch, 2);
    else unit_of(at, sums, pitch, 1);
}

static void expand_bytes(const sct_matrix *m, int64_t begin, sct_tile *tile) {
    const uint8_t *places = sct_places_avx2();
    const int64_t pitch = tile->padded_rows * SCT_SCALED;
    for (int64_t r = 0; r < tile->rows; r++) {
        const int64_t row = begin + r, start = m->mask ? m->offsets[row] : row * m->stride;
        const int8_t *v = (const int8_t *)m->values + start;
        for (int64_t w = 0, k = SCT_SPREAD_WORDS; w < m->words; w += k) {
            int16_t *to = (int16_t *)tile->codes + (w * tile->padded_rows + r) * SCT_SCALED;
            k = sct_next_block(k, m->words - w);
            for (int64_t four = 0; four < 16 * k; four += 2) {
                const uint64_t word = m->mask ? m->mask[row * m->words + w + four / 16] : ~0ull;
                const uint8_t kept = (uint8_t)(word >> (4 * four & 63));
                const __m128i raw = _mm_loadl_epi64((const __m128i *)v);
                const __m128i from = _mm_loadl_epi64((const __m128i *)(places + 8 * kept));
                const __m128i codes = _mm_cvtepi8_epi16(_mm_shuffle_epi8(raw, from));
                _mm_storel_epi64((__m128i *)(to + sct_place_of(four, k, pitch)), codes);
                _mm_storel_epi64((__m128i *)(to + sct_place_of(four + 1, k, pitch)),
                                 _mm_unpackhi_epi64(codes, codes));
                v += __builtin_popcount(kept);
            }
        }
    }
}

#define one_word sct_word_avx2
#include "blocks_untwist.inc"
#include "blocks_int4.inc"
#include "blocks.inc"

SCT_TARGET_END

const sct_blocks sct_blocks_avx2 = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(CODE), .tile_bytes = 256 * 1024,
    .round = round_panel, .expand = expand, .multiply = multiply};
#endif
