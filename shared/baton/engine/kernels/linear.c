// A linear layer in bfloat16.

#include "product.h"

// scratch holds rows * inputs / 2. inputs is even.
void linear_bfloat16(const bf16 *x, const bf16 *panels, const float *bias, bf16 *out, uint32_t *scratch, int64_t rows,
                     int64_t inputs, int64_t outputs) {
    if (rows == 0) return;
    const Product product = {x, panels, bias, NULL, out, rows, inputs / 2, outputs, PLAIN};
#pragma omp parallel
    multiply_all(&product, scratch);
}
