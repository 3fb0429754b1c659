/* One stage of couples in one precision for one instruction set: included by spikes.c with REAL, NAME(x) and TARGET defined.

   Sample by sample, so that its potentials stay in the cache. Spikes are lists of neurons, each adding one slab of weights to its targets:
   the cost is that of the spikes there are. BYTES is the size of a vector. */

#ifdef __GNUC__
typedef REAL NAME(Vector) __attribute__((vector_size(BYTES), aligned(__alignof__(REAL)), may_alias));
typedef REAL NAME(Short) __attribute__((vector_size(16), aligned(__alignof__(REAL)), may_alias));
#else
typedef REAL NAME(Vector);
typedef REAL NAME(Short);
#endif

/* COUNT vectors of `to` stay in registers while the weights of all the spikes are added to them. */
#define ADD(VECTOR, COUNT)                                                                      \
    for (; j + (int64_t)((COUNT) * sizeof(VECTOR) / sizeof(REAL)) <= run; j += (int64_t)((COUNT) * sizeof(VECTOR) / sizeof(REAL))) { \
        VECTOR sum[COUNT], *const place = (VECTOR *)(to + j);                                   \
        for (int v = 0; v < (COUNT); v++) sum[v] = place[v];                                    \
        for (int64_t k = 0; k < sent; k++) {                                                    \
            const VECTOR *const weight = (const VECTOR *)(from[k] + offset + j);                \
            const REAL carried = size[k];                                                       \
            for (int v = 0; v < (COUNT); v++) sum[v] += carried * weight[v];                    \
        }                                                                                       \
        for (int v = 0; v < (COUNT); v++) place[v] = sum[v];                                    \
    }

/* to[j] += size * from[offset + j] of each of the `sent` spikes, for the next `run` targets. */
TARGET static void NAME(add_run)(REAL *restrict to, const REAL *const *from, const REAL *size, int64_t sent, int64_t offset, int64_t run) {
    int64_t j = 0;
    ADD(NAME(Vector), 12)
    ADD(NAME(Vector), 8)
    ADD(NAME(Vector), 4)
    ADD(NAME(Vector), 1)
    ADD(NAME(Short), 1)
    ADD(REAL, 1)
}
#undef ADD

/* total += amplitude * weights of every spike in `events`, one place of the source after the other; the number of spikes that had an amplitude. */
TARGET static int64_t NAME(scatter)(const Edge *edge, const int32_t *events, int64_t length, const REAL *amplitude, REAL *restrict total,
                                    const Workspace *work) {
    const REAL *weight = edge->weight, **from = (const REAL **)work->from;
    REAL *size = work->size;
    const int64_t made = edge->made, slots = edge->slots, apart = edge->diagonal ? 1 : slots * slots * made;
    int64_t all = 0;
    for (int64_t k = 0; k < length;) {
        const int32_t place = neuron_of(events[k]) / edge->channels, begin = place * edge->channels;
        int64_t sent = 0;
        for (; k < length; k++) {
            const int32_t neuron = neuron_of(events[k]), channel = neuron - begin;
            if (channel >= edge->channels) break;
            from[sent] = weight + channel * apart;
            size[sent] = amplitude ? (REAL)sign_of(events[k]) * amplitude[neuron] : (REAL)sign_of(events[k]);
            sent += size[sent] != 0;
        }
        if (!sent) continue;
        all += sent;
        const int32_t y = place / edge->width, *row = edge->rows + 3 * y, *column = edge->columns + 3 * (place - y * edge->width);
        for (int32_t i = 0; i < row[2]; i++) {
            REAL *restrict to = total + ((row[0] + i) * (int64_t)edge->made_width + column[0]) * made;
            if (!edge->diagonal) {
                NAME(add_run)(to, from, size, sent, ((row[1] + i) * slots + column[1]) * made, column[2] * made);
                continue;
            }
            for (int32_t j = 0; j < column[2]; j++)
                for (int64_t n = 0; n < sent; n++) to[j * made + (from[n] - weight)] += size[n] * *from[n];
        }
    }
    return all;
}

/* Add the drive, fire, reset and leak; whether any neuron would fire again without a current. */
#define FIRE(current, below)                                     \
    for (int64_t i = 0; i < neurons; i++) {                      \
        REAL x = (current);                                      \
        const int32_t fired = (x >= threshold) - (below);        \
        x -= reset * (REAL)fired;                                \
        left |= (x >= threshold) | (below);                      \
        potential[i] = x * leak;                                 \
        spikes[i] = (int8_t)fired;                               \
    }

