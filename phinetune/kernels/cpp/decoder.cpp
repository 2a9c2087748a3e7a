// The linear layers of a decoder layer with their LoRA updates and what stands beside them, a block of rows at a time.
//
//     norm_linears     x -> RMSNorm -> layers side by side
//     linear_add       residual + layer(x)
//     norm_gated_mlp   x + down(silu(gate) · up), gate and up of RMSNorm(x)
//
// lora/decoder.py has the same in plain products, which are the reference.  Here a thread takes a block of rows through
// all of it while they are in its cache: norms, activations, residuals and low-rank updates cost no pass over memory.
//
// T tokens, K inputs, N outputs, R ranks rounded up to 16 (projection.h).  Sums are in fp32 and rounded once; gradients
// of A and B are summed in fp32 over the blocks of a thread, then over threads, in an order that depends on their
// number alone.
#include <cmath>
#include <cstring>
#include <vector>

#include "projection.h"

namespace {

inline __m512 sigmoid(__m512 x) {  // in min, the second operand is the one that passes NaN on
    const __m512 e = exp2(_mm512_min_ps(_mm512_set1_ps(126), _mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E))));
    return _mm512_div_ps(_mm512_set1_ps(1), _mm512_add_ps(_mm512_set1_ps(1), e));
}

// Normed rows into `to`, their 1/√(mean square) into `rstd`; with rstd known where `again`.
void norm(const bf16* x, const bf16* weight, float eps, int width, int rows, float* rstd, bool again, bf16* to,
          long to_row) {
    for (int i = 0; i < rows; i++) {
        const bf16* row = x + (long)i * width;
        if (!again) {
            __m512 sum = _mm512_setzero_ps();
            for (int d = 0; d < width; d += 16) sum = _mm512_fmadd_ps(load(row + d), load(row + d), sum);
            rstd[i] = 1 / std::sqrt(_mm512_reduce_add_ps(sum) / width + eps);
        }
        for (int d = 0; d < width; d += 16) {
            const __m512 normed = through_bf16(_mm512_mul_ps(load(row + d), _mm512_set1_ps(rstd[i])));
            store(to + i * to_row + d, _mm512_mul_ps(load(weight + d), normed));
        }
    }
}

// dx of a norm (+ the residual's gradient): rstd · (w·dy − x̂ · mean(w·dy · x̂)).
void norm_backward(const float* dy, const bf16* x, const bf16* weight, const float* rstd, const bf16* residual,
                   int width, int rows, bf16* dx) {
    for (int i = 0; i < rows; i++) {
        const long at = (long)i * width;
        const __m512 scale = _mm512_set1_ps(rstd[i]);
        __m512 sum = _mm512_setzero_ps();
        for (int d = 0; d < width; d += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(dy + at + d), load(weight + d));
            sum = _mm512_fmadd_ps(scaled, _mm512_mul_ps(load(x + at + d), scale), sum);
        }
        const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (int d = 0; d < width; d += 16) {
            const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(dy + at + d), load(weight + d));
            const __m512 normed = _mm512_mul_ps(load(x + at + d), scale);
            __m512 y = _mm512_mul_ps(scale, _mm512_fnmadd_ps(normed, along, scaled));
            if (residual) y = _mm512_add_ps(y, load(residual + at + d));
            store(dx + at + d, y);
        }
    }
}

}  // namespace

extern "C" {

// x (T, K); norm_weight (K,) or null where there is no norm; residual (T, N) or null. y (T, N), thin (T, R), rstd (T,).
void linears_forward(const Projection* p_, int tokens, int threads, const bf16* x, const bf16* norm_weight, float eps,
                     const bf16* residual, bf16* y, bf16* thin, float* rstd) {
    const Projection& p = *p_;
    const Blocks blocks(tokens, threads);
    Forward laid(p);
#pragma omp parallel num_threads(threads)
    {
        const long row = p.inputs + p.padded();
        Scratch<bf16> in((blocks.size + 1) * row), copy((size_t)(p.keep ? blocks.size : 0) * p.inputs);
        Scratch<float> sums((size_t)blocks.size * COLUMNS);
        laid.lay_out(p);
#pragma omp for schedule(static)
        for (int block = 0; block < blocks.count; block++) {
            const int token = block * blocks.size, rows = std::min(blocks.size, tokens - token);
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
                        __m512 sum = with_bias(p, sums.data + i * COLUMNS + 16 * v, n + 16 * v);
                        if (residual) sum = _mm512_add_ps(sum, load(residual + at));
                        store(y + at, sum);
                    }
            });
        }
    }
}

