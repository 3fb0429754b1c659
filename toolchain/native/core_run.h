/* Phases for one instruction set: included by core.c with NAME(x), TARGET and SET (as of toolchain_core_widest) defined. */

/* Let what has arrived by a connection wait for the population's next step. */
TARGET APART static void NAME(settle)(const PopulationPlan *plan, State *state, const SynapsePlan *way, Arrival *arrival) {
    const int64_t size = plan->size, factor = (int64_t)1 << way->exponent;
    int64_t *restrict wide = state->waiting64;
    int32_t *restrict narrow = state->waiting32;
    const int32_t *restrict sums32 = arrival->sums32;
    const int64_t *restrict sums64 = arrival->sums64;
    if (arrival->pending == 32 && narrow)
        for (int64_t i = 0; i < size; i++) narrow[i] += sums32[i] * (int32_t)factor;
    else if (arrival->pending == 32)
        for (int64_t i = 0; i < size; i++) wide[i] += sums32[i] * factor;
    else if (narrow)
        for (int64_t i = 0; i < size; i++) narrow[i] += (int32_t)(sums64[i] * factor);
    else
        for (int64_t i = 0; i < size; i++) wide[i] += sums64[i] * factor;
    arrival->pending = 0;
    state->waits = 1;
}

/* ---- spikes by event: the rows of weights that meet in a target place are added up in registers ---- */

#if defined(__GNUC__)
#if SET >= 2
#define BYTES 64
#elif SET == 1
#define BYTES 32
#else
#define BYTES 16
#endif
#define PARTS (64 / BYTES)
typedef uint16_t NAME(Vector) __attribute__((vector_size(BYTES), may_alias));

/* TILES times 64 lanes, of which `lanes` are there; keep: -1 adds to the sums there were, 0 begins them. A row has two weights in each 16 bits, both 128 too large: the sum of the high ones, and of both, modulo 2^16,
   which up to TOGETHER rows cannot confuse. */
#define SUM(TILES)                                                                                                                              \
    TARGET static void NAME(sum_##TILES)(const uint8_t *weights, int64_t stride, const int32_t *rows, int64_t length, int32_t sign, int32_t lanes, \
                                         int32_t keep, int32_t *sums) {                                                                         \
        int64_t from = 0;                                                                                                                       \
        do {                                                                                                                                    \
            const int64_t until = from + AT_ONCE(length - from);                                                                                \
            const int32_t bias = 128 * (int32_t)(until - from);                                                                                 \
            NAME(Vector) all[TILES * PARTS] = {{0}}, high[TILES * PARTS] = {{0}};                                                               \
            for (; from < until; from++) {                                                                                                      \
                const NAME(Vector) *row = (const NAME(Vector) *)(weights + rows[from] * stride);                                                \
                _Pragma("GCC unroll 8") for (int t = 0; t < TILES * PARTS; t++) {                                                               \
                    const NAME(Vector) pair = row[t];                                                                                           \
                    all[t] += pair;                                                                                                             \
                    high[t] += pair >> 8;                                                                                                       \
                }                                                                                                                               \
            }                                                                                                                                   \
            _Pragma("GCC unroll 8") for (int t = 0; t < TILES * PARTS; t++) {                                                                   \
                uint16_t part[BYTES];                                                                                                           \
                const NAME(Vector) low = all[t] - (high[t] << 8);                                                                               \
                int32_t *restrict to = sums + t / PARTS * 64 + t % PARTS * (BYTES / 2);                                                         \
                memcpy(part, &low, BYTES);                                                                                                      \
                memcpy(part + BYTES / 2, high + t, BYTES);                                                                                      \
                for (int j = 0; j < BYTES / 2; j++) to[j] = (to[j] & keep) + sign * (part[j] - bias);                                           \
                if (t / PARTS * 64 + 64 > lanes) continue;                                                                                      \
                for (int j = 0; j < BYTES / 2; j++) to[32 + j] = (to[32 + j] & keep) + sign * (part[BYTES / 2 + j] - bias);                     \
            }                                                                                                                                   \
            keep = -1;                                                                                                                          \
        } while (from < length);                                                                                                                \
    }
