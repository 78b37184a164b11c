"""Pure parts of benchmarks/arm64: classes of instructions, counts, tables. Counting itself needs the emulated core."""

import struct

import pytest

from benchmarks.arm64 import contenders, counting, opcodes, page, profile, tables
from benchmarks.arm64.emulated_jobs import Job

# Encodings by GNU as 2.40 (-march=armv8.6-a+sve+bf16), text by its objdump.
ENCODINGS = {
    "sve_bfmmla": {
        0x6462E420: "bfmmla z0.s, z1.h, z2.h",
    },
    "neon_bfmmla": {
        0x6E5DEFDF: "bfmmla v31.4s, v30.8h, v29.8h",
    },
    "bfdot": {
        0x2E42FC20: "bfdot v0.2s, v1.4h, v2.4h",
        0x6E42FC20: "bfdot v0.4s, v1.8h, v2.8h",
        0x4F62F820: "bfdot v0.4s, v1.8h, v2.2h[3]",
        0x64628020: "bfdot z0.s, z1.h, z2.h",
        0x647A4020: "bfdot z0.s, z1.h, z2.h[3]",
    },
    "fmla": {
        0x4E22CC20: "fmla v0.4s, v1.4s, v2.4s",
        0x0EA2CC20: "fmls v0.2s, v1.2s, v2.2s",
        0x4FA21820: "fmla v0.4s, v1.4s, v2.s[3]",
        0x4F825020: "fmls v0.4s, v1.4s, v2.s[0]",
        0x65A20020: "fmla z0.s, p0/m, z1.s, z2.s",
        0x65A23C20: "fmls z0.s, p7/m, z1.s, z2.s",
        0x65A28020: "fmad z0.s, p0/m, z1.s, z2.s",
        0x65A2E020: "fnmsb z0.s, p0/m, z1.s, z2.s",
        0x64BA0020: "fmla z0.s, z1.s, z2.s[3]",
        0x64AA0420: "fmls z0.s, z1.s, z2.s[1]",
    },
    "vector_load": {
        0x3DC00020: "ldr q0, [x1]",
        0xFC408C20: "ldr d0, [x1, #8]!",
        0xBC404420: "ldr s0, [x1], #4",
        0x3CDF0020: "ldur q0, [x1, #-16]",
        0x9C000000: "ldr q0, a0",
        0xAD410440: "ldp q0, q1, [x2, #32]",
        0x6C400440: "ldnp d0, d1, [x2]",
        0x4C407800: "ld1 {v0.4s}, [x0]",
        0x4CDF2800: "ld1 {v0.4s-v3.4s}, [x0], #64",
        0x4D40C800: "ld1r {v0.4s}, [x0]",
        0x4C400800: "ld4 {v0.4s-v3.4s}, [x0]",
        0x0D409000: "ld1 {v0.s}[1], [x0]",
        0x85804400: "ldr z0, [x0, #1, mul vl]",
        0x85800000: "ldr p0, [x0]",
        0xA540A000: "ld1w {z0.s}, p0/z, [x0]",
        0xA5414000: "ld1w {z0.s}, p0/z, [x0, x1, lsl #2]",
        0x8540C000: "ld1rw {z0.s}, p0/z, [x0]",
        0xA5002000: "ld1rqw {z0.s}, p0/z, [x0]",
        0xA500E000: "ldnt1w {z0.s}, p0/z, [x0]",
        0x85214000: "ld1w {z0.s}, p0/z, [x0, z1.s, uxtw #2]",
        0xC5C1C000: "ld1d {z0.d}, p0/z, [x0, z1.d]",
        0xA520E000: "ld2w {z0.s, z1.s}, p0/z, [x0]",
    },
    "vector_store": {
        0x3D800020: "str q0, [x1]",
        0xADBF07E0: "stp q0, q1, [sp, #-32]!",
        0xFC1F8020: "stur d0, [x1, #-8]",
        0x4C007800: "st1 {v0.4s}, [x0]",
        0x4C000800: "st4 {v0.4s-v3.4s}, [x0]",
        0xE5804000: "str z0, [x0]",
        0xE540E000: "st1w {z0.s}, p0, [x0]",
        0xE510E000: "stnt1w {z0.s}, p0, [x0]",
        0xE5418000: "st1w {z0.s}, p0, [x0, z1.s, uxtw]",
    },
    "vector_other": {
        0x4E62CC20: "fmla v0.2d, v1.2d, v2.2d",
        0x4E420C20: "fmla v0.8h, v1.8h, v2.8h",
        0x65E20020: "fmla z0.d, p0/m, z1.d, z2.d",
        0x65620020: "fmla z0.h, p0/m, z1.h, z2.h",
        0x1F020C20: "fmadd s0, s1, s2, s3",
        0x2EC2FC20: "bfmlalb v0.4s, v1.8h, v2.8h",
        0x64E28420: "bfmlalt z0.s, z1.h, z2.h",
        0x0EA16820: "bfcvtn v0.4h, v1.4s",
        0x658AA020: "bfcvt z0.h, p0/m, z1.s",
        0x6E22DC20: "fmul v0.4s, v1.4s, v2.4s",
        0x65820020: "fadd z0.s, z1.s, z2.s",
        0x4EA11C20: "mov v0.16b, v1.16b",
        0x0420BC20: "movprfx z0, z1",
        0x2598E3E0: "ptrue p0.s",
        0x25A11400: "whilelt p0.s, x0, x1",
        0x04A0E3E0: "cntw x0",
        0x05A26020: "zip1 z0.s, z1.s, z2.s",
        0x1E220000: "scvtf s0, w0",
        0x1E260000: "fmov w0, s0",
    },
    "other": {
        0xC4216000: "prfd pldl1keep, p0, [x0, z1.d, uxtw #3]",
        0x85C04000: "prfw pldl1keep, p0, [x0]",
        0x8501C000: "prfw pldl1keep, p0, [x0, x1, lsl #2]",
        0x8500E000: "prfw pldl1keep, p0, [z0.s]",
        0x84214000: "prfw pldl1keep, p0, [x0, z1.s, uxtw #2]",
        0xC580E000: "prfd pldl1keep, p0, [z0.d]",
        0xC461E000: "prfd pldl1keep, p0, [x0, z1.d, lsl #3]",
        0xF9800000: "prfm pldl1keep, [x0]",
        0x8B020020: "add x0, x1, x2",
        0xF9400020: "ldr x0, [x1]",
        0xA8C107E0: "ldp x0, x1, [sp], #16",
        0xB9000020: "str w0, [x1]",
        0xA9BF7BFD: "stp x29, x30, [sp, #-16]!",
        0x58000000: "ldr x0, 13c",
        0x885FFC20: "ldaxr w0, [x1]",
        0x9B020C20: "madd x0, x1, x2, x3",
        0x14000000: "b 148",
        0xB4000000: "cbz x0, 14c",
        0xD4000001: "svc #0x0",
        0xD53B4400: "mrs x0, fpcr",
    },
}


