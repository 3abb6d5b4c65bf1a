"""What is left of a method when all that it puts around convolutions is folded into kernels and biases."""

from mimicnorm_jax.methods.method import Method
from mimicnorm_jax.methods.residuals import Residual


def folded(method: Method, *, relu6: bool = False) -> Method:
    """The record of a folded network, see `interop.fold`: no transform, norm or scalar, and biases everywhere.

    Four things stay, elementwise all of them: scalar biases before convolutions, which pad with zeros behind them;
    sign and bias of a ReLU that ends a concatenated branch; a constant of the activation; and one before a sign.

    Args:
      method: that the network was trained under.
      relu6: whether the network has ReLU6 under it.

    Example:
      >>> from mimicnorm_jax.methods import METHODS
      >>> folded(METHODS["mimicnorm"]).norm is None, folded(METHODS["mimicnorm"]).last_norm is None
      (True, True)
    """
    residual = method.residual
    return Method(
        "folded",
        "plain convolutions with biases, what interop.fold gives",
        residual=Residual(residual.front_biases, residual.scales_relu, folded=True, alpha=residual.alpha),
        activation=method.activation,
        conv_biases=True,
        relu6=relu6,
    )
