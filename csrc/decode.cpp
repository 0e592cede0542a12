// A decode step of a transformer on a CPU: the next tokens of many rows through all layers, in one call and one parallel region.
//
// Legend of shapes: N new tokens of all rows, C model width, H query heads, K key/value heads, D head dim, F feed-forward width,
// V vocabulary, S cells of a layer's cache; of a product, I inputs and O outputs. Matrices are (O, I), row by row, as torch holds them.
//
// Weights, activations and the cache are of one type W, float or bfloat16; every sum is in fp32. In bfloat16 values are rounded where
// torch's own operators round them: norms, products, queries and keys after RoPE, attention's output, sums of the residual.
//
// What a token gets does not depend, to the bit, on the other tokens of the call nor on the number of threads: each output is summed
// by one thread, in an order that depends on I alone, and attention goes over positions, not over cells.

#include <atomic>
#include <sched.h>

#include "choose.h"
#include "products.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

// What nanotrain/model/native_decode.py fills in; the two must be changed together.
extern "C" {
struct Norm { const void *weight, *bias; };
struct Linear { const void *weight, *bias; };
struct Layer {
    Norm attention_norm, attention_post_norm, mlp_norm, mlp_post_norm, q_norm, k_norm;  // those a model lacks have no weight
    Linear q, k, v, o, gate, up, down;
    int64_t window;  // 0: none
};
struct Model {
    const Layer* layers;
    const void *embed, *embed_positions, *head;  // (V, C), (positions, C) or null, (V, C)
    Norm head_norm;
    const float *cos, *sin, *slopes;  // (positions, D / 2) or null; ALiBi's (H,) or null
    int64_t depth, V, C, H, K, D, F, positions;
    int64_t layer_norm, post, gelu, gated, bfloat16, tiles;  // flags; gated with gelu is geglu; tiles: the processor lends AMX
    float eps, offset, scale, softcap, logit_softcap, embedding_scale;  // softcaps 0: none; embedding_scale 1: none
};
struct Step {
    const int64_t *tokens, *rows, *places;  // (N,): a token, its row of the cache and its position there
    void* const* keys;                      // of each layer (rows, S, K, D)
    void* const* values;
    const int64_t* cells;  // S of each layer
    float* logits;         // (N, V)
    const Choice* choice;  // null: none is made
    void* scratch;         // as many bytes as decode_scratch says
    int64_t N, longest, threads;
};
}

namespace {

inline void pause() {  // leaves the core to its other hyperthread for a moment
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The threads of a step. OpenMP's own barrier spins for milliseconds, a time slice at each of dozens of barriers where the machine is
// busy and two threads share a core; this one soon gives its core away.
class Team {
  public:
    // body(0) ... body(count - 1), each by one thread, in even shares of neighbours; all wait until everything is done.
    template <class Body> void share(int64_t count, const Body& body) {
        int64_t last = count * (number() + 1) / size();
        for (int64_t i = count * number() / size(); i < last; i++) body(i);
        if (size() > 1) wait();
    }

#ifdef _OPENMP
    static int64_t number() { return omp_get_thread_num(); }
    static int64_t size() { return omp_get_num_threads(); }  // what there is: OpenMP may give fewer than it was asked for
#else
    static int64_t number() { return 0; }
    static int64_t size() { return 1; }
#endif

  private:
    static constexpr int SPINS = 500;  // some 20 us
    std::atomic<int64_t> arrived{0}, rounds{0};

    void wait() {
        int64_t round = rounds.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size() - 1) {
            arrived.store(0, std::memory_order_relaxed);
            rounds.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; rounds.load(std::memory_order_acquire) == round; spins++)
            if (spins < SPINS) pause();
            else sched_yield();
    }
};

// y[.][o] + bias, rounded as torch's product is.
template <class W> inline vec output(const float* y, const W* bias, int64_t o, int64_t count) {
    vec v = wide(y);
    return rounded<W>(bias ? v + load(bias + o, count) : v);
}

template <class W> struct Product { Linear linear; int64_t O; W* out; };

// out (N, O) = x (N, I) times each linear layer: their outputs are cut into tiles that the team shares.
template <class W, int M> void products(Team& team, const Rows<W>& x, int64_t N, const Product<W> (&all)[M], int64_t outs) {
    int64_t ends[M], count = 0;
    for (int m = 0; m < M; m++) ends[m] = count += (all[m].O + outs - 1) / outs;
    team.share(count, [&](int64_t unit) {
        int m = 0;
        while (unit >= ends[m]) m++;
        const Product<W>& p = all[m];
        int64_t first = (unit - (m ? ends[m - 1] : 0)) * outs, wanted = std::min(outs, p.O - first);
        alignas(64) float y[ROWS][OUTS];
        for (int64_t n = 0; n < N; n += ROWS) {
            int64_t rows = std::min<int64_t>(ROWS, N - n);
            tile(x, n, rows, (const W*)p.linear.weight + first * x.I, wanted, y);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t o = 0; o < wanted; o += LANES)
                    store(p.out + (n + r) * p.O + first + o, output<W>(y[r] + o, (const W*)p.linear.bias, first + o, wanted - o), wanted - o);
        }
    });
}

