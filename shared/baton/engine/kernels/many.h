// Attention of many queries: a vector holds 16 of them, one key after the other, so that no maximum or sum runs across.

#pragma once

#include "flash.h"

#define MANY 20  // queries from which this is worth it: they are computed in whole panels

INLINE void score_keys(const int n, const uint32_t *keys, const uint32_t *queries, int64_t pairs, float *scores) {
    __m512 sums[ROWS][2];
    for (int r = 0; r < n; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    multiply(n, keys, 1, OUTPUTS, (const bf16 *)queries, pairs, 0, NULL, sums);
    store_sums(n, sums, scores, OUTPUTS);
}

// n of the values' dimensions, whose sums so far are rescaled first.
INLINE void weigh_values(const int n, const uint32_t *values, const bf16 *weights, int64_t pairs, const __m512 scale[2],
                         float *to) {
    __m512 sums[ROWS][2];
    load_sums(n, to, OUTPUTS, sums);
    for (int r = 0; r < n; r++)
        for (int half = 0; half < 2; half++) {
            sums[r][half] = _mm512_mul_ps(sums[r][half], scale[half]);
            KEEP(sums[r][half]);
        }
    multiply(n, values, 1, OUTPUTS, weights, pairs, 0, NULL, sums);
    store_sums(n, sums, to, OUTPUTS);
}

INLINE __m512 sum_of_rows(__m512 rows[16]) {
    for (int step = 8; step; step /= 2)
        for (int i = 0; i < step; i++) rows[i] = plus(rows[i], rows[i + step]);
    return rows[0];
}

// What scores become when not all queries see all keys: those of unseen ones the lowest there is.
INLINE __m512 if_seen(__m512 score, int64_t key, __m512i first, __m512i end) {
    const __m512i place = _mm512_set1_epi32((int)key);
    const __mmask16 seen = _mm512_cmp_epi32_mask(place, first, _MM_CMPINT_NLT) & _mm512_cmp_epi32_mask(place, end, _MM_CMPINT_LT);
    return _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), score);
}

// Scores [count][OUTPUTS] of 16 queries with the keys from token `block` on become weights. Returns by what the sums so
// far shrink. masked: some of them do not see all of the keys, but only those from `first` until before `end`.
INLINE __m512 soften_keys(const Call *c, float *scores, int64_t count, int64_t block, int masked, const int32_t *first,
                          const int32_t *end, bf16 *weights, float *peaks, float *totals) {
    static const uint16_t twins[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i side_by_side = _mm512_loadu_si512(twins), from = _mm512_loadu_si512(first), to = _mm512_loadu_si512(end);
    const __m512 before = _mm512_loadu_ps(peaks), lowest = _mm512_set1_ps(-INFINITY);
    __m512 now = before, all[16];
    for (int64_t t = 0; t < count; t++) {
        __m512 score = scaled(c, _mm512_loadu_ps(scores + t * OUTPUTS));
        if (masked) score = if_seen(score, block + t, from, to);
        _mm512_storeu_ps(scores + t * OUTPUTS, score);
        now = _mm512_max_ps(now, score);
    }
    for (int64_t t = count; t % 16; t++) _mm512_storeu_ps(scores + t * OUTPUTS, lowest);
    const __m512 base = base_of(now), scale = scale_of(before, now);
    for (int i = 0; i < 16; i++) all[i] = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; t += 16)
        for (int i = 0; i < 16; i += 2) {
            const float *pair = scores + (t + i) * OUTPUTS;
            const __m512 a = exp_of(_mm512_sub_ps(_mm512_loadu_ps(pair), base));
            const __m512 b = exp_of(_mm512_sub_ps(_mm512_loadu_ps(pair + OUTPUTS), base));
            all[i] = plus(all[i], a);
            all[i + 1] = plus(all[i + 1], b);
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
            _mm512_storeu_si512(weights + (t + i) * OUTPUTS, _mm512_permutexvar_epi16(side_by_side, both));
        }
    _mm512_storeu_ps(peaks, now);
    _mm512_storeu_ps(totals, _mm512_fmadd_ps(_mm512_loadu_ps(totals), scale, sum_of_rows(all)));
    return scale;
}

// `count` outputs of panels, in tiles of at most ROWS: DO(N) for a tile of N outputs, the first of which is `at`.
#define IN_TILES(COUNT, DO)                                                                                            \
    for (int64_t at = 0; at < (COUNT);) {                                                                              \
        const int64_t panel = at / OUTPUTS, left = at_most((COUNT), (panel + 1) * OUTPUTS) - at;                       \
        const int64_t size = split(left).size + (split(left).larger > 0);                                              \
        switch (size) { EACH_SIZE(DO) }                                                                                \
        at += size;                                                                                                    \
    }

