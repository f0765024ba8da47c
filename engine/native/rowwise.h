// Operations on single tokens: embedding, norms, rotation and cache write.
#pragma once

#include <cmath>

#include "simd.h"

namespace tandem {

template <class T>
void embed_row(const T* from, int64_t hidden, float* to) {
    int64_t j = 0;
    for (; j + VL <= hidden; j += VL) store(to + j, load_floats(from + j));
    for (; j < hidden; ++j) to[j] = load_float(from + j);
}

// residual += x; returns residual.
inline const float* add_row(const float* x, float* residual, int64_t n) {
    for (int64_t j = 0; j < n; ++j) residual[j] += x[j];
    return residual;
}

inline float sum_of_squares(const float* x, int64_t n) {
    vf sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * VL <= n; j += 4 * VL)
        for (int i = 0; i < 4; ++i) {
            vf v = load(x + j + i * VL);
            sums[i] += v * v;
        }
    float total = sum(sums[0] + sums[1] + (sums[2] + sums[3]));
    for (; j < n; ++j) total += x[j] * x[j];
    return total;
}

template <class T>
void rms_norm_row(const float* x, const T* weight, float eps, int64_t n, float* y) {
    const float factor = 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
    int64_t j = 0;
    for (; j + VL <= n; j += VL) store(y + j, load_floats(weight + j) * (load(x + j) * factor));
    for (; j < n; ++j) y[j] = load_float(weight + j) * (x[j] * factor);
}

template <class T>
void layer_norm_row(const float* x, const T* weight, const T* bias, float eps, int64_t n, float* y) {
    float total = 0.0f;
    for (int64_t j = 0; j < n; ++j) total += x[j];
    const float mean = total / float(n);
    for (int64_t j = 0; j < n; ++j) y[j] = x[j] - mean;
    const float factor = 1.0f / std::sqrt(sum_of_squares(y, n) / float(n) + eps);
    for (int64_t j = 0; j < n; ++j) y[j] = load_float(weight + j) * (y[j] * factor) + load_float(bias + j);
}

// silu(gate) * up. The last lanes are computed with the same vector arithmetic as the others.
inline void silu_mul_row(const float* gate, const float* up, int64_t n, float* y) {
    auto silu = [](vf g) { return g / (1.0f + exp(-g)); };
    int64_t j = 0;
    for (; j + VL <= n; j += VL) store(y + j, silu(load(gate + j)) * load(up + j));
    if (j == n) return;
    float tail[VL] = {};
    std::memcpy(tail, gate + j, size_t(n - j) * 4);
    store(tail, silu(load(tail)));
    for (int64_t i = j; i < n; ++i) y[i] = tail[i - j] * up[i];
}

// Pairs element i with i + dim / 2, as Hugging Face does. `cos_sin`: dim / 2 cosines, then their sines.
inline void rotate(float* x, const float* cos_sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half], c = cos_sin[i], s = cos_sin[i + half];
        x[i] = first * c - second * s;
        x[i + half] = second * c + first * s;
    }
}

template <class T>
void store_row(T* to, const float* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store_float(to + i, from[i]);
}
template <>
inline void store_row<float>(float* to, const float* from, int64_t n) {
    std::memcpy(to, from, size_t(n) * 4);
}

struct RopeShape {
    int64_t heads, kv_heads, head_dim, block_size, num_blocks;
    float eps;
};

// Normalises and rotates one token's qkv[(heads + 2 kv_heads) * head_dim] in place, and writes its keys and values to the
// cache at `slot`.
template <class Kv, class T>
void rope_and_cache_row(const RopeShape& shape, float* qkv, const float* cos_sin, int64_t slot, Kv* kv_layer,
                        const T* q_norm, const T* k_norm) {
    const int64_t dim = shape.head_dim;
    for (int64_t head = 0; head < shape.heads + shape.kv_heads; ++head) {
        float* x = qkv + head * dim;
        const T* norm = head < shape.heads ? q_norm : k_norm;
        if (norm) rms_norm_row(x, norm, shape.eps, dim, x);
        if (cos_sin) rotate(x, cos_sin, dim);
    }
    const int64_t head_elements = shape.block_size * dim;
    Kv* keys = kv_layer + slot / shape.block_size * shape.kv_heads * head_elements + slot % shape.block_size * dim;
    Kv* values = keys + shape.num_blocks * shape.kv_heads * head_elements;
    const float* from = qkv + shape.heads * dim;
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
        store_row(keys + head * head_elements, from + head * dim, dim);
        store_row(values + head * head_elements, from + (shape.kv_heads + head) * dim, dim);
    }
}

}  // namespace tandem
