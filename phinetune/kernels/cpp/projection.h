// A linear layer with its LoRA update, for products of a block of rows.
//
// Weights are laid out for the products once a call, in groups of 16 columns, with the low-rank factors behind them, so
// that an update is a few more terms of the same sum:
//
//     forward   y  = [ x | thin ] [ Wᵀ ; s·Bᵀ ]       thin  = drop(x) Aᵀ
//     backward  dx = [ dy | dthin ] [ W ; A ]         dthin = s·dy B
//
// T tokens, K inputs, N outputs, R ranks rounded up to 16.
#pragma once
#include <omp.h>

#include <cstring>
#include <vector>

#include "vectors.h"

namespace {

constexpr int MOST_ROWS = 96, COLUMNS = 64;  // of a block; of a tile

struct LowRank {  // columns of y, rows of A, where B's elements begin
    int out, columns, a, rank;
    long b;
    float scaling;
};

struct Projection {
    int inputs, outputs, ranks, weight_count, block_count;
    float keep_scale;
    const bf16* const* weights;
    const int* rows;  // of each weight
    const float* bias;
    const float *lora_A, *lora_B;
    const LowRank* blocks;
    const uint8_t* keep;  // dropout before A, (T, K), or null

    int padded() const { return (ranks + 15) / 16 * 16; }
    const bf16* row(int n) const {
        int w = 0;
        while (n >= rows[w]) n -= rows[w++];
        return weights[w] + (long)n * inputs;
    }
};

struct Range {  // of pairs
    int from = 0, to = 0;
    void include(int low, int high) {
        if (from == to)
            from = low, to = high;
        else
            from = std::min(from, low), to = std::max(to, high);
    }
    void include(const Range& other) {
        if (other.from < other.to) include(other.from, other.to);
    }
};

// Columns in groups of 16, each (pairs, 16); `ranges`: the pairs behind the main ones that aren't all zeros.
struct Groups {
    int pairs, main;
    Scratch<pair> data;
    std::vector<Range> ranges;
    Groups(int groups, int pairs, int main)
        : pairs(pairs), main(main), data((size_t)groups * pairs * 16), ranges(groups) {}
    pair* group(int n) const { return data.data + (long)n * pairs * 16; }
};

// How the rows are cut: each thread as many blocks as another, in whole tiles of rows.
struct Blocks {
    int size, count;
    Blocks(int tokens, int threads) {
        count = threads * std::max(1, (tokens + threads * MOST_ROWS - 1) / (threads * MOST_ROWS));
        size = std::min(MOST_ROWS, ((tokens + count - 1) / count + 5) / 6 * 6);
        count = (tokens + size - 1) / size;
    }
};

// ---- laying out: to be called by all threads of a parallel region --------------------------------------------------

struct Forward {
    Groups weights;  // (K + R)/2 pairs of each column of y
    Groups lora_A;   // K/2 pairs of each column of thin
    explicit Forward(const Projection& p)
        : weights(p.outputs / 16, (p.inputs + p.padded()) / 2, p.inputs / 2),
          lora_A(p.padded() / 16, p.inputs / 2, p.inputs / 2) {}

