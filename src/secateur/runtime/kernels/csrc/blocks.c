/* A linear for many tokens: activations into panels, then rows block by block. */
#include <stdatomic.h>

#include "blocks.h"

static int64_t up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

typedef struct {
    const sct_blocks *code;
    const sct_matrix *matrix;
    const void *x;
    int64_t x_type, x_stride, group, rows; /* `rows` of a tile */
    sct_panels panels;
    sct_sink sink;
    char *tiles;
    size_t codes_bytes, starts_bytes, tile_bytes, panel_bytes, scales_bytes;
    atomic_llong next_panel, next_row;
} sct_prompt_job;

/* Rows of a tile: what the cache holds, but some tiles for each thread. */
static int64_t rows_of_tile(const sct_blocks *code, const sct_matrix *m, int threads) {
    const int64_t fit = code->tile_bytes / (m->words * 64 * code->code_bytes);
    const int64_t fair = up(m->rows, 4 * threads) / (4 * threads);
    const int64_t rows = fit < fair ? fit / code->rows * code->rows : up(fair, code->rows);
    return rows < code->rows ? code->rows : rows;
}

/* Where the values of a row begin, or those of all rows end. */
static const char *values_of(const sct_matrix *m, int64_t row) {
    static const int64_t sizes[SCT_TYPES] = {4, 2, 2, 1, 1};
    const int64_t together = m->type == SCT_INT4 ? 2 : 1;
    const int64_t at = (row < m->rows ? row : m->rows + together - 1) / together;
    return (const char *)m->values + (m->mask ? m->offsets[at] : at * m->stride) * sizes[m->type];
}

static void round_panels(void *context, int thread, int threads) {
    sct_prompt_job *job = context;
    (void)thread, (void)threads;
    for (;;) {
        const int64_t panel = atomic_fetch_add(&job->next_panel, 1);
        if (panel >= job->panels.panels) return;
        job->code->round(job->x, job->x_type, job->x_stride, job->matrix->columns, &job->panels,
                         panel);
    }
}

static void multiply_tiles(void *context, int thread, int threads) {
    sct_prompt_job *job = context;
    char *own = job->tiles + job->tile_bytes * (size_t)thread;
    const int grouped = job->matrix->type == SCT_INT4;
    sct_tile tile = {.words = job->matrix->words,
                     .row = own + job->codes_bytes,
                     .group = job->group,
                     .codes = own,
                     .starts = (int32_t *)(own + job->codes_bytes),
                     .scales = grouped ? (float *)(own + job->codes_bytes + job->starts_bytes) : NULL};
    (void)threads;
    if (job->code->begin) job->code->begin(job->group);
    int64_t row = atomic_fetch_add(&job->next_row, job->rows), next;
    for (; row < job->matrix->rows; row = next) {
        next = atomic_fetch_add(&job->next_row, job->rows);
        tile.next = values_of(job->matrix, next);
        tile.next_lines = (values_of(job->matrix, next + job->rows) - tile.next) / 64;
        tile.rows = job->matrix->rows - row < job->rows ? job->matrix->rows - row : job->rows;
        tile.padded_rows = up(tile.rows, job->code->rows);
        job->code->expand(job->matrix, row, &tile);
        job->code->multiply(&tile, &job->panels, row, &job->sink);
    }
    if (job->code->end) job->code->end();
}

/* The sizes of everything for some tokens; returns the bytes of its memory, or 0 if there is no code. */
static size_t measure(sct_prompt_job *job, const sct_matrix *m, int64_t tokens, int exact) {
    const sct_blocks *code = sct_blocks_for(m->type, exact);
    if (!code) return 0;
    const int threads = sct_threads(), integers = m->type == SCT_INT8 || m->type == SCT_INT4;
    const int64_t panels = (tokens + code->lanes - 1) / code->lanes, columns = m->words * 64;
    job->code = code;
    job->matrix = m;
    job->group = m->type == SCT_INT4 && m->group < SCT_SCALED ? m->group : SCT_SCALED;
    job->rows = rows_of_tile(code, m, threads);
    job->panels = (sct_panels){tokens, panels, m->words, m->type == SCT_INT8, NULL, NULL};
    job->codes_bytes = sct_rounded((size_t)(columns * job->rows * code->code_bytes));
    job->starts_bytes = integers ? sct_rounded((size_t)(4 * columns / job->group * job->rows)) : 0;
    const size_t row_bytes = sct_rounded((size_t)(4 * columns));
    job->tile_bytes = job->codes_bytes + (integers ? 2 * job->starts_bytes : row_bytes);
    job->panel_bytes = sct_rounded((size_t)(panels * code->lanes * columns * code->code_bytes));
    job->scales_bytes = integers ? sct_rounded((size_t)(4 * panels * code->lanes * m->words)) : 0;
    return job->panel_bytes + job->scales_bytes + job->tile_bytes * (size_t)threads;
}

size_t sct_prompt_bytes(const sct_matrix *m, int64_t tokens, int exact) {
    sct_prompt_job job;
    return measure(&job, m, tokens, exact);
}

void sct_prompt_in(char *memory, const sct_matrix *m, int64_t x_type, const void *x,
                   int64_t x_stride, void *y, int64_t y_stride, int64_t tokens, int exact,
                   int known) {
    sct_prompt_job job = {.x = x, .x_type = x_type, .x_stride = x_stride,
                          .sink = {y, x_type, y_stride, m->scale}};
    measure(&job, m, tokens, exact);
    job.panels.bytes = memory;
    job.panels.scales = (float *)(memory + job.panel_bytes);
    job.tiles = memory + job.panel_bytes + job.scales_bytes;
    if (!known) sct_parallel(round_panels, &job);
    sct_parallel(multiply_tiles, &job);
}

int sct_prompt(const sct_matrix *m, int64_t x_type, const void *x, int64_t x_stride, void *y,
               int64_t y_stride, int64_t tokens) {
    const int exact = x_type == SCT_FLOAT32;
    const size_t bytes = sct_prompt_bytes(m, tokens, exact);
    char *memory = bytes ? sct_memory(bytes) : NULL;
    if (!memory) return -1;
    sct_prompt_in(memory, m, x_type, x, x_stride, y, y_stride, tokens, exact, 0);
    sct_free(memory);
    return 0;
}
