// Attention of few queries: a vector holds the keys of a block, one query after the other.

#pragma once

#include "flash.h"

// The same sum as `sum_of_rows` of many.h has, in all elements.
INLINE __m512 sum_of(__m512 x) {
    x = plus(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = plus(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = plus(x, _mm512_permute_ps(x, 0x4e));
    return plus(x, _mm512_permute_ps(x, 0xb1));
}

INLINE void score(const int n, const uint32_t *queries, const bf16 *panels, int64_t pairs, float *scores) {
    for (int half = 0; half < BLOCK / OUTPUTS; half++) {
        __m512 sums[ROWS][2];
        for (int r = 0; r < n; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
        multiply(n, queries, 1, n, panels + half * pairs * 2 * OUTPUTS, pairs, 0, NULL, sums);
        store_sums(n, sums, scores + half * OUTPUTS, BLOCK);
    }
}

INLINE void weigh(const int n, const bf16 *weights, const bf16 *panels, int64_t pairs, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i++, to += OUTPUTS, panels += PAIRS * 2 * OUTPUTS) {
        __m512 sums[ROWS][2];
        load_sums(n, to, count * OUTPUTS, sums);
        multiply(n, (const uint32_t *)weights, PAIRS, 1, panels, pairs, 0, NULL, sums);
        store_sums(n, sums, to, count * OUTPUTS);
    }
}

// One query's scores of a block, of which it sees [from, to), become weights; its sums so far are rescaled.
INLINE void soften(const Call *c, float *scores, int64_t from, int64_t to, bf16 *weights, float *peak, float *total,
                   float *sums, int64_t dim) {
    const __m512 lanes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 s[BLOCK / 16], most = _mm512_set1_ps(-INFINITY), all = _mm512_setzero_ps();
    for (int i = 0; i < BLOCK / 16; i++) {
        s[i] = scaled(c, _mm512_loadu_ps(scores + 16 * i));
        const __m512 place = _mm512_add_ps(lanes, _mm512_set1_ps(16.0f * i));
        const __mmask16 seen = _mm512_cmp_ps_mask(place, _mm512_set1_ps((float)from), _CMP_GE_OQ) &
                               _mm512_cmp_ps_mask(place, _mm512_set1_ps((float)to), _CMP_LT_OQ);
        s[i] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), s[i]);
        most = _mm512_max_ps(most, s[i]);
    }
    const __m512 before = _mm512_set1_ps(*peak), now = _mm512_max_ps(before, _mm512_set1_ps(_mm512_reduce_max_ps(most)));
    const __m512 base = base_of(now), scale = scale_of(before, now);
    for (int i = 0; i < BLOCK / 16; i++) {
        s[i] = exp_of(_mm512_sub_ps(s[i], base));
        all = plus(all, s[i]);
    }
    for (int i = 0; i < BLOCK / 16; i += 2)
        _mm512_storeu_si512(weights + 16 * i, (__m512i)_mm512_cvtne2ps_pbh(s[i + 1], s[i]));
    *peak = _mm512_cvtss_f32(now);
    *total = _mm512_cvtss_f32(_mm512_fmadd_ps(_mm512_set1_ps(*total), scale, sum_of(all)));
    if (_mm512_cvtss_f32(scale) != 1.0f)
        for (int64_t i = 0; i < dim; i += 16)
            _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), scale));
}

