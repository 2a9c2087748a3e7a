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

// The panel behind this one: it comes from memory while this one is multiplied, a share of it with each token.
struct NextPanel {
    const bf16* at;
    long left;
    int share;
    NextPanel(const bf16* weight, int word, int until, int words, int width, int tokens)
        : at(weight + (long)word * width),
          left((long)std::clamp(until - word, 0, words) * width),
          share((words * width / tokens + 31) / 32 * 32) {}
    void fetch_share() {
        const int some = (int)std::min<long>(share, left);
        fetch(at, some);
        at += some;
        left -= some;
    }
};

}  // namespace

extern "C" {

// hidden (C, D), weight (V, D) -> logits (P, C, WORDS), rounded; of the rounded logits lse (C,) and log p(target) (C,).
void head_forward(int tokens, int width, int vocabulary, int threads, const bf16* hidden, const bf16* weight,
                  const int64_t* targets, bf16* logits, float* lse, float* log_p) {
    const AsElements<bf16> read(hidden, (size_t)tokens * width);
    const int terms = width / ELEMENTS;
    Scratch<float> tops((size_t)threads * tokens), totals((size_t)threads * tokens);
    if (refused) return;
    std::fill_n(tops.data, (size_t)threads * tokens, -INFINITY);
    std::fill_n(totals.data, (size_t)threads * tokens, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        Scratch<term> panel((size_t)terms * WORDS);
        Scratch<float> sums((size_t)ROWS * WORDS);
        Scratch<bf16> last((size_t)16 * width);
        float *top = tops.data + (size_t)omp_get_thread_num() * tokens,
              *total = totals.data + (size_t)omp_get_thread_num() * tokens;
        if (all_have_memory()) {
            const Floats scale = spread(LOG2_E);
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
                    lay_across(rows, width, width, panel.data + (long)g * terms * 16);
                }
                NextPanel next(weight, v + WORDS, to, WORDS, width, tokens);
                for (int i = 0; i < tokens; i++) {
                    next.fetch_share();
                    if (i % ROWS == 0)
                        multiply<false>(std::min(ROWS, tokens - i), vectors, terms,
                                        (const term*)(read.data + (long)i * width), terms, 1, panel.data, 16,
                                        (long)terms * 16, sums.data, WORDS);
                    bf16* to_row = logits + ((long)v * tokens + (long)i * WORDS);
                    Floats x[WORDS / 16], most = spread(top[i]);
                    for (int g = 0; g < vectors; g++) {
                        const Mask which = first(words - 16 * g);
                        store(to_row + 16 * g, load(sums.data + i % ROWS * WORDS + 16 * g));
                        x[g] = load(to_row + 16 * g) * scale;
                        most = where(which, max(most, x[g]), most);
                    }
                    const float now = max_of_lanes(most);
                    Floats sum = zeros();
                    for (int g = 0; g < vectors; g++)
                        sum = where(first(words - 16 * g), sum + exp2(x[g] - spread(now)), sum);
                    total[i] = (now > top[i] ? total[i] * std::exp2(top[i] - now) : total[i]) + sum_of_lanes(sum);
                    top[i] = now;
                }
            }
        }
    }
    if (refused) return;
    for (int i = 0; i < tokens; i++) {
        float most = -INFINITY, sum = 0;
        for (int t = 0; t < threads; t++) most = std::max(most, tops.data[(size_t)t * tokens + i]);
        for (int t = 0; t < threads; t++)
            sum += totals.data[(size_t)t * tokens + i] * std::exp2(tops.data[(size_t)t * tokens + i] - most);
        lse[i] = (most + std::log2(sum)) * LN_2;
        const bf16 at = logits[targets[i] / WORDS * WORDS * tokens + (long)i * WORDS + targets[i] % WORDS];
        log_p[i] = to_float(at) - lse[i];
    }
}

// dhidden (C, D) of Σ −times · log p(target), p by logits and lse; at_target (C,): times · (p(target) − 1), unrounded.
void head_backward(int tokens, int width, int vocabulary, int threads, const bf16* logits, const bf16* weight,
                   const float* lse, const float* times, const int64_t* targets, const float* at_target,
                   bf16* dhidden) {
    std::vector<float*> all(threads);
#pragma omp parallel num_threads(threads)
    {
        Scratch<term> panel((size_t)WORDS_BACK / ELEMENTS * width);
        Scratch<element> dlogits((size_t)ROWS * WORDS_BACK);
        Scratch<bf16> last((size_t)WORDS_BACK * width);
        Scratch<float> sums((size_t)tokens * width);
        all[omp_get_thread_num()] = sums.data;
        if (all_have_memory()) {
            std::fill_n(sums.data, (size_t)tokens * width, 0.0f);
            const Floats scale = spread(LOG2_E);
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
                lay_along(rows, width, even, width, panel.data);
                NextPanel next(weight, v + WORDS_BACK, to, WORDS_BACK, width, tokens);
                for (int i = 0; i < tokens; i++) {
                    next.fetch_share();
                    element* to_row = dlogits.data + i % ROWS * WORDS_BACK;
                    const Floats shift = spread(lse[i] * LOG2_E), by = spread(times[i]);
                    for (int n = 0; n < words; n += 16) {
                        const Mask which = first(words - n);
                        const bf16* row =
                            logits + ((long)(v + n / WORDS * WORDS) * tokens + (long)i * WORDS + n % WORDS);
                        const Floats p = exp2(fms(load(row), scale, shift));
                        store(to_row + n, where(which, p * by));
                    }
                    if (targets[i] >= v && targets[i] < v + words) put(to_row + targets[i] - v, at_target[i]);
                    if (i % ROWS == ROWS - 1 || i == tokens - 1)
                        multiply<true>(i % ROWS + 1, width / 16, even / ELEMENTS, (const term*)dlogits.data,
                                       WORDS_BACK / ELEMENTS, 1, panel.data, width, 16,
                                       sums.data + (long)(i - i % ROWS) * width, width);
                }
            }
#pragma omp barrier
#pragma omp for schedule(static)
            for (int i = 0; i < tokens; i++)
                for (int d = 0; d < width; d += 16) {
                    Floats sum = zeros();
                    for (float* one : all)
                        if (one) sum = sum + load(one + (long)i * width + d);
                    store(dhidden + (long)i * width + d, sum);
                }
        }
    }
}
}
