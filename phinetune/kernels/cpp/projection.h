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

constexpr int COLUMNS = 64;  // of a tile

struct LowRank {  // columns of y, rows of all As
    int out, columns, a, rank;
    const float *A, *B;  // (rank, K) and (columns, rank)
    float *dA, *dB;
    float scaling;
};

struct Projection {
    int inputs, outputs, ranks, block_count;
    float keep_scale;
    const bf16* const* weights;
    const int* rows;  // of each weight
    const float* bias;
    const LowRank* blocks;
    const uint8_t* keep;  // dropout before A, (T, K), or null

    int padded() const { return (ranks + 15) / 16 * 16; }
    const bf16* row(int n) const {
        int w = 0;
        while (n >= rows[w]) n -= rows[w++];
        return weights[w] + (long)n * inputs;
    }
    const float* row_of_A(int r) const {  // null behind the last
        for (int i = 0; i < block_count; i++)
            if (r >= blocks[i].a && r < blocks[i].a + blocks[i].rank)
                return blocks[i].A + (long)(r - blocks[i].a) * inputs;
        return nullptr;
    }
};

struct Range {  // of terms
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

// Columns in groups of 16, each (terms, 16); `ranges`: the terms behind the main ones that aren't all zeros.
struct Groups {
    int terms, main;
    Lasting memory;
    term* data;
    std::vector<Range> ranges;
    Groups(int groups, int terms, int main)
        : terms(terms),
          main(main),
          memory((size_t)groups * terms * 16 * sizeof(term)),
          data((term*)memory.data()),
          ranges(groups) {}
    term* group(int n) const { return data + (long)n * terms * 16; }
};

// How the rows are cut: in whole tiles of 6, each thread as many blocks of about as many rows as another.
struct Blocks {
    int tokens, count, size;  // of the largest
    Blocks(int tokens, int threads) : tokens(tokens) {
        count = threads * std::max(1, (tokens + threads * MOST_ROWS - 1) / (threads * MOST_ROWS));
        size = (tiles() + count - 1) / count * 6;
    }
    int tiles() const { return (tokens + 5) / 6; }
    int begin(int block) const { return std::min(tokens, (int)((long)tiles() * block / count) * 6); }
    int rows(int block) const { return begin(block + 1) - begin(block); }
};

// ---- laying out: to be called by all threads of a parallel region --------------------------------------------------

struct Forward {
    Groups weights;  // K + R elements of each column of y
    Groups lora_A;   // K elements of each column of thin
    Scratch<element> rows_of_A;
    explicit Forward(const Projection& p)
        : weights(p.outputs / 16, (p.inputs + p.padded()) / ELEMENTS, p.inputs / ELEMENTS),
          lora_A(p.padded() / 16, p.inputs / ELEMENTS, p.inputs / ELEMENTS),
          rows_of_A((size_t)p.padded() * p.inputs) {}

    void lay_out(const Projection& p) {
        const int padded = p.padded();
#pragma omp for schedule(static) nowait
        for (int g = 0; g < p.outputs / 16; g++) {
            term* to = weights.group(g);
            lay_across(p.row(g * 16), p.inputs, p.inputs, to);
            to += p.inputs / ELEMENTS * 16;
            std::memset(to, 0, sizeof(element) * padded * 16);
            for (int i = 0; i < p.block_count; i++) {
                const LowRank& block = p.blocks[i];
                if (block.out >= g * 16 + 16 || block.out + block.columns <= g * 16) continue;
                const int low = block.a / ELEMENTS, high = (block.a + block.rank + ELEMENTS - 1) / ELEMENTS;
                weights.ranges[g].include(p.inputs / ELEMENTS + low, p.inputs / ELEMENTS + high);
                for (int n = 0; n < 16; n++) {
                    const float* b = block.B + (long)(g * 16 + n - block.out) * block.rank;
                    for (int r = 0; r < block.rank; r += 16) {
                        element some[16];
                        store(some, load(b + r, first(block.rank - r)) * spread(block.scaling));
                        for (int j = 0; j < std::min(16, block.rank - r); j++)
                            *element_at(to, 16, block.a + r + j, n) = some[j];
                    }
                }
            }
        }
#pragma omp for schedule(static)
        for (int g = 0; g < padded / 16; g++) {
            element* rows = rows_of_A.data + (long)g * 16 * p.inputs;
            for (int i = 0; i < 16; i++) {
                const float* a = p.row_of_A(g * 16 + i);
                for (int k = 0; k < p.inputs; k += 16) store(rows + (long)i * p.inputs + k, a ? load(a + k) : zeros());
            }
            lay_across(rows, p.inputs, p.inputs, lora_A.group(g));
        }
    }
};

struct Backward {
    Groups weights;  // N + R elements of each column of dx
    Groups lora_B;   // N elements of each column of dthin
    explicit Backward(const Projection& p)
        : weights(p.inputs / 16, (p.outputs + p.padded()) / ELEMENTS, p.outputs / ELEMENTS),
          lora_B(p.padded() / 16, p.outputs / ELEMENTS, 0) {}

