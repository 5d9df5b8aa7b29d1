/* Up to eight tokens through all layers (decode.h), on all threads, with no framework between.
 *
 * Tokens may be of different sequences, or follow each other in one: all keys and values of a layer
 * are in the caches before any token looks at them. All threads run all of it. Each makes its own
 * copy of what all of them read (norms, rounded activations: some microseconds of arithmetic
 * instead of a barrier) and its own share of rows.
 */
#include <string.h>

#include "decode.h"

typedef struct {
    const sct_decoder *d;
    const sct_tier_code *code;
    int64_t tokens, answers;
    sct_attention *attention;
    sct_vectors at;
    sct_sizes sizes;
    float *inner, *up; /* [tokens · places, neurons]: between the matrices of feed-forwards */
    float *router;     /* [tokens, experts] */
    float *logits;     /* [answers, vocabulary] */
    float *states;     /* [tokens, taps, hidden], or NULL */
    char *own;         /* a part for each thread */
    size_t own_bytes, input_bytes, wide_bytes, router_bytes, choice_bytes;
} sct_call;

/* A feed-forward and the tokens that are sent to it. */
typedef struct {
    const sct_ffn *ffn;
    int64_t tokens, place; /* the place of the first of them in `inner` and `up` */
    int64_t token[SCT_MAX_BATCH];
    float weight[SCT_MAX_BATCH];
} sct_sent;

/* What a thread works with. */
typedef struct {
    const sct_call *c;
    int thread, threads;
    char *input;         /* activations as a matrix wants them */
    float *wide;         /* [tokens, columns]: normed, or products */
    float *router;       /* [experts] */
    sct_choice *choices; /* [tokens, chosen] */
    sct_sent *sent;
    int64_t feed_forwards; /* in `sent` */
} sct_worker;

/* A thread's own copy of the inputs of some tokens, in the layout that a matrix wants. `token`: which
 * of the vectors they are; NULL: the first. */
static sct_rows *prepare(const sct_worker *w, const sct_matrix *m, sct_floats from, int64_t tokens,
                         const int64_t *token, sct_input *in) {
    const sct_tier_code *code = w->c->code;
    const sct_input_kind kind = sct_kind(code, m->type, (int)w->c->d->exact);
    sct_input_place(in, w->input, m, tokens, kind);
    for (int64_t b = 0; b < tokens; b++)
        code->prepare(from.x + (token ? token[b] : b) * from.stride, m->columns, in, b, kind);
    return sct_rows_for(code, m->type, kind);
}

static void share(const sct_worker *w, const sct_matrix *m, int64_t *begin, int64_t *end) {
    *begin = sct_first_row(m, w->thread, w->threads);
    *end = sct_first_row(m, w->thread + 1, w->threads);
}

/* Rows of the residual stream that are a thread's whatever the matrix. */
static void even_share(const sct_worker *w, int64_t *begin, int64_t *end) {
    const int64_t rows = w->c->d->hidden;
    *begin = (rows * w->thread / w->threads) & ~(int64_t)1;
    *end = (rows * (w->thread + 1) / w->threads) & ~(int64_t)1;
    if (w->thread + 1 == w->threads) *end = rows;
}

static void add_bias(float *y, int64_t stride, int64_t tokens, const float *bias, int64_t begin,
                     int64_t end) {
    for (int64_t b = 0; bias && b < tokens; b++)
        for (int64_t i = begin; i < end; i++) y[b * stride + i] += bias[i];
}

/* A thread's rows of one matrix. */
static void project(const sct_worker *w, const sct_matrix *m, sct_floats from, int64_t tokens,
                    const float *bias, float *y, int64_t stride) {
    sct_input in;
    int64_t begin, end;
    sct_rows *rows = prepare(w, m, from, tokens, NULL, &in);
    share(w, m, &begin, &end);
    rows(m, &in, begin, end, y, stride);
    add_bias(y, stride, tokens, bias, begin, end);
}

/* The residual stream as the next matrices read it. */
static sct_floats normed(const sct_worker *w, const sct_norm_weights *norm, int64_t tokens) {
    const sct_call *c = w->c;
    if (!norm->weight) return sct_each(&c->at, c->at.x);
    for (int64_t b = 0; b < tokens; b++)
        sct_normed(c->d, norm, &c->at, b, w->wide + b * c->sizes.columns);
    return (sct_floats){w->wide, c->sizes.columns};
}

/* Add a thread's rows of `sum` to the residual stream. */
static void to_residual(const sct_worker *w, const sct_norm_weights *norm, int64_t begin,
                        int64_t end) {
    const sct_call *c = w->c;
    if (norm->weight) {
        sct_barrier(w->threads); /* a norm reads all rows */
        even_share(w, &begin, &end);
    }
    for (int64_t b = 0; b < c->tokens; b++) {
        float *x = sct_vector(&c->at, c->at.x, b);
        const float *sum = sct_vector(&c->at, c->at.sum, b);
        if (norm->weight) {
            sct_norm(c->d, norm, sum, w->wide);
            sum = w->wide;
        }
        for (int64_t i = begin; i < end; i++) x[i] += c->d->residual * sum[i];
    }
    sct_barrier(w->threads);
}

