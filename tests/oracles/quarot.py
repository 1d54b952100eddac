"""QuaRot's weights by the paper's matrices, dense, in float64 numpy: tables of arrays in, tables of arrays out."""

from collections.abc import Mapping

import numpy as np

type Arrays = Mapping[str, np.ndarray]  # path -> array; kernels are [in, out]


def fold_norms(arrays: Arrays, layers: int) -> dict[str, np.ndarray]:
    """Multiply the rows of each reader by its norm's scale; the head is untied first where it is tied."""
    folded = dict(arrays)
    folded.setdefault("lm_head.kernel", arrays["embed_tokens"].T)
    readers = {
        "input_layernorm": ("self_attn.q", "self_attn.k", "self_attn.v"),
        "post_attention_layernorm": ("mlp.gate", "mlp.up"),
    }
    for layer in range(layers):
        for norm, names in readers.items():
            scale = arrays[f"layers.{layer}.{norm}"]
            for name in names:
                folded[f"layers.{layer}.{name}_proj.kernel"] = (
                    np.diag(scale) @ folded[f"layers.{layer}.{name}_proj.kernel"]
                )
            folded[f"layers.{layer}.{norm}"] = np.ones_like(scale)
    folded["lm_head.kernel"] = np.diag(arrays["norm"]) @ folded["lm_head.kernel"]
    return folded | {"norm": np.ones_like(arrays["norm"])}


def rotate(
    arrays: Arrays, layers: int, *, stream: np.ndarray, heads: np.ndarray, head: np.ndarray, inner: np.ndarray
) -> dict[str, np.ndarray]:
    """Apply Q = `stream` (h becomes h Q), M(heads), M(head_dim) and M(inner) to folded weights."""
    groups = arrays["layers.0.self_attn.v_proj.kernel"].shape[1] // len(head)
    values, outputs = np.kron(np.eye(groups), head), np.kron(heads, head)
    rotated = dict(arrays) | {
        "embed_tokens": arrays["embed_tokens"] @ stream,
        "lm_head.kernel": stream.T @ arrays["lm_head.kernel"],
    }
    for layer in range(layers):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        for path in (f"{attention}.q_proj", f"{attention}.k_proj", f"{mlp}.gate_proj", f"{mlp}.up_proj"):
            rotated[f"{path}.kernel"] = stream.T @ arrays[f"{path}.kernel"]
        rotated[f"{attention}.v_proj.kernel"] = stream.T @ arrays[f"{attention}.v_proj.kernel"] @ values.T
        rotated[f"{attention}.o_proj.kernel"] = outputs @ arrays[f"{attention}.o_proj.kernel"] @ stream
        rotated[f"{mlp}.down_proj.kernel"] = inner @ arrays[f"{mlp}.down_proj.kernel"] @ stream
        for path, turn in (
            (f"{attention}.v_proj", values.T),
            (f"{attention}.o_proj", stream),
            (f"{mlp}.down_proj", stream),
        ):
            if f"{path}.bias" in arrays:
                rotated[f"{path}.bias"] = arrays[f"{path}.bias"] @ turn
    return rotated
