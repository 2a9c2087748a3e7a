// bfloat16 in AVX-512 registers, and small matrix products in them.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

using bf16 = uint16_t;
using pair = uint32_t;  // two bfloat16 that are multiplied and added together, the first in the low half

inline __m512 load(const bf16* from) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

inline __m512 load(const bf16* from, __mmask16 which) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16));
}

inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, rounded(x)); }

inline void store(bf16* to, __m512 x, __mmask16 which) { _mm256_mask_storeu_epi16(to, which, rounded(x)); }

inline __m512i paired(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// The elements [0, count) of 16.
inline __mmask16 first(int count) { return (__mmask16)((1u << std::clamp(count, 0, 16)) - 1); }

// 2^x, to about two units in the last place of fp32: a polynomial on [-1/2, 1/2] and the exponent.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);  // ln(2)^k / k!, and the last ones fitted
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

// c (M × 16·NV, fp32) = a b, or += where ADD.
// a's pairs lie at a[m * a_row + k * a_step], b's vectors of 16 columns at b[k * b_row + n * b_vector], c at c[m * c_row].
template <int M, int NV, bool ADD>
inline void multiply_tile(const pair* a, long a_row, long a_step, const pair* b, long b_row, long b_vector, float* c, long c_row,
                          int pairs) {
    __m512 sum[M][NV];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < NV; n++) sum[m][n] = ADD ? _mm512_loadu_ps(c + m * c_row + 16 * n) : _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        __m512bh of_b[NV];
        for (int n = 0; n < NV; n++) of_b[n] = (__m512bh)_mm512_loadu_si512(b + k * b_row + n * b_vector);
        for (int m = 0; m < M; m++) {
            const __m512bh of_a = (__m512bh)_mm512_set1_epi32(a[m * a_row + k * a_step]);
            for (int n = 0; n < NV; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], of_a, of_b[n]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < NV; n++) _mm512_storeu_ps(c + m * c_row + 16 * n, sum[m][n]);
}

template <int NV, bool ADD, int M>
inline void multiply_rows(int rows, const pair* a, long a_row, long a_step, const pair* b, long b_row, long b_vector, float* c,
                          long c_row, int pairs) {
    if constexpr (M > 0) {
        if (rows == M) return multiply_tile<M, NV, ADD>(a, a_row, a_step, b, b_row, b_vector, c, c_row, pairs);
        multiply_rows<NV, ADD, M - 1>(rows, a, a_row, a_step, b, b_row, b_vector, c, c_row, pairs);
    }
}

template <int NV, bool ADD>
inline void multiply_columns(int rows, const pair* a, long a_row, long a_step, const pair* b, long b_row, long b_vector, float* c,
                             long c_row, int pairs) {
    constexpr int M = NV == 4 ? 6 : 8;  // as many sums as registers hold
    for (int m = 0; m < rows; m += M)
        multiply_rows<NV, ADD, M>(std::min(M, rows - m), a + m * a_row, a_row, a_step, b, b_row, b_vector, c + m * c_row, c_row,
                                  pairs);
}

// The same for any number of rows and `vectors` × 16 columns.
template <bool ADD>
inline void multiply(int rows, int vectors, int pairs, const pair* a, long a_row, long a_step, const pair* b,
                     long b_row, long b_vector, float* c, long c_row) {
    for (int n = 0; n < vectors;) {
        const int left = vectors - n;
        const int nv = left == 6 || left == 3 ? 3 : left == 5 ? 3 : std::min(left, 4);
        const pair* b_n = b + n * b_vector;
        float* c_n = c + 16 * n;
        if (nv == 4) multiply_columns<4, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        if (nv == 3) multiply_columns<3, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        if (nv == 2) multiply_columns<2, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        if (nv == 1) multiply_columns<1, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        n += nv;
    }
}
