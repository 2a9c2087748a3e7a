// The linear layers of a decoder layer with their LoRA updates and what stands beside them, a block of rows at a time.
//
//     norm_linears     x -> RMSNorm -> layers side by side
//     linear_add       residual + layer(x)
//     norm_gated_mlp   x + down(silu(gate) · up), gate and up of RMSNorm(x)
//     rms_norm         behind the last layer, by itself
//
// layers/decoder.py has the same in plain products, which are the reference.  Here a thread takes a block of rows
// through all of it while they are in its cache: norms, activations, residuals and low-rank updates cost no pass over
// memory.
//
// T tokens, K inputs, N outputs, R ranks rounded up to 16 (projection.h).  Sums are in fp32 and rounded once; gradients
// of A and B are summed in fp32 over the blocks of a thread, then over threads, in an order that depends on their
// number alone.
#include <cmath>
#include <cstring>
#include <vector>

#include "projection.h"

namespace {

inline Floats sigmoid(Floats x) {  // in min, the second operand is the one that passes NaN on
    const Floats e = exp2(min(spread(126), x * spread(-LOG2_E)));
    return spread(1) / (spread(1) + e);
}

// Normed rows into `to`, their 1/√(mean square) into `rstd`; with rstd known where `again`.
template <class To>
void norm(const bf16* x, const bf16* weight, float eps, int width, int rows, float* rstd, bool again, To* to,
          long to_row) {
    for (int i = 0; i < rows; i++) {
        const bf16* row = x + (long)i * width;
        if (!again) {
            Floats sum = zeros();
            for (int d = 0; d < width; d += 16) sum = fma(load(row + d), load(row + d), sum);
            rstd[i] = 1 / std::sqrt(sum_of_lanes(sum) / width + eps);
        }
        for (int d = 0; d < width; d += 16) {
            const Floats normed = through_bf16(load(row + d) * spread(rstd[i]));
            store(to + i * to_row + d, load(weight + d) * normed);
        }
    }
}

// dx of a norm (+ the residual's gradient): rstd · (w·dy − x̂ · mean(w·dy · x̂)).
template <class From>
void norm_backward(const From* dy, const bf16* x, const bf16* weight, const float* rstd, const bf16* residual,
                   int width, int rows, bf16* dx) {
    for (int i = 0; i < rows; i++) {
        const long at = (long)i * width;
        const Floats scale = spread(rstd[i]);
        Floats sum = zeros();
        for (int d = 0; d < width; d += 16) {
            const Floats scaled = load(dy + at + d) * load(weight + d);
            sum = fma(scaled, load(x + at + d) * scale, sum);
        }
        const Floats along = spread(sum_of_lanes(sum) / width);
        for (int d = 0; d < width; d += 16) {
            const Floats scaled = load(dy + at + d) * load(weight + d);
            const Floats normed = load(x + at + d) * scale;
            Floats y = scale * fnma(normed, along, scaled);
            if (residual) y = y + load(residual + at + d);
            store(dx + at + d, y);
        }
    }
}

}  // namespace

extern "C" {

// x (T, D) -> y (T, D), rstd (T,).
void rms_norm_forward(int tokens, int threads, int width, const bf16* x, const bf16* weight, float eps, bf16* y,
                      float* rstd) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < tokens; i++)
        norm(x + (long)i * width, weight, eps, width, 1, rstd + i, false, y + (long)i * width, width);
}

void rms_norm_backward(int tokens, int threads, int width, const bf16* dy, const bf16* x, const bf16* weight,
                       const float* rstd, bf16* dx) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < tokens; i++) {
        const long at = (long)i * width;
        norm_backward(dy + at, x + at, weight, rstd + i, nullptr, width, 1, dx + at);
    }
}

