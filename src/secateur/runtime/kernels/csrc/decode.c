/* Tokens through a whole decoder of Llama's shape, on all threads, with no framework between: up to
 * eight by rows (`sct_decode`), or a prompt by blocks (`sct_read`).
 *
 *     h = x + W_o · attention(rope(W_q n), rope(W_k n), W_v n)        n  = rmsnorm(x)
 *     x = h + W_down · (silu(W_gate n') · W_up n')                    n' = rmsnorm(h)
 *
 * Tokens may be of different sequences, or follow each other in one: all keys and values of a layer
 * are in the caches before any token looks at them. All threads run all of it. Each makes its own
 * copy of what all of them read (norms, rounded activations: some microseconds of arithmetic
 * instead of a barrier) and its own share of rows.
 */
#include <string.h>

#include "internal.h"

/* Vectors of a token, at the same place in the memory of every token. */
typedef struct {
    int64_t x, q, mixed, k, v, gate, up, floats;
} sct_vectors;

typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    int64_t tokens, answers;
    sct_attention *attention;
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
                        int64_t to, int thread, int threads) {
    project(c, m, x, c->widest, c->tokens, memory, NULL, vector(c, to, 0), c->at.floats, thread,
            threads);
}

static void norm_all(const sct_call *c, const float *weight, int64_t tokens, float *out) {
    for (int64_t b = 0; b < tokens; b++)
        sct_rms_norm(vector(c, c->at.x, b), weight, c->d->hidden, c->d->epsilon,
                     out + b * c->widest);
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
        project_all(c, &layer->q, normed, memory, c->at.q, thread, threads);
        project_all(c, &layer->k, normed, memory, c->at.k, thread, threads);
        project_all(c, &layer->v, normed, memory, c->at.v, thread, threads);
        sct_barrier(threads);
        sct_attend(c->attention, layer, thread, threads);
        sct_barrier(threads);
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

static void attention_on(sct_attention *a, const sct_vectors *at, float *vectors, char *memory) {
    a->q = vectors + at->q;
    a->k = vectors + at->k;
    a->v = vectors + at->v;
    a->out = vectors + at->mixed;
    a->stride = at->floats;
    a->memory = memory;
}

int sct_decode(const sct_decoder *d, const float *hidden, const sct_token *token, int64_t tokens,
               int64_t answers, float *logits) {
    sct_attention attention = {.d = d, .code = sct_code(), .token = token, .tokens = tokens};
    sct_call c = {.d = d, .code = sct_code(), .tokens = tokens, .answers = answers,
                  .attention = &attention, .at = vectors_of(d), .logits = logits};
    if (!c.code) return -1;
    c.widest = larger(padded(larger(d->hidden, d->intermediate)), padded(d->heads * d->head));
    c.input_bytes = (size_t)tokens * rounded(4 * (size_t)c.widest + 512);
    c.own_bytes = c.input_bytes + rounded(4 * (size_t)(tokens * c.widest));
    const size_t shared = 4 * (size_t)(tokens * c.at.floats);
    const size_t own = c.own_bytes * (size_t)sct_threads();
    c.shared = sct_memory(shared + own + sct_attention_bytes(&attention));
    if (!c.shared) return -1;
    c.own = (char *)c.shared + shared;
    attention_on(&attention, &c.at, c.shared, c.own + own);
    for (int64_t b = 0; b < tokens; b++)
        memcpy(vector(&c, c.at.x, b), hidden + b * d->hidden, sizeof(float) * (size_t)d->hidden);
    sct_parallel(run, &c);
    sct_free(c.shared);
    return 0;
}

/* A piece of a prompt: its tokens pass each layer together. */
#define PIECE 512 /* tokens */

typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    const sct_layer *layer;
    const float *norm, *bias; /* after the products that were just made */
    int64_t tokens, widest;
    sct_vectors at;
    float *shared, *wide; /* [tokens, at.floats]; [tokens, widest]: normed, or products to add */
    char *blocks;
    sct_attention attention;
} sct_piece;

static float *vector_of(const sct_piece *p, int64_t which, int64_t b) {
    return p->shared + b * p->at.floats + which;
}

static void norm_piece(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const int64_t end = p->tokens * (thread + 1) / threads;
    for (int64_t b = p->tokens * thread / threads; b < end; b++)
        sct_rms_norm(vector_of(p, p->at.x, b), p->norm, p->d->hidden, p->d->epsilon,
                     p->wide + b * p->widest);
}

/* Add what is in `wide` to the residual stream, and put there what the next matrices read. */
static void add_piece(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const int64_t end = p->tokens * (thread + 1) / threads;
    for (int64_t b = p->tokens * thread / threads; b < end; b++) {
        float *x = vector_of(p, p->at.x, b), *sums = p->wide + b * p->widest;
        for (int64_t i = 0; i < p->d->hidden; i++)
            x[i] += sums[i] + (p->bias ? p->bias[i] : 0.0f);
        sct_rms_norm(x, p->norm, p->d->hidden, p->d->epsilon, sums);
    }
}

static void attend_piece(void *context, int thread, int threads) {
    sct_piece *p = context;
    sct_attend(&p->attention, p->layer, thread, threads);
}