#ifdef FAULT_NO_FLUSH
#define AT_ONCE(LENGTH) (LENGTH)
#else
#define AT_ONCE(LENGTH) ((LENGTH) < TOGETHER ? (LENGTH) : TOGETHER)
#endif
#if SET >= 2
#define MOST 8
SUM(1) SUM(2) SUM(3) SUM(4) SUM(5) SUM(6) SUM(7) SUM(8)
#else
#define MOST 1
SUM(1)
#endif
#undef SUM
#undef AT_ONCE
#undef PARTS
#undef BYTES
typedef void NAME(Sum)(const uint8_t *, int64_t, const int32_t *, int64_t, int32_t, int32_t, int32_t, int32_t *);
static NAME(Sum) *const NAME(sums)[MOST] = {
    NAME(sum_1),
#if SET >= 2
    NAME(sum_2), NAME(sum_3), NAME(sum_4), NAME(sum_5), NAME(sum_6), NAME(sum_7), NAME(sum_8),
#endif
};

TARGET static inline void NAME(sum_rows)(const SynapsePlan *way, const int32_t *rows, int64_t length, int32_t sign, int32_t keep, int32_t *sums) {
    for (int32_t lane = 0; lane < way->lanes;) {
        const int32_t left = way->lanes - lane, tiles = (left + 63) / 64 < MOST ? (left + 63) / 64 : MOST;
        NAME(sums)[tiles - 1](way->rows + lane, way->row_bytes, rows, length, sign, left, keep, sums + lane);
        lane += 64 * tiles;
    }
}
#undef MOST
#else
TARGET static void NAME(sum_rows)(const SynapsePlan *way, const int32_t *rows, int64_t length, int32_t sign, int32_t keep, int32_t *sums) {
    for (int32_t j = 0; j < way->lanes; j++) sums[j] &= keep;
    for (int64_t k = 0; k < length; k++)
        for (int32_t j = 0; j < way->lanes; j++)
            sums[j] += sign * (way->rows[rows[k] * way->row_bytes + j / 64 * 64 + j % 32 * 2 + j % 64 / 32] - 128);
}
#endif

TARGET APART static void NAME(add_events)(const SynapsePlan *way, const PopulationPlan *source, const List *list, int32_t sign, int32_t keep, Work *work, int32_t *sums) {
    if (!way->take_begin) {
        NAME(sum_rows)(way, list->position, list->length, sign, keep, sums);
        return;
    }
    const int32_t lanes = source->lanes, *begin = list->begin, *position = list->position;
    int32_t *rows = work->rows;
    for (int32_t t = 0; t < way->targets; t++) {
        int64_t length = 0;
        for (const Take *take = way->takes + way->take_begin[t]; take < way->takes + way->take_begin[t + 1]; take++) {
            const int32_t first = begin[take->place], found = begin[take->place + 1] - first, shift = take->row - take->place * lanes;
#if SET >= 2
            const __m512i by = _mm512_set1_epi32(shift);
            int32_t k = 0;
            do { /* whole vectors: lists have room behind them */
                _mm512_storeu_si512(rows + length + k, _mm512_add_epi32(_mm512_loadu_si512(position + first + k), by));
                k += 16;
            } while (k < found);
#else
            for (int32_t k = 0; k < found; k++) rows[length + k] = position[first + k] + shift;
#endif
            length += found;
        }
        NAME(sum_rows)(way, rows, length, sign, keep, sums + (int64_t)t * way->lanes);
    }
}

/* ---- values, each times its weights ---- */

TARGET static inline void NAME(add_row)(int64_t *restrict sums, const int32_t *restrict weights, int64_t length, int32_t value) {
    int64_t j = 0;
#if SET >= 2
    for (; j + 8 <= length; j += 8) {
        const __m512i row = _mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)(weights + j)));
        _mm512_storeu_si512(sums + j, _mm512_add_epi64(_mm512_loadu_si512(sums + j), _mm512_mul_epi32(row, _mm512_set1_epi64(value))));
    }