// x (T, K); norm_weight (K,) or null where there is no norm; residual (T, N) or null. y (T, N), thin (T, R), rstd (T,).
void linears_forward(const Projection* p_, int tokens, int threads, const bf16* x, const bf16* norm_weight, float eps,
                     const bf16* residual, bf16* y, bf16* thin, float* rstd) {
    const Projection& p = *p_;
    const Blocks blocks(tokens, threads);
    Forward laid(p);
#pragma omp parallel num_threads(threads)
    {
        const long row = p.inputs + p.padded();
        Scratch<element> in((blocks.size + 1) * row), copy((size_t)(p.keep ? blocks.size : 0) * p.inputs);
        Scratch<float> sums((size_t)blocks.size * COLUMNS);
        if (all_have_memory()) {
            laid.lay_out(p);
#pragma omp for schedule(static)
            for (int block = 0; block < blocks.count; block++) {
                const int token = blocks.begin(block), rows = blocks.rows(block);
                const bf16* from = x + (long)token * p.inputs;
                if (norm_weight)
                    norm(from, norm_weight, eps, p.inputs, rows, rstd + token, false, in.data, row);
                else
                    copy_rows(from, rows, p.inputs, in.data, row);
                if (p.ranks) make_thin(p, laid, token, rows, in.data, row, copy.data, thin, sums.data);
                for_columns(rows, in.data, row, laid.weights, 0, p.outputs / 16, sums.data, [&](int n, int vectors) {
                    for (int i = 0; i < rows; i++)
                        for (int v = 0; v < vectors; v++) {
                            const long at = (long)(token + i) * p.outputs + n + 16 * v;
                            Floats sum = with_bias(p, sums.data + i * COLUMNS + 16 * v, n + 16 * v);
                            if (residual) sum = sum + load(residual + at);
                            store(y + at, sum);
                        }
                });
            }
        }
    }
}

// Gradients of x (null where not needed) and of the As and Bs. rstd null where there is no norm; dresidual (T, K), of
// what else reads what is normed, or null.
void linears_backward(const Projection* p_, int tokens, int threads, const bf16* dy, const bf16* x,
                      const bf16* norm_weight, float* rstd, const bf16* thin, const bf16* dresidual, bf16* dx) {
    const Projection& p = *p_;
    const Blocks blocks(tokens, threads);
    Backward laid(p);
    std::vector<FactorSums*> all(threads);
#pragma omp parallel num_threads(threads)
    {
        const int padded = p.padded();
        const long row = p.outputs + padded;
        Scratch<element> out((blocks.size + 1) * row), in((size_t)(blocks.size + 1) * p.inputs),
            thin_rows((size_t)(blocks.size + 1) * padded);
        Scratch<element> copy((size_t)(p.keep ? blocks.size + 1 : 0) * p.inputs);
        Scratch<float> sums((size_t)blocks.size * COLUMNS), dx_sums((size_t)blocks.size * p.inputs);
        Scratch<term> thin_terms((size_t)(blocks.size + 1) / ELEMENTS * padded),
            working((size_t)(blocks.size + 1) / ELEMENTS * COLUMNS);
        FactorSums own(p);
        all[omp_get_thread_num()] = &own;
        if (all_have_memory()) {
            own.begin();
            laid.lay_out(p, dx);
#pragma omp for schedule(static)
            for (int block = 0; block < blocks.count; block++) {
                const int token = blocks.begin(block), rows = blocks.rows(block);
                const bf16* from = x + (long)token * p.inputs;
                copy_rows(dy + (long)token * p.outputs, rows, p.outputs, out.data, row);
                if (p.ranks) {
                    copy_rows(from, rows, p.inputs, in.data, p.inputs);
                    if (norm_weight) norm(from, norm_weight, 0, p.inputs, rows, rstd + token, true, in.data, p.inputs);
                    long x_row;
                    const element* read = dropped(p, token, rows, in.data, p.inputs, copy.data, &x_row);
                    if (p.keep) std::memset(copy.data + (long)rows * p.inputs, 0, sizeof(element) * p.inputs);
                    make_dthin(p, laid, rows, out.data, row, sums.data);
                    own.add(p, token, rows, out.data, row, read, x_row, thin, thin_terms.data, working.data,
                            thin_rows.data);
                }
                if (!dx) continue;
                input_gradient(
                    p, laid, token, rows, out.data, row, [&](int k) { return dx_sums.data + k; }, p.inputs,
                    [](int, int) {});
                bf16* to = dx + (long)token * p.inputs;
                const bf16* others = dresidual ? dresidual + (long)token * p.inputs : nullptr;
                if (norm_weight)
                    norm_backward(dx_sums.data, from, norm_weight, rstd + token, others, p.inputs, rows, to);
                else
                    for (long k = 0; k < (long)rows * p.inputs; k += 16) store(to + k, load(dx_sums.data + k));
            }
            finish(p, all);
        }
    }
}

