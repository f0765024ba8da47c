// Codes of KV for its way over a network. `core/kv_codec.py` has the formats; the bits are those of
// `kv_transfer/torch_codec.py`.
#pragma once

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "simd.h"

namespace tandem {

enum class KvCodec { fp8 = 0, int8 = 1, int4 = 2 };  // the numbers are those of engine/ops/kv_codec.py

typedef bf16 narrow_vector __attribute__((vector_size(VL * 2), aligned(2), may_alias));
typedef uint8_t byte_vector __attribute__((vector_size(VL), aligned(1), may_alias));

inline void load_all(const float* from, float* to, int64_t count) { std::memcpy(to, from, size_t(count) * 4); }
inline void load_all(const bf16* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + VL <= count; i += VL) store(to + i, load_floats(from + i));
    for (; i < count; ++i) to[i] = widen(from[i]);
}
inline void store_all(const float* from, float* to, int64_t count) { std::memcpy(to, from, size_t(count) * 4); }
inline void store_all(const float* from, bf16* to, int64_t count) {
    int64_t i = 0;
    for (; i + VL <= count; i += VL)
        *reinterpret_cast<narrow_vector*>(to + i) = __builtin_convertvector(narrow(load(from + i)), narrow_vector);
    for (; i < count; ++i) to[i] = narrow(from[i]);
}

// Least and greatest of some numbers. `unsound` is 0, or NaN where one of them is not finite.
struct Range {
    float low = INFINITY, high = -INFINITY, unsound = 0.0f;

    static Range of(const float* x, int64_t count) {
        vf low = splat(INFINITY), high = splat(-INFINITY), unsound = {};
        int64_t i = 0;
        for (; i + VL <= count; i += VL) {
            const vf v = load(x + i);
            low = min(low, v);
            high = max(high, v);
            unsound += v * 0.0f;
        }
        Range range{-highest(-low), highest(high), sum(unsound)};
        for (; i < count; ++i) {
            range.low = x[i] < range.low ? x[i] : range.low;
            range.high = x[i] > range.high ? x[i] : range.high;
            range.unsound += x[i] * 0.0f;
        }
        return range;
    }
};

inline float round_down_to_bf16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::bit_cast<float>((bits + (bits >> 31 ? 0xffffu : 0u)) & 0xffff0000u);
}
inline float round_up_to_bf16(float positive) {
    return std::bit_cast<float>((std::bit_cast<uint32_t>(positive) + 0xffffu) & 0xffff0000u);
}
inline bf16 high_half(float x) { return bf16(std::bit_cast<uint32_t>(x) >> 16); }

// To the nearest e4m3, ties to even, in the low bytes of the words; |x| <= 448. Below 2^-6 they are multiples of 2^-9,
// which is the last bit of floats from 2^14 on.
inline vu to_e4m3(vf x) {
    const vu bits = (vu)x, size = bits & 0x7fffffffu;
    const vu small = (vu)((vf)size + 16384.0f) & 0xffu;
    const vu normal = ((size + 0x7ffffu + ((size >> 20) & 1u)) >> 20) - (120u << 3);
    return (bits >> 24 & 0x80u) | (size < 0x3c800000u ? small : normal);
}
inline vf from_e4m3(vu codes) {
    const vu size = codes & 0x7fu;
    const vf small = __builtin_convertvector((vi)size, vf) * 0x1p-9f;
    const vu normal = (size << 20) + (120u << 23);
    return (vf)((size < 8u ? (vu)small : normal) | (codes & 0x80u) << 24);
}

// Codes the head blocks of one shape, one at a time.
class HeadBlockCoder {
public:
    HeadBlockCoder(KvCodec codec, int64_t slots, int64_t dim)
        : codec_(codec), slots_(slots), dim_(dim), floats_(size_t(slots * dim + VL)), codes_(size_t(slots * dim) + 1),
          lows_(groups_most()), highs_(groups_most()), inverses_(groups_most()) {}

