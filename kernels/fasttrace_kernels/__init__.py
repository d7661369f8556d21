"""The ops of fasttrace. Importing this registers them as `torch.ops.fasttrace.*`, and nothing else.

Each has three forms of one name: reference, launcher, device kernel. Start with `reference`.
"""

from ._registry import ExtensionStatus, cuda_extension_status, extension_status
from ._triton import available as triton_available
from .guided_step import guided_step_
from .patch_attention import patch_attention, patch_attention_maps
from .patch_rows import patch_rows, patch_rows_

__all__ = [
    "ExtensionStatus",
    "cuda_extension_status",
    "extension_status",
    "guided_step_",
    "patch_attention",
    "patch_attention_maps",
    "patch_rows",
    "patch_rows_",
    "triton_available",
]