    void lay_out(const Projection& p) {
        const int padded = p.padded();
#pragma omp for schedule(static) nowait
        for (int g = 0; g < p.outputs / 16; g++) {
            pair* to = weights.group(g);
            pair_across(p.row(g * 16), p.inputs, p.inputs, to);
            to += p.inputs / 2 * 16;
            std::memset(to, 0, sizeof(pair) * padded / 2 * 16);
            for (int i = 0; i < p.block_count; i++) {
                const LowRank& block = p.blocks[i];
                if (block.out >= g * 16 + 16 || block.out + block.columns <= g * 16) continue;
                const int low = block.a / 2, high = (block.a + block.rank + 1) / 2;
                weights.ranges[g].include(p.inputs / 2 + low, p.inputs / 2 + high);
                for (int n = 0; n < 16; n++) {
                    const float* b = p.lora_B + block.b + (long)(g * 16 + n - block.out) * block.rank;
                    bf16* column = (bf16*)to + 2 * n;  // pair r at column[32 r]
                    for (int r = 0; r < block.rank; r += 16) {
                        alignas(32) bf16 some[16];
                        const __mmask16 which = first(block.rank - r);
                        const __m512 x = _mm512_maskz_loadu_ps(which, b + r);
                        _mm256_store_si256((__m256i*)some, rounded(_mm512_mul_ps(x, _mm512_set1_ps(block.scaling))));
                        for (int j = 0; j < std::min(16, block.rank - r); j++) {
                            const int at = block.a + r + j;
                            column[at / 2 * 32 + at % 2] = some[j];
                        }
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (int g = 0; g < padded / 16; g++) {
            Scratch<bf16> rows((size_t)16 * p.inputs);
            for (int i = 0; i < 16; i++)
                for (int k = 0; k < p.inputs; k += 16)
                    store(rows.data + (long)i * p.inputs + k,
                          g * 16 + i < p.ranks ? _mm512_loadu_ps(p.lora_A + (long)(g * 16 + i) * p.inputs + k)
                                               : _mm512_setzero_ps());
            pair_across(rows.data, p.inputs, p.inputs, lora_A.group(g));
        }
    }
};

struct Backward {
    Groups weights;  // (N + R)/2 pairs of each column of dx
    Groups lora_B;   // N/2 pairs of each column of dthin
    explicit Backward(const Projection& p)
        : weights(p.inputs / 16, (p.outputs + p.padded()) / 2, p.outputs / 2),
          lora_B(p.padded() / 16, p.outputs / 2, 0) {}

    void lay_out(const Projection& p, bool need_dx) {
        const int padded = p.padded(), all = p.outputs + padded;
#pragma omp for schedule(static) nowait
        for (int n = 0; n < (need_dx ? all : 0); n += 2) {
            pair* to = weights.data.data + n / 2 * 16;
            const long group = (long)weights.pairs * 16;
            if (n < p.outputs) {
                const bf16* row = p.row(n);
                for (int k = 0; k < p.inputs; k += 16)
                    _mm512_storeu_si512(to + k / 16 * group,
                                        paired(_mm256_loadu_si256((const __m256i*)(row + k)),
                                               _mm256_loadu_si256((const __m256i*)(row + p.inputs + k))));
            } else {
                const int r = n - p.outputs;
                const float* a = p.lora_A + (long)r * p.inputs;
                for (int k = 0; k < p.inputs; k += 16)
                    _mm512_storeu_si512(
                        to + k / 16 * group,
                        paired(rounded(r < p.ranks ? _mm512_loadu_ps(a + k) : _mm512_setzero_ps()),
                               rounded(r + 1 < p.ranks ? _mm512_loadu_ps(a + p.inputs + k) : _mm512_setzero_ps())));
            }
        }
#pragma omp for schedule(static)
        for (int g = 0; g < padded / 16; g++) {
            pair* to = lora_B.group(g);
            std::memset(to, 0, sizeof(pair) * p.outputs / 2 * 16);
            for (int i = 0; i < p.block_count; i++) {
                const LowRank& block = p.blocks[i];
                const int from = std::max(block.a, g * 16), until = std::min(block.a + block.rank, g * 16 + 16);
                if (from >= until) continue;
                lora_B.ranges[g].include(block.out / 2, (block.out + block.columns + 1) / 2);
                const __mmask16 which = first(until - g * 16) & ~first(from - g * 16);
                const __m512 scaling = _mm512_set1_ps(block.scaling);
                for (int n = 0; n < block.columns; n += 2) {
                    const float* b = p.lora_B + block.b + (long)n * block.rank + g * 16 - block.a;
                    pair* at = to + (long)(block.out + n) / 2 * 16;
                    const __m512i both =
                        paired(rounded(_mm512_mul_ps(scaling, _mm512_maskz_loadu_ps(which, b))),
                               rounded(_mm512_mul_ps(scaling, _mm512_maskz_loadu_ps(which, b + block.rank))));
                    _mm512_mask_storeu_epi32(at, which, both);
                }
            }
        }
    }
};

// ---- products of a block of rows -----------------------------------------------------------------------------------

// For each tile of at most COLUMNS columns: rows of `a` times them into `sums` (rows, COLUMNS), then done(column,
// vectors).
template <class Done>
void for_columns(int rows, const bf16* a, long a_row, const Groups& b, int from_group, int groups, float* sums,
                 Done done) {
    for (int g = 0; g < groups; g += COLUMNS / 16) {
        const int vectors = std::min(COLUMNS / 16, groups - g);
        Range range;
        for (int i = 0; i < vectors; i++) range.include(b.ranges[from_group + g + i]);
        multiply<false>(rows, vectors, Pairs(b.main, range.from, range.to), (const pair*)a, a_row / 2, 1,
                        b.group(from_group + g), 16, (long)b.pairs * 16, sums, COLUMNS);
        done(g * 16, vectors);
    }
}

// sums (ranks, columns) += thinᵀ x, over an even number of rows.
void add_gradient(int rows, const pair* thin_pairs, long ranks_padded, int ranks, const bf16* x, long x_row,
                  int columns, float* sums, pair* working) {
    for (int c = 0; c < columns; c += COLUMNS) {
        const int width = std::min(COLUMNS, columns - c);
        pair_along(x + c, x_row, rows, width, working);
        multiply<true>(ranks, width / 16, rows / 2, thin_pairs, 1, ranks_padded, working, width, 16, sums + c, columns);
    }
}

inline __m512 through_bf16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(x)), 16));
}

// x where dropout keeps it.
inline __m512 kept(__m512 x, const Projection& p, int token, int k) {
    const __mmask16 which =
        _mm_test_epi8_mask(_mm_loadu_si128((const __m128i*)(p.keep + (long)token * p.inputs + k)), _mm_set1_epi8(-1));
    return _mm512_maskz_mul_ps(which, x, _mm512_set1_ps(p.keep_scale));
}

// The rows that A reads: `x` itself, or its copy with dropout.
const bf16* dropped(const Projection& p, int token, int rows, const bf16* x, long x_row, bf16* copy, long* row) {
    *row = x_row;
    if (!p.keep) return x;
    *row = p.inputs;
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < p.inputs; k += 16)
            store(copy + (long)i * p.inputs + k, kept(load(x + i * x_row + k), p, token + i, k));
    return copy;
}

