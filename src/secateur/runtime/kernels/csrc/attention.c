/* Attention of a decoder's layer: from the products with W_q, W_k and W_v to what W_o multiplies.
 *
 * First every token's queries, keys and values are finished (biases, norms, rotary positions), and
 * keys and values are stored in the caches. Then each token looks at the keys of its sequence, at
 * those of its own call too. The tokens are up to eight anywhere, or a piece of a prompt.
 */
#include <math.h>
#include <string.h>

#include "internal.h"

#define QUERY_TOKENS 32 /* of a prompt, that look at a tile of keys together */

static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t slot_of(const sct_attention *a, int64_t b) {
    return a->token ? a->token[b].slot : a->slot;
}

static int64_t position_of(const sct_attention *a, int64_t b) {
    return a->token ? a->token[b].position : a->first + b;
}

static void *cache_row(void *cache, const sct_decoder *d, int64_t slot, int64_t group,
                       int64_t position) {
    const size_t size = d->cache_type == SCT_FLOAT32 ? 4 : 2;
    const int64_t row = (slot * d->kv_heads + group) * d->capacity + position;
    return (char *)cache + size * (size_t)(row * d->head);
}

static void store(void *to, const sct_decoder *d, const float *x) {
    for (int64_t i = 0; i < d->head; i++) {
        if (d->cache_type == SCT_FLOAT32) ((float *)to)[i] = x[i];
        else ((uint16_t *)to)[i] = sct_to_bfloat(x[i]);
    }
}

static void add(float *x, const float *bias, int64_t count) {
    for (int64_t i = 0; bias && i < count; i++) x[i] += bias[i];
}

static void clamp(float *x, float most, int64_t count) {
    for (int64_t i = 0; most > 0.0f && i < count; i++)
        x[i] = x[i] > most ? most : x[i] < -most ? -most : x[i];
}

/* Norm of some heads, whose weights begin at head `first`. */
static void norm_heads(const sct_decoder *d, float *x, const float *weight, int64_t first,
                       int64_t heads) {
    const int64_t head = d->head;
    if (!weight) return;
    if (d->qk_norm == SCT_NORM_WHOLE) {
        sct_rms_norm(x, weight, heads * head, d->epsilon, x);
        return;
    }
    for (int64_t i = 0; i < heads; i++, x += head) {
        if (d->qk_norm == SCT_NORM_LAYER)
            sct_layer_norm(x, weight + (first + i) * head, NULL, head, d->epsilon, x);
        else sct_rms_norm(x, weight, head, d->epsilon, x);
    }
}

/* Rotate the pairs (i, i + rotary / 2) or (2i, 2i + 1) of a head. */
static void rotate(const sct_decoder *d, const float *cosine, const float *sine, float *x) {
    const int64_t half = d->rotary / 2;
    const int64_t step = d->interleaved ? 2 : 1, apart = d->interleaved ? 1 : half;
    for (int64_t i = 0; i < half; i++, x += step) {
        const float a = x[0], b = x[apart];
        x[0] = a * cosine[i] - b * sine[i];
        x[apart] = b * cosine[i] + a * sine[i];
    }
}

/* Some heads of queries or keys, as attention multiplies them. */
static void finish(const sct_decoder *d, const sct_layer *layer, const float *bias,
                   const float *norm, int64_t position, int64_t first, int64_t heads, float *x) {
    const int64_t at = position * (d->rotary / 2), begin = first * d->head;
    x += begin;
    add(x, bias ? bias + begin : NULL, heads * d->head);
    if (!d->norm_rotated) norm_heads(d, x, norm, first, heads);
    clamp(x, d->clip, heads * d->head);
    for (int64_t i = 0; layer->cosine && i < heads; i++)
        rotate(d, layer->cosine + at, layer->sine + at, x + i * d->head);
    if (d->norm_rotated) norm_heads(d, x, norm, first, heads);
}

/* Some groups of a token: their queries, and their keys and values into the caches. */
static void finish_groups(const sct_attention *a, const sct_layer *layer, int64_t b, int64_t begin,
                          int64_t end) {
    const sct_decoder *d = a->d;
    const int64_t slot = slot_of(a, b), position = position_of(a, b), offset = b * a->stride;
    const int64_t each = d->heads / d->kv_heads, first = begin * each, last = end * each;
    float *q = a->q + offset, *k = a->k + offset, *v = a->v + offset;
    finish(d, layer, layer->q_bias, layer->q_norm, position, first, last - first, q);
    for (int64_t i = first * d->head; i < last * d->head; i++) q[i] *= d->attention_scale;
    finish(d, layer, layer->k_bias, layer->k_norm, position, begin, end - begin, k);
    for (int64_t group = begin; group < end; group++) {
        const int64_t at = group * d->head;
        add(v + at, layer->v_bias ? layer->v_bias + at : NULL, d->head);
        clamp(v + at, d->clip, d->head);
        store(cache_row(layer->keys, d, slot, group, position), d, k + at);
        store(cache_row(layer->values, d, slot, group, position), d, v + at);
    }
}

