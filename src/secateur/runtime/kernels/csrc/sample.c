/* Draws tokens: a softmax over logits, top-k, top-p and min-p, and what a draft's tokens leave. */
#include "internal.h"

/* Tokens of less than this part of the largest probability are seldom needed, and sorting all of
 * them takes long. */
#define FIRST_LOOK 1e-4f

/* The rounding of a sum of probabilities: one that is so close to top-p has reached it. */
#define ROUNDING 5e-7

/* A share and its place in one number, that of a larger share is smaller. */
typedef uint64_t sct_share;

static sct_share share_of(float share, int64_t place) {
    union { float f; uint32_t u; } x = {share};
    return (uint64_t)(~x.u) << 32 | (uint64_t)place;
}

static float value_of(sct_share one) {
    union { uint32_t u; float f; } x = {~(uint32_t)(one >> 32)};
    return x.f;
}

static int64_t length_of(const sct_chances *c, int64_t first) {
    return sct_smaller(SCT_BLOCK, c->count - first);
}

static double shares_of(const sct_chances *c, int64_t first, int64_t count, float *out) {
    return sct_code()->shares(c->logits + first, count, c->most, c->factor, out);
}

/* The share at a place, if the token is kept. */
static double share_at(const sct_chances *c, int64_t place) {
    float share;
    shares_of(c, place, 1, &share);
    const int kept = !c->keeps || share > c->least || (share == c->least && place <= c->last);
    return kept ? (double)share : 0.0;
}

