// The functions that Python calls through ctypes: pointers and sizes, no torch headers, so that a compiler is the only
// requirement. The caller has checked shapes, dtypes and contiguity. Every function takes the context of one engine: its
// threads and their scratch memory. A context is not thread-safe. Functions that compute return 0, or 1 where memory is
// short; no exception leaves the library.

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "collectives.h"
#include "copy.h"
#include "gemm.h"
#include "kv_codec.h"
#include "pool.h"
#include "rowwise.h"

using namespace tandem;

namespace {

struct Free {
    void operator()(void* p) const { std::free(p); }
};

// New tokens [first_token, last_token) of a sequence, for one key/value head.
struct Task {
    int sequence, first_token, last_token, kv_head;
};

struct Context {
    Pool pool;
    std::vector<std::unique_ptr<void, Free>> scratch;
    size_t scratch_bytes = 0;
    std::vector<Task> tasks;

    explicit Context(int threads) : pool(threads), scratch(size_t(threads)) { reserve(sizeof(AttentionScratch)); }

    // Throws std::bad_alloc; the memory of before is kept then.
    void reserve(size_t bytes) {
        if (bytes <= scratch_bytes) return;
        const size_t wanted = (bytes + 4095) & ~size_t(4095);
        std::vector<std::unique_ptr<void, Free>> larger(scratch.size());
        for (auto& memory : larger) {
            memory.reset(std::aligned_alloc(4096, wanted));
            if (!memory) throw std::bad_alloc();
        }
        scratch.swap(larger);
        scratch_bytes = wanted;
    }

    // body(thread, threads) on every thread; without `share`, which is for little work, on the caller's thread alone.
    template <class Body>
    void run(bool share, Body body) {
        const int threads = pool.threads();
        if (threads == 1 || !share)
            body(0, 1);
        else
            pool.run([&](int thread) { body(thread, threads); });
    }

