// Instructions of one lane: integers, floats, conversions, comparisons.
#pragma once

#include "state.h"

namespace {

template <typename D, typename A, D (*F)(A)>
Step unary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]);
  const A* a = reg<A>(w, i.o[1]);
  lanes(m, [=](int l) { d[l] = F(a[l]); });
  return next;
}
template <typename D, typename A, typename B, D (*F)(A, B)>
Step binary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]);
  const A* a = reg<A>(w, i.o[1]);
  const B* b = reg<B>(w, i.o[2]);
  lanes(m, [=](int l) { d[l] = F(a[l], b[l]); });
  return next;
}
template <typename D, typename A, typename B, typename C, D (*F)(A, B, C)>
Step ternary(Warp& w, const Ins& i, uint32_t m) {
  D* d = reg<D>(w, i.o[0]);
  const A* a = reg<A>(w, i.o[1]);
  const B* b = reg<B>(w, i.o[2]);
  const C* c = reg<C>(w, i.o[3]);
  lanes(m, [=](int l) { d[l] = F(a[l], b[l], c[l]); });
  return next;
}
template <typename T, bool (*F)(T, T)>
Step compare(Warp& w, const Ins& i, uint32_t m) {
  const T* a = reg<T>(w, i.o[1]);
  const T* b = reg<T>(w, i.o[2]);
  uint32_t r = 0;
  for (int l = 0; l < 32; ++l) r |= uint32_t(F(a[l], b[l])) << l;
  uint32_t& d = pred(w, i.o[0]);
  d = (d & ~m) | (r & m);
  return next;
}
template <typename T>
Step select(Warp& w, const Ins& i, uint32_t m) {
  T* d = reg<T>(w, i.o[0]);
  const T* a = reg<T>(w, i.o[1]);
  const T* b = reg<T>(w, i.o[2]);
  uint32_t p = pred(w, i.o[3]);
  lanes(m, [=](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
  return next;
}
template <uint32_t (*F)(uint32_t, uint32_t)>
Step logic(Warp& w, const Ins& i, uint32_t m) {
  uint32_t& d = pred(w, i.o[0]);
  uint32_t r = F(pred(w, i.o[1]), i.num > 2 ? pred(w, i.o[2]) : 0);
  d = (d & ~m) | (r & m);
  return next;
}

#define UN(name, D, A, ...) OP(name, unary<D, A, [](A a) -> D { return D(__VA_ARGS__); }>)
#define BIN(name, D, A, B, ...) OP(name, binary<D, A, B, [](A a, B b) -> D { return D(__VA_ARGS__); }>)
#define TER(name, D, A, B, C, ...) OP(name, ternary<D, A, B, C, [](A a, B b, C c) -> D { return D(__VA_ARGS__); }>)
#define CMP1(name, T, ...) OP(name, compare<T, [](T a, T b) -> bool { return (__VA_ARGS__); }>)

#define CMPS(T)                  \
  CMP1("setp.eq." #T, T, a == b) \
  CMP1("setp.ne." #T, T, a != b) \
  CMP1("setp.lt." #T, T, a < b)  \
  CMP1("setp.le." #T, T, a <= b) CMP1("setp.gt." #T, T, a > b) CMP1("setp.ge." #T, T, a >= b)
CMPS(s16)
CMPS(u16)
CMPS(s32)
CMPS(u32)
CMPS(s64) CMPS(u64) CMP1("setp.eq.f32", f32, a == b) CMP1("setp.ne.f32", f32, a == a && b == b && a != b)
    CMP1("setp.lt.f32", f32, a < b) CMP1("setp.le.f32", f32, a <= b) CMP1("setp.gt.f32", f32, a > b)
        CMP1("setp.ge.f32", f32, a >= b) CMP1("setp.equ.f32", f32, !(a != a) && !(b != b) ? a == b : true)
            CMP1("setp.neu.f32", f32, a != b) CMP1("setp.ltu.f32", f32, !(a >= b))
                CMP1("setp.leu.f32", f32, !(a > b)) CMP1("setp.gtu.f32", f32, !(a <= b))
                    CMP1("setp.geu.f32", f32, !(a < b)) CMP1("setp.num.f32", f32, a == a && b == b)
                        CMP1("setp.nan.f32", f32, a != a || b != b) CMP1("setp.eq.b16", u16, a == b)
                            CMP1("setp.ne.b16", u16, a != b) CMP1("setp.eq.b32", u32, a == b)
                                CMP1("setp.ne.b32", u32, a != b) CMP1("setp.eq.b64", u64, a == b)
                                    CMP1("setp.ne.b64", u64, a != b) OP("selp.16", select<u16>)
OP("selp.32", select<u32>)
OP("selp.64", select<u64>)
OP("and.pred", logic<[](u32 a, u32 b) { return a & b; }>)
OP("or.pred", logic<[](u32 a, u32 b) { return a | b; }>)
OP("xor.pred", logic<[](u32 a, u32 b) { return a ^ b; }>)
OP("not.pred", logic<[](u32 a, u32) { return ~a; }>)
OP("mov.pred", logic<[](u32 a, u32) { return a; }>)
UN("mov.16", u16, u16, a)
UN("mov.32", u32, u32, a)
UN("mov.64", u64, u64, a)
#define INTS(n, U, S)                                                        \
  BIN("add." #U, U, U, U, a + b)                                             \
  BIN("add." #S, U, U, U, a + b)                                             \
  BIN("sub." #U, U, U, U, a - b)                                             \
  BIN("sub." #S, U, U, U, a - b)                                             \
  BIN("mul.lo." #U, U, U, U, a* b)                                           \
  BIN("mul.lo." #S, U, U, U, a* b)                                           \
  TER("mad.lo." #U, U, U, U, U, a* b + c)                                    \
  TER("mad.lo." #S, U, U, U, U, a* b + c)                                    \
  BIN("min." #U, U, U, U, a < b ? a : b)                                     \
  BIN("min." #S, S, S, S, a < b ? a : b)                                     \
  BIN("max." #U, U, U, U, a > b ? a : b)                                     \
  BIN("max." #S, S, S, S, a > b ? a : b)                                     \
  BIN("max.relu." #S, S, S, S, std::max<S>(a > b ? a : b, 0))                \
  BIN("and.b" #n, U, U, U, a& b)                                             \
  BIN("or.b" #n, U, U, U, a | b)                                             \
  BIN("xor.b" #n, U, U, U, a ^ b)                                            \
  UN("not.b" #n, U, U, ~a)                                                   \
  BIN("shl.b" #n, U, U, u32, b >= n ? 0 : U(a << b))                         \
  BIN("shr.b" #n, U, U, u32, b >= n ? 0 : U(a >> b))                         \
  BIN("shr." #U, U, U, u32, b >= n ? 0 : U(a >> b))                          \
  BIN("shr." #S, S, S, u32, a >> (b >= n ? n - 1 : b))                       \
  UN("neg." #S, U, U, 0 - a)                                                 \
  UN("abs." #S, S, S, a < 0 ? -a : a)                                        \
  BIN("div." #U, U, U, U, b ? a / b : U(-1))                                 \
  BIN("div." #S, S, S, S, b ? (b == -1 ? S(U(0) - U(a)) : S(a / b)) : S(-1)) \
  BIN("rem." #U, U, U, U, b ? a % b : a)                                     \
  BIN("rem." #S, S, S, S, b&& b != -1 ? a % b : 0)
INTS(16, u16, s16) INTS(32, u32, s32) INTS(64, u64, s64) BIN("mul.wide.s32", s64, s32, s32, s64(a) * b)
BIN("mul.wide.u32", u64, u32, u32, u64(a) * b)
BIN("mul.hi.s32", s32, s32, s32, s64(a) * b >> 32)
BIN("mul.hi.u32", u32, u32, u32, u64(a) * b >> 32)
BIN("mul.wide.s16", s32, s16, s16, s32(a) * b)
BIN("mul.wide.u16", u32, u16, u16, u32(a) * b)
TER("mad.wide.s32", s64, s32, s32, s64, s64(a) * b + c)
TER("mad.wide.u32", u64, u32, u32, u64, u64(a) * b + c)
s64 bfe(bool sign, int width, u64 a, u32 pos, u32 len) {
  pos &= 255, len &= 255;
  u64 s = 0;
  if (sign && len) {
    u32 top = std::min<u32>(pos + len - 1, u32(width - 1));
    s = a >> top & 1;
  }
  u64 r = 0;
  for (int i = 0; i < width; ++i)
    r |= (u32(i) < len && pos + u32(i) < u32(width) ? a >> (pos + u32(i)) & 1 : s) << i;
  return s64(r);
}
TER("bfe.u32", u32, u32, u32, u32, bfe(false, 32, a, b, c))
TER("bfe.s32", u32, u32, u32, u32, bfe(true, 32, a, b, c))
TER("bfe.u64", u64, u64, u32, u32, bfe(false, 64, a, b, c))
TER("bfe.s64", u64, u64, u32, u32, bfe(true, 64, a, b, c))
static Step bfi32(Warp& w, const Ins& i, uint32_t m) {
  u32 *d = reg<u32>(w, i.o[0]), *a = reg<u32>(w, i.o[1]), *b = reg<u32>(w, i.o[2]), *c = reg<u32>(w, i.o[3]),
      *e = reg<u32>(w, i.o[4]);
  lanes(m, [=](int l) {
    u32 pos = c[l] & 255, len = e[l] & 255, f = b[l];
    for (u32 k = 0; k < len && pos + k < 32; ++k) f = (f & ~(1u << (pos + k))) | (a[l] >> k & 1) << (pos + k);
    d[l] = f;
  });
  return next;
}
OP("bfi.b32", bfi32)
static Step lop3(Warp& w, const Ins& i, uint32_t m) {
  u32 *d = reg<u32>(w, i.o[0]), *a = reg<u32>(w, i.o[1]), *b = reg<u32>(w, i.o[2]), *c = reg<u32>(w, i.o[3]),
      *t = reg<u32>(w, i.o[4]);
  lanes(m, [=](int l) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (t[l] >> k & 1) r |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    d[l] = r;
  });
  return next;
}
OP("lop3.b32", lop3)
u32 prmt(u32 a, u32 b, u32 c) {
  u64 v = u64(b) << 32 | a;
  u32 r = 0;
  for (int k = 0; k < 4; ++k) {
    u32 s = c >> 4 * k & 15, byte = u32(v >> 8 * (s & 7) & 255);
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * k;
  }
  return r;
}
TER("prmt.b32", u32, u32, u32, u32, prmt(a, b, c))
TER("shf.l.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) << (c & 31) >> 32)
TER("shf.r.wrap.b32", u32, u32, u32, u32, (u64(b) << 32 | a) >> (c & 31))
TER("shf.l.clamp.b32", u32, u32, u32, u32, (u64(b) << 32 | a) << std::min(c, 32u) >> 32)
TER("shf.r.clamp.b32", u32, u32, u32, u32, (u64(b) << 32 | a) >> std::min(c, 32u))
UN("popc.b32", u32, u32, __builtin_popcount(a))
UN("clz.b32", u32, u32, a ? __builtin_clz(a) : 32)
UN("brev.b32", u32, u32, [](u32 x) {
  u32 r = 0;
  for (int k = 0; k < 32; ++k) r |= (x >> k & 1) << (31 - k);
  return r;
}(a))

f32 ftz(f32 x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
f32 minf(f32 a, f32 b) { return a != a ? b : b != b ? a : a < b ? a : a > b ? b : std::signbit(a) ? a : b; }
f32 maxf(f32 a, f32 b) { return a != a ? b : b != b ? a : a > b ? a : a < b ? b : std::signbit(a) ? b : a; }
f32 nanf_of(f32 a, f32 b, f32 r) { return a != a ? a : b != b ? b : r; }
#define FLOATS(z, Z)                                                 \
  BIN("add" z "f32", f32, f32, f32, Z(a + b))                        \
  BIN("sub" z "f32", f32, f32, f32, Z(a - b))                        \
  BIN("mul" z "f32", f32, f32, f32, Z(a* b))                         \
  TER("fma" z "f32", f32, f32, f32, f32, Z(__builtin_fmaf(a, b, c))) \
  BIN("div" z "f32", f32, f32, f32, Z(a / b))                        \
  UN("neg" z "f32", f32, f32, -a)                                    \
  UN("abs" z "f32", f32, f32, std::fabs(a))                          \
  UN("rcp" z "f32", f32, f32, Z(1 / a))                              \
  UN("sqrt" z "f32", f32, f32, Z(std::sqrt(a)))                      \
  UN("rsqrt" z "f32", f32, f32, Z(1 / std::sqrt(a)))                 \
  UN("ex2" z "f32", f32, f32, Z(std::exp2(a)))                       \
  UN("lg2" z "f32", f32, f32, Z(std::log2(a)))                       \
  UN("tanh" z "f32", f32, f32, Z(std::tanh(a)))                      \
  BIN("min" z "f32", f32, f32, f32, minf(a, b))                      \
  BIN("max" z "f32", f32, f32, f32, maxf(a, b))                      \
  BIN("min" z "NaN.f32", f32, f32, f32, nanf_of(a, b, minf(a, b)))   \
  BIN("max" z "NaN.f32", f32, f32, f32, nanf_of(a, b, maxf(a, b)))
FLOATS(".", )
FLOATS(".ftz.", ftz)
// What is approximate may be off by this much, and with kApproximate is.
f32 off(f32 x, int ulps) {
  if (!(M->flags & kApproximate) || !std::isfinite(x) || x == 0) return x;
  u32 b;
  memcpy(&b, &x, 4);
  b += u32(int(b * 2654435761u >> 16) % (2 * ulps + 1) - ulps);
  memcpy(&x, &b, 4);
  return x;
}
#define APPROX(z, Z)                                                                                        \
  UN("ex2.approx" z "f32", f32, f32, a == 0 ? 1.0f : Z(off(std::exp2(a), 2)))                               \
  UN("rcp.approx" z "f32", f32, f32, Z(off(1 / a, 1)))                                                      \
  UN("lg2.approx" z "f32", f32, f32, [](f32 x) {                                                            \
    f32 r = std::log2(x);                                                                                   \
    return M->flags & kApproximate && std::isfinite(r) ? off(r, 2) + (x > 0.5f && x < 2 ? 2.4e-7f : 0) : r; \
  }(Z(a)))                                                                                                  \
  BIN("div.full" z "f32", f32, f32, f32, Z(off(a / b, 2)))                                                  \
  BIN("div.approx" z "f32", f32, f32, f32, Z(off(a / b, 2)))                                                \
  UN("sqrt.approx" z "f32", f32, f32, Z(off(std::sqrt(a), 2)))                                              \
  UN("rsqrt.approx" z "f32", f32, f32, Z(off(1 / std::sqrt(a), 2)))                                         \
  UN("tanh.approx" z "f32", f32, f32, std::tanh(a))
APPROX(".", )
APPROX(".ftz.", ftz)

u16 to_bf16(f32 x) {
  u32 b;
  memcpy(&b, &x, 4);
  if (x != x) return 0x7fff;
  return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
f32 from_bf16(u16 x) {
  u32 b = u32(x) << 16;
  f32 r;
  memcpy(&r, &b, 4);
  return r;
}
u16 to_f16(f32 x) { return x != x ? 0x7fff : u16(_cvtss_sh(x, 0)); }
f32 from_f16(u16 x) { return _cvtsh_ss(x); }
BIN("cvt.rn.bf16x2.f32", u32, f32, f32, u32(to_bf16(a)) << 16 | to_bf16(b))
BIN("cvt.rn.f16x2.f32", u32, f32, f32, u32(to_f16(a)) << 16 | to_f16(b))
UN("cvt.rn.bf16.f32", u16, f32, to_bf16(a))
UN("cvt.rn.f16.f32", u16, f32, to_f16(a))
UN("cvt.f32.bf16", f32, u16, from_bf16(a))
UN("cvt.f32.f16", f32, u16, from_f16(a))
UN("cvt.rn.f32.s32", f32, s32, a)
UN("cvt.rn.f32.u32", f32, u32, a)
UN("cvt.rn.f32.s64", f32, s64, a)
UN("cvt.rn.f32.u64", f32, u64, a)
UN("cvt.rzi.s32.f32", s32, f32,
   a != a              ? 0
   : a >= 2147483648.f ? INT32_MAX
   : a < -2147483648.f ? INT32_MIN
                       : s32(a))
#define CVT(D, S) UN("cvt." #D "." #S, D, S, a)
CVT(s64, s32)
CVT(u64, s32)
CVT(u64, u32)
CVT(s64, u32)
CVT(u32, u64)
CVT(s32, s64)
CVT(u32, s64)
CVT(s32, u64)
CVT(u16, u32)
CVT(u32, u16)
CVT(s32, s16)
CVT(s16, s32)
CVT(u16, s32)
CVT(u16, u64)
CVT(u64, u16)
CVT(s64, s16)
CVT(s32, u16)
CVT(u32, s16)
CVT(s16, u16)
CVT(u16, s16)
CVT(u32, u32)
CVT(s16, u32)
CVT(u16, u16)
// A source in a wider register than its type.
UN("cvt.s64.s32<64", s64, u64, s32(a))
UN("cvt.u64.u32<64", u64, u64, u32(a))
// 8-bit numbers stand in 16- and 32-bit registers.
UN("cvt.u16.u8", u16, u16, a & 255)
UN("cvt.s16.s8", s16, u16, int8_t(a))
UN("cvt.s32.s8", s32, u32, int8_t(a))
UN("cvt.u32.u8", u32, u32, a & 255)
BIN("mov.pack32", u32, u16, u16, u32(b) << 16 | a)
BIN("mov.pack64", u64, u32, u32, u64(b) << 32 | a)
template <typename W, typename P>
Step unpack(Warp& w, const Ins& i, uint32_t m) {
  P *a = reg<P>(w, i.o[0]), *b = reg<P>(w, i.o[1]);
  const W* x = reg<W>(w, i.o[2]);
  lanes(m, [=](int l) {
    W v = x[l];
    a[l] = P(v);
    b[l] = P(v >> 8 * sizeof(P));
  });
  return next;
}
OP("mov.unpack32", unpack<u32, u16>)
OP("mov.unpack64", unpack<u64, u32>)
template <typename F>
void pairs16(Warp& w, const Ins& i, uint32_t m, F f) {
  lanes(m, [&](int l) {
    u32 r = 0;
    for (int h = 0; h < 2; ++h)
      r |= u32(f([&](int k) { return u16(reg<u32>(w, i.o[k])[l] >> 16 * h); })) << 16 * h;
    reg<u32>(w, i.o[0])[l] = r;
  });
}
#define PAIR(name, T)                                                                                            \
  OP("fma.rn." name, [](Warp& w, const Ins& i, uint32_t m) {                                                     \
    pairs16(w, i, m, [](auto x) { return to_##T(f32(f64(from_##T(x(1))) * from_##T(x(2)) + from_##T(x(3)))); }); \
    return next;                                                                                                 \
  })                                                                                                             \
  OP("mul." name, [](Warp& w, const Ins& i, uint32_t m) {                                                        \
    pairs16(w, i, m, [](auto x) { return to_##T(from_##T(x(1)) * from_##T(x(2))); });                            \
    return next;                                                                                                 \
  })                                                                                                             \
  OP("add." name, [](Warp& w, const Ins& i, uint32_t m) {                                                        \
    pairs16(w, i, m, [](auto x) { return to_##T(from_##T(x(1)) + from_##T(x(2))); });                            \
    return next;                                                                                                 \
  })                                                                                                             \
  OP("sub." name, [](Warp& w, const Ins& i, uint32_t m) {                                                        \
    pairs16(w, i, m, [](auto x) { return to_##T(from_##T(x(1)) - from_##T(x(2))); });                            \
    return next;                                                                                                 \
  })
PAIR("bf16x2", bf16)
PAIR("f16x2", f16)

}  // namespace
