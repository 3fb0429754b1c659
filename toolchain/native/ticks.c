/* What populations and connections of whole numbers do in one tick, for toolchain.targets (which proves every bound before it calls).

   Values are int8, weights int16, sums int16 or int32, potentials int32: whoever calls has shown that no sum, in whatever order, leaves its type. So every
   instruction set gives the same whole numbers. No state is kept between calls. Neurons of a population are in order (channel, row, column). */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int32_t target, slot, length; /* targets and kernel slots that follow each other: (target + i, slot + i) for i < length */
} Run;

typedef struct {
    int32_t channels, places;               /* of the source */
    int32_t made, made_places, made_width;  /* of the target: channels first */
    int32_t slot_rows, slot_columns;        /* of the kernel */
    int32_t diagonal;                       /* 1: every channel goes to itself alone, with one weight for all slots */
    int32_t exponent;
    const int32_t *place_row, *place_column; /* of each place of the source */
    const int32_t *place_order;              /* the places, those that reach as many targets one after the other */
    const int32_t *row_begin, *column_begin; /* where the runs of each source row and column begin */
    const Run *rows, *columns;
    const int16_t *weight;                   /* (channel, slot row, slot column, made), or (channel) */
} Connection;

typedef struct {
    int64_t neurons;
    int32_t threshold, reset, both;
    int32_t messages;            /* how many of `message` there are */
    const void *message[8];      /* (samples, neurons) each */
    int32_t bytes[8];            /* of a value of each: 1, 2 or 4 */
    int32_t *potential;          /* (samples, neurons), as all that follow but `bias` */
    int32_t *waiting;            /* what has arrived before, zeroed here; or NULL */
    const int32_t *drive;        /* or NULL */
    const int32_t *bias;         /* (neurons), or NULL */
    const uint8_t *mask;         /* 1 where spikes are sent; or NULL */
    int32_t *counts, *activity;  /* activity: or NULL */
    int32_t *saturations;
    int8_t *spikes, *sent;       /* the same where nothing masks */
} Couples;

enum { BLOCK = 1024, FEW = 16, LIMIT = (1 << 23) - 1 };

/* Eight values, the first in the lowest byte. */
static inline uint64_t eight(const int8_t *values, int64_t length) {
    uint64_t word = 0;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    memcpy(&word, values, length < 8 ? (size_t)length : 8);
#else
    for (int64_t i = 0; i < (length < 8 ? length : 8); i++) word |= (uint64_t)(uint8_t)values[i] << (8 * i);
#endif
    return word;
}

/* The place of the lowest byte that is not zero, in a word of which one is not. */
static inline int first_byte(uint64_t word) {
#if defined(__GNUC__)
    return __builtin_ctzll(word) / 8;
#else
    int place = 0;
    while (!(word & 0xff)) {
        word >>= 8;
        place++;
    }
    return place;
#endif
}

#if defined(__GNUC__) && !defined(__clang__)
#define SHUFFLES 1
typedef int16_t Eight __attribute__((vector_size(16)));
typedef int32_t EightWide __attribute__((vector_size(32)));
#define MIX(a, b, ...) __builtin_shuffle(a, b, (Eight){__VA_ARGS__})
#define LOW(a, b) MIX(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define HIGH(a, b) MIX(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#define LOW_PAIRS(a, b) MIX(a, b, 0, 1, 8, 9, 2, 3, 10, 11)
#define HIGH_PAIRS(a, b) MIX(a, b, 4, 5, 12, 13, 6, 7, 14, 15)
#define LOW_FOURS(a, b) MIX(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH_FOURS(a, b) MIX(a, b, 4, 5, 6, 7, 12, 13, 14, 15)