// Gradients of x (null where not needed), A and B. rstd null where there is no norm.
void linears_backward(const Projection* p_, int tokens, int threads, const bf16* dy, const bf16* x,
                      const bf16* norm_weight, float* rstd, const bf16* thin, bf16* dx, float* dA, float* dB) {
    const Projection& p = *p_;
    const Blocks blocks(tokens, threads);
    Backward laid(p);
    std::vector<FactorSums*> all(threads);
#pragma omp parallel num_threads(threads)
    {
        const int padded = p.padded();
        const long row = p.outputs + padded;
        Scratch<bf16> out((blocks.size + 1) * row), in((size_t)(blocks.size + 1) * p.inputs),
            thin_rows((size_t)(blocks.size + 1) * padded);
        Scratch<bf16> copy((size_t)(p.keep ? blocks.size + 1 : 0) * p.inputs);
        Scratch<float> sums((size_t)blocks.size * COLUMNS), dx_sums((size_t)blocks.size * p.inputs);
        Scratch<pair> thin_pairs((size_t)(blocks.size + 1) / 2 * padded),
            working((size_t)(blocks.size + 1) / 2 * COLUMNS);
        FactorSums own(p);
        all[omp_get_thread_num()] = &own;
        laid.lay_out(p, dx);
#pragma omp for schedule(static)
        for (int block = 0; block < blocks.count; block++) {
            const int token = block * blocks.size, rows = std::min(blocks.size, tokens - token);
            const bf16* from = x + (long)token * p.inputs;
            copy_rows(dy + (long)token * p.outputs, rows, p.outputs, out.data, row);
            if (p.ranks) {
                copy_rows(from, rows, p.inputs, in.data, p.inputs);
                if (norm_weight) norm(from, norm_weight, 0, p.inputs, rows, rstd + token, true, in.data, p.inputs);
                long x_row;
                const bf16* read = dropped(p, token, rows, in.data, p.inputs, copy.data, &x_row);
                if (p.keep) std::memset(copy.data + (long)rows * p.inputs, 0, sizeof(bf16) * p.inputs);
                own.add(p, laid, token, rows, out.data, row, read, x_row, thin, sums.data, thin_pairs.data,
                        working.data, thin_rows.data);
            }
            if (!dx) continue;
            input_gradient(p, laid, token, rows, out.data, row, dx_sums.data);
            bf16* to = dx + (long)token * p.inputs;
            if (norm_weight)
                norm_backward(dx_sums.data, from, norm_weight, rstd + token, nullptr, p.inputs, rows, to);
            else
                for (long k = 0; k < (long)rows * p.inputs; k += 16) store(to + k, _mm512_load_ps(dx_sums.data + k));
        }
        finish(p, all, dA, dB);
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
        Scratch<bf16> in((blocks.size + 1) * row), act((blocks.size + 1) * act_row);
        Scratch<bf16> copy((size_t)blocks.size * std::max(p.keep ? p.inputs : 0, q.keep ? width : 0));
        Scratch<float> gates((size_t)blocks.size * COLUMNS), ups((size_t)blocks.size * COLUMNS);
        laid.lay_out(p);
        laid_down.lay_out(q);
#pragma omp for schedule(static)
        for (int block = 0; block < blocks.count; block++) {
            const int token = block * blocks.size, rows = std::min(blocks.size, tokens - token);
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
                        const __m512 gate = load(to), up = load(to + width);
                        const __m512 silu = _mm512_mul_ps(gate, sigmoid(gate));
                        store(act.data + i * act_row + n, _mm512_mul_ps(through_bf16(silu), up));
                    }
            }
            if (q.ranks) make_thin(q, laid_down, token, rows, act.data, act_row, copy.data, thin_down, gates.data);
            for_columns(rows, act.data, act_row, laid_down.weights, 0, q.outputs / 16, gates.data,
                        [&](int n, int vectors) {
                            for (int i = 0; i < rows; i++)
                                for (int v = 0; v < vectors; v++) {
                                    const long at = (long)(token + i) * q.outputs + n + 16 * v;
                                    const __m512 sum = with_bias(q, gates.data + i * COLUMNS + 16 * v, n + 16 * v);
                                    store(y + at, _mm512_add_ps(sum, load(x + at)));
                                }
                        });
        }
    }
}

