// Sixteen numbers in a register of AVX-512, and products of bfloat16 by AVX512-BF16.
#pragma once
#include <immintrin.h>

#include "numbers.h"

// What products read: bfloat16, two of which are multiplied and added together, the first in the low half of a term.
using element = bf16;
using term = uint32_t;
constexpr int ELEMENTS = 2;  // of a term

using Floats = __m512;
using Mask = __mmask16;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats spread(float x) { return _mm512_set1_ps(x); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // of these two the second passes NaN on
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float sum_of_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
inline float max_of_lanes(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats times_power_of_2(Floats x, Floats whole) { return _mm512_scalef_ps(x, whole); }

// The lanes below `count`.
inline Mask first(int count) { return (Mask)((1u << std::clamp(count, 0, 16)) - 1); }
inline Mask lanes(int from, int to) { return (Mask)(first(to) & ~first(from)); }
inline Mask nonzero(const uint8_t* bytes) {
    return _mm_test_epi8_mask(_mm_loadu_si128((const __m128i*)bytes), _mm_set1_epi8(-1));
}
inline Floats where(Mask which, Floats x) { return _mm512_maskz_mov_ps(which, x); }
inline Floats where(Mask which, Floats x, Floats otherwise) { return _mm512_mask_mov_ps(otherwise, which, x); }

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load(const float* from, Mask which) { return _mm512_maskz_loadu_ps(which, from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }

inline Floats widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i rounded(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline Floats through_bf16(Floats x) { return widened(rounded(x)); }

inline Floats load(const bf16* from) { return widened(_mm256_loadu_si256((const __m256i*)from)); }
inline Floats load(const bf16* from, Mask which) { return widened(_mm256_maskz_loadu_epi16(which, from)); }
inline void store(bf16* to, Floats x) { _mm256_storeu_si256((__m256i*)to, rounded(x)); }
inline void store(bf16* to, Floats x, Mask which) { _mm256_mask_storeu_epi16(to, which, rounded(x)); }

// ---- laying out for products ---------------------------------------------------------------------------------------

inline __m512i paired(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// Sixteen columns of two rows, the first an even one of a matrix laid along, at `to` of its first.
inline void lay_two(const bf16* one, const bf16* other, term* to, long) {
    _mm512_storeu_si512(to, paired(_mm256_loadu_si256((const __m256i*)one), _mm256_loadu_si256((const __m256i*)other)));
}
inline void lay_two(Floats one, Floats other, term* to, long) {
    _mm512_storeu_si512(to, paired(rounded(one), rounded(other)));
}
inline void lay_two(Floats one, Floats other, term* to, long, Mask which) {
    _mm512_mask_storeu_epi32(to, which, paired(rounded(one), rounded(other)));
}

// Element (k, n) of a matrix that is laid along, `width` wide.
inline element* element_at(term* laid, long width, int k, int n) {
    return (element*)(laid + k / ELEMENTS * width + n) + k % ELEMENTS;
}

// A 16 × 16 matrix of terms, a row a register, turned over.
inline void transpose(__m512i rows[16]) {
    __m512i two[16], four[16];
    for (int i = 0; i < 16; i += 2) {
        two[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm512_unpacklo_epi64(two[i + j], two[i + j + 2]);
            four[i + 2 * j + 1] = _mm512_unpackhi_epi64(two[i + j], two[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88),
                      b = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xdd);
        rows[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        rows[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        rows[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// 16 rows, `stride` apart -> their terms side by side: (width / ELEMENTS, 16).
inline void lay_across(const bf16* rows, long stride, int width, term* to) {
    int k = 0;
    for (; k + 16 <= width / 2; k += 16) {
        __m512i block[16];
        for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(rows + i * stride + 2 * k);
        transpose(block);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (k + i) * 16, block[i]);
    }
    for (; k < width / 2; k++)
        for (int i = 0; i < 16; i++) to[k * 16 + i] = *(const term*)(rows + i * stride + 2 * k);
}

// ---- products ------------------------------------------------------------------------------------------------------

constexpr int MOST_ROWS = 96;    // of a block that stays in the cache, in whole tiles
constexpr int MOST_VECTORS = 4;  // of 16 columns, of a tile
constexpr int tile_rows(int vectors) { return vectors == 4 ? 6 : 8; }  // as many sums as registers hold

using Operand = __m512i;
inline Operand load_operand(const term* from) { return _mm512_loadu_si512(from); }
inline Operand spread_operand(const term* from) { return _mm512_set1_epi32(*from); }
inline Floats add_product(Floats to, Operand a, Operand b) { return _mm512_dpbf16_ps(to, (__m512bh)a, (__m512bh)b); }
