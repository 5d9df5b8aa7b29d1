/* What a token through all layers (decode.c) and a prompt (read.c) share.
 *
 *     h = x + s · norm₂(W_o · attention(norm₁(x)))
 *     x = h + s · norm₄(f(norm₃(h)))                    f(n) = W_down · (act(W_gate n) · W_up n)
 *
 * Each norm may be missing. In a parallel layer f reads norm₃(x), or norm₁(x) where norm₃ is
 * missing. In a mixture f is Σ w_e f_e(n) over the experts that a token is sent to, and over an
 * expert that all tokens are sent to.
 */
#ifndef SECATEUR_DECODE_H
#define SECATEUR_DECODE_H

#include "internal.h"

/* Vectors of a token, at the same place in the memory of every token. */
typedef struct {
    int64_t x, q, mixed, k, v, sum, floats;
} sct_vectors;

/* The largest sizes of all layers, in floats, rounded up to whole words. */
typedef struct {
    int64_t columns; /* of a matrix of the layers, and hidden */
    int64_t neurons; /* of a feed-forward */
    int64_t experts, places; /* of a mixture; feed-forwards that a token passes in a layer */
} sct_sizes;

/* An expert that a token is sent to. */
typedef struct {
    int32_t expert;
    float weight;
} sct_choice;

SCT_INLINE size_t sct_rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
SCT_INLINE int64_t sct_padded(int64_t columns) { return (columns + 63) / 64 * 64; }
SCT_INLINE int64_t sct_larger(int64_t a, int64_t b) { return a > b ? a : b; }
SCT_INLINE int64_t sct_smaller(int64_t a, int64_t b) { return a < b ? a : b; }

SCT_HIDDEN sct_vectors sct_vectors_of(const sct_decoder *d);
SCT_HIDDEN sct_sizes sct_sizes_of(const sct_decoder *d);
/* Run `visit` on every matrix of the layers but routers, until it returns 0; returns what it did. */
SCT_HIDDEN int sct_each_matrix(const sct_decoder *d, int (*visit)(void *, const sct_matrix *),
                               void *context);

SCT_HIDDEN void sct_norm(const sct_decoder *d, const sct_norm_weights *norm, const float *x,
                         float *out);
/* From the router's logits [experts], which are changed, the chosen experts in their order. */
SCT_HIDDEN void sct_route(const sct_decoder *d, const sct_layer *layer, float *logits,
                          sct_choice *choices);
/* The weight of the expert that all tokens are sent to. */
SCT_HIDDEN float sct_shared_weight(const sct_decoder *d, const sct_layer *layer, const float *x);

#endif
