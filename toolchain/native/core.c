/* A whole phase of a graph of whole numbers, sample by sample, for toolchain.targets.sim_native (which lays everything out and proves every bound).

   Inside, the neurons of a population are in order (place, channel), channels padded to `lanes`, so that what arrives at a place is whole vectors. A sample runs
   through all ticks before the next one begins: its potentials stay in the cache, and so do the weights. The definition is toolchain.targets.reference;
   every instruction set and every form of a connection gives the same whole numbers.

   Built with FAULT_NO_FLUSH or FAULT_NO_SATURATION it is wrong in that way: the test suite must notice. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core.h"

enum { LIMIT = (1 << 23) - 1, COUNTED = 127, ABREAST = 6, INFLOWS = 6, BLOCK = 256, SLACK = 64, LINE = 64, TOGETHER = 257 };

/* Positions in their order; of couples also where those of each place begin. */
typedef struct {
    int64_t length;
    int32_t *position, *begin;
} List;

/* What a population emitted at one of its steps: positive spikes and negative ones, or where it emitted values. */
typedef struct {
    int64_t step; /* -1: none yet */
    List plus, minus;
    int32_t *values;
} Emission;

typedef struct {
    int32_t *potential, *constant, *saturations, *counts, *activity;
    int8_t *counts8, *activity8, *spikes;
    int32_t *waiting32; /* one of the two */
    int64_t *waiting64, *counts64;
    double *trace;
    Emission *ring;
    int32_t waits, saturated, began;
} State;

/* What a connection brings; a step adds sums32 as they are. */
typedef struct {
    int32_t *sums32; /* of spikes */
    int64_t *sums64; /* of values; of a still input for the whole sample */
    uint8_t *image;
    int32_t pending; /* 0, or the bits of what has arrived: 32, 64 */
    int32_t steady;  /* sums64 holds what a still input makes */
    int64_t by_event, by_product;
} Arrival;

typedef struct {
    const int32_t *sums;
    int32_t exponent;
} Inflow;

typedef struct {
    State *states;
    Arrival *arrivals;
    int32_t *rows, *before;
    List sent; /* what a mask lets through */
    int64_t *host;
    Emission encoded; /* what hosts take in */
    void **blocks;
    int64_t n_blocks, room;
    int32_t failed;
} Work;

/* Zeroed memory on a cache line, freed with the workspace. */
static void *allocate(Work *work, int64_t values, size_t bytes) {
    if (work->failed) return NULL;
    if (work->n_blocks == work->room) {
        const int64_t room = 2 * work->room + 64;
        void **more = realloc(work->blocks, (size_t)room * sizeof *more);
        if (!more) {
            work->failed = 1;
            return NULL;
        }
        work->blocks = more;
        work->room = room;
    }
    char *block = calloc((size_t)values * bytes + SLACK * bytes + LINE, 1);
    if (!block) {
        work->failed = 1;
        return NULL;
    }
    work->blocks[work->n_blocks++] = block;
    return block + (LINE - (uintptr_t)block % LINE) % LINE;
}

static void release(Work *work) {
    for (int64_t i = 0; i < work->n_blocks; i++) free(work->blocks[i]);
    free(work->blocks);
}

static void allocate_list(Work *work, List *list, int64_t size, int64_t places) {
    list->position = allocate(work, size, sizeof(int32_t));
    if (places) list->begin = allocate(work, places + 1, sizeof(int32_t));
}

static void allocate_state(Work *work, const PopulationPlan *plan, State *state) {
    const int64_t size = plan->size;
    const int spikes = plan->kind == PLUS || plan->kind == BOTH;
    state->ring = allocate(work, plan->slots, sizeof(Emission));
    for (int32_t s = 0; s < plan->slots && !work->failed; s++) {
        Emission *emission = state->ring + s;
        allocate_list(work, &emission->plus, size, spikes ? plan->places : 0);
        if (plan->kind == BOTH) allocate_list(work, &emission->minus, size, plan->places);
        if (!spikes) emission->values = allocate(work, size, sizeof(int32_t));
    }
    if (plan->kind == INPUT) return;
    state->potential = allocate(work, size, sizeof(int32_t));
    state->constant = allocate(work, size, sizeof(int32_t));
    state->saturations = allocate(work, size, sizeof(int32_t));
    state->counts8 = allocate(work, size, 1);
    state->counts = allocate(work, size, sizeof(int32_t));
    state->spikes = allocate(work, size, 1);
    if (plan->kind == BOTH || plan->kind == RELAY) {
        state->activity8 = allocate(work, size, 1);
        state->activity = allocate(work, size, sizeof(int32_t));
    }
    if (plan->kind == RELAY) state->counts64 = allocate(work, size, sizeof(int64_t));
    if (plan->wide) state->waiting64 = allocate(work, size, sizeof(int64_t));
    else state->waiting32 = allocate(work, size, sizeof(int32_t));
    if (plan->traces) state->trace = allocate(work, size, sizeof(double));
}