#elif SET == 1
    for (; j + 4 <= length; j += 4) {
        const __m256i row = _mm256_cvtepi32_epi64(_mm_loadu_si128((const __m128i *)(weights + j)));
        const __m256i made = _mm256_mul_epi32(row, _mm256_set1_epi64x(value));
        _mm256_storeu_si256((__m256i *)(sums + j), _mm256_add_epi64(_mm256_loadu_si256((const __m256i *)(sums + j)), made));
    }
#endif
    for (; j < length; j++) sums[j] += (int64_t)value * weights[j];
}

#if SET >= 2
/* A matrix of values, 64 lanes at a time, their sums in registers. */
TARGET static void NAME(add_matrix)(const SynapsePlan *way, const List *list, const int32_t *values, int32_t sign, int64_t *sums) {
    for (int64_t lane = 0; lane < way->slab; lane += 64) {
        __m512i sum[8];
        _Pragma("GCC unroll 8") for (int v = 0; v < 8; v++) sum[v] = _mm512_loadu_si512(sums + lane + 8 * v);
        for (int64_t k = 0; k < list->length; k++) {
            const int32_t *row = way->weight + list->position[k] * way->slab + lane;
            const __m512i value = _mm512_set1_epi64(values ? values[k] : sign);
            _Pragma("GCC unroll 8") for (int v = 0; v < 8; v++)
                sum[v] = _mm512_add_epi64(sum[v], _mm512_mul_epi32(_mm512_cvtepi32_epi64(_mm256_loadu_si256((const __m256i *)(row + 8 * v))), value));
        }
        _Pragma("GCC unroll 8") for (int v = 0; v < 8; v++) _mm512_storeu_si512(sums + lane + 8 * v, sum[v]);
    }
}
#endif

TARGET APART static void NAME(add_values)(const SynapsePlan *way, int32_t source_lanes, int32_t target_lanes, const List *list, const int32_t *values,
                                          int32_t sign, const uint8_t *mask, int64_t *restrict sums) {
#if SET >= 2
    if (way->form == MATRIX && !mask && way->slab % 64 == 0) {
        NAME(add_matrix)(way, list, values, sign, sums);
        return;
    }
#endif
    for (int64_t k = 0; k < list->length; k++) {
        const int32_t position = list->position[k];
        const int32_t value = values ? values[k] : sign;
        if (mask && !mask[position]) continue;
        if (way->form == MATRIX) {
            NAME(add_row)(sums, way->weight + position * way->slab, way->slab, value);
            continue;
        }
        const int32_t place = position / source_lanes, channel = position % source_lanes;
        for (const Patch *patch = way->patches + way->begin[place]; patch < way->patches + way->begin[place + 1]; patch++)
            for (int32_t r = 0; r < patch->rows; r++) {
                int64_t *restrict to = sums + patch->to + r * way->row_to;
                if (way->form == DIAGONAL) {
                    for (int32_t j = 0; j < patch->length; j++) to[(int64_t)j * target_lanes + channel] += (int64_t)value * way->weight[channel];
                    continue;
                }
                NAME(add_row)(to, way->weight + channel * way->slab + patch->from + r * way->row_from, (int64_t)patch->length * target_lanes, value);
            }
    }
}

/* ---- products: every source neuron counts, spike or not ---- */

#if SET == 3
#define DOT(sum, values, weights) _mm512_dpbusd_epi32(sum, values, weights)
#elif SET == 2
#define DOT(sum, values, weights) _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(values, weights), _mm512_set1_epi16(1)))
#endif