@pytest.mark.parametrize("name", opcodes.CLASSES)
def test_class_of_encodings(name):
    assert {text: opcodes.classify(opcode) for opcode, text in ENCODINGS[name].items()} == dict.fromkeys(
        ENCODINGS[name].values(), name
    )


def test_every_rule_is_reached_and_the_last_takes_all():
    rules = opcodes.rules()
    assert {name for name, _, _ in rules} == set(opcodes.CLASSES)
    assert rules[-1] == ("other", 0, 0)
    for index, (_, mask, value) in enumerate(rules):
        assert value & ~mask == 0
        # no earlier rule swallows it whole
        assert not any(m & mask == m and value & m == v for _, m, v in rules[:index])
        assert any(word & mask == value for words in ENCODINGS.values() for word in words) or index == len(rules) - 1


def test_the_plugin_has_the_same_classes():
    source = (opcodes.TABLE.parent / "counter.c").read_text()
    line = next(line for line in source.splitlines() if line.strip().startswith("X(sve_bfmmla)"))
    assert tuple(part.strip("X() ") for part in line.split()) == opcodes.CLASSES


def _line(**classes):
    full = {**dict.fromkeys(opcodes.CLASSES, 0), **classes}
    return {**full, "total": sum(full.values())}


def test_the_region_itself_is_subtracted_and_nodes_are_added_up():
    job = Job("job", "module:function", by_node=True)
    result = {
        "empty": _line(other=100),
        "runs": [_line(other=1300, fmla=7), _line(other=1100, fmla=7)],
        "nodes": [
            {"node": "a", "target": "aten.relu", "inputs": [], "output": "", **_line(other=400, fmla=3)},
            {"node": "b", "target": "aten.mm", "inputs": [], "output": "", **_line(other=300, fmla=4)},
            {"node": "c", "target": "aten.relu", "inputs": [], "output": "", **_line(other=150)},
        ],
    }
    counted = counting.Counts.of(job, result)
    assert (counted.total, counted.totals) == (1007, (1207, 1007))
    rows = counted.by_target()
    assert [(r["target"], r["nodes"], r["total"], r["fmla"]) for r in rows] == [
        ("aten.relu", 2, 353, 3),
        ("aten.mm", 1, 204, 4),
        ("(outside of nodes)", 0, 450, 0),
    ]
    assert "aten.mm" in tables.details(counted)


