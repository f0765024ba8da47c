// Matrix products with a packed right side, for any number of rows of the left side.
//
// The right side (a weight, or the keys or values of an attention tile) is packed in panels of 32 columns; a panel holds
// its rows k in pairs, so that a bf16 pair of one column is one 32-bit word:
//
//     bf16   panel[k / 2][column][k % 2]          float  panel[k][column]
//
// This is the operand order of the bf16 dot product instruction, and of the tile registers (tiles.h). Without these
// instructions a shift and a mask widen a vector of words to two vectors of floats. Weights are read from memory as bf16,
// in order, once per block of rows.
//
// Every output is one chain of additions in the order of k for any number of rows, columns and threads: a row's result
// does not depend on the batch, to the last bit.
#pragma once

#include <algorithm>

#include "rowwise.h"
#include "simd.h"
#include "tiles.h"

namespace tandem {

constexpr int PANEL = 32;
constexpr int KC = 384;                     // longest run of k in one call of the kernel: 12 rows of it stay in L1
constexpr int ROW_STRIDE = KC + 16;         // of the left side's copy; no power of two, so rows use different cache sets
constexpr int PAIR_STRIDE = KC / 2 + 16;    // the same, where a word is a bf16 pair
constexpr int GROUP = 2 * VL;               // columns that one row's pair of accumulators holds
constexpr int GROUPS_PER_PANEL = PANEL / GROUP;
#if defined(__AVX512F__)
constexpr int KERNEL_ROWS = 12;             // 24 accumulators of 32 registers
#else
constexpr int KERNEL_ROWS = 6;              // 12 of 16
#endif
#if defined(TANDEM_TILES)
constexpr int MAX_ROWS = 2 * TILE_ROWS;     // of one call of multiply(), with any type of weights
#else
constexpr int MAX_ROWS = KERNEL_ROWS;
#endif
constexpr int MAX_GROUPS = 4;

// Groups computed at once: few rows have few accumulators, and too few accumulators leave the multipliers idle.
constexpr int groups_for(int rows) {
    if (VL == 16) return rows <= 2 ? 4 : rows <= 6 ? 2 : 1;
    return rows <= 1 ? 4 : rows <= 2 ? 2 : 1;
}

struct FloatWeights {
    using Element = float;
    using Left = float;
    static constexpr int PAIR = 2 * PANEL;  // elements from one pair of k to the next
    static constexpr bool DOT = false, TILES = false;
    struct Registers {};
    static constexpr int ROWS = KERNEL_ROWS;  // of one call of multiply()
    static constexpr int LEFT_PER_PAIR = 2, STRIDE = ROW_STRIDE;
    static vf even(const float* p) { return load(p); }
    static vf odd(const float* p) { return load(p + PANEL); }
};

struct Bf16Weights {
    using Element = uint32_t;
    static constexpr int PAIR = PANEL;
#if defined(TANDEM_TILES)
    static constexpr bool TILES = true;
    using Registers = TileRegisters;
#else
    static constexpr bool TILES = false;
    struct Registers {};
#endif
    static constexpr int ROWS = MAX_ROWS;
    static vf even(const uint32_t* p) { return (vf)(load(p) << 16); }
    static vf odd(const uint32_t* p) { return (vf)(load(p) & 0xffff0000u); }
#if defined(__AVX512BF16__) || defined(TANDEM_EMULATE_BF16_DOT)
    using Left = uint32_t;
    static constexpr bool DOT = true;
    static constexpr int LEFT_PER_PAIR = 1, STRIDE = PAIR_STRIDE;
    static vf dot(vf sum, uint32_t left, vu right) {
#if defined(TANDEM_EMULATE_BF16_DOT)  // so that this path can be tested where there is no such instruction
        return sum + splat(widen(bf16(left))) * (vf)(right << 16) + splat(widen(bf16(left >> 16))) * (vf)(right & 0xffff0000u);
#else
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(left)), (__m512bh)right);
#endif
    }
#else
    using Left = float;
    static constexpr bool DOT = false;
    static constexpr int LEFT_PER_PAIR = 2, STRIDE = ROW_STRIDE;
#endif
};

