/* What a token through all layers (decode.c) and a prompt (read.c) share.
 *
 *     h = x + s · norm₂(W_o · attention(norm₁(x)))
 *     x = h + s · norm₄(f(norm₃(h)))                    f(n) = W_down · (act(W_gate n) · W_up n)
 *
 * Each norm may be missing. In a parallel layer f reads norm₃(x), or norm₁(x) where norm₃ is
 * missing. In a mixture f is Σ w_e f_e(n) over the experts that a token is sent to, and over an
 * expert that all tokens are sent to. In a draft head attention reads [norm(e), norm₁(x)], where e is
 * the embedding of the token.
 */
#ifndef SECATEUR_DECODE_H
#define SECATEUR_DECODE_H

#include "internal.h"

/* Where the vectors of a token are, at the same places of every token. */
typedef struct {
    int64_t x, q, mixed, k, v, sum, embedded, floats;
    float *memory; /* [tokens, floats] */
} sct_vectors;

/* Vectors of some tokens. */
typedef struct {
    float *x;
    int64_t stride;
} sct_floats;

/* The largest sizes of all layers, in floats, rounded up to whole words. */
typedef struct {
    int64_t columns; /* of a matrix of the layers, and hidden */
    int64_t normed;  /* what the matrices of attention read */
    int64_t neurons; /* of a feed-forward */
    int64_t experts, places; /* of a mixture; feed-forwards that a token passes in a layer */
} sct_sizes;

/* An expert that a token is sent to. */
typedef struct {
    int32_t expert;
    float weight;
} sct_choice;

SCT_HIDDEN sct_vectors sct_vectors_of(const sct_decoder *d);
/* A vector of token b, `which` of the places; and those of all tokens. */
SCT_INLINE float *sct_vector(const sct_vectors *v, int64_t which, int64_t b) {
    return v->memory + b * v->floats + which;
}
SCT_INLINE sct_floats sct_each(const sct_vectors *v, int64_t which) {
    return (sct_floats){sct_vector(v, which, 0), v->floats};
}
SCT_HIDDEN sct_sizes sct_sizes_of(const sct_decoder *d);
/* The first vectors of tokens; and attention that reads and writes theirs. */
SCT_HIDDEN void sct_take_embedded(const sct_decoder *d, const sct_vectors *v, const float *hidden,
                                  int64_t tokens);
SCT_HIDDEN void sct_attend_to(sct_attention *a, const sct_vectors *v);
/* Columns [begin, end) of the residual streams after so many layers, where they are asked for. */
SCT_HIDDEN void sct_write_states(const sct_decoder *d, const sct_vectors *v, int64_t layers,
                                 int64_t tokens, int64_t begin, int64_t end, float *states);
/* Run `visit` on every matrix of the layers but routers, until it returns 0; returns what it did. */
SCT_HIDDEN int sct_each_matrix(const sct_decoder *d, int (*visit)(void *, const sct_matrix *),
                               void *context);

SCT_HIDDEN void sct_norm(const sct_decoder *d, const sct_norm_weights *norm, const float *x,
                         float *out);
/* The residual stream of a token as the next matrices read it: attention of a draft head reads the
 * embedding too. */
SCT_HIDDEN void sct_normed(const sct_decoder *d, const sct_norm_weights *norm,
                           const sct_vectors *v, int64_t b, float *out);
/* From the router's logits [experts], which are changed, the chosen experts in their order. */
SCT_HIDDEN void sct_route(const sct_decoder *d, const sct_layer *layer, float *logits,
                          sct_choice *choices);
/* The weight of the expert that all tokens are sent to. */
SCT_HIDDEN float sct_shared_weight(const sct_decoder *d, const sct_layer *layer, const float *x);

#endif
