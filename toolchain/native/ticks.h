/* A connection's spikes to currents, in one width of sums for one instruction set: included by ticks.c with SUM, NAME(x) and TARGET defined. */

/* to += value * from, of a run of neighbours. */
TARGET static void NAME(add)(SUM *restrict to, const int16_t *restrict from, int64_t run, int32_t value) {
    if (value == 1)
        for (int64_t j = 0; j < run; j++) to[j] = (SUM)(to[j] + from[j]);
    else if (value == -1)
        for (int64_t j = 0; j < run; j++) to[j] = (SUM)(to[j] - from[j]);
    else
        for (int64_t j = 0; j < run; j++) to[j] = (SUM)(to[j] + value * from[j]);
}

/* What one value adds to its targets. */
TARGET static void NAME(scatter)(const Connection *way, int32_t neuron, int32_t value, SUM *restrict sums) {
    const int64_t made = way->made, channel = neuron / way->places;
    const int32_t place = neuron % way->places, y = place / way->width, x = place % way->width;
    for (const Run *row = way->rows + way->row_begin[y]; row < way->rows + way->row_begin[y + 1]; row++)
        for (int32_t i = 0; i < row->length; i++)
            for (const Run *column = way->columns + way->column_begin[x]; column < way->columns + way->column_begin[x + 1]; column++) {
                SUM *to = sums + ((row->target + i) * (int64_t)way->made_width + column->target) * made;
                if (way->diagonal) {
                    const int32_t product = value * way->weight[channel];
                    for (int32_t j = 0; j < column->length; j++) to[j * made + channel] = (SUM)(to[j * made + channel] + product);
                    continue;
                }
                const int16_t *from = way->weight + ((channel * way->slot_rows + row->slot + i) * way->slot_columns + column->slot) * made;
                NAME(add)(to, from, column->length * made, value);
            }
}

/* Sums (place, channel) as currents (channel, place). */
#define WRITE(KIND)                                                                                                                     \
    {                                                                                                                                   \
        KIND *restrict to = (KIND *)out + sample * neurons;                                                                             \
        for (int64_t c = 0; c < way->made; c++)                                                                                         \
            for (int64_t p = 0; p < way->made_places; p++) to[c * way->made_places + p] = (KIND)((int64_t)sums[p * way->made + c] * scale); \
    }

TARGET static int64_t NAME(deliver)(const Connection *way, const int8_t *values, int64_t samples, void *out, int32_t bytes) {
    const int64_t sources = (int64_t)way->channels * way->places, neurons = (int64_t)way->made * way->made_places;
    const int32_t scale = 1 << way->exponent;
    int64_t found = 0;
    SUM *restrict sums = malloc((size_t)neurons * sizeof(SUM));
    if (!sums) return -1;
    for (int64_t sample = 0; sample < samples; sample++) {
        const int8_t *from = values + sample * sources;
        int64_t here = 0;
        for (int64_t i = 0; i < sources; i += 8) {
            uint64_t word = eight(from + i, sources - i);
            if (!word) continue;
            if (!here) memset(sums, 0, (size_t)neurons * sizeof(SUM));
            for (int64_t j = i; word; word >>= 8, j++) {
                const int skipped = first_byte(word);
                word >>= 8 * skipped;
                j += skipped;
                here++;
                NAME(scatter)(way, (int32_t)j, from[j], sums);
            }
        }
        found += here;
        if (!here) memset((char *)out + sample * neurons * bytes, 0, (size_t)(neurons * bytes));
        else if (bytes == 1) WRITE(int8_t)
        else if (bytes == 2) WRITE(int16_t)
        else WRITE(int32_t)
    }
    free(sums);
    return found;
}
#undef WRITE
