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


static int64_t slot_of(const sct_attention *a, int64_t b) {
    return a->token ? a->token[b].slot : a->slot;
}

static int64_t position_of(const sct_attention *a, int64_t b) {
    return a->token ? a->token[b].position : a->first + b;
}

/* Tiles of a slot and group. */
static char *tiles_of(void *cache, const sct_decoder *d, const sct_layer *layer, int64_t slot,
                      int64_t group) {
    const int64_t bytes = sct_tile_bytes(d->cache_type, sct_width(d->head));
    return (char *)cache + (slot * d->kv_heads + group) * layer->tiles * bytes;
}

/* The largest magnitude, or NaN. */
static float largest(const float *x, int64_t count) {
    float most = 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const float size = fabsf(x[i]);
        most = size > most || size != size ? size : most;
    }
    return most;
}

/* A head into place `t` of a tile of keys, or of values. */
static void put(char *tile, const sct_decoder *d, int of_values, int64_t t, const float *x) {
    const int64_t type = d->cache_type, width = sct_width(d->head), n = sct_unit_values(type);
    const float most = type == SCT_INT8 ? largest(x, d->head) : 0.0f;
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < d->head; i++) {
        const int64_t at = of_values ? (t / n * width + i) * n + t % n
                                     : (i / n * SCT_KEYS + t) * n + i % n;
        if (type == SCT_FLOAT32) ((float *)tile)[at] = x[i];
        else if (type == SCT_BFLOAT16) ((uint16_t *)tile)[at] = sct_to_bfloat(x[i]);
        else ((int8_t *)tile)[at] = (int8_t)(int32_t)rintf(x[i] * inverse);
    }
    if (type == SCT_INT8) ((float *)(tile + SCT_KEYS * width))[t] = most / 127.0f;
}

/* Forget what an older text left in the unit of a position, behind it: a share of 0 times NaN would
 * be NaN. */
static void forget_after(char *tile, const sct_decoder *d, int64_t t) {
    const int64_t width = sct_width(d->head), n = sct_unit_values(d->cache_type);
    const size_t size = 4 / (size_t)n;
    for (int64_t late = t + 1; late % n; late++) {
        for (int64_t i = 0; i < d->head; i++)
            memset(tile + size * (size_t)((t / n * width + i) * n + late % n), 0, size);
        if (d->cache_type == SCT_INT8) ((float *)(tile + SCT_KEYS * width))[late] = 0.0f;
    }
}

/* Whether no other token of the call is behind this one in its sequence. */
static int is_last(const sct_attention *a, int64_t b) {
    if (!a->token) return b == a->tokens - 1;
    for (int64_t i = 0; i < a->tokens; i++)
        if (a->token[i].slot == a->token[b].slot && a->token[i].position > a->token[b].position)
            return 0;
    return 1;
}

