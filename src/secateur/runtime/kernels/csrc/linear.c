/* One linear: activations prepared, rows shared out among the threads. */
#include <string.h>

#include "internal.h"


static int64_t blocks_of(const sct_matrix *m) {
    const int64_t words = sct_block_words(m);
    return m->words / words + __builtin_popcountll((unsigned long long)(m->words % words));
}

size_t sct_input_bytes(const sct_matrix *m, int64_t batch, sct_input_kind kind) {
    const size_t numbers = (size_t)batch * (size_t)m->words * 64;
    const size_t blocks = (size_t)(batch * blocks_of(m));
    if (kind == SCT_IN_BFLOAT) return sct_rounded(2 * numbers);
    if (kind == SCT_IN_BYTES || kind == SCT_IN_TURNED) return numbers + 2 * 64 * blocks;
    return sct_rounded(4 * numbers);
}

void sct_input_place(sct_input *in, void *memory, const sct_matrix *m, int64_t batch,
                     sct_input_kind kind) {
    memset(in, 0, sizeof *in);
    in->batch = batch;
    in->padded = m->words * 64;
    in->blocks = blocks_of(m);
    const size_t numbers = (size_t)(batch * in->padded), blocks = (size_t)(batch * in->blocks);
    if (kind == SCT_IN_BFLOAT) {
        in->bfloats = memory;
    } else if (kind == SCT_IN_BYTES || kind == SCT_IN_TURNED) {
        in->most = sct_block_words(m);
        in->bytes = memory;
        in->scales = (float *)(in->bytes + numbers);
        in->excess = (int32_t *)(in->scales + 16 * blocks);
    } else {
        in->floats = memory;
    }
}

int64_t sct_first_row(const sct_matrix *m, int64_t part, int64_t parts) {
    if (part == 0) return 0;
    if (part == parts) return m->rows;
    if (!m->mask) return m->rows * part / parts & ~(int64_t)1;
    const int64_t together = m->type == SCT_INT4 ? 2 : 1;
    int64_t low = 0, high = (m->rows + together - 1) / together;
    const int64_t first = m->offsets[0]; /* of some rows of a larger matrix it is not 0 */
    const int64_t wanted = first + (m->offsets[high] - first) / parts * part;
    while (low < high) { /* the first row or pair that begins at or after the wanted value */
        int64_t middle = (low + high) / 2;
        if (m->offsets[middle] < wanted) low = middle + 1;
        else high = middle;
    }
    low *= together;
    return low < m->rows ? low & ~(int64_t)1 : m->rows;
}

const uint8_t *sct_all_bytes(const uint8_t *v, int64_t k, uint8_t *out) {
    memset(out, 0, (size_t)(64 * k));
    for (int64_t j = 0; j < k; j += 4) {
        const int64_t words = k < 4 ? k : 4, each = words == 1 ? 2 : 4, qword = words == 4 ? 8 : 4;
        const uint8_t *stored = v + 8 * qword;
        for (int64_t word = 0; word < words; word++)
            for (int64_t lane = 0; lane < 16; lane++)
                for (int i = 0; i < 2; i++) {
                    const int64_t p = word / 2, n = 2 * (word & 1) + i;
                    const uint8_t *places = v + qword * (lane / 2) + 4 * p + (lane & 1);
                    const uint8_t both = stored[64 * p + each * lane + n];
                    uint8_t *to = out + 64 * (j + word) + 4 * lane;
                    to[places[0] >> 2 * n & 3] |= both & 0x0f;
                    to[places[2] >> 2 * n & 3] |= both & 0xf0;
                }
        v = stored + 16 * each * ((words + 1) / 2);
    }
    return v;
}

typedef struct {
    const sct_tier_code *code;
    const sct_matrix *matrix;
    const sct_input *in;
    float *y;
    sct_rows *rows;
    void *tile;
    int64_t begin, end;
} sct_job;

static void multiply(void *context, int thread, int threads) {
    const sct_job *job = context;
    int64_t begin = sct_first_row(job->matrix, thread, threads);
    int64_t end = sct_first_row(job->matrix, thread + 1, threads);
    job->rows(job->matrix, job->in, begin, end, job->y, job->matrix->rows);
}

static size_t tile_row_bytes(const sct_matrix *m) {
    return (size_t)m->words * 64 * (m->type == SCT_FLOAT32 ? 4 : 2);
}

