/* Secateur's kernels: matrices stored sparse, multiplied without being expanded.
 *
 * Plain C, no Python and no torch in it; loaded by ctypes. Everything here trusts its arguments:
 * whoever calls has checked shapes, counts and bounds (runtime/kernels/matrix.py does).
 */
#ifndef SECATEUR_H
#define SECATEUR_H

#include <stdint.h>

#define SCT_ABI 13

#if defined(_WIN32)
#define SCT_API __declspec(dllexport)
#else
#define SCT_API __attribute__((visibility("default")))
#endif

typedef enum { SCT_FLOAT32, SCT_BFLOAT16, SCT_FLOAT16, SCT_INT8, SCT_INT4, SCT_TYPES } sct_type;

/* A weight [rows, columns] = [out, in].
 *
 * Bitmask: bit j of a row's mask says whether weight j is kept; `values` are the kept ones, row by
 * row. Dense (mask is NULL): `values` are all weights, rows `stride` apart, zero past the columns.
 * Both: `values` can be read for 64 bytes past its end, and a row's mask is `words` words long,
 * words = columns / 64 rounded up, with zeros past the columns.
 *
 * SCT_INT4 is laid out so that two rows are read at once and few scales are applied.
 *
 * Pairs of rows. Rows 2p and 2p + 1 share bytes: the even row has the lower four bits, the odd row
 * the upper four, each a two's complement of -7 to 7. Dense: a pair has `stride` = words * 64
 * bytes, one for each column. Bitmask: a pair has one mask, of the columns that either row keeps, and
 * a byte for each of them. The mask is [pairs, words]. So a byte is put in its place once for both
 * rows. If there are an odd number of rows, the last one has a partner without weights.
 *
 * Two of four (`of_four` is 2): of each four columns two are stored, with their places, and `mask` is
 * NULL. A pair of rows has `stride` bytes. For each four words of a row: 64 bytes of places, then 64 bytes
 * of weights for words 0 and 1, and 64 for words 2 and 3, in which lane i (below) has the two weights of
 * one word and the two of the next. Places: byte 8 q + 4 p + 2 r + l is for lane 2 q + l of words 2 p and
 * 2 p + 1 of row r of the pair: four times two bits, lower words and columns first. If two words are
 * left: 32 bytes of places, with p = 0, and 64 bytes of weights; one word: the same with 32 bytes
 * of weights. Only kernels for AVX-512 are made for it; the others read it slowly.
 *
 * Order of columns. A row is cut into blocks of K = min(16, group / 4) words, and what is left into
 * one of K / 2, one of K / 4, ... one of 1, where they fit. A block of k words is 16 runs of 4k
 * columns, and word j of the block has columns 4j to 4j + 3 of every run. So each of 16 sums of
 * four products stays in one group of columns for a whole block, and a block needs one conversion
 * to float and one product with the scales. Mask and values both have this order.
 *
 * Scales. Group g of row r has the scale 2^(e + c / 16) * (1 + (c mod 16) / 16), where c is the
 * lower seven bits of `scales`[r, g], e is `exponents`[r], and c / 16 is rounded down: in float32
 * the bits ((e + 127) << 23) + (c << 19). It is negative where the highest bit is 1. Both are there
 * for an even number of rows, and 16 bytes can be read past the end of `scales`.
 */
typedef struct {
    int64_t rows, columns, words, stride;
    int64_t type;
    const void *values;
    const uint64_t *mask;
    const int64_t *offsets; /* [rows + 1], where each row's values begin; of int4 [pairs + 1], where
                               each pair's bytes begin; NULL if dense */
    const float *scale;     /* [rows], int8 only */
    int64_t group;          /* 32, 64 or 128, int4 only, as the next two */
    const uint8_t *scales;  /* [rows, columns / group rounded up] */
    const int8_t *exponents; /* [rows] */
    int64_t of_four;         /* int4 only: 2, or 0 where rows are dense or have a bitmask */
} sct_matrix;

#define SCT_MAX_BATCH 8

/* What the processor can do, and what is used of it: "amx", "avx512bf16", "avx512", "avx2" or "none". */
SCT_API int sct_abi(void);
SCT_API const char *sct_tier(void);
SCT_API int sct_use_tier(const char *tier); /* 0, or -1 if this processor cannot */

/* Threads of the pool, the caller among them. */
SCT_API int sct_threads(void);
SCT_API int sct_set_threads(int threads); /* what was really started */

/* y[b, r] = Σ_c x[b, c] · W[r, c], 1 <= batch <= 8. x and y are both float32, or both bfloat16
 * (x_type), their rows `x_stride` and `y_stride` elements apart. float32 activations meet bfloat16
 * values in float32. Values of int8 and int4 meet activations that are rounded to int8 with one
 * scale for each 64 of them. Returns 0, or -1 if memory ran out or this tier has no kernel. */
SCT_API int sct_linear(const sct_matrix *matrix, int64_t x_type, const void *x, int64_t x_stride,
                       void *y, int64_t y_stride, int64_t batch);

