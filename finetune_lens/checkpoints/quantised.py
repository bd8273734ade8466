"""Quantised tensors: turned back into numbers with their scales, or refused by name; never compared raw."""

from typing import Any

import torch

from finetune_lens.checkpoints.stored import Stored
from finetune_lens.errors import InputError

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# A tensor that only a packed format has → the format's name.
PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors (packed)",
    ".weight.quant_map": "bitsandbytes 4-bit",
    ".weight.absmax": "bitsandbytes 4-bit",
    "_blocks": "MXFP4",
}
SCALES = (".weight_scale_inv", ".weight_scale", ".SCB")
LEFTOVERS = (".input_scale", ".activation_scale", ".weight_format", ".k_scale", ".v_scale")


def dequantised(
    tensors: dict[str, Stored], config: dict[str, Any] | None, source: str
) -> tuple[dict[str, Stored], list[str]]:
    """Replace each (quantised weight, scale) by the weight in float32, read when asked for.

    Read are float8 weights with a scale per tensor, per row or per block (`weight_scale`, `weight_scale_inv`: W = q·s)
    and bitsandbytes int8 (`SCB`: W = q·SCB/127 by row).

    Raises:
        InputError: a packed format (4-bit, GPTQ, AWQ, MXFP4), or integer or float8 weights without a scale.
    """
    for name in tensors:
        for ending, kind in PACKED.items():
            if name.endswith(ending):
                raise InputError(
                    f"{source}: {name} is quantised ({kind}) and is not read; dequantise the model "
                    "(in transformers: model.dequantize()) and save it, or compare the original weights"
                )
    scale_of = {
        name.removesuffix(ending) + ".weight": name for name in tensors for ending in SCALES if name.endswith(ending)
    }
    block = ((config or {}).get("quantization_config") or {}).get("weight_block_size")
    plain: dict[str, Stored] = {}
    count = 0
    for name, stored in tensors.items():
        if name in scale_of.values() or name.endswith(LEFTOVERS):
            continue
        if name in scale_of and stored.dtype in (*FLOAT8, torch.int8):
            plain[name] = _scaled(stored, tensors[scale_of[name]], scale_of[name], block, source)
            count += 1
        elif stored.dtype in FLOAT8 or (not stored.dtype.is_floating_point and name.endswith(".weight")):
            raise InputError(
                f"{source}: {name} is stored as {str(stored.dtype).removeprefix('torch.')} without a scale that is "
                "known here; dequantise the model and save it, or compare the original weights"
            )
        else:
            plain[name] = stored
    return plain, [f"{count} quantised matrices turned back into float32 with their scales"] if count else []


def _scaled(weight: Stored, scale: Stored, scale_name: str, block: list[int] | None, source: str) -> Stored:
    rows, columns = weight.shape
    if scale_name.endswith(".SCB"):
        if scale.shape != (rows,):
            raise InputError(f"{source}: {scale_name} has shape {scale.shape}, expected ({rows},)")
        return Stored(
            weight.shape, torch.float32, lambda: weight.read().float() * (scale.read().float() / 127)[:, None]
        )
    shape = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1, 1)[:2]
    if shape in ((1, 1), (rows, 1)):
        tall, wide = (rows, columns) if shape == (1, 1) else (1, columns)
    elif block is None:  # a grid does not say where its tiles end: 200 rows in 2 tiles are 100 + 100 or 128 + 72
        raise InputError(
            f"{source}: {scale_name} is a grid of scales and config.json gives no quantization_config.weight_block_size"
        )
    else:
        tall, wide = block
    if (-(-rows // tall), -(-columns // wide)) != tuple(shape):
        raise InputError(f"{source}: {scale_name} has shape {scale.shape}, which does not tile {weight.shape}")

    def read() -> torch.Tensor:
        grid = scale.read().float().reshape(shape)
        full = grid.repeat_interleave(tall, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        return weight.read().float() * full

    return Stored(weight.shape, torch.float32, read)
