// Attention in bfloat16, as flash.h tells.

#include "attend.h"

// Returns 0, or 1 when there was no memory. key_dim is even.
int attend_bfloat16(const Call *c, const bf16 *query, bf16 *keys, bf16 *values, const bf16 *new_keys,
                    const bf16 *new_values, const float *sinks, bf16 *out, const Segment *segments) {
    const Tensors x = {query, new_keys, new_values, keys, values, out, sinks};
    return attend_all(c, &x, segments);
}