    int64_t elements() const { return slots_ * dim_; }
    int64_t coded_bytes(bool is_value) const {
        const int64_t codes = codec_ == KvCodec::int4 ? (elements() + 1) / 2 : elements();
        return (parameter_bytes(is_value) + codes + 3) & ~int64_t(3);
    }

    template <class Element>
    void encode(const Element* x, bool is_value, uint8_t* coded) {
        load_all(x, floats_.data(), elements());
        std::memset(coded + coded_bytes(is_value) - 4, 0, 4);  // what the codes leave of it
        if (codec_ == KvCodec::fp8)
            encode_floats(coded);
        else
            encode_integers(is_value, coded);
    }

    template <class Element>
    void decode(const uint8_t* coded, bool is_value, Element* x) {
        if (codec_ == KvCodec::fp8)
            decode_floats(coded);
        else
            decode_integers(is_value, coded);
        store_all(floats_.data(), x, elements());
    }

private:
    size_t groups_most() const { return size_t(std::max(slots_, dim_)); }
    int64_t groups(bool is_value) const { return is_value ? slots_ : dim_; }
    int64_t parameter_bytes(bool is_value) const { return codec_ == KvCodec::fp8 ? 4 : 4 * groups(is_value); }

    void encode_floats(uint8_t* coded) {
        const Range range = Range::of(floats_.data(), elements());
        const float scale = power_of_two(std::max(range.high, -range.low)) + range.unsound, inverse = 1.0f / scale;
        std::memcpy(coded, &scale, 4);
        const auto encode = [&](int64_t i) {
            return __builtin_convertvector(to_e4m3(load(floats_.data() + i) * inverse), byte_vector);
        };
        int64_t i = 0;
        for (; i + VL <= elements(); i += VL) *reinterpret_cast<byte_vector*>(coded + 4 + i) = encode(i);
        const byte_vector rest = encode(i);
        std::memcpy(coded + 4 + i, &rest, size_t(elements() - i));
    }

    void decode_floats(const uint8_t* coded) {
        float scale;
        std::memcpy(&scale, coded, 4);
        const auto decode = [&](int64_t i, byte_vector codes) {
            store(floats_.data() + i, from_e4m3(__builtin_convertvector(codes, vu)) * scale);
        };
        int64_t i = 0;
        for (; i + VL <= elements(); i += VL) decode(i, *reinterpret_cast<const byte_vector*>(coded + 4 + i));
        byte_vector rest = {};
        std::memcpy(&rest, coded + 4 + i, size_t(elements() - i));
        decode(i, rest);
    }

    // The least that brings `size` to 448 at most; not so small that its inverse would be infinite.
    static float power_of_two(float size) {
        int exponent = -118;
        if (size > 0.0f && size <= FLT_MAX) {
            const float fraction = std::frexp(size, &exponent);
            exponent = std::max(exponent - 9 + (fraction > 0.875f), -118);
        }
        return std::ldexp(1.0f, exponent);
    }

    void encode_integers(bool is_value, uint8_t* coded) {
        const int64_t count = groups(is_value);
        float *lows = lows_.data(), *highs = highs_.data(), *inverses = inverses_.data();
        measure(is_value, lows, highs, inverses);
        const float levels = codec_ == KvCodec::int4 ? 15.0f : 255.0f;
        for (int64_t group = 0; group < count; ++group) {
            const float low = round_down_to_bf16(lows[group] + 0.0f);
            const float width = (highs[group] - low) / levels;
            const float step = round_up_to_bf16(width > FLT_MIN ? width : FLT_MIN) + inverses[group];
            const bf16 stored[2] = {high_half(low), high_half(step)};
            std::memcpy(coded + 2 * group, stored, 2);
            std::memcpy(coded + 2 * (count + group), stored + 1, 2);
            lows[group] = low;
            inverses[group] = 1.0f / step;
        }
        uint8_t* codes = coded + parameter_bytes(is_value);
        uint8_t* each = codec_ == KvCodec::int4 ? codes_.data() : codes;
        for (int64_t slot = 0; slot < slots_; ++slot) {
            const float* x = floats_.data() + slot * dim_;
            uint8_t* to = each + slot * dim_;
            if (is_value)
                for (int64_t i = 0; i < dim_; ++i) to[i] = nearest((x[i] - lows[slot]) * inverses[slot]);
            else
                for (int64_t i = 0; i < dim_; ++i) to[i] = nearest((x[i] - lows[i]) * inverses[i]);
        }
        if (codec_ != KvCodec::int4) return;
        const int64_t half = (elements() + 1) / 2;
        codes_[size_t(elements())] = 0;  // where their number is odd
        for (int64_t i = 0; i < half; ++i) codes[i] = uint8_t(each[i] | each[half + i] << 4);
    }

