/* Some tokens through a whole decoder of Llama's shape, on all threads, with no framework between.
 *
 *     h = x + W_o · attention(rope(W_q n), rope(W_k n), W_v n)        n  = rmsnorm(x)
 *     x = h + W_down · (silu(W_gate n') · W_up n')                    n' = rmsnorm(h)
 *
 * Tokens may be of different sequences, or follow each other in one: all keys and values of a layer
 * are in the caches before any token looks at them. All threads run all of it. Each makes its own
 * copy of what all of them read (norms, rounded activations: some microseconds of arithmetic
 * instead of a barrier) and its own share of rows.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Vectors of a token, at the same place in the memory of every token. */
typedef struct {
    int64_t x, q, mixed, k, v, gate, up, floats;
} sct_vectors;

typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    const sct_token *token;
    int64_t tokens, answers;
    sct_vectors at;
    float *shared;  /* [tokens, at.floats] */
    float *logits;  /* [answers, vocabulary] */
    int64_t widest; /* floats of a token in `wide` */
    char *own;      /* a part for each thread */
    size_t own_bytes, input_bytes;
} sct_call;

static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static float *vector(const sct_call *c, int64_t which, int64_t b) {
    return c->shared + b * c->at.floats + which;
}

static void rms_norm(const float *x, const float *weight, int64_t count, float epsilon,
                     float *out) {
    float lanes[16] = {0}, squares = 0.0f;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int l = 0; l < 16; l++) lanes[l] += x[i + l] * x[i + l];
    for (; i < count; i++) squares += x[i] * x[i];
    for (int l = 0; l < 16; l++) squares += lanes[l];
    const float scale = 1.0f / sqrtf(squares / (float)count + epsilon);
    for (i = 0; i < count; i++) out[i] = x[i] * scale * weight[i];
}

/* Rotate pairs (i, i + head / 2), as transformers does. */
static void rotate(float *x, const float *cosine, const float *sine, int64_t head) {
    for (int64_t i = 0; i < head / 2; i++) {
        const float a = x[i], b = x[i + head / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + head / 2] = b * cosine[i] + a * sine[i];
    }
}

/* A thread's own copy of the inputs of some tokens, in the layout that a matrix wants. */
static sct_rows *prepare(const sct_call *c, const sct_matrix *m, const float *x, int64_t stride,
                         int64_t tokens, char *memory, sct_input *in) {
    const sct_input_kind kind = sct_kind(c->code, m->type, (int)c->d->exact);
    sct_input_place(in, memory, m, tokens, kind);
    for (int64_t b = 0; b < tokens; b++) c->code->prepare(x + b * stride, m->columns, in, b, kind);
    return sct_rows_for(c->code, m->type, kind);
}

static void share(const sct_matrix *m, int thread, int threads, int64_t *begin, int64_t *end) {
    *begin = sct_first_row(m, thread, threads);
    *end = sct_first_row(m, thread + 1, threads);
}

/* A thread's rows of one matrix, from inputs of its own making. */
static void project(const sct_call *c, const sct_matrix *m, const float *x, int64_t stride,
                    int64_t tokens, char *memory, const float *bias, float *y, int64_t y_stride,
                    int thread, int threads) {
    sct_input in;
    int64_t begin, end;
    sct_rows *rows = prepare(c, m, x, stride, tokens, memory, &in);
    share(m, thread, threads, &begin, &end);
    rows(m, &in, begin, end, y, y_stride);
    for (int64_t b = 0; bias && b < tokens; b++)
        for (int64_t i = begin; i < end; i++) y[b * y_stride + i] += bias[i];
}

/* The same for every token, into one of its vectors. */
static void project_all(const sct_call *c, const sct_matrix *m, const float *x, char *memory,
                        const float *bias, int64_t to, int thread, int threads) {
    project(c, m, x, c->widest, c->tokens, memory, bias, vector(c, to, 0), c->at.floats, thread,
            threads);
}

