// Causal attention of a step's new tokens over the paged KV cache, decodes and prefill chunks alike.
//
// A task is one key/value head of one sequence and up to TASK_ROWS rows. A row is one query head of one new token. All
// query heads that share the key/value head are rows of one task, so that keys and values are read once for them. Keys
// are processed in tiles that begin at multiples of TILE from the sequence's start. For each tile a row computes a
// maximum, a sum and weighted values from zero; tiles are then merged in order (the online softmax of FlashAttention). A
// row's result does not depend on how the tokens were cut into chunks, on the batch or on the number of threads: a
// decoded token and the same token recomputed in a prefill get the same bits.
#pragma once

#include <cmath>

#include "gemm.h"

namespace tandem {

constexpr int TILE = 256;
constexpr int TASK_ROWS = 96;  // query heads of one key/value head are at most as many
constexpr int MAX_HEAD_DIM = 256;
constexpr float LOG2_E = 1.44269504088896341f;  // scores are in units of it: 2^x takes fewer steps than e^x

struct AttentionShape {
    int64_t heads, kv_heads, head_dim, block_size, num_blocks;
    int64_t table_stride;  // entries of one row of the block tables
    int64_t q_stride;      // floats from one token's queries to the next
    float scale;
    int64_t window;        // tokens that a token attends to, itself included
    int64_t group() const { return heads / kv_heads; }
    int64_t block_elements() const { return kv_heads * block_size * head_dim; }
};

// Packs `count` <= TILE keys of one head as right sides of query x key: panels of 32 keys over pairs of head dimensions.
// `key` holds their addresses. Columns beyond count are zero.
inline void pack_keys(const bf16* const* key, int count, int head_dim, uint32_t* panels) {
    const int pairs = (head_dim + 1) / 2;
    for (int first = 0; first < count; first += VL) {
        uint32_t* panel = panels + int64_t(first / PANEL) * pairs * PANEL + first % PANEL;
        const int keys = std::min(VL, count - first);
        for (int pair = 0; pair < pairs; pair += VL) {
            const int words = std::min(VL, pairs - pair);
            vu square[VL];
            for (int i = 0; i < VL; ++i) {
                square[i] = vu{};
                if (i >= keys) continue;
                const bf16* from = key[first + i] + 2 * pair;
                if (2 * (pair + VL) <= head_dim) {
                    square[i] = load(reinterpret_cast<const uint32_t*>(from));
                } else {
                    uint32_t tail[VL] = {};
                    std::memcpy(tail, from, size_t(std::min(2 * words, head_dim - 2 * pair)) * 2);
                    square[i] = load(tail);
                }
            }
            transpose(square);
            for (int i = 0; i < words; ++i) store(panel + int64_t(pair + i) * PANEL, square[i]);
        }
    }
    // The unused rest of the last panel, where vectors are narrower than a panel.
    for (int first = (count + VL - 1) / VL * VL; first % PANEL; first += VL)
        for (int pair = 0; pair < pairs; ++pair)
            store(panels + (int64_t(first / PANEL) * pairs + pair) * PANEL + first % PANEL, vu{});
}

inline void pack_keys(const float* const* key, int count, int head_dim, float* panels) {
    const int padded = (head_dim + 1) & ~1;
    for (int first = 0; first < (count + PANEL - 1) / PANEL * PANEL; first += VL) {
        float* panel = panels + int64_t(first / PANEL) * padded * PANEL + first % PANEL;
        for (int dim = 0; dim < padded; dim += VL) {
            vu square[VL];
            for (int i = 0; i < VL; ++i) {
                square[i] = vu{};
                if (first + i >= count || dim >= head_dim) continue;
                if (dim + VL <= head_dim) {
                    square[i] = (vu)load(key[first + i] + dim);
                } else {
                    uint32_t tail[VL] = {};
                    std::memcpy(tail, key[first + i] + dim, size_t(head_dim - dim) * 4);
                    square[i] = load(tail);
                }
            }
            transpose(square);
            for (int i = 0; i < std::min(VL, padded - dim); ++i)
                store(panel + int64_t(dim + i) * PANEL, (vf)square[i]);
        }
    }
}

// Packs `count` <= TILE values of one head as right sides of weight x value: panels of 32 head dimensions over pairs of
// keys. In a bf16 panel the even dimensions come first, then the odd ones (the order in which a mask and a shift split
// them); unpack_sums() puts them in order again. The keys end with zeros up to a multiple of VALUE_PAIRS: a row has
// weights of zero there, but what is no number times zero is none.
#if defined(TANDEM_TILES)
constexpr int VALUE_PAIRS = TILE_PAIRS;
#else
constexpr int VALUE_PAIRS = 1;
#endif
inline void pack_values(const bf16* const* value, int count, int head_dim, uint32_t* panels) {
    const int pairs = (count + 1) / 2;
    constexpr int HALF = PANEL / 2;
    for (int pair = 0; pair < pairs; ++pair) {
        const bf16* first = value[2 * pair];
        const bf16* second = 2 * pair + 1 < count ? value[2 * pair + 1] : nullptr;
        for (int dim = 0; dim < head_dim; dim += PANEL) {
            uint32_t* to = panels + (int64_t(dim / PANEL) * (TILE / 2) + pair) * PANEL;
            const int dims = std::min(PANEL, head_dim - dim);
            const uint32_t *a = reinterpret_cast<const uint32_t*>(first + dim), *b = nullptr;
            uint32_t a_tail[HALF] = {}, b_tail[HALF] = {};
            if (second) b = reinterpret_cast<const uint32_t*>(second + dim);
            if (dims < PANEL) {
                std::memcpy(a_tail, a, size_t(dims) * 2);
                if (second) std::memcpy(b_tail, b, size_t(dims) * 2);
                a = a_tail;
                if (second) b = b_tail;
            }
            for (int i = 0; i < HALF; i += VL) {
                vu x = load(a + i), y = second ? load(b + i) : vu{};
                store(to + i, (x & 0xffffu) | (y << 16));
                store(to + HALF + i, (x >> 16) | (y & 0xffff0000u));
            }
        }
    }
    for (int pair = pairs; pair % VALUE_PAIRS; ++pair)
        for (int dim = 0; dim < head_dim; dim += PANEL)
            std::memset(panels + (int64_t(dim / PANEL) * (TILE / 2) + pair) * PANEL, 0, PANEL * sizeof(*panels));
}
// A row of sums over packed values, times `factor`, in the order of the head's dimensions.
inline void unpack_sums(const float* sums, int head_dim, float factor, float* to, const uint32_t*) {
    constexpr int HALF = PANEL / 2;
    for (int dim = 0; dim < head_dim; dim += PANEL) {
        const float *even = sums + dim, *odd = even + HALF;
        if (dim + PANEL > head_dim) {
            for (int i = 0; dim + 2 * i < head_dim; ++i) to[dim + 2 * i] = even[i] * factor;
            for (int i = 0; dim + 2 * i + 1 < head_dim; ++i) to[dim + 2 * i + 1] = odd[i] * factor;
            continue;
        }
        for (int i = 0; i < HALF; i += VL) {
            using Lanes = std::make_integer_sequence<int, VL>;
            const vu a = (vu)(load(even + i) * factor), b = (vu)(load(odd + i) * factor);
            store(to + dim + 2 * i, (vf)shuffle(a, b, in_turn<0>(Lanes{})));
            store(to + dim + 2 * i + VL, (vf)shuffle(a, b, in_turn<VL / 2>(Lanes{})));
        }
    }
}

inline void pack_values(const float* const* value, int count, int head_dim, float* panels) {
    for (int key = 0; key < ((count + 1) & ~1); ++key)
        for (int dim = 0; dim < head_dim; dim += PANEL) {
            float* to = panels + (int64_t(dim / PANEL) * TILE + key) * PANEL;
            const int dims = key < count ? std::min(PANEL, head_dim - dim) : 0;
            if (dims) std::memcpy(to, value[key] + dim, size_t(dims) * 4);
            if (dims < PANEL) std::memset(to + dims, 0, size_t(PANEL - dims) * 4);
        }
}
inline void unpack_sums(const float* sums, int head_dim, float factor, float* to, const float*) {
    for (int dim = 0; dim < head_dim; ++dim) to[dim] = sums[dim] * factor;
}

// Replaces the scores of keys [low, high) by 2^(score - maximum) and all others by zero.
inline void exp_visible(float* scores, int low, int high, int columns, float* maximum, float* total) {
    constexpr float NEVER = -INFINITY;
    for (int j = 0; j < low; ++j) scores[j] = NEVER;
    for (int j = high; j < columns; ++j) scores[j] = NEVER;
    // The same number of lanes on every machine and for every number of columns, so that the order of the sum is fixed.
    constexpr int VECTORS = PANEL / VL;
    vf tops[VECTORS], totals[VECTORS] = {};
    for (int i = 0; i < VECTORS; ++i) tops[i] = splat(NEVER);
    for (int j = 0; j < columns; j += PANEL)
        for (int i = 0; i < VECTORS; ++i) tops[i] = max(tops[i], load(scores + j + i * VL));
    for (int i = 1; i < VECTORS; ++i) tops[0] = max(tops[0], tops[i]);
    *maximum = highest(tops[0]);
    for (int j = 0; j < columns; j += PANEL)
        for (int i = 0; i < VECTORS; ++i) {
            vf weight = exp2(load(scores + j + i * VL) - *maximum);
            store(scores + j + i * VL, weight);
            totals[i] += weight;
        }
    for (int i = 1; i < VECTORS; ++i) totals[0] += totals[i];
    *total = sum(totals[0]);
}

template <class Kv>
struct AttentionTypes;
template <>
struct AttentionTypes<bf16> {
    using Weights = Bf16Weights;
};
template <>
struct AttentionTypes<float> {
    using Weights = FloatWeights;
};

template <class Kv>
void prefetch(const Kv* row, int head_dim) {
    for (int i = 0; i < head_dim; i += int(64 / sizeof(Kv))) __builtin_prefetch(row + i);
}

// Merges a tile's maxima, sums and weighted values [rows][width] with those of the tiles before. A maximum of -inf means
// that the row attends to no key; a row for which both maxima are -inf does not change.
inline void merge(float* maxima, float* sums, float* outputs, const float* tile_maxima, const float* tile_sums,
                  const float* tile_outputs, int rows, int width) {
    for (int row0 = 0; row0 < rows; row0 += VL) {
        const vf before = load(maxima + row0), now = load(tile_maxima + row0), top = max(before, now);
        const vf floor = max(top, splat(-3.0e38f));  // -inf minus -inf would not be a number
        const vf keep = exp2(before - floor), add = exp2(now - floor);
        store(maxima + row0, top);
        store(sums + row0, load(sums + row0) * keep + load(tile_sums + row0) * add);
        for (int r = 0; r < std::min(VL, rows - row0); ++r) {
            float* to = outputs + (row0 + r) * width;
            const float* from = tile_outputs + (row0 + r) * width;
            for (int j = 0; j < width; j += VL) store(to + j, load(to + j) * keep[r] + load(from + j) * add[r]);
        }
    }
}

struct AttentionScratch {
    alignas(64) uint32_t keys[TILE * MAX_HEAD_DIM];  // bf16 pairs use half of it
    alignas(64) uint32_t values[TILE * MAX_HEAD_DIM];
    alignas(64) float queries[TASK_ROWS * ROW_STRIDE];
    alignas(64) float outputs[TASK_ROWS * MAX_HEAD_DIM];
    alignas(64) float scores[MAX_ROWS * ROW_STRIDE];
    alignas(64) uint32_t weights[MAX_ROWS * PAIR_STRIDE];  // the scores as bf16 pairs, where there is a dot product
    alignas(64) float partial[MAX_ROWS * MAX_HEAD_DIM];
    float maxima[TASK_ROWS + VL], sums[TASK_ROWS + VL];  // the last vector may extend beyond the last row
};

// New tokens [first_token, last_token) of one sequence for one key/value head. `q` and `out` begin at the sequence's
// first new token; `start` is that token's position.
template <class Kv>
void attend(const AttentionShape& shape, const float* q, const Kv* kv_layer, const int32_t* table, int64_t start,
            int first_token, int last_token, int kv_head, float* out, AttentionScratch& scratch) {
    using W = typename AttentionTypes<Kv>::Weights;
    using Left = typename W::Left;
    using Element = typename W::Element;
    const int group = int(shape.group()), dim = int(shape.head_dim);
    const int rows = (last_token - first_token) * group;
    const int value_panels = (dim + PANEL - 1) / PANEL, out_stride = value_panels * PANEL;
    const int dim_pairs = (dim + 1) / 2;
    [[maybe_unused]] const typename W::Registers registers;
    Element* keys = reinterpret_cast<Element*>(scratch.keys);
    Element* values = reinterpret_cast<Element*>(scratch.values);
    Left* queries = reinterpret_cast<Left*>(scratch.queries);

    for (int row = 0; row < rows; ++row) {
        const float* from = q + (first_token + row / group) * shape.q_stride + (kv_head * group + row % group) * dim;
        float scaled[MAX_HEAD_DIM];
        for (int d = 0; d < dim; ++d) scaled[d] = from[d] * (shape.scale * LOG2_E);
        copy_left(queries + row * W::STRIDE, scaled, dim);
        scratch.maxima[row] = -INFINITY;
        scratch.sums[row] = 0.0f;
    }
    std::memset(scratch.outputs, 0, size_t(rows) * out_stride * 4);

    const int64_t end = start + last_token;  // keys of the last row
    const int64_t begin = std::max<int64_t>(0, start + first_token + 1 - shape.window);
    const Kv* head_keys = kv_layer + int64_t(kv_head) * shape.block_size * dim;
    const int64_t to_values = shape.num_blocks * shape.block_elements();
    // Writes the addresses of a tile's keys and returns their number.
    auto locate = [&](int64_t tile, const Kv** keys_at) {
        const int count = int(std::min<int64_t>(TILE, end - tile));
        int64_t block = tile / shape.block_size, offset = tile % shape.block_size;
        for (int i = 0; i < count; ++i) {
            keys_at[i] = head_keys + table[block] * shape.block_elements() + offset * dim;
            if (++offset == shape.block_size) ++block, offset = 0;
        }
        return count;
    };
    const Kv *addresses[2][TILE], **now = addresses[0], **next = addresses[1];
    locate(begin / TILE * TILE, next);
    const Split blocks(rows, W::ROWS, W::TILES ? W::ROWS : 1);
    for (int64_t tile = begin / TILE * TILE; tile < end; tile += TILE) {
        const int count = int(std::min<int64_t>(TILE, end - tile));
        std::swap(now, next);
        const Kv* value[TILE];
        for (int i = 0; i < count; ++i) {
            value[i] = now[i] + to_values;
            prefetch(value[i], dim);
        }
        if (tile + TILE < end) {
            const int following = locate(tile + TILE, next);
            for (int i = 0; i < following; ++i) prefetch(next[i], dim);
        }
        pack_keys(now, count, dim, keys);
        pack_values(value, count, dim, values);
        for (int block = 0; block < blocks.blocks; ++block) {
            const int row0 = blocks.start(block), size = blocks.size(block);
            const int64_t newest = start + first_token + (row0 + size - 1) / group;
            const int64_t oldest = start + first_token + row0 / group;
            if (newest < tile || oldest - shape.window + 1 >= tile + count) continue;
            const int visible = int(std::min<int64_t>(count, newest + 1 - tile));
            const int panels = (visible + PANEL - 1) / PANEL, columns = panels * PANEL;
            float* scores = scratch.scores;
            multiply<W>(queries + row0 * W::STRIDE, size, keys, int64_t(dim_pairs) * W::PAIR, panels, dim_pairs,
                        {nullptr, 0, scores, ROW_STRIDE});
            // Of this tile alone. A row that attends to no key of the tile adds nothing.
            float maxima[W::ROWS + VL], sums[W::ROWS + VL] = {};
            std::fill_n(maxima, W::ROWS + VL, -INFINITY);
            for (int r = 0; r < size; ++r) {
                const int64_t position = start + first_token + (row0 + r) / group;
                const int low = int(std::max<int64_t>(0, position - shape.window + 1 - tile));
                const int high = int(std::min<int64_t>(columns, position + 1 - tile));
                float* row = scores + r * ROW_STRIDE;
                if (low < high)
                    exp_visible(row, low, high, columns, &maxima[r], &sums[r]);
                else
                    std::memset(row, 0, size_t(columns) * 4);
            }
            const Left* weights;
            if constexpr (W::DOT) {
                for (int r = 0; r < size; ++r)
                    copy_left(scratch.weights + r * W::STRIDE, scores + r * ROW_STRIDE, columns);
                weights = scratch.weights;
            } else {
                weights = scores;
            }
            int pairs = (visible + 1) / 2;
            // All of them in tiles, however many keys this block of rows attends to: the result would depend on it.
            if constexpr (W::TILES) pairs = (pairs + VALUE_PAIRS - 1) / VALUE_PAIRS * VALUE_PAIRS;
            multiply<W>(weights, size, values, int64_t(TILE / 2) * W::PAIR, value_panels, pairs,
                        {nullptr, 0, scratch.partial, out_stride});
            merge(scratch.maxima + row0, scratch.sums + row0, scratch.outputs + row0 * out_stride, maxima, sums,
                  scratch.partial, size, out_stride);
        }
    }
    for (int row = 0; row < rows; ++row) {
        const float* from = scratch.outputs + row * out_stride;
        float* to = out + ((first_token + row / group) * shape.heads + kv_head * group + row % group) * dim;
        unpack_sums(from, dim, 1.0f / scratch.sums[row], to, static_cast<const Element*>(nullptr));
    }
}

}  // namespace tandem