#if SET >= 2
/* `places` windows times `vectors` vectors of 16 lanes. */
#define PRODUCT(PLACES, VECTORS)                                                                                                            \
    TARGET static void NAME(product_##PLACES##_##VECTORS)(const DenseClass *c, int32_t quads, const uint8_t *image, const int8_t *packed,   \
                                                          int64_t first, int64_t lane, int32_t *sums) {                                     \
        __m512i sum[PLACES][VECTORS], odd[PLACES][VECTORS]; /* few sums would wait for each other: two sets of them */                      \
        const int32_t twice = PLACES <= 2 ? quads / 2 * 2 : 0;                                                                              \
        const uint8_t *window[PLACES];                                                                                                      \
        _Pragma("GCC unroll 8") for (int m = 0; m < PLACES; m++) {                                                                          \
            window[m] = image + c->base[first + m];                                                                                         \
            _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++) sum[m][v] = _mm512_loadu_si512(c->start + lane + 16 * v),             \
                                                                             odd[m][v] = _mm512_setzero_si512();                            \
        }                                                                                                                                   \
        for (int32_t t = 0; t < c->taps; t++) {                                                                                             \
            const int32_t tap = c->tap[t];                                                                                                  \
            const int8_t *weight = packed + (int64_t)64 * VECTORS * quads * c->slot[t];                                                     \
            for (int32_t q = 0; q < twice; q += 2, weight += 128 * VECTORS) {                                                               \
                _Pragma("GCC unroll 8") for (int m = 0; m < PLACES; m++) {                                                                  \
                    int32_t four[2];                                                                                                        \
                    memcpy(four, window[m] + tap + 4 * q, 8);                                                                               \
                    const __m512i values = _mm512_set1_epi32(four[0]), next = _mm512_set1_epi32(four[1]);                                   \
                    _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++) {                                                             \
                        sum[m][v] = DOT(sum[m][v], values, _mm512_loadu_si512(weight + 64 * v));                                            \
                        odd[m][v] = DOT(odd[m][v], next, _mm512_loadu_si512(weight + 64 * (VECTORS + v)));                                  \
                    }                                                                                                                       \
                }                                                                                                                           \
            }                                                                                                                               \
            for (int32_t q = twice; q < quads; q++, weight += 64 * VECTORS) {                                                               \
                __m512i row[VECTORS];                                                                                                       \
                _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++) row[v] = _mm512_loadu_si512(weight + 64 * v);                     \
                _Pragma("GCC unroll 8") for (int m = 0; m < PLACES; m++) {                                                                  \
                    int32_t four;                                                                                                           \
                    memcpy(&four, window[m] + tap + 4 * q, 4);                                                                              \
                    const __m512i values = _mm512_set1_epi32(four);                                                                         \
                    _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++) sum[m][v] = DOT(sum[m][v], values, row[v]);                   \
                }                                                                                                                           \
            }                                                                                                                               \
        }                                                                                                                                   \
        _Pragma("GCC unroll 8") for (int m = 0; m < PLACES; m++)                                                                            \
            _Pragma("GCC unroll 8") for (int v = 0; v < VECTORS; v++)                                                                       \
                _mm512_storeu_si512(sums + c->target[first + m] + lane + 16 * v, _mm512_add_epi32(sum[m][v], odd[m][v]));                   \
    }
#define PRODUCTS(PLACES) PRODUCT(PLACES, 4) PRODUCT(PLACES, 2)
PRODUCTS(1) PRODUCTS(2) PRODUCTS(3) PRODUCTS(4) PRODUCTS(5) PRODUCTS(6)
#undef PRODUCTS
#undef PRODUCT
typedef void NAME(Product)(const DenseClass *, int32_t, const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);
static NAME(Product) *const NAME(products)[2][6] = {
    {NAME(product_1_4), NAME(product_2_4), NAME(product_3_4), NAME(product_4_4), NAME(product_5_4), NAME(product_6_4)},
    {NAME(product_1_2), NAME(product_2_2), NAME(product_3_2), NAME(product_4_2), NAME(product_5_2), NAME(product_6_2)},
};

