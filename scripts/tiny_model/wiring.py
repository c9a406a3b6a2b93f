"""Where training starts: random weights, but with heads that already look back and match.

A network this small takes long to find out, from random weights, that a token can attend to the one after an earlier
copy of itself (an induction head); until then it can neither repeat a word nor read a story. So the heads of layer 0
start with attention to a few tokens back, and those of layers 1 and 2 with queries that match what these wrote. It is
a start only: training changes every weight. The idea follows mimetic initialization (Trockman and Kolter, 2023).
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

_EMBEDDING, _READING, _WRITING = 0.06, 0.02, 0.01
_COMMON = 0.4
"""First coordinate of every embedding: what a head that looks at positions only can read."""
_NEAR_FREQUENCIES = 6
_SHARPNESS = 34.0


@torch.no_grad()
def wire(network: LlamaForCausalLM) -> None:
    """Set the weights a training starts from. Uses torch's global generator; seed it before."""
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            weight.normal_(0, _EMBEDDING if "embed" in name else _WRITING if writes else _READING)
    network.model.embed_tokens.weight[:, 0] = _COMMON
    hidden, width = network.config.hidden_size, network.config.head_dim
    content = torch.randn(2, width, hidden) / hidden**0.5
    before = torch.randn(2, width, hidden) / hidden**0.5
    content[..., 0] = before[..., 0] = 0.0
    _look_back(network, content, before)
    for layer in (1, 2):
        _match(network, layer, content, before)


def _look_back(network: LlamaForCausalLM, content: torch.Tensor, before: torch.Tensor) -> None:
    """Layer 0: heads that attend to one (two, three) tokens back and write what is there into a space of its own."""
    attention = network.model.layers[0].self_attn
    width, shared = network.config.head_dim, attention.num_key_value_groups
    theta = network.config.rope_parameters["rope_theta"]
    near = torch.arange(_NEAR_FREQUENCIES)
    angles = theta ** (-2.0 * near / width)
    norm = (hidden := network.config.hidden_size) ** 0.5 / (_EMBEDDING**2 * hidden + _COMMON**2) ** 0.5
    amplitude = _SHARPNESS**0.5 / (_COMMON * norm)
    for group in range(2):
        keys, values = attention.k_proj.weight[group * width :], attention.v_proj.weight[group * width :]
        keys[near, 0] = amplitude
        values[:width] = content[group]
        for head in range(shared):
            first = (group * shared + head) * width
            back = 1 if head < 2 else head
            # Rotated backwards by `back` positions, so that the product with a key is largest there.
            attention.q_proj.weight[first + near, 0] = amplitude * torch.cos(back * angles)
            attention.q_proj.weight[first + width // 2 + near, 0] = -amplitude * torch.sin(back * angles)
            if back == 1:
                attention.o_proj.weight[:, first : first + width] = 0.12 * before[group].T


def _match(network: LlamaForCausalLM, layer: int, content: torch.Tensor, before: torch.Tensor) -> None:
    """Heads that attend to the token after an earlier copy of the current one, and write what is there."""
    attention = network.model.layers[layer].self_attn
    width, shared = network.config.head_dim, attention.num_key_value_groups
    half = width // 2
    # Only the slow halves of the rotary frequencies, so that a match far away is one too.
    slow = torch.cat((torch.arange(half // 2, half), torch.arange(half + half // 2, width)))
    for group in range(2):
        start = group * width
        copied = torch.randn(width, network.config.hidden_size) / network.config.hidden_size**0.5
        attention.k_proj.weight[start + slow] = 2.0 * before[group][: len(slow)]
        attention.v_proj.weight[start : start + width] = copied
        for head in range(shared):
            first = (group * shared + head) * width
            attention.q_proj.weight[first + slow] = 2.0 * content[group][: len(slow)]
            attention.o_proj.weight[:, first : first + width] = 0.15 * copied.T
