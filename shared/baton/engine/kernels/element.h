// The two element types of the kernels, float32 and bfloat16. bfloat16 comes as its raw bits; it is rounded to nearest
// even.

#pragma once

#include <stdint.h>

typedef uint16_t bf16;

static inline float load_bfloat16(bf16 x) {
    union { uint32_t u; float f; } v = {(uint32_t)x << 16};
    return v.f;
}

static inline bf16 store_bfloat16(float x) {
    union { float f; uint32_t u; } v = {x};
    if ((v.u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN stays NaN
    return (bf16)((v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16);
}

static inline float load_float32(float x) { return x; }
static inline float store_float32(float x) { return x; }
