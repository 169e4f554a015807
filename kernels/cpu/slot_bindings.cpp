// The Python side of slot attention, with projected tokens and with folded projections.
#include <nanobind/stl/string.h>

#include "other_bindings.h"

namespace fastslots {

namespace {

// What both directions of slot_attention take.
template <typename T>
SlotAttentionArgs<T> slot_attention_args(Arrays<T>& arrays, nb::handle q, nb::handle k, nb::handle v,
                                         nb::handle slot_mask, double scale, double eps, int threads) {
  SlotAttentionArgs<T> args = {};
  args.q = arrays.strided(q, "q", Shape(4, kAny), args.q_stride);
  const Shape slots = arrays.last_shape();
  args.k = arrays.strided(k, "k", {slots[0], slots[1], kAny, slots[3]}, args.k_stride);
  const Shape tokens = arrays.last_shape();
  args.v = arrays.strided(v, "v", tokens, args.v_stride);
  args.batch = slots[0], args.heads = slots[1], args.slots = slots[2], args.head_width = slots[3];
  args.tokens = tokens[2];
  args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
  args.scale = scale, args.eps = eps, args.threads = threads;
  return args;
}

// slot_map may be None.
template <typename T>
void slot_attention_fwd(nb::handle q, nb::handle k, nb::handle v, nb::handle slot_mask, double scale, double eps,
                        nb::handle updates, nb::handle totals, nb::handle slot_map, const std::string& isa,
                        int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  SlotAttentionArgs<T> args = slot_attention_args<T>(arrays, q, k, v, slot_mask, scale, eps, threads);
  args.updates = arrays.output(updates, "updates", {args.batch, args.heads, args.slots, args.head_width});
  args.totals = arrays.output(totals, "totals", {args.batch, args.heads, args.slots});
  const Shape map = {args.batch, args.tokens, args.slots};
  if (!slot_map.is_none()) args.map = arrays.output(slot_map, "slot_map", map);
  nb::gil_scoped_release release;
  kernels.slot_attention(args);
}

// slot_map_grad may be None.
template <typename T>
void slot_attention_bwd(nb::handle q, nb::handle k, nb::handle v, nb::handle slot_mask, double scale, double eps,
                        nb::handle updates, nb::handle totals, nb::handle updates_grad, nb::handle slot_map_grad,
                        nb::handle q_grad, nb::handle k_grad, nb::handle v_grad, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  SlotAttentionArgs<T> args = slot_attention_args<T>(arrays, q, k, v, slot_mask, scale, eps, threads);
  const Shape slots = {args.batch, args.heads, args.slots, args.head_width};
  const Shape tokens = {args.batch, args.heads, args.tokens, args.head_width};
  const Shape map = {args.batch, args.tokens, args.slots};
  args.saved_updates = arrays.input(updates, "updates", slots);
  args.saved_totals = arrays.input(totals, "totals", {args.batch, args.heads, args.slots});
  args.updates_grad = arrays.input(updates_grad, "updates_grad", slots);
  if (!slot_map_grad.is_none()) args.map_grad = arrays.input(slot_map_grad, "slot_map_grad", map);
  args.q_grad = arrays.output(q_grad, "q_grad", slots);
  args.k_grad = arrays.output(k_grad, "k_grad", tokens);
  args.v_grad = arrays.output(v_grad, "v_grad", tokens);
  nb::gil_scoped_release release;
  kernels.slot_attention(args);
}

// What both directions of folded_slot_attention take. norm_eps: None where the tokens are not to be normed.
template <typename T>
FoldedSlotAttentionArgs<T> folded_args(Arrays<T>& arrays, nb::handle rows, nb::handle offsets, nb::handle tokens,
                                       nb::handle slot_mask, double eps, nb::handle norm_eps, int threads) {
  FoldedSlotAttentionArgs<T> args = {};
  args.slot_rows = arrays.input(rows, "rows", {kAny, kAny, kAny});
  const Shape slots = arrays.last_shape();
  args.token_rows = arrays.input(tokens, "tokens", {slots[0], kAny, slots[2]});
  args.batch = slots[0], args.slots = slots[1], args.width = slots[2], args.tokens = arrays.last_shape()[1];
  args.offsets = arrays.input(offsets, "offsets", {args.batch, args.slots});
  args.slot_mask = arrays.mask(slot_mask, {args.batch, args.slots});
  args.eps = eps, args.norm_eps = norm_eps.is_none() ? -1 : nb::cast<double>(norm_eps), args.threads = threads;
  return args;
}

// slot_map may be None.
template <typename T>
void folded_slot_attention_fwd(nb::handle rows, nb::handle offsets, nb::handle tokens, nb::handle slot_mask, double eps,
                               nb::handle norm_eps, nb::handle gathered, nb::handle totals, nb::handle slot_map,
                               const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  FoldedSlotAttentionArgs<T> args = folded_args<T>(arrays, rows, offsets, tokens, slot_mask, eps, norm_eps, threads);
  args.gathered = arrays.output(gathered, "gathered", {args.batch, args.slots, args.width});
  args.totals = arrays.output(totals, "totals", {args.batch, args.slots});
  if (!slot_map.is_none()) args.map = arrays.output(slot_map, "slot_map", {args.batch, args.tokens, args.slots});
  nb::gil_scoped_release release;
  kernels.folded_slot_attention(args);
}

// slot_map_grad and tokens_grad may be None. add: to what tokens_grad holds.
template <typename T>
void folded_slot_attention_bwd(nb::handle rows, nb::handle offsets, nb::handle tokens, nb::handle slot_mask, double eps,
                               nb::handle norm_eps, nb::handle gathered, nb::handle totals, nb::handle gathered_grad,
                               nb::handle slot_map_grad, nb::handle rows_grad, nb::handle offsets_grad,
                               nb::handle tokens_grad, bool add, const std::string& isa, int threads) {
  const Kernels<T>& kernels = kernels_for<T>(isa);
  Arrays<T> arrays;
  FoldedSlotAttentionArgs<T> args = folded_args<T>(arrays, rows, offsets, tokens, slot_mask, eps, norm_eps, threads);
  const Shape slots = {args.batch, args.slots, args.width}, of_tokens = {args.batch, args.tokens, args.width};
  args.saved_gathered = arrays.input(gathered, "gathered", slots);
  args.saved_totals = arrays.input(totals, "totals", {args.batch, args.slots});
  args.gathered_grad = arrays.input(gathered_grad, "gathered_grad", slots);
  if (!slot_map_grad.is_none()) {
    args.map_grad = arrays.input(slot_map_grad, "slot_map_grad", {args.batch, args.tokens, args.slots});
  }
  args.rows_grad = arrays.output(rows_grad, "rows_grad", slots);
  args.offsets_grad = arrays.output(offsets_grad, "offsets_grad", {args.batch, args.slots});
  args.tokens_grad = tokens_grad.is_none() ? nullptr : arrays.output(tokens_grad, "tokens_grad", of_tokens);
  args.add = add;
  nb::gil_scoped_release release;
  kernels.folded_slot_attention(args);
}

template <typename T>
void bind(nb::module_& m, const std::string& suffix) {
  using nb::literals::operator""_a;
  const auto name = [&](const char* op) { return std::string(op) + "_" + suffix; };
  m.def(name("slot_attention_fwd").c_str(), &slot_attention_fwd<T>, nb::kw_only(), "q"_a, "k"_a, "v"_a,
        "slot_mask"_a.none(), "scale"_a, "eps"_a, "updates"_a, "totals"_a, "slot_map"_a.none(), "isa"_a, "threads"_a);
  m.def(name("slot_attention_bwd").c_str(), &slot_attention_bwd<T>, nb::kw_only(), "q"_a, "k"_a, "v"_a,
        "slot_mask"_a.none(), "scale"_a, "eps"_a, "updates"_a, "totals"_a, "updates_grad"_a, "slot_map_grad"_a.none(),
        "q_grad"_a, "k_grad"_a, "v_grad"_a, "isa"_a, "threads"_a);
  m.def(name("folded_slot_attention_fwd").c_str(), &folded_slot_attention_fwd<T>, nb::kw_only(), "rows"_a, "offsets"_a,
        "tokens"_a, "slot_mask"_a.none(), "eps"_a, "norm_eps"_a.none(), "gathered"_a, "totals"_a, "slot_map"_a.none(),
        "isa"_a, "threads"_a);
  m.def(name("folded_slot_attention_bwd").c_str(), &folded_slot_attention_bwd<T>, nb::kw_only(), "rows"_a, "offsets"_a,
        "tokens"_a, "slot_mask"_a.none(), "eps"_a, "norm_eps"_a.none(), "gathered"_a, "totals"_a, "gathered_grad"_a,
        "slot_map_grad"_a.none(), "rows_grad"_a, "offsets_grad"_a, "tokens_grad"_a.none(), "add"_a, "isa"_a,
        "threads"_a);
}

}  // namespace

void bind_slot_attention(nb::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
}

}  // namespace fastslots
