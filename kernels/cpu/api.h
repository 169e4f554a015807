// The kernels' arguments, and the table of entry points that each instruction set fills.
//
// Axes: B images, H heads, L pixels, K slots, d head width, D query width, F feed-forward width, C channels,
// M rows, T tokens, S their width, Z numbers of a slot.
// Arrays are row-major and contiguous. A null gradient pointer means "not asked for"; every gradient that is asked for
// is written, not added to. Nothing here knows Python or torch.
#pragma once

#include <cstdint>

namespace fastslots {

constexpr int64_t kMostStride = 4;  // of a convolution
// Largest number of layers of a decoder or an encoder, of linear maps of a head or a query MLP, and of convolutions.
constexpr int64_t kMostMaps = 16;

// Arrays of one decoder layer: P is `const T*` for the inputs and `T*` for their gradients.
// The members have the names of the records in fastslots/records.py.
template <typename P>
struct LayerArrays {
  P G;            // [B, D, H, K] score weights, the query norm's affine part folded in
  P g;            // [B, H, K]
  P U;            // [B, H, K, D]
  P b;            // [D]
  P norm_weight;  // [D] of the feed-forward's norm
  P norm_bias;    // [D]
  P w1;           // [F, D]
  P b1;           // [F]
  P w2;           // [D, F]
  P b2;           // [D]
};

// One linear map of the output head.
template <typename P>
struct LinearArrays {
  P weight;  // [rows, columns]
  P bias;    // [rows]
};

// A decoder's weights, its queries and, through the folded projections, the slots of B images.
template <typename T>
struct DecoderArgs {
  int64_t batch, query_batch, pixels;  // query_batch: B, or 1 where all images share the queries
  int64_t width, heads, slots;
  int64_t layer_count, head_count;
  const int64_t* ff_widths;   // [layer_count]
  const int64_t* head_rows;   // [head_count] rows of each linear map of the head; the last is C

  const T* queries;                       // [query_batch, L, D]; null: the query MLP makes them, for all images
  const T* code;                          // [L, code_width] position codes, without gradient
  int64_t code_width, query_map_count;    // 0 where queries are given
  const int64_t* query_map_rows;          // [query_map_count]; the last is D
  const LinearArrays<const T*>* query_maps;
  const LayerArrays<const T*>* layers;    // [layer_count]
  const T* head_norm_weight;              // [D]
  const T* head_norm_bias;                // [D]
  const LinearArrays<const T*>* head;     // [head_count]
  const uint8_t* slot_mask;               // [B, K], 0 = no such slot; or null

  double eps;
  int threads;
};

template <typename T>
struct DecoderLossArgs : DecoderArgs<T> {
  const T* target;                        // [B, L, C]
  const T* pixel_weight;                  // [B, L] or null

  T* queries_grad;
  const LinearArrays<T*>* query_map_grads;  // null: not asked for
  const LayerArrays<T*>* layer_grads;     // null: forward only
  T* head_norm_weight_grad;
  T* head_norm_bias_grad;
  const LinearArrays<T*>* head_grads;

  double recon_weight, interaction_weight;