static void norm_all(const sct_call *c, const float *weight, int64_t tokens, float *out) {
    for (int64_t b = 0; b < tokens; b++)
        rms_norm(vector(c, c->at.x, b), weight, c->d->hidden, c->d->epsilon, out + b * c->widest);
}

static void *cache_row(void *cache, const sct_decoder *d, int64_t slot, int64_t group,
                       int64_t position) {
    const size_t size = d->cache_type == SCT_FLOAT32 ? 4 : 2;
    const int64_t row = (slot * d->kv_heads + group) * d->capacity + position;
    return (char *)cache + size * (size_t)(row * d->head);
}

static void keep(void *to, const sct_decoder *d, const float *x) {
    for (int64_t i = 0; i < d->head; i++) {
        if (d->cache_type == SCT_FLOAT32) ((float *)to)[i] = x[i];
        else ((uint16_t *)to)[i] = sct_to_bfloat(x[i]);
    }
}

static void turn(const sct_decoder *d, int64_t position, float *x, const float *norm) {
    const int64_t at = position * (d->head / 2);
    if (norm) rms_norm(x, norm, d->head, d->epsilon, x);
    rotate(x, d->cosine + at, d->sine + at, d->head);
}

/* Keys and values of the tokens into the caches, then attention: each thread has whole heads, and
 * of each token about as many as the others. */
static void attention(const sct_call *c, const sct_layer *layer, char *own, int thread,
                      int threads) {
    const sct_decoder *d = c->d;
    const int64_t each = d->heads / d->kv_heads;
    for (int64_t i = thread; i < d->kv_heads * c->tokens; i += threads) {
        const int64_t group = i / c->tokens, b = i % c->tokens;
        const int64_t slot = c->token[b].slot, position = c->token[b].position;
        float *k = vector(c, c->at.k, b) + group * d->head;
        turn(d, position, k, layer->k_norm);
        keep(cache_row(layer->keys, d, slot, group, position), d, k);
        keep(cache_row(layer->values, d, slot, group, position), d,
             vector(c, c->at.v, b) + group * d->head);
    }
    sct_barrier(threads);
    const float scale = 1.0f / sqrtf((float)d->head);
    const int64_t pieces = d->heads * c->tokens, end = pieces * (thread + 1) / threads;
    for (int64_t i = pieces * thread / threads; i < end; i++) {
        const int64_t head = i / c->tokens, b = i % c->tokens;
        const int64_t slot = c->token[b].slot, position = c->token[b].position;
        float *query = vector(c, c->at.q, b) + head * d->head;
        turn(d, position, query, layer->q_norm);
        for (int64_t j = 0; j < d->head; j++) query[j] *= scale;
        c->code->attend(query, cache_row(layer->keys, d, slot, head / each, 0),
                        cache_row(layer->values, d, slot, head / each, 0), d->cache_type,
                        position + 1, d->head, (float *)own,
                        vector(c, c->at.mixed, b) + head * d->head);
    }
    sct_barrier(threads);
}

/* Rows of gate and up at the same places, so that their product needs no barrier. */
static void feed_forward(const sct_call *c, const sct_layer *layer, const float *normed,
                         char *memory, int thread, int threads) {
    sct_input in;
    int64_t begin, end;
    const sct_matrix *gate = &layer->gate, *up = &layer->up;
    share(gate, thread, threads, &begin, &end);
    sct_rows *rows = prepare(c, gate, normed, c->widest, c->tokens, memory, &in);
    rows(gate, &in, begin, end, vector(c, c->at.gate, 0), c->at.floats);
    if (up->type != gate->type || up->group != gate->group)
        rows = prepare(c, up, normed, c->widest, c->tokens, memory, &in);
    rows(up, &in, begin, end, vector(c, c->at.up, 0), c->at.floats);
    for (int64_t b = 0; b < c->tokens; b++)
        c->code->silu_times(vector(c, c->at.gate, b) + begin, vector(c, c->at.up, b) + begin,
                            end - begin);
    sct_barrier(threads);
}