/* All targets of `vectors` vectors of lanes. */
TARGET static void NAME(products_of)(const SynapsePlan *way, const uint8_t *image, const int8_t *packed, int32_t vectors, int64_t lane, int32_t *sums) {
    for (const DenseClass *c = way->dense; c < way->dense + way->dense_classes; c++)
        for (int64_t first = 0; first < c->targets; first += ABREAST) {
            const int64_t places = c->targets - first < ABREAST ? c->targets - first : ABREAST;
            NAME(products)[vectors == 2][places - 1](c, way->quads, image, packed, first, lane, sums);
        }
}
#elif SET == 1
/* All targets of `vectors` vectors of lanes, half of one at a time; values up to 2, so that no pair of products leaves 16 bits. */
TARGET static void NAME(products_of)(const SynapsePlan *way, const uint8_t *image, const int8_t *packed, int32_t vectors, int64_t lane, int32_t *sums) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (const DenseClass *c = way->dense; c < way->dense + way->dense_classes; c++)
        for (int64_t m = 0; m < c->targets; m++)
            for (int32_t half = 0; half < 2 * vectors; half += 4) {
                __m256i sum[4];
                _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) sum[v] = _mm256_loadu_si256((const __m256i *)(c->start + lane + 8 * (half + v)));
                for (int32_t t = 0; t < c->taps; t++) {
                    const uint8_t *window = image + c->base[m] + c->tap[t];
                    const int8_t *weight = packed + (int64_t)64 * vectors * way->quads * c->slot[t] + 32 * half;
                    for (int32_t q = 0; q < way->quads; q++, weight += 64 * vectors) {
                        int32_t four;
                        memcpy(&four, window + 4 * q, 4);
                        const __m256i values = _mm256_set1_epi32(four);
                        _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) sum[v] = _mm256_add_epi32(
                            sum[v], _mm256_madd_epi16(_mm256_maddubs_epi16(values, _mm256_loadu_si256((const __m256i *)(weight + 32 * v))), ones));
                    }
                }
                _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) _mm256_storeu_si256((__m256i *)(sums + c->target[m] + lane + 8 * (half + v)), sum[v]);
            }
}
#else
TARGET static void NAME(products_of)(const SynapsePlan *way, const uint8_t *image, const int8_t *packed, int32_t vectors, int64_t lane, int32_t *sums) {
    const int32_t made = 16 * vectors;
    for (const DenseClass *c = way->dense; c < way->dense + way->dense_classes; c++)
        for (int64_t m = 0; m < c->targets; m++) {
            int32_t *restrict sum = sums + c->target[m] + lane;
            memcpy(sum, c->start + lane, (size_t)made * sizeof *sum);
            for (int32_t t = 0; t < c->taps; t++) {
                const int8_t *restrict row = packed + (int64_t)4 * made * way->quads * c->slot[t];
                for (int32_t q = 0; q < way->quads; q++, row += 4 * made) {
                    const uint8_t *four = image + c->base[m] + c->tap[t] + 4 * q;
                    if (!(four[0] | four[1] | four[2] | four[3])) continue;
                    for (int32_t j = 0; j < made; j++)
                        sum[j] += four[0] * row[4 * j] + four[1] * row[4 * j + 1] + four[2] * row[4 * j + 2] + four[3] * row[4 * j + 3];
                }
            }
        }
}
#endif
#undef DOT

TARGET APART static void NAME(mark)(const SynapsePlan *way, const PopulationPlan *source, const List *list, const uint8_t *mask, int32_t sign, uint8_t *image) {
    for (int32_t place = 0; list->length && place < source->places; place++) {
        const int32_t by = way->image_place[place] - place * source->lanes;
        for (int32_t k = list->begin[place]; k < list->begin[place + 1]; k++)
            image[list->position[k] + by] = (uint8_t)(way->background + sign * (mask ? mask[list->position[k]] : 1));
    }
}

TARGET APART static void NAME(add_products)(const SynapsePlan *way, const PopulationPlan *source, const Emission *emission, const uint8_t *mask, Arrival *arrival) {
    memset(arrival->image, way->background, (size_t)way->image_size);
    NAME(mark)(way, source, &emission->plus, mask, 1, arrival->image);
    NAME(mark)(way, source, &emission->minus, mask, -1, arrival->image);
    const int8_t *packed = way->packed;
    for (int64_t lane = 0; lane < way->lanes;) { /* a tile's weights stay in the cache for all targets */
        const int32_t vectors = way->lanes - lane >= 64 ? 4 : 2;
        NAME(products_of)(way, arrival->image, packed, vectors, lane, arrival->sums32);
        packed += (int64_t)64 * vectors * way->quads * way->slots;
        lane += 16 * vectors;
    }
}

