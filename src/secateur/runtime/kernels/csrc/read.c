/* A prompt, or a token of each of many sequences, through all layers (decode.h): the tokens pass each
 * layer together, by blocks. */
#include <string.h>

#include "decode.h"

typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    const sct_layer *layer;
    const sct_norm_weights *after, *next; /* of the sums, and what the next matrices read */
    const float *bias;                    /* of the sums */
    const sct_ffn *ffn;
    int64_t tokens;
    sct_vectors at;
    sct_sizes sizes;
    float *normed;     /* [tokens, columns that the next matrices read] */
    float *inner, *up; /* [tokens, neurons] */
    float *gathered, *given; /* [tokens, hidden]: what an expert reads and writes */
    float *router;           /* [tokens, experts] */
    sct_choice *choices;     /* [tokens, chosen] */
    int64_t *sent;           /* [tokens]: those that are sent to an expert */
    float *weights;          /* [tokens]: theirs */
    int64_t sent_tokens;
    char *blocks;
    sct_attention attention;
    int few; /* an expert has so few tokens that no tile is expanded for them */
    int failed;
} sct_piece;

static sct_floats rows_at(float *x, int64_t columns) {
    return (sct_floats){x, sct_padded(columns)};
}

/* A thread's share of some tokens. */
static void tokens_of(int64_t tokens, int thread, int threads, int64_t *begin, int64_t *end) {
    *begin = tokens * thread / threads;
    *end = tokens * (thread + 1) / threads;
}

static void norm_tokens(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const sct_floats to = rows_at(p->normed, p->sizes.normed);
    int64_t begin, end;
    tokens_of(p->tokens, thread, threads, &begin, &end);
    for (int64_t b = begin; b < end; b++)
        sct_normed(p->d, p->next, &p->at, b, to.x + b * to.stride);
}

/* The residual stream as the next matrices read it. */
static sct_floats normed(sct_piece *p, const sct_norm_weights *norm) {
    if (!norm->weight) return sct_each(&p->at, p->at.x);
    p->next = norm;
    sct_parallel(norm_tokens, p);
    return rows_at(p->normed, p->sizes.normed);
}

static void add_tokens(void *context, int thread, int threads) {
    const sct_piece *p = context;
    int64_t begin, end;
    tokens_of(p->tokens, thread, threads, &begin, &end);
    for (int64_t b = begin; b < end; b++) {
        float *x = sct_vector(&p->at, p->at.x, b), *sum = sct_vector(&p->at, p->at.sum, b);
        for (int64_t i = 0; p->bias && i < p->d->hidden; i++) sum[i] += p->bias[i];
        if (p->after->weight) sct_norm(p->d, p->after, sum, sum);
        for (int64_t i = 0; i < p->d->hidden; i++) x[i] += p->d->residual * sum[i];
    }
}

/* Add the sums, of which a bias is missing, to the residual stream. */
static void to_residual(sct_piece *p, const float *bias, const sct_norm_weights *norm) {
    p->bias = bias;
    p->after = norm;
    sct_parallel(add_tokens, p);
}

static void attend(void *context, int thread, int threads) {
    sct_piece *p = context;
    sct_attend(&p->attention, p->layer, thread, threads);
}

/* Products of up to eight tokens, by rows. */
static void multiply_rows(sct_piece *p, const sct_matrix *m, sct_floats from, sct_floats to,
                          int64_t tokens) {
    p->failed |= sct_linear(m, SCT_FLOAT32, from.x, from.stride, to.x, to.stride, tokens);
}

/* Products of some tokens by blocks; `known`: those of the matrix before had the same inputs. */
static void multiply(sct_piece *p, const sct_matrix *m, sct_floats from, sct_floats to,
                     int64_t tokens, const sct_matrix *before) {
    const int known = before && before->type == m->type;
    if (p->few) multiply_rows(p, m, from, to, tokens);
    else
        sct_prompt_in(p->blocks, m, SCT_FLOAT32, from.x, from.stride, to.x, to.stride, tokens,
                      (int)p->d->exact, known);
}

