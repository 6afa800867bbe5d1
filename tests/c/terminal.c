/* terminal.c: a person at a terminal, for tests: runs a program on a pseudo-terminal of its own and follows a script, typing a line
 * only once what it waits for has been on the screen. No pause has a length, so a busy machine only makes it slower.
 *
 *     terminal SCRIPT PROGRAM [ARGUMENT...]
 *
 * A line of the script is `expect TEXT` (from where the last match ended) or `type TEXT`; in TEXT \r, \n, \e, \\ and \xHH stand for a
 * byte each. At the end of the script the program has to end. What the screen got goes to standard output, then `status=N`. Ends
 * with 0 when all was seen, 1 when not (with what was waited for), 2 when there is no such script, 77 without a pseudo-terminal. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LIMIT_SECONDS = 240 };

static char *screen; /* all that came, and where the next match may begin */
static size_t length, room, seen;
static double deadline;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int hex(char c) {
    const char *digits = "0123456789abcdef", *at = c ? strchr(digits, c | 32) : NULL;
    return at ? (int)(at - digits) : -1;
}

/* Undoes the escapes of a script's line in place; returns its length. */
static size_t unescape(char *text) {
    char *out = text;
    for (char *p = text; *p; p++) {
        if (*p != '\\' || !p[1]) {
            *out++ = *p;
            continue;
        }
        switch (*++p) {
        case 'r': *out++ = '\r'; break;
        case 'n': *out++ = '\n'; break;
        case 'e': *out++ = 27; break;
        case 'x':
            if (hex(p[1]) >= 0 && hex(p[2]) >= 0) {
                *out++ = (char)(hex(p[1]) * 16 + hex(p[2]));
                p += 2;
            }
            break;
        default: *out++ = *p;
        }
    }
    *out = 0;
    return (size_t)(out - text);
}

/* Waits for more on the screen; 0 when the program's side was closed or time is up. */
static int more(int fd) {
    struct pollfd p = {.fd = fd, .events = POLLIN};
    double left = deadline - now();
    if (left <= 0) return 0;
    int ready = poll(&p, 1, (int)(left * 1e3) + 1);
    if (ready < 0) return errno == EINTR;
    if (ready == 0) return 0;
    if (room - length < 4096) {
        room = room ? room * 2 : 65536;
        screen = realloc(screen, room);
        if (!screen) exit(2);
    }
    ssize_t n = read(fd, screen + length, room - length);
    if (n < 0 && errno == EINTR) return 1;
    if (n <= 0) return 0; /* EIO: nobody has the other side open any more */
    length += (size_t)n;
    return 1;
}

static int expect(int fd, const char *text, size_t n) {
    for (;;) {
        char *at = length > seen ? memmem(screen + seen, length - seen, text, n) : NULL;
        if (at) {
            seen = (size_t)(at - screen) + n;
            return 1;
        }
        if (!more(fd)) return 0;
    }
}

static int type(int fd, const char *text, size_t n) {
    while (n > 0) {
        ssize_t m = write(fd, text, n);
        if (m < 0 && errno != EINTR) return 0;
        if (m > 0) text += m, n -= (size_t)m;
    }
    return 1;
}

/* Follows the script; prints and returns 1 at the first line that failed. */
static int follow(FILE *script, int fd) {
    char line[4096], shown[4096];
    while (fgets(line, sizeof line, script)) {
        line[strcspn(line, "\n")] = 0;
        strcpy(shown, line);
        char *text = strchr(line, ' ');
        if (!text) continue;
        *text++ = 0;
        size_t n = unescape(text);
        int ok = strcmp(line, "expect") == 0 ? expect(fd, text, n) : strcmp(line, "type") == 0 && type(fd, text, n);
        if (ok) continue;
        printf("terminal: failed at: %s%s\nthe screen:\n", shown, now() >= deadline ? " (time is up)" : "");
        return 1;
    }
    return 0;
}

/* Starts the program in a session of its own on a new pseudo-terminal. */
static pid_t start(char **command, int *fd) {
    *fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*fd < 0 || grantpt(*fd) || unlockpt(*fd)) return -1;
    const char *name = ptsname(*fd);
    int other = name ? open(name, O_RDWR | O_NOCTTY) : -1;
    if (other < 0) return -1;
    ioctl(other, TIOCSWINSZ, &(struct winsize){.ws_row = 24, .ws_col = 100});
    pid_t child = fork();
    if (child == 0) {
        signal(SIGINT, SIG_DFL); /* a test that runs in the background was started with it ignored */
        setsid();
        ioctl(other, TIOCSCTTY, 0);
        for (int i = 0; i < 3; i++) dup2(other, i);
        if (other > 2) close(other);
        execvp(command[0], command);
        _exit(127);
    }
    close(other);
    return child;
}

int main(int argc, char **argv) {
    FILE *script = argc > 2 ? fopen(argv[1], "r") : NULL;
    if (!script) {
        fprintf(stderr, "usage: terminal SCRIPT PROGRAM [ARGUMENT...]\n");
        return 2;
    }
    deadline = now() + LIMIT_SECONDS;
    int fd, status = 0;
    pid_t child = start(argv + 2, &fd);
    if (child < 0) {
        fprintf(stderr, "no pseudo-terminal: %s\n", strerror(errno));
        return 77;
    }
    int failed = follow(script, fd);
    fclose(script);
    while (!failed && more(fd)) continue;
    if (!failed && now() >= deadline) {
        printf("terminal: the program did not end (time is up)\nthe screen:\n");
        failed = 1;
    }
    if (failed) kill(child, SIGKILL);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) continue;
    fwrite(screen, 1, length, stdout);
    printf("\nstatus=%d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    free(screen);
    return failed;
}
