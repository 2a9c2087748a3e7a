// The loss head in bfloat16: loss.py says what it computes.
//
//     logits = hidden Wᵀ, lse                       panels of words: each panel of W is laid out once and read by all
//     dhidden = times · (softmax − at target) W     tokens; logits are written once and read once, a panel in one piece
//
// C tokens of a chunk, D hidden width, V vocabulary, P = V in whole panels.  A thread takes its share of the words;
// sums over threads are made in their order.
#include <cmath>
#include <cstring>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int WORDS = 64;        // of a panel
constexpr int WORDS_BACK = 256;  // of several, for the gradient
constexpr int ROWS = 96;         // tokens at a time, so that their sums stay in the cache
constexpr float LN_2 = 0.69314718f;

// The words [from, to) of a thread, in whole panels.
void share(int vocabulary, int panel, int* from, int* to) {
    const int panels = (vocabulary + panel - 1) / panel, threads = omp_get_num_threads(), me = omp_get_thread_num();
    *from = (int)((long)panels * me / threads) * panel;
    *to = std::min(vocabulary, (int)((long)panels * (me + 1) / threads) * panel);
}

}  // namespace

extern "C" {

// hidden (C, D), weight (V, D) -> logits (P, C, WORDS), rounded; of the rounded logits lse (C,) and log p(target) (C,).
void head_forward(int tokens, int width, int vocabulary, int threads, const bf16* hidden, const bf16* weight,
                  const int64_t* targets, bf16* logits, float* lse, float* log_p) {
    std::vector<float> tops((size_t)threads * tokens, -INFINITY), totals((size_t)threads * tokens, 0);
#pragma omp parallel num_threads(threads)
    {
        Scratch<pair> panel((size_t)width / 2 * WORDS);
        Scratch<float> sums((size_t)ROWS * WORDS);
        Scratch<bf16> last((size_t)16 * width);
        float *top = tops.data() + (size_t)omp_get_thread_num() * tokens,
              *total = totals.data() + (size_t)omp_get_thread_num() * tokens;
        const __m512 scale = _mm512_set1_ps(LOG2_E);
        int from, to;
        share(vocabulary, WORDS, &from, &to);
        for (int v = from; v < to; v += WORDS) {
            const int words = std::min(WORDS, to - v), vectors = (words + 15) / 16;
            for (int g = 0; g < vectors; g++) {
                const bf16* rows = weight + (long)(v + g * 16) * width;
                const int count = std::min(16, words - g * 16);
                if (count < 16) {
                    std::memcpy(last.data, rows, sizeof(bf16) * count * width);
                    std::memset(last.data + count * width, 0, sizeof(bf16) * (16 - count) * width);
                    rows = last.data;
                }
                pair_across(rows, width, width, panel.data + (long)g * width / 2 * 16);
            }
            for (int i = 0; i < tokens; i++) {
                if (i % ROWS == 0)
                    multiply<false>(std::min(ROWS, tokens - i), vectors, width / 2,
                                    (const pair*)(hidden + (long)i * width), width / 2, 1, panel.data, 16,
                                    (long)width / 2 * 16, sums.data, WORDS);
                bf16* to_row = logits + ((long)v * tokens + (long)i * WORDS);
                __m512 x[WORDS / 16], most = _mm512_set1_ps(top[i]);
                for (int g = 0; g < vectors; g++) {
                    const __mmask16 which = first(words - 16 * g);
                    store(to_row + 16 * g, _mm512_load_ps(sums.data + i % ROWS * WORDS + 16 * g));
                    x[g] = _mm512_mul_ps(load(to_row + 16 * g, which), scale);
                    most = _mm512_mask_max_ps(most, which, most, x[g]);
                }
                const float now = _mm512_reduce_max_ps(most);
                __m512 sum = _mm512_setzero_ps();
                for (int g = 0; g < vectors; g++)
                    sum = _mm512_mask_add_ps(sum, first(words - 16 * g), sum,
                                             exp2(_mm512_sub_ps(x[g], _mm512_set1_ps(now))));
                total[i] = (now > top[i] ? total[i] * std::exp2(top[i] - now) : total[i]) + _mm512_reduce_add_ps(sum);
                top[i] = now;
            }
        }
    }
    for (int i = 0; i < tokens; i++) {
        float most = -INFINITY, sum = 0;
        for (int t = 0; t < threads; t++) most = std::max(most, tops[(size_t)t * tokens + i]);
        for (int t = 0; t < threads; t++)
            sum += totals[(size_t)t * tokens + i] * std::exp2(tops[(size_t)t * tokens + i] - most);
        lse[i] = (most + std::log2(sum)) * LN_2;
        const bf16 at = logits[targets[i] / WORDS * WORDS * tokens + (long)i * WORDS + targets[i] % WORDS];
        log_p[i] = _mm512_cvtss_f32(load(&at, 1)) - lse[i];
    }
}

// dhidden (C, D) of Σ −times · log p(target), p by logits and lse; at_target (C,): times · (p(target) − 1), unrounded.
void head_backward(int tokens, int width, int vocabulary, int threads, const bf16* logits, const bf16* weight,
                   const float* lse, const float* times, const int64_t* targets, const float* at_target,
                   bf16* dhidden) {
    std::vector<float*> all(threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch<pair> panel((size_t)WORDS_BACK / 2 * width);
        Scratch<bf16> dlogits((size_t)ROWS * WORDS_BACK), last((size_t)WORDS_BACK * width);
        Scratch<float> sums((size_t)tokens * width);
        all[omp_get_thread_num()] = sums.data;
        std::memset(sums.data, 0, sizeof(float) * tokens * width);
        const __m512 scale = _mm512_set1_ps(LOG2_E);
        int from, to;
        share(vocabulary, WORDS_BACK, &from, &to);
        for (int v = from; v < to; v += WORDS_BACK) {
            const int words = std::min(WORDS_BACK, to - v), even = (words + 1) / 2 * 2;
            const bf16* rows = weight + (long)v * width;
            if (even > words) {  // the vocabulary's last word stands alone
                std::memcpy(last.data, rows, sizeof(bf16) * words * width);
                std::memset(last.data + words * width, 0, sizeof(bf16) * width);
                rows = last.data;
            }
            pair_along(rows, width, even, width, panel.data);
            for (int i = 0; i < tokens; i++) {
                bf16* to_row = dlogits.data + i % ROWS * WORDS_BACK;
                const __m512 shift = _mm512_set1_ps(lse[i] * LOG2_E), by = _mm512_set1_ps(times[i]);
                for (int n = 0; n < words; n += 16) {
                    const __mmask16 which = first(words - n);
                    const bf16* row = logits + ((long)(v + n / WORDS * WORDS) * tokens + (long)i * WORDS + n % WORDS);
                    const __m512 p = exp2(_mm512_fmsub_ps(load(row, which), scale, shift));
                    store(to_row + n, _mm512_maskz_mul_ps(which, p, by));
                }
                if (targets[i] >= v && targets[i] < v + words)
                    store(to_row + targets[i] - v, _mm512_set1_ps(at_target[i]), 1);
                if (i % ROWS == ROWS - 1 || i == tokens - 1)
                    multiply<true>(i % ROWS + 1, width / 16, even / 2, (const pair*)dlogits.data, WORDS_BACK / 2, 1,
                                   panel.data, width, 16, sums.data + (long)(i - i % ROWS) * width, width);
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int i = 0; i < tokens; i++)
            for (int d = 0; d < width; d += 16) {
                __m512 sum = _mm512_setzero_ps();
                for (float* one : all)
                    if (one) sum = _mm512_add_ps(sum, _mm512_load_ps(one + (long)i * width + d));
                store(dhidden + (long)i * width + d, sum);
            }
    }
}
}
