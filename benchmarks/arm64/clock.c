/* QEMU plugin: what a time depends on, between two harmless system calls (the regions of counter.c).
 *
 * Each close writes one line of JSON to the file given as out=: how often each block of instructions ran, on the thread
 * that closes and on all; with memory=on also the lines of 64 bytes that moved between the levels of a cache model.
 * A block that was not written before comes with its instructions.
 *
 * The model: each thread has its own first two levels, all share the last; least recently used, write-back; what is
 * stored brings no line in, as these cores' write streaming has it; pages lie anywhere in memory. Sizes are given as l1=, l2=, l3= in KiB. QEMU reports
 * the accesses of ordinary loads and stores; those of SVE, which its helpers do, are decoded here and their registers
 * read.
 */
#include <glib.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qemu-plugin.h"

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

enum { SYS_PRCTL = 167, OPTION = 0x41524D4F, OPEN = 1, CLOSE = 2 };
enum { BLOCKS = 1 << 19, BUCKETS = 1 << 21, THREADS = 256, LINE_SHIFT = 6, PAGE_SHIFT = 12, LEVELS = 3, L3 = 2 };

struct block {
    uint64_t address;
    uint32_t instructions;
    uint32_t *code; /* NULL once written */
};

struct cache {
    uint64_t *lines; /* line + 1, and above it whether it was written; in order of use within a set */
    uint32_t sets, ways;
};

/* What moved into a level, and what left it having been written. */
struct traffic {
    uint64_t in[LEVELS], out[LEVELS];
};

static const uint64_t WRITTEN = 1ull << 63;

static FILE *out;
static bool memory;
static volatile bool is_open;
static uint32_t sizes_kib[LEVELS] = {64, 1024, 32768};
static const uint32_t ways[LEVELS] = {4, 8, 16};
static uint32_t vector_bytes = 32;

static struct qemu_plugin_scoreboard *runs; /* uint64_t[BLOCKS] for each thread */
static uint64_t *before;                    /* of all threads, as the region opened */
static struct block *blocks;                /* slot 0 takes what finds no room */
static uint32_t *buckets;                   /* address -> slot, open addressing; 0 is free */
static uint32_t block_count = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static struct cache own[THREADS][LEVELS - 1], shared;
static struct traffic traffic[THREADS];
static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER;
static struct qemu_plugin_register *registers[32]; /* x0 to x30, sp */
static struct qemu_plugin_register *vectors[32];   /* z0 to z31 */
static struct qemu_plugin_register *predicates[8]; /* p0 to p7: of loads and stores */

static qemu_plugin_u64 counter(uint32_t slot)
{
    return (qemu_plugin_u64){runs, slot * sizeof(uint64_t)};
}

/* The slot of a block; one that is translated again keeps its own. */
static uint32_t slot_of(struct qemu_plugin_tb *tb)
{
    uint64_t address = qemu_plugin_tb_vaddr(tb);
    uint32_t instructions = qemu_plugin_tb_n_insns(tb);
    uint32_t slot = 0;
    pthread_mutex_lock(&lock);
    uint64_t hash = (address >> 2) * 0x9E3779B97F4A7C15u + instructions;
    for (uint32_t at = hash >> 40 & (BUCKETS - 1);; at = (at + 1) & (BUCKETS - 1)) {
        slot = buckets[at];
        if (slot && blocks[slot].address == address && blocks[slot].instructions == instructions) {
            break;
        }
        if (!slot) {
            if (block_count < BLOCKS) {
                uint32_t *code = calloc(instructions, sizeof(*code));
                for (uint32_t i = 0; i < instructions; i++) {
                    qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i), &code[i], sizeof(*code));
                }
                buckets[at] = slot = block_count++;
                blocks[slot] = (struct block){address, instructions, code};
            }
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return slot;
}

static void make_cache(struct cache *cache, int level)
{
    cache->ways = ways[level];
    cache->sets = ((uint64_t)sizes_kib[level] << 10 >> LINE_SHIFT) / ways[level];
    cache->lines = calloc((size_t)cache->sets * cache->ways, sizeof(uint64_t));
}

