"""Optimizers that CUDA graphs can capture: Muon for convolutions, AdamW otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nemo_lfr.modules.conv import channels_last


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Return a view of a convolution's weight as a matrix.

    Args:
        weight: weight [H_out, H_in, K] in channels-last layout.

    Returns:
        A view with shape [H_out, K * H_in].
    """
    return weight.transpose(1, 2).view(weight.shape[0], -1)


class Muon:
    """Muon optimizer (Jordan et al., 2024). Its updates are scaled to the usual RMS of AdamW updates.

    Muon orthogonalizes the momentum of each matrix, and uses the result as the update. `torch.optim.Muon` processes
    one matrix at a time, in 2,000 small products per update, and cannot be captured in a CUDA graph. This class
    processes matrices of the same shape as a batch, and keeps the learning rate in a tensor.

    Args:
        matrices: matrices [H_out, H_in], which are updated in place.
        momentum: factor of the old momentum in each update.
        weight_decay: weight decay per update, relative to the learning rate.
        dtype: dtype in which the momentum is orthogonalized.
    """

    # Coefficients of the Newton-Schulz iteration. After five iterations, the singular values are close to 1; they do
    # not converge to 1.
    COEFFICIENTS = (3.4445, -4.775, 2.0315)
    ITERATIONS = 5

    def __init__(
        self,
        matrices: list[torch.Tensor],
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.groups: dict[tuple[int, ...], list[int]] = {}
        for index, matrix in enumerate(matrices):
            self.groups.setdefault(tuple(matrix.shape), []).append(index)
        self.matrices = matrices
        self.moments = [
            torch.zeros(len(group), *shape, device=matrices[0].device) for shape, group in self.groups.items()
        ]
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype

    @torch.no_grad()
    def step(self, grads: Sequence[torch.Tensor], lr: torch.Tensor) -> None:
        """Update every matrix.

        Args:
            grads: gradient of each matrix.
            lr: learning rate, a scalar tensor.
        """
        torch._foreach_mul_(self.matrices, 1 - lr * self.weight_decay)
        for group, moment in zip(self.groups.values(), self.moments, strict=True):
            grad = torch.stack([grads[index] for index in group])
            moment.lerp_(grad, 1 - self.momentum)
            update = self._orthogonal(grad.lerp_(moment, self.momentum))
            update = update.float() * (-0.2 * max(update.shape[1:]) ** 0.5 * lr)
            torch._foreach_add_([self.matrices[index] for index in group], list(update))

    def _orthogonal(self, matrices: torch.Tensor) -> torch.Tensor:
        tall = matrices.shape[1] > matrices.shape[2]
        matrices = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(self.dtype)
        matrices = matrices.mT if tall else matrices
        a, b, c = self.COEFFICIENTS
        for _ in range(self.ITERATIONS):
            gram = matrices @ matrices.mT
            matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), matrices, beta=a)
        return (matrices.mT if tall else matrices).contiguous()


def adamw(parameters: list[nn.Parameter], lr: torch.Tensor) -> torch.optim.AdamW:
    """Build an AdamW optimizer whose learning rate is a scalar tensor.

    A captured CUDA graph then uses the current value of the tensor.
    """
    return torch.optim.AdamW(
        parameters, lr=lr, betas=(0.8, 0.99), weight_decay=1e-3, fused=True, capturable=lr.is_cuda
    )


def load_adamw(optimizer: torch.optim.AdamW, state: Mapping[str, Any], lr: torch.Tensor) -> None:
    """Load the state of an AdamW optimizer, but keep its learning-rate tensor.

    Args:
        optimizer: optimizer to change in place.
        state: state dict that was saved on any device.
        lr: learning-rate tensor of the optimizer, a scalar.
    """
    optimizer.load_state_dict(dict(state))
    optimizer.param_groups[0]["capturable"] = lr.is_cuda
    optimizer.param_groups[0]["lr"] = lr


class GeneratorOptimizer:
    """Optimizer of a generator: Muon and AdamW, with gradient clipping.

    Muon updates the weights of convolutions that have more than one input channel and more than one output channel.
    AdamW updates the other weights and the biases, with a third of Muon's learning rate. If a gradient is not finite,
    the parameters are not changed.

    Args:
        parameters: parameters of the generator on their final device. The weights of convolutions are changed to
            channels-last layout in place.
        max_norm: maximum norm of the concatenated gradients.
        dtype: dtype in which Muon orthogonalizes.
    """

    ADAM_DIVISOR = 3

    def __init__(
        self, parameters: Sequence[nn.Parameter], max_norm: float = 10.0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.parameters = list(parameters)
        for parameter in self.parameters:
            if parameter.dim() == 3:
                parameter.data = channels_last(parameter.detach())
        device = self.parameters[0].device
        self.max_norm = max_norm
        self.lr, self.adam_lr = torch.zeros((), device=device), torch.zeros((), device=device)
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self._is_matrix = [weight.dim() == 3 and min(weight.shape[:2]) > 1 for weight in self.parameters]
        matrices = [as_matrix(weight.detach()) for weight in self._select(self.parameters, matrices=True)]
        self.muon = Muon(matrices, dtype=dtype)
        self.adam = adamw(self._select(self.parameters, matrices=False), self.adam_lr)

    def _select(self, values: Sequence[Any], matrices: bool) -> list[Any]:
        return [value for value, is_matrix in zip(values, self._is_matrix, strict=True) if is_matrix == matrices]

    def set_rate(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        self.lr.fill_(lr)
        self.adam_lr.fill_(lr / self.ADAM_DIVISOR)

    @torch.no_grad()
    def step(self, grads: Sequence[torch.Tensor]) -> torch.Tensor:
        """Update the parameters.

        Args:
            grads: gradient of each parameter, in any precision.

        Returns:
            The norm of the concatenated gradients before clipping, a scalar tensor.
        """
        memory = [grad.transpose(1, 2).flatten() if grad.dim() == 3 else grad for grad in grads]
        flat = torch.cat(memory).float()
        norm = flat.norm()
        finite = norm.isfinite()
        self.lr.mul_(finite)
        self.adam_lr.mul_(finite)
        flat *= torch.where(finite, (self.max_norm / (norm + 1e-6)).clamp_max(1), 0.0)
        pieces = flat.nan_to_num_().split(self._sizes)
        shaped = [
            piece.view(weight.shape[0], weight.shape[2], -1) if weight.dim() == 3 else piece
            for piece, weight in zip(pieces, self.parameters, strict=True)
        ]
        self.muon.step([piece.flatten(1) for piece in self._select(shaped, matrices=True)], self.lr)
        for weight, piece in zip(
            self._select(self.parameters, matrices=False), self._select(shaped, matrices=False), strict=True
        ):
            weight.grad = piece.transpose(1, 2) if weight.dim() == 3 else piece
        self.adam.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers."""
        return {"moments": self.muon.moments, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state dict that was saved on any device."""
        for moment, saved in zip(self.muon.moments, state["moments"], strict=True):
            moment.copy_(saved)
        load_adamw(self.adam, state["adam"], self.adam_lr)
