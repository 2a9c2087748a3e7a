// Attention over a flat pack of bfloat16 queries, keys and values, forward and backward, with rotary embedding.
//
// Dao et al., "FlashAttention" (2022): blocks of queries against blocks of keys, scores and their softmax in fp32 in
// the cache, weights made again from their log-sum-exp in the backward pass.  What a token sees is a path of segments
// (attention.py draws it).  Keys and values are laid out for the products once a call; each segment begins there at a
// multiple of 16 keys, and keys behind a segment's end are hidden.
//
// Every sum is made in an order that depends on the layout alone, not on the threads.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

constexpr int QUERIES = 64, KEYS = 256;  // of a block
constexpr float NOTHING = -INFINITY;

struct Segment {
    int start, end;  // of the line
    int packed;      // where its keys begin among the packed ones
    int position;    // of its first token
    int tree;        // segments of one tree share beginnings
    int first_piece, pieces;
};

struct Piece {  // of a path: a segment, or as much of it as is seen
    int packed, length, position;
};

struct Line {
    const bf16* qkv;         // (T, H + 2K, D)
    const float *cos, *sin;  // (T, turned), or null
    int tokens, heads, kv_heads, width;
    int turned;  // half of what is rotated of a head
    int threads;
    float scaling;
    int window;
    const Segment* segments;
    const Piece* pieces;
    int segment_count;
    int packed;  // keys in all, padded
    int trees;

    const bf16* head(int token, int head) const { return qkv + ((long)token * (heads + 2 * kv_heads) + head) * width; }
};

// A head of a token, turned by its position's angle, or back by it: read(d, which) gives 16 of its elements,
// write(d, which, x) takes them.
template <bool BACK, class Read, class Write>
void rotate(const Line& line, int token, Read read, Write write) {
    const int half = line.turned;
    for (int d = 0; d < half; d += 16) {
        const __mmask16 which = first(half - d);
        const __m512 cos = _mm512_maskz_loadu_ps(which, line.cos + (long)token * half + d);
        const __m512 sin = _mm512_maskz_loadu_ps(which, line.sin + (long)token * half + d);
        const __m512 a = read(d, which), b = read(half + d, which);
        const __m512 a_sin = _mm512_mul_ps(a, sin), b_sin = _mm512_mul_ps(b, sin);
        write(d, which, BACK ? _mm512_fmadd_ps(a, cos, b_sin) : _mm512_fmsub_ps(a, cos, b_sin));
        write(half + d, which, BACK ? _mm512_fmsub_ps(b, cos, a_sin) : _mm512_fmadd_ps(b, cos, a_sin));
    }
    for (int d = 2 * half; d < line.width; d += 16) {
        const __mmask16 which = first(line.width - d);
        write(d, which, read(d, which));
    }
}

void read_rotated(const Line& line, int token, int head, bf16* to) {
    const bf16* from = line.head(token, head);
    rotate<false>(
        line, token, [&](int d, __mmask16 which) { return load(from + d, which); },
        [&](int d, __mmask16 which, __m512 x) { store(to + d, x, which); });
}

void write_unrotated(const Line& line, const float* x, int token, bf16* to) {
    rotate<true>(
        line, token, [&](int d, __mmask16 which) { return _mm512_maskz_loadu_ps(which, x + d); },
        [&](int d, __mmask16 which, __m512 y) { store(to + d, y, which); });
}

// Keys and values of a key-value head as the products want them; `across`: pairs along D, (D/2, packed keys);
// `along`: pairs of keys, (packed keys / 2, D). Null where not wanted.
struct Packed {
    pair *k_across, *k_along, *v_across, *v_along;
};

void pack_segment(const Line& line, const Segment& segment, int kv_head, const Packed& to) {
    const int width = line.width;
    alignas(64) bf16 rows[16 * 256];
    for (int value = 0; value < 2; value++) {
        pair* across = value ? to.v_across : to.k_across;
        pair* along = value ? to.v_along : to.k_along;
        const int head = line.heads + kv_head + (value ? line.kv_heads : 0);
        for (int start = segment.start; start < segment.end; start += 16) {
            const int count = std::min(16, segment.end - start), packed = segment.packed + start - segment.start;
            for (int i = 0; i < count; i++) {
                if (value)
                    std::memcpy(rows + i * width, line.head(start + i, head), sizeof(bf16) * width);
                else
                    read_rotated(line, start + i, head, rows + i * width);
            }
            std::memset(rows + count * width, 0, sizeof(bf16) * (16 - count) * width);
            if (across) pair_across(rows, width, width, across + (long)packed / 2 * width);
            if (along) pair_along(rows, width, 16, width, along + (long)packed / 2 * width);
        }
    }
}