/* One more feed-forward, at the place after the others. */
static sct_sent *send(sct_worker *w, const sct_ffn *ffn) {
    sct_sent *s = w->sent + w->feed_forwards;
    const sct_sent *before = w->feed_forwards++ ? s - 1 : NULL;
    s->ffn = ffn;
    s->tokens = 0;
    s->place = before ? before->place + before->tokens : 0;
    return s;
}

static void send_token(sct_sent *s, int64_t b, float weight) {
    s->token[s->tokens] = b;
    s->weight[s->tokens++] = weight;
}

/* Which feed-forwards there are for these tokens: that of all tokens, then the experts by number. */
static void find_feed_forwards(sct_worker *w, const sct_layer *layer, sct_floats from) {
    const sct_call *c = w->c;
    int64_t next[SCT_MAX_BATCH] = {0};
    const int64_t chosen = sct_smaller(c->d->chosen, layer->experts);
    w->feed_forwards = 0;
    if (layer->ffn.up.rows) {
        sct_sent *s = send(w, &layer->ffn);
        for (int64_t b = 0; b < c->tokens; b++)
            send_token(s, b, sct_shared_weight(c->d, layer, from.x + b * from.stride));
    }
    if (!layer->experts) return;
    project(w, &layer->router, from, c->tokens, NULL, c->router, c->sizes.experts);
    sct_barrier(w->threads);
    for (int64_t b = 0; b < c->tokens; b++) {
        memcpy(w->router, c->router + b * c->sizes.experts,
               sizeof(float) * (size_t)layer->experts);
        sct_route(c->d, layer, w->router, w->choices + b * chosen);
    }
    for (int64_t e = 0; e < layer->experts; e++) {
        sct_sent *s = NULL;
        for (int64_t b = 0; b < c->tokens; b++) {
            const sct_choice *choice = w->choices + b * chosen + next[b];
            if (next[b] == chosen || choice->expert != e) continue;
            if (!s) s = send(w, layer->expert + e);
            send_token(s, b, choice->weight);
            next[b]++;
        }
    }
}

/* act(gate) · up of the tokens of one feed-forward. Rows of gate and up are shared out alike, so that
 * their product needs no barrier. */
static void first_half(const sct_worker *w, const sct_sent *s, sct_floats from) {
    const sct_call *c = w->c;
    const sct_ffn *f = s->ffn;
    const sct_matrix *first = f->gate.rows ? &f->gate : &f->up;
    const int64_t stride = c->sizes.neurons;
    float *inner = c->inner + s->place * stride, *up = c->up + s->place * stride;
    sct_input in;
    int64_t begin, end;
    share(w, first, &begin, &end);
    sct_rows *rows = prepare(w, first, from, s->tokens, s->token, &in);
    rows(first, &in, begin, end, inner, stride);
    add_bias(inner, stride, s->tokens, f->gate.rows ? f->gate_bias : f->up_bias, begin, end);
    if (f->gate.rows) {
        if (f->up.type != first->type || f->up.group != first->group)
            rows = prepare(w, &f->up, from, s->tokens, s->token, &in);
        rows(&f->up, &in, begin, end, up, stride);
        add_bias(up, stride, s->tokens, f->up_bias, begin, end);
    }
    for (int64_t n = 0; n < s->tokens; n++)
        c->code->activate(c->d, inner + n * stride + begin,
                          f->gate.rows ? up + n * stride + begin : NULL, end - begin);
}

static void first_halves(sct_worker *w, const sct_layer *layer, sct_floats from) {
    find_feed_forwards(w, layer, from);
    for (int64_t i = 0; i < w->feed_forwards; i++) first_half(w, w->sent + i, from);
}

/* Σ weight · (W_down · inner) into the residual stream. */
static void second_halves(const sct_worker *w, const sct_layer *layer) {
    const sct_call *c = w->c;
    const int64_t columns = c->sizes.columns;
    int64_t begin, end;
    even_share(w, &begin, &end);
    if (!layer->experts) share(w, &layer->ffn.down, &begin, &end);
    for (int64_t b = 0; b < c->tokens; b++)
        for (int64_t i = begin; i < end; i++) sct_vector(&c->at, c->at.sum, b)[i] = 0.0f;
    for (int64_t i = 0; i < w->feed_forwards; i++) {
        const sct_sent *s = w->sent + i;
        const sct_floats inner = {c->inner + s->place * c->sizes.neurons, c->sizes.neurons};
        sct_input in;
        sct_rows *rows = prepare(w, &s->ffn->down, inner, s->tokens, NULL, &in);
        rows(&s->ffn->down, &in, begin, end, w->wide, columns);
        add_bias(w->wide, columns, s->tokens, s->ffn->down_bias, begin, end);
        for (int64_t n = 0; n < s->tokens; n++) {
            float *sum = sct_vector(&c->at, c->at.sum, s->token[n]);
            for (int64_t r = begin; r < end; r++)
                sum[r] += s->weight[n] * w->wide[n * columns + r];
        }
    }
    to_residual(w, &layer->ffn_out, begin, end);
}

