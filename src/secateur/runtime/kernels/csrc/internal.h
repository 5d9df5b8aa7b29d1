/* What the files of the library share. */
#ifndef SECATEUR_INTERNAL_H
#define SECATEUR_INTERNAL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#include "secateur.h"

#if defined(_WIN32)
#define SCT_HIDDEN /* nothing is exported but what is marked so */
#else
#define SCT_HIDDEN __attribute__((visibility("hidden")))
#endif
#define SCT_AT_LOAD __attribute__((constructor)) /* for what any processor can run */
#define SCT_INLINE static inline __attribute__((always_inline))

/* Code for one instruction set, whatever the rest of the library is compiled for. */
#define SCT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define SCT_TARGET_BEGIN(features) \
    SCT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SCT_TARGET_END _Pragma("clang attribute pop")
#else
#define SCT_TARGET_BEGIN(features) _Pragma("GCC push_options") SCT_PRAGMA(GCC target(features))
#define SCT_TARGET_END _Pragma("GCC pop_options")
#endif

/* Columns that share a scale when activations are rounded to int8. Beside int4 weights they are
 * consecutive. Beside int8 weights they are spread over a block of k words, k = 8 or, at the end of
 * a row, 4, 2 and 1: share g has the columns 4g + 4ks to 4g + 4ks + 3 of the block, s = 0 to 15. So
 * each lane of 32 bits meets one scale in all words of a block, and sums are scaled once. */
#define SCT_SCALED 64
#define SCT_SPREAD_WORDS 8

/* How activations are laid out for a kernel. */
typedef enum {
    SCT_IN_NATURAL, /* float32, as they come */
    SCT_IN_PAIRS,   /* float32, in each block the even ones before the odd ones: a bfloat16 in the
                       upper or lower half of 32 bits becomes a float32 by one `and` or shift */
    SCT_IN_BFLOAT,  /* bfloat16 */
    SCT_IN_BYTES,   /* int8 with scales, for int8 weights */
    SCT_IN_TURNED   /* the same for int4 weights, in the order of their columns */
} sct_input_kind;

/* Activations of a batch, each padded with zeros to `padded` = words · 64. */
typedef struct {
    int64_t batch, padded, blocks;
    int64_t most;    /* of bytes: words in most blocks */
    float *floats;
    uint16_t *bfloats;
    int8_t *bytes;
    float *scales;   /* of bytes: [batch, blocks, 16], by lanes */
    int32_t *excess; /* of bytes: −128 Σ x, turned: −8 Σ x, [batch, blocks, 16], by lanes, because
                        weights are multiplied as w + 128 and as q + 8 */
} sct_input;

typedef void sct_rows(const sct_matrix *, const sct_input *, int64_t begin, int64_t end, float *y,
                      int64_t y_stride);
typedef void sct_expander(const sct_matrix *, int64_t begin, int64_t end, void *tile);

/* Layout of the caches (secateur.h). */
#define SCT_KEYS 64 /* of a tile */
SCT_INLINE int64_t sct_width(int64_t head) { return (head + 15) / 16 * 16; }
SCT_INLINE int64_t sct_unit_values(int64_t type) {
    return type == SCT_FLOAT32 ? 1 : type == SCT_BFLOAT16 ? 2 : 4;
}
SCT_INLINE int64_t sct_tile_bytes(int64_t type, int64_t width) {
    return SCT_KEYS * (4 * width / sct_unit_values(type) + (type == SCT_INT8 ? 4 : 0));
}

/* The first key that the token at a position sees. */
SCT_INLINE int64_t sct_first_seen(int64_t window, int64_t position) {
    return window && position >= window ? position + 1 - window : 0;
}

/* Rows of queries that share keys and values: row r is head r % each of token r / each. What comes
 * out are Σ e^(score - most) · value, the largest score, and Σ e^(score - most). */
typedef struct {
    const float *queries; /* [rows, width], scaled, zeros past the head */
    float *sums;          /* [rows, width] */
    float *most, *total;  /* [rows] */
    int64_t rows, each, width;
    const char *keys, *values; /* rings of `tiles` tiles */
    int64_t tiles, cache_type;
    int64_t begin, end;    /* keys that are looked at, each row at those up to its own */
    int64_t first, window; /* position of the first token; keys that a token sees, 0: all */
    float softcap;         /* c: scores are c · tanh(score / c); 0: as they are */
    int64_t exact;         /* queries and shares meet bfloat16 in float32 */
    float *memory;         /* 2 · SCT_KEYS · width */
} sct_queries;

/* One instruction set. */
typedef struct {
    const char *name;
    sct_rows *rows[SCT_TYPES];  /* for float32 activations; [SCT_INT8], [SCT_INT4] for bytes */
    sct_rows *rows_bfloat;      /* bfloat16 values, bfloat16 activations; NULL: none */
    sct_expander *expand;
    void (*prepare)(const float *x, int64_t columns, sct_input *in, int64_t b, sct_input_kind kind);
    void (*attend)(const sct_queries *);
    /* x = act(x) · up, or act(x) without up, as `activation` says */
    void (*activate)(const sct_decoder *, float *x, const float *up, int64_t count);
    float (*highest)(const float *x, int64_t count); /* these three: sample.inc */
    double (*shares)(const float *x, int64_t count, float most, float factor, float *out);
    double (*rest)(float *p, const float *q, int64_t count, float a, float b);
} sct_tier_code;

SCT_HIDDEN sct_rows sct_rows_int4_avx512, sct_rows_int4_avx2;
SCT_HIDDEN sct_expander sct_expand_int4_avx512, sct_expand_int4_avx2;
SCT_HIDDEN extern const sct_tier_code sct_code_avx512bf16, sct_code_avx512, sct_code_avx2,
    sct_code_neon;
