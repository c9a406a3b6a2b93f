// Attention in bfloat16 over a slot-major KV pool: chunks of prompts and single tokens of many requests in one call.
//
// Keys are visited in blocks that begin at multiples of BLOCK, with a running softmax in float32. What a block adds to a
// row depends on the keys the row sees in it alone, and a block it sees nothing of changes nothing: so a row's result is
// bitwise the same however its prompt was cut, whatever else is in the step, and whether it was computed as part of
// a prompt or token by token.

#include <math.h>
#include <omp.h>
#include <stdlib.h>

#include "panels.h"
#include "vectors.h"

#define BLOCK 64           // keys
#define PAIRS (BLOCK / 2)  // of weights and values
#define TILE 56            // queries of one KV head that share what is done to its keys and values, about

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

// What a thread works with; sizes are in elements. n: queries of one KV head in an item.
typedef struct {
    uint32_t *queries;  // [heads][tiles of n][key pairs][tile]
    bf16 *keys;         // [heads][2 panels of keys]
    bf16 *values;       // [heads][a panel for every 32 of value_dim]
    float *scores;      // [n][BLOCK]
    bf16 *weights;      // [n][BLOCK]
    float *peaks;       // [heads][n]
    float *totals;      // [heads][n]
    float *sums;        // [heads][n][value_dim in whole panels]
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
        s[i] = _mm512_mul_ps(_mm512_loadu_ps(scores + 16 * i), _mm512_set1_ps(c->scaling));
        if (c->softcap > 0)
            s[i] = _mm512_mul_ps(tanh_of(_mm512_div_ps(s[i], _mm512_set1_ps(c->softcap))), _mm512_set1_ps(c->softcap));
        const __m512 place = _mm512_add_ps(lanes, _mm512_set1_ps(16.0f * i));
        const __mmask16 seen = _mm512_cmp_ps_mask(place, _mm512_set1_ps((float)from), _CMP_GE_OQ) &
                               _mm512_cmp_ps_mask(place, _mm512_set1_ps((float)to), _CMP_LT_OQ);
        s[i] = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), s[i]);
        most = _mm512_max_ps(most, s[i]);
    }
    const float before = *peak, now = fmaxf(before, _mm512_reduce_max_ps(most));
    const __m512 base = _mm512_set1_ps(now == -INFINITY ? 0.0f : now);
    for (int i = 0; i < BLOCK / 16; i++) {
        s[i] = exp_of(_mm512_sub_ps(s[i], base));
        all = _mm512_add_ps(all, s[i]);
    }
    for (int i = 0; i < BLOCK / 16; i += 2)
        _mm512_storeu_si512(weights + 16 * i, (__m512i)_mm512_cvtne2ps_pbh(s[i + 1], s[i]));
    const float scale = before == now ? 1.0f : _mm512_cvtss_f32(exp_of(_mm512_sub_ps(_mm512_set1_ps(before), base)));
    *peak = now;
    *total = *total * scale + _mm512_reduce_add_ps(all);
    if (scale != 1.0f)
        for (int64_t i = 0; i < dim; i += 16)
            _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), _mm512_set1_ps(scale)));
}

