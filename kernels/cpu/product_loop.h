// The loop of a whole tile of product_tile.h for x86-64, in assembly: compilers spill sums of a tile that fills the
// register file as soon as the loop does anything beside its products (GCC 12: a tenth to a half of the speed), and
// what it does beside them, fetching the next block's lines and packing, is worth as much. One function per instruction
// set, number of vectors and kind of output; all addresses come in a `TileLoop`, all strides are in bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "dispatch.h"

namespace ummrm::cpu {

inline constexpr int64_t kLine = 16;  // floats of a cache line

// Cache lines of a block of a matrix that will be needed soon, fetched a few at a time while tiles are computed: a core
// waits for few lines at once, and those of a tile at work should not queue behind a burst of others.
struct Ahead {
  static constexpr int64_t kSteps = 4;  // of the depth, between two fetches
  const float* next = nullptr;
  int64_t lines = 0;            // still to come
  int64_t run = 0, in_run = 0;  // lines of a row, and those of them still to come
  int64_t jump = 0;             // bytes from the end of a row's run to the next row's
  int64_t at_once = 0;          // lines

  // `rows` rows of `columns` elements, to be here after `steps` of the depth.
  static Ahead of(const float* from, int64_t rows, int64_t columns, int64_t stride, int64_t steps) {
    Ahead ahead;
    ahead.next = from;
    ahead.run = ahead.in_run = (columns + kLine - 1) / kLine;
    ahead.lines = rows * ahead.run;
    ahead.jump = (stride - ahead.run * kLine) * static_cast<int64_t>(sizeof(float));
    ahead.at_once = ahead.lines / std::max<int64_t>(1, steps / kSteps) + 1;
    return ahead;
  }
};

// out[i] = sum over k of a[i * a_row + k * a_step] * b[k * b_step], of whole vectors.
struct TileLoop {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_step;
  int64_t depth;
  float* pack;  // what is read of b is stored here as well, one vector behind the other; null: nowhere
  float* out;
  int64_t out_row;
  Ahead* ahead;
};

#ifdef UMMRM_HAS_CLONES

// clang-format off
// r8, r9, r10: rows 0, 3 and 6 of a; r11: a_row; r12: a_step; r13: b; r14: b_step; rcx: steps or fours of them;
// rsi: pack; rdx: ahead; rbx: its next line; rdi: the TileLoop. Sums: registers 8 to 31 of 16 floats, or 4 to 15 of 8.
#define UMMRM_MULTIPLY_1(R, s0, s1, s2) "vfmadd231ps %%" R "0, %%" R "3, %%" R #s0 "\n\t"
#define UMMRM_MULTIPLY_2(R, s0, s1, s2) \
  UMMRM_MULTIPLY_1(R, s0, s1, s2) "vfmadd231ps %%" R "1, %%" R "3, %%" R #s1 "\n\t"
#define UMMRM_MULTIPLY_3(R, s0, s1, s2) \
  UMMRM_MULTIPLY_2(R, s0, s1, s2) "vfmadd231ps %%" R "2, %%" R "3, %%" R #s2 "\n\t"
#define UMMRM_ROW(V, R, from, s0, s1, s2) "vbroadcastss (" from "), %%" R "3\n\t" UMMRM_MULTIPLY_##V(R, s0, s1, s2)

#define UMMRM_ROWS_zmm(V)                          \
  UMMRM_ROW(V, "zmm", "%%r8", 8, 9, 10)            \
  UMMRM_ROW(V, "zmm", "%%r8, %%r11", 11, 12, 13)   \
  UMMRM_ROW(V, "zmm", "%%r8, %%r11, 2", 14, 15, 16) \
  UMMRM_ROW(V, "zmm", "%%r9", 17, 18, 19)          \
  UMMRM_ROW(V, "zmm", "%%r9, %%r11", 20, 21, 22)   \
  UMMRM_ROW(V, "zmm", "%%r9, %%r11, 2", 23, 24, 25) \
  UMMRM_ROW(V, "zmm", "%%r10", 26, 27, 28)         \
  UMMRM_ROW(V, "zmm", "%%r10, %%r11", 29, 30, 31)  \
  "add %%r12, %%r8\n\t"                            \
  "add %%r12, %%r9\n\t"                            \
  "add %%r12, %%r10\n\t"
#define UMMRM_ROWS_ymm(V)                          \
  UMMRM_ROW(V, "ymm", "%%r8", 4, 5, 6)             \
  UMMRM_ROW(V, "ymm", "%%r8, %%r11", 7, 8, 9)      \
  UMMRM_ROW(V, "ymm", "%%r8, %%r11, 2", 10, 11, 12) \
  UMMRM_ROW(V, "ymm", "%%r9", 13, 14, 15)          \
  "add %%r12, %%r8\n\t"                            \
  "add %%r12, %%r9\n\t"

#define UMMRM_LOAD_1(R, one, two) "vmovups (%%r13), %%" R "0\n\t"
#define UMMRM_LOAD_2(R, one, two) UMMRM_LOAD_1(R, one, two) "vmovups " #one "(%%r13), %%" R "1\n\t"
#define UMMRM_LOAD_3(R, one, two) UMMRM_LOAD_2(R, one, two) "vmovups " #two "(%%r13), %%" R "2\n\t"
#define UMMRM_PACK_1(R, one, two) "vmovups %%" R "0, (%%rsi)\n\t"
#define UMMRM_PACK_2(R, one, two) UMMRM_PACK_1(R, one, two) "vmovups %%" R "1, " #one "(%%rsi)\n\t"
#define UMMRM_PACK_3(R, one, two) UMMRM_PACK_2(R, one, two) "vmovups %%" R "2, " #two "(%%rsi)\n\t"

#define UMMRM_STEP_zmm(V, ...) UMMRM_LOAD_##V("zmm", 64, 128) "add %%r14, %%r13\n\t" __VA_ARGS__ UMMRM_ROWS_zmm(V)
#define UMMRM_STEP_ymm(V, ...) UMMRM_LOAD_##V("ymm", 32, 64) "add %%r14, %%r13\n\t" __VA_ARGS__ UMMRM_ROWS_ymm(V)
#define UMMRM_STEPS(R, V, ...)   \
  UMMRM_STEP_##R(V, __VA_ARGS__) \
  UMMRM_STEP_##R(V, __VA_ARGS__) \
  UMMRM_STEP_##R(V, __VA_ARGS__) \
  UMMRM_STEP_##R(V, __VA_ARGS__)

#define UMMRM_FETCH                 \
  "cmpq $0, %c[lines](%%rdx)\n\t"   \
  "jle 4f\n\t"                      \
  "mov %c[at_once](%%rdx), %%rax\n" \
  "3:\n\t"                          \
  "prefetcht1 (%%rbx)\n\t"          \
  "add $64, %%rbx\n\t"              \
  "decq %c[in_run](%%rdx)\n\t"      \
  "jnz 5f\n\t"                      \
  "add %c[jump](%%rdx), %%rbx\n\t"  \
  "mov %c[run](%%rdx), %%r15\n\t"   \
  "mov %%r15, %c[in_run](%%rdx)\n"  \
  "5:\n\t"                          \
  "decq %c[lines](%%rdx)\n\t"       \
  "jz 4f\n\t"                       \
  "dec %%rax\n\t"                   \
  "jnz 3b\n"                        \
  "4:\n\t"

#define UMMRM_LOOP(R, V, ...)         \
  "mov %c[depth](%%rdi), %%rcx\n\t"   \
  "shr $2, %%rcx\n\t"                 \
  "jz 6f\n"                           \
  "1:\n\t"                            \
  UMMRM_FETCH                         \
  UMMRM_STEPS(R, V, __VA_ARGS__)      \
  "dec %%rcx\n\t"                     \
  "jnz 1b\n"                          \
  "6:\n\t"                            \
  "mov %c[depth](%%rdi), %%rcx\n\t"   \
  "and $3, %%rcx\n\t"                 \
  "jz 8f\n"                           \
  "7:\n\t"                            \
  UMMRM_STEP_##R(V, __VA_ARGS__)      \
  "dec %%rcx\n\t"                     \
  "jnz 7b\n"                          \
  "8:\n\t"

#define UMMRM_STORE_1(move, R, one, two, s0, s1, s2) move " %%" R #s0 ", (%%r8)\n\t"
#define UMMRM_STORE_2(move, R, one, two, s0, s1, s2) \
  UMMRM_STORE_1(move, R, one, two, s0, s1, s2) move " %%" R #s1 ", " #one "(%%r8)\n\t"
#define UMMRM_STORE_3(move, R, one, two, s0, s1, s2) \
  UMMRM_STORE_2(move, R, one, two, s0, s1, s2) move " %%" R #s2 ", " #two "(%%r8)\n\t"
#define UMMRM_STORE_zmm(V, move, s0, s1, s2) UMMRM_STORE_##V(move, "zmm", 64, 128, s0, s1, s2) "add %%r11, %%r8\n\t"
#define UMMRM_STORE_ymm(V, move, s0, s1, s2) UMMRM_STORE_##V(move, "ymm", 32, 64, s0, s1, s2) "add %%r11, %%r8\n\t"
#define UMMRM_STORES_zmm(V, move)      \
  UMMRM_STORE_zmm(V, move, 8, 9, 10)   \
  UMMRM_STORE_zmm(V, move, 11, 12, 13) \
  UMMRM_STORE_zmm(V, move, 14, 15, 16) \
  UMMRM_STORE_zmm(V, move, 17, 18, 19) \
  UMMRM_STORE_zmm(V, move, 20, 21, 22) \
  UMMRM_STORE_zmm(V, move, 23, 24, 25) \
  UMMRM_STORE_zmm(V, move, 26, 27, 28) \
  UMMRM_STORE_zmm(V, move, 29, 30, 31)
#define UMMRM_STORES_ymm(V, move)      \
  UMMRM_STORE_ymm(V, move, 4, 5, 6)    \
  UMMRM_STORE_ymm(V, move, 7, 8, 9)    \
  UMMRM_STORE_ymm(V, move, 10, 11, 12) \
  UMMRM_STORE_ymm(V, move, 13, 14, 15)

#define UMMRM_ZERO_zmm(s) "vpxord %%zmm" #s ", %%zmm" #s ", %%zmm" #s "\n\t"
#define UMMRM_ZERO_ymm(s) "vxorps %%ymm" #s ", %%ymm" #s ", %%ymm" #s "\n\t"
#define UMMRM_ZEROS_zmm                                                       \
  UMMRM_ZERO_zmm(8) UMMRM_ZERO_zmm(9) UMMRM_ZERO_zmm(10) UMMRM_ZERO_zmm(11)   \
  UMMRM_ZERO_zmm(12) UMMRM_ZERO_zmm(13) UMMRM_ZERO_zmm(14) UMMRM_ZERO_zmm(15) \
  UMMRM_ZERO_zmm(16) UMMRM_ZERO_zmm(17) UMMRM_ZERO_zmm(18) UMMRM_ZERO_zmm(19) \
  UMMRM_ZERO_zmm(20) UMMRM_ZERO_zmm(21) UMMRM_ZERO_zmm(22) UMMRM_ZERO_zmm(23) \
  UMMRM_ZERO_zmm(24) UMMRM_ZERO_zmm(25) UMMRM_ZERO_zmm(26) UMMRM_ZERO_zmm(27) \
  UMMRM_ZERO_zmm(28) UMMRM_ZERO_zmm(29) UMMRM_ZERO_zmm(30) UMMRM_ZERO_zmm(31)
#define UMMRM_ZEROS_ymm                                                       \
  UMMRM_ZERO_ymm(4) UMMRM_ZERO_ymm(5) UMMRM_ZERO_ymm(6) UMMRM_ZERO_ymm(7)     \
  UMMRM_ZERO_ymm(8) UMMRM_ZERO_ymm(9) UMMRM_ZERO_ymm(10) UMMRM_ZERO_ymm(11)   \
  UMMRM_ZERO_ymm(12) UMMRM_ZERO_ymm(13) UMMRM_ZERO_ymm(14) UMMRM_ZERO_ymm(15)

#define UMMRM_CLOBBERED_ymm                                                                                           \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
#define UMMRM_CLOBBERED_zmm                                                                                      \
  UMMRM_CLOBBERED_ymm, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", \
      "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"

#define UMMRM_FIELD(type, name) [name] "i"(offsetof(type, name))
#define UMMRM_TILE_LOOP(name, level, R, V, move, ...)                                                                 \
  __attribute__((target("arch=x86-64-" level), noinline)) static void name(const TileLoop& loop) {                    \
    __asm__ volatile(                                                                                                 \
        "mov %c[a](%%rdi), %%r8\n\t"                                                                                  \
        "mov %c[a_row](%%rdi), %%r11\n\t"                                                                             \
        "lea (%%r11, %%r11, 2), %%rax\n\t"                                                                            \
        "lea (%%r8, %%rax), %%r9\n\t"                                                                                 \
        "lea (%%r9, %%rax), %%r10\n\t"                                                                                \
        "mov %c[a_step](%%rdi), %%r12\n\t"                                                                            \
        "mov %c[b](%%rdi), %%r13\n\t"                                                                                 \
        "mov %c[b_step](%%rdi), %%r14\n\t"                                                                            \
        "mov %c[pack](%%rdi), %%rsi\n\t"                                                                              \
        "mov %c[ahead](%%rdi), %%rdx\n\t"                                                                             \
        "mov %c[next](%%rdx), %%rbx\n\t"                                                                              \
        UMMRM_ZEROS_##R                                                                                               \
        UMMRM_LOOP(R, V, __VA_ARGS__)                                                                                 \
        "mov %%rbx, %c[next](%%rdx)\n\t"                                                                              \
        "mov %c[out](%%rdi), %%r8\n\t"                                                                                \
        "mov %c[out_row](%%rdi), %%r11\n\t"                                                                           \
        UMMRM_STORES_##R(V, move)                                                                                     \
        :                                                                                                             \
        : "D"(&loop), UMMRM_FIELD(TileLoop, a), UMMRM_FIELD(TileLoop, a_row), UMMRM_FIELD(TileLoop, a_step),          \
          UMMRM_FIELD(TileLoop, b), UMMRM_FIELD(TileLoop, b_step), UMMRM_FIELD(TileLoop, depth),                      \
          UMMRM_FIELD(TileLoop, pack), UMMRM_FIELD(TileLoop, out), UMMRM_FIELD(TileLoop, out_row),                    \
          UMMRM_FIELD(TileLoop, ahead), UMMRM_FIELD(Ahead, next), UMMRM_FIELD(Ahead, lines), UMMRM_FIELD(Ahead, run), \
          UMMRM_FIELD(Ahead, in_run), UMMRM_FIELD(Ahead, jump), UMMRM_FIELD(Ahead, at_once)                           \
        : "rax", "rbx", "rcx", "rdx", "rsi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory",    \
          UMMRM_CLOBBERED_##R);                                                                                       \
  }

#define UMMRM_TILE_LOOPS(R, level, V, one, two, packed)                       \
  UMMRM_TILE_LOOP(R##_##V##_keep, level, R, V, "vmovups")                     \
  UMMRM_TILE_LOOP(R##_##V##_stream, level, R, V, "vmovntps")                  \
  UMMRM_TILE_LOOP(R##_##V##_keep_pack, level, R, V, "vmovups",                \
                  UMMRM_PACK_##V(#R, one, two) "add $" #packed ", %%rsi\n\t") \
  UMMRM_TILE_LOOP(R##_##V##_stream_pack, level, R, V, "vmovntps",             \
                  UMMRM_PACK_##V(#R, one, two) "add $" #packed ", %%rsi\n\t")

// clang-format on

namespace loops {
UMMRM_TILE_LOOPS(zmm, "v4", 1, 64, 128, 64)
UMMRM_TILE_LOOPS(zmm, "v4", 2, 64, 128, 128)
UMMRM_TILE_LOOPS(zmm, "v4", 3, 64, 128, 192)
UMMRM_TILE_LOOPS(ymm, "v3", 1, 32, 64, 32)
UMMRM_TILE_LOOPS(ymm, "v3", 2, 32, 64, 64)
UMMRM_TILE_LOOPS(ymm, "v3", 3, 32, 64, 96)

using Function = void (*)(const TileLoop&);
// by vectors less one, then whether outputs are streamed and whether b is packed
inline constexpr Function kWide[3][4] = {{zmm_1_keep, zmm_1_keep_pack, zmm_1_stream, zmm_1_stream_pack},
                                         {zmm_2_keep, zmm_2_keep_pack, zmm_2_stream, zmm_2_stream_pack},
                                         {zmm_3_keep, zmm_3_keep_pack, zmm_3_stream, zmm_3_stream_pack}};
inline constexpr Function kUsual[3][4] = {{ymm_1_keep, ymm_1_keep_pack, ymm_1_stream, ymm_1_stream_pack},
                                          {ymm_2_keep, ymm_2_keep_pack, ymm_2_stream, ymm_2_stream_pack},
                                          {ymm_3_keep, ymm_3_keep_pack, ymm_3_stream, ymm_3_stream_pack}};
}  // namespace loops

#endif

}  // namespace ummrm::cpu
