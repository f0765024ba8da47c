// Sums and messages between the ranks of one instance, through memory that they all map. Every wait ends early when the
// abort word is set, and at the latest after its timeout.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

enum Outcome { DONE = 0, ABORTED = 1, TIMED_OUT = 2 };

inline int64_t load(const int64_t* word) {
    return std::atomic_ref<int64_t>(*const_cast<int64_t*>(word)).load(std::memory_order_acquire);
}
inline void publish(int64_t* word, int64_t value) {
    std::atomic_ref<int64_t>(*word).store(value, std::memory_order_release);
}

struct Waiter {
    const int64_t* abort;
    int64_t timeout_ns;

    // Spins for about 100 microseconds, which is longer than ranks of equal shares are apart, then yields its core, and
    // after a millisecond sleeps: a rank may wait for a whole step of another pipeline stage.
    template <class Condition>
    Outcome until(Condition condition) const {
        for (int turn = 0; turn < SPINS; ++turn) {
            if (condition()) return DONE;
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
        const auto begin = std::chrono::steady_clock::now();
        while (!condition()) {
            if (load(abort)) return ABORTED;
            const auto waited = std::chrono::steady_clock::now() - begin;
            if (waited > std::chrono::nanoseconds(timeout_ns)) return TIMED_OUT;
            if (waited < YIELDING)
                std::this_thread::yield();
            else
                std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
        return DONE;
    }

    static constexpr int SPINS = 3000;
    static constexpr std::chrono::milliseconds YIELDING{1};
};

// Each rank writes its summand to a slot of its own and publishes a stamp; when it has seen all stamps, it adds up all
// slots in the order of the ranks, so that all ranks get the same bits. Two slots a rank, used in turn: a peer's stamp
// for the sum before shows that it has read what is in the other slot.
struct AllReduce {
    char* stamps;  // one int64 a rank, 64 bytes apart: the number of sums that the rank has begun
    float* slots;  // [rank][2][slot_floats]
    int64_t slot_floats, ranks, rank;

    // The sums that are numbered from `sequence` on: one for each `slot_floats` floats, and one where there are none.
    Outcome run(const Waiter& waiter, int64_t sequence, float* x, int64_t count) const {
        for (int64_t begin = 0; begin == 0 || begin < count; begin += slot_floats, ++sequence) {
            const int64_t size = std::min(slot_floats, count - begin);
            std::memcpy(slot(rank, sequence), x + begin, size_t(size) * sizeof(float));
            publish(stamp(rank), sequence + 1);
            for (int64_t peer = 0; peer < ranks; ++peer) {
                const Outcome outcome = waiter.until([&] { return load(stamp(peer)) > sequence; });
                if (outcome != DONE) return outcome;
            }
            float* sum = x + begin;
            std::memcpy(sum, slot(0, sequence), size_t(size) * sizeof(float));
            for (int64_t peer = 1; peer < ranks; ++peer) {
                const float* summand = slot(peer, sequence);
                for (int64_t i = 0; i < size; ++i) sum[i] += summand[i];
            }
        }
        return DONE;
    }

    int64_t* stamp(int64_t of) const { return reinterpret_cast<int64_t*>(stamps + 64 * of); }
    float* slot(int64_t of, int64_t sequence) const { return slots + (of * 2 + (sequence & 1)) * slot_floats; }
};

// Messages from one rank to one other, in pieces of at most a slot. Both sides know the sizes.
struct Mailbox {
    char* memory;  // pieces written (int64), at byte 64 pieces read (int64), at byte 128 the slots
    int64_t depth, slot_bytes;

    Outcome send(const Waiter& waiter, const char* data, int64_t count) const {
        for (int64_t begin = 0; begin < count; begin += slot_bytes) {
            const int64_t piece = load(written());
            const Outcome outcome = waiter.until([&] { return piece - load(read()) < depth; });
            if (outcome != DONE) return outcome;
            std::memcpy(slot(piece), data + begin, size_t(std::min(slot_bytes, count - begin)));
            publish(written(), piece + 1);
        }
        return DONE;
    }
    Outcome receive(const Waiter& waiter, char* data, int64_t count) const {
        for (int64_t begin = 0; begin < count; begin += slot_bytes) {
            const int64_t piece = load(read());
            const Outcome outcome = waiter.until([&] { return load(written()) > piece; });
            if (outcome != DONE) return outcome;
            std::memcpy(data + begin, slot(piece), size_t(std::min(slot_bytes, count - begin)));
            publish(read(), piece + 1);
        }
        return DONE;
    }

    int64_t* written() const { return reinterpret_cast<int64_t*>(memory); }
    int64_t* read() const { return reinterpret_cast<int64_t*>(memory + 64); }
    char* slot(int64_t piece) const { return memory + 128 + piece % depth * slot_bytes; }
};

}  // namespace tandem
