// Vectors of floats and of 32-bit words in the machine's width, with the compilers' vector extensions: one source for
// AVX-512, AVX2, SSE2 and NEON. Intrinsics are used only where the extensions do not suffice.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace tandem {

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(VL * 4), may_alias));
typedef float vf_unaligned __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(VL * 4), may_alias));
// Words are pairs of bf16, too, which begin at any even address.
typedef uint32_t vu_unaligned __attribute__((vector_size(VL * 4), aligned(2), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4), may_alias));

using bf16 = uint16_t;

inline vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
inline vu load(const uint32_t* p) { return *reinterpret_cast<const vu_unaligned*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
inline void store(uint32_t* p, vu v) { *reinterpret_cast<vu_unaligned*>(p) = v; }
inline vf splat(float x) { return x - vf{}; }
#if defined(__AVX512F__)
inline vf max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
inline vf min(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
inline vf max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
inline vf min(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline vf max(vf a, vf b) { return a > b ? a : b; }
inline vf min(vf a, vf b) { return a < b ? a : b; }
#endif

inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0.0f;
    for (int i = 0; i < VL; ++i) total += v[i];
    return total;
#endif
}

inline float highest(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float result = v[0];
    for (int i = 1; i < VL; ++i) result = v[i] > result ? v[i] : result;
    return result;
#endif
}

inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

// To the nearest bf16, ties to even; a NaN stays a NaN.
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16((bits >> 16) | 0x40u);
    return bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// The same for a vector, in the low halves of the words.
inline vu narrow(vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    vu quiet = (bits >> 16) | 0x40u;
    return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

// VL consecutive values as floats.
inline vf load_floats(const float* p) { return load(p); }
inline vf load_floats(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vu words;
    for (int i = 0; i < VL; ++i) words[i] = uint32_t(p[i]) << 16;
    return (vf)words;
#endif
}
inline float load_float(const float* p) { return *p; }
inline float load_float(const bf16* p) { return widen(*p); }
inline void store_float(float* p, float x) { *p = x; }
inline void store_float(bf16* p, float x) { *p = narrow(x); }

// e^x to about 2 ulp for x <= 88, 0 below -87. Range reduction by ln 2 in two parts, then the polynomial of Cephes' expf.
inline vf exp(vf x) {
    vf clamped = min(max(x, splat(-87.0f)), splat(88.0f));
    vf shifted = clamped * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
    vf n = shifted - 12582912.0f;
    vf r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi exponent = ((vi)shifted - 0x4b400000 + 127) << 23;
    vf result = p * (vf)exponent;
    return x < -87.0f ? vf{} : result;
}

// 2^x to about 2 ulp for x <= 0, 0 below -126. The polynomial is a minimax fit of (2^r - 1) / r for |r| <= 1/2.
inline vf exp2(vf x) {
    vf clamped = max(x, splat(-126.0f));
    vf shifted = clamped + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
    vf r = clamped - (shifted - 12582912.0f);
    vf p = splat(1.3264723893e-3f);
    p = p * r + 9.6715128696e-3f;
    p = p * r + 5.5507337542e-2f;
    p = p * r + 2.4022242080e-1f;
    p = p * r + 6.9314697759e-1f;
    p = p * r + 1.0f;
    vi exponent = ((vi)shifted - 0x4b400000 + 127) << 23;
    vf result = p * (vf)exponent;
    return x < -126.0f ? vf{} : result;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TANDEM_SHUFFLEVECTOR 1
#endif
#endif

template <int... I>
inline vu shuffle(vu a, vu b, std::integer_sequence<int, I...>) {
#if defined(TANDEM_SHUFFLEVECTOR)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, vu{I...});
#endif
}

// Lanes of stage S of a butterfly transposition: the first output keeps a where bit S of the lane is clear.
template <int S, int... J>
constexpr auto first_lanes(std::integer_sequence<int, J...>) {
    return std::integer_sequence<int, ((J & S) ? VL + J - S : J)...>{};
}
template <int S, int... J>
constexpr auto second_lanes(std::integer_sequence<int, J...>) {
    return std::integer_sequence<int, ((J & S) ? VL + J : J + S)...>{};
}

// The lanes of two vectors in turn, beginning with lane FIRST of each.
template <int FIRST, int... J>
constexpr auto in_turn(std::integer_sequence<int, J...>) {
    return std::integer_sequence<int, (FIRST + J / 2 + (J % 2) * VL)...>{};
}

// Every second lane of two concatenated vectors, beginning with lane FIRST.
template <int FIRST, int... J>
constexpr auto every_second(std::integer_sequence<int, J...>) {
    return std::integer_sequence<int, FIRST + 2 * J...>{};
}

template <int S>
inline void transpose_stage(vu* rows) {
    using Lanes = std::make_integer_sequence<int, VL>;
    for (int i = 0; i < VL; ++i) {
        if (i & S) continue;
        vu a = rows[i], b = rows[i + S];
        rows[i] = shuffle(a, b, first_lanes<S>(Lanes{}));
        rows[i + S] = shuffle(a, b, second_lanes<S>(Lanes{}));
    }
}

// A square of VL x VL words, in registers.
inline void transpose(vu* rows) {
    transpose_stage<1>(rows);
    transpose_stage<2>(rows);
    if constexpr (VL >= 8) transpose_stage<4>(rows);
    if constexpr (VL >= 16) transpose_stage<8>(rows);
}

}  // namespace tandem