/* The most rows that one target place can take. */
static int64_t most_rows(const PhasePlan *phase, const SynapsePlan *way) {
    int64_t most = 0;
    for (int32_t t = 0; way->take_begin && t < way->targets; t++) {
        const int64_t found = (way->take_begin[t + 1] - way->take_begin[t]) * (int64_t)phase->populations[way->source].channels;
        if (found > most) most = found;
    }
    return most;
}

static int prepare(Work *work, const PhasePlan *phase) {
    int64_t largest = 1, places = 1, rows = 1, host = 0, sources = 0;
    memset(work, 0, sizeof *work);
    work->states = allocate(work, phase->n_populations, sizeof(State));
    work->arrivals = allocate(work, phase->n_synapses, sizeof(Arrival));
    for (int32_t p = 0; p < phase->n_populations && !work->failed; p++) {
        const PopulationPlan *plan = phase->populations + p;
        allocate_state(work, plan, work->states + p);
        if (plan->size > largest) largest = plan->size;
        if (plan->places > places) places = plan->places;
    }
    for (int32_t s = 0; s < phase->n_synapses && !work->failed; s++) {
        const SynapsePlan *way = phase->synapses + s;
        const int64_t size = phase->populations[way->target].size, found = most_rows(phase, way);
        Arrival *arrival = work->arrivals + s;
        if (way->wide) arrival->sums64 = allocate(work, size, sizeof(int64_t));
        else arrival->sums32 = allocate(work, size, sizeof(int32_t));
        if (way->dense_classes) arrival->image = allocate(work, way->image_size, 1);
        if (found > rows) rows = found;
    }
    for (int32_t h = 0; h < phase->n_hosts; h++) {
        const HostPlan *plan = phase->hosts + h;
        const int64_t size = phase->populations[plan->way.target].size, into = (int64_t)plan->channels * plan->places;
        if (size > host) host = size;
        if (into > sources) sources = into;
    }
    if (host) {
        work->host = allocate(work, host, sizeof(int64_t));
        allocate_list(work, &work->encoded.plus, sources, 0);
        work->encoded.values = allocate(work, sources, sizeof(int32_t));
    }
    work->rows = allocate(work, rows, sizeof(int32_t));
    work->before = allocate(work, largest + 1, sizeof(int32_t));
    allocate_list(work, &work->sent, largest, places);
    return !work->failed;
}

/* The model step that a population makes at a tick, or -1. */
static int64_t step_at(const PhasePlan *phase, const PopulationPlan *plan, int64_t tick) {
    const int64_t offset = tick - plan->start;
    if (offset < 0) return -1;
    if (phase->period == 1) return offset < phase->time_steps ? offset : -1;
    /* a division of 32 bits where it does, which takes a fraction of the time */
    const int64_t step = offset <= UINT32_MAX ? (int64_t)((uint32_t)offset / (uint32_t)phase->period) : offset / phase->period;
    return step * phase->period == offset && step < phase->time_steps ? step : -1;
}

/* Numbers of a type over (place, lane) as another over (channel, place), some channels at a time. */
#define UNPACK(NAME, FROM, TO)                                                                                   \
    static void NAME(const PopulationPlan *plan, const FROM *from, TO *to) {                                     \
        const int64_t places = plan->places, lanes = plan->lanes;                                                \
        for (int64_t first = 0; first < plan->channels; first += 16) {                                           \
            const int64_t last = first + 16 < plan->channels ? first + 16 : plan->channels;                      \
            for (int64_t p = 0; p < places; p++)                                                                 \
                for (int64_t c = first; c < last; c++) to[c * places + p] = (TO)from[p * lanes + c];             \
        }                                                                                                        \
    }
UNPACK(unpack_32_32, int32_t, int32_t)
UNPACK(unpack_32_64, int32_t, int64_t)
UNPACK(unpack_64_64, int64_t, int64_t)
UNPACK(unpack_double, double, double)
#undef UNPACK