/* A thread's share of all groups of all tokens; a norm over the whole width needs whole tokens. */
static void finish_share(const sct_attention *a, const sct_layer *layer, int thread, int threads) {
    const int64_t groups = a->d->kv_heads;
    const int64_t parts = a->d->qk_norm == SCT_NORM_WHOLE ? 1 : groups, units = parts * a->tokens;
    for (int64_t i = units * thread / threads; i < units * (thread + 1) / threads; i++) {
        const int64_t part = i % parts;
        finish_groups(a, layer, i / parts, groups * part / parts, groups * (part + 1) / parts);
    }
}

/* Queries of some heads of consecutive tokens, and what they look at. */
static sct_queries queries_of(const sct_attention *a, const sct_layer *layer, int64_t b,
                              int64_t tokens, int64_t head, int64_t heads) {
    const sct_decoder *d = a->d;
    const int64_t at = b * a->stride + head * d->head, slot = slot_of(a, b);
    const int64_t group = head / (d->heads / d->kv_heads);
    return (sct_queries){
        .queries = a->q + at,
        .out = a->out + at,
        .tokens = tokens,
        .each = heads,
        .head = d->head,
        .stride = a->stride,
        .keys = cache_row(layer->keys, d, slot, group, 0),
        .values = cache_row(layer->values, d, slot, group, 0),
        .cache_type = d->cache_type,
        .first = position_of(a, b),
        .window = layer->window,
        .softcap = d->softcap,
        .sinks = layer->sinks ? layer->sinks + head : NULL,
    };
}

/* Heads of single tokens; each thread has about as many of each token as the others. */
static void attend_tokens(const sct_attention *a, const sct_layer *layer, float *memory, int thread,
                          int threads) {
    const int64_t units = a->d->heads * a->tokens;
    for (int64_t i = units * thread / threads; i < units * (thread + 1) / threads; i++) {
        sct_queries queries = queries_of(a, layer, i % a->tokens, 1, i / a->tokens, 1);
        queries.memory = memory;
        a->code->attend(&queries);
    }
}

/* Some tokens of a prompt and the heads that share keys, whichever thread is free; the last tokens,
 * which see most, first. */
static void attend_prompt(sct_attention *a, const sct_layer *layer, float *memory) {
    const int64_t each = a->d->heads / a->d->kv_heads;
    const int64_t parts = (a->tokens + QUERY_TOKENS - 1) / QUERY_TOKENS;
    for (;;) {
        const int64_t number = atomic_fetch_add(&a->next, 1);
        if (number >= parts * a->d->kv_heads) return;
        const int64_t group = number % a->d->kv_heads;
        const int64_t begin = (parts - 1 - number / a->d->kv_heads) * QUERY_TOKENS;
        sct_queries queries = queries_of(a, layer, begin, smaller(a->tokens - begin, QUERY_TOKENS),
                                         group * each, each);
        queries.memory = memory;
        a->code->attend_tiles(&queries);
    }
}

static size_t bytes_of_thread(const sct_attention *a) {
    const int64_t rows = QUERY_TOKENS * (a->d->heads / a->d->kv_heads);
    int64_t most = 0;
    if (!a->token) return rounded(4 * (size_t)sct_attention_floats(rows, a->d->head));
    for (int64_t b = 0; b < a->tokens; b++) most = larger(most, a->token[b].position + 1);
    return rounded(4 * (size_t)most);
}

size_t sct_attention_bytes(const sct_attention *a) {
    return bytes_of_thread(a) * (size_t)sct_threads();
}

void sct_attend(sct_attention *a, const sct_layer *layer, int thread, int threads) {
    float *memory = (float *)(a->memory + bytes_of_thread(a) * (size_t)thread);
    finish_share(a, layer, thread, threads);
    if (thread == 0) atomic_store(&a->next, 0);
    sct_barrier(threads);
    if (a->token) attend_tokens(a, layer, memory, thread, threads);
    else attend_prompt(a, layer, memory);
}