/* The same for any number of tokens, with blocks of the matrix: activations are rounded as there.
 * Returns 0, or -1 if memory ran out or this tier has no kernel. */
SCT_API int sct_prompt(const sct_matrix *matrix, int64_t x_type, const void *x, int64_t x_stride,
                       void *y, int64_t y_stride, int64_t tokens);

/* Rows [begin, end) as a dense tile [end - begin, words · 64]: values as they are, int8 as
 * bfloat16 integers without their scale, int4 as bfloat16 with it, which is exact. Returns 0, or -1
 * if this tier has no kernel. */
SCT_API int sct_expand(const sct_matrix *matrix, int64_t begin, int64_t end, void *tile);

/* The same for `count` rows in any order, each as often as it is named. */
SCT_API int sct_gather(const sct_matrix *matrix, const int64_t *rows, int64_t count, void *tile);

/* The same as a model reads them: float32 [count, columns], times `factor`. With `bfloat` each product
 * is rounded to bfloat16. Returns 0, or -1 if memory ran out or this tier has no kernel. */
SCT_API int sct_embed(const sct_matrix *matrix, const int64_t *rows, int64_t count, float factor,
                      int64_t bfloat, float *out);

/* A cache of keys or values is [slots, kv heads, tiles], a tile for 64 positions: position p is in tile
 * p / 64 modulo the tiles of the layer. There are as many as all positions need; or, of a layer with a
 * window, so many that no two of those which a call sees and appends share one. Values of 4, 2 or 1 bytes stand n = 1, 2 or 4 together in a unit of 4 bytes. With
 * W = head rounded up to a multiple of 16, and zeros past the head, a tile has
 *
 *     keys     [W / n, 64] units, n columns of one position in each
 *     values   [64 / n, W] units, n positions of one column in each
 *
 * and where values are int8, [64] float32 behind them: what those of each position are multiplied by. */

/* Norms of queries and keys: of each head, weights [head]; of all heads together, weights
 * [heads · head]; of each head less its mean, weights [heads, head]. The first two by the root of the
 * mean square. */
typedef enum { SCT_NORM_HEAD, SCT_NORM_WHOLE, SCT_NORM_LAYER } sct_qk_norm;

/* Between the matrices of a feed-forward: act(gate) · up, or act(up) without a gate.
 * SCT_CLAMPED: (up + 1) · gate · sigmoid(alpha · gate), both clamped to `limit` before. */
typedef enum { SCT_SILU, SCT_GELU_TANH, SCT_RELU_SQUARED, SCT_CLAMPED } sct_activation;

/* A norm over hidden; there is none where `weight` is NULL. `bias` may be NULL. */
typedef struct {
    const float *weight, *bias;
} sct_norm_weights;

typedef struct {
    sct_matrix gate, up, down; /* gate.rows 0: no gate */
    const float *gate_bias, *up_bias, *down_bias; /* or NULL */
} sct_ffn;

/* A decoder layer; csrc/decode.h says what it computes. */
typedef struct {
    sct_matrix q, k, v, o;
    sct_norm_weights attention_in, attention_out, ffn_in, ffn_out;
    const float *q_bias, *k_bias, *v_bias, *o_bias; /* or NULL */
    const float *q_norm, *k_norm; /* weights as `qk_norm` of the decoder says, or NULL */
    const float *cosine, *sine; /* [positions, rotary / 2], or NULL: no rotary positions */
    int64_t window;             /* keys that a token sees, its own among them; 0: all */
    const float *sinks; /* [heads], or NULL: a logit in the softmax that has no value */
    void *keys, *values; /* caches */
    int64_t tiles;       /* of a slot and head in them */
    sct_ffn ffn;        /* of all tokens; in a mixture the shared expert; up.rows 0: none */
    int64_t experts;    /* 0: no mixture */
    const sct_ffn *expert;
    sct_matrix router;        /* [experts, hidden] */
    const float *router_bias; /* [experts], or NULL */
    const float *correction;  /* [experts], or NULL: added to scores for the choice alone */
    const float *shared_gate; /* [hidden], or NULL: `ffn` has the weight sigmoid(shared_gate · n) */
} sct_layer;

