/* Products by blocks for AVX-512 BF16: twelve rows and two panels of 16 tokens. In each step a
 * register of a panel has two columns of 16 tokens, and a broadcast has the same two of a row. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "blocks.h"

#define PANEL_LANES 16
#define UNIT_ROWS 12
#define GROUP_ROWS 48
#define GROUP_PANELS 4

#include "avx512.inc"

SCT_TARGET_BEGIN(SCT_AVX512 ",avx512bf16")

#include "blocks_bfloats.inc"

/* sums += x · values. Written out, because gcc 12 copies and spills the sums of the intrinsic. */
SCT_INLINE void take(__m512 *sums, __m512i x, __m512i values) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(*sums) : "v"(x), "v"(values));
}

SCT_INLINE void unit_of(const sct_float_places *at, float *sums, int64_t pitch, const int P) {
    __m512 first[UNIT_ROWS], second[UNIT_ROWS];
#pragma GCC unroll 12
    for (int r = 0; r < UNIT_ROWS; r++) first[r] = second[r] = _mm512_setzero_ps();
    for (int64_t w = 0; w < at->words; w++) {
        sct_look_ahead(at->ahead);
        for (int64_t k = 0; k < 64; k += 2) {
            const uint16_t *values = at->values + w * UNIT_ROWS * 64 + k;
            const int64_t column = (w * 64 + k) * 16;
            const __m512i x = _mm512_load_si512(at->panel[0] + column);
            const __m512i other = P == 2 ? _mm512_load_si512(at->panel[1] + column) : x;
#pragma GCC unroll 12
            for (int r = 0; r < UNIT_ROWS; r++) {
                int32_t two;
                memcpy(&two, values + r * 64, 4);
                const __m512i by = _mm512_set1_epi32(two);
                take(&first[r], x, by);
                if (P == 2) take(&second[r], other, by);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < UNIT_ROWS; r++) {
        _mm512_store_ps(sums + r * pitch, first[r]);
        if (P == 2) _mm512_store_ps(sums + r * pitch + 16, second[r]);
    }
}

static void unit(const sct_float_places *at, float *sums, int64_t pitch) {
    if (at->panels == 2) unit_of(at, sums, pitch, 2);
    else unit_of(at, sums, pitch, 1);
}

SCT_TARGET_END

const sct_blocks sct_blocks_bfloats_avx512 = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(VALUE), .tile_bytes = 256 * 1024,
    .round = fill_panel, .expand = expand, .multiply = multiply};
#endif
