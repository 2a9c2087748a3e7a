// bfloat16: the upper half of an fp32.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

inline float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Rounded to the nearest, to the even one of two.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return (bf16)(bits >> 16 | 0x40);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void put(bf16* to, float x) { *to = to_bf16(x); }
inline void put(float* to, float x) { *to = x; }
