// Text to instructions, and what is not understood: an error with its line, before anything runs.
#include "snippet.h"

using namespace snippet;

static std::string launched(const std::string& body, const std::string& variables = "") {
  Device<uint32_t> out(32);
  return run(kernel(body, 1, variables), {out.data()});
}

static void what_is_not_known() {
  const std::string line = "ptx line " + std::to_string(kFirstLine);
  CHECK_FAILS(launched("madd.s32 %r1, %r0, 3, 4;"), (line + ": the machine has no madd.s32").c_str());
  CHECK_FAILS(launched("\nfrob.b32 %r1, %r0;"), ("ptx line " + std::to_string(kFirstLine + 1)).c_str());
  CHECK_FAILS(launched("add.cc.u32 %r1, %r0, 3;"), (line + ": the machine has no .cc of add.cc.u32").c_str());
  CHECK_FAILS(launched("add.sat.s32 %r1, %r0, 3;"), "no .sat of add.sat.s32");
  CHECK_FAILS(launched("ld.global.frobbed.u32 %r1, [%d0];"), "no .frobbed");
  CHECK_FAILS(launched("@%p1 bra L; tex.1d.v4.u32.s32 {%r1, %r2, %r3, %r4}, [%d0, {%r5}]; L: ;"),
              "the machine has no tex");
  CHECK_FAILS(launched("mov.u32 %r1, %unknown;"), (line + ": an operand that is not known here, %unknown").c_str());
  CHECK_FAILS(launched("@%q1 mov.u32 %r1, %r0;"), (line + ": there is no register %q1").c_str());
  CHECK_FAILS(launched("bra NOWHERE;"), (line + ": there is no label NOWHERE").c_str());
  CHECK_FAILS(launched(".local .b32 x;"), (line + ": a directive that is not known here, .local").c_str());
  CHECK_FAILS(launched("mov.u32 %r1 %r0;"), (line + ": expected ';', found '%r0'").c_str());
  CHECK_FAILS(launched("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f0, %f1, %f2, %f3}, %d0, %d0, %p0, 1, 1;"),
              "the machine has no wgmma.mma_async");
}

static void scopes_and_labels() {
  Device<uint32_t> out(32);
  // A name of an inner scope hides that of an outer one, labels too; inline assembly may leave out its last semicolon.
  const std::string text = kernel(R"(
    mov.u32 %r1, 5;
    { .reg .b32 %r1; .reg .pred P; mov.u32 %r1, 7; setp.eq.u32 P, %r0, 3; @!P bra DONE; add.u32 %r2, %r1, 0; DONE: }
    { .reg .pred P; setp.ne.u32 P, %r0, 3; @!P bra DONE; mov.u32 %r2, 9; DONE: }
    add.u32 %r3, %r1, %r2;  // 12 in lane 3, else 14
    /* a comment
       of two lines */ .pragma "nounroll";
    mad.wide.u32 %d1, %r0, 4, %d0;
    st.global.u32 [%d1+0], %r3;)",
                                  1);
  CHECK_PASSES(run(text, {out.data()}));
  for (size_t i = 0; i < 32; ++i) CHECK(out[i] == (i == 3 ? 12 : 14), "lane %zu has %u", i, out[i]);
}

static void variables_and_constants() {
  Device<uint64_t> out(4);
  const std::string text = kernel(R"(
    ld.global.u16 %r1, [table+4]; cvt.u64.u32 %d1, %r1; st.global.u64 [%d0], %d1;
    mov.b32 %r2, 0fC0490FDB; cvt.u64.u32 %d2, %r2; st.global.u64 [%d0+8], %d2;
    mov.u64 %d3, 0d3FF0000000000000; st.global.u64 [%d0+16], %d3;
    mov.u32 %r3, -2; cvt.s64.s32 %d4, %r3; st.global.u64 [%d0+24], %d4;)",
                                  1, ".global .align 8 .b16 table[4] = {1, 0x2, 300, 4};");
  CHECK_PASSES(run(text, {out.data()}, {.block = {1}}));
  CHECK(out[0] == 300, "%llu", static_cast<unsigned long long>(out[0]));
  CHECK(out[1] == 0xC0490FDB && out[2] == 0x3FF0000000000000 && out[3] == ~uint64_t{1}, "constants");
}

static void parameters_are_laid_out_as_in_c() {
  struct Arguments {
    uint8_t small;
    uint32_t word;
    void* out;
    alignas(8) uint32_t values[3];
    uint16_t half;
  } arguments;
  Device<uint32_t> out(4);
  arguments = {7, 100000, out.data(), {1, 2, 3}, 65535};
  const std::string text = R"(.version 9.0 .target sm_80 .address_size 64
    .visible .entry k(.param .u8 a, .param .u32 b, .param .u64 .ptr .align 1 c, .param .align 8 .b8 d[12], .param .u16 e) .maxntid 32, 1, 1 {
    .reg .b32 %r<8>; .reg .b64 %d<4>;
    ld.param.u64 %d0, [c];
    ld.param.u8 %r0, [a]; st.global.u32 [%d0], %r0; ld.param.u32 %r1, [b]; st.global.u32 [%d0+4], %r1;
    ld.param.v2.u32 {%r2, %r3}, [d]; ld.param.u32 %r4, [d+8]; mad.lo.u32 %r2, %r2, 100, %r3; mad.lo.u32 %r2, %r2, 100, %r4;
    st.global.u32 [%d0+8], %r2; ld.param.u16 %r5, [e]; st.global.u32 [%d0+12], %r5; ret; })";
  ptx::Module module = ptx::parse(text);
  ptx::Kernel& kernel = *module.find("k");
  CHECK(kernel.max_threads == 32 && module.target == "sm_80", "directives");
  ptx::launch(kernel, {}, {1}, {}, 0, &arguments);
  CHECK(out[0] == 7 && out[1] == 100000 && out[2] == 10203 && out[3] == 65535, "%u %u %u %u", out[0], out[1], out[2],
        out[3]);
  CHECK(module.find("other") == nullptr, "no such kernel");
}

int main() {
  what_is_not_known();
  scopes_and_labels();
  variables_and_constants();
  parameters_are_laid_out_as_in_c();
  return testing::finish();
}