// A block of keys as a block of queries sees it.
struct Sight {
    int packed, count;   // keys, rounded up to 16
    int last, position;  // the first key that is no key of the piece; the first key's position
    bool own;            // the queries' own segment: no key behind the query
};

// Query `row` (at `position`, the `index`th of its segment) sees the keys [from, to) of a block.
inline void seen(const Sight& sight, int key_index, int index, int position, int window, int* from, int* to) {
    *to = sight.own ? std::min(sight.last, index - key_index + 1) : sight.last;
    *from = std::max(0, position - window + 1 - sight.position);
}

// Calls visit(sight, key_index) for each block of keys that queries [begin, end) of a segment may see.
template <class Visit>
void for_key_blocks(const Line& line, const Segment& segment, int begin, int end, Visit visit) {
    for (int p = 0; p < segment.pieces; p++) {
        const Piece& piece = line.pieces[segment.first_piece + p];
        const bool own = p == segment.pieces - 1;
        const int length = own ? end : piece.length;
        for (int k = 0; k < length; k += KEYS) {
            const int last = std::min(KEYS, length - k);
            const int position = piece.position + k;
            if (position + last - 1 <= segment.position + begin - line.window) continue;  // behind the window
            visit(Sight{piece.packed + k, (last + 15) / 16 * 16, last, position, own}, k);
        }
    }
}

// The keys [from, to) of a vector that begins at key j; all of them, known beforehand.
template <bool ALL>
inline __mmask16 visible(int j, int from, int to) {
    return ALL ? (__mmask16)-1 : (__mmask16)(first(to - j) & ~first(from - j));
}

// A query's weights of a block of keys, 2^(score · scale − top), rounded; its top and total go on from block to block.
template <bool ALL>
void softmax_row(float* scores, int keys, int from, int to, __m512 scale, float* top, float* total, bf16* weights) {
    if (from >= to) {
        std::memset(weights, 0, sizeof(bf16) * keys);
        return;
    }
    __m512 most = _mm512_set1_ps(*top);
    for (int j = 0; j < keys; j += 16)
        most =
            _mm512_mask_max_ps(most, visible<ALL>(j, from, to), most, _mm512_mul_ps(_mm512_load_ps(scores + j), scale));
    const float now = _mm512_reduce_max_ps(most);
    const __m512 shift = _mm512_set1_ps(now);
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < keys; j += 16) {
        const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(scores + j), scale, shift);
        const __m512 e = _mm512_maskz_mov_ps(visible<ALL>(j, from, to), exp2(x));
        sum = _mm512_add_ps(sum, e);
        store(weights + j, e);
    }
    *total = *total * (now > *top ? std::exp2(*top - now) : 1.0f) + _mm512_reduce_add_ps(sum);
    *top = now;
}

// Of two queries the weights again and the gradients of their scores: weight · (dweight − delta) · scaling.
struct Query {
    const float *scores, *dweights;
    float log_sum, delta;
    int from, to;
};
template <bool ALL>
void weigh_again(const Query& query, int j, __m512 scale, __m512 scaling, __m256i* weight, __m256i* dscore) {
    const __mmask16 which = visible<ALL>(j, query.from, query.to);
    const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(query.scores + j), scale, _mm512_set1_ps(query.log_sum));
    const __m512 w = _mm512_maskz_mov_ps(which, exp2(x));
    const __m512 dw = _mm512_sub_ps(_mm512_load_ps(query.dweights + j), _mm512_set1_ps(query.delta));
    *weight = rounded(w);
    *dscore = rounded(_mm512_maskz_mul_ps(which, _mm512_mul_ps(w, dw), scaling));
}
template <bool ALL>
void weigh_two(const Query both[2], int keys, __m512 scale, __m512 scaling, pair* weights, pair* dscores,
               bf16* dscore_rows) {
    for (int j = 0; j < keys; j += 16) {
        __m256i weight[2], dscore[2];
        for (int r = 0; r < 2; r++) {
            weigh_again<ALL>(both[r], j, scale, scaling, weight + r, dscore + r);
            _mm256_storeu_si256((__m256i*)(dscore_rows + r * KEYS + j), dscore[r]);
        }
        _mm512_store_si512(weights + j, paired(weight[0], weight[1]));
        _mm512_store_si512(dscores + j, paired(dscore[0], dscore[1]));
    }
}

