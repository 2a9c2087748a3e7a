// bfloat16 in AVX-512 registers, and small matrix products in them.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>

using bf16 = uint16_t;
using pair = uint32_t;  // two bfloat16 that are multiplied and added together, the first in the low half

inline __m512 load(const bf16* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
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

constexpr float LOG2_E = 1.44269504f;

// 2^x, to about two units in the last place of fp32: a polynomial on [-1/2, 1/2] and the exponent.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);  // ln(2)^k / k!
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

// Pairs [0, main) and [from, to) behind them: what a sum runs over.
struct Pairs {
    int main, from, to;
    Pairs(int main, int from = 0, int to = 0) : main(main), from(from), to(to) {}
};

// c (M × 16·NV, fp32) = a b, or += where ADD.
// a's pairs lie at a[m * a_row + k * a_step], b's vectors of 16 columns at b[k * b_row + n * b_vector], c at c[m *
// c_row].
template <int M, int NV, bool ADD>
inline void multiply_tile(const pair* a, long a_row, long a_step, const pair* b, long b_row, long b_vector, float* c,
                          long c_row, Pairs pairs) {
    __m512 sum[M][NV];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < NV; n++) sum[m][n] = ADD ? _mm512_loadu_ps(c + m * c_row + 16 * n) : _mm512_setzero_ps();
    int k = 0;
    for (int end : {pairs.main, pairs.to}) {
        for (; k < end; k++) {
            __m512bh of_b[NV];
            for (int n = 0; n < NV; n++) of_b[n] = (__m512bh)_mm512_loadu_si512(b + k * b_row + n * b_vector);
            for (int m = 0; m < M; m++) {
                const __m512bh of_a = (__m512bh)_mm512_set1_epi32(a[m * a_row + k * a_step]);
                for (int n = 0; n < NV; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], of_a, of_b[n]);
            }
        }
        k = pairs.from;
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < NV; n++) _mm512_storeu_ps(c + m * c_row + 16 * n, sum[m][n]);
}

template <int NV, bool ADD, int M>
inline void multiply_rows(int rows, const pair* a, long a_row, long a_step, const pair* b, long b_row, long b_vector,
                          float* c, long c_row, Pairs pairs) {
    if constexpr (M > 0) {
        if (rows == M) return multiply_tile<M, NV, ADD>(a, a_row, a_step, b, b_row, b_vector, c, c_row, pairs);
        multiply_rows<NV, ADD, M - 1>(rows, a, a_row, a_step, b, b_row, b_vector, c, c_row, pairs);
    }
}

template <int NV, bool ADD>
inline void multiply_columns(int rows, const pair* a, long a_row, long a_step, const pair* b, long b_row, long b_vector,
                             float* c, long c_row, Pairs pairs) {
    constexpr int M = NV == 4 ? 6 : 8;  // as many sums as registers hold
    for (int m = 0; m < rows; m += M)
        multiply_rows<NV, ADD, M>(std::min(M, rows - m), a + m * a_row, a_row, a_step, b, b_row, b_vector,
                                  c + m * c_row, c_row, pairs);
}

// The same for any number of rows and `vectors` × 16 columns.
template <bool ADD>
inline void multiply(int rows, int vectors, Pairs pairs, const pair* a, long a_row, long a_step, const pair* b,
                     long b_row, long b_vector, float* c, long c_row) {
    for (int n = 0; n < vectors;) {
        const int left = vectors - n, nv = left == 5 || left == 6 ? 3 : std::min(left, 4);
        const pair* b_n = b + n * b_vector;
        float* c_n = c + 16 * n;
        if (nv == 4) multiply_columns<4, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        if (nv == 3) multiply_columns<3, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        if (nv == 2) multiply_columns<2, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        if (nv == 1) multiply_columns<1, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, pairs);
        n += nv;
    }
}

// A 16 × 16 matrix of pairs, a row a register, turned over.
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

// 16 rows of bfloat16, `stride` apart -> pairs along the row, rows side by side: (width/2, 16).
inline void pair_across(const bf16* rows, long stride, int width, pair* to) {
    int k = 0;
    for (; k + 16 <= width / 2; k += 16) {
        __m512i block[16];
        for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(rows + i * stride + 2 * k);
        transpose(block);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (k + i) * 16, block[i]);
    }
    for (; k < width / 2; k++)
        for (int i = 0; i < 16; i++) to[k * 16 + i] = *(const pair*)(rows + i * stride + 2 * k);
}

// Rows of bfloat16, `stride` apart, an even number of them -> pairs of rows: (count/2, width).
inline void pair_along(const bf16* rows, long stride, int count, int width, pair* to) {
    for (int i = 0; i < count; i += 2)
        for (int d = 0; d < width; d += 16)
            _mm512_storeu_si512(to + (long)i / 2 * width + d,
                                paired(_mm256_loadu_si256((const __m256i*)(rows + i * stride + d)),
                                       _mm256_loadu_si256((const __m256i*)(rows + (i + 1) * stride + d))));
}

// What a kernel has begun, in several threads, it must end. So where the system refuses it memory it works in this,
// which costs nothing until then, and tells behind the call by `was_refused`.
class Reserve {
  public:
    void* take(size_t bytes) {
        const size_t from = taken.fetch_add(bytes);
        if (!all || from + bytes > SIZE) std::abort();
        return all + from;
    }
    bool has(void* data) const { return data >= all && data < all + SIZE; }
    bool forget() { return taken.exchange(0) > 0; }

  private:
    static constexpr size_t SIZE = 192 << 20;
    char* all = (char*)std::aligned_alloc(64, SIZE);
    std::atomic<size_t> taken{0};
};

static Reserve reserve;

template <class T>
struct Scratch {
    explicit Scratch(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        void* got = std::aligned_alloc(64, bytes);
        data = (T*)(got || !bytes ? got : reserve.take(bytes));
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        if (!reserve.has(data)) std::free(data);
    }
    T* data;
};

// Whether memory was refused since it was last asked.
extern "C" __attribute__((used)) inline bool was_refused() { return reserve.forget(); }