/* What a source emitted arrives at its target. */
TARGET static void NAME(deliver)(const PhasePlan *phase, int32_t index, const Emission *emission, int64_t sample, Work *work) {
    const SynapsePlan *way = phase->synapses + index;
    const PopulationPlan *source = phase->populations + way->source, *target = phase->populations + way->target;
    Arrival *arrival = work->arrivals + index;
    const uint8_t *mask = way->mask ? way->mask + sample * source->size : NULL;
    const int64_t events = emission->plus.length + emission->minus.length;
    if (arrival->pending) NAME(settle)(target, work->states + way->target, way, arrival);
    if (!events) return;
    arrival->pending = way->wide ? 64 : 32;
    if (way->wide) {
        if (arrival->steady) return;
        memset(arrival->sums64, 0, (size_t)target->size * sizeof(int64_t));
        NAME(add_values)(way, source->lanes, target->lanes, &emission->plus, emission->values, 1, mask, arrival->sums64);
        NAME(add_values)(way, source->lanes, target->lanes, &emission->minus, emission->values, -1, mask, arrival->sums64);
        arrival->steady = way->still;
        return;
    }
    if (way->dense_classes && events >= way->dense_from) {
        NAME(add_products)(way, source, emission, mask, arrival);
        arrival->by_product++;
        return;
    }
    int32_t keep = 0; /* the first list begins the sums */
    for (int32_t sign = 1; sign >= -1; sign -= 2) {
        const List *list = sign > 0 ? &emission->plus : &emission->minus;
        if (!list->length) continue;
        NAME(add_events)(way, source, mask ? masked(list, mask, source->places, work) : list, sign, keep, work, arrival->sums32);
        keep = -1;
    }
    arrival->by_event++;
}

/* ---- model steps ---- */

#define TOTAL int32_t
#define STEP(x) NAME(x##32)
#define WAITING waiting32
#include "core_step.h"
#undef TOTAL
#undef STEP
#undef WAITING
#define TOTAL int64_t
#define STEP(x) NAME(x##64)
#define WAITING waiting64
#include "core_step.h"
#undef TOTAL
#undef STEP
#undef WAITING

#if SET >= 2
/* What 16 neurons add up, clamped to 24 bits, saturations counted. */
TARGET static inline __m512i NAME(total)(State *state, const Inflow *in, int32_t n_in, int64_t i) {
    __m512i total = _mm512_add_epi32(_mm512_load_si512(state->potential + i), _mm512_load_si512(state->constant + i));
    for (int32_t k = 0; k < n_in; k++)
        total = _mm512_add_epi32(total, _mm512_sll_epi32(_mm512_load_si512(in[k].sums + i), _mm_cvtsi32_si128(in[k].exponent)));
#ifndef FAULT_NO_SATURATION
    const __m512i limit = _mm512_set1_epi32(LIMIT);
    const __mmask16 outside = _mm512_cmpgt_epu32_mask(_mm512_add_epi32(total, limit), _mm512_set1_epi32(2 * LIMIT)); /* both sides at once */
    if (outside) {
        const __m512i counted = _mm512_load_si512(state->saturations + i);
        _mm512_store_si512(state->saturations + i, _mm512_mask_add_epi32(counted, outside, counted, _mm512_set1_epi32(1)));
        total = _mm512_max_epi32(_mm512_min_epi32(total, limit), _mm512_set1_epi32(-LIMIT));
        state->saturated = 1;
    }
#endif
    return total;
}