/* Where a line lies in memory: pages of 4 KiB do anywhere, so that addresses a power of two apart share no set. */
static uint64_t physical(uint64_t line)
{
    uint64_t page = (line >> (PAGE_SHIFT - LINE_SHIFT)) * 0x9E3779B97F4A7C15u;
    page ^= page >> 32;
    return (page << (PAGE_SHIFT - LINE_SHIFT) | (line & ((1u << (PAGE_SHIFT - LINE_SHIFT)) - 1))) & ~WRITTEN;
}

/* Brings a line to the front of its set; returns whether it was there, and in *left what it drove out. */
static bool touch(struct cache *cache, uint64_t line, uint64_t written, uint64_t *left)
{
    uint64_t *set = cache->lines + (line % cache->sets) * cache->ways;
    uint64_t wanted = line + 1;
    uint32_t way = 0;
    while (way < cache->ways - 1 && (set[way] & ~WRITTEN) != wanted) {
        way++;
    }
    bool found = (set[way] & ~WRITTEN) == wanted;
    uint64_t moved = found ? set[way] : wanted;
    *left = found ? 0 : set[way];
    memmove(set + 1, set, way * sizeof(*set));
    set[0] = moved | written;
    return found;
}

static void touch_shared(uint64_t line, uint64_t written, struct traffic *seen, bool counts)
{
    uint64_t left;
    pthread_mutex_lock(&shared_lock);
    bool found = touch(&shared, line, written, &left);
    pthread_mutex_unlock(&shared_lock);
    seen->in[L3] += counts && !found;
    seen->out[L3] += (left & WRITTEN) != 0;
}

static void touch_line(unsigned int vcpu, uint64_t line, uint64_t written)
{
    struct traffic *seen = &traffic[vcpu];
    uint64_t left, second;
    if (touch(&own[vcpu][0], line, written, &left)) {
        return;
    }
    seen->in[0] += !written;
    if (left & WRITTEN) { /* what leaves the first level is in the second, or goes there */
        seen->out[0]++;
        uint64_t old = (left & ~WRITTEN) - 1;
        if (!touch(&own[vcpu][1], old, WRITTEN, &second) && (second & WRITTEN)) {
            seen->out[1]++;
            touch_shared((second & ~WRITTEN) - 1, WRITTEN, seen, false);
        }
    }
    if (touch(&own[vcpu][1], line, 0, &left)) {
        return;
    }
    seen->in[1] += !written;
    if (left & WRITTEN) {
        seen->out[1]++;
        touch_shared((left & ~WRITTEN) - 1, WRITTEN, seen, false);
    }
    touch_shared(line, 0, seen, !written);
}

static void touch_bytes(unsigned int vcpu, uint64_t address, uint32_t bytes, bool stores)
{
    for (uint64_t line = address >> LINE_SHIFT; line <= (address + bytes - 1) >> LINE_SHIFT; line++) {
        touch_line(vcpu, physical(line), stores ? WRITTEN : 0);
    }
}

static void on_access(unsigned int vcpu, qemu_plugin_meminfo_t info, uint64_t address, void *unused)
{
    if (!is_open || vcpu >= THREADS) {
        return;
    }
    touch_bytes(vcpu, address, 1u << qemu_plugin_mem_size_shift(info), qemu_plugin_mem_is_store(info));
}

/* An access of an SVE instruction: base register + index register << shift, or + offset. */
struct sve {
    uint8_t base, index, shift;
    bool indexed, stores;
    int32_t offset;
    uint32_t bytes;
};

static int32_t signed4(uint32_t opcode)
{
    int32_t value = opcode >> 16 & 15;
    return value & 8 ? value - 16 : value;
}