static void pass(sct_worker *w, const sct_layer *layer) {
    const sct_call *c = w->c;
    int64_t begin, end;
    const sct_floats x = normed(w, &layer->attention_in, c->tokens);
    const int64_t stride = c->at.floats;
    project(w, &layer->q, x, c->tokens, NULL, sct_vector(&c->at, c->at.q, 0), stride);
    project(w, &layer->k, x, c->tokens, NULL, sct_vector(&c->at, c->at.k, 0), stride);
    project(w, &layer->v, x, c->tokens, NULL, sct_vector(&c->at, c->at.v, 0), stride);
    if (c->d->parallel)
        first_halves(w, layer, layer->ffn_in.weight ? normed(w, &layer->ffn_in, c->tokens) : x);
    sct_barrier(w->threads);
    sct_attend(c->attention, layer, w->thread, w->threads);
    sct_barrier(w->threads);
    project(w, &layer->o, sct_each(&c->at, c->at.mixed), c->tokens, layer->o_bias,
            sct_vector(&c->at, c->at.sum, 0), stride);
    share(w, &layer->o, &begin, &end);
    to_residual(w, &layer->attention_out, begin, end);
    if (!c->d->parallel) {
        first_halves(w, layer, normed(w, &layer->ffn_in, c->tokens));
        sct_barrier(w->threads);
    }
    second_halves(w, layer);
}

static void run(void *context, int thread, int threads) {
    const sct_call *c = context;
    const sct_decoder *d = c->d;
    char *memory = c->own + c->own_bytes * (size_t)thread;
    sct_worker w = {.c = c, .thread = thread, .threads = threads, .input = memory};
    w.wide = (float *)(memory += c->input_bytes);
    w.router = (float *)(memory += c->wide_bytes);
    w.choices = (sct_choice *)(memory += c->router_bytes);
    w.sent = (sct_sent *)(memory += c->choice_bytes);
    int64_t begin, end;
    even_share(&w, &begin, &end);
    for (int64_t l = 0; l <= d->layers; l++) {
        sct_write_states(d, &c->at, l, c->tokens, begin, end, c->states);
        if (l < d->layers) pass(&w, d->layer + l);
    }
    if (c->answers == 0) return;
    project(&w, &d->head_matrix, normed(&w, &d->final_norm, c->answers), c->answers, NULL,
            c->logits, d->vocabulary);
}

/* Sizes of a thread's memory. */
static void measure(sct_call *c) {
    const int64_t places = c->tokens * c->sizes.places;
    c->input_bytes = (size_t)c->tokens * sct_rounded(4 * (size_t)c->sizes.columns + 512);
    c->wide_bytes = 4 * (size_t)(c->tokens * c->sizes.columns);
    c->router_bytes = sct_rounded(4 * (size_t)c->sizes.experts);
    c->choice_bytes = sct_rounded(sizeof(sct_choice) * (size_t)places);
    c->own_bytes = c->input_bytes + c->wide_bytes + c->router_bytes + c->choice_bytes +
                   sct_rounded(sizeof(sct_sent) * (size_t)(places + 1));
}

int sct_decode(const sct_decoder *d, const float *hidden, const sct_token *token, int64_t tokens,
               int64_t answers, float *logits, float *states) {
    sct_vectors at = sct_vectors_of(d);
    sct_call c = {.d = d, .code = sct_code(), .tokens = tokens, .answers = answers, .at = at,
                  .sizes = sct_sizes_of(d), .logits = logits, .states = states};
    sct_attention attention = {.d = d, .code = c.code, .token = token, .tokens = tokens,
                               .stride = at.floats};
    if (!c.code) return -1;
    measure(&c);
    const int64_t inner = tokens * c.sizes.places * c.sizes.neurons;
    const size_t shared = 4 * (size_t)(tokens * at.floats), between = 4 * (size_t)inner;
    const size_t router = sct_rounded(4 * (size_t)(tokens * c.sizes.experts));
    const size_t own = c.own_bytes * (size_t)sct_threads();
    char *memory =
        sct_memory(shared + 2 * between + router + own + sct_attention_bytes(&attention));
    if (!memory) return -1;
    c.at.memory = (float *)memory;
    c.inner = (float *)(memory + shared);
    c.up = c.inner + inner;
    c.router = (float *)(memory + shared + 2 * between);
    c.own = memory + shared + 2 * between + router;
    c.attention = &attention;
    attention.memory = c.own + own;
    sct_attend_to(&attention, &c.at);
    sct_take_embedded(d, &c.at, hidden, tokens);
    sct_parallel(run, &c);
    sct_free(memory);
    return 0;
}
