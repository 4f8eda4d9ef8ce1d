/* A CUDA driver without a GPU, for tests: as much of libcuda.so.1 as cuda-core, cuda-bindings and CudaDevice call.
 *
 * Device memory is host memory, so that host functions can compute on it. A stream is a queue of work. CUDA promises
 * only an order: when work is done lies between "at once" and "when somebody waits for it", and I2L_STANDIN_MODE chooses:
 *   eager    at once
 *   lazy     not before the host waits for it
 *   random   in between, by I2L_STANDIN_SEED
 * Work that no event orders shows as wrong values in lazy and random, and in every mode as a RACE: each piece of work says
 * which bytes it reads and writes, and a clock for each stream says what is known to be done before it.
 *
 *   I2L_STANDIN_BYTES=n,m       memory of each card, as many as are named; CUDA_VISIBLE_DEVICES chooses among them (n, or MIG-n: its slice)
 *   I2L_STANDIN_OTHERS=n,m      what other programs have of it
 *   I2L_STANDIN_OTHERS_FROM=n   from the n-th call on
 *   I2L_STANDIN_SPILLS=1        as under Windows: what the card has no room for goes to the machine's memory, and nothing fails
 *   I2L_STANDIN_SM=n            compute capability, 89 otherwise
 *   I2L_STANDIN_HOLLOW=1        no bytes lie behind the cards' memory, which may then be larger than the machine's
 *   I2L_STANDIN_FAIL_ALLOC=n    the n-th allocation on the card, counted from 1, contexts and streams too, finds no memory
 *   I2L_STANDIN_FAIL_CALL=n     the n-th call, counted from 1, and all after it fail as a card does that is lost
 *   I2L_STANDIN_FAIL_COPY=n     the n-th copy, counted from 1, finds no memory
 *   I2L_STANDIN_PINNABLE=n      so much of the host's memory can be pinned
 *   I2L_STANDIN_NO_GRAPHS=1     a stream cannot be recorded; =2: it can, and then there is no memory for the graph
 *   I2L_STANDIN_GRAPH_BYTES=n   a graph takes so much of the card, half of it not before its first launch
 *
 * A stream that is recorded keeps its work; each launch of the graph does it again, with whatever lies there then.
 *
 * Timed events tell a time that is reckoned, whenever work is really done: a copy takes a nanosecond a byte, a kernel
 * KERNEL_MS, and work begins behind that before it, what its stream waits for, and what its host thread has waited for.
 *
 * cc -shared -fPIC -O1 -o libcuda.so.1 driver.c -lpthread; no headers of CUDA are wanted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t u64;
enum { OK, INVALID_VALUE, OUT_OF_MEMORY, NO_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, NOT_SUPPORTED = 801 };
enum { NOT_RECORDABLE = 900, RECORDING_SPOILT = 901, NOT_RECORDING = 903, NOT_RECORDED_WITH = 905 };
enum { STREAMS = 1024, ACCESSES = 1 << 16, BLOCKS = 4096, CARDS = 8 };
enum Kind { COPY, CALL, RECORD, WAIT };
static const double COPY_MS = 1e-6, KERNEL_MS = 2;

typedef struct { u64 done_before[STREAMS]; } Clock; /* by stream: the number of its last work that is known to be done */
typedef struct Event { int stream; u64 number; Clock known; int timed; double when; } Event;
typedef struct Work {
    enum Kind kind; u64 number; char *to; const char *from; size_t bytes; char *staged; int to_card, unified;
    void (*function)(void *); void *argument; int of_stream; u64 of_number; Event *event; struct Work *next;
    int on_host, ranges; u64 (*range)[3]; /* of a kernel: {address, bytes, written} */
} Work;
typedef struct Graph { Work *first; int card, launched; size_t bytes; } Graph;
typedef struct { u64 last, done; double ms; Work *first, *end; Clock known; int alive, card, recording, spoilt; Work *recorded, *recorded_end; } Stream;
typedef struct { char *start; size_t bytes; int on_card, card, managed; } Block;
typedef struct { const char *start, *end; int write, stream; u64 number; } Access;

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static Stream streams[STREAMS];
static int stream_count = 1; /* number 0 is the null stream */
static Block blocks[BLOCKS];
static int block_count;
static Access accesses[ACCESSES];
static int access_count;
static Clock host;
static size_t live_bytes, peak_bytes, pinned_bytes, pinned_peak_bytes, live_on[CARDS];
static u64 problems, copies, copied_bytes, uploaded_bytes, pageable_copies, allocations, calls, launches, graph_launches, inside_ns, spilled_bytes;
static int retained; /* contexts that somebody holds */
static int started;
static __thread void *current;
static __thread double host_ms; /* of the reckoned time; a thread's own, so that it does not depend on how threads come */
static int contexts[CARDS];

