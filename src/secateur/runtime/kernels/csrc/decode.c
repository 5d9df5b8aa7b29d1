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
#include <math.h>
#include <stdatomic.h>
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

/* A piece of a prompt: its tokens pass each layer together. */
#define PIECE 512      /* tokens */
#define QUERY_TOKENS 32 /* of one call of the attention */

typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    const sct_layer *layer;
    const float *norm, *bias; /* after the products that were just made */
    int64_t slot, first, tokens, widest;
    sct_vectors at;
    float *shared, *wide; /* [tokens, at.floats]; [tokens, widest]: normed, or products to add */
    char *blocks;
    float *own; /* a part for each thread */
    int64_t own_floats;
    atomic_llong next;
} sct_piece;

static float *vector_of(const sct_piece *p, int64_t which, int64_t b) {
    return p->shared + b * p->at.floats + which;
}

static void norm_piece(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const int64_t end = p->tokens * (thread + 1) / threads;
    for (int64_t b = p->tokens * thread / threads; b < end; b++)
        rms_norm(vector_of(p, p->at.x, b), p->norm, p->d->hidden, p->d->epsilon,
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
        rms_norm(x, p->norm, p->d->hidden, p->d->epsilon, sums);
    }
}

static void add_bias(float *x, const float *bias, int64_t count) {
    for (int64_t i = 0; bias && i < count; i++) x[i] += bias[i];
}

/* Queries, keys and values as attention wants them; keys and values into the caches. */
static void turn_piece(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const sct_decoder *d = p->d;
    const sct_layer *layer = p->layer;
    const float scale = 1.0f / sqrtf((float)d->head);
    const int64_t end = p->tokens * (thread + 1) / threads;
    for (int64_t b = p->tokens * thread / threads; b < end; b++) {
        const int64_t position = p->first + b;
        float *q = vector_of(p, p->at.q, b), *k = vector_of(p, p->at.k, b);
        float *v = vector_of(p, p->at.v, b);
        add_bias(q, layer->q_bias, d->heads * d->head);
        add_bias(k, layer->k_bias, d->kv_heads * d->head);
        add_bias(v, layer->v_bias, d->kv_heads * d->head);
        for (int64_t head = 0; head < d->heads; head++)
            turn(d, position, q + head * d->head, layer->q_norm);
        for (int64_t i = 0; i < d->heads * d->head; i++) q[i] *= scale;
        for (int64_t group = 0; group < d->kv_heads; group++) {
            turn(d, position, k + group * d->head, layer->k_norm);
            keep(cache_row(layer->keys, d, p->slot, group, position), d, k + group * d->head);
            keep(cache_row(layer->values, d, p->slot, group, position), d, v + group * d->head);
        }
    }
}

/* Attention of some tokens and the heads that share keys, whichever thread is free; the last tokens,
 * which see most, first. */
static void attend_piece(void *context, int thread, int threads) {
    sct_piece *p = context;
    const sct_decoder *d = p->d;
    const int64_t each = d->heads / d->kv_heads;
    const int64_t parts = (p->tokens + QUERY_TOKENS - 1) / QUERY_TOKENS;
    (void)threads;
    for (;;) {
        const int64_t number = atomic_fetch_add(&p->next, 1);
        if (number >= parts * d->kv_heads) return;
        const int64_t group = number % d->kv_heads;
        const int64_t begin = (parts - 1 - number / d->kv_heads) * QUERY_TOKENS;
        const int64_t left = p->tokens - begin;
        const sct_queries queries = {
            .queries = vector_of(p, p->at.q, begin) + group * each * d->head,
            .out = vector_of(p, p->at.mixed, begin) + group * each * d->head,
            .tokens = left < QUERY_TOKENS ? left : QUERY_TOKENS,
            .each = each,
            .head = d->head,
            .stride = p->at.floats,
            .keys = cache_row(p->layer->keys, d, p->slot, group, 0),
            .values = cache_row(p->layer->values, d, p->slot, group, 0),
            .cache_type = d->cache_type,
            .first = p->first + begin,
            .memory = p->own + p->own_floats * thread,
        };
        p->code->attend_tiles(&queries);
    }
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
    sct_prompt_in(p->blocks, m, SCT_FLOAT32, x, x_stride, y, y_stride, p->tokens, known);
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
        sct_parallel(turn_piece, p);
        atomic_store(&p->next, 0);
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
            const size_t bytes = sct_prompt_bytes(all[i], tokens);
            if (!bytes) return 0;
            most = bytes > most ? bytes : most;
        }
    }
    return most;
}

int sct_read(const sct_decoder *d, const float *hidden, int64_t slot, int64_t first,
             int64_t tokens, int64_t answers, float *logits) {
    const int64_t most = tokens < PIECE ? tokens : PIECE;
    sct_piece p = {.d = d, .code = sct_code(), .slot = slot, .at = vectors_of(d)};
    const size_t blocks = p.code ? bytes_of_blocks(d, most) : 0;
    if (!blocks) return -1;
    const int64_t rows = QUERY_TOKENS * (d->heads / d->kv_heads);
    p.widest = padded(d->hidden);
    p.own_floats = padded(sct_attention_floats(rows, d->head));
    const size_t vectors = 4 * (size_t)(most * p.at.floats), wide = 4 * (size_t)(most * p.widest);
    const size_t own = 4 * (size_t)p.own_floats * (size_t)sct_threads();
    char *memory = aligned_alloc(64, vectors + wide + own + blocks);
    if (!memory) return -1;
    p.shared = (float *)memory;
    p.wide = (float *)(memory + vectors);
    p.own = (float *)(memory + vectors + wide);
    p.blocks = memory + vectors + wide + own;
    int status = 0;
    for (int64_t done = 0; done < tokens; done += p.tokens) {
        const int64_t skipped = tokens - answers; /* tokens without an answer come first */
        p.first = first + done;
        p.tokens = tokens - done < most ? tokens - done : most;
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
    free(memory);
    return status;
}