typedef struct {
    int64_t layers, hidden, heads, kv_heads, head, vocabulary;
    int64_t cache_type;    /* SCT_FLOAT32, SCT_BFLOAT16 or SCT_INT8 */
    int64_t exact;         /* activations meet bfloat16 values in float32 */
    float epsilon;         /* of the norms */
    const sct_layer *layer;
    sct_norm_weights final_norm;
    sct_matrix head_matrix; /* [vocabulary, hidden] */
    int64_t centered;       /* norms subtract the mean */
    int64_t parallel;       /* attention and feed-forward read the same x; then attention_in is there */
    float residual;         /* what is added to the residual stream is multiplied by it */
    int64_t activation;     /* sct_activation */
    float alpha, limit;     /* of SCT_CLAMPED */
    /* Of mixtures: scores are a softmax or, `router_sigmoid`, a sigmoid of each logit; the `chosen`
     * largest are the weights of their experts, divided by their sum if `normalise`. */
    int64_t chosen, router_sigmoid, normalise;
    float routed_scale; /* the weights are multiplied by it */
    /* Of attention: biases, norms (unless `norm_rotated`), clip, rotation, scores, cap, softmax. */
    int64_t rotary;      /* columns of a head that are rotated, from the first on */
    int64_t interleaved; /* pairs are columns 2i and 2i + 1, not i and i + rotary / 2 */
    int64_t qk_norm;      /* sct_qk_norm */
    int64_t norm_rotated; /* queries and keys are normed after the rotation */
    float attention_scale;
    float softcap; /* c: scores are c · tanh(score / c); 0: as they are */
    float clip;    /* queries, keys and values are at most so large; 0: as they are */
    /* The residual stream is written out after so many layers. */
    int64_t taps;
    const int64_t *tap; /* [taps], each from 0 to layers */
    /* Of a draft head: a token has its embedding e and a vector h, together [2 hidden]. The residual
     * stream begins with h, and attention reads [token_norm(e), attention_in(h)]. */
    sct_norm_weights token_norm;
} sct_decoder;

/* Where a token stands: every sequence has its slot of the caches. */
typedef struct {
    int64_t slot, position;
} sct_token;

/* Up to 8 tokens at once. hidden [tokens, hidden] are embedded; no two have the same place. In each
 * slot keys and values of all positions before a token are in the caches, or the token is in this
 * call. logits [answers, vocabulary] are those of the first `answers` tokens; states [tokens, taps,
 * hidden], or NULL, the residual streams of all. What is computed for a token does not depend on the
 * others, to the last bit. Returns 0, or -1 if memory ran out. */
SCT_API int sct_decode(const sct_decoder *decoder, const float *hidden, const sct_token *token,
                       int64_t tokens, int64_t answers, float *logits, float *states);

#define SCT_PIECE 512

/* Any number of tokens that follow each other in a slot, from position `first` on. They pass a layer
 * together, up to SCT_PIECE at once. logits [answers, vocabulary] are those of the last `answers` tokens;
 * states as in `sct_decode`. Returns 0, or -1 if memory ran out or this tier has no kernels. */
SCT_API int sct_read(const sct_decoder *decoder, const float *hidden, int64_t slot, int64_t first,
                     int64_t tokens, int64_t answers, float *logits, float *states);

/* Any number of tokens, no two of one slot, each behind all tokens of its slot. They pass a layer
 * together, by blocks as in `sct_read`, which is faster than `sct_decode` from about 16 tokens on.
 * logits [tokens, vocabulary], or NULL: none are asked for; states as in `sct_decode`. Returns as
 * `sct_read`. */
SCT_API int sct_advance(const sct_decoder *decoder, const float *hidden, const sct_token *token,
                        int64_t tokens, float *logits, float *states);

/* Attention of the first layer alone, to test and to measure it. vectors [tokens, 2 heads + 2 kv
 * heads, head] are the products of each token with W_q, W_k and W_v, which are changed, and behind
 * them room for what W_o multiplies. Tokens, at most 8, stand at `token`, or if it is NULL any number
 * of them in `slot` from position `first` on. Returns 0, or -1 if memory ran out. */
SCT_API int sct_attention_alone(const sct_decoder *decoder, const sct_token *token, int64_t slot,
                                int64_t first, int64_t tokens, float *vectors);

#define SCT_BLOCK 512

/* The probabilities of a token: softmax(logits / temperature) over the tokens that top-k, top-p and
 * min-p keep. Shares e^((logit − most) / temperature) are computed again where they are needed, so
 * nothing of the size of the vocabulary is written. */
typedef struct {
    const float *logits;
    int64_t count;
    const int64_t *ids; /* of the token of each logit, ascending; NULL: 0, 1, ... */
    float temperature, top_p, min_p; /* 1 and 0 keep all tokens */
    int64_t top_k;                   /* 0 keeps all */
    double *sums;  /* room for the shares of each SCT_BLOCK logits */
    int64_t *kept; /* room for `count` places, or NULL if all tokens are kept */
    /* What sct_weigh finds: the places of the largest logit, and of those that are kept, the likeliest
     * first (0 are kept: all); the smallest share that is kept, and of equal ones the last place; Σ. */
    int64_t best, keeps, last;
    float most, factor, least;
    double total;
} sct_chances;

/* Returns 0; -1 if memory ran out or this tier has no kernels; -2 if a logit is NaN or +∞, or all of
 * them are −∞. The numbers that come out are those of one thread, on every tier. */
SCT_API int sct_weigh(sct_chances *chances);

/* The probability of a token. */
SCT_API double sct_chance(const sct_chances *chances, int64_t token);

/* The token that two random numbers of [0, 1) choose: a block of tokens and one of the block. Where
 * some tokens are kept, the second chooses among these. With `less`: by the positive part of chances −
 * less, or by chances if it has none; these have no `ids`, and both keep all tokens or some. */
SCT_API int64_t sct_draw(sct_chances *chances, const sct_chances *less, double block, double place);

#endif
