// Attention of single query tokens over a slot-major KV pool: what a decode step does in every layer.
//
// A row is computed the same way whatever else is in the batch, so its result is bitwise the same in every batch. Sums
// are float32.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "element.h"

#define LANES 16  // floats of a vector; the compiler splits vectors that the machine does not have
#define HEADS 4   // query heads of a group that share what is loaded of a key or value
#define BLOCK 64  // tokens whose keys stay in the first cache while all heads pass over them

typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t bits __attribute__((vector_size(LANES * sizeof(uint32_t))));
typedef uint16_t halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

static inline vec vector_bfloat16(const bf16 *x) {
    halves h;
    memcpy(&h, x, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

static inline vec vector_float32(const float *x) {
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline float sum_of(vec v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

// e^x for x <= 0, to 2 units in the last place; 0 below -87. NaN stays NaN.
static inline float exp_of(float x) {
    float c = x < -87.0f ? -87.0f : x;
    float n = floorf(c * 1.44269504f + 0.5f);
    float r = c - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } scale = {((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * scale.f;
}

// Shapes and strides of one call; strides are in elements.
typedef struct {
    int64_t rows, heads, kv_heads, key_dim, value_dim;
    int64_t slot_tokens;                    // tokens a slot holds
    int64_t query_row, query_head;          // strides of query [rows, heads, key_dim]
    int64_t new_key_row, new_key_head;      // of new keys [rows, kv_heads, key_dim]
    int64_t new_value_row, new_value_head;  // of new values [rows, kv_heads, value_dim]
    float scaling, softcap;                 // softcap 0: none
} Call;

// Scores of one head's keys become the weights of its values.
static void softmax(float *scores, int64_t count, float softcap, const float *sink) {
    float peak = sink ? *sink : -INFINITY, total = 0, parts[LANES] = {0};
    if (softcap > 0)
        for (int64_t t = 0; t < count; t++) scores[t] = tanhf(scores[t] / softcap) * softcap;
    for (int64_t t = 0; t < count; t++) peak = scores[t] > peak ? scores[t] : peak;
    int64_t t = 0;
    for (; t + LANES <= count; t += LANES)
        for (int j = 0; j < LANES; j++) parts[j] += scores[t + j] = exp_of(scores[t + j] - peak);
    for (; t < count; t++) total += scores[t] = exp_of(scores[t] - peak);
    for (int j = 0; j < LANES; j++) total += parts[j];
    if (sink) total += exp_of(*sink - peak);
    const float share = 1 / total;
    for (t = 0; t < count; t++) scores[t] *= share;
}

#define INLINE static inline __attribute__((always_inline))

#define DEFINE(NAME, T)                                                                                                \
    /* Scores of `n` query heads, [n, dim] in `query`, for `count` keys that lie `step` elements apart. */             \
    INLINE void score_##NAME(const int n, const float *query, const T *key, int64_t dim, int64_t step, int64_t count,  \
                             float *scores, int64_t stride) {                                                          \
        for (int64_t t = 0; t < count; t++, key += step) {                                                             \
            vec sums[HEADS] = {{0}};                                                                                   \
            int64_t i = 0;                                                                                             \
            for (; i + LANES <= dim; i += LANES) {                                                                     \
                const vec k = vector_##NAME(key + i);                                                                  \
                for (int g = 0; g < n; g++) sums[g] += vector_float32(query + g * dim + i) * k;                        \
            }                                                                                                          \
            for (int g = 0; g < n; g++) {                                                                              \
                float sum = sum_of(sums[g]);                                                                           \
                for (int64_t j = i; j < dim; j++) sum += query[g * dim + j] * load_##NAME(key[j]);                     \
                scores[g * stride + t] = sum;                                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }                                                                                                                  \
                                                                                                                       \
    /* Adds `count` weighted values to the sums of `n` heads, [n, dim]. */                                             \
    INLINE void weigh_##NAME(const int n, const float *weights, int64_t stride, const T *value, int64_t dim,           \
                             int64_t step, int64_t count, float *sums) {                                               \
        int64_t i = 0;                                                                                                 \
        for (; i + 2 * LANES <= dim; i += 2 * LANES) {                                                                 \
            vec a[HEADS], b[HEADS];                                                                                    \
            for (int g = 0; g < n; g++) {                                                                              \
                a[g] = vector_float32(sums + g * dim + i);                                                             \
                b[g] = vector_float32(sums + g * dim + i + LANES);                                                     \
            }                                                                                                          \
            const T *v = value + i;                                                                                    \
            for (int64_t t = 0; t < count; t++, v += step) {                                                           \
                const vec low = vector_##NAME(v), high = vector_##NAME(v + LANES);                                     \
                for (int g = 0; g < n; g++) {                                                                          \
                    a[g] += weights[g * stride + t] * low;                                                             \
                    b[g] += weights[g * stride + t] * high;                                                            \
                }                                                                                                      \
            }                                                                                                          \
            for (int g = 0; g < n; g++) {                                                                              \
                memcpy(sums + g * dim + i, &a[g], sizeof(vec));                                                        \
                memcpy(sums + g * dim + i + LANES, &b[g], sizeof(vec));                                                \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < dim; i++)                                                                                           \
            for (int g = 0; g < n; g++)                                                                                \
                for (int64_t t = 0; t < count; t++)                                                                    \
                    sums[g * dim + i] += weights[g * stride + t] * load_##NAME(value[t * step + i]);                   \
    }                                                                                                                  \
                                                                                                                       \
    /* One row, KV heads [from, to): the new key and value into the pool, then all query heads over [first, n). */     \
    static void row_##NAME(const Call *c, int64_t r, int64_t from, int64_t to, const T *query, T *keys, T *values,     \
                           const T *new_keys, const T *new_values, const float *sinks, T *out, int64_t first,          \
                           int64_t n, float *scratch) {                                                                \
        const int64_t group = c->heads / c->kv_heads, dk = c->key_dim, dv = c->value_dim, count = n - first;           \
        const int64_t key_step = c->kv_heads * dk, value_step = c->kv_heads * dv, heads = (to - from) * group;         \
        float *q = scratch, *sums = q + heads * dk, *scores = sums + heads * dv;                                       \
        for (int64_t h = from; h < to; h++) {                                                                          \
            const T *key = new_keys + r * c->new_key_row + h * c->new_key_head;                                        \
            const T *value = new_values + r * c->new_value_row + h * c->new_value_head;                                \
            memcpy(keys + (n - 1) * key_step + h * dk, key, dk * sizeof(T));                                           \
            memcpy(values + (n - 1) * value_step + h * dv, value, dv * sizeof(T));                                     \
        }                                                                                                              \
        for (int64_t g = 0; g < heads; g++)                                                                            \
            for (int64_t i = 0; i < dk; i++)                                                                           \
                q[g * dk + i] = load_##NAME(query[r * c->query_row + (from * group + g) * c->query_head + i]) *        \
                                c->scaling;                                                                            \
        memset(sums, 0, heads * dv * sizeof(float));                                                                   \
        for (int64_t t = 0; t < count; t += BLOCK) {                                                                   \
            const int64_t size = count - t < BLOCK ? count - t : BLOCK;                                                \
            for (int64_t h = from; h < to; h++)                                                                        \
                for (int64_t g = 0; g < group; g += HEADS) {                                                           \
                    const int64_t head = (h - from) * group + g;                                                       \
                    const T *key = keys + (first + t) * key_step + h * dk;                                             \
                    float *s = scores + head * count + t;                                                              \
                    switch (group - g) {                                                                               \
                        case 1: score_##NAME(1, q + head * dk, key, dk, key_step, size, s, count); break;              \
                        case 2: score_##NAME(2, q + head * dk, key, dk, key_step, size, s, count); break;              \
                        case 3: score_##NAME(3, q + head * dk, key, dk, key_step, size, s, count); break;              \
                        default: score_##NAME(HEADS, q + head * dk, key, dk, key_step, size, s, count);                \
                    }                                                                                                  \
                }                                                                                                      \
        }                                                                                                              \
        for (int64_t g = 0; g < heads; g++)                                                                            \
            softmax(scores + g * count, count, c->softcap, sinks ? sinks + from * group + g : NULL);                   \
        for (int64_t t = 0; t < count; t += BLOCK) {                                                                   \
            const int64_t size = count - t < BLOCK ? count - t : BLOCK;                                                \
            for (int64_t h = from; h < to; h++)                                                                        \
                for (int64_t g = 0; g < group; g += HEADS) {                                                           \
                    const int64_t head = (h - from) * group + g;                                                       \
                    const T *value = values + (first + t) * value_step + h * dv;                                       \
                    const float *s = scores + head * count + t;                                                        \
                    switch (group - g) {                                                                               \
                        case 1: weigh_##NAME(1, s, count, value, dv, value_step, size, sums + head * dv); break;       \
                        case 2: weigh_##NAME(2, s, count, value, dv, value_step, size, sums + head * dv); break;       \
                        case 3: weigh_##NAME(3, s, count, value, dv, value_step, size, sums + head * dv); break;       \
                        default: weigh_##NAME(HEADS, s, count, value, dv, value_step, size, sums + head * dv);         \
                    }                                                                                                  \
                }                                                                                                      \
        }                                                                                                              \
        T *to_row = out + (r * c->heads + from * group) * dv;                                                          \
        for (int64_t i = 0; i < heads * dv; i++) to_row[i] = store_##NAME(sums[i]);                                    \
    }                                                                                                                  \
                                                                                                                       \
    /* Returns 0, or 1 when there was no memory. */                                                                    \
    int decode_##NAME(const Call *c, const T *query, T *keys, T *values, const T *new_keys, const T *new_values,       \
                      const float *sinks, T *out, const int64_t *slots, const int64_t *firsts,                         \
                      const int64_t *lengths) {                                                                        \
        const int64_t dk = c->key_dim, dv = c->value_dim, slot_keys = c->slot_tokens * c->kv_heads * dk;               \
        const int64_t slot_values = c->slot_tokens * c->kv_heads * dv;                                                 \
        /* Memory is read best when one core passes over whole tokens; few rows are shared head by head instead. */    \
        const int64_t parts = c->rows < 2 * omp_get_max_threads() ? c->kv_heads : 1, width = c->kv_heads / parts;      \
        int64_t longest = 0;                                                                                           \
        int failed = 0;                                                                                                \
        for (int64_t r = 0; r < c->rows; r++)                                                                          \
            if (lengths[r] - firsts[r] > longest) longest = lengths[r] - firsts[r];                                    \
        const int64_t room = c->heads / parts * (dk + dv + longest);                                                   \
        _Pragma("omp parallel reduction(|: failed)") {                                                                 \
            float *scratch = malloc(room * sizeof(float));                                                             \
            failed = !scratch;                                                                                         \
            _Pragma("omp for schedule(dynamic)") for (int64_t i = 0; i < c->rows * parts; i++) {                       \
                const int64_t r = i / parts, from = i % parts * width;                                                 \
                if (scratch)                                                                                           \
                    row_##NAME(c, r, from, from + width, query, keys + slots[r] * slot_keys,                           \
                               values + slots[r] * slot_values, new_keys, new_values, sinks, out, firsts[r],           \
                               lengths[r], scratch);                                                                   \
            }                                                                                                          \
            free(scratch);                                                                                             \
        }                                                                                                              \
        return failed;                                                                                                 \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bf16)
