// A decoder layer in bfloat16: everything but what its rows have to do with one another is here, that is in attend.h.
//
// It comes in two calls, so that a step's keys and values can be told of between them. What the model's own code would
// have written to memory is rounded as that would be.

#include "attend.h"
#include "product.h"

// A root mean square norm. rounds: the normed value is rounded before the weight multiplies it. offset: added to the
// weight.
typedef struct {
    const bf16 *weight;  // NULL: there is no such norm
    float eps, offset;
    int64_t rounds;
} Norm;

// A linear layer in panels.
typedef struct {
    const bf16 *panels;
    const float *bias;  // or NULL
} Weight;

typedef struct {
    int64_t hidden, heads, kv_heads, dim, inner;  // inner: half of the outputs of gate_up, which is interleaved by 16
    Norm before, between, query, key;             // query and key: of each head
    Weight qkv, out, gate_up, down;
} Block;

// One step; all contiguous.
typedef struct {
    int64_t rows;
    const bf16 *x, *cosines, *sines;  // [rows, hidden], [rows, dim] twice
    bf16 *result;                     // [rows, hidden]
    bf16 *normed;                     // [rows, hidden]
    bf16 *qkv;                        // [rows, (heads + 2 kv_heads) dim]
    bf16 *attended;                   // [rows, heads dim]
    bf16 *sum;                        // [rows, hidden]
    bf16 *gated;                      // [rows, inner]
    uint32_t *scratch;                // [rows, the most inputs of a linear layer / 2]
} Rows;

INLINE __m512 load16(const bf16 *from, __mmask16 mask) {
    return widened((__m256bh)_mm256_maskz_loadu_epi16(mask, from));
}

// The order of the sum is that of norm.c.
static void norm_row(const Norm *norm, const bf16 *x, bf16 *to, int64_t dim) {
    __m512 parts = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 16) {
        const __m512 part = load16(x + i, (__mmask16)existing(dim - i));
        parts = _mm512_fmadd_ps(part, part, parts);
    }
    const float mean = _mm512_cvtss_f32(sum_of(parts)) / (float)dim;
    const __m512 root = _mm512_sqrt_round_ps(_mm512_set1_ps(mean + norm->eps), _MM_FROUND_CUR_DIRECTION);
    const __m512 factor = divided(_mm512_set1_ps(1.0f), root);
    const __m512 offset = _mm512_set1_ps(norm->offset);
    for (int64_t i = 0; i < dim; i += 16) {
        const __mmask16 mask = (__mmask16)existing(dim - i);
        __m512 normed = _mm512_mul_ps(load16(x + i, mask), factor);
        if (norm->rounds) normed = rounded(normed);
        const __m512 weight = _mm512_add_ps(load16(norm->weight + i, mask), offset);
        _mm256_mask_storeu_epi16(to + i, mask, narrowed(_mm512_mul_ps(normed, weight)));
    }
}

// To be called by all threads of a team.
static void norm_all(const Norm *norm, const bf16 *x, bf16 *to, int64_t rows, int64_t dim) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) norm_row(norm, x + r * dim, to + r * dim, dim);
}

// Elements [i, i + 16) and their partners half a head further turn by an angle each.
INLINE void turn_pair(bf16 *head, const bf16 *cosines, const bf16 *sines, int64_t i, int64_t half) {
    const __mmask16 mask = (__mmask16)existing(half - i);
    const __m512 a = load16(head + i, mask), b = load16(head + i + half, mask);
    const __m512 ac = rounded(_mm512_mul_ps(a, load16(cosines + i, mask)));
    const __m512 bs = rounded(_mm512_mul_ps(b, load16(sines + i, mask)));
    const __m512 bc = rounded(_mm512_mul_ps(b, load16(cosines + i + half, mask)));
    const __m512 as = rounded(_mm512_mul_ps(a, load16(sines + i + half, mask)));
    _mm256_mask_storeu_epi16(head + i, mask, narrowed(_mm512_sub_ps(ac, bs)));
    _mm256_mask_storeu_epi16(head + i + half, mask, narrowed(_mm512_add_ps(bc, as)));
}

static void turn_heads(const Block *b, const Rows *s, int64_t row) {
    bf16 *head = s->qkv + row * (b->heads + 2 * b->kv_heads) * b->dim;
    for (int64_t h = 0; h < b->heads + b->kv_heads; h++, head += b->dim) {
        const Norm *norm = h < b->heads ? &b->query : &b->key;
        if (norm->weight) norm_row(norm, head, head, b->dim);
        for (int64_t i = 0; i < b->dim / 2; i += 16)
            turn_pair(head, s->cosines + row * b->dim, s->sines + row * b->dim, i, b->dim / 2);
    }
}

// Up to and with attention; new keys and values lie in the pool then. Returns 0, or 1 when there was no memory.
int block_attend(const Block *b, const Rows *s, const Call *c, bf16 *keys, bf16 *values, const float *sinks,
                 const Segment *segments) {
    const int64_t width = (b->heads + 2 * b->kv_heads) * b->dim;
    const Product qkv = {s->normed, b->qkv.panels, b->qkv.bias, NULL, s->qkv, s->rows, b->hidden / 2, width, PLAIN};
#pragma omp parallel
    {
        norm_all(&b->before, s->x, s->normed, s->rows, b->hidden);
        multiply_all(&qkv, s->scratch);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < s->rows; r++) turn_heads(b, s, r);
    }
    bf16 *new_keys = s->qkv + b->heads * b->dim;
    const Tensors x = {s->qkv, new_keys, new_keys + b->kv_heads * b->dim, keys, values, s->attended, sinks};
    return attend_all(c, &x, segments);
}

// The rest.
void block_feed(const Block *b, const Rows *s) {
    const int64_t rows = s->rows, hidden = b->hidden;
    const Product out = {s->attended, b->out.panels, b->out.bias, s->x, s->sum, rows, b->heads * b->dim / 2, hidden, ADDED};
    const Product gate_up = {s->normed, b->gate_up.panels, b->gate_up.bias, NULL, s->gated, rows, hidden / 2, 2 * b->inner,
                             GATED};
    const Product down = {s->gated, b->down.panels, b->down.bias, s->sum, s->result, rows, b->inner / 2, hidden, ADDED};
#pragma omp parallel
    {
        multiply_all(&out, s->scratch);
        norm_all(&b->between, s->sum, s->normed, rows, hidden);
        multiply_all(&gate_up, s->scratch);
        multiply_all(&down, s->scratch);
    }
}
