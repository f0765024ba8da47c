// Products of bf16 matrices with the tile registers of AMX (Intel's Sapphire Rapids and later): a register holds 16 rows of
// 64 bytes, and one instruction multiplies 16 x 32 by 32 x 16 bf16 values and adds 16 x 16 floats.
//
// The operand order is that of gemm.h: a panel's rows are pairs of k. All rows of a result are computed in the same way,
// whether a tile is full or has one row, so a row's result does not depend on the batch.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

// The emulations are for tests where there are no such instructions.
#if defined(TANDEM_EMULATE_TILES)
#define TANDEM_TILES 1
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && !defined(TANDEM_EMULATE_BF16_DOT)
#define TANDEM_TILES 1
#endif

#if defined(TANDEM_TILES)

namespace tandem {

constexpr int TILE_ROWS = 16;   // of the left side and of a result
constexpr int TILE_COLUMNS = 16;  // floats or pairs of bf16 in a row of a register
constexpr int TILE_PAIRS = 16;  // of k, in one instruction

#if defined(TANDEM_EMULATE_TILES)
struct Tile {
    uint32_t words[TILE_ROWS][TILE_COLUMNS];
};
inline thread_local Tile emulated_tiles[8];

template <int T>
void tile_zero() {
    emulated_tiles[T] = {};
}
template <int T>
void tile_load(const void* from, int64_t stride_bytes) {
    for (int r = 0; r < TILE_ROWS; ++r)
        std::memcpy(emulated_tiles[T].words[r], static_cast<const char*>(from) + r * stride_bytes, 64);
}
template <int T>
void tile_store(void* to, int64_t stride_bytes) {
    for (int r = 0; r < TILE_ROWS; ++r)
        std::memcpy(static_cast<char*>(to) + r * stride_bytes, emulated_tiles[T].words[r], 64);
}
template <int C, int A, int B>
void tile_dot() {
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int c = 0; c < TILE_COLUMNS; ++c) {
            float even = 0.0f, odd = 0.0f, sum;
            for (int p = 0; p < TILE_PAIRS; ++p) {
                const uint32_t a = emulated_tiles[A].words[r][p], b = emulated_tiles[B].words[p][c];
                even += widen(bf16(a)) * widen(bf16(b));
                odd += widen(bf16(a >> 16)) * widen(bf16(b >> 16));
            }
            std::memcpy(&sum, &emulated_tiles[C].words[r][c], 4);
            sum += even + odd;
            std::memcpy(&emulated_tiles[C].words[r][c], &sum, 4);
        }
}
struct TileRegisters {};

#else
// Assembly: GCC's intrinsics do not take a template's argument for a register, nor tell that they read memory.
template <int T>
inline void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// A thread's tile registers, all with 16 rows of 64 bytes. Other libraries of the process configure them differently, so
// this lives no longer than one of our operations. The process has permission to use them: engine/ops/native_library.py.
struct TileRegisters {
    TileRegisters() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int i = 0; i < 8; ++i) shape.row_bytes[i] = 64, shape.rows[i] = TILE_ROWS;
        __asm__ volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~TileRegisters() { __asm__ volatile("tilerelease"); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};
#endif

// to[rows][32 * PANELS] = from + left[rows][32 * steps] * right, in registers of two row tiles (ROW_TILES = 2, one panel) or
// of one row tile and up to two panels. `rows` <= 16 * ROW_TILES. `left` has readable memory for full tiles, as has `from`.
// Strides count elements: words of `left` and `right`, floats of the sums.
template <int ROW_TILES, int PANELS>
void multiply_tiles(const uint32_t* left, int64_t left_stride, int rows, const uint32_t* right, int64_t panel_stride,
                    int steps, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    static_assert(ROW_TILES * PANELS <= 2, "four results, and four registers for operands");
    constexpr int PANEL_WORDS = 2 * TILE_COLUMNS;  // a row of a panel
    constexpr bool TALL = ROW_TILES == 2, WIDE = PANELS == 2;
    const int64_t row_bytes = left_stride * 4, from_bytes = from_stride * 4;
    // Results 0 and 1: the first panel's halves. Results 2 and 3: the same of the second row tile, or the second panel.
    const float* from2 = !from ? nullptr : TALL ? from + TILE_ROWS * from_stride : from + PANEL_WORDS;
    if (from) {
        tile_load<0>(from, from_bytes);
        tile_load<1>(from + TILE_COLUMNS, from_bytes);
        if constexpr (TALL || WIDE) {
            tile_load<2>(from2, from_bytes);
            tile_load<3>(from2 + TILE_COLUMNS, from_bytes);
        }
    } else {
        tile_zero<0>();
        tile_zero<1>();
        if constexpr (TALL || WIDE) {
            tile_zero<2>();
            tile_zero<3>();
        }
    }
    for (int step = 0; step < steps; ++step) {
        const uint32_t *a = left + step * TILE_PAIRS, *b = right + int64_t(step) * TILE_PAIRS * PANEL_WORDS;
        tile_load<4>(a, row_bytes);
        tile_load<6>(b, PANEL_WORDS * 4);
        tile_load<7>(b + TILE_COLUMNS, PANEL_WORDS * 4);
        tile_dot<0, 4, 6>();
        tile_dot<1, 4, 7>();
        if constexpr (TALL) {
            tile_load<5>(a + TILE_ROWS * left_stride, row_bytes);
            tile_dot<2, 5, 6>();
            tile_dot<3, 5, 7>();
        } else if constexpr (WIDE) {
            tile_load<5>(b + panel_stride, PANEL_WORDS * 4);
            tile_load<6>(b + panel_stride + TILE_COLUMNS, PANEL_WORDS * 4);
            tile_dot<2, 4, 5>();
            tile_dot<3, 4, 6>();
        }
    }
    alignas(64) float results[ROW_TILES * PANELS * TILE_ROWS * PANEL_WORDS];
    const bool is_full = rows == ROW_TILES * TILE_ROWS;
    float* out = is_full ? to : results;
    const int64_t out_stride = is_full ? to_stride : PANELS * PANEL_WORDS;
    float* out2 = TALL ? out + TILE_ROWS * out_stride : out + PANEL_WORDS;
    tile_store<0>(out, out_stride * 4);
    tile_store<1>(out + TILE_COLUMNS, out_stride * 4);
    if constexpr (TALL || WIDE) {
        tile_store<2>(out2, out_stride * 4);
        tile_store<3>(out2 + TILE_COLUMNS, out_stride * 4);
    }
    if (is_full) return;
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < PANELS * PANEL_WORDS; i += VL) store(to + r * to_stride + i, load(results + r * out_stride + i));
}

}  // namespace tandem

#endif