template <class W> class Run {
  public:
    Run(const Model& m, const Step& s) : m(m), s(s), N(s.N) {
        W* at = (W*)s.scratch;
        auto take = [&](int64_t rows, int64_t width) { W* p = at; at += (rows * width + 31) / 32 * 32; return p; };
        int64_t blocks = (N + ROWS - 1) / ROWS * ROWS;
        x = take(N, m.C), branch = take(N, m.C);
        q = take(N, m.H * m.D), k = take(N, m.K * m.D), v = take(N, m.K * m.D);
        auto rows = [&](int64_t I, bool whole) { return Rows<W>{take(blocks, I), I, sizeof(W) == 2 && m.tiles && I % 32 == 0 && whole}; };
        normed = rows(m.C, true), attended = rows(m.H * m.D, m.D % 2 == 0), activated = rows(m.F, true);
        scores = (float*)at;
    }

    static int64_t bytes(const Model& m, int64_t N, int64_t longest, int64_t threads) {
        int64_t blocks = (N + ROWS - 1) / ROWS * ROWS, wide = 3 * m.C + 2 * (m.H + m.K) * m.D + m.F;
        return (blocks * wide + 9 * 32) * sizeof(W) + threads * room(longest) * sizeof(float);
    }

    // Every thread of the team calls this.
    void step() {
        configure();
        team.share(N, [&](int64_t n) { embed(n); });
        for (int64_t l = 0; l < m.depth; l++) {
            const Layer& layer = m.layers[l];
            int64_t heads = m.H * m.D, kv_heads = m.K * m.D;
            Product<W> qkv[] = {{layer.q, heads, q}, {layer.k, kv_heads, k}, {layer.v, kv_heads, v}};
            products(team, normed, N, qkv, cut(heads + 2 * kv_heads));
            team.share(N * (m.H + 2 * m.K), [&](int64_t i) { head(l, i / (m.H + 2 * m.K), i % (m.H + 2 * m.K)); });
            team.share(N * m.H, [&](int64_t i) { attend(l, i / m.H, i % m.H); });
            Product<W> o[] = {{layer.o, m.C, branch}};
            products(team, attended, N, o, cut(m.C));
            const Norm next = l + 1 < m.depth ? m.layers[l + 1].attention_norm : m.head_norm;
            team.share(N, [&](int64_t n) { add(n, layer.attention_post_norm, m.post ? layer.attention_norm : layer.mlp_norm); });
            feed(layer);
            Product<W> down[] = {{layer.down, m.C, branch}};
            products(team, activated, N, down, cut(m.C));
            team.share(N, [&](int64_t n) { add(n, layer.mlp_post_norm, m.post ? layer.mlp_norm : next); });
        }
        logits();
        release();
        if (s.choice) team.share(N, [&](int64_t n) { choose(*s.choice, s.logits + n * m.V, m.V, n); });
    }

  private:
    const Model& m;
    const Step& s;
    int64_t N;
    Team team;
    W *x, *branch, *q, *k, *v;
    Rows<W> normed, attended, activated;
    float* scores;

    static int64_t room(int64_t longest) { return (longest + LANES + 31) / 32 * 32; }

    // Outputs of a tile: fewer where there would not be a tile for every thread.
    int64_t cut(int64_t O) const { return std::min<int64_t>(OUTS, (O / s.threads + 15) / 16 * 16 + (O < s.threads ? 16 : 0)); }

    void configure() const {
#ifdef __AMX_BF16__
        if (!m.tiles) return;
        alignas(64) struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles = {1, 0, {}, {}, {}};
        for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
        asm volatile("" ::: "memory");
        _tile_loadconfig(&tiles);
#endif
    }

    void release() const {
#ifdef __AMX_BF16__
        if (m.tiles) _tile_release();
#endif
    }

    // out[n] = norm of a row; `values` may be that row of out.
    void norm(const W* values, const Norm& norm, int64_t width, bool layer_norm, const Rows<W>& out, int64_t n) const {
        const W *weight = (const W*)norm.weight, *bias = (const W*)norm.bias;
        float mean = 0;
        if (layer_norm) {
            vec total = {};
            for (int64_t c = 0; c < width; c += LANES) total += load(values + c, width - c);
            mean = sum(total) / width;
        }
        vec squares = {};
        for (int64_t c = 0; c < width; c += LANES) {
            vec d = load(values + c, width - c) - mean;
            if (width - c < LANES)
                for (int64_t i = width - c; i < LANES; i++) d[i] = 0;
            squares += d * d;
        }
        float inverse = 1.0f / std::sqrt(sum(squares) / width + m.eps);
        for (int64_t c = 0; c < width; c += LANES) {
            vec scale = load(weight + c, width - c) + (layer_norm ? 0.0f : m.offset), y = (load(values + c, width - c) - mean) * inverse * scale;
            out.put(n, c, bias ? y + load(bias + c, width - c) : y, width - c);
        }
    }

    // x[n] is ready: what the next product reads of it.
    void prepare(int64_t n, const Norm& by) {
        if (by.weight) return norm(x + n * m.C, by, m.C, m.layer_norm, normed, n);
        for (int64_t c = 0; c < m.C; c += LANES) normed.put(n, c, load(x + n * m.C + c, m.C - c), m.C - c);
    }

    void embed(int64_t n) {
        const W* row = (const W*)m.embed + s.tokens[n] * m.C;
        for (int64_t c = 0; c < m.C; c += LANES) {
            vec e = load(row + c, m.C - c);
            if (m.embedding_scale != 1.0f) e = rounded<W>(e * m.embedding_scale);
            if (m.embed_positions) e += load((const W*)m.embed_positions + place(n) * m.C + c, m.C - c);
            store(x + n * m.C + c, e, m.C - c);
        }
        prepare(n, m.post ? Norm{} : m.layers[0].attention_norm);
    }

    // The position as the tables know it: what lies beyond them is a proposal that the caller will drop.
    int64_t place(int64_t n) const { return std::min(s.places[n], m.positions - 1); }

    // x[n] += branch[n], normed before (sandwich) or after (post), and what the next product reads of it.
    void add(int64_t n, const Norm& before, const Norm& after) {
        W *to = x + n * m.C, *from = branch + n * m.C;
        if (before.weight) norm(from, before, m.C, m.layer_norm, Rows<W>{branch, m.C, false}, n);
        for (int64_t c = 0; c < m.C; c += LANES) store(to + c, load(to + c, m.C - c) + load(from + c, m.C - c), m.C - c);
        if (m.post) norm(to, after, m.C, m.layer_norm, Rows<W>{x, m.C, false}, n);
        prepare(n, m.post ? Norm{} : after);
    }

    // Norm and RoPE of one head of token n: queries in place, keys and values into the cache.
    void head(int64_t l, int64_t n, int64_t h) {
        const Layer& layer = m.layers[l];
        int64_t D = m.D, S = s.cells[l], cell = (s.rows[n] * S + s.places[n] % S) * m.K;
        if (h >= m.H + m.K) {
            int64_t kv = h - m.H - m.K;
            memcpy((W*)s.values[l] + (cell + kv) * D, v + (n * m.K + kv) * D, D * sizeof(W));
            return;
        }
        bool key = h >= m.H;
        W* from = key ? k + (n * m.K + h - m.H) * D : q + (n * m.H + h) * D;
        W* to = key ? (W*)s.keys[l] + (cell + h - m.H) * D : from;
        const Norm& by = key ? layer.k_norm : layer.q_norm;
        if (by.weight) norm(from, by, D, false, Rows<W>{from, D, false}, 0);
        if (!m.cos) {
            if (key) memcpy(to, from, D * sizeof(W));
            return;
        }
        int64_t half = D / 2;
        const float *cos = m.cos + place(n) * half, *sin = m.sin + place(n) * half;
        for (int64_t d = 0; d < half; d += LANES) {
            int64_t count = half - d;
            vec a = load(from + d, count), b = load(from + half + d, count), c = load(cos + d, count), t = load(sin + d, count);
            store(to + d, a * c - b * t, count);
            store(to + half + d, b * c + a * t, count);
        }
    }

    // Attention of query head h of token n to what its row holds, in the order of positions.
    void attend(int64_t l, int64_t n, int64_t h) {
        int64_t D = m.D, S = s.cells[l], kv = h / (m.H / m.K), stride = m.K * D, window = m.layers[l].window;
        int64_t last = s.places[n], first = window ? std::max<int64_t>(0, last - window + 1) : 0, count = last - first + 1;
        const W* keys = (const W*)s.keys[l] + s.rows[n] * S * stride + kv * D;
        const W* values = (const W*)s.values[l] + s.rows[n] * S * stride + kv * D;
        float* p = scores + Team::number() * room(s.longest);
        const W* query = q + (n * m.H + h) * D;
        int64_t cell = first % S;
        for (int64_t j = 0; j < count; j += LANES) {
            const W* rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                rows[i] = keys + cell * stride;
                for (int64_t d = 0; d < D; d += 64 / sizeof(W)) {  // a head's share of a cell is too short for the processor to foresee the next
                    __builtin_prefetch(rows[i] + LANES * stride + d);
                    __builtin_prefetch(values + cell * stride + d);
                }
                if (j + i + 1 < count && ++cell == S) cell = 0;
            }
            dots<W, 1>(rows, query, 0, D, p + j, 0);
        }
        for (int64_t j = count; j < room(count); j++) p[j] = -INFINITY;
        vec peaks = all(-INFINITY), total = {};
        float slope = m.slopes ? m.slopes[h] : 0.0f;
        for (int64_t j = 0; j < count; j += LANES) {
            vec z = wide(p + j) * m.scale;
            if (m.softcap != 0.0f) z = m.softcap * tanh(z / m.softcap);
            if (m.slopes)
                for (int i = 0; i < LANES; i++) z[i] -= slope * (float)(count - 1 - j - i);
            for (int64_t i = count - j; i < LANES; i++) z[i] = -INFINITY;
            narrow(p + j, z);
            peaks = pick((bits)(z > peaks), z, peaks);
        }
        float peak = largest(peaks);
        for (int64_t j = 0; j < count; j += LANES) {
            vec e = exp(wide(p + j) - peak);
            narrow(p + j, e);
            total += e;
        }
        float inverse = 1.0f / sum(total);
        int64_t d = 0;
        for (; d + 4 * LANES <= D; d += 4 * LANES) average<4>(values + d, stride, first % S, S, count, p, inverse, n, h * D + d, 4 * LANES);
        for (; d < D; d += LANES) average<1>(values + d, stride, first % S, S, count, p, inverse, n, h * D + d, D - d);
    }

    // Channels i.. of attended[n]: the values of `count` cells from `cell` on, weighted by p.
    template <int J> void average(const W* values, int64_t stride, int64_t cell, int64_t S, int64_t count, const float* p, float inverse,
                                  int64_t n, int64_t i, int64_t channels) {
        vec acc[J] = {};
        for (int64_t j = 0; j < count; cell = 0) {  // up to the last cell of a ring, then from its first
            const W* row = values + cell * stride;
            for (int64_t end = std::min(count, j + S - cell); j < end; j++, row += stride)
                for (int a = 0; a < J; a++) acc[a] += p[j] * (J > 1 ? wide(row + a * LANES) : load(row, channels));
        }
        for (int a = 0; a < J; a++) attended.put(n, i + a * LANES, acc[a] * inverse, channels - a * LANES);
    }

    // activated = act(gate) * up, or gelu(up), of all tokens.
    void feed(const Layer& layer) {
        int64_t outs = cut(m.F);
        team.share((m.F + outs - 1) / outs, [&](int64_t unit) {
            int64_t first = unit * outs, wanted = std::min(outs, m.F - first);
            alignas(64) float up[ROWS][OUTS], gate[ROWS][OUTS];
            for (int64_t n = 0; n < N; n += ROWS) {
                int64_t rows = std::min<int64_t>(ROWS, N - n);
                tile(normed, n, rows, (const W*)layer.up.weight + first * m.C, wanted, up);
                if (m.gated) tile(normed, n, rows, (const W*)layer.gate.weight + first * m.C, wanted, gate);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t o = 0; o < wanted; o += LANES) {
                        vec y = output<W>(up[r] + o, (const W*)layer.up.bias, first + o, wanted - o);
                        if (m.gated) {
                            vec g = output<W>(gate[r] + o, (const W*)layer.gate.bias, first + o, wanted - o);
                            y *= m.gelu ? gelu(g) : silu(g);
                        } else y = gelu(y);
                        activated.put(n + r, first + o, y, wanted - o);
                    }
            }
        });
    }

    void logits() {
        int64_t outs = cut(m.V);
        team.share((m.V + outs - 1) / outs, [&](int64_t unit) {
            int64_t first = unit * outs, wanted = std::min(outs, m.V - first);
            alignas(64) float y[ROWS][OUTS];
            for (int64_t n = 0; n < N; n += ROWS) {
                int64_t rows = std::min<int64_t>(ROWS, N - n);
                tile(normed, n, rows, (const W*)m.head + first * m.C, wanted, y);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t o = 0; o < wanted; o += LANES) {
                        vec z = wide(y[r] + o);
                        if (m.logit_softcap != 0.0f) z = m.logit_softcap * tanh(z / m.logit_softcap);
                        store(s.logits + (n + r) * m.V + first + o, z, wanted - o);
                    }
            }
        });
    }
};

