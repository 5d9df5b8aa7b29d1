/* Secateur's kernels: matrices stored sparse, multiplied without being expanded.
 *
 * Plain C, no Python and no torch in it; loaded by ctypes. Everything here trusts its arguments:
 * whoever calls has checked shapes, counts and bounds (runtime/kernels/matrix.py does).
 */
#ifndef SECATEUR_H
#define SECATEUR_H

#include <stdint.h>

#define SCT_ABI 2

typedef enum { SCT_FLOAT32, SCT_BFLOAT16, SCT_FLOAT16, SCT_INT8, SCT_TYPES } sct_type;

/* A weight [rows, columns] = [out, in].
 *
 * Bitmask: bit j of a row's mask says whether weight j is kept; `values` are the kept ones, row by
 * row. Dense (mask is NULL): `values` are all weights, rows `stride` apart, zero past the columns.
 * Both: `values` can be read for 64 bytes past its end, and a row's mask is `words` words long,
 * words = columns / 64 rounded up, with zeros past the columns.
 */
typedef struct {
    int64_t rows, columns, words, stride;
    int64_t type;
    const void *values;
    const uint64_t *mask;
    const int64_t *offsets; /* [rows + 1], where each row's values begin; NULL if dense */
    const float *scale;     /* [rows], int8 only */
} sct_matrix;

#define SCT_MAX_BATCH 8

/* What the processor can do, and what is used of it: "amx", "avx512bf16", "avx512", "avx2" or "none". */
int sct_abi(void);
const char *sct_tier(void);
int sct_use_tier(const char *tier); /* 0, or -1 if this processor cannot */

/* Threads of the pool, the caller among them. */
int sct_threads(void);
int sct_set_threads(int threads); /* what was really started */

/* y[b, r] = Σ_c x[b, c] · W[r, c], 1 <= batch <= 8. x and y are both float32, or both bfloat16
 * (x_type), their rows `x_stride` and `y_stride` elements apart. float32 activations meet bfloat16
 * values in float32. Values of int8 meet activations that are rounded to int8 with one scale for
 * each 256 of them. Returns 0, or -1 if memory ran out or this tier has no kernel. */
int sct_linear(const sct_matrix *matrix, int64_t x_type, const void *x, int64_t x_stride, void *y,
               int64_t y_stride, int64_t batch);

/* The same for any number of tokens, for values of int8: activations are rounded as there, and
 * blocks of the matrix are multiplied as integers. Returns 0, or -1 if memory ran out, this tier
 * has no such kernel, or the values are of another type. */
int sct_prompt(const sct_matrix *matrix, int64_t x_type, const void *x, int64_t x_stride, void *y,
               int64_t y_stride, int64_t tokens);

/* Rows [begin, end) as a dense tile [end - begin, words · 64]: values as they are, int8 as
 * bfloat16 integers without their scale. 0, or -1 if this tier has no kernel. */
int sct_expand(const sct_matrix *matrix, int64_t begin, int64_t end, void *tile);

/* A decoder of Llama's shape, and one token through it. */
typedef struct {
    sct_matrix q, k, v, o, gate, up, down;
    const float *input_norm, *post_norm;           /* [hidden] */
    const float *q_bias, *k_bias, *v_bias, *o_bias; /* or NULL */
    const float *q_norm, *k_norm;                  /* [head], or NULL */
    void *keys, *values;                           /* [kv heads, capacity, head] float32 or bfloat16 */
} sct_layer;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, head, intermediate, vocabulary, capacity;
    int64_t cache_type;    /* SCT_FLOAT32 or SCT_BFLOAT16 */
    int64_t exact;         /* activations meet bfloat16 values in float32 */
    float epsilon;         /* of the norms */
    const sct_layer *layer;
    const float *final_norm;
    sct_matrix head_matrix; /* [vocabulary, hidden] */
    const float *cosine, *sine; /* [capacity, head / 2] */
} sct_decoder;

/* hidden [hidden] is the embedded token at `position`; logits [vocabulary]. Keys and values of the
 * positions before it are in the cache. Returns 0, or -1. */
int sct_decode(const sct_decoder *decoder, const float *hidden, int64_t position, float *logits);

#endif
