// x W^T + b in bfloat16, for any number of rows, and what a model does to it next.
//
// Weights lie in panels, one after the other, so that a step of few rows reads them once from memory, from the first
// byte to the last. A row's result is bitwise the same in every batch.

#pragma once

#include <omp.h>

#include "vectors.h"

#define AHEAD 512  // elements by which a panel is asked for before it is needed
#define TURN 64    // pairs after which two tiles take turns at a panel: what the second needs is still in the first cache

// What becomes of a sum, after its bias.
typedef enum {
    PLAIN,
    ADDED,  // to `before`, the same element of another tensor, which may be `out`
    GATED,  // panels hold 16 outputs g and then 16 outputs u, and silu(g) * u are 16 outputs
} Use;

// Tensors of one call, contiguous.
typedef struct {
    const bf16 *x;       // [rows, inputs]
    const bf16 *panels;  // of the weight
    const float *bias;   // [outputs] or NULL
    const bf16 *before;  // [rows, outputs], if sums are added to it
    bf16 *out;           // [rows, outputs], or [rows, outputs / 2] if they are gated
    int64_t rows, pairs, outputs;
    Use use;
} Product;

INLINE __m512 rounded(__m512 x) { return widened(_mm512_cvtneps_pbh(x)); }

// Sums of rows [from, from + n) and one panel, whose first output is `output`, become outputs. Whatever the model's
// code would have written to memory in between is rounded as that would be.
INLINE void finish(const int n, const Product *c, __m512 sums[][2], int64_t from, int64_t output) {
    const __mmask32 exist = existing(c->outputs - output);
    const __mmask16 masks[2] = {(__mmask16)exist, (__mmask16)(exist >> 16)};
    if (c->bias)
        for (int half = 0; half < 2; half++) {
            const __m512 bias = _mm512_maskz_loadu_ps(masks[half], c->bias + output + 16 * half);
            for (int r = 0; r < n; r++) sums[r][half] = _mm512_add_ps(sums[r][half], bias);
        }
    if (c->use == GATED) {
        bf16 *out = c->out + (from * c->outputs + output) / 2;
        for (int r = 0; r < n; r++, out += c->outputs / 2) {
            const __m512 gate = rounded(silu_of(rounded(sums[r][0])));
            _mm256_storeu_si256((__m256i *)out, narrowed(_mm512_mul_ps(gate, rounded(sums[r][1]))));
        }
        return;
    }
    for (int half = 0; half < 2; half++)
        for (int r = 0; r < n; r++) {
            const int64_t at = (from + r) * c->outputs + output + 16 * half;
            __m512 sum = sums[r][half];
            if (c->use == ADDED)
                sum = _mm512_add_ps(widened((__m256bh)_mm256_maskz_loadu_epi16(masks[half], c->before + at)), rounded(sum));
            _mm256_mask_storeu_epi16(c->out + at, masks[half], narrowed(sum));
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
    int64_t p = 0;
    for (; p + 16 <= pairs; p += 16) {
        __m512i rows[16];
        for (int r = 0; r < 16; r++)
            rows[r] = r < n ? _mm512_loadu_si512(x + 2 * (r * pairs + p)) : _mm512_setzero_si512();
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_mask_storeu_epi32(to + (p + i) * n, (__mmask16)((1u << n) - 1), rows[i]);
    }
    for (int r = 0; r < n; r++)
        for (int64_t q = p; q < pairs; q++) memcpy(to + q * n + r, x + 2 * (r * pairs + q), sizeof *to);
}

// The rows of one tile.
static void gather(const Product *c, Split tiles, int64_t t, uint32_t *scratch) {
    const int64_t from = first_of(tiles, t);
    switch (size_of(tiles, t)) {
#define INTERLEAVE(N)                                                                                                  \
    case N: interleave(N, c->x + from * 2 * c->pairs, c->pairs, scratch + from * c->pairs); break;
        EACH_SIZE(INTERLEAVE)
    }
}

// To be called by all threads of a team. scratch holds rows * inputs / 2, and is free again after the next barrier.
static void multiply_all(const Product *c, uint32_t *scratch) {
    const Split tiles = split(c->rows);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles.tiles; t++) gather(c, tiles, t, scratch);
#pragma omp for schedule(static)
    for (int64_t output = 0; output < c->outputs; output += OUTPUTS)
        (tiles.tiles == 2 ? two_tiles : all_tiles)(c, tiles, scratch, output);
}
