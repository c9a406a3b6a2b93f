// Attention in bfloat16 over a slot-major KV pool: chunks of prompts and single tokens of many requests in one call.
//
// Keys are visited in blocks that begin at multiples of BLOCK, with a running softmax in float32. What a block adds to a
// row depends on the keys the row sees in it alone, and a block it sees nothing of changes nothing: so a row's result is
// bitwise the same however its prompt was cut, whatever else is in the step, and whether it was computed as part of
// a prompt or token by token. Few queries have a block's keys side by side in a vector, many queries stand side by side
// themselves: both ways add the same numbers in the same order.

#pragma once

#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "panels.h"
#include "vectors.h"

#define BLOCK 64           // keys
#define PAIRS (BLOCK / 2)  // of weights and values
#define TILE 96            // queries of one KV head that share what is done to its keys and values, about

// Shapes and strides of one call; strides are in elements.
typedef struct {
    int64_t rows, segments, heads, kv_heads, key_dim, value_dim;
    int64_t slot_tokens;                    // tokens a slot holds
    int64_t window, chunk;                  // a token sees so many, its own included; and none before its chunk's; 0: all
    int64_t query_row, query_head;          // strides of query [rows, heads, key_dim]
    int64_t new_key_row, new_key_head;      // of new keys [rows, kv_heads, key_dim]
    int64_t new_value_row, new_value_head;  // of new values [rows, kv_heads, value_dim]
    float scaling, softcap;                 // softcap 0: none
} Call;

// Rows [row, row + count) are tokens [start, start + count) of the request in a slot.
typedef struct { int64_t slot, row, count, start; } Segment;

// Tensors of one call.
typedef struct {
    const bf16 *query, *new_keys, *new_values;
    bf16 *keys, *values, *out;
    const float *sinks;
} Tensors;

// Tokens [from, from + count) of a segment and KV heads [head, head + heads): what one thread does at a time.
typedef struct { const Segment *segment; int64_t from, count, head, heads; } Item;

// What a thread works with; sizes are in elements. n: queries of one KV head in an item, for many in whole panels.
typedef struct {
    uint32_t *queries;  // few: [heads][tiles of n][key pairs][tile]; many: [panels of n][key pairs][OUTPUTS]
    bf16 *keys;         // [heads][2 panels of keys]
    bf16 *values;       // [heads][a panel for every 32 of value_dim]
    float *scores;      // few: [ROWS][BLOCK]; many: [BLOCK][OUTPUTS]
    bf16 *weights;      // few: [ROWS][BLOCK]; many: [PAIRS][OUTPUTS][2]
    float *peaks;       // [heads][n]
    float *totals;      // [heads][n]
    float *sums;        // few: [heads][n][value_dim in whole panels]; many: [panels of n][value_dim ...][OUTPUTS]
    int32_t *sight;     // many: [2][n], the first token that a query sees, and the first one that it does not
} Scratch;

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t panels_of(int64_t outputs) { return (outputs + OUTPUTS - 1) / OUTPUTS; }

// The first token that the one at `position` sees.
INLINE int64_t first_seen(const Call *c, int64_t position) {
    int64_t first = c->window ? at_least(0, position - c->window + 1) : 0;
    return c->chunk ? at_least(first, position / c->chunk * c->chunk) : first;
}

// Asks for the rows of a block in the order they lie in memory, which is the fastest: what follows goes across them.
INLINE void fetch(const bf16 *rows, int64_t step, int64_t count, int64_t width) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < width; i += 32) _mm_prefetch((const char *)(rows + t * step + i), _MM_HINT_T0);
}

// Keys [0, count) of a block, all heads of an item, as panels whose outputs are keys; 0 where there is none.
static void key_panels(const bf16 *keys, int64_t step, int64_t count, int64_t heads, int64_t pairs, bf16 *panels) {
    const __m512i none = _mm512_setzero_si512();
    fetch(keys, step, count, 2 * heads * pairs);
    for (int64_t t = 0; t < BLOCK; t += 16) {
        for (int64_t h = 0; h < heads; h++) {
            const bf16 *head = keys + 2 * h * pairs;
            uint32_t *to = (uint32_t *)panels + (h * BLOCK / OUTPUTS + t / OUTPUTS) * pairs * OUTPUTS + t % OUTPUTS;
            for (int64_t p = 0; p < pairs; p += 16) {
                const int64_t width = at_most(16, pairs - p);
                const __mmask16 mask = (__mmask16)((1u << width) - 1);
                __m512i rows[16];
                for (int i = 0; i < 16; i++)
                    // Not a load that masks everything: on a page that was never touched such a load takes long.
                    rows[i] = t + i < count ? _mm512_maskz_loadu_epi32(mask, head + (t + i) * step + 2 * p) : none;
                transpose(rows);
                for (int i = 0; i < width; i++) _mm512_storeu_si512(to + (p + i) * OUTPUTS, rows[i]);
            }
        }
    }
}

// Values [from, to) of a block as panels over pairs of tokens; 0 before and after: what lies there is not this request's.
static void value_panels(const bf16 *values, int64_t step, int64_t from, int64_t to, int64_t heads, int64_t dim,
                         bf16 *panels) {
    static const uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_loadu_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const __m512i none = _mm512_setzero_si512();
    fetch(values, step, to, heads * dim);
    for (int64_t t = 0; t < to; t += 2) {
        const int seen = t >= from, next = t + 1 >= from && t + 1 < to;
        const bf16 *value = values + t * step;
        bf16 *row = panels + t * OUTPUTS;
        for (int64_t h = 0; h < heads; h++, value += dim)
            for (int64_t d = 0; d < dim; d += OUTPUTS, row += BLOCK * OUTPUTS) {
                const __mmask32 mask = existing(dim - d);
                const __m512i a = seen ? _mm512_maskz_loadu_epi16(mask, value + d) : none;
                const __m512i b = next ? _mm512_maskz_loadu_epi16(mask, value + step + d) : none;
                _mm512_storeu_si512(row, _mm512_permutex2var_epi16(a, first, b));
                _mm512_storeu_si512(row + OUTPUTS, _mm512_permutex2var_epi16(a, second, b));
            }
    }
}

INLINE __m512 plus(__m512 a, __m512 b) {
    __m512 sum = _mm512_add_ps(a, b);
    KEEP(sum);
    return sum;
}

// The model's score of a raw one.
INLINE __m512 scaled(const Call *c, __m512 score) {
    const __m512 cap = _mm512_set1_ps(c->softcap);
    score = _mm512_mul_ps(score, _mm512_set1_ps(c->scaling));
    KEEP(score);
    return c->softcap > 0 ? _mm512_mul_ps(tanh_of(divided(score, cap)), cap) : score;
}

// By what sums so far shrink when the highest score rises, and what is taken from scores before they become weights.
INLINE __m512 base_of(__m512 peak) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(peak, lowest, _CMP_EQ_OQ), peak, _mm512_setzero_ps());
}
INLINE __m512 scale_of(__m512 before, __m512 now) {
    const __m512 scale = exp_of(_mm512_sub_ps(before, base_of(now)));
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(before, now, _CMP_EQ_OQ), scale, _mm512_set1_ps(1.0f));
}
INLINE __m512 share_of(__m512 total) { return divided(_mm512_set1_ps(1.0f), total); }

// Query i of an item: of one KV head, token by token, each with all heads of the group.
INLINE int64_t row_of(const Item *item, int64_t i, int64_t group) { return item->segment->row + item->from + i / group; }