static void activate_piece(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const int64_t end = p->tokens * (thread + 1) / threads;
    for (int64_t b = p->tokens * thread / threads; b < end; b++)
        p->code->silu_times(vector_of(p, p->at.gate, b), vector_of(p, p->at.up, b),
                            p->d->intermediate);
}

/* Products of all tokens; `known`: those of the matrix before had the same inputs. */
static void multiply_piece(sct_piece *p, const sct_matrix *m, const float *x, int64_t x_stride,
                           float *y, int64_t y_stride, const sct_matrix *before) {
    const int known = before && before->type == m->type;
    sct_prompt_in(p->blocks, m, SCT_FLOAT32, x, x_stride, y, y_stride, p->tokens,
                  (int)p->d->exact, known);
}

static void to_residual(sct_piece *p, const sct_matrix *m, int64_t from, const float *bias,
                        const float *norm) {
    multiply_piece(p, m, vector_of(p, from, 0), p->at.floats, p->wide, p->widest, NULL);
    p->bias = bias;
    p->norm = norm;
    sct_parallel(add_piece, p);
}

static void read_piece(sct_piece *p) {
    const sct_decoder *d = p->d;
    const int64_t floats = p->at.floats;
    p->norm = d->layer[0].input_norm;
    sct_parallel(norm_piece, p);
    for (int64_t l = 0; l < d->layers; l++) {
        const sct_layer *layer = p->layer = d->layer + l;
        multiply_piece(p, &layer->q, p->wide, p->widest, vector_of(p, p->at.q, 0), floats, NULL);
        multiply_piece(p, &layer->k, p->wide, p->widest, vector_of(p, p->at.k, 0), floats,
                       &layer->q);
        multiply_piece(p, &layer->v, p->wide, p->widest, vector_of(p, p->at.v, 0), floats,
                       &layer->k);
        sct_parallel(attend_piece, p);
        to_residual(p, &layer->o, p->at.mixed, layer->o_bias, layer->post_norm);
        multiply_piece(p, &layer->gate, p->wide, p->widest, vector_of(p, p->at.gate, 0), floats,
                       NULL);
        multiply_piece(p, &layer->up, p->wide, p->widest, vector_of(p, p->at.up, 0), floats,
                       &layer->gate);
        sct_parallel(activate_piece, p);
        to_residual(p, &layer->down, p->at.gate, NULL,
                    l + 1 < d->layers ? d->layer[l + 1].input_norm : d->final_norm);
    }
}

/* The most memory that blocks of any matrix of the layers need; 0: a matrix has none. */
static size_t bytes_of_blocks(const sct_decoder *d, int64_t tokens) {
    size_t most = 0;
    for (int64_t l = 0; l < d->layers; l++) {
        const sct_layer *layer = d->layer + l;
        const sct_matrix *all[] = {&layer->q,    &layer->k,  &layer->v,   &layer->o,
                                   &layer->gate, &layer->up, &layer->down};
        for (int i = 0; i < 7; i++) {
            const size_t bytes = sct_prompt_bytes(all[i], tokens, (int)d->exact);
            if (!bytes) return 0;
            most = bytes > most ? bytes : most;
        }
    }
    return most;
}

int sct_read(const sct_decoder *d, const float *hidden, int64_t slot, int64_t first,
             int64_t tokens, int64_t answers, float *logits) {
    const int64_t most = tokens < PIECE ? tokens : PIECE;
    sct_piece p = {.d = d, .code = sct_code(), .at = vectors_of(d)};
    const size_t blocks = p.code ? bytes_of_blocks(d, most) : 0;
    if (!blocks) return -1;
    p.attention = (sct_attention){
        .d = d, .code = p.code, .slot = slot, .first = first, .tokens = most};
    p.widest = padded(d->hidden);
    const size_t vectors = 4 * (size_t)(most * p.at.floats), wide = 4 * (size_t)(most * p.widest);
    const size_t own = sct_attention_bytes(&p.attention);
    char *memory = sct_memory(vectors + wide + own + blocks);
    if (!memory) return -1;
    p.shared = (float *)memory;
    p.wide = (float *)(memory + vectors);
    p.blocks = memory + vectors + wide + own;
    attention_on(&p.attention, &p.at, p.shared, memory + vectors + wide);
    int status = 0;
    for (int64_t done = 0; done < tokens; done += p.tokens) {
        const int64_t skipped = tokens - answers; /* tokens without an answer come first */
        p.tokens = tokens - done < most ? tokens - done : most;
        p.attention.first = first + done;
        p.attention.tokens = p.tokens;
        for (int64_t b = 0; b < p.tokens; b++)
            memcpy(vector_of(&p, p.at.x, b), hidden + (done + b) * d->hidden,
                   sizeof(float) * (size_t)d->hidden);
        read_piece(&p);
        for (int64_t b = larger(0, skipped - done); b < p.tokens && !status; b += SCT_MAX_BATCH) {
            const int64_t left = p.tokens - b;
            status = sct_linear(&d->head_matrix, SCT_FLOAT32, p.wide + b * p.widest, p.widest,
                                logits + (done + b - skipped) * d->vocabulary, d->vocabulary,
                                left < SCT_MAX_BATCH ? left : SCT_MAX_BATCH);
        }
    }
    sct_free(memory);
    return status;
}