static u64 setting(const char *name, u64 otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}
static u64 nth_setting(const char *name, int index, u64 otherwise) { /* of numbers between commas */
    const char *text = getenv(name);
    while (text && index--) text = strchr(text, ',') ? strchr(text, ',') + 1 : NULL;
    return text ? strtoull(text, NULL, 10) : otherwise;
}
static int cards_there(void) {
    int count = 1;
    for (const char *at = getenv("I2L_STANDIN_BYTES"); at && (at = strchr(at, ',')); at++) count++;
    return count < CARDS ? count : CARDS;
}
static u64 nth_visible(int index, int *slice) { /* n, or MIG-n */
    const char *text = getenv("CUDA_VISIBLE_DEVICES");
    if (!text) return index;
    while (text && index--) text = strchr(text, ',') ? strchr(text, ',') + 1 : NULL;
    if (!text || !*text) return CARDS;
    *slice = !strncmp(text, "MIG-", 4);
    return strtoull(text + 4 * *slice, NULL, 10);
}
static int cards_seen(void) {
    int count = 0, slice = 0;
    if (!getenv("CUDA_VISIBLE_DEVICES")) return cards_there();
    while (nth_visible(count, &slice) < (u64)cards_there()) count++;
    return count;
}
static int is_slice(int device) { int slice = 0; nth_visible(device, &slice); return slice; }
static u64 card_number(int device) { int slice = 0; return nth_visible(device, &slice); }
static u64 card_bytes(int device) { return nth_setting("I2L_STANDIN_BYTES", card_number(device), 1ull << 34) / (is_slice(device) ? 7 : 1); }
static u64 free_on(int device) {
    u64 others = calls >= setting("I2L_STANDIN_OTHERS_FROM", 0) ? nth_setting("I2L_STANDIN_OTHERS", card_number(device), 0) : 0;
    u64 gone = live_on[device] + others;
    return gone < card_bytes(device) ? card_bytes(device) - gone : 0;
}
static int mode_is(const char *mode) {
    const char *text = getenv("I2L_STANDIN_MODE");
    return !strcmp(text ? text : "eager", mode);
}
static void problem(const char *what, const void *where, size_t bytes) {
    if (problems++ < 10) fprintf(stderr, "standin: %s (%zu bytes at %p)\n", what, bytes, where);
}
static int here(void) { return (int)((int *)current - contexts); }
static int lost(void) { /* every call comes by here */
    u64 number = setting("I2L_STANDIN_FAIL_CALL", 0);
    return __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) >= number && number; /* of any thread */
}
static u64 now_ns(void) { struct timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); return (u64)t.tv_sec * 1000000000 + t.tv_nsec; }
#define ENTER if (lost()) return ILLEGAL_ADDRESS; u64 entered = now_ns(); pthread_mutex_lock(&lock)
#define ENTER_TO_GIVE_BACK u64 entered = now_ns(); pthread_mutex_lock(&lock) /* a card that is lost takes it too */
#define NEEDS_CONTEXT do { if (!current) LEAVE(NO_CONTEXT); } while (0)
#define LEAVE(status) do { int left = (status); inside_ns += now_ns() - entered; pthread_mutex_unlock(&lock); return left; } while (0)

/* --- memory --------------------------------------------------------------------------------------------------------- */