static void lay_out(void *context, int thread, int threads) {
    const sct_job *job = context;
    int64_t count = job->end - job->begin;
    int64_t begin = job->begin + count * thread / threads;
    int64_t end = job->begin + count * (thread + 1) / threads;
    size_t to = (size_t)(begin - job->begin) * tile_row_bytes(job->matrix);
    job->code->expand(job->matrix, begin, end, (char *)job->tile + to);
}

int sct_linear(const sct_matrix *m, int64_t x_type, const void *x, int64_t x_stride, void *y,
               int64_t y_stride, int64_t batch) {
    const sct_tier_code *code = sct_code();
    if (!code) return -1;
    const int64_t padded = m->words * 64;
    const sct_input_kind kind = sct_kind(code, m->type, x_type == SCT_FLOAT32);
    const size_t in_bytes = sct_input_bytes(m, batch, kind);
    const size_t out_bytes = sct_rounded(4 * (size_t)batch * (size_t)m->rows);
    char *scratch = sct_memory(in_bytes + out_bytes + sct_rounded(4 * (size_t)padded));
    if (!scratch) return -1;
    sct_input in;
    sct_input_place(&in, scratch, m, batch, kind);
    float *sums = (float *)(scratch + in_bytes), *row = (float *)(scratch + in_bytes + out_bytes);
    for (int64_t b = 0; b < batch; b++) {
        const float *from = (const float *)x + b * x_stride;
        if (x_type == SCT_BFLOAT16) {
            for (int64_t i = 0; i < m->columns; i++)
                row[i] = sct_from_bfloat(((const uint16_t *)x)[b * x_stride + i]);
            from = row;
        }
        code->prepare(from, m->columns, &in, b, kind);
    }
    sct_job job = {code, m, &in, sums, sct_rows_for(code, m->type, kind), NULL, 0, 0};
    sct_parallel(multiply, &job);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t r = 0; r < m->rows; r++) {
            float value = sums[b * m->rows + r];
            if (x_type == SCT_BFLOAT16) ((uint16_t *)y)[b * y_stride + r] = sct_to_bfloat(value);
            else ((float *)y)[b * y_stride + r] = value;
        }
    sct_free(scratch);
    return 0;
}

int sct_expand(const sct_matrix *matrix, int64_t begin, int64_t end, void *tile) {
    const sct_tier_code *code = sct_code();
    if (!code) return -1;
    sct_job job = {code, matrix, NULL, NULL, NULL, tile, begin, end};
    sct_parallel(lay_out, &job);
    return 0;
}

typedef struct {
    const sct_tier_code *code;
    const sct_matrix *matrix;
    const int64_t *rows;
    int64_t count;
    char *tile;
} sct_lookup;

static void look_up(void *context, int thread, int threads) {
    const sct_lookup *job = context;
    const int64_t end = job->count * (thread + 1) / threads;
    for (int64_t i = job->count * thread / threads; i < end; i++)
        job->code->expand(job->matrix, job->rows[i], job->rows[i] + 1,
                          job->tile + (size_t)i * tile_row_bytes(job->matrix));
}

int sct_gather(const sct_matrix *matrix, const int64_t *rows, int64_t count, void *tile) {
    const sct_tier_code *code = sct_code();
    if (!code) return -1;
    sct_lookup job = {code, matrix, rows, count, tile};
    if (count == 1) look_up(&job, 0, 1);
    else sct_parallel(look_up, &job);
    return 0;
}

/* A value of a tile. Of int8 it is an integer, of int4 the weight, both as bfloat16. */
static float value_at(const sct_matrix *m, const void *tile, int64_t column) {
    return m->type == SCT_FLOAT32 ? ((const float *)tile)[column]
                                  : sct_from_bfloat(((const uint16_t *)tile)[column]);
}

int sct_embed(const sct_matrix *m, const int64_t *rows, int64_t count, float factor,
              int64_t bfloat, float *out) {
    const sct_tier_code *code = sct_code();
    void *tile = code ? sct_memory(tile_row_bytes(m)) : NULL;
    if (!tile) return -1;
    for (int64_t i = 0; i < count; i++, out += m->columns) {
        const float scale = m->scale ? m->scale[rows[i]] : 1.0f;
        code->expand(m, rows[i], rows[i] + 1, tile);
        for (int64_t c = 0; c < m->columns; c++) {
            const float x = value_at(m, tile, c) * scale;
            out[c] = factor * (bfloat ? sct_from_bfloat(sct_to_bfloat(x)) : x);
            if (bfloat) out[c] = sct_from_bfloat(sct_to_bfloat(out[c]));
        }
    }
    sct_free(tile);
    return 0;
}
