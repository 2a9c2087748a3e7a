// Sixteen numbers in two registers of AVX2, and products in fp32, for processors that don't multiply bfloat16.
#pragma once
#include <immintrin.h>

#include "numbers.h"

// What products read: fp32, so what they read needn't be rounded.
using element = float;
using term = float;
constexpr int ELEMENTS = 1;  // of a term

struct Floats {
    __m256 low, high;
};
struct Mask {
    __m256i low, high;
};

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats fma(Floats a, Floats b, Floats c) {  // a b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fms(Floats a, Floats b, Floats c) {  // a b - c
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {  // c - a b
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats min(Floats a, Floats b) {  // of these two the second passes NaN on
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline float sum_of_lanes(Floats x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float max_of_lanes(Floats x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline Floats nearest(Floats x) {
    constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, how), _mm256_round_ps(x.high, how)};
}
// x · 2^whole, zero below the smallest normal number; x lies between 1/2 and 2.
inline __m256 times_power_of_2(__m256 x, __m256 whole) {
    const __m256i power = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_set1_ps(128), whole));
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(power, _mm256_set1_epi32(127)), 23);
    const __m256 small = _mm256_cmp_ps(whole, _mm256_set1_ps(-126), _CMP_LT_OQ);
    return _mm256_andnot_ps(small, _mm256_mul_ps(x, _mm256_castsi256_ps(exponent)));
}
inline Floats times_power_of_2(Floats x, Floats whole) {
    return {times_power_of_2(x.low, whole.low), times_power_of_2(x.high, whole.high)};
}

inline Mask lanes(int from, int to) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    const __m256i before = _mm256_set1_epi32(from - 1), end = _mm256_set1_epi32(to);
    return {_mm256_and_si256(_mm256_cmpgt_epi32(low, before), _mm256_cmpgt_epi32(end, low)),
            _mm256_and_si256(_mm256_cmpgt_epi32(high, before), _mm256_cmpgt_epi32(end, high))};
}
// The lanes below `count`.
inline Mask first(int count) { return lanes(0, count); }
inline Mask nonzero(const uint8_t* bytes) {
    const __m256i none = _mm256_setzero_si256();
    return {_mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes)), none),
            _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8))), none)};
}
inline unsigned bits(Mask which) {
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(which.low)) |
           (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(which.high)) << 8;
}
inline Floats where(Mask which, Floats x) {
    return {_mm256_and_ps(_mm256_castsi256_ps(which.low), x.low),
            _mm256_and_ps(_mm256_castsi256_ps(which.high), x.high)};
}
inline Floats where(Mask which, Floats x, Floats otherwise) {
    return {_mm256_blendv_ps(otherwise.low, x.low, _mm256_castsi256_ps(which.low)),
            _mm256_blendv_ps(otherwise.high, x.high, _mm256_castsi256_ps(which.high))};
}

inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Floats load(const float* from, Mask which) {
    return {_mm256_maskload_ps(from, which.low), _mm256_maskload_ps(from + 8, which.high)};
}
inline void store(float* to, Floats x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline void store(float* to, Floats x, Mask which) {
    if (bits(which) == 0xffff) return store(to, x);  // a masked store takes twenty times as long on some
    _mm256_maskstore_ps(to, which.low, x.low);
    _mm256_maskstore_ps(to + 8, which.high, x.high);
}

inline __m256 widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
// The nearest bfloat16, the even one of two, in the upper half.
inline __m256 rounded(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 kept =
        _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_and_ps(kept, _mm256_castsi256_ps(_mm256_set1_epi32(0xffff0000)));
}
inline Floats through_bf16(Floats x) { return {rounded(x.low), rounded(x.high)}; }

inline Floats load(const bf16* from) {
    return {widened(_mm_loadu_si128((const __m128i*)from)), widened(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
inline void store(bf16* to, Floats x) {
    const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(rounded(x.low)), 16);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(rounded(x.high)), 16);
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
}
inline Floats load(const bf16* from, Mask which) {
    const unsigned some = bits(which);
    if (some == 0xffff) return load(from);
    bf16 all[16] = {};
    for (int i = 0; i < 16; i++)
        if (some >> i & 1) all[i] = from[i];
    return load(all);
}
inline void store(bf16* to, Floats x, Mask which) {
    const unsigned some = bits(which);
    if (some == 0xffff) return store(to, x);
    bf16 all[16];
    store(all, x);
    for (int i = 0; i < 16; i++)
        if (some >> i & 1) to[i] = all[i];
}

// ---- laying out for products ---------------------------------------------------------------------------------------

// Sixteen columns of two rows, the first an even one of a matrix laid along, at `to` of its first; the matrix is
// `width` wide.
inline void lay_two(Floats one, Floats other, term* to, long width) {
    store(to, one);
    store(to + width, other);
}
inline void lay_two(Floats one, Floats other, term* to, long width, Mask which) {
    store(to, one, which);
    store(to + width, other, which);
}
template <class T>
inline void lay_two(const T* one, const T* other, term* to, long width) {
    lay_two(load(one), load(other), to, width);
}

// Element (k, n) of a matrix that is laid along, `width` wide.
inline element* element_at(term* laid, long width, int k, int n) { return laid + k * width + n; }

// 16 rows, `stride` apart -> their terms side by side: (width, 16).
template <class T>
inline void lay_across(const T* rows, long stride, int width, term* to) {
    for (int k = 0; k < width; k += 16) {
        alignas(32) float block[16][16];
        for (int i = 0; i < 16; i++) store(block[i], load(rows + i * stride + k));
        for (int quarter = 0; quarter < 4; quarter++) {
            const float* from = block[quarter / 2 * 8] + quarter % 2 * 8;
            __m256 two[8], four[8];
            for (int i = 0; i < 8; i += 2) {
                const __m256 a = _mm256_load_ps(from + i * 16), b = _mm256_load_ps(from + i * 16 + 16);
                two[i] = _mm256_unpacklo_ps(a, b);
                two[i + 1] = _mm256_unpackhi_ps(a, b);
            }
            for (int i = 0; i < 8; i += 4)
                for (int j = 0; j < 2; j++) {
                    four[i + 2 * j] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0x44);
                    four[i + 2 * j + 1] = _mm256_shuffle_ps(two[i + j], two[i + j + 2], 0xee);
                }
            float* at = to + (long)(k + quarter % 2 * 8) * 16 + quarter / 2 * 8;
            for (int j = 0; j < 4; j++) {
                _mm256_storeu_ps(at + j * 16, _mm256_permute2f128_ps(four[j], four[4 + j], 0x20));
                _mm256_storeu_ps(at + (j + 4) * 16, _mm256_permute2f128_ps(four[j], four[4 + j], 0x31));
            }
        }
    }
}

// ---- products ------------------------------------------------------------------------------------------------------

constexpr int MOST_ROWS = 144;              // of a block that stays in the cache, in whole tiles
constexpr int MOST_VECTORS = 1;             // of 16 columns, of a tile
constexpr int tile_rows(int) { return 6; }  // as many sums as registers hold

using Operand = Floats;
inline Operand load_operand(const term* from) { return load(from); }
inline Operand spread_operand(const term* from) {
    const __m256 x = _mm256_broadcast_ss(from);
    return {x, x};
}
inline Floats add_product(Floats to, Operand a, Operand b) { return fma(a, b, to); }