    static uint8_t nearest(float x) { return uint8_t(int32_t(std::rint(x))); }

    // Of each group, into lows, highs and unsounds.
    void measure(bool is_value, float* lows, float* highs, float* unsounds) {
        if (is_value) {
            for (int64_t slot = 0; slot < slots_; ++slot) {
                const Range range = Range::of(floats_.data() + slot * dim_, dim_);
                lows[slot] = range.low, highs[slot] = range.high, unsounds[slot] = range.unsound;
            }
            return;
        }
        std::fill_n(lows, dim_, INFINITY), std::fill_n(highs, dim_, -INFINITY), std::fill_n(unsounds, dim_, 0.0f);
        for (int64_t slot = 0; slot < slots_; ++slot) {
            const float* x = floats_.data() + slot * dim_;
            for (int64_t i = 0; i < dim_; ++i) {
                lows[i] = x[i] < lows[i] ? x[i] : lows[i];
                highs[i] = x[i] > highs[i] ? x[i] : highs[i];
                unsounds[i] += x[i] * 0.0f;
            }
        }
    }

    void decode_integers(bool is_value, const uint8_t* coded) {
        const int64_t count = groups(is_value);
        float *lows = lows_.data(), *steps = inverses_.data();
        for (int64_t group = 0; group < count; ++group) {
            bf16 stored[2];
            std::memcpy(stored, coded + 2 * group, 2);
            std::memcpy(stored + 1, coded + 2 * (count + group), 2);
            lows[group] = widen(stored[0]);
            steps[group] = widen(stored[1]);
        }
        const uint8_t* codes = coded + parameter_bytes(is_value);
        if (codec_ == KvCodec::int4) {
            const int64_t half = (elements() + 1) / 2;
            for (int64_t i = 0; i < half; ++i) codes_[size_t(i)] = codes[i] & 15;
            for (int64_t i = 0; i < half; ++i) codes_[size_t(half + i)] = codes[i] >> 4;
            codes = codes_.data();
        }
        for (int64_t slot = 0; slot < slots_; ++slot) {
            const uint8_t* from = codes + slot * dim_;
            float* x = floats_.data() + slot * dim_;
            if (is_value)
                for (int64_t i = 0; i < dim_; ++i) x[i] = lows[slot] + float(int32_t(from[i])) * steps[slot];
            else
                for (int64_t i = 0; i < dim_; ++i) x[i] = lows[i] + float(int32_t(from[i])) * steps[i];
        }
    }

    KvCodec codec_;
    int64_t slots_, dim_;
    std::vector<float> floats_;  // a vector more than there are elements
    std::vector<uint8_t> codes_;
    std::vector<float> lows_, highs_, inverses_;
};

// body(coder, head block, whether it is of values, its code) for [layer, kv, head block, slot, dim], where kv is 0 for keys
// and 1 for values; the codes are in the same order.
template <class Element, class Byte, class Body>
void each_head_block(KvCodec codec, Element* kv, Byte* coded, int64_t layers, int64_t head_blocks, int64_t slots,
                     int64_t dim, Body body) {
    HeadBlockCoder coder(codec, slots, dim);
    for (int64_t row = 0; row < 2 * layers; ++row) {
        const bool is_value = row % 2;
        for (int64_t i = 0; i < head_blocks; ++i, kv += coder.elements(), coded += coder.coded_bytes(is_value))
            body(coder, kv, is_value, coded);
    }
}

}  // namespace tandem