    void lay_out(const Projection& p, bool need_dx) {
        const int padded = p.padded(), all = p.outputs + padded;
#pragma omp for schedule(static) nowait
        for (int n = 0; n < (need_dx ? all : 0); n += 2) {
            term* to = weights.data + n / ELEMENTS * 16;
            const long group = (long)weights.terms * 16;
            if (n < p.outputs) {
                const bf16* row = p.row(n);
                for (int k = 0; k < p.inputs; k += 16) lay_two(row + k, row + p.inputs + k, to + k / 16 * group, 16);
            } else {
                const float *one = p.row_of_A(n - p.outputs), *other = p.row_of_A(n + 1 - p.outputs);
                for (int k = 0; k < p.inputs; k += 16)
                    lay_two(one ? load(one + k) : zeros(), other ? load(other + k) : zeros(), to + k / 16 * group, 16);
            }
        }
#pragma omp for schedule(static)
        for (int g = 0; g < padded / 16; g++) {
            term* to = lora_B.group(g);
            std::memset(to, 0, sizeof(element) * p.outputs * 16);
            for (int i = 0; i < p.block_count; i++) {
                const LowRank& block = p.blocks[i];
                const int from = std::max(block.a, g * 16), until = std::min(block.a + block.rank, g * 16 + 16);
                if (from >= until) continue;
                lora_B.ranges[g].include(block.out / ELEMENTS, (block.out + block.columns + ELEMENTS - 1) / ELEMENTS);
                const Mask which = lanes(from - g * 16, until - g * 16);
                const Floats scaling = spread(block.scaling);
                for (int n = 0; n < block.columns; n += 2) {
                    const float* b = block.B + (long)n * block.rank + g * 16 - block.a;
                    lay_two(scaling * load(b, which), scaling * load(b + block.rank, which),
                            to + (long)(block.out + n) / ELEMENTS * 16, 16, which);
                }
            }
        }
    }
};

// ---- products of a block of rows -----------------------------------------------------------------------------------

// For each tile of at most COLUMNS columns: rows of `a` times them into `sums` (rows, COLUMNS), then done(column,
// vectors).
template <class Done>
void for_columns(int rows, const element* a, long a_row, const Groups& b, int from_group, int groups, float* sums,
                 Done done) {
    for (int g = 0; g < groups; g += COLUMNS / 16) {
        const int vectors = std::min(COLUMNS / 16, groups - g);
        Range range;
        for (int i = 0; i < vectors; i++) range.include(b.ranges[from_group + g + i]);
        multiply<false>(rows, vectors, Terms(b.main, range.from, range.to), (const term*)a, a_row / ELEMENTS, 1,
                        b.group(from_group + g), 16, (long)b.terms * 16, sums, COLUMNS);
        done(g * 16, vectors);
    }
}

// sums (ranks, columns) += thinᵀ x, over an even number of rows.
void add_gradient(int rows, const term* thin_terms, long ranks_padded, int ranks, const element* x, long x_row,
                  int columns, float* sums, term* working) {
    for (int c = 0; c < columns; c += COLUMNS) {
        const int width = std::min(COLUMNS, columns - c);
        lay_along(x + c, x_row, rows, width, working);
        multiply<true>(ranks, width / 16, rows / ELEMENTS, thin_terms, 1, ranks_padded, working, width, 16, sums + c,
                       columns);
    }
}

// x where dropout keeps it.
inline Floats kept(Floats x, const Projection& p, int token, int k) {
    return where(nonzero(p.keep + (long)token * p.inputs + k), x * spread(p.keep_scale));
}

// The rows that A reads: `x` itself, or its copy with dropout.
const element* dropped(const Projection& p, int token, int rows, const element* x, long x_row, element* copy,
                       long* row) {
    *row = x_row;
    if (!p.keep) return x;
    *row = p.inputs;
    for (int i = 0; i < rows; i++)
        for (int k = 0; k < p.inputs; k += 16)
            store(copy + (long)i * p.inputs + k, kept(load(x + i * x_row + k), p, token + i, k));
    return copy;
}

// thin = drop(x) Aᵀ, behind x in its rows and into `thin` (T, R).
void make_thin(const Projection& p, const Forward& laid, int token, int rows, element* x, long x_row, element* copy,
               bf16* thin, float* sums) {
    const int padded = p.padded();
    long a_row;
    const element* a = dropped(p, token, rows, x, x_row, copy, &a_row);
    for_columns(rows, a, a_row, laid.lora_A, 0, padded / 16, sums, [&](int n, int vectors) {
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++) {
                const Floats y = load(sums + i * COLUMNS + 16 * v);
                store(x + i * x_row + p.inputs + n + 16 * v, y);
                store(thin + (long)(token + i) * padded + n + 16 * v, y);
            }
    });
}

