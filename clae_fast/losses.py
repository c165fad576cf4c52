"""The losses as modules: the options once, the embeddings at each call."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from . import functional
from . import validation as check
from .backends import requested
from .exchange import MODES
from .process_group import name_of


class ContrastiveLoss(nn.Module):
    """What the modules share. A subclass names its function and its options."""

    function: ClassVar[Callable[..., Tensor]]
    options: ClassVar[tuple[str, ...]] = ("reduction", "normalize", "backend", "group", "exchange")

    def __init__(
        self, reduction: str, normalize: bool, backend: str | None, group: Any, exchange: str
    ) -> None:
        super().__init__()
        check.word("reduction", reduction, check.REDUCTIONS)
        check.flag("normalize", normalize)
        check.word("exchange", exchange, MODES)
        requested(backend)
        name_of(group)
        self.group = group
        self.exchange = exchange
        self.reduction = reduction
        self.normalize = normalize
        self.backend = backend

    def keywords(self, **given: Any) -> dict[str, Any]:
        """The keyword arguments for `function`: the module's own, and those of a call."""
        for name in self.options:
            if name in given:
                kind = type(self).__name__
                raise TypeError(
                    f"{name} belongs to {kind}({name}=...), got {name}={given[name]!r} at a call"
                )
        return {name: getattr(self, name) for name in self.options} | given

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self.keywords().items() if v is not None}
        if self.group is None:
            del shown["exchange"]
        return ", ".join(f"{k}={v!r}" for k, v in shown.items())

    def _set_temperature(self, temperature: float | Tensor) -> None:
        """A Parameter learns, a plain tensor moves with the module, a number is a constant."""
        self.temperature: float | Tensor
        if isinstance(temperature, Tensor):
            check.one_element("temperature", temperature, temperature)
            if not isinstance(temperature, nn.Parameter):
                self.register_buffer("temperature", temperature)
                return
        else:
            check.positive_number("temperature", temperature, check.NUMBER_OR_TENSOR)
        self.temperature = temperature


class NTXentLoss(ContrastiveLoss):
    """`nt_xent_loss` as a module: `NTXentLoss(temperature)(z_i, z_j)`.

    Args:
        temperature: positive number, a one-element tensor, or an nn.Parameter to learn it.
        label_smoothing, reduction, normalize, backend, group, exchange: as in `nt_xent_loss`.
            `sample_weight`, `ids`, `extra_negatives` and `extra_ids` are given at each call.

    Example:
        >>> loss = NTXentLoss(temperature=nn.Parameter(torch.tensor(0.5)))
        >>> loss(torch.randn(4, 8), torch.randn(4, 8)).backward()
        >>> loss.temperature.grad.shape
        torch.Size([])
    """

    function = staticmethod(functional.nt_xent_loss)
    options = ("temperature", "label_smoothing", *ContrastiveLoss.options)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)
        check.share("label_smoothing", label_smoothing)
        self._set_temperature(temperature)
        self.label_smoothing = label_smoothing

    def forward(self, z_i: Tensor, z_j: Tensor, **options: Any) -> Tensor:
        return type(self).function(z_i, z_j, **self.keywords(**options))


class InfoNCELoss(ContrastiveLoss):
    """`info_nce_loss` as a module: `InfoNCELoss(temperature)(query, key[, negative_keys])`.

    Args:
        temperature: positive number, a one-element tensor, or an nn.Parameter to learn it.
        negative_mode, symmetric, label_smoothing, reduction, normalize, backend, group, exchange:
            as in `info_nce_loss`. `sample_weight`, `targets`, `query_ids`, `key_ids`,
            `extra_negatives` and `extra_ids` are given at each call.

    Example:
        >>> InfoNCELoss(0.07)(torch.randn(4, 8), torch.randn(4, 8), torch.randn(32, 8)).shape
        torch.Size([])
    """

    function = staticmethod(functional.info_nce_loss)
    options = (
        "temperature",
        "negative_mode",
        "symmetric",
        "label_smoothing",
        *ContrastiveLoss.options,
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        negative_mode: str = "unpaired",
        symmetric: bool = False,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)
        check.word("negative_mode", negative_mode, functional.NEGATIVE_MODES)
        check.flag("symmetric", symmetric)
        check.share("label_smoothing", label_smoothing)
        self._set_temperature(temperature)
        self.label_smoothing = label_smoothing
        self.negative_mode = negative_mode
        self.symmetric = symmetric

    def forward(
        self,
        query: Tensor,
        positive_key: Tensor,
        negative_keys: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        return type(self).function(query, positive_key, negative_keys, **self.keywords(**options))


class UELLoss(ContrastiveLoss):
    """`uel_loss` as a module: `UELLoss(temperature)(z_i, z_j)`.

    Args:
        temperature: positive number, a one-element tensor, or an nn.Parameter to learn it.
        negative_weight, reduction, normalize, backend, group, exchange: as in `uel_loss`.
            `sample_weight` and `ids` are given at each call.

    Example:
        >>> UELLoss()(torch.randn(4, 8), torch.randn(4, 8)).shape
        torch.Size([])
    """

    function = staticmethod(functional.uel_loss)
    options = ("temperature", "negative_weight", *ContrastiveLoss.options)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        negative_weight: float = 1.0,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)
        check.number("negative_weight", negative_weight, at_least=1)
        self._set_temperature(temperature)
        self.negative_weight = negative_weight

    def forward(self, z_i: Tensor, z_j: Tensor, **options: Any) -> Tensor:
        return type(self).function(z_i, z_j, **self.keywords(**options))