def test_a_failed_job_has_a_reason_and_no_counts():
    failed = counting.Counts.of(Job("job", "m:f"), {"error": "Traceback\nValueError: no"})
    assert (failed.error, failed.total) == ("Traceback\nValueError: no", 0)


def test_the_page_says_who_won():
    half = dict.fromkeys(opcodes.CLASSES, 1000000)
    results = {
        "net": {
            contenders.BASELINE: {"classes": {name: 2 * n for name, n in half.items()}},
            "model.bfloat16()": {"error": "RuntimeError: no kernel"},
            contenders.ARMOPT: {"classes": half},
        }
    }
    text = page.render(results, {"net": 32_000_000, "another": 1})
    row = next(line for line in text.splitlines() if line.startswith("| net"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("net", "1.00", "16.00", "failed", "8.00", "2.00x", "2.00x")
    ]
    assert "another" not in text


def test_symbols_of_an_elf_file(tmp_path):
    strings = b"\0first\0second\0"
    symbols = b"".join(
        struct.pack("<IBBHQQ", name, kind, 0, 1, value, 8)
        for name, kind, value in ((0, 0, 0), (1, 2, 0x10100), (7, 2, 0x10200), (1, 1, 0x10300))
    )
    at = 64 + 56
    header = b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<HHIQQQI", 3, 183, 1, 0, 64, at, 0)
    header += struct.pack("<HHHHHH", 64, 56, 1, 64, 3, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x10000, 0x10000, 0x1000, 0x1000, 0x1000)
    data = at + 3 * 64
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 0, 11, 0, 0, data, len(symbols), 2, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, data + len(symbols), len(strings), 0, 0, 1, 0)
    file = tmp_path / "library.so"
    file.write_bytes(header + load + sections + symbols + strings)
    mapped, other = (0x70050, 0x80000, 0x50, str(file)), (0x81000, 0x82000, 0, "[anon]")
    addresses = (0x70050, 0x70100, 0x701FF, 0x70200, 0x75000, 0x80000, 0x81000, 0x60000)
    assert profile.symbols(addresses, [other, mapped]) == [
        *(("library.so", name) for name in ("?", "first", "first", "second", "?")),
        *[("(generated code)", "")] * 3,
    ]