    // body(row) for all rows; each thread takes consecutive rows.
    template <class Body>
    void each_row(int64_t rows, int64_t row_elements, Body body) {
        run(rows > 1 && rows * row_elements > 16384, [&](int64_t thread, int64_t threads) {
            for (int64_t row = rows * thread / threads; row < rows * (thread + 1) / threads; ++row) body(row);
        });
    }
};

// body(data as bf16* or as float*); const data as pointers to const.
template <class Void, class Body>
void with_type(int is_bf16, Void* data, Body body) {
    if (is_bf16)
        body(static_cast<std::conditional_t<std::is_const_v<Void>, const bf16, bf16>*>(data));
    else
        body(static_cast<std::conditional_t<std::is_const_v<Void>, const float, float>*>(data));
}

// Runs body(); the result of a function that Python calls.
template <class Body>
int completed(Body body) {
    try {
        body();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

template <class W>
void linear(Context& context, const PackedWeights& weights, const float* x, int64_t rows, float* y) {
    context.reserve(left_bytes<W>(weights.k) + TILE_BYTES);
    context.run(weights.columns * weights.k > 16384, [&](int64_t thread, int64_t threads) {
        // Many rows: each thread computes some rows and copies only those. Few rows: each thread computes some columns.
        const int64_t row_shares = rows >= threads * 64 ? threads : 1, column_shares = threads / row_shares;
        const int64_t row_share = thread / column_shares, column_share = thread % column_shares;
        const int64_t row = rows * row_share / row_shares, end_row = rows * (row_share + 1) / row_shares;
        const int64_t together = weights.panels_per_output(), outputs = weights.panels() / together;
        const int64_t first = outputs * column_share / column_shares, last = outputs * (column_share + 1) / column_shares;
        multiply_share<W>(weights, x + row * weights.k, int(end_row - row), int(first * together), int(last * together),
                          y + row * weights.columns, context.scratch[size_t(thread)].get());
    });
}

template <class Element, class Source>
void pack(const Source* weight, int64_t n, int64_t k, Element* to) {
    const int64_t pairs = (k + 1) / 2, panels = (n + PANEL - 1) / PANEL;
    auto at = [&](int64_t row, int64_t column) -> Source {
        return row < n && column < k ? weight[row * k + column] : Source(0);
    };
    for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t pair = 0; pair < pairs; ++pair)
            for (int64_t column = 0; column < PANEL; ++column) {
                const Source even = at(panel * PANEL + column, 2 * pair), odd = at(panel * PANEL + column, 2 * pair + 1);
                if constexpr (sizeof(Source) == 2) {
                    to[(panel * pairs + pair) * PANEL + column] = uint32_t(even) | uint32_t(odd) << 16;
                } else {
                    Element* row = to + (panel * pairs + pair) * 2 * PANEL + column;
                    row[0] = even;
                    row[PANEL] = odd;
                }
            }
}

template <class Kv>
void attention(Context& context, const AttentionShape& shape, const float* q, const Kv* kv_layer,
               const int32_t* query_starts, const int32_t* context_lens, const int32_t* tables, int64_t sequences,
               float* out) {
    const int group = int(shape.group()), tokens_per_task = std::max(1, TASK_ROWS / group);
    context.tasks.clear();
    for (int s = 0; s < sequences; ++s) {
        const Split split(query_starts[s + 1] - query_starts[s], tokens_per_task);
        // The last tokens have the most keys. Their tasks start first, so that all threads end at about the same time.
        for (int block = split.blocks - 1; block >= 0; --block)
            for (int head = 0; head < shape.kv_heads; ++head)
                context.tasks.push_back({s, split.start(block), split.start(block + 1), head});
    }
    std::atomic<size_t> next{0};
    context.run(context.tasks.size() > 1, [&](int thread, int) {
        auto& scratch = *static_cast<AttentionScratch*>(context.scratch[size_t(thread)].get());
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < context.tasks.size();) {
            const Task& task = context.tasks[i];
            const int64_t first_row = query_starts[task.sequence];
            const int64_t start = context_lens[task.sequence] - (query_starts[task.sequence + 1] - first_row);
            attend<Kv>(shape, q + first_row * shape.q_stride, kv_layer, tables + task.sequence * shape.table_stride,
                       start, task.first_token, task.last_token, task.kv_head,
                       out + first_row * shape.heads * shape.head_dim, scratch);
        }
    });
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Null where memory is short or the system has no more threads.
void* tandem_create(int threads) {
    try {
        return new Context(threads);
    } catch (const std::exception&) {
        return nullptr;
    }
}
void tandem_destroy(void* context) { delete static_cast<Context*>(context); }

// The instructions that this build multiplies with.
const char* tandem_instructions() {
#if defined(TANDEM_EMULATE_TILES)
    return "emulated amx_bf16";
#elif defined(TANDEM_EMULATE_BF16_DOT)
    return "emulated bf16";
#elif defined(TANDEM_TILES)
    return "amx_bf16";
#elif defined(__AVX512BF16__)
    return "avx512_bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#else
    return "generic";
#endif
}

// weight[n][k] -> panels: ceil(n / 32) * ceil(k / 2) * 64 elements of the same type.
void tandem_pack(const void* weight, int is_bf16, int64_t n, int64_t k, void* packed) {
    if (is_bf16)
        pack(static_cast<const bf16*>(weight), n, k, static_cast<uint32_t*>(packed));
    else
        pack(static_cast<const float*>(weight), n, k, static_cast<float*>(packed));
}

// y[rows][columns] = x[rows][k] * weight + bias; `gated`: see PackedWeights.
int tandem_linear(void* context, const void* packed, const float* bias, int is_bf16, int gated, int64_t columns, int64_t k,
                   const float* x, int64_t rows, float* y) {
    const PackedWeights weights{packed, bias, columns, k, is_bf16 != 0, gated != 0};
    auto& c = *static_cast<Context*>(context);
    return completed([&] {
        if (is_bf16)
            linear<Bf16Weights>(c, weights, x, rows, y);
        else
            linear<FloatWeights>(c, weights, x, rows, y);
    });
}

void tandem_embedding(void* context, const int64_t* ids, int64_t rows, const void* weight, int is_bf16, int64_t hidden,
                      float* y) {
    with_type(is_bf16, weight, [&](auto* table) {
        static_cast<Context*>(context)->each_row(rows, hidden, [&](int64_t row) {
            embed_row(table + ids[row] * hidden, hidden, y + row * hidden);
        });
    });
}

// With `residual`: residual += x, and the norm of the new residual.
void tandem_rms_norm(void* context, const float* x, float* residual, const void* weight, int is_bf16, float eps,
                     int64_t rows, int64_t hidden, float* y) {
    with_type(is_bf16, weight, [&](auto* typed_weight) {
        static_cast<Context*>(context)->each_row(rows, hidden, [&](int64_t row) {
            const float* from = x + row * hidden;
            if (residual) from = add_row(from, residual + row * hidden, hidden);
            rms_norm_row(from, typed_weight, eps, hidden, y + row * hidden);
        });
    });
}

// residual += x, and the norm of the new residual. `bias` has the type of `weight`.
void tandem_add_layer_norm(void* context, const float* x, float* residual, const void* weight, const void* bias,
                           int is_bf16, float eps, int64_t rows, int64_t hidden, float* y) {
    with_type(is_bf16, weight, [&](auto* typed_weight) {
        static_cast<Context*>(context)->each_row(rows, hidden, [&](int64_t row) {
            const float* from = add_row(x + row * hidden, residual + row * hidden, hidden);
            layer_norm_row(from, typed_weight, static_cast<decltype(typed_weight)>(bias), eps, hidden, y + row * hidden);
        });
    });
}

// qkv[rows][(heads + 2 kv_heads) * head_dim], in place; keys and values go to `kv_layer` at `slots`. `cos_sin` and the
// norms may be null.
void tandem_rope_and_cache(void* context, float* qkv, int64_t rows, const float* cos_sin, const int64_t* positions,
                           const int64_t* slots, void* kv_layer, int kv_is_bf16, int64_t num_blocks, int64_t block_size,
                           int64_t heads, int64_t kv_heads, int64_t head_dim, const void* q_norm, const void* k_norm,
                           int norm_is_bf16, float eps) {
    const RopeShape shape{heads, kv_heads, head_dim, block_size, num_blocks, eps};
    const int64_t row_elements = (heads + 2 * kv_heads) * head_dim;
    with_type(kv_is_bf16, kv_layer, [&](auto* kv) {
        with_type(norm_is_bf16, q_norm, [&](auto* q_weight) {
            static_cast<Context*>(context)->each_row(rows, row_elements, [&](int64_t row) {
                rope_and_cache_row(shape, qkv + row * row_elements,
                                   cos_sin ? cos_sin + positions[row] * head_dim : nullptr, slots[row], kv, q_weight,
                                   static_cast<decltype(q_weight)>(k_norm));
            });
        });
    });
}

// q: a token's queries begin `q_stride` floats after those of the token before; out[tokens][heads * head_dim]. `window` 0:
// none. head_dim <= MAX_HEAD_DIM and heads / kv_heads <= TASK_ROWS.
int tandem_attention(void* context, const float* q, int64_t q_stride, const void* kv_layer, int kv_is_bf16,
                     int64_t num_blocks, int64_t block_size, int64_t heads, int64_t kv_heads, int64_t head_dim,
                     const int32_t* query_starts, const int32_t* context_lens, const int32_t* tables,
                     int64_t table_stride, int64_t sequences, float scale, int64_t window, float* out) {
    const int64_t visible = window > 0 ? window : int64_t(1) << 40;
    const AttentionShape shape{heads, kv_heads, head_dim, block_size, num_blocks, table_stride, q_stride, scale, visible};
    auto& c = *static_cast<Context*>(context);
    return completed([&] {
        with_type(kv_is_bf16, kv_layer, [&](auto* kv) {
            attention(c, shape, q, kv, query_starts, context_lens, tables, sequences, out);
        });
    });
}

// Between ranks; `abort` is the word that ends all waits. They return an Outcome.
int tandem_all_reduce(const int64_t* abort, int64_t timeout_ns, char* stamps, float* slots, int64_t slot_floats,
                      int64_t ranks, int64_t rank, int64_t sequence, float* x, int64_t count) {
    return AllReduce{stamps, slots, slot_floats, ranks, rank}.run({abort, timeout_ns}, sequence, x, count);
}
int tandem_send(const int64_t* abort, int64_t timeout_ns, char* mailbox, int64_t depth, int64_t slot_bytes,
                const char* data, int64_t count) {
    return Mailbox{mailbox, depth, slot_bytes}.send({abort, timeout_ns}, data, count);
}
int tandem_receive(const int64_t* abort, int64_t timeout_ns, char* mailbox, int64_t depth, int64_t slot_bytes, char* data,
                   int64_t count) {
    return Mailbox{mailbox, depth, slot_bytes}.receive({abort, timeout_ns}, data, count);
}

void tandem_copy_pieces(char* target, const int64_t* target_offsets, const char* source, const int64_t* source_offsets,
                        int64_t count, int64_t bytes) {
    copy_pieces(target, target_offsets, source, source_offsets, count, bytes);
}

int tandem_encode_kv(int codec, int is_bf16, const void* kv, uint8_t* coded, int64_t layers, int64_t head_blocks,
                     int64_t slots, int64_t dim) {
    return completed([&] {
        with_type(is_bf16, kv, [&](auto* from) {
            each_head_block(KvCodec(codec), from, coded, layers, head_blocks, slots, dim,
                            [](auto& coder, auto* x, bool is_value, auto* code) { coder.encode(x, is_value, code); });
        });
    });
}
int tandem_decode_kv(int codec, int is_bf16, const uint8_t* coded, void* kv, int64_t layers, int64_t head_blocks,
                     int64_t slots, int64_t dim) {
    return completed([&] {
        with_type(is_bf16, kv, [&](auto* to) {
            each_head_block(KvCodec(codec), to, coded, layers, head_blocks, slots, dim,
                            [](auto& coder, auto* x, bool is_value, auto* code) { coder.decode(code, is_value, x); });
        });
    });
}

}  // extern "C"
#pragma GCC visibility pop