/* Key and value of a token in one group into the caches. */
static void store(const sct_attention *a, const sct_layer *layer, int64_t b, int64_t group,
                  const float *key, const float *value) {
    const int64_t slot = slot_of(a, b), position = position_of(a, b), t = position % SCT_KEYS;
    const int64_t at = position / SCT_KEYS % layer->tiles *
                       sct_tile_bytes(a->d->cache_type, sct_width(a->d->head));
    char *values = tiles_of(layer->values, a->d, layer, slot, group) + at;
    put(tiles_of(layer->keys, a->d, layer, slot, group) + at, a->d, 0, t, key);
    put(values, a->d, 1, t, value);
    if (is_last(a, b)) forget_after(values, a->d, t);
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
    const int64_t position = position_of(a, b), offset = b * a->stride;
    const int64_t each = d->heads / d->kv_heads;
    float *k = a->k + offset, *v = a->v + offset;
    finish(d, layer, layer->q_bias, layer->q_norm, position, begin * each, (end - begin) * each,
           a->q + offset);
    finish(d, layer, layer->k_bias, layer->k_norm, position, begin, end - begin, k);
    for (int64_t group = begin; group < end; group++) {
        const int64_t at = group * d->head;
        add(v + at, layer->v_bias ? layer->v_bias + at : NULL, d->head);
        clamp(v + at, d->clip, d->head);
        store(a, layer, b, group, k + at, v + at);
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

/* Results of rows over some keys: sums, most and total of `sct_queries`. */
static size_t part_floats(const sct_attention *a, int64_t rows) {
    return (size_t)(rows * (sct_width(a->d->head) + 2) + 15) / 16 * 16;
}

/* Some tokens and the heads of a group, over the keys of [begin, end), into `part`. */
static void attend(const sct_attention *a, const sct_layer *layer, int64_t b, int64_t tokens,
                   int64_t group, int64_t begin, int64_t end, float *memory, float *part) {
    const sct_decoder *d = a->d;
    const int64_t each = d->heads / d->kv_heads, rows = tokens * each, width = sct_width(d->head);
    float *queries = memory + 2 * SCT_KEYS * width;
    for (int64_t r = 0; r < rows; r++) {
        const float *from = a->q + (b + r / each) * a->stride + (group * each + r % each) * d->head;
        for (int64_t i = 0; i < width; i++)
            queries[r * width + i] = i < d->head ? from[i] * d->attention_scale : 0.0f;
    }
    const sct_queries q = {
        .queries = queries,
        .sums = part, .most = part + rows * width, .total = part + rows * (width + 1),
        .rows = rows, .each = each, .width = width,
        .keys = tiles_of(layer->keys, d, layer, slot_of(a, b), group),
        .values = tiles_of(layer->values, d, layer, slot_of(a, b), group),
        .tiles = layer->tiles, .cache_type = d->cache_type,
        .begin = begin, .end = end,
        .first = position_of(a, b), .window = layer->window,
        .softcap = d->softcap, .exact = d->exact,
        .memory = memory,
    };
    a->code->attend(&q);
}

/* The softmax of a row as far as its keys were looked at. */
typedef struct {
    float most, total;
} sct_softmax;

/* A sink is a key without a value. */
static sct_softmax begin_row(const sct_layer *layer, int64_t head, float *out, int64_t columns) {
    for (int64_t i = 0; i < columns; i++) out[i] = 0.0f;
    if (!layer->sinks) return (sct_softmax){-INFINITY, 0.0f};
    return (sct_softmax){layer->sinks[head], 1.0f};
}

/* Take the results of row `row` of `rows` in a part over later keys. */
static void take(sct_softmax *so_far, const float *part, int64_t rows, int64_t row, int64_t head,
                 float *out) {
    const int64_t width = sct_width(head);
    const float most = part[rows * width + row], total = part[rows * (width + 1) + row];
    if (total == 0.0f) return; /* the row sees none of them */
    const float highest = fmaxf(so_far->most, most);
    const float before = expf(so_far->most - highest), factor = expf(most - highest);
    so_far->total = so_far->total * before + total * factor;
    so_far->most = highest;
    for (int64_t i = 0; i < head; i++) out[i] = out[i] * before + part[row * width + i] * factor;
}

static void end_row(const sct_softmax *so_far, float *out, int64_t head) {
    for (int64_t i = 0; i < head; i++) out[i] /= so_far->total;
}

static float *out_of(const sct_attention *a, int64_t b, int64_t head) {
    return a->out + b * a->stride + head * a->d->head;
}

/* Keys are cut at multiples of this, in a prompt too and however many threads there are, so that
 * sums always have the same order. */
#define RANGE 256

static int64_t ranges_of(const sct_attention *a, int64_t window, int64_t b) {
    const int64_t position = position_of(a, b);
    return position / RANGE - sct_first_seen(window, position) / RANGE + 1;
}

/* The memory of single tokens: [tokens, groups] how many ranges are done, then their results. */
static int64_t most_ranges(const sct_attention *a) {
    int64_t most = 0;
    for (int64_t b = 0; b < a->tokens; b++) most = sct_larger(most, ranges_of(a, 0, b));
    return most;
}

static size_t counter_bytes(const sct_attention *a) {
    return sct_rounded(sizeof(atomic_int) * (size_t)(a->tokens * a->d->kv_heads));
}

/* One range of keys of one token and group. Whoever does the last one merges all. */
static void attend_range(const sct_attention *a, const sct_layer *layer, int64_t b, int64_t group,
                         int64_t range, float *memory) {
    const int64_t each = a->d->heads / a->d->kv_heads, position = position_of(a, b);
    const int64_t seen = sct_first_seen(layer->window, position), from = seen / RANGE + range;
    const int64_t unit = b * a->d->kv_heads + group, ranges = ranges_of(a, layer->window, b);
    const size_t floats = part_floats(a, each);
    atomic_int *done = (atomic_int *)a->memory + unit;
    float *parts = (float *)(a->memory + counter_bytes(a)) + floats * (size_t)(unit * a->ranges);
    attend(a, layer, b, 1, group, sct_larger(from * RANGE, seen),
           sct_smaller((from + 1) * RANGE, position + 1), memory, parts + floats * (size_t)range);
    if (atomic_fetch_add(done, 1) + 1 < ranges) return;
    for (int64_t row = 0; row < each; row++) {
        float *out = out_of(a, b, group * each + row);
        sct_softmax softmax = begin_row(layer, group * each + row, out, a->d->head);
        for (int64_t i = 0; i < ranges; i++)
            take(&softmax, parts + floats * (size_t)i, each, row, a->d->head, out);
        end_row(&softmax, out, a->d->head);
    }
}

static void attend_tokens(sct_attention *a, const sct_layer *layer, float *memory) {
    for (;;) {
        int64_t number = atomic_fetch_add(&a->next, 1), b = 0, ranges = 0;
        for (; b < a->tokens; b++) {
            ranges = ranges_of(a, layer->window, b);
            if (number < ranges * a->d->kv_heads) break;
            number -= ranges * a->d->kv_heads;
        }
        if (b == a->tokens) return;
        attend_range(a, layer, b, number / ranges, number % ranges, memory);
    }
}

/* Some tokens of a prompt and the heads of a group. */
static void attend_piece(const sct_attention *a, const sct_layer *layer, int64_t first,
                         int64_t tokens, int64_t group, float *memory) {
    const int64_t head = a->d->head, each = a->d->heads / a->d->kv_heads, rows = tokens * each;
    const int64_t position = position_of(a, first), end = position + tokens;
    float *part = memory + (2 * SCT_KEYS + rows) * sct_width(head);
    sct_softmax *softmax = (sct_softmax *)(part + part_floats(a, rows));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t number = group * each + r % each;
        softmax[r] = begin_row(layer, number, out_of(a, first + r / each, number), head);
    }
    for (int64_t begin = sct_first_seen(layer->window, position), next; begin < end; begin = next) {
        next = sct_smaller((begin / RANGE + 1) * RANGE, end);
        attend(a, layer, first, tokens, group, begin, next, memory, part);
        for (int64_t r = 0; r < rows; r++)
            take(softmax + r, part, rows, r, head,
                 out_of(a, first + r / each, group * each + r % each));
    }
    for (int64_t r = 0; r < rows; r++)
        end_row(softmax + r, out_of(a, first + r / each, group * each + r % each), head);
}

/* Whichever thread is free takes the next tokens; the last ones, which see most, first. */
static void attend_prompt(sct_attention *a, const sct_layer *layer, float *memory) {
    const int64_t groups = a->d->kv_heads;
    const int64_t pieces = (a->tokens + QUERY_TOKENS - 1) / QUERY_TOKENS;
    for (;;) {
        const int64_t number = atomic_fetch_add(&a->next, 1);
        if (number >= pieces * groups) return;
        const int64_t first = (pieces - 1 - number / groups) * QUERY_TOKENS;
        attend_piece(a, layer, first, sct_smaller(a->tokens - first, QUERY_TOKENS), number % groups,
                     memory);
    }
}

static size_t bytes_of_thread(const sct_attention *a) {
    const int64_t each = a->d->heads / a->d->kv_heads, rows = each * (a->token ? 1 : QUERY_TOKENS);
    const size_t tile = (size_t)((2 * SCT_KEYS + rows) * sct_width(a->d->head));
    const size_t part = part_floats(a, rows) + 2 * (size_t)rows; /* with the softmax of each row */
    return sct_rounded(4 * (tile + (a->token ? 0 : part)));
}

/* What all threads share. */
static size_t shared_bytes(const sct_attention *a) {
    if (!a->token) return 0;
    const size_t parts = (size_t)(a->tokens * a->d->kv_heads * a->ranges);
    return counter_bytes(a) + 4 * part_floats(a, a->d->heads / a->d->kv_heads) * parts;
}

size_t sct_attention_bytes(sct_attention *a) {
    a->ranges = a->token ? most_ranges(a) : 0;
    return shared_bytes(a) + bytes_of_thread(a) * (size_t)sct_threads();
}

void sct_attend(sct_attention *a, const sct_layer *layer, int thread, int threads) {
    char *memory = a->memory + shared_bytes(a) + bytes_of_thread(a) * (size_t)thread;
    finish_share(a, layer, thread, threads);
    if (thread == 0) {
        atomic_store(&a->next, 0);
        if (a->token) memset(a->memory, 0, counter_bytes(a));
    }
    sct_barrier(threads);
    if (a->token) attend_tokens(a, layer, (float *)memory);
    else attend_prompt(a, layer, (float *)memory);
}

static void attend_alone(void *context, int thread, int threads) {
    sct_attention *a = context;
    sct_attend(a, a->d->layer, thread, threads);
}

int sct_attention_alone(const sct_decoder *d, const sct_token *token, int64_t slot, int64_t first,
                        int64_t tokens, float *vectors) {
    const int64_t query = d->heads * d->head, key = d->kv_heads * d->head;
    sct_attention a = {.d = d, .code = sct_code(), .token = token, .slot = slot, .first = first,
                       .tokens = tokens, .q = vectors, .k = vectors + query,
                       .v = vectors + query + key, .out = vectors + query + 2 * key,
                       .stride = 2 * (query + key)};
    if (!a.code) return -1;
    a.memory = sct_memory(sct_attention_bytes(&a));
    if (!a.memory) return -1;
    sct_parallel(attend_alone, &a);
    sct_free(a.memory);
    return 0;
}
