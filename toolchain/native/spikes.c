/* Event-driven time steps of spiking layers, for toolchain.native.steps (which checks every argument before it calls).

   A layer's neurons are in order (row, column, channel). An edge takes a spike of the source neuron (y, x, c) to a block of targets:

       rows[y] = (first target row, first kernel slot, how many), columns[x] alike
       target (row + i, column + j, d) += amplitude * weight[c, row slot + i, column slot + j, d]    for every channel d
       diagonal: target (row + i, column + j, c) += amplitude * weight[c]

   which is any convolution or transposed convolution, in either direction, once its kernel's slots are ordered by target; a dense matrix (one
   place, a channel a neuron); a pool or an upsampling. Spikes are added in the order of their neurons, so the spikes of one place, whose targets are the same,
   follow each other and find them in registers. No state is kept between calls; products are rounded before they are added, so that every instruction set
   gives the same bits. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int32_t source, target; /* layers, by their place in the order of processing */
    int32_t late;           /* 1: the source's spikes of the step before */
    int32_t diagonal;
    int32_t channels, width;  /* of the source */
    int32_t made, made_width; /* channels and width of the target */
    int32_t slots;            /* of the kernel, along either axis */
    const int32_t *rows, *columns;
    const void *weight;
    const void *amplitude; /* (samples, source neurons), what a spike carries; NULL: 1 */
    const void *factor;    /* (samples, target neurons), multiplies what arrives; NULL: 1 */
} Edge;

typedef struct {
    int64_t neurons;
    double threshold, reset;
    const void *drive; /* a current added at every step, or NULL */
    int64_t drive_stride; /* from a sample to the next: neurons, or 0 for one drive for all */
    void *potential, *sum; /* (samples, neurons) */
    int32_t *count;
    int8_t *spikes; /* of the last step */
} Layer;

/* Vectors that begin at multiples of this lie in one line of the cache. */
#define WIDEST 64

typedef struct {
    int32_t **events;  /* two lists a layer, of this step and of the one before */
    int64_t *length;
    int *restless;     /* whether a layer may fire without a current */
    void **factored;   /* an edge's arriving current, where a factor multiplies it */
    void **memory;     /* that it lies in, from a multiple of WIDEST bytes on */
    const void **from; /* of the spikes of one place: where their weights begin */
    void *size;        /* and what they carry */
} Workspace;

static int make_workspace(Workspace *work, const Layer *layers, int32_t n_layers, const Edge *edges, int32_t n_edges, size_t real) {
    int32_t channels = 1;
    for (int32_t e = 0; e < n_edges; e++)
        if (edges[e].channels > channels) channels = edges[e].channels;
    work->events = calloc(2 * (size_t)n_layers, sizeof *work->events);
    work->length = calloc(2 * (size_t)n_layers, sizeof *work->length);
    work->restless = calloc((size_t)n_layers, sizeof *work->restless);
    work->factored = calloc((size_t)n_edges + 1, sizeof *work->factored);
    work->memory = calloc((size_t)n_edges + 1, sizeof *work->memory);
    work->from = malloc((size_t)channels * sizeof *work->from);
    work->size = malloc((size_t)channels * real);
    if (!work->events || !work->length || !work->restless || !work->factored || !work->memory || !work->from || !work->size) return 0;
    for (int32_t l = 0; l < 2 * n_layers; l++) {
        work->events[l] = malloc((size_t)layers[l / 2].neurons * sizeof **work->events);
        if (!work->events[l]) return 0;
    }
    for (int32_t e = 0; e < n_edges; e++) {
        if (!edges[e].factor) continue;
        work->memory[e] = calloc((size_t)layers[edges[e].target].neurons * real + WIDEST, 1);
        if (!work->memory[e]) return 0;
        work->factored[e] = (char *)work->memory[e] + (WIDEST - (uintptr_t)work->memory[e] % WIDEST);
    }
    return 1;
}