// thin = drop(x) Aᵀ, behind x in its rows and into `thin` (T, R).
void make_thin(const Projection& p, const Forward& laid, int token, int rows, bf16* x, long x_row, bf16* copy,
               bf16* thin, float* sums) {
    const int padded = p.padded();
    long a_row;
    const bf16* a = dropped(p, token, rows, x, x_row, copy, &a_row);
    for_columns(rows, a, a_row, laid.lora_A, 0, padded / 16, sums, [&](int n, int vectors) {
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++) {
                const __m512 y = _mm512_load_ps(sums + i * COLUMNS + 16 * v);
                store(x + i * x_row + p.inputs + n + 16 * v, y);
                store(thin + (long)(token + i) * padded + n + 16 * v, y);
            }
    });
}

// Gradients of A and B of one thread, in fp32.
struct FactorSums {
    Scratch<float> A, B;
    std::vector<long> b_at;  // of each block, as (rank, columns)
    long a_size, b_size;
    static long b_elements(const Projection& p) {
        long all = 0;
        for (int i = 0; i < p.block_count; i++) all += (long)p.blocks[i].rank * p.blocks[i].columns;
        return all;
    }
    explicit FactorSums(const Projection& p)
        : A((size_t)p.ranks * p.inputs), B(b_elements(p)), a_size((long)p.ranks * p.inputs), b_size(b_elements(p)) {
        long at = 0;
        for (int i = 0; i < p.block_count; i++) {
            b_at.push_back(at);
            at += (long)p.blocks[i].rank * p.blocks[i].columns;
        }
        std::memset(A.data, 0, sizeof(float) * a_size);
        std::memset(B.data, 0, sizeof(float) * b_size);
    }

