/* One token through a whole decoder of Llama's shape, on all threads, with no framework between.
 *
 *     h = x + W_o · attention(rope(W_q n), rope(W_k n), W_v n)        n  = rmsnorm(x)
 *     x = h + W_down · (silu(W_gate n') · W_up n')                    n' = rmsnorm(h)
 *
 * All threads run all of it. Each makes its own copy of what all of them read (norms, rounded
 * activations: some microseconds of arithmetic instead of a barrier) and its own share of rows.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    int64_t position;
    float *x, *q, *k, *v, *mixed, *gate, *up, *logits; /* shared */
    char *own;                                         /* a part for each thread */
    size_t own_bytes, input_bytes;
} sct_token;

static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

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

static void add_to(float *x, const float *bias, int64_t begin, int64_t end) {
    for (int64_t i = begin; bias && i < end; i++) x[i] += bias[i];
}

/* A thread's own copy of an input, in the layout that a matrix wants. */
static void prepare(const sct_token *t, const sct_matrix *m, const float *x, char *memory,
                    sct_input *in, sct_rows **rows) {
    const sct_input_kind kind = sct_kind(t->code, m->type, (int)t->d->exact);
    sct_input_place(in, memory, m, 1, kind);
    t->code->prepare(x, m->columns, in, 0, kind);
    *rows = sct_rows_for(t->code, m->type, kind);
}

static void share(const sct_matrix *m, int thread, int threads, int64_t *begin, int64_t *end) {
    *begin = sct_first_row(m, thread, threads);
    *end = sct_first_row(m, thread + 1, threads);
}

/* A thread's rows of one matrix, from an input of its own making. */
static void project(const sct_token *t, const sct_matrix *m, const float *x, char *memory,
                    const float *bias, float *y, int thread, int threads) {
    sct_input in;
    sct_rows *rows;
    int64_t begin, end;
    prepare(t, m, x, memory, &in, &rows);
    share(m, thread, threads, &begin, &end);
    rows(m, &in, begin, end, y, m->rows);
    add_to(y, bias, begin, end);
}

static void *cache_row(void *cache, const sct_decoder *d, int64_t group, int64_t position) {
    const size_t size = d->cache_type == SCT_FLOAT32 ? 4 : 2;
    return (char *)cache + size * (size_t)((group * d->capacity + position) * d->head);
}

static void keep(void *cache, const sct_decoder *d, int64_t group, int64_t position,
                 const float *x) {
    void *to = cache_row(cache, d, group, position);
    for (int64_t i = 0; i < d->head; i++) {
        if (d->cache_type == SCT_FLOAT32) ((float *)to)[i] = x[i];
        else ((uint16_t *)to)[i] = sct_to_bfloat(x[i]);
    }
}

static void turn(const sct_token *t, float *x, const float *norm) {
    const sct_decoder *d = t->d;
    const int64_t at = t->position * (d->head / 2);
    if (norm) rms_norm(x, norm, d->head, d->epsilon, x);
    rotate(x, d->cosine + at, d->sine + at, d->head);
}

/* Keys and values of this token into the cache, then attention: whole heads for each thread. */
static void attention(const sct_token *t, const sct_layer *layer, char *own, int thread,
                      int threads) {
    const sct_decoder *d = t->d;
    const int64_t each = d->heads / d->kv_heads;
    for (int64_t group = thread; group < d->kv_heads; group += threads) {
        turn(t, t->k + group * d->head, layer->k_norm);
        keep(layer->keys, d, group, t->position, t->k + group * d->head);
        keep(layer->values, d, group, t->position, t->v + group * d->head);
    }
    sct_barrier(threads);
    const float scale = 1.0f / sqrtf((float)d->head);
    const int64_t end = d->heads * (thread + 1) / threads;
    for (int64_t head = d->heads * thread / threads; head < end; head++) {
        float *query = t->q + head * d->head;
        turn(t, query, layer->q_norm);
        for (int64_t i = 0; i < d->head; i++) query[i] *= scale;
        t->code->attend(query, cache_row(layer->keys, d, head / each, 0),
                        cache_row(layer->values, d, head / each, 0), d->cache_type,
                        t->position + 1, d->head, (float *)own, t->mixed + head * d->head);
    }
    sct_barrier(threads);
}