/* Add a thread's rows of W · y to the residual stream. */
static void write_back(const sct_call *c, const sct_matrix *m, int64_t from, char *memory,
                       const float *bias, float *sums, int thread, int threads) {
    int64_t begin, end;
    project(c, m, vector(c, from, 0), c->at.floats, c->tokens, memory, bias, sums, c->widest,
            thread, threads);
    share(m, thread, threads, &begin, &end);
    for (int64_t b = 0; b < c->tokens; b++)
        for (int64_t i = begin; i < end; i++) vector(c, c->at.x, b)[i] += sums[b * c->widest + i];
    sct_barrier(threads);
}

static void run(void *context, int thread, int threads) {
    const sct_call *c = context;
    const sct_decoder *d = c->d;
    char *memory = c->own + c->own_bytes * (size_t)thread;
    float *wide = (float *)(memory + c->input_bytes), *normed = wide;
    for (int64_t l = 0; l < d->layers; l++) {
        const sct_layer *layer = d->layer + l;
        norm_all(c, layer->input_norm, c->tokens, normed);
        project_all(c, &layer->q, normed, memory, layer->q_bias, c->at.q, thread, threads);
        project_all(c, &layer->k, normed, memory, layer->k_bias, c->at.k, thread, threads);
        project_all(c, &layer->v, normed, memory, layer->v_bias, c->at.v, thread, threads);
        sct_barrier(threads);
        attention(c, layer, (char *)wide, thread, threads);
        write_back(c, &layer->o, c->at.mixed, memory, layer->o_bias, wide, thread, threads);
        norm_all(c, layer->post_norm, c->tokens, normed);
        feed_forward(c, layer, normed, memory, thread, threads);
        write_back(c, &layer->down, c->at.gate, memory, NULL, wide, thread, threads);
    }
    if (c->answers == 0) return;
    norm_all(c, d->final_norm, c->answers, normed);
    project(c, &d->head_matrix, normed, c->widest, c->answers, memory, NULL, c->logits,
            d->vocabulary, thread, threads);
}

static sct_vectors vectors_of(const sct_decoder *d) {
    const int64_t query = padded(d->heads * d->head), key = padded(d->kv_heads * d->head);
    sct_vectors at = {.x = 0, .q = padded(d->hidden)};
    at.mixed = at.q + query;
    at.k = at.mixed + query;
    at.v = at.k + key;
    at.gate = at.v + key;
    at.up = at.gate + padded(d->intermediate);
    at.floats = at.up + padded(d->intermediate);
    return at;
}

int sct_decode(const sct_decoder *d, const float *hidden, const sct_token *token, int64_t tokens,
               int64_t answers, float *logits) {
    sct_call c = {.d = d, .code = sct_code(), .token = token, .tokens = tokens,
                  .answers = answers, .at = vectors_of(d), .logits = logits};
    if (!c.code) return -1;
    c.widest = larger(padded(larger(d->hidden, d->intermediate)), padded(d->heads * d->head));
    c.input_bytes = (size_t)tokens * rounded(4 * (size_t)c.widest + 512);
    c.own_bytes = c.input_bytes + rounded(4 * (size_t)larger(tokens * c.widest, d->capacity));
    const size_t shared = 4 * (size_t)(tokens * c.at.floats);
    c.shared = aligned_alloc(64, rounded(shared + c.own_bytes * (size_t)sct_threads()));
    if (!c.shared) return -1;
    c.own = (char *)c.shared + shared;
    for (int64_t b = 0; b < tokens; b++)
        memcpy(vector(&c, c.at.x, b), hidden + b * d->hidden, sizeof(float) * (size_t)d->hidden);
    sct_parallel(run, &c);
    free(c.shared);
    return 0;
}
