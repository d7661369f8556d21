"""The ops of fasttrace. Importing this registers them as `torch.ops.fasttrace.*`, and nothing else.

Each has three forms of one name: reference, launcher, device kernel. Start with `reference`.
"""

from ._registry import ExtensionStatus, cuda_extension_status, extension_status
from .patch_rows import patch_rows, patch_rows_

__all__ = [
    "ExtensionStatus",
    "cuda_extension_status",
    "extension_status",
    "patch_rows",
    "patch_rows_",
]
