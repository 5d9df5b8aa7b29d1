/* Products by blocks for AVX-512 with VNNI.
 *
 * A register has the sums of 16 tokens for one row; twelve rows and two panels are 24 registers. In
 * each step a register of a panel has four columns of 16 tokens, and a broadcast has the same four
 * columns of a row.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "blocks.h"

#define CODE int8_t
#define OFFSET 128 /* vpdpbusd wants one side unsigned; sums begin with −128 · Σ w */
#define PANEL_LANES 16
#define UNIT_ROWS 12
#define GROUP_ROWS 48
#define GROUP_PANELS 4

SCT_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt,fma,bmi,bmi2")

#include "blocks_avx512_bytes.inc"

SCT_INLINE __m512i four(const int8_t *codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    return _mm512_set1_epi32(word);
}

/* sums += x · codes. Written out, because gcc 12 copies and spills the sums of the intrinsic. */
SCT_INLINE void take(__m512i *sums, __m512i x, __m512i codes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(x), "v"(codes));
}

/* Sums of integers times the scales of tokens, and of a row where the type has them. */
SCT_INLINE void add(__m512i dots, __m512 scale, const float *by, float *sums) {
    if (by) scale = _mm512_mul_ps(scale, _mm512_set1_ps(*by));
    _mm512_store_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, _mm512_load_ps(sums)));
}

/* P panels; G: the type has groups, so each row has its scales. */
SCT_INLINE void unit_of(const sct_places *at, float *sums, int64_t pitch, const int P, const int G) {
    __m512i first[UNIT_ROWS], second[UNIT_ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < UNIT_ROWS; r++) first[r] = second[r] = _mm512_set1_epi32(at->starts[r]);
    for (int64_t k = 0; k < at->columns; k += 4) {
        const __m512i x = _mm512_load_si512(at->panel[0] + 16 * k);
        const __m512i other = P == 2 ? _mm512_load_si512(at->panel[1] + 16 * k) : x;
#pragma GCC unroll 12
        for (int r = 0; r < UNIT_ROWS; r++) {
            const __m512i codes = four((const int8_t *)at->codes + r * SCT_SCALED + k);
            take(&first[r], x, codes);
            if (P == 2) take(&second[r], other, codes);
        }
    }
    const __m512 scale = _mm512_load_ps(at->panel_scales[0]);
    const __m512 other_scale = P == 2 ? _mm512_load_ps(at->panel_scales[1]) : scale;
#pragma GCC unroll 12
    for (int r = 0; r < UNIT_ROWS; r++) {
        add(first[r], scale, G ? at->scales + r : NULL, sums + r * pitch);
        if (P == 2) add(second[r], other_scale, G ? at->scales + r : NULL, sums + r * pitch + 16);
    }
}

static void unit(const sct_places *at, float *sums, int64_t pitch) {
    if (at->panels == 2 && at->scales) unit_of(at, sums, pitch, 2, 1);
    else if (at->panels == 2) unit_of(at, sums, pitch, 2, 0);
    else if (at->scales) unit_of(at, sums, pitch, 1, 1);
    else unit_of(at, sums, pitch, 1, 0);
}

#include "blocks.inc"

SCT_TARGET_END

const sct_blocks sct_blocks_avx512 = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(CODE), .tile_bytes = 256 * 1024,
    .round = round_panel, .expand = expand, .multiply = multiply};
#endif
