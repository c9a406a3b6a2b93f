// Root mean square norm of rows, in one pass over them, with the roundings that model code has.

#include <math.h>
#include <stdint.h>

#include "element.h"

#define LANES 16
#define SMALL 32768  // elements that are not worth waking another thread for

// rounds: the normed value is rounded to the element type before the weight multiplies it. offset: added to the weight.
#define DEFINE(NAME, T)                                                                                                \
    void norm_##NAME(const T *x, const T *weight, T *out, int64_t rows, int64_t dim, float eps, float offset,          \
                     int rounds) {                                                                                     \
        _Pragma("omp parallel for if (rows * dim > SMALL)") for (int64_t r = 0; r < rows; r++) {                       \
            const T *row = x + r * dim;                                                                                \
            T *to = out + r * dim;                                                                                     \
            float parts[LANES] = {0}, sum = 0;                                                                         \
            int64_t i = 0;                                                                                             \
            for (; i + LANES <= dim; i += LANES)                                                                       \
                for (int j = 0; j < LANES; j++) parts[j] += load_##NAME(row[i + j]) * load_##NAME(row[i + j]);         \
            for (; i < dim; i++) sum += load_##NAME(row[i]) * load_##NAME(row[i]);                                     \
            for (int step = LANES / 2; step; step /= 2)                                                                \
                for (int j = 0; j < step; j++) parts[j] += parts[j + step];                                            \
            const float factor = 1.0f / sqrtf((sum + parts[0]) / (float)dim + eps);                                    \
            for (i = 0; i < dim; i++) {                                                                                \
                const float normed = load_##NAME(row[i]) * factor, by = load_##NAME(weight[i]) + offset;               \
                to[i] = store_##NAME((rounds ? load_##NAME(store_##NAME(normed)) : normed) * by);                      \
            }                                                                                                          \
        }                                                                                                              \
    }

DEFINE(float32, float)
DEFINE(bfloat16, bf16)
