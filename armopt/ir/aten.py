"""ATen's operations that a model may call, by name: no file, no process, no state, no decomposition without an end.

It is what torch.export leaves of a model for inference, and what makes the same of the same. Left out are operations
that a number of a file keeps busy for ever or crashes: orthogonal polynomials (a loop of as many turns), quantile,
matrix_rank, matrix_power. A file may also call `BEFORE_CAPTURE`, which capture makes something else of or refuses by
name.
"""

from __future__ import annotations

_POINTWISE = """
abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max
clamp_min clip conj conj_physical copysign cos cosh deg2rad digamma div divide elu celu selu eq equal erf erfc erfinv
exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac gcd ge gelu glu greater greater_equal gt
hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 imag isclose isfinite isin isinf isnan isneginf isposinf
isreal lcm le leaky_relu lerp less less_equal lgamma log log10 log1p log2 log_sigmoid log_sigmoid_forward logaddexp
logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply
nan_to_num ne neg negative not_equal polar positive pow prelu _prelu_kernel rad2deg real reciprocal relu relu6
remainder round rsqrt rsub sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink sqrt square sub subtract
tan tanh threshold true_divide trunc where xlogy complex view_as_complex view_as_real ldexp frexp nextafter __and__
__or__ __xor__ __lshift__ __rshift__ special_bessel_j0 special_bessel_j1 special_digamma special_entr special_erf
special_erfc special_erfcx special_erfinv special_exp2 special_expit special_expm1 special_gammaln special_i0
special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_logit special_ndtr special_ndtri
special_round special_sinc special_xlog1py special_xlogy special_zeta special_airy_ai special_bessel_y0
special_bessel_y1 special_modified_bessel_i0 special_modified_bessel_i1 special_modified_bessel_k0
special_modified_bessel_k1 special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1
special_spherical_bessel_j0 igamma igammac special_gammainc special_gammaincc polygamma special_polygamma
resolve_conj resolve_neg _conj _conj_copy _conj_physical _neg_view _neg_view_copy view_as_complex_copy
view_as_real_copy special_psi special_multigammaln mvlgamma _add_relu
"""
_REDUCTIONS = """
all allclose amax amin aminmax any argmax argmin bincount count_nonzero cummax cummin cumprod cumsum diff dist
frobenius_norm logcumsumexp logsumexp max mean median min mode nanmean nanmedian nansum norm nuclear_norm prod renorm
special_logsumexp std std_mean sum trace var var_mean linalg_norm linalg_vector_norm linalg_matrix_norm
cosine_similarity pairwise_distance cdist _cdist_forward pdist _pdist_forward _euclidean_dist is_nonzero kthvalue
trapezoid trapz cumulative_trapezoid gradient histc _is_all_true _is_any_true
"""
_LOSSES = """
binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy_loss hinge_embedding_loss
huber_loss kl_div l1_loss margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss
multilabel_margin_loss_forward nll_loss nll_loss2d nll_loss_nd nll_loss_forward nll_loss2d_forward poisson_nll_loss
smooth_l1_loss soft_margin_loss triplet_margin_loss
"""
_LAYERS = """
linear bilinear addbmm addmm addmv addr baddbmm bmm mm mv dot vdot ger inner outer kron matmul linalg_matmul
linalg_multi_dot chain_matmul tensordot einsum linalg_vecdot linalg_cross cross _trilinear conv1d conv2d conv3d
conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution _convolution_mode conv_tbc
conv_depthwise3d scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
_scaled_dot_product_attention_math _native_multi_head_attention _transformer_encoder_layer_fwd
_transform_bias_rescale_qkv lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell embedding
embedding_bag _embedding_bag _embedding_bag_forward_only one_hot softmax _softmax _safe_softmax log_softmax
_log_softmax special_softmax special_log_softmax _masked_softmax batch_norm native_batch_norm _native_batch_norm_legit
_native_batch_norm_legit_no_training _batch_norm_no_update _native_batch_norm_legit_functional instance_norm
group_norm native_group_norm layer_norm native_layer_norm rms_norm _fused_rms_norm _weight_norm norm_except_dim
avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d
_adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_unpool2d max_unpool3d
upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d upsample_nearest1d upsample_nearest2d
upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d grid_sampler_3d affine_grid_generator
pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im unfold
fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
_fake_quantize_per_tensor_affine_cachemask_tensor_qparams fake_quantize_per_channel_affine
fake_quantize_per_channel_affine_cachemask
"""
_SHAPES = """
adjoint alias as_strided atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cartesian_prod cat
chunk clone column_stack combinations concat concatenate constant_pad_nd contiguous copy detach diag diag_embed
diagflat diagonal dsplit dstack expand expand_as flatten flip fliplr flipud gather hsplit hstack index index_add
index_copy index_fill index_put _unsafe_index _unsafe_index_put _unsafe_masked_index index_reduce index_select
lift_fresh lift_fresh_copy masked_scatter masked_select meshgrid moveaxis movedim mH mT matrix_H msort argsort
argwhere narrow narrow_copy nonzero nonzero_static nonzero_numpy numpy_T pad _pad_circular _pad_enum pad_sequence
permute ravel reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave replication_pad1d
replication_pad2d replication_pad3d reshape _reshape_alias reshape_as roll rot90 row_stack scatter scatter_add
scatter_reduce searchsorted bucketize select select_scatter diagonal_scatter as_strided_scatter slice slice_scatter
sort split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk squeeze stack _stack sum_to_size
swapaxes swapdims t take take_along_dim tensor_split tile topk transpose tril triu unbind unflatten unique_consecutive
unique_dim _unique _unique2 unsqueeze vander view _unsafe_view view_as vsplit vstack alias_copy detach_copy
diagonal_copy expand_copy permute_copy select_copy slice_copy split_copy split_with_sizes_copy squeeze_copy t_copy
transpose_copy unbind_copy put _chunk_cat unfold_copy unsqueeze_copy view_copy as_strided_copy
"""
_CREATION = """
arange eye fill full full_like linspace logspace new_full new_ones new_zeros ones ones_like scalar_tensor tril_indices
triu_indices zeros zeros_like zero bartlett_window blackman_window hamming_window hann_window kaiser_window to
_to_copy type_as
"""
_TRANSFORMS = """
fft_fft fft_fft2 fft_fftn fft_fftshift fft_fftfreq fft_rfft fft_rfft2 fft_rfftn fft_rfftfreq fft_ifft fft_ifft2
fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn fft_hfft fft_hfft2 fft_hfftn fft_ihfft fft_ihfft2 fft_ihfftn
_fft_c2c _fft_c2r _fft_r2c stft istft linalg_cholesky linalg_cholesky_ex cholesky cholesky_solve linalg_det linalg_inv
linalg_inv_ex inverse linalg_solve linalg_solve_ex _linalg_solve_ex linalg_solve_triangular triangular_solve
linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve linalg_qr linalg_householder_product linalg_slogdet _linalg_det
_linalg_slogdet slogdet det logdet linalg_diagonal linalg_matrix_exp matrix_exp linalg_eig linalg_eigh linalg_eigvals
linalg_eigvalsh _linalg_eigh _linalg_eigvals linalg_svd linalg_svdvals _linalg_svd svd linalg_pinv pinverse qr
cholesky_inverse linalg_lu lu_unpack lu_solve _lu_with_info linalg_ldl_factor linalg_ldl_factor_ex linalg_ldl_solve
linalg_vander linalg_cond linalg_tensorinv linalg_tensorsolve
"""
#: Sizes and numbers of tensors, and checks of them.
_NUMBERS = """
sym_size sym_stride sym_numel sym_storage_offset sym_is_contiguous item _local_scalar_dense _assert_tensor_metadata
_assert_scalar _assert_async _functional_assert_async _functional_assert_scalar sym_constrain_range
sym_constrain_range_for_size _functional_sym_constrain_range _functional_sym_constrain_range_for_size
is_floating_point is_complex size
"""
#: Names of ATen, of which every form is taken that writes to nothing.
ATEN = frozenset(
    " ".join((_POINTWISE, _REDUCTIONS, _LOSSES, _LAYERS, _SHAPES, _CREATION, _TRANSFORMS, _NUMBERS)).split()
)
_BEFORE_CAPTURE = """
dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout rrelu rand rand_like randn randn_like randint
randint_like randperm bernoulli multinomial normal uniform exponential empty empty_like empty_strided empty_permuted
new_empty new_empty_strided
"""
#: What a model calls before it is captured for inference: dropout, and what is random or uninitialised.
BEFORE_CAPTURE = frozenset(_BEFORE_CAPTURE.split())


def in_file(name: str) -> bool:
    """Whether a model's file may call an operation: also its form that writes to its first argument (``relu_``)."""
    return name in ATEN or name in BEFORE_CAPTURE or name.removesuffix("_") in ATEN | BEFORE_CAPTURE
