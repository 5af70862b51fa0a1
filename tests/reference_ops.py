"""The operators of moetrain.ops as loops over routes, to be checked by eye. All in float64."""

import torch
from torch import Tensor
from torch.nn.functional import silu


def route(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T, E) bool -> tokens (R,), counts (E,), row_offsets (T + 1,), positions (R,)."""
    mask = mask.tolist() if mask.shape[0] else []
    num_experts = len(mask[0]) if mask else 0
    tokens, counts, place = [], [0] * num_experts, {}
    for expert in range(num_experts):
        for token in range(len(mask)):
            if mask[token][expert]:
                place[token, expert] = len(tokens)
                tokens.append(token)
                counts[expert] += 1
    row_offsets, positions = [0], []
    for token in range(len(mask)):
        for expert in range(num_experts):
            if mask[token][expert]:
                positions.append(place[token, expert])
        row_offsets.append(len(positions))
    return tuple(torch.tensor(v, dtype=torch.int32) for v in (tokens, counts, row_offsets, positions))


def permute(x: Tensor, tokens: Tensor) -> Tensor:
    """(T, D) -> (R, D)."""
    out = torch.zeros(len(tokens), x.shape[1], dtype=torch.float64)
    for r, token in enumerate(tokens.tolist()):
        out[r] = x[token]
    return out


def combine(rows: Tensor, tokens: Tensor, num_tokens: int, weights: Tensor | None) -> Tensor:
    """(R, D) -> (T, D)."""
    out = torch.zeros(num_tokens, rows.shape[1], dtype=torch.float64)
    for r, token in enumerate(tokens.tolist()):
        weight = 1.0 if weights is None else weights[r].item()
        out[token] += weight * rows[r].double()
    return out


def combine_backward(
    grad: Tensor, tokens: Tensor, rows: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> grad_rows (R, D), grad_weights (R,)."""
    grad_rows = torch.zeros(rows.shape, dtype=torch.float64)
    grad_weights = torch.zeros(len(tokens), dtype=torch.float64)
    for r, token in enumerate(tokens.tolist()):
        weight = 1.0 if weights is None else weights[r].item()
        grad_rows[r] = weight * grad[token].double()
        grad_weights[r] = (grad[token].double() * rows[r].double()).sum()
    return grad_rows, grad_weights


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """(R, 2 F) -> (R, F)."""
    half = gate_up.shape[1] // 2
    out = torch.zeros(len(gate_up), half, dtype=torch.float64)
    for r, row in enumerate(gate_up.double()):
        weight = 1.0 if weights is None else weights[r].item()
        out[r] = weight * silu(row[:half]) * row[half:]
    return out


def swiglu_dot(grad: Tensor, gate_up: Tensor) -> Tensor:
    """(R, F), (R, 2 F) -> (R,)."""
    return (grad.double() * swiglu(gate_up, None)).sum(1)


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> grad_gate_up (R, 2 F), grad_weights (R,), activation (R, F). silu' by the quotient rule."""
    half = gate_up.shape[1] // 2
    grad_gate_up = torch.zeros(gate_up.shape, dtype=torch.float64)
    for r, row in enumerate(gate_up.double()):
        gate, up = row[:half], row[half:]
        upstream = grad[r].double() * (1.0 if weights is None else weights[r].item())
        e = torch.exp(-gate)
        grad_gate_up[r, :half] = upstream * up * (1 + e + gate * e) / (1 + e) ** 2
        grad_gate_up[r, half:] = upstream * silu(gate)
    return grad_gate_up, swiglu_dot(grad, gate_up), swiglu(gate_up, weights)


def experts(rows: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, tokens: Tensor, counts: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Route by route, with the derivatives written out. -> out, pre, and grad_ of rows, gate_up, down, weights."""
    rows, gate_up, down, weights, grad = (t.double() for t in (rows, gate_up, down, weights, grad))
    half = down.shape[2]
    found = {"out": torch.zeros_like(rows), "pre": torch.zeros(len(tokens), 2 * half, dtype=torch.float64)}
    found |= {f"grad_{n}": torch.zeros_like(t) for n, t in (("rows", rows), ("gate_up", gate_up), ("down", down), ("weights", weights))}
    expert_of = [e for e, count in enumerate(counts.tolist()) for _ in range(count)]
    for r, (token, e) in enumerate(zip(tokens.tolist(), expert_of)):
        pre = gate_up[e] @ rows[token]
        activation = silu(pre[:half]) * pre[half:]
        output = down[e] @ activation
        found["pre"][r] = pre
        found["out"][token] += weights[r] * output
        found["grad_weights"][r] = grad[token] @ output
        found["grad_down"][e] += weights[r] * torch.outer(grad[token], activation)
        upstream = weights[r] * (down[e].T @ grad[token])
        grad_pre, _, _ = swiglu_backward(upstream[None], pre[None], None)
        found["grad_gate_up"][e] += torch.outer(grad_pre[0], rows[token])
        found["grad_rows"][token] += gate_up[e].T @ grad_pre[0]
    return found