static void free_workspace(Workspace *work, int32_t n_layers, int32_t n_edges) {
    for (int32_t l = 0; work->events && l < 2 * n_layers; l++) free(work->events[l]);
    for (int32_t e = 0; work->memory && e < n_edges; e++) free(work->memory[e]);
    free(work->events);
    free(work->length);
    free(work->restless);
    free(work->factored);
    free(work->memory);
    free((void *)work->from);
    free(work->size);
}

/* An event is the neuron's number, or its complement where the spike is negative. */
static inline int32_t neuron_of(int32_t event) {
    return event ^ (event >> 31);
}

static inline int32_t sign_of(int32_t event) {
    return 1 + 2 * (event >> 31);
}

/* List the spikes of a layer: 64 neurons become a mask, without branches, whose bits are then taken one by one. */
static int64_t list_events(const int8_t *spikes, int64_t neurons, int32_t *events) {
    int64_t length = 0, i = 0;
#if defined(__GNUC__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; i + 64 <= neurons; i += 64) {
        uint64_t mask = 0, word;
        for (int part = 0; part < 8; part++) {
            memcpy(&word, spikes + i + 8 * part, 8);
            /* a spike of either sign is odd: the lowest bits of eight bytes side by side */
            mask |= ((word & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (8 * part);
        }
        for (; mask; mask &= mask - 1) {
            const int32_t neuron = (int32_t)(i + __builtin_ctzll(mask));
            events[length++] = neuron ^ (spikes[neuron] >> 7);
        }
    }
#endif
    for (; i < neurons; i++)
        if (spikes[i] & 1) events[length++] = (int32_t)(spikes[i] < 0 ? ~i : i);
    return length;
}

static void clear_events(const int32_t *events, int64_t length, int8_t *spikes) {
    for (int64_t k = 0; k < length; k++) spikes[neuron_of(events[k])] = 0;
}

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define REAL float
#define TARGET
#define BYTES 16 /* of a vector */
#define NAME(x) JOIN(x, _f32)
#include "stage.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(x) JOIN(x, _f64)
#include "stage.h"
#undef REAL
#undef NAME
#undef TARGET
#undef BYTES

#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE 1

#define TARGET __attribute__((target("avx2")))
#define BYTES 32
#define REAL float
#define NAME(x) JOIN(x, _f32_avx2)
#include "stage.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(x) JOIN(x, _f64_avx2)
#include "stage.h"
#undef REAL
#undef NAME
#undef TARGET
#undef BYTES

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define BYTES 64
#define REAL float
#define NAME(x) JOIN(x, _f32_avx512)
#include "stage.h"
#undef REAL
#undef NAME
#define REAL double
#define NAME(x) JOIN(x, _f64_avx512)
#include "stage.h"
#undef REAL
#undef NAME
#undef TARGET
#undef BYTES
#endif

/* The instruction sets this machine has of those compiled: 0 plain, 1 AVX2, 2 AVX-512. */
int32_t toolchain_widest(void) {
#ifdef WIDE
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

/* Steps of samples first to last (exclusive); 0, or 1 where memory ran out before anything was changed. */
int32_t toolchain_stage(const Layer *layers, int32_t n_layers, const Edge *edges, int32_t n_edges, double leak, int32_t both, int64_t first, int64_t last,
                        int64_t steps, int32_t wide_reals, int32_t widest) {
#ifdef WIDE
    if (widest == 2)
        return (wide_reals ? stage_f64_avx512 : stage_f32_avx512)(layers, n_layers, edges, n_edges, leak, both, first, last, steps);
    if (widest == 1) return (wide_reals ? stage_f64_avx2 : stage_f32_avx2)(layers, n_layers, edges, n_edges, leak, both, first, last, steps);
#else
    (void)widest;
#endif
    return (wide_reals ? stage_f64 : stage_f32)(layers, n_layers, edges, n_edges, leak, both, first, last, steps);
}

/* How large the structs are here, for who describes them once more: 0 Layer, 1 Edge. */
int32_t toolchain_stage_size(int32_t which) {
    return (int32_t)(which == 0 ? sizeof(Layer) : sizeof(Edge));
}
