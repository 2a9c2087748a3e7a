// Attention over a flat pack of queries, keys and values, forward and backward, with rotary embedding.
//
// Dao et al., "FlashAttention" (2022): blocks of queries against blocks of keys, scores and their softmax in fp32 in
// the cache, weights made again from their log-sum-exp in the backward pass.  What a token sees is a path of segments
// (attention.py draws it).  Keys and values are laid out for the products once a call; each segment begins there at a
// multiple of 16 keys, and keys behind a segment's end are hidden.
//
// Every sum is made in an order that depends on the layout and the number of threads alone.
#include <cmath>
#include <cstring>
#include <algorithm>
#include <memory>
#include <vector>

#include "vectors.h"

#ifndef STORED
#define STORED bf16  // or float, which AVX2's products read as it is
#endif

namespace {

using stored = STORED;  // the numbers of queries, keys, values and outputs

constexpr int QUERIES = 48, KEYS = 256;  // of a block
constexpr int AHEAD = 8;  // tokens: what is read in a while is fetched, a row of a head being too short to be
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
    const stored* qkv;       // (T, H + 2K, D)
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

    const stored* head(int token, int head) const {
        return qkv + ((long)token * (heads + 2 * kv_heads) + head) * width;
    }
};

// A head of a token, turned by its position's angle, or back by it: read(d, which) gives 16 of its elements,
// write(d, which, x) takes them.
template <bool BACK, bool WHOLE, class Read, class Write>
void rotate_by(const Line& line, int token, Read read, Write write) {
    const int half = line.turned;
    for (int d = 0; d < half; d += 16) {
        const Mask which = WHOLE ? first(16) : first(half - d);
        const Floats cos = load(line.cos + (long)token * half + d, which);
        const Floats sin = load(line.sin + (long)token * half + d, which);
        const Floats a = read(d, which), b = read(half + d, which);
        const Floats a_sin = a * sin, b_sin = b * sin;
        write(d, which, BACK ? fma(a, cos, b_sin) : fms(a, cos, b_sin));
        write(half + d, which, BACK ? fms(b, cos, a_sin) : fma(b, cos, a_sin));
    }
    for (int d = 2 * half; d < line.width; d += 16) {
        const Mask which = first(line.width - d);
        write(d, which, read(d, which));
    }
}

template <bool BACK, class Read, class Write>
void rotate(const Line& line, int token, Read read, Write write) {
    if (2 * line.turned == line.width && line.turned % 16 == 0)  // no lane is left out, known beforehand
        rotate_by<BACK, true>(line, token, read, write);
    else
        rotate_by<BACK, false>(line, token, read, write);
}

void read_rotated(const Line& line, int token, int head, element* to) {
    const stored* from = line.head(token, head);
    rotate<false>(
        line, token, [&](int d, Mask which) { return load(from + d, which); },
        [&](int d, Mask which, Floats x) { store(to + d, x, which); });
}

void write_unrotated(const Line& line, const float* x, int token, stored* to) {
    rotate<true>(
        line, token, [&](int d, Mask which) { return load(x + d, which); },
        [&](int d, Mask which, Floats y) { store(to + d, y, which); });
}

// Keys and values of a key-value head as the products want them; `across`: terms along D, each segment's
// (D / ELEMENTS, 16) by 16 keys; `along`: terms of keys, (packed keys / ELEMENTS, D). Null where not wanted.
struct Packed {
    term *k_across, *k_along, *v_across, *v_along;
};

