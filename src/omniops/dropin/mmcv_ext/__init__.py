"""The functions of mmcv's compiled extension ``mmcv._ext``, one file a subject: same names, same arguments.

As there, the arguments that are called ``output``, ``grad_...`` or so are tensors that the function fills, and nothing
is differentiable: mmcv's autograd functions call forward and backward. Tensors may be of any device that PyTorch has
the operators for, and of any floating dtype; float16 and bfloat16 are computed in float32.
"""

from omniops.dropin.mmcv_ext.bbox import bbox_overlaps
from omniops.dropin.mmcv_ext.carafe import (
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
)
from omniops.dropin.mmcv_ext.deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from omniops.dropin.mmcv_ext.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from omniops.dropin.mmcv_ext.info import get_compiler_version, get_compiling_cuda_version
from omniops.dropin.mmcv_ext.masked_conv import masked_col2im_forward, masked_im2col_forward
from omniops.dropin.mmcv_ext.multi_scale_deform_attn import ms_deform_attn_backward, ms_deform_attn_forward
from omniops.dropin.mmcv_ext.nms import nms, nms_match, softnms
from omniops.dropin.mmcv_ext.psa_mask import psamask_backward, psamask_forward
from omniops.dropin.mmcv_ext.roi import (
    deform_roi_pool_backward,
    deform_roi_pool_forward,
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
)
from omniops.dropin.mmcv_ext.rotated import box_iou_rotated, nms_rotated
from omniops.dropin.mmcv_ext.sync_bn import (
    sync_bn_backward_data,
    sync_bn_backward_param,
    sync_bn_forward_mean,
    sync_bn_forward_output,
    sync_bn_forward_var,
)

__all__ = [
    "bbox_overlaps",
    "box_iou_rotated",
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "nms_match",
    "nms_rotated",
    "psamask_backward",
    "psamask_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softnms",
    "sync_bn_backward_data",
    "sync_bn_backward_param",
    "sync_bn_forward_mean",
    "sync_bn_forward_output",
    "sync_bn_forward_var",
]
