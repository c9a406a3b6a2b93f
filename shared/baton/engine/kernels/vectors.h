// Functions of 16 floats, and a transposition of 16 vectors.

#pragma once

#include "panels.h"

// The compiler may not move arithmetic past here: with -ffast-math it would otherwise add in an order of its own.
#define KEEP(X) __asm__("" : "+v"(X))

// e^x for x <= 0. Relative error: a unit in the last place or two near 0, growing with |x| to 1e-5. NaN stays NaN.
INLINE __m512 exp_of(__m512 x) {
    KEEP(x);
    x = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // in [0, 1)
    __m512 p = _mm512_set1_ps(1.8671301e-3f);  // 2^f, to 1e-7
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.0170302e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5799913e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4016445e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9315131e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);  // times 2^(the integer below x)
}

// a / b. Not an operator: with -ffast-math the compiler has several ways to divide, and takes the one that suits the place.
INLINE __m512 divided(__m512 a, __m512 b) { return _mm512_div_round_ps(a, b, _MM_FROUND_CUR_DIRECTION); }

INLINE __m512 tanh_of(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), t = exp_of(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f)));
    const __m512 size = divided(_mm512_sub_ps(one, t), _mm512_add_ps(one, t));
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(  // its size with x's sign
        _mm512_castps_si512(size), _mm512_castps_si512(x), _mm512_set1_epi32(INT32_MIN), 0xd8));
}

// x / (1 + e^-x)
INLINE __m512 silu_of(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), t = exp_of(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    const __m512 top = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), one, t);
    return divided(_mm512_mul_ps(x, top), _mm512_add_ps(one, t));
}

INLINE __m512 widened(__m256bh x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16)); }
INLINE __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// 16 rows of 16 pairs become 16 pairs of 16 rows.
INLINE void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4; i++) {
            t[8 * half + i] = _mm512_shuffle_i32x4(r[8 * half + i], r[8 * half + i + 4], 0x88);
            t[8 * half + i + 4] = _mm512_shuffle_i32x4(r[8 * half + i], r[8 * half + i + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}