// A block of keys and values, which begins at token `block`, for all queries of an item.
static void visit_few(const Call *c, const Item *item, const Tensors *x, const Scratch *s, int64_t block) {
    const int64_t group = c->heads / c->kv_heads, n = item->count * group, pairs = c->key_dim / 2;
    const int64_t first = item->segment->start + item->from, last = first + item->count - 1;  // positions
    const int64_t count = at_most(BLOCK, last + 1 - block), seen = at_least(0, first_seen(c, first) - block);
    const int64_t key_step = c->kv_heads * c->key_dim, value_step = c->kv_heads * c->value_dim;
    const int64_t token = item->segment->slot * c->slot_tokens + block;
    const int64_t panels = panels_of(c->value_dim), width = panels * OUTPUTS;
    const Split tiles = split(n);
    key_panels(x->keys + token * key_step + item->head * c->key_dim, key_step, count, item->heads, pairs, s->keys);
    value_panels(x->values + token * value_step + item->head * c->value_dim, value_step, seen, count, item->heads,
                 c->value_dim, s->values);
    for (int64_t i = 0; i < item->heads * tiles.tiles; i++) {
        const int64_t h = i / tiles.tiles, t = i % tiles.tiles, from = first_of(tiles, t);
        const uint32_t *queries = s->queries + (h * n + from) * pairs;
        const bf16 *keys = s->keys + h * BLOCK * c->key_dim, *values = s->values + h * BLOCK * width;
        float *sums = s->sums + (h * n + from) * width;
        switch (size_of(tiles, t)) {
#define SCORE(N)                                                                                                       \
    case N: score(N, queries, keys, pairs, s->scores); break;
            EACH_SIZE(SCORE)
        }
        for (int64_t r = 0; r < size_of(tiles, t); r++) {
            const int64_t position = first + (from + r) / group, at = h * n + from + r;
            soften(c, s->scores + r * BLOCK, first_seen(c, position) - block, position + 1 - block, s->weights + r * BLOCK,
                   s->peaks + at, s->totals + at, sums + r * width, width);
        }
        switch (size_of(tiles, t)) {
#define WEIGH(N)                                                                                                       \
    case N: weigh(N, s->weights, values, (count + 1) / 2, panels, sums); break;
            EACH_SIZE(WEIGH)
        }
    }
}

static void attend_few(const Call *c, const Item *item, const Tensors *x, const Scratch *s) {
    const int64_t group = c->heads / c->kv_heads, n = item->count * group, pairs = c->key_dim / 2;
    const int64_t panels = panels_of(c->value_dim), width = panels * OUTPUTS;
    const Split tiles = split(n);
    for (int64_t h = 0; h < item->heads; h++) {
        for (int64_t t = 0; t < tiles.tiles; t++) {
            const int64_t from = first_of(tiles, t), size = size_of(tiles, t);
            for (int64_t i = 0; i < size; i++) {
                const int64_t head = (item->head + h) * group + (from + i) % group;
                const bf16 *query = x->query + row_of(item, from + i, group) * c->query_row + head * c->query_head;
                uint32_t *to = s->queries + (h * n + from) * pairs + i;
                for (int64_t p = 0; p < pairs; p++) memcpy(to + p * size, query + 2 * p, sizeof *to);
                s->peaks[h * n + from + i] = x->sinks ? x->sinks[head] : -INFINITY;
                s->totals[h * n + from + i] = x->sinks ? 1.0f : 0.0f;
            }
        }
    }
    memset(s->sums, 0, item->heads * n * width * sizeof(float));
    const int64_t first = item->segment->start + item->from;
    for (int64_t block = first_seen(c, first) / BLOCK * BLOCK; block < first + item->count; block += BLOCK)
        visit_few(c, item, x, s, block);
    for (int64_t h = 0; h < item->heads; h++)
        for (int64_t i = 0; i < n; i++) {
            const int64_t head = (item->head + h) * group + i % group;
            bf16 *to = x->out + (row_of(item, i, group) * c->heads + head) * c->value_dim;
            const __m512 share = share_of(_mm512_set1_ps(s->totals[h * n + i]));
            const float *sums = s->sums + (h * n + i) * width;
            for (int64_t d = 0; d < c->value_dim; d += 16) {
                const __mmask16 mask = (__mmask16)existing(c->value_dim - d);
                const __m512 result = _mm512_mul_ps(_mm512_loadu_ps(sums + d), share);
                _mm256_mask_storeu_epi16(to + d, mask, (__m256i)_mm512_cvtneps_pbh(result));
            }
        }
}