class ClipLoss(ContrastiveLoss):
    """`clip_loss` as a module: `ClipLoss()(image_features, text_features, logit_scale[, bias])`.

    Args:
        label_smoothing, reduction, normalize, backend, group, exchange: as in `clip_loss`.
            `sample_weight`, `targets`, `ids`, `extra_negatives` and `extra_ids` are given at each
            call.

    Example:
        >>> x, y, scale = torch.randn(4, 8), torch.randn(4, 8), torch.tensor(10.0)
        >>> ClipLoss(normalize=True)(x, y, scale).shape
        torch.Size([])
    """

    function = staticmethod(functional.clip_loss)
    options = ("label_smoothing", *ContrastiveLoss.options)

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)
        check.share("label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        return type(self).function(
            image_features, text_features, logit_scale, logit_bias, **self.keywords(**options)
        )


class SigLipLoss(ContrastiveLoss):
    """`siglip_loss` as a module: `SigLipLoss()(image_features, text_features, scale, bias)`.

    Args:
        reduction, normalize, backend, group, exchange: as in `siglip_loss`. `positive_ids` and
            `sample_weight` are given at each call.

    Example:
        >>> x, y, scale, bias = torch.randn(4, 8), torch.randn(4, 8), 10.0, torch.tensor(-10.0)
        >>> SigLipLoss(normalize=True)(x, y, scale, bias).shape
        torch.Size([])
    """

    function = staticmethod(functional.siglip_loss)

    def __init__(
        self,
        *,
        reduction: str = "mean",
        normalize: bool = False,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        **options: Any,
    ) -> Tensor:
        return type(self).function(
            image_features, text_features, logit_scale, logit_bias, **self.keywords(**options)
        )


class SupConLoss(ContrastiveLoss):
    """`sup_con_loss` as a module: `SupConLoss(temperature)(features, labels)`.

    Args:
        temperature: positive number, a one-element tensor, or an nn.Parameter to learn it.
        label_smoothing, reduction, normalize, backend, group, exchange: as in `sup_con_loss`.
            `sample_weight` and `extra_negatives` are given at each call.

    Example:
        >>> SupConLoss()(torch.randn(4, 2, 8), torch.tensor([0, 0, 1, 1])).shape
        torch.Size([])
    """

    function = staticmethod(functional.sup_con_loss)
    options = ("temperature", "label_smoothing", *ContrastiveLoss.options)

    def __init__(
        self,
        temperature: float | Tensor = 0.07,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)
        check.share("label_smoothing", label_smoothing)
        self._set_temperature(temperature)
        self.label_smoothing = label_smoothing

    def forward(self, features: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return type(self).function(features, labels, **self.keywords(**options))


class DCLLoss(ContrastiveLoss):
    """`dcl_loss` as a module: `DCLLoss(temperature)(z_i, z_j)`.

    Args:
        temperature: positive number, a one-element tensor, or an nn.Parameter to learn it.
        weight_fn, reduction, normalize, backend, group, exchange: as in `dcl_loss`.
            `sample_weight`, `ids`, `extra_negatives` and `extra_ids` are given at each call.

    Example:
        >>> dclw = DCLLoss(weight_fn=negative_mises_fisher_weights())
        >>> dclw(torch.randn(4, 8), torch.randn(4, 8)).shape
        torch.Size([])
    """

    function = staticmethod(functional.dcl_loss)
    options = ("temperature", "weight_fn", *ContrastiveLoss.options)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        weight_fn: functional.WeightFn | None = None,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)
        if weight_fn is not None:
            functional.check_weight_fn(weight_fn)
        self._set_temperature(temperature)
        self.weight_fn = weight_fn

    def forward(self, z_i: Tensor, z_j: Tensor, **options: Any) -> Tensor:
        return type(self).function(z_i, z_j, **self.keywords(**options))


class HardNegativeLoss(ContrastiveLoss):
    """`hard_negative_loss` as a module: `HardNegativeLoss(temperature)(z_i, z_j)`.

    Args:
        temperature: positive number, a one-element tensor, or an nn.Parameter to learn it.
        beta, tau_plus, reduction, normalize, backend, group, exchange: as in
            `hard_negative_loss`. `sample_weight`, `ids`, `extra_negatives` and `extra_ids` are
            given at each call.

    Example:
        >>> HardNegativeLoss(beta=0.5)(torch.randn(4, 8), torch.randn(4, 8)).shape
        torch.Size([])
    """

    function = staticmethod(functional.hard_negative_loss)
    options = ("temperature", "beta", "tau_plus", *ContrastiveLoss.options)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        reduction: str = "mean",
        normalize: bool = True,
        backend: str | None = None,
        group: Any = None,
        exchange: str = "auto",
    ) -> None:
        super().__init__(reduction, normalize, backend, group, exchange)
        check.number("beta", beta, at_least=0)
        check.share("tau_plus", tau_plus)
        self._set_temperature(temperature)
        self.beta = beta
        self.tau_plus = tau_plus

    def forward(self, z_i: Tensor, z_j: Tensor, **options: Any) -> Tensor:
        return type(self).function(z_i, z_j, **self.keywords(**options))


FORWARDS = frozenset(
    cls.forward
    for cls in (
        NTXentLoss, InfoNCELoss, UELLoss, ClipLoss, SigLipLoss, SupConLoss, DCLLoss,
        HardNegativeLoss,
    )
)  # fmt: skip
"""What `value_and_grad` may replace by the fused call: a subclass's own forward is not here."""