// A block of keys and values, which begins at token `block`, for all queries of an item.
static void visit(const Call *c, const Item *item, const Tensors *x, const Scratch *s, int64_t block) {
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

// Query i of an item: of one KV head, token by token, each with all heads of the group.
INLINE int64_t row_of(const Item *item, int64_t i, int64_t group) { return item->segment->row + item->from + i / group; }

static void attend(const Call *c, const Item *item, const Tensors *x, const Scratch *s) {
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
        visit(c, item, x, s, block);
    for (int64_t h = 0; h < item->heads; h++)
        for (int64_t i = 0; i < n; i++) {
            const int64_t head = (item->head + h) * group + i % group;
            bf16 *to = x->out + (row_of(item, i, group) * c->heads + head) * c->value_dim;
            const __m512 share = _mm512_set1_ps(1.0f / s->totals[h * n + i]);
            const float *sums = s->sums + (h * n + i) * width;
            for (int64_t d = 0; d < c->value_dim; d += 16) {
                const __mmask16 mask = (__mmask16)existing(c->value_dim - d);
                const __m512 result = _mm512_mul_ps(_mm512_loadu_ps(sums + d), share);
                _mm256_mask_storeu_epi16(to + d, mask, (__m256i)_mm512_cvtneps_pbh(result));
            }
        }
}

// The new keys and values of one row into the pool.
static void keep(const Call *c, const Segment *segment, int64_t i, const Tensors *x) {
    const int64_t dk = c->key_dim, dv = c->value_dim, row = segment->row + i;
    const int64_t token = segment->slot * c->slot_tokens + segment->start + i;
    for (int64_t h = 0; h < c->kv_heads; h++) {
        memcpy(x->keys + (token * c->kv_heads + h) * dk, x->new_keys + row * c->new_key_row + h * c->new_key_head,
               dk * sizeof(bf16));
        memcpy(x->values + (token * c->kv_heads + h) * dv,
               x->new_values + row * c->new_value_row + h * c->new_value_head, dv * sizeof(bf16));
    }
}

// What each thread takes in turn, the longest first. Returns how many.
static int64_t items_of(const Call *c, const Segment *segments, Item *items) {
    const int64_t group = c->heads / c->kv_heads, most = at_least(1, TILE / group);
    // Memory is read best when one core passes over whole tokens; few rows are shared head by head instead.
    const int64_t heads = c->rows < 2 * omp_get_max_threads() ? 1 : c->kv_heads;
    int64_t count = 0;
    for (int64_t i = c->segments - 1; i >= 0; i--) {
        const Segment *s = segments + i;
        const int64_t width = s->count == 1 ? heads : 1;
        for (int64_t from = (s->count - 1) / most * most; from >= 0; from -= most)
            for (int64_t h = 0; h < c->kv_heads; h += width)
                items[count++] = (Item){s, from, at_most(most, s->count - from), h, width};
    }
    return count;
}

// A pointer to the next `size` bytes of what is left at *at.
INLINE void *take(char **at, int64_t size) {
    char *taken = *at;
    *at += (size + 63) / 64 * 64;
    return taken;
}

static int64_t lay_out(const Call *c, char *at, Scratch *s) {
    const int64_t group = c->heads / c->kv_heads, queries = at_least(1, TILE / group) * group;
    const int64_t all = at_least(queries, c->heads), pairs = c->key_dim / 2, width = panels_of(c->value_dim) * OUTPUTS;
    char *start = at;
    s->queries = take(&at, all * pairs * sizeof(uint32_t));
    s->keys = take(&at, c->kv_heads * BLOCK * pairs * sizeof(uint32_t));
    s->values = take(&at, c->kv_heads * BLOCK * width * sizeof(bf16));
    s->scores = take(&at, ROWS * BLOCK * sizeof(float));
    s->weights = take(&at, ROWS * BLOCK * sizeof(bf16));
    s->peaks = take(&at, all * sizeof(float));
    s->totals = take(&at, all * sizeof(float));
    s->sums = take(&at, all * width * sizeof(float));
    return at - start;
}

// Returns 0, or 1 when there was no memory. key_dim is even.
int attend_bfloat16(const Call *c, const bf16 *query, bf16 *keys, bf16 *values, const bf16 *new_keys,
                    const bf16 *new_values, const float *sinks, bf16 *out, const Segment *segments) {
    const Tensors x = {query, new_keys, new_values, keys, values, out, sinks};
    Item *items = malloc(c->rows * c->kv_heads * sizeof(Item));
    Scratch sizes;
    const int64_t bytes = lay_out(c, NULL, &sizes);
    int failed = !items;
    if (failed) return 1;
    const int64_t count = items_of(c, segments, items);
#pragma omp parallel reduction(| : failed)
    {
        char *memory = aligned_alloc(64, bytes);
        Scratch scratch;
        failed = !memory;
        if (memory) lay_out(c, memory, &scratch);
        for (int64_t i = 0; i < c->segments; i++) {
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < segments[i].count; t++) keep(c, segments + i, t, &x);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++)
            if (memory) attend(c, items + i, &x, &scratch);
        free(memory);
    }
    free(items);
    return failed;
}