void mlp_backward(const Projection* gate_up_, const Projection* down_, int tokens, int threads, const bf16* dy,
                  const bf16* x, const bf16* norm_weight, float* rstd, const bf16* gate_up_kept, const bf16* thin,
                  const bf16* thin_down, bf16* dx, float* dA, float* dB, float* dA_down, float* dB_down) {
    const Projection &p = *gate_up_, &q = *down_;
    const Blocks blocks(tokens, threads);
    Backward laid(p), laid_down(q);
    std::vector<FactorSums*> all(threads), all_down(threads);
#pragma omp parallel num_threads(threads)
    {
        const int width = q.inputs, most = blocks.size + 1, padded = std::max(p.padded(), q.padded());
        const long row = p.outputs + p.padded(), down_row = q.outputs + q.padded();
        Scratch<bf16> out(most * down_row), both(most * row), act((size_t)most * width), in((size_t)most * p.inputs);
        Scratch<bf16> thin_rows((size_t)most * padded),
            copy((size_t)most * std::max(p.keep ? p.inputs : 0, q.keep ? width : 0));
        Scratch<float> sums((size_t)blocks.size * COLUMNS), dact((size_t)blocks.size * width),
            dx_sums((size_t)blocks.size * p.inputs);
        Scratch<pair> thin_pairs((size_t)most / 2 * padded + padded), working((size_t)(most + 1) / 2 * COLUMNS);
        FactorSums own(p), own_down(q);
        all[omp_get_thread_num()] = &own;
        all_down[omp_get_thread_num()] = &own_down;
        laid_down.lay_out(q, true);
        laid.lay_out(p, dx);
#pragma omp for schedule(static)
        for (int block = 0; block < blocks.count; block++) {
            const int token = block * blocks.size, rows = std::min(blocks.size, tokens - token);
            const bf16 *from = x + (long)token * p.inputs, *from_dy = dy + (long)token * q.outputs;
            copy_rows(from_dy, rows, q.outputs, out.data, down_row);
            for (int i = 0; i < rows; i++)  // what `down` read
                for (int n = 0; n < width; n += 16) {
                    const bf16* at = gate_up_kept + (long)(token + i) * 2 * width + n;
                    const __m512 gate = load(at);
                    const __m512 silu = _mm512_mul_ps(gate, sigmoid(gate));
                    store(act.data + (long)i * width + n, _mm512_mul_ps(through_bf16(silu), load(at + width)));
                }
            std::memset(act.data + (long)rows * width, 0, sizeof(bf16) * width);
            if (q.ranks) {
                long x_row;
                const bf16* read = dropped(q, token, rows, act.data, width, copy.data, &x_row);
                if (q.keep) std::memset(copy.data + (long)rows * width, 0, sizeof(bf16) * width);
                own_down.add(q, laid_down, token, rows, out.data, down_row, read, x_row, thin_down, sums.data,
                             thin_pairs.data, working.data, thin_rows.data);
            }
            input_gradient(q, laid_down, token, rows, out.data, down_row, dact.data);
            for (int i = 0; i < rows; i++)
                for (int n = 0; n < width; n += 16) {
                    const bf16* at = gate_up_kept + (long)(token + i) * 2 * width + n;
                    const __m512 gate = load(at), up = load(at + width),
                                 d = _mm512_load_ps(dact.data + (long)i * width + n);
                    const __m512 share = sigmoid(gate), silu = _mm512_mul_ps(gate, share);
                    const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), share), share);
                    bf16* to = both.data + i * row + n;
                    store(to, _mm512_mul_ps(_mm512_mul_ps(d, up), slope));
                    store(to + width, _mm512_mul_ps(d, silu));
                }
            std::memset(both.data + rows * row, 0, sizeof(bf16) * p.outputs);
            if (p.ranks) {
                norm(from, norm_weight, 0, p.inputs, rows, rstd + token, true, in.data, p.inputs);
                std::memset(in.data + (long)rows * p.inputs, 0, sizeof(bf16) * p.inputs);
                long x_row;
                const bf16* read = dropped(p, token, rows, in.data, p.inputs, copy.data, &x_row);
                if (p.keep) std::memset(copy.data + (long)rows * p.inputs, 0, sizeof(bf16) * p.inputs);
                own.add(p, laid, token, rows, both.data, row, read, x_row, thin, sums.data, thin_pairs.data,
                        working.data, thin_rows.data);
            }
            if (!dx) continue;
            input_gradient(p, laid, token, rows, both.data, row, dx_sums.data);
            norm_backward(dx_sums.data, from, norm_weight, rstd + token, from_dy, p.inputs, rows,
                          dx + (long)token * p.inputs);
        }
        finish(p, all, dA, dB);
        finish(q, all_down, dA_down, dB_down);
    }
}
}