// Copies one row of the left side in the kernel's format, padded with zero to an even length.
inline void copy_left(float* to, const float* from, int n) {
    std::memcpy(to, from, size_t(n) * 4);
    if (n & 1) to[n] = 0.0f;
}
inline void copy_left(uint32_t* to, const float* from, int n) {
    int i = 0;
#if defined(__AVX512BF16__)
    for (; i + 2 * VL <= n; i += 2 * VL)
        store(to + i / 2, (vu)_mm512_cvtne2ps_pbh((__m512)load(from + i + VL), (__m512)load(from + i)));
#else
    for (; i + 2 * VL <= n; i += 2 * VL) {
        const vu a = (vu)load(from + i), b = (vu)load(from + i + VL);
        using Lanes = std::make_integer_sequence<int, VL>;
        const vu even = narrow((vf)shuffle(a, b, every_second<0>(Lanes{})));
        store(to + i / 2, even | narrow((vf)shuffle(a, b, every_second<1>(Lanes{}))) << 16);
    }
#endif
    for (; i + 1 < n; i += 2) to[i / 2] = uint32_t(narrow(from[i])) | uint32_t(narrow(from[i + 1])) << 16;
    if (n & 1) to[n / 2] = narrow(from[n - 1]);
}

// A block of results: initial values (null: zeros; a stride of 0: the same for every row) and destination of the sums.
struct Sums {
    const float* from;
    int64_t from_stride;
    float* to;
    int64_t to_stride;
    Sums at(int64_t row, int64_t column) const {
        return {from ? from + row * from_stride + column : nullptr, from_stride, to + row * to_stride + column, to_stride};
    }
};

// to[R][G * GROUP] = from + left[R][2 * pairs] * right, where `right[g]` is the first column of group g.
template <int R, int G, class W>
void kernel(const typename W::Left* left, const typename W::Element* const* right, int pairs, const Sums& c) {
    vf sums[R][2 * G];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2 * G; ++j) sums[r][j] = c.from ? load(c.from + r * c.from_stride + j * VL) : vf{};
    const typename W::Element* w[G];
    for (int g = 0; g < G; ++g) w[g] = right[g];
    for (int p = 0; p < pairs; ++p) {
        for (int g = 0; g < G; ++g) {
            __builtin_prefetch(w[g] + 16 * W::PAIR);
            if constexpr (VL == 16) __builtin_prefetch(w[g] + 16 * W::PAIR + 16);
        }
        if constexpr (W::DOT) {
            vu b[2 * G];
            for (int j = 0; j < 2 * G; ++j) b[j] = load(w[j / 2] + (j % 2) * VL);
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < 2 * G; ++j) sums[r][j] = W::dot(sums[r][j], left[r * W::STRIDE], b[j]);
        } else {
            vf b[2 * G];
            for (int j = 0; j < 2 * G; ++j) b[j] = W::even(w[j / 2] + (j % 2) * VL);
            for (int r = 0; r < R; ++r) {
                float a = left[r * W::STRIDE];
                for (int j = 0; j < 2 * G; ++j) sums[r][j] += a * b[j];
            }
            for (int j = 0; j < 2 * G; ++j) b[j] = W::odd(w[j / 2] + (j % 2) * VL);
            for (int r = 0; r < R; ++r) {
                float a = left[r * W::STRIDE + 1];
                for (int j = 0; j < 2 * G; ++j) sums[r][j] += a * b[j];
            }
        }
        for (int g = 0; g < G; ++g) w[g] += W::PAIR;
        left += W::LEFT_PER_PAIR;
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < 2 * G; ++j) store(c.to + r * c.to_stride + j * VL, sums[r][j]);
}

template <class W>
using Kernel = void (*)(const typename W::Left*, const typename W::Element* const*, int, const Sums&);

template <class W, int... R>
Kernel<W> choose_kernel(int rows, bool wide, std::integer_sequence<int, R...>) {
    static constexpr Kernel<W> WIDE[] = {kernel<R + 1, groups_for(R + 1), W>...};
    static constexpr Kernel<W> NARROW[] = {kernel<R + 1, 1, W>...};
    return (wide ? WIDE : NARROW)[rows - 1];
}