struct Task {
    int segment, begin, end;
};

}  // namespace

extern "C" {

// out (T, H, D) in bfloat16; lse (H, T): log2 of the sum of 2^(score · scaling · log2 e).
void attention_forward(const Line* line_, bf16* out, float* lse) {
    const Line& line = *line_;
    const int width = line.width, vectors = width / 16;
    const long of_head = (long)width / 2 * line.packed;
    Scratch<pair> k_all(of_head * line.kv_heads), v_all(of_head * line.kv_heads);
    std::vector<Task> tasks;
    for (int s = 0; s < line.segment_count; s++)
        for (int i = 0; i < line.segments[s].end - line.segments[s].start; i += QUERIES)
            tasks.push_back({s, i, std::min(i + QUERIES, line.segments[s].end - line.segments[s].start)});
    const int task_count = tasks.size();
#pragma omp parallel num_threads(line.threads)
    {
        Scratch<float> scores(QUERIES * KEYS), sums(QUERIES * width);
        Scratch<bf16> weights(QUERIES * KEYS), q(QUERIES * width);
        float top[QUERIES], total[QUERIES];
#pragma omp for collapse(2) schedule(dynamic)
        for (int head = 0; head < line.kv_heads; head++)
            for (int s = 0; s < line.segment_count; s++)
                pack_segment(line, line.segments[s], head,
                             {k_all.data + head * of_head, nullptr, nullptr, v_all.data + head * of_head});
#pragma omp for collapse(2) schedule(dynamic)
        for (int head = 0; head < line.heads; head++)
            for (int t = 0; t < task_count; t++) {
                const Task& task = tasks[task_count - 1 - t];
                const Segment& segment = line.segments[task.segment];
                const int count = task.end - task.begin, kv_head = head / (line.heads / line.kv_heads);
                const pair *k = k_all.data + kv_head * of_head, *v = v_all.data + kv_head * of_head;
                for (int i = 0; i < count; i++) {
                    read_rotated(line, segment.start + task.begin + i, head, q.data + i * width);
                    top[i] = NOTHING;
                    total[i] = 0;
                }
                std::memset(sums.data, 0, sizeof(float) * count * width);
                const __m512 scale = _mm512_set1_ps(line.scaling * LOG2_E);
                for_key_blocks(line, segment, task.begin, task.end, [&](const Sight& sight, int key_index) {
                    multiply<false>(count, sight.count / 16, width / 2, (const pair*)q.data, width / 2, 1,
                                    k + (long)sight.packed / 2 * width, 16, width / 2 * 16, scores.data, KEYS);
                    for (int i = 0; i < count; i++) {
                        int from, to;
                        seen(sight, key_index, task.begin + i, segment.position + task.begin + i, line.window, &from,
                             &to);
                        const float before = top[i];
                        const auto soften = from == 0 && to >= sight.count ? softmax_row<true> : softmax_row<false>;
                        soften(scores.data + i * KEYS, sight.count, from, to, scale, top + i, total + i,
                               weights.data + i * KEYS);
                        if (top[i] == before) continue;
                        const __m512 less = _mm512_set1_ps(std::exp2(before - top[i]));
                        for (int d = 0; d < width; d += 16) {
                            float* at = sums.data + i * width + d;
                            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), less));
                        }
                    }
                    multiply<true>(count, vectors, sight.count / 2, (const pair*)weights.data, KEYS / 2, 1,
                                   v + (long)sight.packed / 2 * width, width, 16, sums.data, width);
                });
                for (int i = 0; i < count; i++) {
                    const int token = segment.start + task.begin + i;
                    bf16* to = out + ((long)token * line.heads + head) * width;
                    const __m512 factor = _mm512_set1_ps(1 / total[i]);
                    for (int d = 0; d < width; d += 16)
                        store(to + d, _mm512_mul_ps(_mm512_load_ps(sums.data + i * width + d), factor));
                    lse[(long)head * line.tokens + token] = top[i] + std::log2(total[i]);
                }
            }
    }
}