static void activate(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const int gated = p->ffn->gate.rows > 0;
    const int64_t neurons = p->ffn->up.rows, stride = p->sizes.neurons;
    const float *bias = gated ? p->ffn->gate_bias : p->ffn->up_bias;
    int64_t begin, end;
    tokens_of(p->sent_tokens, thread, threads, &begin, &end);
    for (int64_t b = begin; b < end; b++) {
        float *inner = p->inner + b * stride, *up = gated ? p->up + b * stride : NULL;
        for (int64_t i = 0; bias && i < neurons; i++) inner[i] += bias[i];
        for (int64_t i = 0; gated && p->ffn->up_bias && i < neurons; i++)
            up[i] += p->ffn->up_bias[i];
        p->code->activate(p->d, inner, up, neurons);
    }
}

/* W_down · (act(W_gate n) · W_up n) of some tokens, without the bias of W_down. */
static void feed_forward(sct_piece *p, const sct_ffn *ffn, sct_floats from, sct_floats to,
                         int64_t tokens) {
    const sct_floats inner = {p->inner, p->sizes.neurons}, up = {p->up, p->sizes.neurons};
    const int gated = ffn->gate.rows > 0;
    if (gated) multiply(p, &ffn->gate, from, inner, tokens, NULL);
    multiply(p, &ffn->up, from, gated ? up : inner, tokens, gated ? &ffn->gate : NULL);
    p->ffn = ffn;
    p->sent_tokens = tokens;
    sct_parallel(activate, p);
    multiply(p, &ffn->down, inner, to, tokens, NULL);
}

/* Sums of the tokens of one feed-forward. */
static void scatter(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const sct_floats given = rows_at(p->given, p->d->hidden);
    const float *bias = p->ffn->down_bias;
    int64_t begin, end;
    tokens_of(p->sent_tokens, thread, threads, &begin, &end);
    for (int64_t n = begin; n < end; n++) {
        float *sum = sct_vector(&p->at, p->at.sum, p->sent[n]), *y = given.x + n * given.stride;
        for (int64_t i = 0; i < p->d->hidden; i++)
            sum[i] += p->weights[n] * (y[i] + (bias ? bias[i] : 0.0f));
    }
}

/* Where each token is sent, and sums of 0. */
static void route(void *context, int thread, int threads) {
    const sct_piece *p = context;
    const int64_t chosen = sct_smaller(p->d->chosen, p->layer->experts);
    int64_t begin, end;
    tokens_of(p->tokens, thread, threads, &begin, &end);
    for (int64_t b = begin; b < end; b++) {
        memset(sct_vector(&p->at, p->at.sum, b), 0, sizeof(float) * (size_t)p->d->hidden);
        sct_route(p->d, p->layer, p->router + b * p->sizes.experts, p->choices + b * chosen);
    }
}

/* The tokens of one expert go through it. */
static void pass_expert(sct_piece *p, int64_t e, sct_floats from) {
    const int64_t chosen = sct_smaller(p->d->chosen, p->layer->experts);
    const sct_floats gathered = rows_at(p->gathered, p->d->hidden);
    int64_t count = 0;
    for (int64_t i = 0; i < p->tokens * chosen; i++) {
        if (p->choices[i].expert != e) continue;
        p->sent[count] = i / chosen;
        p->weights[count] = p->choices[i].weight;
        memcpy(gathered.x + count * gathered.stride, from.x + i / chosen * from.stride,
               sizeof(float) * (size_t)p->d->hidden);
        count++;
    }
    if (!count) return;
    /* expanding a tile of W costs as much as some products; few tokens do not earn it back */
    p->few = count <= SCT_MAX_BATCH;
    feed_forward(p, p->layer->expert + e, gathered, rows_at(p->given, p->d->hidden), count);
    p->few = 0;
    sct_parallel(scatter, p);
}