    // dthin behind dy in its rows, then this block's share of both gradients. `x`: what A reads. Rows behind the last
    // one, up to an even number, must be zero in x and dy and are made so in thin.
    void add(const Projection& p, const Backward& laid, int token, int rows, bf16* dy, long dy_row, const bf16* x,
             long x_row, const bf16* thin, float* sums, pair* thin_pairs, pair* working, bf16* thin_rows) {
        const int padded = p.padded(), even = (rows + 1) / 2 * 2;
        for_columns(rows, dy, dy_row, laid.lora_B, 0, padded / 16, sums, [&](int n, int vectors) {
            for (int i = 0; i < rows; i++)
                for (int v = 0; v < vectors; v++)
                    store(dy + i * dy_row + p.outputs + n + 16 * v, _mm512_load_ps(sums + i * COLUMNS + 16 * v));
        });
        if (even > rows) std::memset(dy + rows * dy_row + p.outputs, 0, sizeof(bf16) * padded);
        pair_along(dy + p.outputs, dy_row, even, padded, thin_pairs);
        add_gradient(even, thin_pairs, padded, p.ranks, x, x_row, p.inputs, A.data, working);

        std::memcpy(thin_rows, thin + (long)token * padded, sizeof(bf16) * rows * padded);
        if (even > rows) std::memset(thin_rows + (long)rows * padded, 0, sizeof(bf16) * padded);
        pair_along(thin_rows, padded, even, padded, thin_pairs);
        for (int i = 0; i < p.block_count; i++) {
            const LowRank& block = p.blocks[i];
            add_gradient(even, thin_pairs + block.a, padded, block.rank, dy + block.out, dy_row, block.columns,
                         B.data + b_at[i], working);
        }
    }
};

// Sums over threads, in their order.
void finish(const Projection& p, const std::vector<FactorSums*>& sums, float* dA, float* dB) {
    const long a_size = (long)p.ranks * p.inputs;
#pragma omp for schedule(static)
    for (long k = 0; k < a_size; k += 16) {
        __m512 sum = _mm512_setzero_ps();
        for (FactorSums* one : sums)
            if (one)
                sum =
                    _mm512_add_ps(sum, _mm512_loadu_ps(one->A.data + k));  // there may be fewer threads than asked for
        _mm512_storeu_ps(dA + k, sum);
    }
    for (int i = 0; i < p.block_count; i++) {
        const LowRank& block = p.blocks[i];
#pragma omp for schedule(static)
        for (int n = 0; n < block.columns; n++)
            for (int r = 0; r < block.rank; r++) {
                float sum = 0;
                for (FactorSums* one : sums)
                    if (one) sum += one->B.data[one->b_at[i] + (long)r * block.columns + n];
                dB[block.b + (long)n * block.rank + r] = sum * block.scaling;
            }
    }
}

// dy W + dthin A of a block of rows into `to` (rows, K), fp32.
void input_gradient(const Projection& p, const Backward& laid, int token, int rows, const bf16* dy, long dy_row,
                    float* to) {
    const int vectors = p.inputs / 16, behind = p.outputs / 2 + p.padded() / 2;
    const auto product = [&](Pairs pairs, int g, int count, float* at, long row) {
        multiply<false>(rows, count, pairs, (const pair*)dy, dy_row / 2, 1, laid.weights.group(g), 16,
                        (long)laid.weights.pairs * 16, at, row);
    };
    alignas(64) float through_A[MOST_ROWS * COLUMNS];
    for (int g = 0; g < vectors; g += COLUMNS / 16) {
        const int count = std::min(COLUMNS / 16, vectors - g);
        product(p.keep ? p.outputs / 2 : behind, g, count, to + g * 16, p.inputs);
        if (!p.keep || !p.ranks) continue;
        product(Pairs(0, p.outputs / 2, behind), g, count, through_A, COLUMNS);
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < count; v++) {
                float* at = to + (long)i * p.inputs + (g + v) * 16;
                const __m512 of_A = kept(_mm512_load_ps(through_A + i * COLUMNS + 16 * v), p, token + i, (g + v) * 16);
                _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), of_A));
            }
    }
}

void copy_rows(const bf16* from, int rows, int width, bf16* to, long to_row) {
    for (int i = 0; i < rows; i++) std::memcpy(to + i * to_row, from + (long)i * width, sizeof(bf16) * width);
    std::memset(to + rows * to_row, 0, sizeof(bf16) * width);  // the row behind, of an odd number
}

inline __m512 with_bias(const Projection& p, const float* sums, int n) {
    const __m512 y = _mm512_load_ps(sums);
    return p.bias ? _mm512_add_ps(y, _mm512_loadu_ps(p.bias + n)) : y;
}

}  // namespace
