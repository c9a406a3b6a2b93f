// y = x W^T + b in bfloat16, for any number of rows.
//
// Weights lie in panels, one after the other, so that a step reads them once from memory, from the first byte to the
// last. A row's result is bitwise the same in every batch.

#include <omp.h>

#include "panels.h"

#define AHEAD 512  // elements by which a panel is asked for before it is needed
#define TURN 64    // pairs after which two tiles take turns at a panel: what the second needs is still in the first cache

// Tensors of one call, contiguous.
typedef struct {
    const bf16 *x;       // [rows, inputs]
    const bf16 *panels;  // of the weight
    const float *bias;   // [outputs] or NULL
    bf16 *out;           // [rows, outputs]
    int64_t pairs, outputs;
} Product;

// Sums of rows [from, from + n) and one panel, whose first output is `output`, become outputs.
INLINE void finish(const int n, const Product *c, __m512 sums[][2], int64_t from, int64_t output) {
    const __mmask32 exist = existing(c->outputs - output);
    bf16 *out = c->out + from * c->outputs + output;
    for (int half = 0; half < 2; half++, out += 16) {
        const __mmask16 mask = (__mmask16)(exist >> 16 * half);
        const __m512 bias = c->bias ? _mm512_maskz_loadu_ps(mask, c->bias + output + 16 * half) : _mm512_setzero_ps();
        for (int r = 0; r < n; r++)
            _mm256_mask_storeu_epi16(out + r * c->outputs, mask,
                                     (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(sums[r][half], bias)));
    }
}

// A tile of n rows times a panel.
INLINE void whole(const int n, const Product *c, const uint32_t *tile, const bf16 *panel, int64_t from, int64_t output) {
    __m512 sums[ROWS][2];
    for (int r = 0; r < n; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    multiply(n, tile, 1, n, panel, c->pairs, 2, panel + AHEAD, sums);
    finish(n, c, sums, from, output);
}

// One turn: `pairs` pairs of a tile of n rows times a panel. The turns of two tiles bring the next one's weights.
INLINE void turn(const int n, const uint32_t *tile, const bf16 *panel, int64_t pairs, const bf16 *next, float *so_far) {
    __m512 sums[ROWS][2];
    load_sums(n, so_far, OUTPUTS, sums);
    multiply(n, tile, 1, n, panel, pairs, 1, next, sums);
    store_sums(n, sums, so_far, OUTPUTS);
}

INLINE void finish_turns(const int n, const Product *c, const float *so_far, int64_t from, int64_t output) {
    __m512 sums[ROWS][2];
    load_sums(n, so_far, OUTPUTS, sums);
    finish(n, c, sums, from, output);
}

static void all_tiles(const Product *c, Split tiles, const uint32_t *scratch, int64_t output) {
    const bf16 *panel = c->panels + output * 2 * c->pairs;
    for (int64_t t = 0; t < tiles.tiles; t++) {
        const int64_t from = first_of(tiles, t);
        switch (size_of(tiles, t)) {
#define WHOLE(N)                                                                                                       \
    case N: whole(N, c, scratch + from * c->pairs, panel, from, output); break;
            EACH_SIZE(WHOLE)
        }
    }
}

static void two_tiles(const Product *c, Split tiles, const uint32_t *scratch, int64_t output) {
    const bf16 *panel = c->panels + output * 2 * c->pairs;
    float sums[2 * ROWS * OUTPUTS] __attribute__((aligned(64))) = {0};
    for (int64_t p = 0; p < c->pairs; p += TURN, panel += TURN * 2 * OUTPUTS) {
        const int64_t pairs = c->pairs - p < TURN ? c->pairs - p : TURN;
        for (int64_t t = 0; t < 2; t++) {
            const int64_t from = first_of(tiles, t), n = size_of(tiles, t);
            const uint32_t *tile = scratch + from * c->pairs + p * n;
            const bf16 *next = panel + (TURN * 2 + TURN * t) * OUTPUTS;
            switch (n) {
#define ONE_TURN(N)                                                                                                    \
    case N: turn(N, tile, panel, pairs, next, sums + from * OUTPUTS); break;
                EACH_SIZE(ONE_TURN)
            }
        }
    }
    for (int64_t t = 0; t < 2; t++) {
        const int64_t from = first_of(tiles, t);
        switch (size_of(tiles, t)) {
#define FINISH(N)                                                                                                      \
    case N: finish_turns(N, c, sums + from * OUTPUTS, from, output); break;
            EACH_SIZE(FINISH)
        }
    }
}

// n rows as [pairs][n]: so the pairs of one turn of `multiply` are neighbours.
INLINE void interleave(const int n, const bf16 *x, int64_t pairs, uint32_t *to) {
    for (int r = 0; r < n; r++)
        for (int64_t p = 0; p < pairs; p++) memcpy(to + p * n + r, x + 2 * (r * pairs + p), sizeof *to);
}

// The rows of one tile; tiles lie one after the other.
static void gather(const Product *c, Split tiles, int64_t t, uint32_t *scratch) {
    const int64_t from = first_of(tiles, t);
    switch (size_of(tiles, t)) {
#define INTERLEAVE(N)                                                                                                  \
    case N: interleave(N, c->x + from * 2 * c->pairs, c->pairs, scratch + from * c->pairs); break;
        EACH_SIZE(INTERLEAVE)
    }
}

// scratch holds rows * inputs / 2. inputs is even.
void linear_bfloat16(const bf16 *x, const bf16 *panels, const float *bias, bf16 *out, uint32_t *scratch, int64_t rows,
                     int64_t inputs, int64_t outputs) {
    if (rows == 0) return;
    const Product product = {x, panels, bias, out, inputs / 2, outputs};
    const Split tiles = split(rows);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles.tiles; t++) gather(&product, tiles, t, scratch);
#pragma omp for schedule(static) nowait
        for (int64_t output = 0; output < outputs; output += OUTPUTS)
            (tiles.tiles == 2 ? two_tiles : all_tiles)(&product, tiles, scratch, output);
    }
}
