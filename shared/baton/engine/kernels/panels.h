// Products in bfloat16 with float32 sums, two inputs at a time.
//
// A panel holds 32 outputs: [pairs][32][2]. Every output's sum runs over the pairs in their order, whatever else is
// computed beside it, so a result never depends on its neighbours.

#pragma once

#ifndef __AVX512BF16__  // no level of x86-64 has it: who loads this asks the CPU
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define OUTPUTS 32  // of a panel: two vectors of sums
#define ROWS 14     // at a time, at most: their 28 vectors of sums and the three they are made from fit the 32 registers
#define LINE 32     // elements of 64 bytes
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

// The number of rows must be known to the compiler, or the sums would not stay in registers.
#define EACH_SIZE(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14)

// Adds the products of n rows with a panel to sums. Row r's pair p is x[r * row_step + p * pair_step]. With every pair,
// `lines` lines of 64 bytes are brought from memory, from `next` on.
INLINE void multiply(const int n, const uint32_t *x, const int64_t row_step, const int64_t pair_step, const bf16 *panel,
                     int64_t pairs, const int lines, const bf16 *next, __m512 sums[][2]) {
    for (int64_t p = 0; p < pairs; p++, x += pair_step, panel += 2 * OUTPUTS, next += lines * LINE) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(panel), b = (__m512bh)_mm512_loadu_si512(panel + OUTPUTS);
        for (int line = 0; line < lines; line++) _mm_prefetch((const char *)(next + line * LINE), _MM_HINT_T0);
        for (int r = 0; r < n; r++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[r * row_step]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], pair, a);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], pair, b);
        }
    }
}

INLINE void load_sums(const int n, const float *from, int64_t step, __m512 sums[][2]) {
    for (int r = 0; r < n; r++)
        for (int half = 0; half < 2; half++) sums[r][half] = _mm512_loadu_ps(from + r * step + 16 * half);
}

INLINE void store_sums(const int n, __m512 sums[][2], float *to, int64_t step) {
    for (int r = 0; r < n; r++)
        for (int half = 0; half < 2; half++) _mm512_storeu_ps(to + r * step + 16 * half, sums[r][half]);
}

// Which of a panel's outputs exist when `left` are left.
INLINE __mmask32 existing(int64_t left) { return left < OUTPUTS ? (1u << left) - 1 : 0xffffffffu; }

// How `rows` are split: `tiles` of `size` rows, the first `larger` of which have one more.
typedef struct { int64_t tiles, size, larger; } Split;

INLINE Split split(int64_t rows) {
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    return (Split){tiles, rows / tiles, rows % tiles};
}
INLINE int64_t first_of(Split s, int64_t tile) { return tile * s.size + (tile < s.larger ? tile : s.larger); }
INLINE int64_t size_of(Split s, int64_t tile) { return s.size + (tile < s.larger); }