template <class W> void run(const Model& m, const Step& s) {
    Run<W> run(m, s);
#pragma omp parallel num_threads(s.threads)
    run.step();
}

}  // namespace

extern "C" {

// Sizes of Layer, Model, Choice and Step [bytes], for a test to compare with its own.
void decode_layout(int64_t sizes[4]) { sizes[0] = sizeof(Layer), sizes[1] = sizeof(Model), sizes[2] = sizeof(Choice), sizes[3] = sizeof(Step); }

// Whether this process may use the processor's matrix tiles; asks Linux for them.
int decode_tiles() {
#ifdef __AMX_BF16__
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
#else
    return 0;
#endif
}

// Bytes of scratch memory that a step of N tokens needs, the longest row having `longest` of them.
int64_t decode_scratch(const Model* m, int64_t N, int64_t longest, int64_t threads) {
    return m->bfloat16 ? Run<bf16>::bytes(*m, N, longest, threads) : Run<float>::bytes(*m, N, longest, threads);
}

// -1, or the place of a token that is not in the vocabulary; nothing is done then.
int64_t decode_step(const Model* m, const Step* s) {
    for (int64_t n = 0; n < s->N; n++)
        if (s->tokens[n] < 0 || s->tokens[n] >= m->V) return n;
    m->bfloat16 ? run<bf16>(*m, *s) : run<float>(*m, *s);
    return -1;
}
}
