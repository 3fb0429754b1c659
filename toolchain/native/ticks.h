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
TARGET static inline void NAME(scatter)(const Connection *way, int64_t channel, int32_t place, int32_t value, SUM *restrict sums) {
    const int64_t made = way->made;
    const int32_t y = way->place_row[place], x = way->place_column[place];
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

/* List what is not zero among `length` values, in the given order or in their own; how many there are. No branch but for few. */
TARGET static int64_t NAME(list)(const int8_t *restrict values, const int32_t *restrict order, int64_t length, int32_t *restrict found) {
    int64_t listed = 0, some = 0;
    for (int64_t i = 0; i < length; i++) some += values[i] != 0;
    if (!some) return 0;
    if (some * FEW < length) {
        for (int64_t i = 0; i < length; i += 8) {
            uint64_t word = eight(values + i, length - i);
            for (int64_t j = i; word; word >>= 8, j++) {
                const int skipped = first_byte(word);
                word >>= 8 * skipped;
                j += skipped;
                found[listed++] = (int32_t)j;
            }
        }
        return listed;
    }
    for (int64_t i = 0; i < length; i++) {
        const int32_t place = order ? order[i] : (int32_t)i;
        found[listed] = place;
        listed += values[place] != 0;
    }
    return listed;
}

/* Sums (place, channel) as currents (channel, place): from a channel on, places `from` to before `to`. */
#define WRITE(KIND, CHANNEL, FROM, TO)                                                                                        \
    for (int64_t c = CHANNEL; c < made; c++)                                                                               \
        for (int64_t p = FROM; p < TO; p++) ((KIND *)out)[c * places + p] = (KIND)((int32_t)sums[p * made + c] * scale);

TARGET static void NAME(write)(const SUM *restrict sums, int64_t made, int64_t places, void *restrict out, int32_t bytes, int32_t scale) {
    int64_t done = 0; /* places of which the first `squares` channels are written */
    const int64_t squares = made / 8 * 8;
#if SQUARES
    if (bytes > 1)
        for (; done + 8 <= places; done += 8)
            for (int64_t c = 0; c < squares; c += 8) write_square(sums + done * made + c, made, (char *)out + (c * places + done) * bytes, places, bytes, scale);
#endif
    if (bytes == 1) WRITE(int8_t, 0, 0, places)
    else if (bytes == 2) {
        WRITE(int16_t, 0, done, places)
        WRITE(int16_t, squares, 0, done)
    } else {
        WRITE(int32_t, 0, done, places)
        WRITE(int32_t, squares, 0, done)
    }
}
#undef WRITE

TARGET static int64_t NAME(deliver)(const Connection *way, const int8_t *values, int64_t samples, void *out, int32_t bytes) {
    const int64_t sources = (int64_t)way->channels * way->places, neurons = (int64_t)way->made * way->made_places;
    const int32_t scale = 1 << way->exponent;
    int64_t found = 0;
    SUM *restrict sums = malloc((size_t)neurons * sizeof(SUM));
    int32_t *restrict list = malloc((size_t)(way->places > BLOCK ? way->places : BLOCK) * sizeof *list + sizeof *list);
    if (!sums || !list) {
        free(sums);
        free(list);
        return -1;
    }
    for (int64_t sample = 0; sample < samples; sample++) {
        const int8_t *from = values + sample * sources;
        int64_t here = 0;
        const int64_t parts = way->places == 1 ? (sources + BLOCK - 1) / BLOCK : way->channels, size = way->places == 1 ? BLOCK : way->places;
        for (int64_t part = 0; part < parts; part++) {
            const int8_t *values_here = from + part * size;
            const int64_t length = sources - part * size < size ? sources - part * size : size;
            const int64_t listed = NAME(list)(values_here, way->places == 1 ? NULL : way->place_order, length, list);
            if (listed && !here) memset(sums, 0, (size_t)neurons * sizeof(SUM));
            here += listed;
            for (int64_t k = 0; k < listed; k++) {
                const int32_t at = list[k];
                if (way->places == 1) NAME(scatter)(way, part * size + at, 0, values_here[at], sums);
                else NAME(scatter)(way, part, at, values_here[at], sums);
            }
        }
        found += here;
        if (!here) memset((char *)out + sample * neurons * bytes, 0, (size_t)(neurons * bytes));
        else NAME(write)(sums, way->made, way->made_places, (char *)out + sample * neurons * bytes, bytes, scale);
    }
    free(sums);
    free(list);
    return found;
}
