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
    if (packed) e = spread_bytes(kept, e);
    if (high) e = _mm512_srli_epi16(e, 4);
    _mm512_storeu_si512(out, _mm512_sub_epi8(half_of(e, 0), _mm512_set1_epi8(8)));
    return v + (packed ? __builtin_popcountll(kept) : 64);
}

#define all_bytes sct_all_bytes_avx512
#include "int4.inc"

const uint8_t *sct_word_avx512(const uint8_t *v, uint64_t kept, int packed, int high,
                               int8_t out[64]) {
    return one_word(v, kept, packed, high, out);
}

/* The scales of 16 lanes. */
SCT_INLINE __m512 scales_of(const uint8_t *codes, int together, __m512i exponent) {
    const __m128i which = _mm_load_si128((const __m128i *)scale_of_lane[together]);
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)codes), which);
    const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(_mm512_cvtepi8_epi32(bytes), 19),
                                          _mm512_set1_epi32((int32_t)SCALE_BITS));
    return _mm512_castsi512_ps(_mm512_add_epi32(bits, exponent));
}

/* Where a pair of rows is read. */
typedef struct {
    const uint8_t *v;
    const uint64_t *mask;
} sct_place;

/* The next word of both rows. */
SCT_INLINE void two_words(sct_place *at, const int packed, __m512i e[2]) {
    __m512i both = load(at->v);
    _mm_prefetch((const char *)at->v + AHEAD_BYTES, _MM_HINT_T1);
    if (packed) {
        const uint64_t kept = *at->mask++;
        both = spread_bytes(kept, both);
        at->v += __builtin_popcountll(kept);
    } else {
        at->v += 64;
    }
    e[0] = half_of(both, 0);
    e[1] = half_of(both, 1);
}

#define STEP(j, s)                                                                             \
    do {                                                                                       \
        __m512i e[2];                                                                          \
        two_words(&at, packed, e);                                                             \
        _Pragma("GCC unroll 8") for (int b = 0; b < B; b++) {                                  \
            const __m512i x_ = load(x + b * in->padded + 64 * (j));               \
            dots[0][s][b] = _mm512_dpbusd_epi32(dots[0][s][b], e[0], x_);                      \
            dots[1][s][b] = _mm512_dpbusd_epi32(dots[1][s][b], e[1], x_);                      \
        }                                                                                      \
    } while (0)

/* What two of four needs to find activations. */
typedef struct {
    __m512i shifts[4]; /* by p and row: where the places of each byte are in its 64 bits */
    __m512i base;      /* of each byte: the first column of its lane, + 64 in the second word */
} sct_finder;

static const uint8_t shifts_of_bytes[64] __attribute__((aligned(64))) = {
#define EIGHT 0, 2, 4, 6, 8, 10, 12, 14
    EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT};

static const uint8_t base_of_bytes[64] __attribute__((aligned(64))) = {
#define LANE(i) 4 * (i), 4 * (i), 4 * (i) + 64, 4 * (i) + 64
    LANE(0), LANE(1), LANE(2),  LANE(3),  LANE(4),  LANE(5),  LANE(6),  LANE(7),
    LANE(8), LANE(9), LANE(10), LANE(11), LANE(12), LANE(13), LANE(14), LANE(15)};

SCT_INLINE sct_finder finder(void) {
    sct_finder f;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        f.shifts[i] = _mm512_add_epi8(_mm512_load_si512(shifts_of_bytes),
                                      _mm512_set1_epi8((char)(16 * i)));
    f.base = _mm512_load_si512(base_of_bytes);
    return f;
}

/* Places of up to four words, and weights of two of them, from memory that has no more. */
SCT_INLINE __m512i places_at(const uint8_t *v, const int words) {
    if (words == 4) return _mm512_loadu_si512(v);
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)v));
}
SCT_INLINE __m512i weights_at(const uint8_t *v, const int words) {
    if (words > 1) return _mm512_loadu_si512(v);
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)v));
}

/* Where the activations for the bytes of two words of a row are. */
SCT_INLINE __m512i found(const sct_finder *f, __m512i places, const int which) {
    const __m512i near = _mm512_multishift_epi64_epi8(f->shifts[which], places);
    return _mm512_ternarylogic_epi64(near, _mm512_set1_epi8(3), f->base, 0xea);
}