void pack_segment(const Line& line, const Segment& segment, int kv_head, const Packed& to) {
    const int width = line.width;
    alignas(64) element rows[16 * 256];
    for (int value = 0; value < 2; value++) {
        term* across = value ? to.v_across : to.k_across;
        term* along = value ? to.v_along : to.k_along;
        const int head = line.heads + kv_head + (value ? line.kv_heads : 0);
        for (int start = segment.start; start < segment.end; start += 16) {
            const int count = std::min(16, segment.end - start), packed = segment.packed + start - segment.start;
            for (int i = 0; i < count; i++) {
                if (value)
                    copy_row(line.head(start + i, head), width, rows + i * width);
                else
                    read_rotated(line, start + i, head, rows + i * width);
            }
            std::memset(rows + count * width, 0, sizeof(element) * (16 - count) * width);
            if (across) lay_across(rows, width, width, across + (long)packed / ELEMENTS * width);
            if (along) lay_along(rows, width, 16, width, along + (long)packed / ELEMENTS * width);
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
inline Mask visible(int j, int from, int to) {
    return ALL ? lanes(0, 16) : lanes(from - j, to - j);
}

// A query's weights of a block of keys, 2^(score · scale − top), rounded; its top and total go on from block to block.
template <bool ALL>
void softmax_row(float* scores, int keys, int from, int to, Floats scale, float* top, float* total, element* weights) {
    if (from >= to) {
        std::memset(weights, 0, sizeof(element) * keys);
        return;
    }
    Floats most = spread(*top);
    for (int j = 0; j < keys; j += 16)
        most = where(visible<ALL>(j, from, to), max(most, load(scores + j) * scale), most);
    const float now = max_of_lanes(most);
    const Floats shift = spread(now);
    Floats sum = zeros();
    for (int j = 0; j < keys; j += 16) {
        const Floats x = fms(load(scores + j), scale, shift);
        const Floats e = where(visible<ALL>(j, from, to), exp2(x));
        sum = sum + e;
        store(weights + j, e);
    }
    *total = *total * (now > *top ? std::exp2(*top - now) : 1.0f) + sum_of_lanes(sum);
    *top = now;
}

// Of two queries the weights again and the gradients of their scores: weight · (dweight − delta) · scaling.
struct Query {
    const float *scores, *dweights;
    float log_sum, delta;
    int from, to;
};
template <bool ALL>
void weigh_again(const Query& query, int j, Floats scale, Floats scaling, Floats* weight, Floats* dscore) {
    const Mask which = visible<ALL>(j, query.from, query.to);
    const Floats x = fms(load(query.scores + j), scale, spread(query.log_sum));
    *weight = where(which, exp2(x));
    const Floats dw = load(query.dweights + j) - spread(query.delta);
    *dscore = where(which, *weight * dw * scaling);
}
template <bool ALL>
void weigh_two(const Query both[2], int keys, Floats scale, Floats scaling, term* weights, term* dscores,
               element* dscore_rows) {
    for (int j = 0; j < keys; j += 16) {
        Floats weight[2], dscore[2];
        for (int r = 0; r < 2; r++) {
            weigh_again<ALL>(both[r], j, scale, scaling, weight + r, dscore + r);
            store(dscore_rows + r * KEYS + j, dscore[r]);
        }
        lay_two(weight[0], weight[1], weights + j, KEYS);
        lay_two(dscore[0], dscore[1], dscores + j, KEYS);
    }
}

struct Task {
    int segment, begin, end;
};

struct Block {  // of queries of one of a key-value head's heads
    int segment, member, begin, end;
};

// What one thread adds up for a key-value head: of a tree's blocks of queries all, or every other one.
struct Share {
    int part;
    long keys = 0;  // that its queries see, about
    std::vector<int> segments;
    std::vector<Block> blocks;
};

// All shares, the longest first, so that no thread is left with one while the others wait.
std::vector<Share> share_out(const Line& line, int parts) {
    std::vector<Share> shares(line.trees * parts);
    std::vector<int> counts(line.trees);
    for (int i = 0; i < line.trees * parts; i++) shares[i].part = i % parts;
    for (int s = 0; s < line.segment_count; s++) {
        const Segment& segment = line.segments[s];
        const int length = segment.end - segment.start, first = segment.tree * parts;
        for (int p = 0; p < parts; p++) shares[first + p].segments.push_back(s);
        for (int member = 0; member < line.heads / line.kv_heads; member++)
            for (int begin = 0; begin < length; begin += QUERIES) {
                Share& share = shares[first + counts[segment.tree]++ % parts];
                share.blocks.push_back({s, member, begin, std::min(begin + QUERIES, length)});
                share.keys += segment.position + begin + QUERIES;
            }
    }
    std::stable_sort(shares.begin(), shares.end(),
                     [](const Share& one, const Share& other) { return one.keys > other.keys; });
    return shares;
}

}  // namespace

extern "C" {

// out (T, H, D); lse (H, T): log2 of the sum of 2^(score · scaling · log2 e).
void attention_forward(const Line* line_, stored* out, float* lse) {
    const Line& line = *line_;
    const int width = line.width, vectors = width / 16, terms = width / ELEMENTS;
    const long of_head = (long)width / ELEMENTS * line.packed;
    Scratch<term> k_all(of_head * line.kv_heads), v_all(of_head * line.kv_heads);
    std::vector<Task> tasks;
    for (int s = 0; s < line.segment_count; s++)
        for (int i = 0; i < line.segments[s].end - line.segments[s].start; i += QUERIES)
            tasks.push_back({s, i, std::min(i + QUERIES, line.segments[s].end - line.segments[s].start)});
    const int task_count = tasks.size();
#pragma omp parallel num_threads(line.threads)
    {
        Scratch<float> scores(QUERIES * KEYS), sums(QUERIES * width);
        Scratch<element> weights(QUERIES * KEYS), q(QUERIES * width);
        float top[QUERIES], total[QUERIES];
        if (all_have_memory()) {
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
                    const term *k = k_all.data + kv_head * of_head, *v = v_all.data + kv_head * of_head;
                    for (int i = 0; i < count; i++) {
                        const int token = segment.start + task.begin + i;
                        if (i + AHEAD < count) fetch(line.head(token + AHEAD, head), width);
                        read_rotated(line, token, head, q.data + i * width);
                        top[i] = NOTHING;
                        total[i] = 0;
                    }
                    std::memset(sums.data, 0, sizeof(float) * count * width);
                    const Floats scale = spread(line.scaling * LOG2_E);
                    for_key_blocks(line, segment, task.begin, task.end, [&](const Sight& sight, int key_index) {
                        multiply<false>(count, sight.count / 16, terms, (const term*)q.data, terms, 1,
                                        k + (long)sight.packed * terms, 16, (long)terms * 16, scores.data, KEYS);
                        for (int i = 0; i < count; i++) {
                            int from, to;
                            seen(sight, key_index, task.begin + i, segment.position + task.begin + i, line.window,
                                 &from, &to);
                            const float before = top[i];
                            const auto soften = from == 0 && to >= sight.count ? softmax_row<true> : softmax_row<false>;
                            soften(scores.data + i * KEYS, sight.count, from, to, scale, top + i, total + i,
                                   weights.data + i * KEYS);
                            if (top[i] == before) continue;
                            const Floats less = spread(std::exp2(before - top[i]));
                            for (int d = 0; d < width; d += 16) {
                                float* at = sums.data + i * width + d;
                                store(at, load(at) * less);
                            }
                        }
                        multiply<true>(count, vectors, sight.count / ELEMENTS, (const term*)weights.data,
                                       KEYS / ELEMENTS, 1, v + (long)sight.packed * terms, width, 16, sums.data, width);
                    });
                    for (int i = 0; i < count; i++) {
                        const int token = segment.start + task.begin + i;
                        stored* to = out + ((long)token * line.heads + head) * width;
                        const Floats factor = spread(1 / total[i]);
                        for (int d = 0; d < width; d += 16) store(to + d, load(sums.data + i * width + d) * factor);
                        lse[(long)head * line.tokens + token] = top[i] + std::log2(total[i]);
                    }
                }
        }
    }
}

// dqkv (T, H + 2K, D) of dout (T, H, D), with out and lse of the forward pass.
void attention_backward(const Line* line_, const stored* out, const float* lse, const stored* dout, stored* dqkv) {
    const Line& line = *line_;
    const int width = line.width, vectors = width / 16, terms = width / ELEMENTS;
    const int group = line.heads / line.kv_heads;
    const long of_head = (long)width / ELEMENTS * line.packed, of_gradients = (long)width * line.packed;
    Scratch<term> k_across(of_head * line.kv_heads), k_along(of_head * line.kv_heads),
        v_across(of_head * line.kv_heads);
    // A task is the queries that read a key-value head: their sums come to one, and leave the cache once.  Where
    // threads would get unequal numbers of tasks, each is two parts, of every other block of queries.
    const int tasks = line.kv_heads * line.trees;
    const int parts = tasks % line.threads && tasks < 8 * line.threads ? 2 : 1;
    // Of every part by itself, so that their sums don't depend on who comes first.
    const long of_tasks = of_gradients * line.kv_heads * parts;
    const Lasting gradients(2 * of_tasks * sizeof(float));
    float *dk_all = (float*)gradients.data(), *dv_all = dk_all + of_tasks;
    const std::vector<Share> shares = share_out(line, parts);
    const int share_count = shares.size();
#pragma omp parallel num_threads(line.threads)
    {
        Scratch<float> scores(QUERIES * KEYS), dscores(QUERIES * KEYS), dq(QUERIES * width);
        Scratch<term> weights_along(QUERIES / ELEMENTS * KEYS), dscores_along(QUERIES / ELEMENTS * KEYS);
        Scratch<term> q_along(QUERIES / ELEMENTS * width), dout_along(QUERIES / ELEMENTS * width);
        Scratch<element> q(QUERIES * width), dy(QUERIES * width), dscores_rows(QUERIES * KEYS);
        float delta[QUERIES], log_sum[QUERIES];
        if (all_have_memory()) {
#pragma omp for collapse(2) schedule(dynamic)
            for (int head = 0; head < line.kv_heads; head++)
                for (int s = 0; s < line.segment_count; s++)
                    pack_segment(line, line.segments[s], head,
                                 {k_across.data + head * of_head, k_along.data + head * of_head,
                                  v_across.data + head * of_head, nullptr});
#pragma omp for collapse(2) schedule(dynamic)
            for (int t = 0; t < share_count; t++)
                for (int kv_head = 0; kv_head < line.kv_heads; kv_head++) {
                    const Share& share = shares[t];
                    const long of_kv = kv_head * of_head, sums = (kv_head * parts + share.part) * of_gradients;
                    float *dk = dk_all + sums, *dv = dv_all + sums;
                    for (int s : share.segments) {
                        const Segment& segment = line.segments[s];
                        const long from = (long)segment.packed * width;
                        const long size = (long)(segment.end - segment.start + 15) / 16 * 16 * width;
                        std::memset(dk + from, 0, sizeof(float) * size);
                        std::memset(dv + from, 0, sizeof(float) * size);
                    }
                    for (const Block& block : share.blocks) {
                        const Segment& segment = line.segments[block.segment];
                        const int head = kv_head * group + block.member, begin = block.begin, end = block.end;
                        const int count = end - begin, even = (count + 1) / 2 * 2;
                        for (int i = 0; i < count; i++) {
                            const int token = segment.start + begin + i;
                            const long at = ((long)token * line.heads + head) * width;
                            if (i + AHEAD < count) {
                                const long later = at + (long)AHEAD * line.heads * width;
                                fetch(line.head(token + AHEAD, head), width);
                                fetch(out + later, width);
                                fetch(dout + later, width);
                            }
                            read_rotated(line, token, head, q.data + i * width);
                            Floats along = zeros();
                            for (int d = 0; d < width; d += 16)
                                along = fma(load(dout + at + d), load(out + at + d), along);
                            copy_row(dout + at, width, dy.data + i * width);
                            delta[i] = sum_of_lanes(along);
                            log_sum[i] = lse[(long)head * line.tokens + token];
                        }
                        if (even > count) {
                            std::memset(q.data + count * width, 0, sizeof(element) * width);
                            std::memset(dy.data + count * width, 0, sizeof(element) * width);
                        }
                        lay_along(q.data, width, even, width, q_along.data);
                        lay_along(dy.data, width, even, width, dout_along.data);
                        std::memset(dq.data, 0, sizeof(float) * count * width);
                        const Floats scale = spread(line.scaling * LOG2_E), scaling = spread(line.scaling);
                        for_key_blocks(line, segment, begin, end, [&](const Sight& sight, int key_index) {
                            const int blocks = sight.count / 16;
                            multiply<false>(count, blocks, terms, (const term*)q.data, terms, 1,
                                            k_across.data + of_kv + (long)sight.packed * terms, 16, (long)terms * 16,
                                            scores.data, KEYS);
                            multiply<false>(count, blocks, terms, (const term*)dy.data, terms, 1,
                                            v_across.data + of_kv + (long)sight.packed * terms, 16, (long)terms * 16,
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
                                                                           weights_along.data + i / ELEMENTS * KEYS,
                                                                           dscores_along.data + i / ELEMENTS * KEYS,
                                                                           dscores_rows.data + i * KEYS);
                            }
                            multiply<true>(count, vectors, sight.count / ELEMENTS, (const term*)dscores_rows.data,
                                           KEYS / ELEMENTS, 1, k_along.data + of_kv + (long)sight.packed * terms, width,
                                           16, dq.data, width);
                            const long keys_at = (long)sight.packed * width;
                            multiply<true>(sight.count, vectors, even / ELEMENTS, dscores_along.data, 1, KEYS,
                                           q_along.data, width, 16, dk + keys_at, width);
                            multiply<true>(sight.count, vectors, even / ELEMENTS, weights_along.data, 1, KEYS,
                                           dout_along.data, width, 16, dv + keys_at, width);
                        });
                        for (int i = 0; i < count; i++) {
                            const int token = segment.start + begin + i;
                            stored* to = dqkv + ((long)token * (line.heads + 2 * line.kv_heads) + head) * width;
                            write_unrotated(line, dq.data + i * width, token, to);
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
                            const float* from = (value ? dv_all : dk_all) + kv_head * parts * of_gradients +
                                                (long)(segment.packed + token - segment.start) * width;
                            for (int d = 0; d < width; d += 16) {
                                Floats total = load(from + d);
                                for (int p = 1; p < parts; p++) total = total + load(from + p * of_gradients + d);
                                store(sum + d, total);
                            }
                            const int head = line.heads + kv_head + (value ? line.kv_heads : 0);
                            stored* to = dqkv + ((long)token * (line.heads + 2 * line.kv_heads) + head) * width;
                            if (value)
                                for (int d = 0; d < width; d += 16) store(to + d, load(sum + d));
                            else
                                write_unrotated(line, sum, token, to);
                        }
                }
        }
    }
}
}