static Block *block_at(const void *address, size_t bytes) {
    const char *start = address;
    for (int i = 0; i < block_count; i++)
        if (blocks[i].start <= start && start + bytes <= blocks[i].start + blocks[i].bytes) return &blocks[i];
    return NULL;
}
static int allocate(void **out, size_t bytes, int on_card) {
    if (!bytes || block_count == BLOCKS) return INVALID_VALUE;
    if (on_card) {
        allocations++;
        int fails = allocations == setting("I2L_STANDIN_FAIL_ALLOC", 0), room = bytes <= free_on(here());
        if (fails || (!room && !setting("I2L_STANDIN_SPILLS", 0))) return OUT_OF_MEMORY;
        if (!room) spilled_bytes += bytes;
    } else if (pinned_bytes + bytes > setting("I2L_STANDIN_PINNABLE", 1ull << 40)) return OUT_OF_MEMORY;
    int hollow = on_card && setting("I2L_STANDIN_HOLLOW", 0);
    void *start = mmap(NULL, bytes, hollow ? PROT_NONE : PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return OUT_OF_MEMORY;
    if (!hollow) memset(start, 0xA5, bytes); /* what was there before: noise */
    blocks[block_count++] = (Block){start, bytes, on_card, here(), 0};
    if (on_card) live_bytes += bytes, live_on[here()] += bytes; else pinned_bytes += bytes;
    if (live_bytes > peak_bytes) peak_bytes = live_bytes;
    if (pinned_bytes > pinned_peak_bytes) pinned_peak_bytes = pinned_bytes;
    *out = start;
    return OK;
}
static int release(void *start) {
    for (int i = 0; i < block_count; i++) {
        if (blocks[i].start != start) continue;
        for (int a = 0; a < access_count; a++) { /* CUDA would wait; who frees must not rely on it */
            Access *x = &accesses[a];
            int inside = x->start < blocks[i].start + blocks[i].bytes && blocks[i].start < x->end;
            if (inside && host.done_before[x->stream] < x->number) problem("FREED in use", x->start, x->end - x->start);
            if (inside) accesses[a--] = accesses[--access_count];
        }
        if (blocks[i].on_card) live_bytes -= blocks[i].bytes, live_on[blocks[i].card] -= blocks[i].bytes; else pinned_bytes -= blocks[i].bytes;
        munmap(start, blocks[i].bytes);
        blocks[i] = blocks[--block_count];
        return OK;
    }
    return INVALID_VALUE;
}

/* --- who reads and writes what -------------------------------------------------------------------------------------- */

static void join(Clock *clock, const Clock *other) {
    for (int i = 0; i < stream_count; i++)
        if (other->done_before[i] > clock->done_before[i]) clock->done_before[i] = other->done_before[i];
}
static void touches(const void *address, size_t bytes, int write, int stream, u64 number) {
    const char *start = address, *end = start + bytes;
    for (int a = 0; a < access_count; a++) {
        Access *x = &accesses[a];
        if (x->end <= start || end <= x->start) continue;
        int before = x->stream == stream || streams[stream].known.done_before[x->stream] >= x->number;
        if (!before && (write || x->write)) problem("RACE", start, bytes);
        if (before && write && start <= x->start && x->end <= end) accesses[a--] = accesses[--access_count];
    }
    for (int a = 0; access_count > ACCESSES / 2 && a < access_count; a++) /* forget what everybody knows to be done */
        if (host.done_before[accesses[a].stream] >= accesses[a].number) accesses[a--] = accesses[--access_count];
    if (access_count < ACCESSES) accesses[access_count++] = (Access){start, end, write, stream, number};
}

/* --- streams -------------------------------------------------------------------------------------------------------- */

static void forget(Work *work) { free(work->staged); free(work->range); free(work); }
static void run_until(int stream, u64 number) {
    Stream *s = &streams[stream];
    while (s->first && s->first->number <= number) {
        Work *work = s->first;
        s->first = work->next;
        if (!s->first) s->end = NULL;
        s->done = work->number;
        if (work->kind == COPY && setting("I2L_STANDIN_HOLLOW", 0)) {
            if (!work->to_card) memset(work->to, 0, work->bytes);
        } else if (work->kind == COPY) memmove(work->to, work->staged ? work->staged : work->from, work->bytes);
        if (work->kind == CALL && work->function) work->function(work->argument);
        if (work->kind == WAIT) run_until(work->of_stream, work->of_number);
        forget(work);
    }
}
static void time_passes(int stream) {
    static unsigned seed;
    if (mode_is("eager")) run_until(stream, streams[stream].last);
    if (!mode_is("random")) return;
    if (!seed) seed = 1 + setting("I2L_STANDIN_SEED", 0);
    for (int steps = rand_r(&seed) % 4; steps > 0; steps--) {
        Stream *s = &streams[rand_r(&seed) % stream_count];
        if (s->first) run_until(s - streams, s->first->number);
    }
}
static Work *enqueue(int stream, enum Kind kind) {
    Stream *s = &streams[stream];
    Work *work = calloc(1, sizeof *work);
    work->kind = kind;
    if (s->recording) {
        if (s->recorded_end) s->recorded_end->next = work; else s->recorded = work;
        return s->recorded_end = work;
    }
    join(&s->known, &host);
    if (host_ms > s->ms) s->ms = host_ms;
    work->number = ++s->last;
    if (s->end) s->end->next = work; else s->first = work;
    return s->end = work;
}
static int spoils(int stream, int status) { /* what cannot be recorded ends the recording */
    if (streams[stream].recording) streams[stream].spoilt = 1;
    return streams[stream].recording ? status : OK;
}
/* What a piece of work reads and writes, once it is really enqueued. */
static void accounts_for(Work *work, int stream) {
    if (work->kind == COPY) streams[stream].ms += work->bytes * COPY_MS;
    if (work->kind == CALL) streams[stream].ms += KERNEL_MS;
    if (work->kind == COPY) {
        Block *target = block_at(work->to, work->bytes), *source = block_at(work->from, work->bytes);
        if (!target || !target->on_card || !source || !source->on_card) copies++, copied_bytes += work->bytes, pageable_copies += !target || !source, uploaded_bytes += work->to_card ? work->bytes : 0;
        if (target) touches(work->to, work->bytes, 1, stream, work->number);
        if (source) touches(work->from, work->bytes, 0, stream, work->number);
    }
    for (int i = 0; i < work->ranges; i++) {
        u64 *range = work->range[i];
        if (!range[1]) continue;
        Block *block = block_at((void *)range[0], range[1]);
        if (!block || !block->on_card) problem("a kernel beside its memory", (void *)range[0], range[1]);
        touches((void *)range[0], range[1], (int)range[2], stream, work->number);
    }
}
static void host_waits(int stream, u64 number, const Clock *known, double ms) {
    run_until(stream, number);
    if (ms > host_ms) host_ms = ms;
    join(&host, known);
    if (host.done_before[stream] < number) host.done_before[stream] = number;
}
static int stream_of(void *handle) {
    u64 number = (u64)handle;
    if (number <= 2) return 0;
    number -= 0x1000;
    if (number < 1 || number >= (u64)stream_count || !streams[number].alive) { problem("no such stream", handle, 0); return -1; }
    return (int)number;
}
static int copy(char *to, const char *from, size_t bytes, void *handle, int synchronous, int unified) {
    int stream = stream_of(handle);
    if (stream < 0) return INVALID_HANDLE;
    Block *target = block_at(to, bytes), *source = block_at(from, bytes);
    int to_card = target && target->on_card, from_card = source && source->on_card;
    if (!to_card && !from_card) { problem("a copy beside all device memory", to, bytes); return INVALID_VALUE; }
    if ((to_card && target->card != streams[stream].card && stream) || (from_card && source->card != streams[stream].card && stream))
        problem("a copy of another card's memory", to, bytes);
    int pageable = !target || !source;
    if (copies + 1 == setting("I2L_STANDIN_FAIL_COPY", 0)) { copies++; return OUT_OF_MEMORY; }
    Work *work = enqueue(stream, COPY);
    work->to = to, work->from = from, work->bytes = bytes, work->to_card = to_card, work->unified = unified;
    if (streams[stream].recording) return pageable ? spoils(stream, NOT_RECORDABLE) : OK;
    accounts_for(work, stream);
    if (to_card && pageable) { /* the driver takes the bytes along, and may return before they are on the card */
        work->staged = malloc(bytes);
        if (!setting("I2L_STANDIN_HOLLOW", 0)) memcpy(work->staged, from, bytes);
    }
    u64 number = work->number;
    if (!to_card && (pageable || synchronous)) host_waits(stream, number, &streams[stream].known, streams[stream].ms);
    else time_passes(stream);
    return OK;
}

/* --- what a test asks for ------------------------------------------------------------------------------------------- */

u64 standin_problems(void) { return problems; }
u64 standin_live_bytes(void) { return live_bytes; }
u64 standin_peak_bytes(void) { return peak_bytes; }
u64 standin_pinned_bytes(void) { return pinned_bytes; }
u64 standin_pinned_peak_bytes(void) { return pinned_peak_bytes; }
u64 standin_copies(void) { return copies; }
u64 standin_copied_bytes(void) { return copied_bytes; }
u64 standin_uploaded_bytes(void) { return uploaded_bytes; }
u64 standin_launches(void) { return launches; }
u64 standin_graph_launches(void) { return graph_launches; }
u64 standin_pageable_copies(void) { return pageable_copies; }
u64 standin_calls(void) { return calls; }
u64 standin_allocations(void) { return allocations; }
u64 standin_spilled_bytes(void) { return spilled_bytes; }
u64 standin_contexts(void) { return retained; }
u64 standin_streams(void) { u64 count = 0; for (int i = 1; i < stream_count; i++) count += streams[i].alive; return count; }
u64 standin_inside_ns(void) { return inside_ns; } /* processor time spent in here, which is not the host side's */
u64 standin_unfinished(void) { /* work that the host does not know to be done; a card that is lost does no more of it */
    u64 lost_from = setting("I2L_STANDIN_FAIL_CALL", 0), count = 0;
    for (int i = 1; i < stream_count; i++) count += streams[i].alive ? streams[i].last - host.done_before[i] : 0;
    return lost_from && calls >= lost_from ? 0 : count;
}
void standin_problem(const char *what) { problem(what, NULL, 0); }
/* As after a start: what was left of a card that was lost goes, and the counting begins again. */
void standin_reset(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < stream_count; i++)
        while (streams[i].first) { Work *work = streams[i].first; streams[i].first = work->next; forget(work); }
    memset(streams, 0, sizeof streams);
    memset(&host, 0, sizeof host);
    stream_count = 1;
    access_count = 0;
    host_ms = 0;
    while (block_count) release(blocks[0].start);
    memset(live_on, 0, sizeof live_on);
    live_bytes = 0;
    problems = copies = copied_bytes = uploaded_bytes = pageable_copies = allocations = calls = launches = graph_launches = peak_bytes = pinned_peak_bytes = spilled_bytes = retained = 0;
    pthread_mutex_unlock(&lock);
}
/* A kernel: a function that runs when the stream comes to it; ranges of {address, bytes, written}. */
int standin_launch(void *handle, void (*function)(void *), int count, const u64 (*ranges)[3]) {
    ENTER;
    int stream = stream_of(handle);
    if (stream < 0) LEAVE(INVALID_HANDLE);
    Work *work = enqueue(stream, CALL);
    work->function = function;
    work->ranges = count;
    work->range = count ? malloc(count * sizeof *work->range) : NULL;
    if (count) memcpy(work->range, ranges, count * sizeof *work->range);
    if (streams[stream].recording) LEAVE(OK);
    launches++;
    accounts_for(work, stream);
    time_passes(stream);
    LEAVE(OK);
}