// x (T, D) -> y (T, D); gate_up (T, 2F), both thins and rstd are kept for the gradients.
void mlp_forward(const Projection* gate_up_, const Projection* down_, int tokens, int threads, const bf16* x,
                 const bf16* norm_weight, float eps, bf16* y, bf16* gate_up_kept, bf16* thin, bf16* thin_down,
                 float* rstd) {
    const Projection &p = *gate_up_, &q = *down_;
    const Blocks blocks(tokens, threads);
    Forward laid(p), laid_down(q);
#pragma omp parallel num_threads(threads)
    {
        const int width = q.inputs;
        const long row = p.inputs + p.padded(), act_row = width + q.padded();
        Scratch<element> in((blocks.size + 1) * row), act((blocks.size + 1) * act_row);
        Scratch<element> copy((size_t)blocks.size * std::max(p.keep ? p.inputs : 0, q.keep ? width : 0));
        Scratch<float> gates((size_t)blocks.size * COLUMNS), ups((size_t)blocks.size * COLUMNS);
        if (all_have_memory()) {
            laid.lay_out(p);
            laid_down.lay_out(q);
#pragma omp for schedule(static)
            for (int block = 0; block < blocks.count; block++) {
                const int token = blocks.begin(block), rows = blocks.rows(block);
                const bf16* from = x + (long)token * p.inputs;
                norm(from, norm_weight, eps, p.inputs, rows, rstd + token, false, in.data, row);
                if (p.ranks) make_thin(p, laid, token, rows, in.data, row, copy.data, thin, gates.data);
                for (int g = 0; g < width / 16; g += COLUMNS / 16) {
                    const int count = std::min(COLUMNS / 16, width / 16 - g);
                    for_columns(rows, in.data, row, laid.weights, g, count, gates.data, [](int, int) {});
                    for_columns(rows, in.data, row, laid.weights, width / 16 + g, count, ups.data, [](int, int) {});
                    for (int i = 0; i < rows; i++)
                        for (int v = 0; v < count; v++) {
                            const int n = (g + v) * 16, at = i * COLUMNS + 16 * v;
                            bf16* to = gate_up_kept + (long)(token + i) * 2 * width + n;
                            store(to, with_bias(p, gates.data + at, n));
                            store(to + width, with_bias(p, ups.data + at, width + n));
                            const Floats gate = load(to), up = load(to + width);
                            const Floats silu = gate * sigmoid(gate);
                            store(act.data + i * act_row + n, through_bf16(silu) * up);
                        }
                }
                if (q.ranks) make_thin(q, laid_down, token, rows, act.data, act_row, copy.data, thin_down, gates.data);
                for_columns(rows, act.data, act_row, laid_down.weights, 0, q.outputs / 16, gates.data,
                            [&](int n, int vectors) {
                                for (int i = 0; i < rows; i++)
                                    for (int v = 0; v < vectors; v++) {
                                        const long at = (long)(token + i) * q.outputs + n + 16 * v;
                                        const Floats sum = with_bias(q, gates.data + i * COLUMNS + 16 * v, n + 16 * v);
                                        store(y + at, sum + load(x + at));
                                    }
                            });
            }
        }
    }
}