/* Rows of gate and up at the same places, so that their product needs no barrier. */
static void feed_forward(const sct_token *t, const sct_layer *layer, const float *normed,
                         char *memory, int thread, int threads) {
    sct_input in;
    sct_rows *rows;
    int64_t begin, end;
    share(&layer->gate, thread, threads, &begin, &end);
    prepare(t, &layer->gate, normed, memory, &in, &rows);
    rows(&layer->gate, &in, begin, end, t->gate, layer->gate.rows);
    if (layer->up.type != layer->gate.type || layer->up.group != layer->gate.group)
        prepare(t, &layer->up, normed, memory, &in, &rows);
    rows(&layer->up, &in, begin, end, t->up, layer->up.rows);
    t->code->silu_times(t->gate + begin, t->up + begin, end - begin);
    sct_barrier(threads);
}

/* Add a thread's rows of W · y to the residual stream. */
static void write_back(const sct_token *t, const sct_matrix *m, const float *y, char *memory,
                       const float *bias, float *sums, int thread, int threads) {
    int64_t begin, end;
    project(t, m, y, memory, bias, sums, thread, threads);
    share(m, thread, threads, &begin, &end);
    for (int64_t i = begin; i < end; i++) t->x[i] += sums[i];
    sct_barrier(threads);
}

static void run(void *context, int thread, int threads) {
    const sct_token *t = context;
    const sct_decoder *d = t->d;
    char *memory = t->own + t->own_bytes * (size_t)thread;
    float *wide = (float *)(memory + t->input_bytes), *normed = wide;
    for (int64_t l = 0; l < d->layers; l++) {
        const sct_layer *layer = d->layer + l;
        rms_norm(t->x, layer->input_norm, d->hidden, d->epsilon, normed);
        project(t, &layer->q, normed, memory, layer->q_bias, t->q, thread, threads);
        project(t, &layer->k, normed, memory, layer->k_bias, t->k, thread, threads);
        project(t, &layer->v, normed, memory, layer->v_bias, t->v, thread, threads);
        sct_barrier(threads);
        attention(t, layer, (char *)wide, thread, threads);
        write_back(t, &layer->o, t->mixed, memory, layer->o_bias, wide, thread, threads);
        rms_norm(t->x, layer->post_norm, d->hidden, d->epsilon, normed);
        feed_forward(t, layer, normed, memory, thread, threads);
        write_back(t, &layer->down, t->gate, memory, NULL, wide, thread, threads);
    }
    rms_norm(t->x, d->final_norm, d->hidden, d->epsilon, normed);
    project(t, &d->head_matrix, normed, memory, NULL, t->logits, thread, threads);
}

int sct_decode(const sct_decoder *d, const float *hidden, int64_t position, float *logits) {
    sct_token t = {.d = d, .code = sct_code(), .position = position, .logits = logits};
    const int64_t widest = larger(padded(larger(d->hidden, d->intermediate)),
                                  padded(d->heads * d->head));
    const int64_t shared = padded(d->hidden) + 2 * padded(d->heads * d->head) +
                           2 * padded(d->kv_heads * d->head) + 2 * padded(d->intermediate);
    if (!t.code) return -1;
    t.input_bytes = rounded(4 * (size_t)widest + 512);
    const size_t wide_bytes = rounded(4 * (size_t)larger(widest, d->capacity));
    t.own_bytes = t.input_bytes + wide_bytes;
    size_t bytes = 4 * (size_t)shared + t.own_bytes * (size_t)sct_threads();
    float *at = aligned_alloc(64, rounded(bytes));
    if (!at) return -1;
    t.x = at;
    t.q = t.x + padded(d->hidden);
    t.mixed = t.q + padded(d->heads * d->head);
    t.k = t.mixed + padded(d->heads * d->head);
    t.v = t.k + padded(d->kv_heads * d->head);
    t.gate = t.v + padded(d->kv_heads * d->head);
    t.up = t.gate + padded(d->intermediate);
    t.own = (char *)(t.up + padded(d->intermediate));
    memcpy(t.x, hidden, sizeof(float) * (size_t)d->hidden);
    sct_parallel(run, &t);
    free(at);
    return 0;
}
