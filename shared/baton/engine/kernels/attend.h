// All attention of a step over one layer's pool.

#pragma once

#include "few.h"
#include "many.h"

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
    const int64_t group = c->heads / c->kv_heads, queries = panels_of(at_least(1, TILE / group) * group) * OUTPUTS;
    const int64_t all = at_least(queries, c->heads), pairs = c->key_dim / 2, width = panels_of(c->value_dim) * OUTPUTS;
    char *start = at;
    s->queries = take(&at, all * pairs * sizeof(uint32_t));
    s->keys = take(&at, c->kv_heads * BLOCK * pairs * sizeof(uint32_t));
    s->values = take(&at, c->kv_heads * BLOCK * width * sizeof(bf16));
    s->scores = take(&at, OUTPUTS * BLOCK * sizeof(float));
    s->weights = take(&at, OUTPUTS * BLOCK * sizeof(bf16));
    s->peaks = take(&at, all * sizeof(float));
    s->totals = take(&at, all * sizeof(float));
    s->sums = take(&at, all * width * sizeof(float));
    s->sight = take(&at, 2 * queries * sizeof(int32_t));
    return at - start;
}

// Returns 0, or 1 when there was no memory. key_dim is even.
static int attend_all(const Call *c, const Tensors *x, const Segment *segments) {
    Item *items = malloc(c->rows * c->kv_heads * sizeof(Item));
    Scratch sizes;
    const int64_t bytes = lay_out(c, NULL, &sizes), group = c->heads / c->kv_heads;
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
            for (int64_t t = 0; t < segments[i].count; t++) keep(c, segments + i, t, x);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; i++)
            if (memory) (items[i].heads > 1 || items[i].count * group < MANY ? attend_few : attend_many)(c, items + i, x, &scratch);
        free(memory);
    }
    free(items);
    return failed;
}