/* Σ w_e f_e(n) of all tokens. */
static void mixture(sct_piece *p, sct_floats from) {
    const sct_layer *layer = p->layer;
    const sct_floats router = {p->router, p->sizes.experts};
    for (int64_t b = 0; b < p->tokens; b += SCT_MAX_BATCH) {
        const sct_floats x = {from.x + b * from.stride, from.stride};
        const sct_floats y = {router.x + b * router.stride, router.stride};
        multiply_rows(p, &layer->router, x, y, sct_smaller(p->tokens - b, SCT_MAX_BATCH));
    }
    sct_parallel(route, p);
    if (layer->ffn.up.rows) {
        feed_forward(p, &layer->ffn, from, rows_at(p->given, p->d->hidden), p->tokens);
        for (int64_t b = 0; b < p->tokens; b++) {
            p->sent[b] = b;
            p->weights[b] = sct_shared_weight(p->d, layer, from.x + b * from.stride);
        }
        sct_parallel(scatter, p);
    }
    for (int64_t e = 0; e < layer->experts; e++) pass_expert(p, e, from);
}

static void read_layer(sct_piece *p, const sct_layer *layer) {
    const int parallel = p->d->parallel != 0;
    const sct_floats sum = sct_each(&p->at, p->at.sum);
    sct_floats x = normed(p, &layer->attention_in);
    p->layer = layer;
    multiply(p, &layer->q, x, sct_each(&p->at, p->at.q), p->tokens, NULL);
    /* k and v read the activations that q has rounded already */
    multiply(p, &layer->k, x, sct_each(&p->at, p->at.k), p->tokens, &layer->q);
    multiply(p, &layer->v, x, sct_each(&p->at, p->at.v), p->tokens, &layer->k);
    /* before attention is added: both read the same x */
    if (parallel && layer->ffn_in.weight) x = normed(p, &layer->ffn_in);
    sct_parallel(attend, p);
    multiply(p, &layer->o, sct_each(&p->at, p->at.mixed), sum, p->tokens, NULL);
    to_residual(p, layer->o_bias, &layer->attention_out);
    if (!parallel) x = normed(p, &layer->ffn_in);
    if (layer->experts) mixture(p, x);
    else feed_forward(p, &layer->ffn, x, sum, p->tokens);
    to_residual(p, layer->experts ? NULL : layer->ffn.down_bias, &layer->ffn_out);
}

/* Logits of the tokens from `first` on. */
static void answer(sct_piece *p, int64_t first, float *logits) {
    const sct_floats x = normed(p, &p->d->final_norm);
    for (int64_t b = first; b < p->tokens; b += SCT_MAX_BATCH) {
        const sct_floats to = {logits + (b - first) * p->d->vocabulary, p->d->vocabulary};
        multiply_rows(p, &p->d->head_matrix, (sct_floats){x.x + b * x.stride, x.stride}, to,
                      sct_smaller(p->tokens - b, SCT_MAX_BATCH));
    }
}

typedef struct {
    int64_t tokens;
    int exact;
    size_t most;
} sct_block_bytes;

static int widen(void *context, const sct_matrix *m) {
    sct_block_bytes *b = context;
    const size_t bytes = sct_prompt_bytes(m, b->tokens, b->exact);
    b->most = bytes > b->most ? bytes : b->most;
    return bytes > 0;
}