// dqkv (T, H + 2K, D) of dout (T, H, D), with out and lse of the forward pass.
void attention_backward(const Line* line_, const bf16* out, const float* lse, const bf16* dout, bf16* dqkv) {
    const Line& line = *line_;
    const int width = line.width, vectors = width / 16, group = line.heads / line.kv_heads;
    const long of_head = (long)width / 2 * line.packed, of_gradients = (long)width * line.packed;
    Scratch<pair> k_across(of_head * line.kv_heads), k_along(of_head * line.kv_heads),
        v_across(of_head * line.kv_heads);
    // Where threads would get unequal numbers of heads, each head is two parts, of every other block of queries.
    const int tasks = line.heads * line.trees;
    const int parts = tasks % line.threads && tasks < 8 * line.threads ? 2 : 1;
    // Of every part by itself, so that their sums don't depend on who comes first.
    Scratch<float> dk_all(of_gradients * line.heads * parts), dv_all(of_gradients * line.heads * parts);
    std::vector<std::vector<int>> trees(line.trees);
    for (int s = 0; s < line.segment_count; s++) trees[line.segments[s].tree].push_back(s);
#pragma omp parallel num_threads(line.threads)
    {
        Scratch<float> scores(QUERIES * KEYS), dscores(QUERIES * KEYS), dq(QUERIES * width);
        Scratch<pair> weights_pairs(QUERIES / 2 * KEYS), dscores_pairs(QUERIES / 2 * KEYS);
        Scratch<pair> q_pairs(QUERIES / 2 * width), dout_pairs(QUERIES / 2 * width);
        Scratch<bf16> q(QUERIES * width), dy(QUERIES * width), dscores_rows(QUERIES * KEYS);
        float delta[QUERIES], log_sum[QUERIES];
#pragma omp for collapse(2) schedule(dynamic)
        for (int head = 0; head < line.kv_heads; head++)
            for (int s = 0; s < line.segment_count; s++)
                pack_segment(line, line.segments[s], head,
                             {k_across.data + head * of_head, k_along.data + head * of_head,
                              v_across.data + head * of_head, nullptr});
#pragma omp for collapse(2) schedule(dynamic)
        for (int head_part = 0; head_part < line.heads * parts; head_part++)
            for (int tree = 0; tree < line.trees; tree++) {
                const int head = head_part / parts;
                const long of_kv = head / group * of_head;
                float *dk = dk_all.data + head_part * of_gradients, *dv = dv_all.data + head_part * of_gradients;
                int block = head_part % parts;
                for (int s : trees[tree]) {
                    const Segment& segment = line.segments[s];
                    const long from = (long)segment.packed * width;
                    const long size = (long)(segment.end - segment.start + 15) / 16 * 16 * width;
                    std::memset(dk + from, 0, sizeof(float) * size);
                    std::memset(dv + from, 0, sizeof(float) * size);
                }
                for (int s : trees[tree]) {
                    const Segment& segment = line.segments[s];
                    const int length = segment.end - segment.start;
                    for (int begin = 0; begin < length; begin += QUERIES) {
                        if (block++ % parts) continue;
                        const int end = std::min(begin + QUERIES, length), count = end - begin;
                        const int even = (count + 1) / 2 * 2;
                        for (int i = 0; i < count; i++) {
                            const int token = segment.start + begin + i;
                            read_rotated(line, token, head, q.data + i * width);
                            const long at = ((long)token * line.heads + head) * width;
                            __m512 along = _mm512_setzero_ps();
                            for (int d = 0; d < width; d += 16)
                                along = _mm512_fmadd_ps(load(dout + at + d), load(out + at + d), along);
                            std::memcpy(dy.data + i * width, dout + at, sizeof(bf16) * width);
                            delta[i] = _mm512_reduce_add_ps(along);
                            log_sum[i] = lse[(long)head * line.tokens + token];
                        }
                        if (even > count) {
                            std::memset(q.data + count * width, 0, sizeof(bf16) * width);
                            std::memset(dy.data + count * width, 0, sizeof(bf16) * width);
                        }
                        pair_along(q.data, width, even, width, q_pairs.data);
                        pair_along(dy.data, width, even, width, dout_pairs.data);
                        std::memset(dq.data, 0, sizeof(float) * count * width);
                        const __m512 scale = _mm512_set1_ps(line.scaling * LOG2_E),
                                     scaling = _mm512_set1_ps(line.scaling);
                        for_key_blocks(line, segment, begin, end, [&](const Sight& sight, int key_index) {
                            const int blocks = sight.count / 16;
                            multiply<false>(count, blocks, width / 2, (const pair*)q.data, width / 2, 1,
                                            k_across.data + of_kv + (long)sight.packed / 2 * width, 16, width / 2 * 16,
                                            scores.data, KEYS);
                            multiply<false>(count, blocks, width / 2, (const pair*)dy.data, width / 2, 1,
                                            v_across.data + of_kv + (long)sight.packed / 2 * width, 16, width / 2 * 16,
                                            dscores.data, KEYS);
                            for (int i = 0; i < even; i += 2) {
                                Query both[2];
                                bool all = true;
                                for (int r = 0; r < 2; r++) {
                                    const int row = i + r < count ? i + r : i;  // behind the last: nothing is seen
                                    both[r] = {scores.data + row * KEYS,
                                               dscores.data + row * KEYS,
                                               log_sum[row],
                                               delta[row],
                                               0,
                                               0};
                                    if (i + r < count)
                                        seen(sight, key_index, begin + row, segment.position + begin + row, line.window,
                                             &both[r].from, &both[r].to);
                                    all = all && both[r].from == 0 && both[r].to >= sight.count;
                                }
                                (all ? weigh_two<true> : weigh_two<false>)(both, sight.count, scale, scaling,
                                                                           weights_pairs.data + i / 2 * KEYS,
                                                                           dscores_pairs.data + i / 2 * KEYS,
                                                                           dscores_rows.data + i * KEYS);
                            }
                            multiply<true>(count, vectors, sight.count / 2, (const pair*)dscores_rows.data, KEYS / 2, 1,
                                           k_along.data + of_kv + (long)sight.packed / 2 * width, width, 16, dq.data,
                                           width);
                            const long keys_at = (long)sight.packed * width;
                            multiply<true>(sight.count, vectors, even / 2, dscores_pairs.data, 1, KEYS, q_pairs.data,
                                           width, 16, dk + keys_at, width);
                            multiply<true>(sight.count, vectors, even / 2, weights_pairs.data, 1, KEYS, dout_pairs.data,
                                           width, 16, dv + keys_at, width);
                        });
                        for (int i = 0; i < count; i++) {
                            const int token = segment.start + begin + i;
                            bf16* to = dqkv + ((long)token * (line.heads + 2 * line.kv_heads) + head) * width;
                            write_unrotated(line, dq.data + i * width, token, to);
                        }
                    }
                }
            }
#pragma omp for collapse(2) schedule(dynamic)
        for (int kv_head = 0; kv_head < line.kv_heads; kv_head++)
            for (int s = 0; s < line.segment_count; s++) {
                const Segment& segment = line.segments[s];
                alignas(64) float sum[256];
                for (int token = segment.start; token < segment.end; token++)
                    for (int value = 0; value < 2; value++) {
                        const float* from = (value ? dv_all : dk_all).data + kv_head * group * parts * of_gradients +
                                            (long)(segment.packed + token - segment.start) * width;
                        for (int d = 0; d < width; d += 16) {
                            __m512 total = _mm512_loadu_ps(from + d);
                            for (int g = 1; g < group * parts; g++)
                                total = _mm512_add_ps(total, _mm512_loadu_ps(from + g * of_gradients + d));
                            _mm512_store_ps(sum + d, total);
                        }
                        const int head = line.heads + kv_head + (value ? line.kv_heads : 0);
                        bf16* to = dqkv + ((long)token * (line.heads + 2 * line.kv_heads) + head) * width;
                        if (value)
                            for (int d = 0; d < width; d += 16) store(to + d, _mm512_load_ps(sum + d));
                        else
                            write_unrotated(line, sum, token, to);
                    }
            }
    }
}
}