/* The next words of a pair that stores two of four: activations come to their weights, as x + 128
 * because one side has no sign. Both rows are 16 times too large. */
#define FOUND_STEP(words)                                                                      \
    do {                                                                                       \
        const __m512i places = places_at(at.v, words);                                         \
        at.v += words == 4 ? 64 : 32;                                                          \
        _Pragma("GCC unroll 2") for (int p = 0; p < (words + 1) / 2; p++) {                    \
            const __m512i both = weights_at(at.v, words);                                      \
            const __m512i odd = _mm512_and_si512(both, upper);                                 \
            const __m512i even = _mm512_and_si512(_mm512_slli_epi16(both, 4), upper);          \
            const __m512i from[2] = {found(&f, places, 2 * p), found(&f, places, 2 * p + 1)};  \
            const int s = p & (S - 1);                                                         \
            _mm_prefetch((const char *)at.v + AHEAD_BYTES, _MM_HINT_T1);                       \
            at.v += words == 1 ? 32 : 64;                                                      \
            over[0] = _mm512_dpbusd_epi32(over[0], top, even);                                 \
            over[1] = _mm512_dpbusd_epi32(over[1], top, odd);                                  \
            _Pragma("GCC unroll 8") for (int b = 0; b < B; b++) {                              \
                const int8_t *own = x + b * in->padded + 64 * (j + 2 * p);                     \
                const __m512i one = _mm512_xor_si512(_mm512_load_si512(own), top);             \
                const __m512i two = words == 1 ? one                                           \
                    : _mm512_xor_si512(_mm512_load_si512(own + 64), top);                      \
                dots[0][s][b] = _mm512_dpbusd_epi32(                                           \
                    dots[0][s][b], _mm512_permutex2var_epi8(one, from[0], two), even);         \
                dots[1][s][b] = _mm512_dpbusd_epi32(                                           \
                    dots[1][s][b], _mm512_permutex2var_epi8(one, from[1], two), odd);          \
            }                                                                                  \
        }                                                                                      \
        _mm_prefetch((const char *)at.v + AHEAD_BYTES, _MM_HINT_T1);                           \
        j += words;                                                                            \
    } while (0)

/* Few activations: two sums for each row that do not wait for each other. Those of the odd row are 16
 * times too large until their block is over. */