static bool decode_sve(uint32_t opcode, struct sve *sve)
{
    /* log2 of the bytes in memory and in the register, by dtype */
    static const uint8_t in_memory[16] = {0, 0, 0, 0, 2, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 3};
    static const uint8_t in_register[16] = {0, 1, 2, 3, 3, 1, 2, 3, 3, 2, 2, 3, 3, 2, 1, 3};
    uint32_t top = opcode >> 25, form = opcode >> 13 & 7, dtype = opcode >> 21 & 15, size = opcode >> 23 & 3;
    uint32_t count = (opcode >> 21 & 3) + 1, part = vector_bytes << in_memory[dtype] >> in_register[dtype];
    bool bit20 = opcode >> 20 & 1;
    *sve = (struct sve){.base = opcode >> 5 & 31, .index = opcode >> 16 & 31, .shift = size};
    if (top == 0x52) { /* contiguous loads */
        switch (form) {
        case 0: /* ld1rq, ld1ro */
            sve->indexed = true;
            sve->bytes = count == 2 ? 32 : 16;
            return true;
        case 1:
            sve->bytes = count == 2 ? 32 : 16;
            sve->offset = signed4(opcode) * (int32_t)sve->bytes;
            return !bit20;
        case 2:
        case 3: /* ld1, ldff1 */
            sve->indexed = true;
            sve->shift = in_memory[dtype];
            sve->bytes = part;
            return true;
        case 5: /* ld1, ldnf1 */
            sve->offset = signed4(opcode) * (int32_t)part;
            sve->bytes = part;
            return true;
        case 6: /* ld2 to ld4, ldnt1 */
            sve->indexed = true;
            sve->bytes = vector_bytes * count;
            return true;
        case 7:
            sve->bytes = vector_bytes * count;
            sve->offset = signed4(opcode) * (int32_t)sve->bytes;
            return !bit20;
        default:
            return false;
        }
    }
    if (top == 0x72) { /* contiguous stores */
        sve->stores = true;
        if (form == 2 || form == 3) { /* st1; st2 to st4, stnt1 */
            sve->indexed = true;
            sve->bytes = form == 3 ? vector_bytes * count : vector_bytes << size >> (opcode >> 21 & 3);
            return true;
        }
        if (form == 7) {
            sve->bytes = bit20 ? vector_bytes * count : vector_bytes << size >> (opcode >> 21 & 3);
            sve->offset = signed4(opcode) * (int32_t)sve->bytes;
            return true;
        }
    }
    return false;
}

/* A gather load or scatter store: an address for each element, of a vector and a base or an offset. */
struct gather {
    uint8_t base, vector, predicate, element, shift, part; /* bytes of an element, bytes that it has in memory */
    bool stores, narrow, is_signed, addresses; /* 32 bits of offset, with sign; or the vector holds addresses */
    uint32_t offset;
};

static bool decode_gather(uint32_t opcode, struct gather *found)
{
    uint32_t top = opcode >> 25, form = opcode >> 13 & 7, size = opcode >> 23 & 3, middle = opcode >> 21 & 3;
    uint32_t number = opcode >> 16 & 31;
    bool upper = opcode >> 15 & 1, scaled = middle & 1;
    *found = (struct gather){.base = opcode >> 5 & 31, .vector = number, .predicate = opcode >> 10 & 7};
    found->part = 1 << size;
    found->stores = top == 0x72;
    if (top == 0x42) { /* loads of elements of 32 bits */
        found->element = 4;
        found->addresses = upper;
        found->narrow = !upper;
        found->is_signed = middle >> 1;
        if (size == 3 || (upper ? middle != 1 : scaled && !size)) {
            return false; /* ldr, ld1r, prefetches */
        }
    } else if (top == 0x62) { /* of 64 bits */
        found->element = 8;
        found->addresses = upper && middle == 1;
        found->narrow = !upper;
        found->is_signed = !upper && middle >> 1;
        if ((upper && !middle) || (scaled && !size && !found->addresses)) {
            return false;
        }
    } else if (top == 0x72 && form >= 4 && form <= 6) {
        bool short_elements = middle >> 1;
        found->addresses = form == 5 && short_elements;
        found->element = (form == 5 ? middle == 3 : short_elements) ? 4 : 8;
        found->narrow = form != 5;
        found->is_signed = form == 6;
    } else {
        return false;
    }
    found->shift = scaled && !found->addresses ? size : 0;
    if (found->addresses) { /* a vector of addresses and a number */
        found->vector = found->base;
        found->offset = number << size;
    }
    return true;
}