  double recon, interaction;              // results, unweighted
};

// What the slot Jacobian needs of a layer besides LayerArrays, I = H·d. Queries are q = to_q(norm_q(x)).
template <typename T>
struct TangentArrays {
  const T* query_weight;       // [I, D]
  const T* query_bias;         // [I]
  const T* query_norm_weight;  // [D]
  const T* query_norm_bias;    // [D]
  const T* out_weight;         // [D, I]
  const T* keys;               // [B, K, Z, I]: scale · ∂k/∂z of each number of a slot
  const T* values;             // [B, K, Z, I]: ∂v/∂z
};

// jacobian[b,k,l] = Σ_c Σ_j |∂x̂[b,c,l]/∂z[b,k,j]|
template <typename T>
struct SlotJacobianArgs : DecoderArgs<T> {
  int64_t slot_width, inner_width;        // Z, I
  const TangentArrays<T>* tangents;       // [layer_count]
  T* jacobian;                            // [B, K, L]
};

// One decoder layer: x [x_batch, L, D] -> y [B, L, D], slot_map [B, L, K]; x_batch is B, or 1 where images share x.
// With ff_width 0 it is the folded cross-attention alone, x already normed: y = A·U + b, no norm, no residual.
template <typename T>
struct LayerArgs {
  int64_t batch, x_batch, pixels, width, heads, slots, ff_width;
  const T* x;
  LayerArrays<const T*> weights;
  const uint8_t* slot_mask;
  T* y;             // results of the forward
  T* slot_map;      // [B, L, K]
  const T* y_grad;  // null: forward
  const T* slot_map_grad;
  T* x_grad;        // [x_batch, L, D]
  LayerArrays<T*> grads;
  double eps;
  int threads;
};

// out [B,H,L,d] and slot_map [B,L,K] = Σ_h softmax_k(scale · q·k).  Strides of q, k, v and out_grad are in elements,
// over (B, H, L or K); the last axis is contiguous. Results are contiguous.
template <typename T>
struct CrossAttentionArgs {
  int64_t batch, heads, pixels, slots, head_width;
  const T *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_grad_stride[3];
  double scale;
  const uint8_t* slot_mask;
  const T* head_weights;   // [H] of the slot map's sum over heads; null: ones
  T* out;
  T* slot_map;
  T *entropy, *lse;        // [B, H, L] of each head's weights and scores; both or neither (null)
  const T* out_grad;       // null: forward
  const T* slot_map_grad;  // [B, L, K]
  const T *entropy_grad, *lse_grad;  // [B, H, L]; both or neither
  T *q_grad, *k_grad, *v_grad;
  T* head_weights_grad;    // [H]; null: not asked for
  int threads;
};

// gathered [B,M,S] = A·tokens with A = softmax over the tokens of rows·tokensᵀ; lse [B,M] the log-sum-exp of the scores.
template <typename T>
struct TokenAttentionArgs {
  int64_t batch, rows, tokens, width;
  const T* query_rows;  // [B, M, S]
  const T* token_rows;  // [B, T, S]
  T* gathered;          // results of the forward
  T* lse;
  const T* gathered_grad;   // null: forward
  const T* saved_gathered;  // what the forward gave
  const T* saved_lse;
  T *rows_grad, *tokens_grad;
  int threads;
};

// updates [B,H,K,d] = Σ_l (A+ε) v_l / Σ_l (A+ε) with A = softmax over the slots of scale·(k·q); map [B,L,K] = Σ_h A.
// Strides of q, k and v are in elements, over (B, H, K or L), and may be 0; the last axis is contiguous.
template <typename T>
struct SlotAttentionArgs {
  int64_t batch, heads, slots, tokens, head_width;
  const T *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  double scale, eps;
  const uint8_t* slot_mask;   // [B, K], 0 = no such slot; or null
  T* updates;                 // results of the forward
  T* totals;                  // [B, H, K] Σ_l (A+ε)
  T* map;                     // or null
  const T* updates_grad;      // null: forward
  const T* map_grad;          // or null
  const T *saved_updates, *saved_totals;  // what the forward gave
  T *q_grad, *k_grad, *v_grad;            // contiguous
  int threads;
};

// The same of tokens without projections, normed first where norm_eps >= 0: n = norm(token_rows), A = softmax over the
// slots of n·slot_rows + offsets, gathered [B,K,S] = Σ_l (A+ε) n_l / Σ_l (A+ε). One head.
template <typename T>
struct FoldedSlotAttentionArgs {
  int64_t batch, slots, tokens, width;
  const T* slot_rows;         // [B, K, S]
  const T* offsets;           // [B, K]
  const T* token_rows;        // [B, L, S]
  double eps, norm_eps;
  const uint8_t* slot_mask;   // [B, K], 0 = no such slot; or null
  T* gathered;                // results of the forward
  T* totals;                  // [B, K] Σ_l (A+ε)
  T* map;                     // [B, L, K] or null
  const T* gathered_grad;     // null: forward
  const T* map_grad;          // or null
  const T *saved_gathered, *saved_totals;  // what the forward gave
  T *rows_grad, *offsets_grad;
  T* tokens_grad;             // [B, L, S] or null
  bool add;                   // whether tokens_grad holds a gradient already, which this one is added to
  int threads;
};

// Images to what the posterior needs of each slot: CNN (or features as they are), tokens, Transformer, output layer.
// With `picks`, the first query k is queries[k] + W·token[pick], W the seed weight [S, S].
// The order of `weights` is that of `encoder_tensors` in fastslots/ops/encoder.py.
template <typename T>
struct EncoderArgs {
  int64_t batch, channels, side;               // of the images [B, channels, side, side]
  int64_t query_batch, slots, width, heads;    // queries [query_batch, K, S], query_batch B or 1
  int64_t conv_count;                          // 0: the images are features, whose pixels are the tokens
  const int64_t *conv_rows, *conv_kernels, *conv_strides;  // [conv_count]; the last has S rows
  int64_t token_hidden, layer_count, outputs;  // outputs: rows of the output layer, 0 without one
  const int64_t* ff_widths;                    // [layer_count]
  const T *images, *queries;
  bool seeded;                                 // whether there are picks and a seed weight
  const int64_t* picks;                        // [B, K] the token that seeds each query
  const T* grid;                               // [T, 4] of the tokens; null for features
  int64_t seed_stride;                         // elements between rows of the seed weight; 0: S
  const T* const* weights;
  T* out;                                      // [B, K, outputs or S]; null: backward
  T* saved;                                    // [B, saved_size] what the forward leaves; null: nothing, it runs again
  const T* out_grad;
  T* queries_grad;
  T* const* grads;                             // one for each weight
  double eps;
  bool winograd;                               // whether convolutions may take that form
  int threads;
};

// How the slots of an image come into a decoder layer; the output's bias is LayerArrays::b. I = H·d.
template <typename P>
struct SlotFoldArrays {
  P norm_q_weight, norm_q_bias;          // [D]
  P norm_slots_weight, norm_slots_bias;  // [slot_width]
  P q_weight, q_bias;                    // [I, D], [I]
  P kv_weight, kv_bias;                  // [2I, slot_width], [2I]
  P out_weight;                          // [D, I]
};

// Loss and gradients of the whole model, each image decoding pixels of its own (train_step.h).
template <typename T>
struct TrainStepArgs {
  EncoderArgs<T> encoder;     // queries: the learned ones, [1, rows, S], as is queries_grad; no picks, out, saved, out_grad
  DecoderLossArgs<T> decoder;  // pixels: P; code [L, E]; no G, g, U, target, pixel_weight, results
  int64_t slot_dim, slot_hidden, slot_width, inner;
  double attention_scale;
  const T* const* slot_mlp;   // weight, bias, weight, bias
  T* const* slot_mlp_grads;
  const SlotFoldArrays<const T*>* folds;  // [layer_count]
  const SlotFoldArrays<T*>* fold_grads;
  bool variational;           // the encoder gives mean | log-scale
  int64_t patch_side;         // seeded queries: patches along a side (P² in all); 0: query k is learned query k
  const T* places;            // [P², 2]
  const int64_t* token_of;    // [P²] the token over each patch
  const int64_t* picks;       // [B, K] the token under each seed, and
  const T* seen;              // [B, K, C + 3] what is seen there; null: both by the kernel's own choice
  const T* noise;             // [B, K, Z], where variational; null: drawn with noise_key
  const int64_t* pixels;      // [B, P] the pixels of each image; null: drawn with pixel_key
  const T* pixel_weight;      // [B, P], of given pixels, or null
  uint64_t noise_key, pixel_key;
  int64_t first_image;        // the place of the first image among those that the keys are for
  const int32_t* quantiles;   // [2^16] of the normal distribution
  int favours;                // 0: all pixels alike, 1: the foreground, 2: edges and the foreground
  double kl_weight;
  double recon, kl, interaction;  // results, unweighted
};

// Muon's update of matrices, in place (fastslots/train/muon.py).
template <typename T>
struct MuonArgs {
  int64_t count;
  const int64_t *rows, *columns;  // [count]
  T* const* params;               // [count] of [rows, columns]
  const T* const* grads;
  T* const* buffers;              // momentum
  double momentum, lr, weight_decay;
  double coefficients[3];         // of the Newton-Schulz polynomial
  int iterations, threads;
  double grad_scale;              // of every gradient
};

// AdamW's update of arrays, in place (Loshchilov and Hutter, 2019; torch.optim.AdamW).
template <typename T>
struct AdamwArgs {
  int64_t count;
  const int64_t* sizes;           // [count]
  T* const* params;
  const T* const* grads;
  T *const *means, *const *squares;
  float* const* steps;            // updates of each so far, counted here
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
};

// A step's whole update: gradients clipped to a norm, Muon's matrices, and AdamW's rest.
template <typename T>
struct UpdateArgs {
  MuonArgs<T> muon;
  AdamwArgs<T> adamw;
  double largest_norm;            // 0: not clipped
  bool update;                    // false: the norm alone
  int threads;
  double norm;                    // result, before clipping; where it is not finite nothing is updated
};

// Entry points of one instruction set and element type.
template <typename T>
struct Kernels {
  void (*decoder_loss)(DecoderLossArgs<T>&);
  void (*slot_jacobian)(const SlotJacobianArgs<T>&);
  void (*layer)(const LayerArgs<T>&);
  void (*cross_attention)(const CrossAttentionArgs<T>&);
  void (*token_attention)(const TokenAttentionArgs<T>&);
  void (*slot_attention)(const SlotAttentionArgs<T>&);
  void (*folded_slot_attention)(const FoldedSlotAttentionArgs<T>&);
  void (*encoder)(const EncoderArgs<T>&);
  int64_t (*encoder_saved_size)(const EncoderArgs<T>&);
  void (*train_step)(TrainStepArgs<T>&);
  void (*muon)(const MuonArgs<T>&);
  void (*update)(UpdateArgs<T>&);
  void (*normal_cdf)(const T* x, T* cdf, T* density, int64_t count);  // Φ and φ, for tests of their error
  void (*exponential)(const T* x, T* out, int64_t count);
};

enum class Isa { portable, avx2, avx512 };

bool isa_supported(Isa isa);
const char* isa_name(Isa isa);

const Kernels<float>& float_kernels(Isa isa);
const Kernels<double>& double_kernels();  // portable only: the one that gradient checks use

}  // namespace fastslots