TARGET static int32_t NAME(fire)(REAL *restrict potential, const REAL *restrict drive, int8_t *restrict spikes, int64_t neurons, REAL threshold,
                                 REAL reset, REAL leak, int32_t both) {
    int32_t left = 0;
    if (drive && both) FIRE(potential[i] + drive[i], (x <= -threshold))
    else if (drive) FIRE(potential[i] + drive[i], 0)
    else if (both) FIRE(potential[i], (x <= -threshold))
    else FIRE(potential[i], 0)
    return left;
}
#undef FIRE

TARGET static void NAME(add_factored)(REAL *restrict potential, REAL *restrict arrived, const REAL *restrict factor, int64_t neurons) {
    for (int64_t i = 0; i < neurons; i++) {
        potential[i] += arrived[i] * factor[i];
        arrived[i] = 0;
    }
}

TARGET static void NAME(weigh)(REAL *restrict sum, const int8_t *restrict spikes, int64_t neurons, REAL leak) {
    for (int64_t i = 0; i < neurons; i++) sum[i] = sum[i] * leak + (REAL)spikes[i];
}

TARGET static int NAME(stage)(const Layer *layers, int32_t n_layers, const Edge *edges, int32_t n_edges, double leak, int32_t both, int64_t first,
                              int64_t last, int64_t steps) {
    Workspace work;
    if (!make_workspace(&work, layers, n_layers, edges, n_edges, sizeof(REAL))) {
        free_workspace(&work, n_layers, n_edges);
        return 1;
    }
    for (int64_t sample = first; sample < last; sample++) {
        for (int32_t l = 0; l < n_layers; l++) {
            work.length[2 * l] = 0;
            work.length[2 * l + 1] = list_events(layers[l].spikes + sample * layers[l].neurons, layers[l].neurons, work.events[2 * l + 1]);
            work.restless[l] = 1;
        }
        for (int64_t step = 0; step < steps; step++) {
            const int now = step & 1, before = !now;
            for (int32_t l = 0; l < n_layers; l++) {
                const Layer *layer = layers + l;
                const int64_t neurons = layer->neurons, offset = sample * neurons;
                REAL *potential = (REAL *)layer->potential + offset;
                int8_t *spikes = layer->spikes + offset;
                int64_t arrived = 0;
                for (int32_t e = 0; e < n_edges; e++) {
                    const Edge *edge = edges + e;
                    if (edge->target != l) continue;
                    const int list = 2 * edge->source + (edge->late ? before : now);
                    const REAL *amplitude = edge->amplitude ? (const REAL *)edge->amplitude + sample * layers[edge->source].neurons : NULL;
                    REAL *total = edge->factor ? (REAL *)work.factored[e] : potential;
                    const int64_t sent = NAME(scatter)(edge, work.events[list], work.length[list], amplitude, total, &work);
                    if (sent && edge->factor) NAME(add_factored)(potential, total, (const REAL *)edge->factor + offset, neurons);
                    arrived += sent;
                }
                if (!arrived && !layer->drive && leak == 1 && !work.restless[l]) {
                    /* nothing came and nothing is left above the threshold: this step changes no potential */
                    clear_events(work.events[2 * l + before], work.length[2 * l + before], spikes);
                    work.length[2 * l + now] = 0;
                    continue;
                }
                const REAL *drive = layer->drive ? (const REAL *)layer->drive + sample * layer->drive_stride : NULL;
                work.restless[l] = NAME(fire)(potential, drive, spikes, neurons, (REAL)layer->threshold, (REAL)layer->reset, (REAL)leak, both);
                int32_t *events = work.events[2 * l + now];
                const int64_t length = list_events(spikes, neurons, events);
                work.length[2 * l + now] = length;
                int32_t *count = layer->count + offset;
                REAL *sum = (REAL *)layer->sum + offset;
                if (leak == 1)
                    for (int64_t k = 0; k < length; k++) {
                        const int32_t neuron = neuron_of(events[k]);
                        count[neuron]++;
                        sum[neuron] += (REAL)sign_of(events[k]);
                    }
                else {
                    for (int64_t k = 0; k < length; k++) count[neuron_of(events[k])]++;
                    NAME(weigh)(sum, spikes, neurons, (REAL)leak);
                }
            }
        }
    }
    free_workspace(&work, n_layers, n_edges);
    return 0;
}