/* --- the driver's functions ----------------------------------------------------------------------------------------- */

int cuInit(unsigned flags) { (void)flags; if (lost()) return ILLEGAL_ADDRESS; started = 1; return OK; }
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { *count = cards_seen(); return OK; }
int cuDeviceGet(int *device, int index) { *device = index; return index < 0 || index >= cards_seen() ? 101 : OK; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, is_slice(device) ? "stand-in %d MIG 1g" : "stand-in %d", (int)card_number(device)); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = card_bytes(device); return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    u64 sm = setting("I2L_STANDIN_SM", 89);
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : 0;
    return OK;
}
static int refused(void) { return ++allocations == setting("I2L_STANDIN_FAIL_ALLOC", 0); } /* what takes memory on the card, uncounted */
int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER;
    if (refused()) LEAVE(OUT_OF_MEMORY);
    retained++;
    *context = &contexts[device];
    LEAVE(OK);
}
int cuDevicePrimaryCtxRelease_v2(int device) { (void)device; retained--; return lost() ? ILLEGAL_ADDRESS : OK; }
int cuCtxSetCurrent(void *context) { current = context; return OK; }
int cuCtxGetCurrent(void **context) { *context = current; return OK; }
int cuCtxGetDevice(int *device) { *device = current ? here() : 0; return current ? OK : NO_CONTEXT; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return OK; }
int cuCtxSynchronize(void) {
    ENTER;
    for (int i = 0; i < stream_count; i++) if (spoils(i, NOT_RECORDABLE)) LEAVE(NOT_RECORDABLE);
    for (int i = 0; i < stream_count; i++) host_waits(i, streams[i].last, &streams[i].known, streams[i].ms);
    LEAVE(OK);
}

