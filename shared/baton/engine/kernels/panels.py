"""Where the kernels that panels.h is for are worth having."""

import torch


def multiplies_pairs() -> bool:
    """Whether this CPU multiplies bfloat16 in pairs, and not in whole tiles, which other libraries do better."""
    return bool(torch.cpu._is_avx512_bf16_supported()) and not torch.cpu._is_amx_tile_supported()
