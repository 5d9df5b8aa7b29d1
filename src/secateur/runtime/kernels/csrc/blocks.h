/* Products for many tokens: blocks instead of rows. What blocks.c and the instruction sets share.
 *
 * Rows of the matrix are expanded once into a tile of int8 codes that stays in the second cache.
 * Activations are rounded to int8 with a scale for each 64, as for few tokens, and interleaved: a
 * panel has some tokens (`lanes`), and of each four columns. So a register of a panel times one
 * broadcast of four codes gives sums for all its tokens, and a register of sums is a row of the
 * tile times a panel.
 *
 * Floats are the same, without scales: a tile has 64 columns of each row and then the next 64, and a
 * panel has of each token two columns of bfloat16, or one of float32.
 */
#ifndef SECATEUR_BLOCKS_H
#define SECATEUR_BLOCKS_H

#include "internal.h"

#if defined(__x86_64__) && defined(__has_include)
#if __has_include(<amxint8intrin.h>)
#define SCT_HAS_AMX /* the compiler knows it */
#endif
#endif

#define SCT_SPREAD (64 * SCT_SPREAD_WORDS) /* columns of the largest block of int8 */

/* Codes of some rows: of 64 columns that share a scale after the other, [words][padded_rows][64]. Of
 * int8 these are the shares of a block (internal.h). What stands past the rows is never read, or its
 * sums are never stored. */
typedef struct {
    int64_t rows, padded_rows, words;
    void *row;       /* of floats: memory for one row */
    const char *next; /* what the next tile is made of, as many lines of 64 bytes */
    int64_t next_lines;
    int64_t group;   /* columns that share their scales: 64, or fewer where the type has smaller groups */
    void *codes;     /* int8, or int16 where the tier multiplies those; bfloat16 or float32 */
    int32_t *starts; /* [words · 64 / group, rounded up][padded_rows]: what sums begin with */
    float *scales;   /* the same shape: scales of the groups; NULL: the type has none */
} sct_tile;

/* While a tile is multiplied, the memory of the next one comes into the second cache. */
typedef struct {
    const char *from;
    int64_t lines, each; /* left; asked for in one step */
} sct_ahead;

SCT_INLINE void sct_look_ahead(sct_ahead *ahead) {
    for (int64_t i = 0; i < ahead->each && ahead->lines > 0; i++, ahead->lines--) {
        __builtin_prefetch(ahead->from, 0, 2);
        ahead->from += 64;
    }
}

/* Rounded activations: [panels][words · 16][lanes][4]. */
typedef struct {
    int64_t tokens, panels, words;
    int spread;    /* whether columns that share a scale are spread over blocks, as beside int8 */
    void *bytes;
    float *scales; /* [panels][words][lanes] */
} sct_panels;

/* Where a unit finds its rows and one or two panels, from the first of `columns` that share a scale. */
typedef struct {
    const void *codes;     /* of the first row; 64 codes later the next */
    const int32_t *starts; /* by row */
    const float *scales;   /* by row, or NULL */
    const char *panel[2];
    const float *panel_scales[2]; /* by token */
    int64_t columns, panels;
} sct_places;

/* Where sums go: y[token, row] = sum · row_scale[row]. */
typedef struct {
    void *y;
    int64_t type, stride;
    const float *row_scale; /* or NULL */
} sct_sink;

typedef struct {
    int64_t lanes;      /* tokens of a panel */
    int64_t rows;       /* the tile is padded to a multiple of them */
    int64_t code_bytes; /* of a code in the tile, and of a rounded activation */
    int64_t tile_bytes; /* of the cache that a tile should fill */
    void (*round)(const void *x, int64_t x_type, int64_t x_stride, int64_t columns,
                  sct_panels *panels, int64_t panel);
    void (*expand)(const sct_matrix *matrix, int64_t begin, sct_tile *tile);
    void (*multiply)(const sct_tile *tile, const sct_panels *panels, int64_t first_row,
                     const sct_sink *sink);
    void (*begin)(int64_t group); /* on each thread, before and after the products; or NULL */
    void (*end)(void);
} sct_blocks;

SCT_HIDDEN extern const sct_blocks sct_blocks_amx, sct_blocks_avx512, sct_blocks_avx2;
SCT_HIDDEN extern const sct_blocks sct_blocks_i8mm, sct_blocks_neon;
SCT_HIDDEN extern const sct_blocks sct_blocks_bfloats_amx, sct_blocks_bfloats_avx512;
SCT_HIDDEN extern const sct_blocks sct_blocks_float32_avx512, sct_blocks_float32_avx2,
    sct_blocks_float32_neon;

/* For values of a type; NULL: none. `exact`: activations meet bfloat16 values in float32. */
SCT_HIDDEN const sct_blocks *sct_blocks_for(int64_t type, int exact);

/* Where four columns, number `four` of a block of k words, lie in its shares, `pitch` apart. */
SCT_INLINE int64_t sct_place_of(int64_t four, int64_t k, int64_t pitch) {
    return four % k * pitch + 4 * (four / k);
}

/* The next 64 codes of one row of int4, in the order of the layout; returns what comes after them. */
typedef const uint8_t *sct_word(const uint8_t *v, uint64_t kept, int packed, int high,
                                int8_t out[64]);
SCT_HIDDEN sct_word sct_word_avx512, sct_word_avx2;

/* For each mask of eight bits, from which of the next bytes each of eight places is filled; 0x80:
 * from none. [256][8] */
SCT_HIDDEN const uint8_t *sct_places_avx2(void);

#endif