/* What is not zero among values in order (channel, place), `apart` from one to the next. */
static void list_values(Emission *emission, const int32_t *values, int64_t apart, int64_t channels, int64_t places, int64_t lanes) {
    int64_t found = 0;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < places; p++) {
            const int32_t value = values[(c * places + p) * apart];
            emission->plus.position[found] = (int32_t)(p * lanes + c);
            emission->values[found] = value;
            found += value != 0;
        }
    emission->plus.length = found;
}

static void copy_values(Emission *to, const Emission *from) {
    memcpy(to->plus.position, from->plus.position, (size_t)from->plus.length * sizeof(int32_t));
    memcpy(to->values, from->values, (size_t)from->plus.length * sizeof(int32_t));
    to->plus.length = from->plus.length;
}

/* An input's step: what it emits. */
static void emit(const PopulationPlan *plan, State *state, int64_t step, int64_t sample) {
    Emission *emission = state->ring + step % plan->slots;
    const int32_t *values = plan->values + sample * plan->neurons * plan->frames;
    if (plan->frames > 1) list_values(emission, values + step, plan->frames, plan->channels, plan->places, plan->lanes);
    else if (!state->began) list_values(emission, values, 1, plan->channels, plan->places, plan->lanes);
    else if (step < plan->slots) copy_values(emission, state->ring); /* still: every step like the first */
    state->began = 1;
    emission->step = step;
}

/* The part of a list that a mask lets through. */
static const List *masked(const List *list, const uint8_t *mask, int64_t places, Work *work) {
    int32_t *position = work->sent.position, *before = work->before;
    int64_t kept = 0;
    for (int64_t k = 0; k < list->length; k++) {
        before[k] = (int32_t)kept;
        position[kept] = list->position[k];
        kept += mask[list->position[k]] != 0;
    }
    before[list->length] = (int32_t)kept;
    for (int64_t p = 0; p <= places; p++) work->sent.begin[p] = before[list->begin[p]];
    work->sent.length = kept;
    return &work->sent;
}

/* Counts of 8 bits to those of 32, before they can overflow. */
static void carry(int8_t *narrow, int32_t *wide, int64_t size) {
    for (int64_t i = 0; i < size; i++) wide[i] += narrow[i];
    memset(narrow, 0, (size_t)size);
}

/* The leak-weighted sum of spikes, r <- leak * r + s. */
static void weigh(const PopulationPlan *plan, State *state, const Emission *emission) {
    for (int64_t i = 0; i < plan->size; i++) state->trace[i] *= plan->leak;
    for (int64_t k = 0; k < emission->plus.length; k++) state->trace[emission->plus.position[k]] += 1;
    for (int64_t k = 0; k < emission->minus.length; k++) state->trace[emission->minus.position[k]] -= 1;
}

static void write_history(const PhasePlan *phase, const PopulationPlan *plan, const State *state, const Emission *emission, int64_t step, int64_t sample) {
    const int64_t offset = (step * phase->samples + sample) * plan->neurons;
    unpack_32_64(plan, state->potential, plan->history_potentials + offset);
    for (int sign = 1; emission && sign >= -1; sign -= 2) {
        const List *list = sign > 0 ? &emission->plus : &emission->minus;
        for (int64_t k = 0; k < list->length; k++) {
            const int32_t place = list->position[k] / plan->lanes, channel = list->position[k] % plan->lanes;
            const int64_t at = offset + (int64_t)channel * plan->places + place;
            if (plan->kind == RELAY) ((int64_t *)plan->history_spikes)[at] = emission->values[k];
            else ((int8_t *)plan->history_spikes)[at] = (int8_t)sign;
        }
    }
}

static void write_results(const PopulationPlan *plan, State *state, int64_t sample) {
    const int64_t offset = sample * plan->neurons;
    carry(state->counts8, state->counts, plan->size);
    if (plan->kind == RELAY) unpack_64_64(plan, state->counts64, (int64_t *)plan->counts + offset);
    else if (plan->kind != READOUT) unpack_32_32(plan, state->counts, (int32_t *)plan->counts + offset);
    if (state->activity) {
        carry(state->activity8, state->activity, plan->size);
        unpack_32_32(plan, state->activity, plan->activity + offset);
    }
    if (plan->traces) unpack_double(plan, state->trace, plan->traces + offset);
    unpack_32_64(plan, state->potential, plan->potentials + offset);
    if (state->saturated) unpack_32_32(plan, state->saturations, plan->saturations + offset);
}