void mlp_backward(const Projection* gate_up_, const Projection* down_, int tokens, int threads, const bf16* dy,
                  const bf16* x, const bf16* norm_weight, float* rstd, const bf16* gate_up_kept, const bf16* thin,
                  const bf16* thin_down, bf16* dx) {
    const Projection &p = *gate_up_, &q = *down_;
    const Blocks blocks(tokens, threads);
    Backward laid(p), laid_down(q);
    std::vector<FactorSums*> all(threads), all_down(threads);
#pragma omp parallel num_threads(threads)
    {
        const int width = q.inputs, most = blocks.size + 1, padded = std::max(p.padded(), q.padded());
        const long row = p.outputs + p.padded(), down_row = q.outputs + q.padded();
        Scratch<element> out(most * down_row), both(most * row), act((size_t)most * width), in((size_t)most * p.inputs);
        Scratch<element> thin_rows((size_t)most * padded),
            copy((size_t)most * std::max(p.keep ? p.inputs : 0, q.keep ? width : 0));
        Scratch<float> sums((size_t)blocks.size * COLUMNS), dx_sums((size_t)blocks.size * p.inputs);
        Scratch<term> thin_terms((size_t)most / ELEMENTS * padded + padded),
            working((size_t)(most + 1) / ELEMENTS * COLUMNS);
        FactorSums own(p), own_down(q);
        all[omp_get_thread_num()] = &own;
        all_down[omp_get_thread_num()] = &own_down;
        if (all_have_memory()) {
            own.begin();
            own_down.begin();
            laid_down.lay_out(q, true);
            laid.lay_out(p, dx);
#pragma omp for schedule(static)
            for (int block = 0; block < blocks.count; block++) {
                const int token = blocks.begin(block), rows = blocks.rows(block);
                const bf16 *from = x + (long)token * p.inputs, *from_dy = dy + (long)token * q.outputs;
                copy_rows(from_dy, rows, q.outputs, out.data, down_row);
                if (q.ranks) make_dthin(q, laid_down, rows, out.data, down_row, sums.data);
                const auto through_activation = [&](int k, int vectors) {  // and what `down` read
                    for (int i = 0; i < rows; i++)
                        for (int v = 0; v < vectors; v++) {
                            const int n = k + 16 * v;
                            const bf16* at = gate_up_kept + (long)(token + i) * 2 * width + n;
                            const Floats gate = load(at), up = load(at + width),
                                         d = load(sums.data + i * COLUMNS + 16 * v);
                            const Floats share = sigmoid(gate), silu = gate * share;
                            const Floats slope = fma(silu, spread(1) - share, share);
                            element* to = both.data + i * row + n;
                            store(act.data + (long)i * width + n, through_bf16(silu) * up);
                            store(to, d * up * slope);
                            store(to + width, d * silu);
                        }
                };
                input_gradient(
                    q, laid_down, token, rows, out.data, down_row, [&](int) { return sums.data; }, COLUMNS,
                    through_activation);
                std::memset(act.data + (long)rows * width, 0, sizeof(element) * width);
                if (q.ranks) {
                    long x_row;
                    const element* read = dropped(q, token, rows, act.data, width, copy.data, &x_row);
                    if (q.keep) std::memset(copy.data + (long)rows * width, 0, sizeof(element) * width);
                    own_down.add(q, token, rows, out.data, down_row, read, x_row, thin_down, thin_terms.data,
                                 working.data, thin_rows.data);
                }
                std::memset(both.data + rows * row, 0, sizeof(element) * p.outputs);
                if (p.ranks) {
                    norm(from, norm_weight, 0, p.inputs, rows, rstd + token, true, in.data, p.inputs);
                    std::memset(in.data + (long)rows * p.inputs, 0, sizeof(element) * p.inputs);
                    long x_row;
                    const element* read = dropped(p, token, rows, in.data, p.inputs, copy.data, &x_row);
                    if (p.keep) std::memset(copy.data + (long)rows * p.inputs, 0, sizeof(element) * p.inputs);
                    make_dthin(p, laid, rows, both.data, row, sums.data);
                    own.add(p, token, rows, both.data, row, read, x_row, thin, thin_terms.data, working.data,
                            thin_rows.data);
                }
                if (!dx) continue;
                input_gradient(
                    p, laid, token, rows, both.data, row, [&](int k) { return dx_sums.data + k; }, p.inputs,
                    [](int, int) {});
                norm_backward(dx_sums.data, from, norm_weight, rstd + token, from_dy, p.inputs, rows,
                              dx + (long)token * p.inputs);
            }
            finish(p, all);
            finish(q, all_down);
        }
    }
}
}
