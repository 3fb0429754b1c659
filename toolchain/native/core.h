/* What toolchain.targets.sim_native lays out for core.c. Positions are (place, lane) of a population; pointers of results point to (samples, neurons),
   neurons in order (channel, place). */

#include <stdint.h>

enum { EDITION = 1 }; /* one more whenever a field changes its meaning; phases.py has it too */

enum { INPUT, PLUS, BOTH, READOUT, RELAY };  /* kinds of populations */
enum { WINDOW, MATRIX, DIAGONAL };           /* forms of connections */

/* A block of targets that a source place reaches: `rows` rows of `length` target places that follow each other. */
typedef struct {
    int32_t to, from; /* first lane of the first target, first weight behind those of the channels before */
    int32_t rows, length;
} Patch;

/* A source place that a target place takes from: the weights of its channels are rows from `row` on. */
typedef struct {
    int32_t place, row;
} Take;

/* Targets whose windows look alike: each adds up, over `taps`, the products of `quads` times four source channels with their weights. */
typedef struct {
    int32_t targets, taps;
    const int32_t *target; /* first lane of each target place */
    const int32_t *base;   /* where its window begins in the image of the source */
    const int32_t *tap;    /* where each tap lies in a window */
    const int32_t *slot;   /* which of the kernel's slots it is */
    const int32_t *start;  /* (lanes of a target place): what the sums begin with */
} DenseClass;

typedef struct {
    int32_t source, target; /* populations, by their place in the order of processing */
    int32_t delay, form, exponent;
    int32_t wide;  /* values times weights of 32 bits, one after the other, summed in 64; else rows of weights of 8 bits, and products */
    int32_t still; /* from an input that emits the same at every step */
    int32_t lanes; /* of a target place; of a matrix all of the target */
    /* wide */
    int64_t slab;             /* weights of a channel; of a matrix: of a position */
    int64_t row_to, row_from; /* from one row of targets, of weights, to the next */
    const int32_t *begin;     /* where the patches of each source place begin */
    const Patch *patches;
    const int32_t *weight;
    /* rows */
    int32_t targets;
    const int32_t *take_begin; /* where what each target place takes begins; NULL: the rows are the source's positions */
    const Take *takes;
    const uint8_t *rows; /* each `row_bytes`: weights + 128, lanes j and 32 + j of every 64 side by side */
    int64_t row_bytes;
    /* products */
    int64_t dense_from; /* events from which products cost less */
    int32_t dense_classes;
    int32_t quads;      /* fours of source channels in a tap */
    int32_t slots;      /* of the kernel */
    int32_t background; /* of the image: 1 for signed spikes, stored as 0, 1, 2 */
    int64_t image_size;
    const int32_t *image_place; /* of each source place */
    const DenseClass *dense;
    const int8_t *packed; /* (16-lane vectors by fours, slots, quads, vectors of the four, 16, 4 channels) */
    /* of a run */
    const uint8_t *mask; /* (samples, size of the source): 1 where spikes are sent; or NULL */
    int64_t *taken;      /* how often by event and by product, (2) */
} SynapsePlan;

typedef struct {
    int32_t kind, wide;
    int32_t channels, places, lanes;
    int32_t start, slots, biases;
    int32_t threshold, reset, keep; /* keep: of 4096, after a step */
    int32_t frames;                 /* of an input: 1, or one a time step */
    int32_t first_in, last_in;      /* the synapses that lead here */
    int64_t neurons, size;          /* size: places * lanes, rounded up to 64 */
    double leak;
    const int32_t *values;     /* of an input: (samples, neurons, frames) */
    const int32_t *drive;      /* (samples, size), or NULL */
    const int32_t *bias;       /* (biases, size) */
    const int32_t *bias_start;
    void *counts;              /* int32, of a relay int64 */
    int32_t *activity;
    double *traces;            /* or NULL */
    int64_t *potentials;
    int32_t *saturations;
    void *history_spikes;      /* (steps, samples, neurons), int8, of a relay int64; or NULL */
    int64_t *history_potentials;
} PopulationPlan;

/* A current that the host computes once a sample: round(connection(values) + bias) to 13 bits. */
typedef struct {
    SynapsePlan way;
    int32_t channels, places; /* of the source */
    int32_t shift, exponent;
    const int32_t *values; /* (samples, source neurons) */
    const int64_t *bias;   /* (size), or NULL */
} HostPlan;

typedef struct {
    int64_t samples, time_steps, period, ticks;
    int32_t n_populations, n_synapses, n_hosts;
    const PopulationPlan *populations;
    const SynapsePlan *synapses; /* by target, in the order of `populations` */
    const HostPlan *hosts;
} PhasePlan;