// A block of keys and values, which begins at token `block`, for all queries of an item of one KV head.
static void visit_many(const Call *c, const Item *item, const Tensors *x, const Scratch *s, int64_t n, int64_t block) {
    const int64_t pairs = c->key_dim / 2, width = panels_of(c->value_dim) * OUTPUTS;
    const int64_t first = item->segment->start + item->from, last = first + item->count - 1;  // positions
    const int64_t count = at_most(BLOCK, last + 1 - block), seen = at_least(0, first_seen(c, first) - block);
    const int64_t key_step = c->kv_heads * c->key_dim, value_step = c->kv_heads * c->value_dim;
    const int64_t token = item->segment->slot * c->slot_tokens + block;
    const int masked = block + count > first + 1 || first_seen(c, last) > block;
    key_panels(x->keys + token * key_step + item->head * c->key_dim, key_step, count, 1, pairs, s->keys);
    value_panels(x->values + token * value_step + item->head * c->value_dim, value_step, seen, count, 1, c->value_dim,
                 s->values);
    const uint32_t *keys = (const uint32_t *)s->keys, *values = (const uint32_t *)s->values;
    for (int64_t q = 0; q < n; q += OUTPUTS) {
        const uint32_t *queries = s->queries + q * pairs;
        float *sums = s->sums + q * width;
        __m512 scale[2];
#define SCORE_KEYS(N)                                                                                                  \
    case N: score_keys(N, keys + panel * pairs * OUTPUTS + at % OUTPUTS, queries, pairs, s->scores + at * OUTPUTS); break;
        IN_TILES(count, SCORE_KEYS)
        for (int half = 0; half < 2; half++) {
            const int64_t lane = q + 16 * half;
            scale[half] = soften_keys(c, s->scores + 16 * half, count, block, masked, s->sight + lane, s->sight + n + lane,
                                      s->weights + 32 * half, s->peaks + lane, s->totals + lane);
        }
#define WEIGH_VALUES(N)                                                                                                \
    case N:                                                                                                            \
        weigh_values(N, values + panel * PAIRS * OUTPUTS + at % OUTPUTS, s->weights, (count + 1) / 2, scale,           \
                     sums + at * OUTPUTS);                                                                             \
        break;
        IN_TILES(width, WEIGH_VALUES)
    }
}

// 16 queries, of which `exist`, of a tensor as [pairs][OUTPUTS].
static void query_panel(const uint32_t *const rows[16], int64_t exist, int64_t pairs, uint32_t *to) {
    for (int64_t p = 0; p < pairs; p += 16) {
        const int64_t left = at_most(16, pairs - p);
        const __mmask16 mask = (__mmask16)((1u << left) - 1);
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = i < exist ? _mm512_maskz_loadu_epi32(mask, rows[i] + p) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < left; i++) _mm512_storeu_si512(to + (p + i) * OUTPUTS, r[i]);
    }
}

// What 16 queries, of which `exist`, summed up: [dim][OUTPUTS], times their shares.
static void result(const float *sums, __m512 share, int64_t exist, int64_t dim, bf16 *const rows[16]) {
    for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 mask = (__mmask16)existing(dim - d);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(sums + (d + i) * OUTPUTS), share));
        transpose(r);
        for (int i = 0; i < exist; i++)
            _mm256_mask_storeu_epi16(rows[i] + d, mask, narrowed(_mm512_castsi512_ps(r[i])));
    }
}

static void attend_many(const Call *c, const Item *item, const Tensors *x, const Scratch *s) {
    const int64_t group = c->heads / c->kv_heads, real = item->count * group, n = panels_of(real) * OUTPUTS;
    const int64_t pairs = c->key_dim / 2, width = panels_of(c->value_dim) * OUTPUTS;
    const int64_t first = item->segment->start + item->from;
    for (int64_t q = 0; q < n; q += 16) {
        const uint32_t *rows[16];
        const int64_t exist = at_least(0, at_most(16, real - q));
        for (int64_t i = 0; i < 16; i++) {
            const int64_t head = item->head * group + (q + i) % group, position = first + (q + i) / group;
            if (i < exist)
                rows[i] = (const uint32_t *)(x->query + row_of(item, q + i, group) * c->query_row + head * c->query_head);
            s->sight[q + i] = i < exist ? (int32_t)first_seen(c, position) : 0;
            s->sight[n + q + i] = i < exist ? (int32_t)position + 1 : 0;
            s->peaks[q + i] = x->sinks && i < exist ? x->sinks[head] : -INFINITY;
            s->totals[q + i] = x->sinks ? 1.0f : 0.0f;
        }
        query_panel(rows, exist, pairs, s->queries + q / OUTPUTS * OUTPUTS * pairs + q % OUTPUTS);
    }
    memset(s->sums, 0, n * width * sizeof(float));
    for (int64_t block = first_seen(c, first) / BLOCK * BLOCK; block < first + item->count; block += BLOCK)
        visit_many(c, item, x, s, n, block);
    for (int64_t q = 0; q < real; q += 16) {
        bf16 *rows[16];
        const int64_t exist = at_most(16, real - q);
        for (int64_t i = 0; i < exist; i++) {
            const int64_t head = item->head * group + (q + i) % group;
            rows[i] = x->out + (row_of(item, q + i, group) * c->heads + head) * c->value_dim;
        }
        result(s->sums + q / OUTPUTS * OUTPUTS * width + q % OUTPUTS, share_of(_mm512_loadu_ps(s->totals + q)), exist,
               c->value_dim, rows);
    }
}
