// Copies of many pieces of memory that are not read again soon: stores go past the caches, so that a line of the target
// is not read from memory before it is overwritten, and what the engine works on stays in the caches.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tandem {

#if defined(__AVX512F__)
using StreamLine = __m512i;
inline StreamLine load_line(const char* p) { return _mm512_loadu_si512(p); }
inline void stream_line(char* p, StreamLine line) { _mm512_stream_si512(reinterpret_cast<StreamLine*>(p), line); }
#elif defined(__AVX__)
using StreamLine = __m256i;
inline StreamLine load_line(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const StreamLine*>(p)); }
inline void stream_line(char* p, StreamLine line) { _mm256_stream_si256(reinterpret_cast<StreamLine*>(p), line); }
#elif defined(__SSE2__)
using StreamLine = __m128i;
inline StreamLine load_line(const char* p) { return _mm_loadu_si128(reinterpret_cast<const StreamLine*>(p)); }
inline void stream_line(char* p, StreamLine line) { _mm_stream_si128(reinterpret_cast<StreamLine*>(p), line); }
#endif

#if defined(__SSE2__)
inline void copy_piece(char* target, const char* source, int64_t bytes) {
    constexpr int64_t width = sizeof(StreamLine), ahead = 1024;
    const int64_t before = -reinterpret_cast<intptr_t>(target) & (width - 1);  // streamed lines are aligned
    const int64_t head = before < bytes ? before : bytes;
    std::memcpy(target, source, size_t(head));
    int64_t at = head;
    for (; at + 4 * width <= bytes; at += 4 * width) {
        for (int64_t line = 0; line < 4 * width; line += 64) _mm_prefetch(source + at + ahead + line, _MM_HINT_T0);
        const StreamLine a = load_line(source + at), b = load_line(source + at + width);
        const StreamLine c = load_line(source + at + 2 * width), d = load_line(source + at + 3 * width);
        stream_line(target + at, a);
        stream_line(target + at + width, b);
        stream_line(target + at + 2 * width, c);
        stream_line(target + at + 3 * width, d);
    }
    std::memcpy(target + at, source + at, size_t(bytes - at));
}
inline void finish_copies() { _mm_sfence(); }
#else
inline void copy_piece(char* target, const char* source, int64_t bytes) { std::memcpy(target, source, size_t(bytes)); }
inline void finish_copies() {}
#endif

// `count` pieces of `bytes` each; piece i begins at offset `*_offsets[i]` of its side. They do not overlap.
inline void copy_pieces(char* target, const int64_t* target_offsets, const char* source, const int64_t* source_offsets,
                        int64_t count, int64_t bytes) {
    for (int64_t i = 0; i < count; ++i) copy_piece(target + target_offsets[i], source + source_offsets[i], bytes);
    finish_copies();
}

}  // namespace tandem