// dthin = s·dy B, behind dy in its rows.
void make_dthin(const Projection& p, const Backward& laid, int rows, element* dy, long dy_row, float* sums) {
    for_columns(rows, dy, dy_row, laid.lora_B, 0, p.padded() / 16, sums, [&](int n, int vectors) {
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++)
                store(dy + i * dy_row + p.outputs + n + 16 * v, load(sums + i * COLUMNS + 16 * v));
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
    }
    void begin() {
        std::fill_n(A.data, a_size, 0.0f);
        std::fill_n(B.data, b_size, 0.0f);
    }

    // A block's share of both gradients. `x`: what A reads. Rows behind the last one, up to an even number, must be
    // zero in x and dy and are made so in thin.
    void add(const Projection& p, int token, int rows, element* dy, long dy_row, const element* x, long x_row,
             const bf16* thin, term* thin_terms, term* working, element* thin_rows) {
        const int padded = p.padded(), even = (rows + 1) / 2 * 2;
        if (even > rows) std::memset(dy + rows * dy_row + p.outputs, 0, sizeof(element) * padded);
        lay_along(dy + p.outputs, dy_row, even, padded, thin_terms);
        add_gradient(even, thin_terms, padded, p.ranks, x, x_row, p.inputs, A.data, working);

        copy_row(thin + (long)token * padded, rows * padded, thin_rows);
        if (even > rows) std::memset(thin_rows + (long)rows * padded, 0, sizeof(element) * padded);
        lay_along(thin_rows, padded, even, padded, thin_terms);
        for (int i = 0; i < p.block_count; i++) {
            const LowRank& block = p.blocks[i];
            add_gradient(even, thin_terms + block.a, padded, block.rank, dy + block.out, dy_row, block.columns,
                         B.data + b_at[i], working);
        }
    }
};

// Sums over threads, in their order, once all are there; none of them ends before.
void finish(const Projection& p, const std::vector<FactorSums*>& sums) {
#pragma omp barrier
    for (int i = 0; i < p.block_count; i++) {
        const LowRank& block = p.blocks[i];
        const long first = (long)block.a * p.inputs;
#pragma omp for schedule(static) nowait
        for (long k = 0; k < (long)block.rank * p.inputs; k += 16) {
            Floats sum = zeros();
            for (FactorSums* one : sums)
                if (one) sum = sum + load(one->A.data + first + k);  // there may be fewer threads than asked for
            store(block.dA + k, sum);
        }
#pragma omp for schedule(static) nowait
        for (int n = 0; n < block.columns; n++)
            for (int r = 0; r < block.rank; r++) {
                float sum = 0;
                for (FactorSums* one : sums)
                    if (one) sum += one->B.data[one->b_at[i] + (long)r * block.columns + n];
                block.dB[(long)n * block.rank + r] = sum * block.scaling;
            }
    }
#pragma omp barrier
}

// dy W + dthin A of a block of rows, in fp32: for each tile of at most COLUMNS columns into rows at `to(column)`,
// `to_row` apart, then done(column, vectors).
template <class To, class Done>
void input_gradient(const Projection& p, const Backward& laid, int token, int rows, const element* dy, long dy_row,
                    To to, long to_row, Done done) {
    const int vectors = p.inputs / 16, main = p.outputs / ELEMENTS, behind = main + p.padded() / ELEMENTS;
    const auto product = [&](Terms terms, int g, int count, float* at, long row) {
        multiply<false>(rows, count, terms, (const term*)dy, dy_row / ELEMENTS, 1, laid.weights.group(g), 16,
                        (long)laid.weights.terms * 16, at, row);
    };
    alignas(64) float through_A[MOST_ROWS * COLUMNS];
    for (int g = 0; g < vectors; g += COLUMNS / 16) {
        const int count = std::min(COLUMNS / 16, vectors - g);
        product(p.keep ? main : behind, g, count, to(g * 16), to_row);
        if (p.keep && p.ranks) {
            product(Terms(0, main, behind), g, count, through_A, COLUMNS);
            for (int i = 0; i < rows; i++)
                for (int v = 0; v < count; v++) {
                    float* at = to(g * 16) + i * to_row + v * 16;
                    const Floats of_A = kept(load(through_A + i * COLUMNS + 16 * v), p, token + i, (g + v) * 16);
                    store(at, load(at) + of_A);
                }
        }
        done(g * 16, count);
    }
}

void copy_rows(const bf16* from, int rows, int width, element* to, long to_row) {
    for (int i = 0; i < rows; i++) copy_row(from + (long)i * width, width, to + i * to_row);
    std::memset(to + rows * to_row, 0, sizeof(element) * width);  // the row behind, of an odd number
}

inline Floats with_bias(const Projection& p, const float* sums, int n) {
    const Floats y = load(sums);
    return p.bias ? y + load(p.bias + n) : y;
}

}  // namespace
