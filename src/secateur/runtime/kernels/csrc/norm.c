/* Norms of vectors of floats. */
#include <math.h>

#include "internal.h"

#define LANES 16

void sct_rms_norm(const float *x, const float *weight, int64_t count, float epsilon, float *out) {
    float lanes[LANES] = {0}, squares = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += x[i + l] * x[i + l];
    for (; i < count; i++) squares += x[i] * x[i];
    for (int l = 0; l < LANES; l++) squares += lanes[l];
    const float scale = 1.0f / sqrtf(squares / (float)count + epsilon);
    for (i = 0; i < count; i++) out[i] = x[i] * scale * weight[i];
}

void sct_layer_norm(const float *x, const float *weight, const float *bias, int64_t count,
                    float epsilon, float *out) {
    float lanes[LANES] = {0}, sum = 0.0f, squares = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += x[i + l];
    for (; i < count; i++) sum += x[i];
    for (int l = 0; l < LANES; l++) sum += lanes[l], lanes[l] = 0.0f;
    const float mean = sum / (float)count;
    for (i = 0; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += (x[i + l] - mean) * (x[i + l] - mean);
    for (; i < count; i++) squares += (x[i] - mean) * (x[i] - mean);
    for (int l = 0; l < LANES; l++) squares += lanes[l];
    const float scale = 1.0f / sqrtf(squares / (float)count + epsilon);
    for (i = 0; i < count; i++) {
        out[i] = (x[i] - mean) * scale;
        if (weight) out[i] *= weight[i];
        if (bias) out[i] += bias[i];
    }
}