SCT_HIDDEN const sct_tier_code *sct_code(void); /* NULL: none */

/* k words of a pair of rows of int4 that stores two of four, as if it stored all; k is a power of two up
 * to 16. Returns what comes after them. */
typedef const uint8_t *sct_filler(const uint8_t *v, int64_t k, uint8_t *out);
SCT_HIDDEN sct_filler sct_all_bytes, sct_all_bytes_avx512;

SCT_INLINE sct_input_kind sct_kind(const sct_tier_code *code, int64_t type, int exact) {
    if (type == SCT_INT8) return SCT_IN_BYTES;
    if (type == SCT_INT4) return SCT_IN_TURNED;
    if (type != SCT_BFLOAT16) return SCT_IN_NATURAL;
    return code->rows_bfloat && !exact ? SCT_IN_BFLOAT : SCT_IN_PAIRS;
}

SCT_INLINE sct_rows *sct_rows_for(const sct_tier_code *code, int64_t type, sct_input_kind kind) {
    return kind == SCT_IN_BFLOAT ? code->rows_bfloat : code->rows[type];
}

/* Bytes and columns up to a whole number of 64. */
SCT_INLINE size_t sct_rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
SCT_INLINE int64_t sct_padded(int64_t columns) { return (columns + 63) / 64 * 64; }
SCT_INLINE int64_t sct_larger(int64_t a, int64_t b) { return a > b ? a : b; }
SCT_INLINE int64_t sct_smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Memory that begins at a multiple of 64; NULL if there is none. */
SCT_INLINE void *sct_memory(size_t bytes) {
#if defined(_WIN32)
    return _aligned_malloc(bytes, 64);
#else
    return aligned_alloc(64, sct_rounded(bytes));
#endif
}
SCT_INLINE void sct_free(void *memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

/* Memory for the activations of a matrix, and its use. */
SCT_HIDDEN size_t sct_input_bytes(const sct_matrix *matrix, int64_t batch, sct_input_kind kind);
SCT_HIDDEN void sct_input_place(sct_input *in, void *memory, const sct_matrix *matrix,
                                int64_t batch, sct_input_kind kind);

/* Words in most blocks of a row of integers, and in the next block where `left` words are left. */
SCT_INLINE int64_t sct_block_words(const sct_matrix *m) {
    if (m->type != SCT_INT4) return SCT_SPREAD_WORDS;
    return m->group < 64 ? m->group / 4 : 16;
}
SCT_INLINE int64_t sct_next_block(int64_t words, int64_t left) {
    while (words > left) words >>= 1;
    return words;
}

/* `sct_prompt` in memory of the caller, of so many bytes; 0: this tier has no such kernel.
 * `exact`: activations meet bfloat16 values in float32. `known`: the memory holds the panels of the
 * activations already, those of the call before. */
SCT_HIDDEN size_t sct_prompt_bytes(const sct_matrix *matrix, int64_t tokens, int exact);
SCT_HIDDEN void sct_prompt_in(char *memory, const sct_matrix *matrix, int64_t x_type, const void *x,
                              int64_t x_stride, void *y, int64_t y_stride, int64_t tokens,
                              int exact, int known);

/* First row of part `part` of `parts`, so that all parts have about as many values. Always even,
 * because rows of int4 come in pairs. */
SCT_HIDDEN int64_t sct_first_row(const sct_matrix *matrix, int64_t part, int64_t parts);

/* `out` may be `x`. Of a layer norm weight and bias may be NULL. */
SCT_HIDDEN void sct_rms_norm(const float *x, const float *weight, int64_t count, float epsilon,
                             float *out);
SCT_HIDDEN void sct_layer_norm(const float *x, const float *weight, const float *bias,
                               int64_t count, float epsilon, float *out);

/* Attention of some tokens. Vectors are those of the first token, those of the others `stride`
 * floats on: products with W_q, W_k and W_v, which are changed, and what W_o multiplies. */
typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    const sct_token *token; /* where each stands; NULL: they follow each other in `slot` */
    int64_t slot, first, tokens;
    float *q, *k, *v, *out;
    int64_t stride;
    char *memory;   /* sct_attention_bytes, aligned to 64 */
    int64_t ranges; /* of keys that are looked at one by one, at most; set by sct_attention_bytes */
    atomic_llong next;
} sct_attention;

SCT_HIDDEN size_t sct_attention_bytes(sct_attention *);
/* By all threads, inside of `work`, with products that are finished. The caller waits (sct_barrier)
 * before anyone reads `out`. */
SCT_HIDDEN void sct_attend(sct_attention *, const sct_layer *, int thread, int threads);

/* Run `work` once on every thread of the pool, the calling one included. One call at a time. */
typedef void sct_work(void *context, int thread, int threads);
SCT_HIDDEN void sct_parallel(sct_work *work, void *context);
SCT_HIDDEN void sct_barrier(int threads); /* inside `work`: all threads have come here */

SCT_INLINE float sct_from_bfloat(uint16_t bits) {
    union { uint32_t u; float f; } x = {(uint32_t)bits << 16};
    return x.f;
}

SCT_INLINE uint16_t sct_to_bfloat(float value) { /* round to nearest even; NaN stays NaN */
    union { float f; uint32_t u; } x = {value};
    if ((x.u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((x.u >> 16) | 0x40);
    return (uint16_t)((x.u + 0x7fffu + ((x.u >> 16) & 1u)) >> 16);
}

#endif
