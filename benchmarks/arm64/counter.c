/* QEMU plugin: counts retired instructions by class, between two harmless system calls.
 *
 * A program opens a region with prctl(0x41524D4F, 1) and closes it with prctl(0x41524D4F, 2, label); the kernel
 * answers EINVAL to both. Each close writes one line of JSON to the file given as out=. All threads count.
 * With profile=on the line also holds how often each block of instructions ran (of the thread that closes).
 *
 * Blocks are counted when they are entered, by code that QEMU inlines, one addition for each class in the block: exact,
 * because a system call ends a block and nothing else leaves one early (but a fault, or code that overwrites itself).
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qemu-plugin.h"

#define CLASSES(X) \
    X(sve_bfmmla) X(neon_bfmmla) X(bfdot) X(fmla) X(vector_load) X(vector_store) X(vector_other) X(other)

enum class {
#define X(name) CLASS_##name,
    CLASSES(X)
#undef X
    CLASS_COUNT
};

static const char *const class_names[] = {
#define X(name) #name,
    CLASSES(X)
#undef X
};

static const struct {
    enum class class;
    uint32_t mask, value;
} rules[] = {
#define RULE(name, mask, value) {CLASS_##name, mask, value},
#include "opcodes.def"
#undef RULE
};

enum { SYS_PRCTL = 167, OPTION = 0x41524D4F, OPEN = 1, CLOSE = 2, BLOCKS = 1 << 20, BUCKETS = 1 << 21 };

struct block {
    uint64_t address;
    uint32_t instructions;
};

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

static FILE *out;
static struct qemu_plugin_scoreboard *counts; /* uint64_t[CLASS_COUNT] for each thread */
static uint64_t opened[CLASS_COUNT];

static bool profile;
static struct qemu_plugin_scoreboard *runs; /* uint64_t[BLOCKS] for each thread */
static struct block *blocks;                /* slot 0 takes what finds no room */
static uint32_t *buckets;                   /* address -> slot, open addressing; 0 is free */
static uint32_t block_count = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static qemu_plugin_u64 counter(struct qemu_plugin_scoreboard *score, size_t index)
{
    return (qemu_plugin_u64){score, index * sizeof(uint64_t)};
}

static enum class classify(uint32_t opcode)
{
    size_t i = 0;
    while ((opcode & rules[i].mask) != rules[i].value) {
        i++; /* the last rule takes all */
    }
    return rules[i].class;
}

/* The slot of a block; one that is translated again keeps its own. */
static uint32_t slot_of(uint64_t address, uint32_t instructions)
{
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
                buckets[at] = slot = block_count++;
                blocks[slot] = (struct block){address, instructions};
            }
            break;
        }
    }
    pthread_mutex_unlock(&lock);
    return slot;
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    size_t length = qemu_plugin_tb_n_insns(tb);
    uint64_t found[CLASS_COUNT] = {0};
    for (size_t i = 0; i < length; i++) {
        uint32_t opcode = 0;
        qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i), &opcode, sizeof(opcode));
        found[classify(opcode)]++;
    }
    for (size_t i = 0; i < CLASS_COUNT; i++) {
        if (found[i]) {
            qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
                tb, QEMU_PLUGIN_INLINE_ADD_U64, counter(counts, i), found[i]);
        }
    }
    if (profile) {
        uint32_t slot = slot_of(qemu_plugin_tb_vaddr(tb), length);
        qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(tb, QEMU_PLUGIN_INLINE_ADD_U64, counter(runs, slot), 1);
    }
}

static void write_region(unsigned int vcpu, uint64_t label)
{
    uint64_t total = 0;
    fprintf(out, "{\"label\": %llu", (unsigned long long)label);
    for (size_t i = 0; i < CLASS_COUNT; i++) {
        uint64_t count = qemu_plugin_u64_sum(counter(counts, i)) - opened[i];
        total += count;
        fprintf(out, ", \"%s\": %llu", class_names[i], (unsigned long long)count);
    }
    fprintf(out, ", \"total\": %llu", (unsigned long long)total);
    if (profile) {
        const uint64_t *ran = qemu_plugin_scoreboard_find(runs, vcpu);
        const char *comma = "";
        fprintf(out, ", \"blocks\": [");
        for (uint32_t slot = 0; slot < block_count; slot++) {
            if (ran[slot]) {
                fprintf(out, "%s[%llu, %u, %llu]", comma, (unsigned long long)blocks[slot].address,
                        blocks[slot].instructions, (unsigned long long)ran[slot]);
                comma = ", ";
            }
        }
        fprintf(out, "]");
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
    if (command == CLOSE) {
        write_region(vcpu, label);
    } else if (command == OPEN) {
        for (size_t i = 0; i < CLASS_COUNT; i++) {
            opened[i] = qemu_plugin_u64_sum(counter(counts, i));
        }
        if (profile) {
            memset(qemu_plugin_scoreboard_find(runs, vcpu), 0, block_count * sizeof(uint64_t));
        }
    }
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) {
            out = fopen(argv[i] + 4, "w");
        } else if (strncmp(argv[i], "profile=", 8) || !qemu_plugin_bool_parse("profile", argv[i] + 8, &profile)) {
            fprintf(stderr, "counter: unknown option %s\n", argv[i]);
            return -1;
        }
    }
    if (!out || strcmp(info->target_name, "aarch64")) {
        fprintf(stderr, "counter: needs out=FILE that can be written, and an aarch64 program\n");
        return -1;
    }
    counts = qemu_plugin_scoreboard_new(CLASS_COUNT * sizeof(uint64_t));
    if (profile) {
        runs = qemu_plugin_scoreboard_new(BLOCKS * sizeof(uint64_t));
        blocks = calloc(BLOCKS, sizeof(*blocks));
        buckets = calloc(BUCKETS, sizeof(*buckets));
        if (!blocks || !buckets) {
            return -1;
        }
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
    return 0;
}
