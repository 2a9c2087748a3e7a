// Sixteen numbers at a time, and small matrix products of them.
//
// avx512.h and avx2.h say what a processor does with sixteen: `Floats` are their values in fp32, a `Mask` is some of
// their lanes.  What products read is laid out as `term`s of `ELEMENTS` `element`s each: pairs of bfloat16 where the
// processor multiplies those, else fp32.
#pragma once
#ifdef PRODUCTS_IN_AVX512_BF16  // native.py says which
#include "avx512.h"
#else
#include "avx2.h"
#endif

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <type_traits>
#include <utility>

constexpr float LOG2_E = 1.44269504f;

// 2^x, to about two units in the last place of fp32: a polynomial on [-1/2, 1/2] and the exponent.
inline Floats exp2(Floats x) {
    const Floats whole = nearest(x), f = x - whole;
    Floats p = spread(1.5403530e-4f);  // ln(2)^k / k!
    p = fma(p, f, spread(1.3333558e-3f));
    p = fma(p, f, spread(9.6181291e-3f));
    p = fma(p, f, spread(5.5504109e-2f));
    p = fma(p, f, spread(2.4022651e-1f));
    p = fma(p, f, spread(6.9314718e-1f));
    p = fma(p, f, spread(1.0f));
    return times_power_of_2(p, whole);
}

// Terms [0, main) and [from, to) behind them: what a sum runs over.
struct Terms {
    int main, from, to;
    Terms(int main, int from = 0, int to = 0) : main(main), from(from), to(to) {}
};

// c (M × 16·NV, fp32) = a b, or += where ADD: the product is summed by itself first.  Added one by one to what is there
// already, terms of less than half its last place are lost, and of the words of a loss head those are most.
// a's terms lie at a[m * a_row + k * a_step], b's vectors of 16 columns at b[k * b_row + n * b_vector], c at c[m *
// c_row].  Loops over a tile are unrolled early, or its sums go through memory (GCC 12).
template <int M, int NV, bool ADD>
inline void multiply_tile(const term* a, long a_row, long a_step, const term* b, long b_row, long b_vector, float* c,
                          long c_row, Terms terms) {
    Floats sum[M][NV];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) sum[m][n] = zeros();
    int k = 0;
    for (int end : {terms.main, terms.to}) {
        for (; k < end; k++) {
            Operand of_b[NV];
#pragma GCC unroll 8
            for (int n = 0; n < NV; n++) of_b[n] = load_operand(b + k * b_row + n * b_vector);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const Operand of_a = spread_operand(a + m * a_row + k * a_step);
#pragma GCC unroll 8
                for (int n = 0; n < NV; n++) sum[m][n] = add_product(sum[m][n], of_a, of_b[n]);
            }
        }
        k = terms.from;
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NV; n++) {
            float* to = c + m * c_row + 16 * n;
            store(to, ADD ? load(to) + sum[m][n] : sum[m][n]);
        }
}

template <int NV, bool ADD, int M>
inline void multiply_rows(int rows, const term* a, long a_row, long a_step, const term* b, long b_row, long b_vector,
                          float* c, long c_row, Terms terms) {
    if constexpr (M > 0) {
        if (rows == M) return multiply_tile<M, NV, ADD>(a, a_row, a_step, b, b_row, b_vector, c, c_row, terms);
        multiply_rows<NV, ADD, M - 1>(rows, a, a_row, a_step, b, b_row, b_vector, c, c_row, terms);
    }
}

template <int NV, bool ADD>
inline void multiply_columns(int rows, const term* a, long a_row, long a_step, const term* b, long b_row, long b_vector,
                             float* c, long c_row, Terms terms) {
    constexpr int M = tile_rows(NV);
    for (int m = 0; m < rows; m += M)
        multiply_rows<NV, ADD, M>(std::min(M, rows - m), a + m * a_row, a_row, a_step, b, b_row, b_vector,
                                  c + m * c_row, c_row, terms);
}

// The same for any number of rows and `vectors` × 16 columns.
template <bool ADD>
inline void multiply(int rows, int vectors, Terms terms, const term* a, long a_row, long a_step, const term* b,
                     long b_row, long b_vector, float* c, long c_row) {
    for (int n = 0; n < vectors;) {
        const int left = vectors - n, nv = std::min(left == 5 || left == 6 ? 3 : left, MOST_VECTORS);
        const term* b_n = b + n * b_vector;
        float* c_n = c + 16 * n;
        if constexpr (MOST_VECTORS == 4) {
            if (nv == 4) multiply_columns<4, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, terms);
            if (nv == 3) multiply_columns<3, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, terms);
            if (nv == 2) multiply_columns<2, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, terms);
        }
        if (nv == 1) multiply_columns<1, ADD>(rows, a, a_row, a_step, b_n, b_row, b_vector, c_n, c_row, terms);
        n += nv;
    }
}