static const uint8_t *read_bytes(struct qemu_plugin_register *handle)
{
    static __thread GByteArray *bytes;
    if (!bytes) {
        bytes = g_byte_array_new();
    }
    g_byte_array_set_size(bytes, 0);
    qemu_plugin_read_register(handle, bytes);
    return bytes->data;
}

static uint64_t read_register(uint32_t number)
{
    uint64_t value = 0;
    if (registers[number]) {
        memcpy(&value, read_bytes(registers[number]), sizeof(value));
    }
    return value;
}

static void on_sve(unsigned int vcpu, void *data)
{
    const struct sve *sve = data;
    if (!is_open || vcpu >= THREADS) {
        return;
    }
    uint64_t index = sve->indexed && sve->index != 31 ? read_register(sve->index) << sve->shift : 0;
    touch_bytes(vcpu, read_register(sve->base) + index + sve->offset, sve->bytes, sve->stores);
}

static void on_gather(unsigned int vcpu, void *data)
{
    const struct gather *gather = data;
    uint8_t offsets[256];
    uint64_t active[4];
    if (!is_open || vcpu >= THREADS || !vectors[gather->vector] || !predicates[gather->predicate]) {
        return;
    }
    memcpy(offsets, read_bytes(vectors[gather->vector]), vector_bytes);
    memcpy(active, read_bytes(predicates[gather->predicate]), vector_bytes / 8);
    uint64_t base = gather->addresses ? gather->offset : read_register(gather->base);
    for (uint32_t at = 0; at < vector_bytes; at += gather->element) {
        uint64_t offset = 0;
        memcpy(&offset, offsets + at, gather->narrow ? 4 : gather->element);
        if (gather->is_signed) {
            offset = (int64_t)(int32_t)offset;
        }
        if (active[at / 64] >> (at % 64) & 1) {
            touch_bytes(vcpu, base + (offset << gather->shift), gather->part, gather->stores);
        }
    }
}

static void *kept(const void *found, size_t size)
{
    return memcpy(malloc(size), found, size);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    uint32_t slot = slot_of(tb);
    qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, QEMU_PLUGIN_INLINE_ADD_U64, counter(slot), 1);
    for (size_t i = 0; memory && i < qemu_plugin_tb_n_insns(tb); i++) {
        struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
        uint32_t opcode = 0;
        struct sve sve;
        struct gather gather;
        qemu_plugin_insn_data(instruction, &opcode, sizeof(opcode));
        if (decode_sve(opcode, &sve)) {
            void *data = kept(&sve, sizeof(sve));
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, on_sve, QEMU_PLUGIN_CB_R_REGS, data);
        } else if (decode_gather(opcode, &gather)) {
            void *data = kept(&gather, sizeof(gather));
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, on_gather, QEMU_PLUGIN_CB_R_REGS, data);
        } else {
            qemu_plugin_register_vcpu_mem_cb(instruction, on_access, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, NULL);
        }
    }
}

static void write_traffic(const char *name, const struct traffic *seen)
{
    fprintf(out, ", \"%s\": [", name);
    for (int level = 0; level < LEVELS; level++) {
        fprintf(out, "%s[%llu, %llu]", level ? ", " : "", (unsigned long long)seen->in[level],
                (unsigned long long)seen->out[level]);
    }
    fprintf(out, "]");
}

static void write_region(unsigned int vcpu, uint64_t label)
{
    const char *comma = "";
    fprintf(out, "{\"label\": %llu, \"blocks\": [", (unsigned long long)label);
    const uint64_t *mine = qemu_plugin_scoreboard_find(runs, vcpu);
    for (uint32_t slot = 0; slot < block_count; slot++) {
        uint64_t all = qemu_plugin_u64_sum(counter(slot)) - before[slot];
        if (!all) {
            continue;
        }
        struct block *block = &blocks[slot];
        fprintf(out, "%s[%llu, %u, %llu, %llu, \"", comma, (unsigned long long)block->address, block->instructions,
                (unsigned long long)mine[slot], (unsigned long long)all);
        for (uint32_t i = 0; block->code && i < block->instructions; i++) {
            fprintf(out, "%08x", block->code[i]);
        }
        free(block->code);
        block->code = NULL;
        fprintf(out, "\"]");
        comma = ", ";
    }
    fprintf(out, "]");
    struct traffic sum = {0};
    for (int thread = 0; thread < THREADS; thread++) {
        for (int level = 0; level < LEVELS; level++) {
            sum.in[level] += traffic[thread].in[level];
            sum.out[level] += traffic[thread].out[level];
        }
    }
    if (memory && vcpu < THREADS) {
        write_traffic("lines", &traffic[vcpu]);
        write_traffic("lines_of_all", &sum);
    }
    fprintf(out, "}\n");
    fflush(out);
}