/* Memory for everything; returns its bytes, and sets the places where `memory` is given. */
static size_t lay_out(sct_piece *p, int64_t tokens, size_t blocks, char *memory) {
    const size_t n = (size_t)tokens, hidden = (size_t)sct_padded(p->d->hidden);
    const size_t neurons = (size_t)p->sizes.neurons, experts = (size_t)p->sizes.experts;
    const size_t some = experts ? n : 0;
    size_t at = 0;
#define PLACE(field, count)                                                                    \
    do {                                                                                       \
        if (memory) p->field = (void *)(memory + at);                                          \
        at += sct_rounded((count) * sizeof(*p->field));                                        \
    } while (0)
    PLACE(at.memory, n * (size_t)p->at.floats);
    PLACE(normed, n * (size_t)p->sizes.normed);
    PLACE(inner, n * neurons);
    PLACE(up, n * neurons);
    PLACE(gathered, some * hidden);
    PLACE(given, some * hidden);
    PLACE(router, n * experts);
    PLACE(choices, some * (size_t)p->d->chosen);
    PLACE(sent, some);
    PLACE(weights, some);
    PLACE(blocks, blocks);
    PLACE(attention.memory, sct_attention_bytes(&p->attention));
#undef PLACE
    return at;
}

/* Everything for some tokens; returns the memory, or NULL. */
static char *begin(sct_piece *p, const sct_decoder *d, const sct_token *token, int64_t tokens) {
    sct_block_bytes blocks = {.tokens = tokens, .exact = (int)d->exact};
    *p = (sct_piece){.d = d, .code = sct_code(), .tokens = tokens, .at = sct_vectors_of(d),
                     .sizes = sct_sizes_of(d)};
    if (!p->code || !sct_each_matrix(d, widen, &blocks)) return NULL;
    if (token && !widen(&blocks, &d->head_matrix)) return NULL;
    p->attention = (sct_attention){.d = d, .code = p->code, .token = token, .tokens = tokens,
                                   .stride = p->at.floats};
    char *memory = sct_memory(lay_out(p, tokens, blocks.most, NULL));
    if (!memory) return NULL;
    lay_out(p, tokens, blocks.most, memory);
    sct_attend_to(&p->attention, &p->at);
    return memory;
}

static void pass_layers(sct_piece *p, const float *hidden, float *states) {
    const sct_decoder *d = p->d;
    sct_take_embedded(d, &p->at, hidden, p->tokens);
    for (int64_t l = 0; l <= d->layers && !p->failed; l++) {
        sct_write_states(d, &p->at, l, p->tokens, 0, d->hidden, states);
        if (l < d->layers) read_layer(p, d->layer + l);
    }
}

int sct_read(const sct_decoder *d, const float *hidden, int64_t slot, int64_t first,
             int64_t tokens, int64_t answers, float *logits, float *states) {
    const int64_t most = sct_smaller(tokens, SCT_PIECE), skipped = tokens - answers;
    const int64_t columns = d->hidden * (d->token_norm.weight ? 2 : 1);
    sct_piece p;
    char *memory = begin(&p, d, NULL, most);
    if (!memory) return -1;
    p.attention.slot = slot;
    for (int64_t done = 0; done < tokens && !p.failed; done += p.tokens) {
        p.tokens = p.attention.tokens = sct_smaller(tokens - done, most);
        p.attention.first = first + done;
        pass_layers(&p, hidden + done * columns,
                    states ? states + done * d->taps * d->hidden : NULL);
        const int64_t asked = sct_larger(0, skipped - done); /* those before want no answer */
        if (asked < p.tokens)
            answer(&p, asked, logits + (done + asked - skipped) * d->vocabulary);
    }
    sct_free(memory);
    return p.failed ? -1 : 0;
}

int sct_advance(const sct_decoder *d, const float *hidden, const sct_token *token, int64_t tokens,
                float *logits, float *states) {
    sct_piece p;
    char *memory = begin(&p, d, token, tokens);
    if (!memory) return -1;
    pass_layers(&p, hidden, states);
    if (logits && !p.failed)
        multiply(&p, &d->head_matrix, normed(&p, &d->final_norm),
                 (sct_floats){logits, d->vocabulary}, tokens, NULL);
    sct_free(memory);
    return p.failed ? -1 : 0;
}
