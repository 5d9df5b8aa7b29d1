/* Products by blocks in float32 for AVX2: six rows and two panels of eight tokens. */
#if defined(__x86_64__)
#include <immintrin.h>

#include "blocks.h"

#define TIER sct_code_avx2
#define PANEL_LANES 8
#define UNIT_ROWS 6
#define GROUP_ROWS 48
#define GROUP_PANELS 4

SCT_TARGET_BEGIN("avx2,fma,f16c")

#include "blocks_avx2.inc"

SCT_INLINE void widen_halves(const uint16_t *from, float *to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)));
}

#define UNIT_VECTOR __m256
#define UNIT_LOAD(from) _mm256_load_ps(from)
#define UNIT_STORE(to, x) _mm256_store_ps(to, x)
#define UNIT_SPREAD(x) _mm256_set1_ps(x)
#define UNIT_FMA(x, y, sum) _mm256_fmadd_ps(x, y, sum)
#include "blocks_float32.inc"

SCT_TARGET_END

const sct_blocks sct_blocks_float32_avx2 = {
    .lanes = PANEL_LANES, .rows = UNIT_ROWS, .code_bytes = sizeof(VALUE), .tile_bytes = 256 * 1024,
    .round = fill_panel, .expand = expand, .multiply = multiply};
#endif