/* The first place of a token of at least this number. */
static int64_t place_from(const sct_chances *c, int64_t token) {
    int64_t low = 0, high = c->count;
    if (!c->ids) return sct_smaller(token, high);
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (c->ids[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low;
}

double sct_chance(const sct_chances *c, int64_t token) {
    const int64_t place = place_from(c, token);
    if (place == c->count || (c->ids && c->ids[place] != token)) return 0.0;
    return share_at(c, place) / c->total;
}

/* The likeliest first; equal ones stay as they are. Three digits of 11 bits, the lowest first. */
static sct_share *sorted(sct_share *from, sct_share *to, int64_t count) {
    for (int shift = 32; shift < 64; shift += 11) {
        int64_t begin[2049] = {0};
        for (int64_t i = 0; i < count; i++) begin[(from[i] >> shift & 2047) + 1]++;
        for (int digit = 0; digit < 2048; digit++) begin[digit + 1] += begin[digit];
        for (int64_t i = 0; i < count; i++) to[begin[from[i] >> shift & 2047]++] = from[i];
        sct_share *const other = from;
        from = to;
        to = other;
    }
    return from;
}

/* All shares of at least so much, and more than 0; returns their number. */
static int64_t look(const sct_chances *c, float from, sct_share *found, double *sum) {
    int64_t count = 0;
    *sum = 0.0;
    for (int64_t first = 0; first < c->count; first += SCT_BLOCK) {
        float block[SCT_BLOCK];
        const int64_t length = length_of(c, first);
        shares_of(c, first, length, block);
        if (sct_code()->highest(block, length) < from) continue;
        for (int64_t i = 0; i < length; i++) {
            if (block[i] < from || block[i] == 0.0f) continue;
            found[count++] = share_of(block[i], first + i);
            *sum += (double)block[i];
        }
    }
    return count;
}

/* The tokens that top-k, top-p and min-p keep. Top-p counts shares of what top-k has left. */
static int keep(sct_chances *c) {
    sct_share *memory = sct_memory(2 * sizeof(sct_share) * (size_t)c->count), *found = memory;
    const int64_t k = c->top_k < c->count ? c->top_k : 0;
    int64_t count = 0;
    double sum = 0.0, before = 0.0;
    if (!memory) return -1;
    for (float from = FIRST_LOOK;; from = from > 1e-12f ? 1e-4f * from : 0.0f) {
        count = look(c, from, found, &sum);
        if (from == 0.0f || (k && count >= k)) break;
        if (!k && (sum > (double)c->top_p * c->total || c->min_p >= from)) break;
    }
    found = sorted(memory, memory + c->count, count);
    if (k && k < count) {
        count = k;
        sum = 0.0;
        for (int64_t i = 0; i < k; i++) sum += (double)value_of(found[i]);
    }
    const double part = c->top_p < 1.0f ? (double)c->top_p - ROUNDING : 2.0;
    const double most = part * (k ? sum : c->total);
    for (c->keeps = 0; c->keeps < count; c->keeps++) {
        const float share = value_of(found[c->keeps]);
        if (c->keeps && (before >= most || share < c->min_p)) break;
        before += (double)share;
        c->least = share;
        c->kept[c->keeps] = c->last = (int64_t)(uint32_t)found[c->keeps];
    }
    c->total = before;
    sct_free(memory);
    return 0;
}

int sct_weigh(sct_chances *c) {
    const sct_tier_code *code = sct_code();
    if (!code) return -1;
    c->keeps = c->best = 0;
    c->most = c->logits[0];
    for (int64_t first = 0; first < c->count; first += SCT_BLOCK) {
        const float most = code->highest(c->logits + first, length_of(c, first));
        if (most > c->most) c->best = first, c->most = most;
    }
    while (c->best + 1 < c->count && c->logits[c->best] < c->most) c->best++;
    /* a factor that is finite, so that the most likely token has the share 1 */
    c->factor = c->temperature > 1e-30f ? 1.0f / c->temperature : 1e30f;
    c->total = 0.0;
    for (int64_t first = 0; first < c->count; first += SCT_BLOCK) {
        float block[SCT_BLOCK];
        c->sums[first / SCT_BLOCK] = shares_of(c, first, length_of(c, first), block);
        c->total += c->sums[first / SCT_BLOCK];
    }
    if (!(c->total >= 1.0)) return -2;
    return c->kept ? keep(c) : 0;
}

/* The first number up to which the sum is more than a part of all. */
static int64_t place_in(const double *numbers, int64_t count, double part) {
    double sum = 0.0, running = 0.0;
    int64_t last = 0;
    for (int64_t i = 0; i < count; i++) sum += numbers[i];
    for (int64_t i = 0; i < count; i++) {
        running += numbers[i];
        if (running > part * sum) return i;
        if (numbers[i] > 0.0) last = i; /* rounding never chooses what has no share */
    }
    return last;
}

/* Shares of a block, or what is left of the probabilities after `less`; returns their sum. */
static double weigh_block(const sct_chances *c, const sct_chances *less, int64_t first, float *block) {
    const int64_t length = length_of(c, first);
    const double sum = shares_of(c, first, length, block);
    if (!less) return sum;
    float other[SCT_BLOCK], spread[SCT_BLOCK] = {0};
    const int64_t begin = place_from(less, first), end = place_from(less, first + length);
    shares_of(less, begin, end - begin, other);
    for (int64_t i = begin; i < end; i++)
        spread[(less->ids ? less->ids[i] : i) - first] = other[i - begin];
    return sct_code()->rest(block, spread, length, (float)(1.0 / c->total),
                            (float)(1.0 / less->total));
}

/* A place among those that are kept; -1 if nothing is left of them. */
static int64_t draw_kept(const sct_chances *c, const sct_chances *less, double part) {
    double sum = 0.0, running = 0.0;
    int64_t last = -1;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < c->keeps; i++) {
            double own = share_at(c, c->kept[i]);
            if (less) own = own / c->total - sct_chance(less, c->kept[i]);
            if (own <= 0.0) continue;
            if (!pass) sum += own;
            else if ((running += own) > part * sum) return c->kept[i];
            last = c->kept[i];
        }
    return last;
}

/* The same among all. */
static int64_t draw_any(sct_chances *c, const sct_chances *less, double at_block, double part) {
    const int64_t blocks = (c->count + SCT_BLOCK - 1) / SCT_BLOCK;
    float block[SCT_BLOCK];
    double own[SCT_BLOCK], sum = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
        if (less) c->sums[b] = weigh_block(c, less, SCT_BLOCK * b, block);
        sum += c->sums[b];
    }
    if (sum <= 0.0) return -1;
    const int64_t first = SCT_BLOCK * place_in(c->sums, blocks, at_block);
    weigh_block(c, less, first, block);
    for (int64_t i = 0; i < length_of(c, first); i++) own[i] = (double)block[i];
    return first + place_in(own, length_of(c, first), part);
}

int64_t sct_draw(sct_chances *c, const sct_chances *less, double block, double place) {
    const int64_t found = c->keeps ? draw_kept(c, less, place) : draw_any(c, less, block, place);
    if (found < 0) { /* equal to rounding: nothing is left of them */
        sct_weigh(c);
        return sct_draw(c, NULL, block, place);
    }
    return c->ids ? c->ids[found] : found;
}
