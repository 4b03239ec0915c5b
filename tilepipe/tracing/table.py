"""Which function records which aten operator, by name without overload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tilepipe.tracing import operators, views
from tilepipe.tracing.call import Call, Result
from tilepipe.tracing.operators import Handler, resize


def _each(names: str, handler: Handler) -> dict[str, Handler]:
    return dict.fromkeys(names.split(), handler)


HANDLERS: Mapping[str, Handler] = {
    **_each("convolution _convolution convolution_overrideable mkldnn_convolution", operators.convolution),
    **_each("avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d mkldnn_max_pool2d", operators.pool),
    **_each("max_pool2d_with_indices max_pool3d_with_indices", operators.pool_with_indices),
    **_each("max_unpool2d", operators.unpool),
    **_each("_adaptive_avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d", operators.adaptive),
    **_each("_adaptive_avg_pool3d adaptive_max_pool3d adaptive_avg_pool1d", operators.adaptive),
    "upsample_nearest2d": resize("nearest"),
    "_upsample_nearest_exact2d": resize("nearest-exact"),
    "upsample_bilinear2d": resize("linear"),
    "_upsample_bilinear2d_aa": resize("linear", antialias=True),
    "upsample_bicubic2d": resize("cubic"),
    "_upsample_bicubic2d_aa": resize("cubic", antialias=True),
    **_each("constant_pad_nd replication_pad1d replication_pad2d replication_pad3d", operators.pad(mirror=False)),
    **_each("reflection_pad1d reflection_pad2d reflection_pad3d", operators.pad(mirror=True)),
    "pixel_shuffle": operators.pixel_shuffle,
    "pixel_unshuffle": operators.pixel_unshuffle,
    "im2col": operators.im2col,
    **_each("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training", operators.batch_norm),
    **_each("cudnn_batch_norm miopen_batch_norm batch_norm_with_update _batch_norm_no_update", operators.batch_norm),
    **_each("native_group_norm", operators.group_norm),
    **_each("native_layer_norm _fused_rms_norm", operators.layer_norm),
    **_each("mean sum amax amin max min argmax argmin prod any all std var var_mean", operators.reduction),
    **_each("_softmax _log_softmax _safe_softmax softmax log_softmax logsumexp", operators.reduction),
    **_each("linalg_vector_norm norm median mode nanmedian aminmax count_nonzero", operators.reduction),
    **_each("mm bmm addmm baddbmm mv", operators.product),
    **_each("_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention", operators.attention),
    **_each("_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention", operators.attention),
    **_each("_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math", operators.attention),
    **_each("clone detach alias _to_copy contiguous lift_fresh lift", views.same),
    **_each("native_dropout", views.same),
    **_each("view_as_real", views.as_real),
    **_each("view_as_complex", views.as_complex),
    **_each("copy_", views.assign),
    **_each("_prelu_kernel where channel_shuffle native_channel_shuffle", views.join),
    **_each("cat concat", views.cat),
    **_each("stack", views.stack),
    **_each("view _unsafe_view reshape _reshape_alias", views.view),
    **_each("permute transpose t", views.permute),
    **_each("unsqueeze", views.unsqueeze),
    **_each("squeeze", views.squeeze),
    **_each("expand", views.expand),
    **_each("slice", views.cut),
    **_each("split split_with_sizes unsafe_split unsafe_split_with_sizes", views.split),
    **_each("select unbind", views.select),
    **_each("index_select gather sort topk cumsum cumprod cummax cummin flip roll glu", views.pick),
    **_each("index _unsafe_index", views.index),
    **_each("unfold", views.unfold),
    **_each("repeat", views.repeat),
}

_ACTIVATIONS = "hardswish hardsigmoid hardshrink relu6 elu selu celu gelu silu mish threshold softplus softshrink"
ELEMENTWISE = frozenset((_ACTIVATIONS + " hardtanh leaky_relu log_sigmoid_forward floor_divide").split())
"""Element-wise operators that torch does not tag as such in every form."""

_ATTENTION = "compares all places with each other (attention)"
MIXING: Mapping[str, str] = {
    **dict.fromkeys(("grid_sampler_2d", "grid_sampler_2d_cpu_fallback"), "samples the map at computed positions"),
    **dict.fromkeys(("_fft_c2c", "_fft_r2c", "_fft_c2r"), "transforms the whole map (Fourier)"),
    **dict.fromkeys(("index_put_", "index_put", "_index_put_impl_", "put_", "index_add", "index_copy"), ""),
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "take"), ""),
    **dict.fromkeys(("slice_scatter", "select_scatter", "as_strided_scatter", "masked_scatter"), ""),
    **dict.fromkeys(("rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_"), "draws random numbers"),
    **dict.fromkeys(("normal", "normal_", "uniform_", "multinomial", "poisson"), "draws random numbers"),
    **dict.fromkeys(("rot90", "_cdist_forward", "_euclidean_dist", "dot", "linalg_eigh", "linalg_inv_ex"), ""),
    **dict.fromkeys(("index_fill", "index_fill_", "index_reduce", "kthvalue", "logcumsumexp", "renorm"), ""),
    **dict.fromkeys(("_transformer_encoder_layer_fwd", "_native_multi_head_attention"), _ATTENTION),
    **dict.fromkeys(("_linalg_svd", "tril", "triu", "diagonal", "_linalg_det", "linalg_qr"), ""),
}
"""Operators known to combine places without a bound, and what they do; empty: they move pixels by position."""


def mixing(call: Call) -> Sequence[Result]:
    """What an operator of `MIXING` delivers."""
    reason = MIXING[call.name] or "moves or combines pixels by computed positions"
    return [call.mix(reason)] * len(call.outputs)