int cuStreamCreateWithPriority(void **handle, unsigned flags, int priority) {
    (void)flags, (void)priority;
    ENTER;
    NEEDS_CONTEXT;
    if (stream_count == STREAMS || refused()) LEAVE(OUT_OF_MEMORY);
    streams[stream_count].alive = 1;
    streams[stream_count].card = here();
    *handle = (void *)(u64)(0x1000 + stream_count++);
    LEAVE(OK);
}
int cuStreamCreate(void **handle, unsigned flags) { return cuStreamCreateWithPriority(handle, flags, 0); }
int cuStreamDestroy_v2(void *handle) {
    ENTER_TO_GIVE_BACK;
    int stream = stream_of(handle);
    if (stream > 0) { run_until(stream, streams[stream].last); streams[stream].alive = 0; }
    LEAVE(stream > 0 ? OK : INVALID_HANDLE);
}
int cuStreamSynchronize(void *handle) {
    ENTER;
    NEEDS_CONTEXT;
    int stream = stream_of(handle);
    if (stream < 0) LEAVE(INVALID_HANDLE);
    if (spoils(stream, NOT_RECORDABLE)) LEAVE(NOT_RECORDABLE);
    host_waits(stream, streams[stream].last, &streams[stream].known, streams[stream].ms);
    LEAVE(OK);
}
int cuStreamGetCtx(void *handle, void **context) { *context = &contexts[streams[stream_of(handle)].card]; return OK; }
int cuStreamGetCtx_v2(void *handle, void **context, void **green) { if (green) *green = NULL; return cuStreamGetCtx(handle, context); }
int cuStreamIsCapturing(void *handle, int *status) {
    int stream = stream_of(handle);
    *status = stream < 0 ? 0 : streams[stream].spoilt ? 2 : streams[stream].recording;
    return stream < 0 ? INVALID_HANDLE : OK;
}

