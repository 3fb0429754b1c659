/* The last words of a program that a library ends where no exception of Python can be raised: a failed allocation that aborts, a crash for want of memory. */
#include <stddef.h>
#include <stdint.h>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <string.h>
#include <unistd.h>

#define LONGEST 1024
#define STACK (1 << 15)

static char words[LONGEST];
static size_t length;
static int code;
static pid_t speaker;
static char stack[STACK]; /* for the handler, where the program's own is used up */

/* Only what may be called in the middle of anything. */
static void speak(int number) {
    if (getpid() != speaker) { /* a fork's death is its parent's to tell */
        signal(number, SIG_DFL);
        raise(number);
        return;
    }
    for (size_t done = 0; done < length;) {
        const ssize_t written = write(2, words + done, length - done);
        if (written <= 0) break;
        done += (size_t)written;
    }
    _exit(code);
}

/* From now on this process, where it aborts or crashes, writes `text` to stderr and ends with `exit_code`. Who listens already is left alone. */
void toolchain_last_words(const char *text, int32_t exit_code) {
    const int signals[] = {SIGABRT, SIGSEGV, SIGBUS};
    const stack_t own = {.ss_sp = stack, .ss_size = STACK};
    length = strlen(text) < LONGEST ? strlen(text) : LONGEST;
    memcpy(words, text, length);
    code = exit_code;
    speaker = getpid();
    sigaltstack(&own, NULL);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        struct sigaction action;
        sigaction(signals[i], NULL, &action);
        if (action.sa_handler != SIG_DFL && action.sa_handler != speak) continue;
        memset(&action, 0, sizeof action);
        action.sa_handler = speak;
        action.sa_flags = SA_ONSTACK | SA_NODEFER | SA_RESETHAND;
        sigaction(signals[i], &action, NULL);
    }
}
#else
void toolchain_last_words(const char *text, int32_t exit_code) {
    (void)text;
    (void)exit_code;
}
#endif