/* Couples without leak whose sums fit 32 bits, everything in one pass. */
TARGET APART static void NAME(fire_fast)(const PopulationPlan *plan, State *state, const Inflow *in, int32_t n_in, Emission *emission) {
    const __m512i threshold = _mm512_set1_epi32(plan->threshold), opposite = _mm512_set1_epi32(-plan->threshold), reset = _mm512_set1_epi32(plan->reset);
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m128i one = _mm_set1_epi8(1);
    const int both = plan->kind == BOTH;
    int32_t *list = emission->plus.position, *list_minus = emission->minus.position;
    int32_t plus = 0, minus = 0;
    for (int64_t place = 0, i = 0; place < plan->places; place++) {
        emission->plus.begin[place] = plus;
        if (both) emission->minus.begin[place] = minus;
        for (const int64_t end = i + plan->lanes; i < end; i += 16) {
            __m512i total = NAME(total)(state, in, n_in, i);
            const __mmask16 fired = _mm512_cmpge_epi32_mask(total, threshold);
            const __m512i position = _mm512_add_epi32(order, _mm512_set1_epi32((int32_t)i));
            __m128i counts = _mm_load_si128((const __m128i *)(state->counts8 + i));
            total = _mm512_mask_sub_epi32(total, fired, total, reset);
            counts = _mm_mask_add_epi8(counts, fired, counts, one);
            _mm512_storeu_si512(list + plus, _mm512_maskz_compress_epi32(fired, position));
            plus += __builtin_popcount(fired);
            if (both) {
                const __mmask16 back = _mm512_cmple_epi32_mask(total, opposite) & (__mmask16)~fired;
                const __m128i active = _mm_load_si128((const __m128i *)(state->activity8 + i));
                total = _mm512_mask_add_epi32(total, back, total, reset);
                counts = _mm_mask_sub_epi8(counts, back, counts, one);
                _mm_store_si128((__m128i *)(state->activity8 + i), _mm_mask_add_epi8(active, fired | back, active, one));
                _mm512_storeu_si512(list_minus + minus, _mm512_maskz_compress_epi32(back, position));
                minus += __builtin_popcount(back);
            }
            _mm_store_si128((__m128i *)(state->counts8 + i), counts);
            _mm512_store_si512(state->potential + i, total);
        }
    }
    emission->plus.begin[plan->places] = plus;
    if (both) emission->minus.begin[plan->places] = minus;
    emission->plus.length = plus;
    emission->minus.length = minus;
}

/* Readouts without leak whose sums fit 32 bits. */
TARGET static void NAME(add_up)(const PopulationPlan *plan, State *state, const Inflow *in, int32_t n_in) {
    for (int64_t i = 0; i < plan->size; i += 16) _mm512_store_si512(state->potential + i, NAME(total)(state, in, n_in, i));
}
#endif

/* A population's model step: everything that has arrived, its own currents, spikes. */
TARGET static void NAME(advance)(const PhasePlan *phase, int32_t p, int64_t step, int64_t sample, Work *work) {
    const PopulationPlan *plan = phase->populations + p;
    State *state = work->states + p;
    Emission *emission = plan->kind == READOUT ? NULL : state->ring + step % plan->slots;
    Inflow in[INFLOWS + 1];
    int32_t n_in = 0;
    for (int32_t b = 0; b < plan->biases; b++)
        if (plan->bias_start[b] == step) {
            const int32_t *restrict bias = plan->bias + b * plan->size;
            int32_t *restrict constant = state->constant;
            for (int64_t i = 0; i < plan->size; i++) constant[i] += bias[i];
        }
    for (int32_t s = plan->first_in; s < plan->last_in; s++) {
        Arrival *arrival = work->arrivals + s;
        const SynapsePlan *way = phase->synapses + s;
        if (!arrival->pending) continue;
        if (arrival->pending == 64 || n_in == INFLOWS) {
            NAME(settle)(plan, state, way, arrival);
            continue;
        }
        in[n_in].sums = arrival->sums32;
        in[n_in++].exponent = way->exponent;
        arrival->pending = 0;
    }
    if (state->waits && state->waiting32) {
        in[n_in].sums = state->waiting32;
        in[n_in++].exponent = 0;
    }
#if SET >= 2
    if (!plan->wide && plan->keep == 4096 && (plan->kind == PLUS || plan->kind == BOTH)) NAME(fire_fast)(plan, state, in, n_in, emission);
    else if (!plan->wide && plan->keep == 4096 && plan->kind == READOUT) NAME(add_up)(plan, state, in, n_in);
    else
#endif
    if (plan->wide) NAME(fire64)(plan, state, in, n_in, emission);
    else NAME(fire32)(plan, state, in, n_in, emission);
    if (state->waits && plan->wide) memset(state->waiting64, 0, (size_t)plan->size * sizeof *state->waiting64);
    else if (state->waits) memset(state->waiting32, 0, (size_t)plan->size * sizeof *state->waiting32);
    state->waits = 0;
    if (emission) emission->step = step;
    if (plan->traces) weigh(plan, state, emission);
    if ((step + 1) % COUNTED == 0) {
        carry(state->counts8, state->counts, plan->size);
        if (state->activity) carry(state->activity8, state->activity, plan->size);
    }
    if (plan->history_potentials) write_history(phase, plan, state, emission, step, sample);
}