/* Eight rows of eight sums, `stride` apart, as eight columns times `scale`, integers of `bytes` bytes (2 or 4) that lie `apart` values apart. */
static inline __attribute__((always_inline)) void write_square(const int16_t *from, int64_t stride, void *to, int64_t apart, int32_t bytes, int32_t scale) {
    Eight r[8], a[8], b[8];
    for (int i = 0; i < 8; i++) memcpy(r + i, from + i * stride, sizeof *r);
    for (int i = 0; i < 8; i += 2) {
        a[i] = LOW(r[i], r[i + 1]);
        a[i + 1] = HIGH(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = LOW_PAIRS(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = HIGH_PAIRS(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        r[2 * i] = LOW_FOURS(b[i], b[i + 4]);
        r[2 * i + 1] = HIGH_FOURS(b[i], b[i + 4]);
    }
    for (int i = 0; i < 8; i++) {
        if (bytes == 2) {
            const Eight column = r[i] * (int16_t)scale;
            memcpy((int16_t *)to + i * apart, &column, sizeof column);
        } else {
            const EightWide column = __builtin_convertvector(r[i], EightWide) * scale;
            memcpy((int32_t *)to + i * apart, &column, sizeof column);
        }
    }
}
#else
#define SHUFFLES 0
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

#define TARGET
#define SUM int16_t
#define SQUARES SHUFFLES
#define NAME(x) JOIN(x, _16)
#include "ticks.h"
#undef SUM
#undef NAME
#undef SQUARES
#define SUM int32_t
#define SQUARES 0
#define NAME(x) JOIN(x, _32)
#include "ticks.h"
#include "couples.h"
#undef SUM
#undef NAME
#undef SQUARES
#undef TARGET

#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE 1

#define TARGET __attribute__((target("avx2")))
#define SUM int16_t
#define SQUARES SHUFFLES
#define NAME(x) JOIN(x, _16_avx2)
#include "ticks.h"
#undef SUM
#undef NAME
#undef SQUARES
#define SUM int32_t
#define SQUARES 0
#define NAME(x) JOIN(x, _32_avx2)
#include "ticks.h"
#include "couples.h"
#undef SUM
#undef NAME
#undef SQUARES
#undef TARGET

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define SUM int16_t
#define SQUARES SHUFFLES
#define NAME(x) JOIN(x, _16_avx512)
#include "ticks.h"
#undef SUM
#undef NAME
#undef SQUARES
#define SUM int32_t
#define SQUARES 0
#define NAME(x) JOIN(x, _32_avx512)
#include "ticks.h"
#include "couples.h"
#undef SUM
#undef NAME
#undef SQUARES
#undef TARGET
#endif

/* The currents of `values` (samples, source neurons) as (samples, target neurons) of 1, 2 or 4 bytes, added up in 2 or 4; how many values were not
   zero, or -1 where memory ran out. `widest` as of toolchain_widest. */
int64_t toolchain_deliver(const Connection *way, const int8_t *values, int64_t samples, void *out, int32_t bytes, int32_t sum_bytes, int32_t widest) {
#ifdef WIDE
    if (widest >= 2) return (sum_bytes == 2 ? deliver_16_avx512 : deliver_32_avx512)(way, values, samples, out, bytes);
    if (widest == 1) return (sum_bytes == 2 ? deliver_16_avx2 : deliver_32_avx2)(way, values, samples, out, bytes);
#else
    (void)widest;
#endif
    return (sum_bytes == 2 ? deliver_16 : deliver_32)(way, values, samples, out, bytes);
}

/* One model step of couples without leak; how many spikes are sent. */
int64_t toolchain_couples(const Couples *couples, int64_t samples, int32_t widest) {
#ifdef WIDE
    if (widest >= 2) return advance_32_avx512(couples, samples);
    if (widest == 1) return advance_32_avx2(couples, samples);
#else
    (void)widest;
#endif
    return advance_32(couples, samples);
}

/* waiting += message. */
void toolchain_collect(int32_t *waiting, const void *message, int32_t bytes, int64_t length, int32_t widest) {
#ifdef WIDE
    if (widest >= 2) { collect_32_avx512(waiting, message, bytes, length); return; }
    if (widest == 1) { collect_32_avx2(waiting, message, bytes, length); return; }
#else
    (void)widest;
#endif
    collect_32(waiting, message, bytes, length);
}

/* How large the structs are here, for who describes them once more: 0 Connection, 1 Couples. */
int32_t toolchain_ticks_size(int32_t which) {
    return (int32_t)(which == 0 ? sizeof(Connection) : sizeof(Couples));
}
