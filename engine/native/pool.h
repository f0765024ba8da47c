// The threads of one engine. Not OpenMP's threads: torch brings an OpenMP runtime, a second one would spin against it,
// and its spinning time cannot be set here.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tandem {

class Pool {
public:
    // Throws std::system_error where the system has no more threads.
    explicit Pool(int threads) {
        try {
            for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {
            stop();
            throw;
        }
    }
    ~Pool() { stop(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return int(workers_.size()) + 1; }

    // body(thread) on every thread; the caller is thread 0. Returns when all threads have finished.
    template <class Body>
    void run(Body body) {
        job_ = [](void* data, int thread) { (*static_cast<Body*>(data))(thread); };
        data_ = &body;
        running_.store(int(workers_.size()), std::memory_order_relaxed);
        start();
        body(0);
        for (int turn = 0; running_.load(std::memory_order_acquire) != 0; ++turn)
            if (turn < SPINS)
                relax();
            else
                std::this_thread::yield();
    }

private:
    // About 50 microseconds: longer than the pause between two operations of a step, and short enough that an idle engine
    // does not occupy its cores.
    static constexpr int SPINS = 1500;

    static void relax() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
    void start() {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }
    void stop() {
        job_ = nullptr;
        start();
        for (auto& worker : workers_) worker.join();
    }
    void work(int thread) {
        uint32_t seen = 0;
        while (true) {
            for (int turn = 0; turn < SPINS && generation_.load(std::memory_order_acquire) == seen; ++turn) relax();
            generation_.wait(seen, std::memory_order_acquire);
            ++seen;
            if (job_ == nullptr) return;
            job_(data_, thread);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::vector<std::thread> workers_;
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<int> running_{0};
    void (*job_)(void*, int) = nullptr;
    void* data_ = nullptr;
};

}  // namespace tandem
