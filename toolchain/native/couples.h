/* A model step of couples in whole numbers for one instruction set: included by ticks.c with NAME(x) and TARGET defined. */

TARGET static void NAME(gather)(int32_t *restrict total, const void *message, int32_t bytes, int64_t from, int64_t length) {
    const int8_t *restrict narrow = (const int8_t *)message + from;
    const int16_t *restrict middle = (const int16_t *)message + from;
    const int32_t *restrict wide = (const int32_t *)message + from;
    if (bytes == 1)
        for (int64_t i = 0; i < length; i++) total[i] += narrow[i];
    else if (bytes == 2)
        for (int64_t i = 0; i < length; i++) total[i] += middle[i];
    else
        for (int64_t i = 0; i < length; i++) total[i] += wide[i];
}

TARGET static int64_t NAME(fire)(const Couples *c, int64_t from, const int32_t *bias, int64_t length) {
    int32_t total[BLOCK];
    int32_t *restrict potential = c->potential + from, *restrict counts = c->counts + from;
    int8_t *restrict spikes = c->spikes + from;
    const int32_t threshold = c->threshold, reset = c->reset, both = c->both != 0;
    int32_t outside = 0, sent_here = 0;
    memcpy(total, potential, (size_t)length * sizeof *total);
    if (c->waiting) {
        NAME(gather)(total, c->waiting, 4, from, length);
        memset(c->waiting + from, 0, (size_t)length * sizeof *total);
    }
    for (int32_t m = 0; m < c->messages; m++) NAME(gather)(total, c->message[m], c->bytes[m], from, length);
    if (c->drive) NAME(gather)(total, c->drive, 4, from, length);
    if (bias) NAME(gather)(total, bias, 4, 0, length);
    for (int64_t i = 0; i < length; i++) outside |= (total[i] > LIMIT) | (total[i] < -LIMIT);
    if (outside)
        for (int64_t i = 0; i < length; i++) {
            c->saturations[from + i] += (total[i] > LIMIT) | (total[i] < -LIMIT);
            total[i] = total[i] > LIMIT ? LIMIT : total[i] < -LIMIT ? -LIMIT : total[i];
        }
    for (int64_t i = 0; i < length; i++) {
        const int32_t fired = (total[i] >= threshold) - ((total[i] <= -threshold) & both);
        sent_here += fired != 0;
        potential[i] = total[i] - reset * fired;
        counts[i] += fired;
        spikes[i] = (int8_t)fired;
    }
    if (c->activity)
        for (int64_t i = 0; i < length; i++) c->activity[from + i] += spikes[i] != 0;
    if (c->mask) {
        int8_t *restrict sent = c->sent + from;
        const uint8_t *restrict mask = c->mask + from;
        sent_here = 0;
        for (int64_t i = 0; i < length; i++) {
            sent[i] = (int8_t)(spikes[i] * mask[i]);
            sent_here += sent[i] != 0;
        }
    }
    return sent_here;
}

TARGET static int64_t NAME(advance)(const Couples *c, int64_t samples) {
    int64_t sent = 0;
    for (int64_t sample = 0; sample < samples; sample++)
        for (int64_t i = 0; i < c->neurons; i += BLOCK) {
            const int64_t length = c->neurons - i < BLOCK ? c->neurons - i : BLOCK;
            sent += NAME(fire)(c, sample * c->neurons + i, c->bias ? c->bias + i : NULL, length);
        }
    return sent;
}

TARGET static void NAME(collect)(int32_t *waiting, const void *message, int32_t bytes, int64_t length) {
    NAME(gather)(waiting, message, bytes, 0, length);
}
