/* A decoder layer: its sizes, its norms, and where a mixture sends a token. */
#include <math.h>
#include <string.h>

#include "decode.h"

sct_vectors sct_vectors_of(const sct_decoder *d) {
    const int64_t query = sct_padded(d->heads * d->head), key = sct_padded(d->kv_heads * d->head);
    sct_vectors at = {.x = 0, .q = sct_padded(d->hidden)};
    at.mixed = at.q + query;
    at.k = at.mixed + query;
    at.v = at.k + key;
    at.sum = at.v + key;
    at.embedded = at.sum + sct_padded(d->hidden);
    at.floats = at.embedded + (d->token_norm.weight ? sct_padded(d->hidden) : 0);
    return at;
}

void sct_take_embedded(const sct_decoder *d, const sct_vectors *v, const float *hidden,
                       int64_t tokens) {
    const size_t bytes = sizeof(float) * (size_t)d->hidden;
    for (int64_t b = 0; b < tokens; b++) {
        if (d->token_norm.weight) {
            memcpy(sct_vector(v, v->embedded, b), hidden, bytes);
            hidden += d->hidden;
        }
        memcpy(sct_vector(v, v->x, b), hidden, bytes);
        hidden += d->hidden;
    }
}

void sct_write_states(const sct_decoder *d, const sct_vectors *v, int64_t layers, int64_t tokens,
                      int64_t begin, int64_t end, float *states) {
    for (int64_t t = 0; states && t < d->taps; t++)
        for (int64_t b = 0; d->tap[t] == layers && b < tokens; b++)
            memcpy(states + (b * d->taps + t) * d->hidden + begin,
                   sct_vector(v, v->x, b) + begin, sizeof(float) * (size_t)(end - begin));
}

void sct_attend_to(sct_attention *a, const sct_vectors *v) {
    a->q = sct_vector(v, v->q, 0);
    a->k = sct_vector(v, v->k, 0);
    a->v = sct_vector(v, v->v, 0);
    a->out = sct_vector(v, v->mixed, 0);
}

int sct_each_matrix(const sct_decoder *d, int (*visit)(void *, const sct_matrix *),
                    void *context) {
    for (int64_t l = 0; l < d->layers; l++) {
        const sct_layer *layer = d->layer + l;
        const sct_matrix *own[] = {&layer->q, &layer->k, &layer->v, &layer->o};
        for (int i = 0; i < 4; i++)
            if (own[i]->rows && !visit(context, own[i])) return 0;
        for (int64_t e = -1; e < layer->experts; e++) {
            const sct_ffn *ffn = e < 0 ? &layer->ffn : layer->expert + e;
            const sct_matrix *three[] = {&ffn->gate, &ffn->up, &ffn->down};
            for (int i = 0; i < 3; i++)
                if (three[i]->rows && !visit(context, three[i])) return 0;
        }
    }
    return 1;
}

static int widen(void *context, const sct_matrix *m) {
    int64_t *columns = context;
    *columns = sct_larger(*columns, m->columns);
    return 1;
}

sct_sizes sct_sizes_of(const sct_decoder *d) {
    const int64_t read = d->hidden * (d->token_norm.weight ? 2 : 1);
    sct_sizes s = {.columns = read, .normed = sct_padded(read), .places = 1};
    for (int64_t l = 0; l < d->layers; l++) {
        const sct_layer *layer = d->layer + l;
        const int64_t every = layer->ffn.up.rows > 0;
        s.neurons = sct_larger(s.neurons, layer->ffn.up.rows);
        for (int64_t e = 0; e < layer->experts; e++)
            s.neurons = sct_larger(s.neurons, layer->expert[e].up.rows);
        s.experts = sct_larger(s.experts, layer->experts);
        s.places = sct_larger(s.places, every + (layer->experts ? d->chosen : 0));
    }
    sct_each_matrix(d, widen, &s.columns);
    s.columns = sct_padded(s.columns);
    s.neurons = sct_padded(s.neurons);
    return s;
}

void sct_norm(const sct_decoder *d, const sct_norm_weights *norm, const float *x, float *out) {
    if (d->centered)
        sct_layer_norm(x, norm->weight, norm->bias, d->hidden, d->epsilon, out);
    else sct_rms_norm(x, norm->weight, d->hidden, d->epsilon, out);
}

void sct_normed(const sct_decoder *d, const sct_norm_weights *norm, const sct_vectors *v,
                int64_t b, float *out) {
    if (d->token_norm.weight && norm == &d->layer->attention_in) { /* a head has one layer */
        sct_norm(d, &d->token_norm, sct_vector(v, v->embedded, b), out);
        out += d->hidden;
    }
    sct_norm(d, norm, sct_vector(v, v->x, b), out);
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

float sct_shared_weight(const sct_decoder *d, const sct_layer *layer, const float *x) {
    float sum = 0.0f;
    if (!layer->shared_gate) return 1.0f;
    for (int64_t i = 0; i < d->hidden; i++) sum += layer->shared_gate[i] * x[i];
    return sigmoid(sum);
}

/* Scores of all experts: a softmax, or a sigmoid of each. */
static void score(const sct_decoder *d, const sct_layer *layer, float *logits) {
    float most = -INFINITY, total = 0.0f;
    for (int64_t e = 0; e < layer->experts; e++) {
        if (layer->router_bias) logits[e] += layer->router_bias[e];
        most = logits[e] > most ? logits[e] : most;
    }
    for (int64_t e = 0; e < layer->experts; e++) {
        logits[e] = d->router_sigmoid ? sigmoid(logits[e]) : expf(logits[e] - most);
        total += logits[e];
    }
    for (int64_t e = 0; !d->router_sigmoid && e < layer->experts; e++) logits[e] /= total;
}

void sct_route(const sct_decoder *d, const sct_layer *layer, float *logits, sct_choice *choices) {
    const int64_t wanted = sct_smaller(d->chosen, layer->experts);
    float total = 0.0f;
    score(d, layer, logits);
    for (int64_t n = 0; n < wanted; n++) { /* the best that is not yet chosen; of equals the first */
        float most = -INFINITY;
        choices[n].expert = 0;
        for (int64_t e = 0; e < layer->experts; e++) {
            float value = logits[e] + (layer->correction ? layer->correction[e] : 0.0f);
            for (int64_t i = 0; i < n; i++)
                if (choices[i].expert == e) value = -INFINITY;
            if (value > most) most = value, choices[n].expert = (int32_t)e;
        }
        choices[n].weight = logits[choices[n].expert];
        total += choices[n].weight;
    }
    for (int64_t n = 0; n < wanted; n++) {
        const float share = d->normalise ? choices[n].weight / total : choices[n].weight;
        choices[n].weight = share * d->routed_scale;
    }
    for (int64_t n = 1; n < wanted; n++) /* by number */
        for (int64_t i = n; i > 0 && choices[i].expert < choices[i - 1].expert; i--) {
            const sct_choice other = choices[i];
            choices[i] = choices[i - 1];
            choices[i - 1] = other;
        }
}