/* The start of a sample: nothing has arrived, and what is injected at every step. */
static void begin_sample(const PopulationPlan *plan, State *state, int64_t sample) {
    const size_t size = (size_t)plan->size;
    for (int32_t s = 0; s < plan->slots; s++) state->ring[s].step = -1;
    state->began = 0;
    if (plan->kind == INPUT) return;
    memset(state->potential, 0, size * sizeof *state->potential);
    memset(state->counts8, 0, size);
    memset(state->counts, 0, size * sizeof *state->counts);
    if (state->saturated) memset(state->saturations, 0, size * sizeof *state->saturations);
    if (state->activity) {
        memset(state->activity8, 0, size);
        memset(state->activity, 0, size * sizeof *state->activity);
    }
    if (state->counts64) memset(state->counts64, 0, size * sizeof *state->counts64);
    if (state->trace) memset(state->trace, 0, size * sizeof *state->trace);
    if (state->waits && state->waiting64) memset(state->waiting64, 0, size * sizeof *state->waiting64);
    if (state->waits && state->waiting32) memset(state->waiting32, 0, size * sizeof *state->waiting32);
    if (plan->drive) memcpy(state->constant, plan->drive + sample * plan->size, size * sizeof *state->constant);
    else memset(state->constant, 0, size * sizeof *state->constant);
    state->waits = state->saturated = 0;
}

/* sign(u) * ((|u| * keep) >> 12), for |u| below 2^24, in 32 bits. */
static inline int32_t leaked(int32_t u, int32_t keep) {
    const int32_t size = u < 0 ? -u : u, left = (size >> 12) * keep + (((size & 4095) * keep) >> 12);
    return u < 0 ? -left : left;
}

/* Where the positions of each place begin. */
static void divide(const PopulationPlan *plan, List *list) {
    int32_t k = 0;
    for (int32_t place = 0; place < plan->places; place++) {
        list->begin[place] = k;
        while (k < list->length && list->position[k] < (place + 1) * plan->lanes) k++;
    }
    list->begin[plan->places] = k;
}

/* Tell how often a connection took each form; several threads may. */
static void tally(const SynapsePlan *way, const Arrival *arrival) {
    if (!way->taken) return;
#if defined(__GNUC__)
    __atomic_fetch_add(way->taken, arrival->by_event, __ATOMIC_RELAXED);
    __atomic_fetch_add(way->taken + 1, arrival->by_product, __ATOMIC_RELAXED);
#else
    way->taken[0] += arrival->by_event;
    way->taken[1] += arrival->by_product;
#endif
}

#if defined(__GNUC__)
#define APART __attribute__((noinline)) /* so that a profile shows where the time goes */
#else
#define APART
#endif
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define TARGET
#define NAME(x) JOIN(x, _plain)
#define SET 0
#include "core_run.h"
#undef SET
#undef NAME
#undef TARGET

#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE 1
#include <immintrin.h>

#define TARGET __attribute__((target("avx2")))
#define NAME(x) JOIN(x, _avx2)
#define SET 1
#include "core_run.h"
#undef SET
#undef NAME
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define NAME(x) JOIN(x, _avx512)
#define SET 2
#include "core_run.h"
#undef SET
#undef NAME
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")))
#define NAME(x) JOIN(x, _vnni)
#define SET 3
#include "core_run.h"
#undef SET
#undef NAME
#undef TARGET
#endif

/* The instruction sets this machine has of those compiled: 0 plain, 1 AVX2, 2 AVX-512, 3 AVX-512 with VNNI. */
int32_t toolchain_core_widest(void) {
#ifdef WIDE
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512vnni") ? 3 : 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

/* All ticks of samples first to last (exclusive); 0, or 1 where memory ran out before anything was written. */
int32_t toolchain_phase(const PhasePlan *phase, int64_t first, int64_t last, int32_t widest) {
#ifdef WIDE
    if (widest == 3) return run_vnni(phase, first, last);
    if (widest == 2) return run_avx512(phase, first, last);
    if (widest == 1) return run_avx2(phase, first, last);
#else
    (void)widest;
#endif
    return run_plain(phase, first, last);
}

/* How large the structs are here, for who describes them once more: 0 PhasePlan, 1 PopulationPlan, 2 SynapsePlan, 3 HostPlan, 4 DenseClass; 5: which edition
   of their meaning this is. */
int32_t toolchain_core_size(int32_t which) {
    const size_t sizes[] = {sizeof(PhasePlan), sizeof(PopulationPlan), sizeof(SynapsePlan), sizeof(HostPlan), sizeof(DenseClass), EDITION};
    return (int32_t)sizes[which];
}