/* --- graphs --------------------------------------------------------------------------------------------------------- */

static void forget_all(Work *work) { while (work) { Work *next = work->next; forget(work); work = next; } }
static Work *copies_of(const Work *work) {
    Work *first = NULL, **end = &first;
    for (; work; work = work->next, end = &(*end)->next) {
        *end = malloc(sizeof *work);
        **end = *work;
        (*end)->next = NULL;
        if (work->ranges) (*end)->range = memcpy(malloc(work->ranges * sizeof *work->range), work->range, work->ranges * sizeof *work->range);
    }
    return first;
}
int cuStreamBeginCapture_v2(void *handle, int kind) {
    (void)kind;
    ENTER;
    NEEDS_CONTEXT;
    int stream = stream_of(handle);
    if (stream <= 0) LEAVE(stream ? INVALID_HANDLE : NOT_RECORDABLE); /* the default stream is not recorded */
    if (setting("I2L_STANDIN_NO_GRAPHS", 0) == 1) LEAVE(NOT_SUPPORTED);
    streams[stream].recording = 1, streams[stream].spoilt = 0;
    streams[stream].recorded = streams[stream].recorded_end = NULL;
    LEAVE(OK);
}
int cuStreamEndCapture(void *handle, Graph **graph) {
    ENTER;
    NEEDS_CONTEXT;
    int stream = stream_of(handle);
    if (stream < 0 || !streams[stream].recording) LEAVE(NOT_RECORDING);
    Stream *s = &streams[stream];
    int spoilt = s->spoilt;
    *graph = NULL;
    if (spoilt) forget_all(s->recorded);
    else { *graph = calloc(1, sizeof **graph); (*graph)->first = s->recorded; }
    s->recording = s->spoilt = 0;
    LEAVE(spoilt ? RECORDING_SPOILT : OK);
}
static void grows(Graph *exec, size_t bytes) {
    exec->bytes += bytes, live_bytes += bytes, live_on[exec->card] += bytes;
    if (live_bytes > peak_bytes) peak_bytes = live_bytes;
}
int cuGraphInstantiateWithFlags(Graph **exec, const Graph *graph, u64 flags) {
    (void)flags;
    ENTER;
    NEEDS_CONTEXT;
    if (setting("I2L_STANDIN_NO_GRAPHS", 0) == 2) LEAVE(OUT_OF_MEMORY);
    size_t half = setting("I2L_STANDIN_GRAPH_BYTES", 0) / 2;
    if (half > free_on(here())) LEAVE(OUT_OF_MEMORY);
    *exec = calloc(1, sizeof **exec);
    (*exec)->first = copies_of(graph->first);
    (*exec)->card = here();
    grows(*exec, half);
    LEAVE(OK);
}
int cuGraphGetNodes(const Graph *graph, const Work **nodes, size_t *count) {
    size_t room = nodes ? *count : 0;
    *count = 0;
    for (const Work *work = graph->first; work; work = work->next, ++*count) if (*count < room) nodes[*count] = work;
    return OK;
}
int cuGraphNodeGetType(const Work *node, int *type) { *type = node->kind == COPY ? 1 : node->on_host ? 3 : 0; return OK; }
int cuGraphMemcpyNodeGetParams(const Work *node, int *parameters) {
    Block *source = block_at(node->from, node->bytes);
    parameters[8] = node->unified ? 4 : source && source->on_card ? 2 : 1; /* srcMemoryType: UNIFIED, DEVICE, HOST */
    memcpy(parameters + (parameters[8] == 1 ? 10 : 12), &node->from, sizeof node->from); /* srcHost, srcDevice */
    return OK;
}
int cuGraphInstantiate(Graph **exec, const Graph *graph, u64 flags) { return cuGraphInstantiateWithFlags(exec, graph, flags); }
int cuGraphDestroy(Graph *graph) { if (graph) { forget_all(graph->first); free(graph); } return OK; }
int cuGraphExecDestroy(Graph *exec) { /* also of one at work: CUDA frees it behind that */
    ENTER_TO_GIVE_BACK;
    live_bytes -= exec->bytes, live_on[exec->card] -= exec->bytes;
    LEAVE(cuGraphDestroy(exec));
}
int cuGraphLaunch(Graph *exec, void *handle) {
    ENTER;
    NEEDS_CONTEXT;
    int stream = stream_of(handle);
    if (stream < 0) LEAVE(INVALID_HANDLE);
    size_t half = exec->launched++ ? 0 : setting("I2L_STANDIN_GRAPH_BYTES", 0) / 2;
    if (half > free_on(here())) LEAVE(OUT_OF_MEMORY);
    grows(exec, half);
    Work *next, *work = copies_of(exec->first);
    graph_launches++;
    for (; work; work = next) {
        next = work->next;
        Work *queued = enqueue(stream, work->kind);
        work->number = queued->number, work->next = NULL;
        *queued = *work; /* its ranges are now the queue's */
        free(work);
        accounts_for(queued, stream);
        time_passes(stream);
    }
    LEAVE(OK);
}