// Rows, `stride` apart, a whole number of terms of them -> their terms: (count / ELEMENTS, width).
template <class T>
inline void lay_along(const T* rows, long stride, int count, int width, term* to) {
    for (int i = 0; i < count; i += 2)
        for (int d = 0; d < width; d += 16)
            lay_two(rows + i * stride + d, rows + (i + 1) * stride + d, to + (long)i / ELEMENTS * width + d, width);
}

// A row of a tensor as products read it.
template <class From>
inline void copy_row(const From* from, long width, element* to) {
    if constexpr (std::is_same_v<element, From>)
        std::memcpy(to, from, sizeof(element) * width);
    else
        for (long d = 0; d < width; d += 16) store(to + d, load(from + d));
}

// Asks for numbers that are read soon, where a processor doesn't see it coming.
template <class T>
inline void fetch(const T* from, int count) {
    for (int i = 0; i < count; i += 64 / (int)sizeof(T)) __builtin_prefetch(from + i);
}

// Whether the system refused this call memory.
static std::atomic<bool> refused{false};

template <class T>
struct Scratch {
    explicit Scratch(size_t count) {
        const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
        data = bytes ? (T*)std::aligned_alloc(64, bytes) : nullptr;
        if (bytes && !data) refused = true;
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() { std::free(data); }
    T* data;
};

// Memory that stays with the process when it is given back, and serves the next call: large pieces that come and go
// leave holes in the heap, which rows of other lengths don't fill.  A piece has room for up to a quarter more.
class Lasting {
    struct Piece {
        void* data;
        size_t bytes;
    };
    inline static std::mutex mutex;
    inline static Piece idle[16];  // of a fixed number: giving back takes no memory
    Piece piece{};

    // The smallest idle piece of enough bytes, unless it is more than twice as large; null where there is none.
    static Piece take(size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex);
        Piece* best = nullptr;
        for (Piece& one : idle)
            if (one.data && one.bytes >= bytes && one.bytes / 2 <= bytes && (!best || one.bytes < best->bytes))
                best = &one;
        return best ? std::exchange(*best, Piece()) : Piece();
    }
    static void give_back(Piece piece) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (Piece& one : idle)
            if (!one.data) return void(one = piece);
        munmap(piece.data, piece.bytes);
    }
    static Piece map(size_t bytes) {
        void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return {data == MAP_FAILED ? nullptr : data, bytes};
    }
    static void release_idle() {
        const std::lock_guard<std::mutex> lock(mutex);
        for (Piece& one : idle) {
            if (one.data) munmap(one.data, one.bytes);
            one = Piece();
        }
    }

  public:
    explicit Lasting(size_t bytes) {
        if (!bytes) return;
        const size_t some = std::max<size_t>(4096, (size_t)1 << (61 - __builtin_clzl(bytes)));
        bytes = (bytes + some - 1) / some * some;
        piece = take(bytes);
        if (!piece.data) piece = map(bytes);
        if (!piece.data) {
            release_idle();
            piece = map(bytes);
        }
        if (!piece.data) refused = true;
    }
    Lasting(const Lasting&) = delete;
    ~Lasting() {
        if (piece.data) give_back(piece);
    }
    void* data() const { return piece.data; }
};

// Asked by all threads of a region once each has its scratch memory, and true for all of them or for none: no error can
// leave a region, so what would run out of memory isn't begun.
inline bool all_have_memory() {
#pragma omp barrier
    return !refused;
}

// Numbers of a tensor as products read them: where they are, or a copy.
template <class From>
struct AsElements {
    Scratch<element> copy;
    const element* data;
    AsElements(const From* from, size_t count) : copy(std::is_same_v<element, From> ? 0 : count) {
        if constexpr (std::is_same_v<element, From>) {
            data = from;
        } else {
            if (copy.data) copy_row(from, count, copy.data);
            data = copy.data;
        }
    }
};

// Whether memory was refused since it was last asked: then nothing was computed.
extern "C" __attribute__((used)) inline bool was_refused() { return refused.exchange(false); }