// `panels` consecutive panels, `rows` <= KERNEL_ROWS: to[rows][panels * 32] = from + left[rows][2 * pairs] * right.
template <class W>
void multiply_vectors(const typename W::Left* left, int rows, const typename W::Element* right, int64_t panel_stride,
                      int panels, int pairs, const Sums& c) {
    using Rows = std::make_integer_sequence<int, KERNEL_ROWS>;
    int groups = panels * GROUPS_PER_PANEL;
    for (int group = 0; group < groups;) {
        bool wide = group + groups_for(rows) <= groups;
        int width = wide ? groups_for(rows) : 1;
        const typename W::Element* starts[MAX_GROUPS];
        for (int g = 0; g < width; ++g) {
            int index = group + g;
            starts[g] = right + (index / GROUPS_PER_PANEL) * panel_stride + (index % GROUPS_PER_PANEL) * GROUP;
        }
        choose_kernel<W>(rows, wide, Rows{})(left, starts, pairs, c.at(0, group * GROUP));
        group += width;
    }
}

// The same for `rows` <= W::ROWS. With tiles, `left` and `c.from` have readable memory up to a multiple of 16 rows.
template <class W>
void multiply(const typename W::Left* left, int rows, const typename W::Element* right, int64_t panel_stride, int panels,
              int pairs, const Sums& c) {
#if defined(TANDEM_TILES)
    if constexpr (W::TILES) {
        const int steps = pairs / TILE_PAIRS, rest = pairs % TILE_PAIRS;
        for (int panel = 0; panel < panels && steps;) {
            const auto* from_right = right + panel * panel_stride;
            const Sums sums = c.at(0, panel * PANEL);
            auto run = [&](auto tiles) {
                tiles(left, W::STRIDE, rows, from_right, panel_stride, steps, sums.from, sums.from_stride, sums.to,
                      sums.to_stride);
            };
            if (rows > TILE_ROWS)
                run(multiply_tiles<2, 1>), panel += 1;
            else if (panel + 2 <= panels)
                run(multiply_tiles<1, 2>), panel += 2;
            else
                run(multiply_tiles<1, 1>), panel += 1;
        }
        // Fewer pairs than a register has rows.
        const Sums sums = steps ? Sums{c.to, c.to_stride, c.to, c.to_stride} : c;
        for (int row = 0; row < rows && rest; row += KERNEL_ROWS)
            multiply_vectors<W>(left + row * W::STRIDE + steps * TILE_PAIRS, std::min(KERNEL_ROWS, rows - row),
                                right + int64_t(steps) * TILE_PAIRS * W::PAIR, panel_stride, panels, rest, sums.at(row, 0));
        return;
    }
#endif
    multiply_vectors<W>(left, rows, right, panel_stride, panels, pairs, c);
}

// Divides `count` items into blocks of at most `limit`, of nearly equal sizes that are multiples of `unit` (the last one
// need not be). `limit` is a multiple of `unit`. Block `i` begins at start(i).
struct Split {
    int count, unit, units, blocks;
    Split(int count, int limit, int unit = 1)
        : count(count), unit(unit), units((count + unit - 1) / unit), blocks((count + limit - 1) / limit) {}
    int start(int i) const { return std::min(count, int(int64_t(units) * i / blocks) * unit); }
    int size(int i) const { return start(i + 1) - start(i); }
};

// Divides k into runs. The length of all runs but the last is a multiple of a tile's.
struct KSplit {
    int k, length, blocks;
    explicit KSplit(int k) : k(k) {
        int wanted = (k + KC - 1) / KC;
        length = ((k + wanted - 1) / wanted + 31) & ~31;
        blocks = (k + length - 1) / length;
    }
    int start(int i) const { return i * length; }
    int size(int i) const { return std::min(length, k - i * length); }
};

// A weight [columns][k]; with `gated` two weights, gate and up, whose panels alternate, and the product's result is
// silu(gate) * up.
struct PackedWeights {
    const void* data;   // panels of `is_bf16 ? uint32_t : float`
    const float* bias;  // one float per packed column, or null
    int64_t columns, k;
    bool is_bf16, gated;
    int64_t pairs() const { return (k + 1) / 2; }
    int64_t panels_per_output() const { return gated ? 2 : 1; }
    int64_t panels() const { return (columns + PANEL - 1) / PANEL * panels_per_output(); }
};