static void on_system_call(qemu_plugin_id_t id, unsigned int vcpu, int64_t number, uint64_t option, uint64_t command,
                           uint64_t label, uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    if (number != SYS_PRCTL || option != OPTION) {
        return;
    }
    pthread_mutex_lock(&lock);
    if (command == CLOSE) {
        is_open = false;
        write_region(vcpu, label);
    } else if (command == OPEN) {
        memset(traffic, 0, sizeof(traffic));
        memset(qemu_plugin_scoreboard_find(runs, vcpu), 0, block_count * sizeof(uint64_t));
        for (uint32_t slot = 0; slot < block_count; slot++) {
            before[slot] = qemu_plugin_u64_sum(counter(slot));
        }
        is_open = true;
    }
    pthread_mutex_unlock(&lock);
}

static void on_thread(qemu_plugin_id_t id, unsigned int vcpu)
{
    pthread_mutex_lock(&lock);
    GArray *found = registers[0] ? NULL : qemu_plugin_get_registers();
    for (guint i = 0; found && i < found->len; i++) {
        qemu_plugin_reg_descriptor *one = &g_array_index(found, qemu_plugin_reg_descriptor, i);
        bool is_numbered = g_ascii_isdigit(one->name[1]);
        int number = is_numbered ? atoi(one->name + 1) : 32;
        if (one->name[0] == 'x' && number < 31) {
            registers[number] = one->handle;
        } else if (one->name[0] == 'z' && number < 32) {
            vectors[number] = one->handle;
        } else if (one->name[0] == 'p' && number < 8) {
            predicates[number] = one->handle;
        } else if (!strcmp(one->name, "sp")) {
            registers[31] = one->handle;
        }
    }
    for (int level = 0; memory && vcpu < THREADS && level < L3; level++) {
        if (!own[vcpu][level].lines) {
            make_cache(&own[vcpu][level], level);
        }
    }
    pthread_mutex_unlock(&lock);
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    static const char *const levels[LEVELS] = {"l1=", "l2=", "l3="};
    for (int i = 0; i < argc; i++) {
        const char *value = strchr(argv[i], '=');
        if (!strncmp(argv[i], "out=", 4)) {
            out = fopen(value + 1, "w");
        } else if (!strncmp(argv[i], "vector=", 7)) {
            vector_bytes = atoi(value + 1);
        } else if (!strncmp(argv[i], "memory=", 7)) {
            if (!qemu_plugin_bool_parse("memory", value + 1, &memory)) {
                return -1;
            }
        } else {
            int level = 0;
            while (level < LEVELS && strncmp(argv[i], levels[level], 3)) {
                level++;
            }
            if (level == LEVELS || atoi(value + 1) <= 0) {
                fprintf(stderr, "clock: unknown option %s\n", argv[i]);
                return -1;
            }
            sizes_kib[level] = atoi(value + 1);
        }
    }
    if (!out || strcmp(info->target_name, "aarch64")) {
        fprintf(stderr, "clock: needs out=FILE that can be written, and an aarch64 program\n");
        return -1;
    }
    runs = qemu_plugin_scoreboard_new(BLOCKS * sizeof(uint64_t));
    before = calloc(BLOCKS, sizeof(*before));
    blocks = calloc(BLOCKS, sizeof(*blocks));
    buckets = calloc(BUCKETS, sizeof(*buckets));
    if (!before || !blocks || !buckets) {
        return -1;
    }
    if (memory) {
        make_cache(&shared, L3);
    }
    qemu_plugin_register_vcpu_init_cb(id, on_thread);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
    return 0;
}
