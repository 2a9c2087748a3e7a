// One product of bfloat16 matrices, for processors on which torch multiplies none.
//
//     y (M, N) = alpha · a (M, K) b (K, N) + bias, or + y      b by its rows, or its columns as a linear layer's weight
//
// A thread takes its share of the columns, or where they are few, of the rows.  A panel of b is laid out for a piece of
// K at a time and read by all rows, whose sums stay in fp32.
#include <omp.h>

#include "vectors.h"

namespace {

constexpr int COLUMNS = 128, INNER = 512;  // of a panel
constexpr int FEW = 4;                     // rows: up to so many, as in generation, reading b is all that takes time

struct Product {
    int rows, inner, columns;
    const bf16* a;
    long a_row;
    const bf16* b;
    long b_row;
    int by_columns;  // b_row is between two of its columns, whose elements follow each other
    const bf16* bias;
    bf16* y;
    long y_row;
    float alpha;
    int adds;
};

// Elements [0, count) of a row of y: alpha · sums + what is added.
void write(const Product& p, int row, int column, int count, const float* sums) {
    bf16* to = p.y + row * p.y_row + column;
    for (int n = 0; n < count; n += 16) {
        const Mask which = first(count - n);
        Floats x = load(sums + n) * spread(p.alpha);
        if (p.bias) x = x + load(p.bias + column + n, which);
        if (p.adds) x = x + load(to + n, which);
        store(to + n, x, which);
    }
}

int whole(int count) { return (count + 15) / 16 * 16; }

// Columns of a piece of K in groups of 16, each (K / ELEMENTS, 16); what lies behind K or the last column is zero.
void lay_out(const Product& p, int k, int inner, int column, int columns, bf16* edge, term* to) {
    const int all = whole(inner);
    for (int g = 0; g < columns; g += 16, to += all / ELEMENTS * 16) {
        const int count = std::min(16, columns - g);
        const bf16* from = p.by_columns ? p.b + (column + g) * p.b_row + k : p.b + k * p.b_row + column + g;
        long row = p.b_row;
        if (count < 16 || inner < all) {
            row = p.by_columns ? all : 16;
            std::memset(edge, 0, sizeof(bf16) * 16 * all);
            for (int i = 0; i < (p.by_columns ? count : inner); i++)
                std::memcpy(edge + i * row, from + i * p.b_row, sizeof(bf16) * (p.by_columns ? inner : count));
            from = edge;
        }
        if (p.by_columns)
            lay_across(from, row, all, to);
        else
            lay_along(from, row, all, 16, to);
    }
}

void panel(const Product& p, int from, int until, int column, int columns, term* laid, bf16* edge, element* block,
           float* sums) {
    const int vectors = whole(columns) / 16;
    for (int k = 0; k < p.inner; k += INNER) {
        const int inner = std::min(INNER, p.inner - k), main = inner / 16 * 16, all = whole(inner);
        const int terms = all / ELEMENTS;
        lay_out(p, k, inner, column, columns, edge, laid);
        for (int row = from; row < until; row += MOST_ROWS) {
            const int rows = std::min(MOST_ROWS, until - row);
            for (int i = 0; i < rows; i++) {
                const bf16* a = p.a + (row + i) * p.a_row + k;
                copy_row(a, main, block + (long)i * all);
                if (main < all) store(block + (long)i * all + main, load(a + main, first(inner - main)));
            }
            const auto multiply_block = k ? multiply<true> : multiply<false>;
            multiply_block(rows, vectors, terms, (const term*)block, terms, 1, laid, 16, (long)terms * 16,
                           sums + (long)(row - from) * COLUMNS, COLUMNS);
        }
    }
    for (int row = from; row < until; row++) write(p, row, column, columns, sums + (long)(row - from) * COLUMNS);
}

// Of a few rows, each number by itself.
void few_rows(const Product& p, int column, int columns) {
    float sums[FEW][16];
    for (int n = 0; n < columns; n++) {
        const bf16* b = p.b + (long)(column + n) * p.b_row;
        Floats sum[FEW];
        for (int i = 0; i < p.rows; i++) sum[i] = zeros();
        const int main = p.inner / 16 * 16;
        const Mask behind = first(p.inner - main);
        for (int k = 0; k < main; k += 16) {
            const Floats x = load(b + k);
            for (int i = 0; i < p.rows; i++) sum[i] = fma(load(p.a + i * p.a_row + k), x, sum[i]);
        }
        if (main < p.inner)
            for (int i = 0; i < p.rows; i++)
                sum[i] = fma(load(p.a + i * p.a_row + main, behind), load(b + main, behind), sum[i]);
        for (int i = 0; i < p.rows; i++) sums[i][n] = sum_of_lanes(sum[i]);
    }
    for (int i = 0; i < p.rows; i++) write(p, i, column, columns, sums[i]);
}

}  // namespace

extern "C" {

void product(const Product* p_, int threads) {
    const Product& p = *p_;
    const bool few = p.rows <= FEW && p.by_columns;
    const int width = few ? 16 : COLUMNS, panels = (p.columns + width - 1) / width;
    const int parts = panels < threads ? threads : 1;  // of the rows
    const int rows = (p.rows + parts - 1) / parts;
#pragma omp parallel num_threads(threads)
    {
        Scratch<term> laid(few ? 0 : (size_t)INNER / ELEMENTS * COLUMNS);
        Scratch<bf16> edge(few ? 0 : (size_t)INNER * 16);
        Scratch<element> block(few ? 0 : (size_t)std::min(rows, MOST_ROWS) * INNER);
        Scratch<float> sums(few ? 0 : (size_t)rows * COLUMNS);
        if (all_have_memory()) {
#pragma omp for collapse(2) schedule(static)
            for (int n = 0; n < panels; n++)
                for (int part = 0; part < (few ? 1 : parts); part++) {
                    const int column = n * width, columns = std::min(width, p.columns - column);
                    const int from = part * rows, until = std::min(p.rows, from + rows);
                    if (few)
                        few_rows(p, column, columns);
                    else if (from < until)
                        panel(p, from, until, column, columns, laid.data, edge.data, block.data, sums.data);
                }
        }
    }
}
}