int cuEventCreate(Event **event, unsigned flags) {
    ENTER;
    NEEDS_CONTEXT;
    *event = calloc(1, sizeof **event); /* never freed: work in a queue may point at it */
    (*event)->timed = !(flags & 2);
    LEAVE(OK);
}
int cuEventDestroy_v2(Event *event) { (void)event; return OK; }
int cuEventRecord(Event *event, void *handle) {
    ENTER;
    NEEDS_CONTEXT;
    int stream = stream_of(handle);
    if (stream < 0) LEAVE(INVALID_HANDLE);
    if (spoils(stream, NOT_RECORDABLE)) LEAVE(NOT_RECORDABLE); /* it could be, but nobody here has a use for it */
    Work *work = enqueue(stream, RECORD);
    work->event = event;
    event->stream = stream;
    event->number = work->number;
    event->when = streams[stream].ms;
    event->known = streams[stream].known;
    event->known.done_before[stream] = work->number;
    time_passes(stream);
    LEAVE(OK);
}
int cuEventRecordWithFlags(Event *event, void *handle, unsigned flags) { (void)flags; return cuEventRecord(event, handle); }
int cuEventSynchronize(Event *event) {
    ENTER;
    NEEDS_CONTEXT;
    host_waits(event->stream, event->number, &event->known, event->when);
    LEAVE(OK);
}
int cuEventQuery(Event *event) { return streams[event->stream].done >= event->number ? OK : 600; }
int cuEventElapsedTime_v2(float *milliseconds, Event *first, Event *last) {
    ENTER;
    if (!first->timed || !last->timed || !first->number || !last->number || cuEventQuery(first) || cuEventQuery(last)) LEAVE(INVALID_HANDLE);
    *milliseconds = (float)(last->when - first->when);
    LEAVE(OK);
}
int cuStreamWaitEvent(void *handle, Event *event, unsigned flags) {
    (void)flags;
    ENTER;
    NEEDS_CONTEXT;
    int stream = stream_of(handle);
    if (stream < 0) LEAVE(INVALID_HANDLE);
    if (spoils(stream, NOT_RECORDED_WITH)) LEAVE(NOT_RECORDED_WITH); /* the event is of work outside */
    Work *work = enqueue(stream, WAIT);
    work->of_stream = event->stream;
    work->of_number = event->number;
    if (event->when > streams[stream].ms) streams[stream].ms = event->when;
    join(&streams[stream].known, &event->known);
    time_passes(stream);
    LEAVE(OK);
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER;
    NEEDS_CONTEXT;
    *total = card_bytes(here());
    *free_bytes = free_on(here());
    LEAVE(OK);
}
int cuMemAlloc_v2(void **address, size_t bytes) { ENTER; NEEDS_CONTEXT; LEAVE(allocate(address, bytes, 1)); }
int cuMemFree_v2(void *address) { ENTER; NEEDS_CONTEXT; LEAVE(release(address)); }
int cuMemAllocHost_v2(void **address, size_t bytes) { ENTER; NEEDS_CONTEXT; LEAVE(allocate(address, bytes, 0)); }
int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) { (void)flags; return cuMemAllocHost_v2(address, bytes); }
int cuMemAllocManaged(void **address, size_t bytes, unsigned flags) {
    (void)flags;
    ENTER;
    NEEDS_CONTEXT;
    int status = allocate(address, bytes, 0);
    if (status == OK) block_at(*address, bytes)->managed = 1;
    LEAVE(status);
}
int cuPointerGetAttribute(void *value, int attribute, u64 address) {
    Block *block = block_at((void *)address, 1);
    if ((attribute != 2 && attribute != 8) || !block) return INVALID_VALUE; /* its type, host or device; whether it is managed */
    if (attribute == 8) *(char *)value = block->managed;
    else *(int *)value = block->on_card || block->managed ? 2 : 1;
    return OK;
}
int cuMemFreeHost(void *address) { ENTER; NEEDS_CONTEXT; LEAVE(release(address)); }
int cuMemcpyHtoDAsync_v2(char *to, const void *from, size_t bytes, void *stream) { ENTER; NEEDS_CONTEXT; LEAVE(copy(to, from, bytes, stream, 0, 0)); }
int cuMemcpyHtoD_v2(char *to, const void *from, size_t bytes) { ENTER; NEEDS_CONTEXT; LEAVE(copy(to, from, bytes, NULL, 1, 0)); }
int cuMemcpyDtoHAsync_v2(void *to, const char *from, size_t bytes, void *stream) { ENTER; NEEDS_CONTEXT; LEAVE(copy(to, from, bytes, stream, 0, 0)); }
int cuMemcpyDtoH_v2(void *to, const char *from, size_t bytes) { ENTER; NEEDS_CONTEXT; LEAVE(copy(to, from, bytes, NULL, 1, 0)); }
int cuMemcpyAsync(void *to, const void *from, size_t bytes, void *stream) { ENTER; NEEDS_CONTEXT; LEAVE(copy(to, from, bytes, stream, 0, 1)); }
int cuMemcpy(void *to, const void *from, size_t bytes) { ENTER; NEEDS_CONTEXT; LEAVE(copy(to, from, bytes, NULL, 1, 1)); }
int cuMemsetD8Async(void *address, unsigned char value, size_t bytes, void *stream) { /* its bytes are set at once: nobody reads them */
    u64 range[1][3] = {{(u64)address, bytes, 1}};
    int status = standin_launch(stream, NULL, 1, range);
    if (!status && !setting("I2L_STANDIN_HOLLOW", 0)) memset(address, value, bytes);
    return status;
}
int cuTensorMapEncodeTiled(void) { return 801; } /* for cards that are not played here */
int cuLaunchHostFunc(void *handle, void (*function)(void *), void *argument) {
    ENTER;
    NEEDS_CONTEXT;
    int stream = stream_of(handle);
    if (stream < 0) LEAVE(INVALID_HANDLE);
    Work *work = enqueue(stream, CALL);
    work->function = function;
    work->argument = argument;
    work->on_host = 1;
    if (!streams[stream].recording) time_passes(stream);
    LEAVE(OK);
}
int cuGetErrorName(int status, const char **name) {
    *name = status == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : status == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER";
    return OK;
}
int cuGetErrorString(int status, const char **text) { return cuGetErrorName(status, text); }

int cuGetProcAddress_v2(const char *name, void **function, int version, u64 flags, int *found) {
    static void *self;
    char later[128];
    (void)version, (void)flags;
    Dl_info info;
    if (!self && dladdr((void *)cuInit, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    snprintf(later, sizeof later, "%s_v2", name);
    *function = strcmp(name, "cuStreamGetCtx") || version >= 12050 ? dlsym(self, later) : NULL;
    if (!*function) *function = dlsym(self, name);
    if (found) *found = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char *name, void **function, int version, u64 flags) { return cuGetProcAddress_v2(name, function, version, flags, NULL); }