SCT_INLINE void pair_at(const sct_matrix *m, const sct_input *in, int64_t pair, float *y,
                        int64_t y_stride, const int B, const int packed, const int two) {
    const int S = B <= 2 && !packed ? 2 : 1; /* expanding takes longer than a sum waits */
    const __m512i top = _mm512_set1_epi8((char)0x80), upper = _mm512_set1_epi8((char)0xf0);
    const sct_finder f = finder();
    sct_place at = {bytes_of(m, pair, packed), masks_of(m, pair, packed)};
    const int64_t groups = groups_of(m);
    const uint8_t *codes = m->scales + 2 * pair * groups;
    const int8_t *x = in->bytes;
    const int32_t *excess = in->excess;
    const float *own = in->scales;
    const __m512i exponents[2] = {_mm512_set1_epi32(exponent_bits(m, 2 * pair)),
                                  _mm512_set1_epi32(exponent_bits(m, 2 * pair + 1))};
    __m512 sum[2][SCT_MAX_BATCH];
    int64_t k = in->most;
    int together = runs_together(m, 4 * k);
#pragma GCC unroll 8
    for (int b = 0; b < B; b++) sum[0][b] = sum[1][b] = _mm512_setzero_ps();
    for (int64_t w = 0; w < m->words; w += k) {
        __m512i dots[2][2][SCT_MAX_BATCH], over[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        if (m->words - w < k) {
            k = sct_next_block(k, m->words - w);
            together = runs_together(m, 4 * k);
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            dots[0][0][b] = two ? _mm512_setzero_si512()
                                : _mm512_load_si512(excess + b * in->blocks * 16);
            dots[1][0][b] = _mm512_slli_epi32(dots[0][0][b], 4);
            if (S == 2) dots[0][1][b] = dots[1][1][b] = _mm512_setzero_si512();
        }
        int64_t j = 0;
        while (two && j + 4 <= k) FOUND_STEP(4);
        if (two && k == 2) FOUND_STEP(2);
        if (two && k == 1) FOUND_STEP(1);
        for (; !two && j + 4 <= k; j += 4) {
            if (packed) _mm_prefetch((const char *)(at.mask + MASK_AHEAD_WORDS), _MM_HINT_T0);
            STEP(j, 0);
            STEP(j + 1, S - 1);
            STEP(j + 2, 0);
            STEP(j + 3, S - 1);
        }
        for (; !two && j < k; j++) STEP(j, 0);
        x += 64 * k;
        const uint8_t *here = codes + 64 * w / m->group;
        _mm_prefetch((const char *)here + SCALES_AHEAD_BYTES, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int r = 0; r < 2; r++) {
            const __m512 scale = scales_of(here + r * groups, together, exponents[r]);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) {
                __m512i dot = dots[r][0][b];
                if (S == 2) dot = _mm512_add_epi32(dot, dots[r][1][b]);
                if (two) dot = _mm512_sub_epi32(dot, over[r]);
                if (two || r == 1) dot = _mm512_srai_epi32(dot, 4);
                const __m512 both = _mm512_mul_ps(scale, _mm512_load_ps(own + b * in->blocks * 16));
                sum[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, sum[r][b]);
            }
        }
        excess += 16, own += 16;
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
        pair_at(m, in, row / 2, y, y_stride, B, packed, 0);
}
SCT_ROWS(rows, pairs)

SCT_INLINE void pairs_of_two(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                             float *y, int64_t y_stride, const int B, const int packed) {
    for (int64_t row = begin; row < end; row += 2)
        pair_at(m, in, row / 2, y, y_stride, B, packed, 1);
}
SCT_BATCHES(rows_of_two, pairs_of_two, 0)

void sct_rows_int4_avx512(const sct_matrix *m, const sct_input *in, int64_t begin, int64_t end,
                          float *y, int64_t y_stride) {
    (m->of_four ? rows_of_two : rows)(m, in, begin, end, y, y_stride);
}

/* Both weights of each four columns go to all its bytes and stay where their places are. */
SCT_INLINE const uint8_t *fill(const uint8_t *v, const int words, const sct_finder *f, uint8_t *out) {
    const __m512i column = _mm512_set1_epi32(0x03020100), three = _mm512_set1_epi8(3);
    const __m512i lane = _mm512_and_si512(_mm512_load_si512(base_of_bytes), _mm512_set1_epi8(12));
    const __m512i places = places_at(v, words);
    v += words == 4 ? 64 : 32;
#pragma GCC unroll 4
    for (int word = 0; word < words; word++) {
        const __m512i both = weights_at(v, words);
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const int r = i & 1, n = 2 * (word & 1) + i / 2;
            const __m512i own = _mm512_set1_epi8(r ? (char)0xf0 : 0x0f);
            const __m512i to = _mm512_multishift_epi64_epi8(f->shifts[word / 2 * 2 + r], places);
            const __m512i four = _mm512_add_epi8(lane, _mm512_set1_epi8((char)n));
            const __m512i there = _mm512_shuffle_epi8(_mm512_and_si512(to, three), four);
            const __mmask64 here = _mm512_cmpeq_epi8_mask(there, column);
            const __m512i value = _mm512_maskz_shuffle_epi8(here, both, four);
            sum = _mm512_ternarylogic_epi64(sum, value, own, 0xf8);
        }
        _mm512_storeu_si512(out + 64 * word, sum);
        if (word & 1 || words == 1) v += words == 1 ? 32 : 64;
    }
    return v;
}

const uint8_t *sct_all_bytes_avx512(const uint8_t *v, int64_t k, uint8_t *out) {
    const sct_finder f = finder();
    if (k == 1) return fill(v, 1, &f, out);
    if (k == 2) return fill(v, 2, &f, out);
    for (int64_t j = 0; j < k; j += 4) v = fill(v, 4, &f, out + 64 * j);
    return v;
}

void sct_expand_int4_avx512(const sct_matrix *m, int64_t begin, int64_t end, void *tile) {
    if (m->mask) expand_rows(m, begin, end, tile, 1);
    else expand_rows(m, begin, end, tile, 0);
}

SCT_TARGET_END
#endif