/* The currents that the host computes, into what populations take in at every step. */
TARGET static void NAME(inject)(const PhasePlan *phase, int64_t sample, Work *work) {
    for (int32_t h = 0; h < phase->n_hosts; h++) {
        const HostPlan *host = phase->hosts + h;
        const PopulationPlan *target = phase->populations + host->way.target;
        const int64_t size = target->size, sources = (int64_t)host->channels * host->places;
        const int64_t half = host->shift ? (int64_t)1 << (host->shift - 1) : 0;
        int64_t *restrict total = work->host;
        int32_t *restrict constant = work->states[host->way.target].constant;
        list_values(&work->encoded, host->values + sample * sources, 1, host->channels, host->places, host->channels);
        if (host->bias) memcpy(total, host->bias, (size_t)size * sizeof *total);
        else memset(total, 0, (size_t)size * sizeof *total);
        NAME(add_values)(&host->way, host->channels, target->lanes, &work->encoded.plus, work->encoded.values, 1, NULL, total);
        for (int64_t i = 0; i < size; i++) {
            int64_t mantissa = (total[i] + half) >> host->shift;
            mantissa = mantissa > 4095 ? 4095 : mantissa < -4096 ? -4096 : mantissa;
            constant[i] += (int32_t)(mantissa * ((int64_t)1 << host->exponent));
        }
    }
}

TARGET static int32_t NAME(run)(const PhasePlan *phase, int64_t first, int64_t last) {
    Work work;
    if (!prepare(&work, phase)) {
        release(&work);
        return 1;
    }
    for (int64_t sample = first; sample < last; sample++) {
        for (int32_t p = 0; p < phase->n_populations; p++) begin_sample(phase->populations + p, work.states + p, sample);
        for (int32_t s = 0; s < phase->n_synapses; s++) work.arrivals[s].pending = work.arrivals[s].steady = 0;
        NAME(inject)(phase, sample, &work);
        for (int64_t tick = 0; tick < phase->ticks; tick++)
            for (int32_t p = 0; p < phase->n_populations; p++) {
                const PopulationPlan *plan = phase->populations + p;
                const int64_t step = step_at(phase, plan, tick);
                if (plan->kind == INPUT) {
                    if (step >= 0) emit(plan, work.states + p, step, sample);
                    continue;
                }
                for (int32_t s = plan->first_in; s < plan->last_in; s++) {
                    const SynapsePlan *way = phase->synapses + s;
                    const PopulationPlan *source = phase->populations + way->source;
                    const int64_t sent = step_at(phase, source, tick - way->delay);
                    if (sent < 0) continue;
                    const Emission *emission = work.states[way->source].ring + sent % source->slots;
                    if (emission->step == sent) NAME(deliver)(phase, s, emission, sample, &work);
                }
                if (step >= 0) NAME(advance)(phase, p, step, sample, &work);
            }
        for (int32_t p = 0; p < phase->n_populations; p++)
            if (phase->populations[p].kind != INPUT) write_results(phase->populations + p, work.states + p, sample);
    }
    for (int32_t s = 0; s < phase->n_synapses; s++) tally(phase->synapses + s, work.arrivals + s);
    release(&work);
    return 0;
}
