"""Is a result right? As the tests' oracle asks: against float64, by twice PyTorch's own error.

Largest error: at most twice the reference's in the same dtype on the same device, and as many
roundings as a sum of `terms` numbers may gather. Root mean square: at most twice the reference's,
four roundings of the result and those of a sum in float32; this one is blind to a single wrong
element and far stricter with all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import JVP_BACKWARD, Case, Operands
from bench.providers import REFERENCE, Provider, Results, step

__all__ = ["Truth", "Verdict"]


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a result, or how near it is.

    Attributes:
        wrong: Empty, or what is wrong.
        error: The largest error of all kinds, over its limit.
        errors: For every kind (value, tangent, gradient) the largest error, the reference's, the
            largest true number, and whether all is well.
    """

    wrong: str
    error: float
    errors: dict[str, dict[str, float | bool]]


class Truth:
    """The right results of a case, and how far PyTorch is from them.

    Args:
        case: What is computed.
        given: Rounded operands; all runs start from the same numbers.
        device: Where the exact run takes place; the operands' by default.
        exact: In which it computes.
    """

    def __init__(
        self,
        case: Case,
        given: Operands,
        device: torch.device | None = None,
        exact: torch.dtype = torch.float64,
    ) -> None:
        self.case = case
        self.dtype = given.dots[0].dtype if given.dots else given.bars[0].dtype
        here = given.bars[0].device
        mode = JVP_BACKWARD if JVP_BACKWARD in case.modes else case.modes[0]
        reference = step(Provider(REFERENCE, case.reference), case, mode)
        wide = given.to(exact, device or here)
        self.exact = {kind: _detach(ys) for kind, ys in reference(wide).items()}
        self.theirs = self._errors(reference(given))

    def _errors(self, found: Results) -> dict[str, tuple[float, float]]:
        """(largest, root mean square) error of each kind."""
        errors = {}
        for kind, ys in found.items():
            pairs = [
                (y.detach().to(exact.device, exact.dtype), exact)
                for y, exact in zip(ys, self.exact[kind], strict=True)
                if y.shape == exact.shape and exact.numel()
            ]
            if pairs:
                largest = torch.stack([(y - x).abs().max() for y, x in pairs]).max()  # NaN stays
                squares = sum(float((y - x).square().sum()) for y, x in pairs)
                count = sum(x.numel() for _, x in pairs)
                errors[kind] = (float(largest), (squares / count) ** 0.5)
            else:
                errors[kind] = (0.0, 0.0)
        return errors

    def judge(self, found: Results) -> Verdict:
        """Compare a provider's results with the truth."""
        eps = torch.finfo(self.dtype).eps
        work = min(eps, torch.finfo(torch.float32).eps)  # of the sums
        report, wrong, worst = {}, [], 0.0
        for kind, (largest, mean) in self._errors(found).items():
            exact = [x for x in self.exact[kind] if x.numel()]
            scale = max((float(x.abs().max()) for x in exact), default=0.0)
            squares = sum(float(x.square().sum()) for x in exact)
            size = (squares / max(1, sum(x.numel() for x in exact))) ** 0.5
            their_largest, their_mean = self.theirs[kind]
            limit = 2 * their_largest + (4 + self.case.terms**0.5) * eps * scale
            mean_limit = 2 * their_mean + (4 * eps + self.case.terms**0.5 * work) * size
            same = all(
                y.shape == x.shape and y.dtype == self.dtype
                for y, x in zip(found[kind], self.exact[kind], strict=True)
            )
            ok = same and largest <= limit and mean <= mean_limit
            if not same:
                wrong.append(f"{kind} of another shape or dtype")
            elif not ok:
                wrong.append(
                    f"{kind} off by {largest:.3g} (limit {limit:.3g}), "
                    f"{mean:.3g} on average (limit {mean_limit:.3g})"
                )
            ratios = [e / b for e, b in ((largest, limit), (mean, mean_limit)) if b > 0]
            worst = max([worst, *ratios]) if ok else float("nan")
            report[kind] = {
                "ok": ok,
                "error": largest,
                "reference": their_largest,
                "scale": scale,
                "rms": mean,
                "reference_rms": their_mean,
            }
        return Verdict("; ".join(wrong), worst, report)


def _detach(ys: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(y.detach() for y in ys)
