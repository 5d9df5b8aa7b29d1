/* Runs kernels on what a file holds, for processors that are emulated: program TIER INPUT OUTPUT.
 *
 * The input is a row of commands, all numbers int64, all arrays behind their number of bytes. The
 * output has the results one after the other. Without a tier it prints the best one. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { LINEAR, PROMPT, EXPAND, ATTEND, SILU };

static FILE *input, *output;

static int64_t number(void) {
    int64_t value;
    if (fread(&value, 8, 1, input) != 1) exit(5);
    return value;
}

static void *array(int64_t *bytes) {
    const int64_t size = number();
    void *found = size ? malloc((size_t)size) : NULL;
    if (size && fread(found, 1, (size_t)size, input) != (size_t)size) exit(5);
    if (bytes) *bytes = size;
    return found;
}

static sct_matrix matrix(void) {
    sct_matrix m;
    m.rows = number();
    m.columns = number();
    m.words = number();
    m.stride = number();
    m.type = number();
    m.group = number();
    m.of_four = number();
    m.values = array(NULL);
    m.mask = array(NULL);
    m.offsets = array(NULL);
    m.scale = array(NULL);
    m.scales = array(NULL);
    m.exponents = array(NULL);
    return m;
}

static void put(const void *from, int64_t bytes) { fwrite(from, 1, (size_t)bytes, output); }

static int product(int64_t command) {
    const sct_matrix m = matrix();
    const int64_t type = number(), batch = number(), size = type == SCT_FLOAT32 ? 4 : 2;
    void *x = array(NULL), *y = malloc((size_t)(batch * m.rows * size));
    const int failed = (command == LINEAR ? sct_linear : sct_prompt)(&m, type, x, m.columns, y,
                                                                     m.rows, batch);
    put(y, batch * m.rows * size);
    return failed;
}

static int tile(void) {
    const sct_matrix m = matrix();
    const int64_t begin = number(), end = number(), size = m.type == SCT_FLOAT32 ? 4 : 2;
    const int64_t bytes = (end - begin) * m.words * 64 * size;
    void *out = malloc((size_t)bytes);
    const int failed = sct_expand(&m, begin, end, out);
    put(out, bytes);
    return failed;
}

static int attention(void) {
    const int64_t type = number(), heads = number(), groups = number(), head = number();
    const int64_t prompt = number(), row = 2 * (heads + groups) * head;
    int64_t given;
    float *vectors = array(&given);
    const int64_t tokens = given / row / 4, tiles = tokens / SCT_KEYS + 1;
    const size_t bytes = (size_t)(groups * tiles * sct_tile_bytes(type, sct_width(head)));
    sct_layer layer = {.keys = calloc(bytes, 1), .values = calloc(bytes, 1), .tiles = tiles};
    const sct_decoder d = {.layer = &layer, .heads = heads, .kv_heads = groups, .head = head,
                           .cache_type = type, .attention_scale = 0.25f, .softcap = 5.0f};
    int failed = sct_attention_alone(&d, NULL, 0, 0, prompt, vectors);
    for (int64_t at = prompt; at < tokens && !failed; at++)
        failed = sct_attention_alone(&d, &(sct_token){0, at}, 0, 0, 1, vectors + at * row);
    put(vectors, given);
    return failed;
}

static int activation(void) {
    int64_t bytes;
    const sct_decoder decoder = {.activation = SCT_SILU};
    float *gate = array(&bytes), *up = array(NULL);
    sct_code()->activate(&decoder, gate, up, bytes / 4);
    put(gate, bytes);
    return 0;
}

int main(int count, char **words) {
    if (count < 4) return printf("%s\n", sct_tier()), 0;
    if (sct_use_tier(words[1])) return 3;
    input = fopen(words[2], "rb");
    output = fopen(words[3], "wb");
    sct_set_threads(2);
    for (int64_t command; fread(&command, 8, 1, input) == 1;) {
        const int failed = command <= PROMPT   ? product(command)
                           : command == EXPAND ? tile()
                           : command == ATTEND ? attention()
                                               : activation();
        if (failed) return 4;
    }
    return fclose(output) ? 6 : 0;
}