// Rows whose copy stays in a core's L2 cache; with tiles a multiple of MAX_ROWS. The minimum bounds how often the weights
// are read. Processors with tiles have 2 MiB of L2 or more, and spend less time on what has been read.
template <class W>
int chunk_rows(int64_t k) {
    constexpr int64_t BYTES = W::TILES ? 1 << 20 : 576 << 10;
    const int64_t bytes_per_row = int64_t(KSplit(int(k)).blocks) * W::STRIDE * 4;
    if (W::TILES) return int(std::clamp<int64_t>(BYTES / bytes_per_row, 64, 512)) / MAX_ROWS * MAX_ROWS;
    return int(std::clamp<int64_t>(BYTES / bytes_per_row, 48, 192));
}

// The last tile may read up to MAX_ROWS rows beyond the chunk's.
template <class W>
size_t left_bytes(int64_t k) {
    return size_t(chunk_rows<W>(k) * KSplit(int(k)).blocks + MAX_ROWS) * W::STRIDE * 4;
}
constexpr size_t TILE_BYTES = size_t(512) * PANEL * 4 * 2;

// Panels computed together: several for few rows (parallel memory streams), as few as possible for many rows.
inline int panels_at_once(int rows, bool gated) { return rows <= KERNEL_ROWS ? 4 : gated ? 2 : 1; }

// y[rows, panels first..last] of one thread. `scratch` holds the thread's copy of the rows and a tile of results.
template <class W>
void multiply_share(const PackedWeights& weights, const float* x, int rows, int first_panel, int last_panel, float* y,
                    void* scratch) {
    using Left = typename W::Left;
    using Element = typename W::Element;
    const int k = int(weights.k);
    const KSplit runs(k);
    [[maybe_unused]] const typename W::Registers registers;
    const int64_t panel_stride = weights.pairs() * W::PAIR;
    Left* left = static_cast<Left*>(scratch);
    float* tile = reinterpret_cast<float*>(static_cast<char*>(scratch) + left_bytes<W>(k));
    const int unit = W::TILES ? W::ROWS : 1;
    const Split chunks(rows, chunk_rows<W>(k), unit);
    for (int chunk = 0; chunk < chunks.blocks; ++chunk) {
        const int row0 = chunks.start(chunk), count = chunks.size(chunk);
        for (int run = 0; run < runs.blocks; ++run)
            for (int r = 0; r < count; ++r)
                copy_left(left + (int64_t(run) * count + r) * W::STRIDE, x + int64_t(row0 + r) * k + runs.start(run),
                          runs.size(run));
        const Split blocks(count, W::ROWS, unit);
        const int step = panels_at_once(count, weights.gated), tile_stride = step * PANEL;
        for (int panel = first_panel; panel < last_panel; panel += step) {
            const int width = std::min(step, last_panel - panel);
            const int64_t column = panel / weights.panels_per_output() * PANEL, wanted = weights.columns - column;
            const Element* right = static_cast<const Element*>(weights.data) + panel * panel_stride;
            float* out = y + row0 * weights.columns + column;
            const bool direct = !weights.gated && width * PANEL <= wanted;  // the kernel writes to y
            for (int run = 0; run < runs.blocks; ++run) {
                Sums sums{tile, tile_stride, tile, tile_stride};
                if (run == 0) sums.from = weights.bias ? weights.bias + int64_t(panel) * PANEL : nullptr, sums.from_stride = 0;
                if (run == runs.blocks - 1 && direct) sums.to = out, sums.to_stride = weights.columns;
                for (int block = 0; block < blocks.blocks; ++block)
                    multiply<W>(left + (int64_t(run) * count + blocks.start(block)) * W::STRIDE, blocks.size(block),
                                right + int64_t(runs.start(run) / 2) * W::PAIR, panel_stride, width,
                                (runs.size(run) + 1) / 2, sums.at(blocks.start(block), 0));
            }
            if (direct) continue;
            for (int r = 0; r < count; ++r) {
                const float* from = tile + r * tile_stride;
                float* to = out + r * weights.columns;
                if (!weights.gated) std::memcpy(to, from, size_t(std::min<int64_t>(width * PANEL, wanted)) * 4);
                for (int64_t i = 0; weights.gated && i < width; i += 2)
                    silu_mul_row(from + i * PANEL, from + (i + 1) * PANEL, std::min<int64_t>(PANEL, wanted - i / 2 * PANEL),
                                 to + i / 2 * PANEL);
            }
        }
    }
}

}  // namespace tandem
